"""optserve itself: each module is one way to do a step, against a server process of its own."""
