"""docker-compose.yml: valid by the published schema, and its very command lines work."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from processes import running

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def command_line(words: list[str], **elsewhere: str) -> list[str]:
    """A command of the file, with its address and folders moved to where this test may use them."""
    assert words[0] == "optserve"
    places = {"0.0.0.0:50051": "listen", "127.0.0.1:50051": "address", "server:50051": "address", "/data": "data"}
    return [elsewhere[places[word]] if word in places else word for word in words[1:]]


def test_the_file_is_valid_by_the_published_compose_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_its_command_lines_serve_pass_the_health_check_and_train(tmp_path: Path) -> None:
    listen, data = "127.0.0.1:0", str(tmp_path / "data")
    serve = command_line(SERVICES["server"]["command"], listen=listen, data=data)
    assert serve[0] == "serve"
    with running(*serve[1:], log=tmp_path / "log") as server:
        kind, *health = SERVICES["server"]["healthcheck"]["test"]
        assert kind == "CMD"
        optserve = [sys.executable, "-m", "optserve_server"]
        assert subprocess.run(optserve + command_line(health, address=server.address)).returncode == 0
        demo = command_line(SERVICES["demo"]["command"], address=server.address)
        picture = tmp_path / "demo.png"
        demo[demo.index("--output") + 1] = str(picture)
        result = subprocess.run([*optserve, *demo, "--steps", "60"], capture_output=True, text=True, timeout=100)
        assert result.returncode == 0, result.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert server.stop() == 0


def test_the_image_runs_the_same_command_and_has_what_the_build_copies() -> None:
    dockerfile = (ROOT / SERVICES["server"]["build"]["dockerfile"]).read_text()
    command = re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert command
    assert yaml.safe_load(command[1]) == SERVICES["server"]["command"]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert source in kept
