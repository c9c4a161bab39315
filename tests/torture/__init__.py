"""Torture: real processes are killed, acknowledgements are dropped, and every push is accounted for.

`kills` and `dropped_acks` run for as long as one likes, from the root of the repository; `wrong` shows that they see mistakes.
"""
