"""`python -m benchmarks [NAME]`: what is named, or everything, in one run."""

import argparse
import os
from collections.abc import Callable, Mapping

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: its idle threads spin otherwise

from benchmarks import crash, crowd, distance, durability, failover, policies, rules, staleness, torch_step, wan, wire

TRAINING: Mapping[str, Callable[..., None]] = {
    "wan": wan.run,
    "crowd": crowd.run,
    "staleness": staleness.run,
    "policies": policies.run,
    "crash": crash.run,
    "distance": distance.run,
    "torch": torch_step.run,
}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure; by default everything.")
parser.add_argument("name", nargs="?", choices=("rules", "wire", "durability", *TRAINING))
parser.add_argument(
    "--sizes",
    nargs="+",
    type=int,
    choices=wire.EFFORTS,
    default=[],
    metavar="N",
    help=f"of {', '.join(map(str, wire.EFFORTS))} parameters; a run with some of them is shown, but not kept",
)
parser.add_argument(
    "--short",
    action="store_true",
    help=f"{', '.join(TRAINING)}: a minute or two, to see that it works, which is shown, but not kept",
)
arguments = parser.parse_args()
if arguments.name in (None, "rules"):
    rules.run(arguments.sizes)
if arguments.name in (None, "wire"):
    wire.run(arguments.sizes or list(wire.EFFORTS))
if arguments.name in (None, "durability"):
    durability.run()
    failover.run()
for name, run in TRAINING.items():
    if arguments.name in (None, name):
        run(short=arguments.short)
