"""`python -m benchmarks [rules | wire | durability]`: what is named, or everything, in one run."""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: its idle threads spin otherwise

from benchmarks import durability, failover, rules, wire

parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; by default everything.")
parser.add_argument("name", nargs="?", choices=("rules", "wire", "durability"))
parser.add_argument(
    "--sizes",
    nargs="+",
    type=int,
    choices=wire.EFFORTS,
    default=[],
    metavar="N",
    help=f"of {', '.join(map(str, wire.EFFORTS))} parameters; a run with some of them is shown, but not kept",
)
arguments = parser.parse_args()
if arguments.name in (None, "rules"):
    rules.run(arguments.sizes)
if arguments.name in (None, "wire"):
    wire.run(arguments.sizes or list(wire.EFFORTS))
if arguments.name in (None, "durability"):
    durability.run()
    failover.run()
