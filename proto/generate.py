"""Generate `client/optserve/v1` from the .proto files beside this script: `python proto/generate.py [OUTPUT]`."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
CLIENT = PROTO.parent / "client"


def generate(output: Path) -> None:
    """Write the Python modules of every .proto file below `output`, an import root; raises SystemExit if protoc fails."""
    output.mkdir(parents=True, exist_ok=True)
    sources = sorted((PROTO / "optserve" / "v1").glob("*.proto"))
    services = [path for path in sources if path.stem.endswith("_service")]
    include = [f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}"]
    for arguments in (
        [f"--python_out={output}", f"--pyi_out={output}", *map(str, sources)],
        [f"--grpc_python_out={output}", *map(str, services)],
    ):
        if protoc.main(["protoc", *include, *arguments]) != 0:
            raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else CLIENT)
