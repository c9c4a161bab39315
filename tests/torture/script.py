"""Scripts of this folder, in processes of their own."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run(name: str, *arguments: str) -> None:
    """Run one; raises AssertionError with all that it printed if it ends with an error."""
    command = [sys.executable, "-m", f"tests.torture.{name}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def report(program: str, description: str | None, wrong: Mapping[str, Any], seen: Callable[[str], str]) -> int:
    """The main program of a list of mistakes: says how each is seen; 1 if one is not."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(wrong)}; by default all")
    unseen = 0
    for name in parser.parse_args().names or wrong:
        try:
            print(f"{name}: {wrong[name].says}. Seen: {seen(name)[:200]}", flush=True)
        except AssertionError as error:
            unseen += 1
            print(f"{name}: NOT AS IT SHOULD BE: {error}", flush=True)
    return 1 if unseen else 0
