"""Torture: real processes are killed, acknowledgements are dropped, power is lost, and every push is accounted for.

From the root of the repository, for as long as one likes: `kills` and `dropped_acks` with servers and workers; `power_loss`,
`damage` and `failpoints` with engine and storage in one process. `wrong` and `wrong_storage` show that they see mistakes.
"""
