"""`python -m benchmarks [rules] [wire]`: what is named, or everything, in one run."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: its idle threads spin otherwise

from benchmarks import rules, wire

BENCHMARKS = {"rules": rules.run, "wire": wire.run}

for name in sys.argv[1:] or BENCHMARKS:
    BENCHMARKS[name]()
