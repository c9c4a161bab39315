"""A demonstration: worker processes that learn to read handwritten digits through a server."""
