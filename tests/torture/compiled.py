"""Imported once, before children are forked: what they need, and the loops for the checker's sets. No thread is left behind."""

import threading

from tests.torture import children, worker  # noqa: F401
from tests.torture.checker import ADAM, SUMS, Shape

import optserve
from optserve_server import cli  # noqa: F401

SHAPE = Shape(clients=2, capacity=1)

with optserve.Client(":memory:") as client:
    SHAPE.create(client)
    for set_id in (SUMS, ADAM):
        with client.parameter_set(set_id) as handle:
            handle.step(SHAPE.gradients(set_id, 0, 0))

for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
