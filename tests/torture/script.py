"""Scripts of this folder, in processes of their own."""

import subprocess
import sys
from pathlib import Path


def run(name: str, *arguments: str) -> None:
    """Run one; raises AssertionError with all that it printed if it ends with an error."""
    command = [sys.executable, "-m", f"tests.torture.{name}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
