"""What figures were measured on: processors, and versions of what ran on them."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path

PACKAGES = ("grpcio", "numba", "numpy", "pyarrow", "ray", "torch")
CPUINFO = Path("/proc/cpuinfo")


def description() -> dict[str, object]:
    """Enough to judge the figures by, and nothing that says whose machine it is."""
    return {
        "processor": processor(),
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {each.name: each.version for each in metadata.distributions() if each.name in PACKAGES},
    }


def processor() -> str:
    """The processor's model, as well as the system knows it."""
    model = re.search(r"model name\s*: (.+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    return model[1] if model else platform.processor()
