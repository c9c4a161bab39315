"""`python -m benchmarks`: everything, in one run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: its idle threads spin otherwise

from benchmarks import rules

rules.run()
