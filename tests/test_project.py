"""The project's own promises about itself: generated code, documentation, layers, names."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import optserve
from optserve import _errors, _transport, optim
from optserve_server import server

ROOT = Path(__file__).parent.parent
PROTOS = sorted((ROOT / "proto" / "optserve" / "v1").glob("*.proto"))
SOURCES = [
    *sorted((ROOT / "client" / "optserve").glob("*.py")),
    *sorted((ROOT / "server" / "optserve_server").rglob("*.py")),
]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_message_field_value_and_method_of_the_contract_is_documented(path: Path) -> None:
    commented = False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if text.startswith("//"):
            commented = True
            continue
        declares = re.match(r"(message|enum|service|rpc|oneof)\b|.*= \d+( \[.*\])?;$", text)
        if declares and not text.startswith(("syntax", "option")):
            assert commented, f"{path.name}:{number}: {text}"
        commented = False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def files_of(module: str) -> list[Path]:
    """The file of one of our modules, or nothing."""
    parts = module.split(".")
    root = ROOT / ("client" if parts[0] == "optserve" else "server")
    return [path for path in [root.joinpath(*parts).with_suffix(".py")] if path.exists()]


def reached_from(path: Path) -> set[str]:
    """Modules that a file imports, directly or through other modules of ours."""
    found: set[str] = set()
    todo = [path]
    while todo:
        new = imports(todo.pop()) - found
        found |= new
        todo += [file for module in new for file in files_of(module)]
    return found


def test_the_engine_and_storage_know_no_transport() -> None:
    forbidden = {
        "engine": ("grpc", "google.protobuf", "optserve.v1", "optserve._transport", "optserve._wire"),
        "storage": ("grpc", "optserve._transport", "optserve._wire"),
    }
    for folder, prefixes in forbidden.items():
        for path in (ROOT / "server" / "optserve_server" / folder).rglob("*.py"):
            for module in reached_from(path):
                assert not module.startswith(prefixes), f"{path.name} reaches {module}"


def test_dependencies_point_one_way() -> None:
    """Engine ← storage ← service ← server ← command line; the SDK knows of the server only to run it in memory."""
    ranks = {
        "engine": 0,
        "storage": 1,
        "gate": 1,
        "stalls": 1,
        "failures": 0,
        "local_channel": 1,
        "shared_memory": 2,
        "replication": 2,
        "config": 2,
        "peer": 2,
        "pair": 2,
        "step": 2,
        "service": 3,
        "interceptor": 3,
        "server": 4,
    }
    ranks |= {"logs": 4, "__init__": 5, "demo": 6, "cli": 7, "__main__": 8}
    package = ROOT / "server" / "optserve_server"
    for path in package.rglob("*.py"):
        own = ranks[path.relative_to(package).parts[0].removesuffix(".py")]
        for module in imports(path):
            if match := re.match(r"optserve_server\.(\w+)", module):
                assert ranks.get(match[1], 0) <= own, f"{path.relative_to(package)} imports {module}"
    users = [path.name for path in (ROOT / "client" / "optserve").glob("*.py") if "optserve_server" in path.read_text()]
    assert set(users) <= {"_transport.py", "__init__.py"}


def test_public_names_are_complete() -> None:
    errors = {error.__name__ for error in _errors._tree(_errors.OptserveError)}
    assert errors <= set(optserve.__all__)
    assert {name for name in vars(optim) if name in optim.catalogue()} <= set(optim.__all__)


def test_every_error_maps_to_a_status_code_and_back() -> None:
    import grpc

    for error in _errors._tree(_errors.OptserveError):
        assert error.code in grpc.StatusCode.__members__
        assert type(_errors.error_from(error.code, error.reason(), "why")) is error
        assert error.__doc__


def test_the_tree_drawn_in_the_errors_module_is_the_tree() -> None:
    drawn = re.findall(r"^[│├└─ ]*(\w+)", _errors.__doc__ or "", re.MULTILINE)
    assert {error.__name__ for error in _errors._tree(_errors.OptserveError)} == {
        name for name in drawn if hasattr(_errors, name)
    }


def test_grpc_knows_every_option_that_it_is_given() -> None:
    """It would say nothing of others."""
    from grpc._cython import cygrpc

    library = Path(cygrpc.__file__).read_bytes()
    names = [name for name, _ in (*server.OPTIONS, *_transport.CHANNEL_OPTIONS)]
    assert [name for name in names if name.encode() not in library] == []


def test_optimizers_have_the_names_and_defaults_of_torch() -> None:
    import inspect

    import torch

    implementation = {"foreach", "capturable", "differentiable", "fused", "params"}
    for name in ("SGD", "ASGD", "Adagrad", "Adadelta", "RMSprop", "Rprop", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"):
        theirs = {
            key: parameter.default
            for key, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items()
            if key not in implementation
        }
        ours = getattr(optim, name)().hyperparameters
        ours.pop("convention", None)
        if name == "AdamW":
            assert ours.pop("decoupled_weight_decay") is True
        assert ours == {key: tuple(value) if isinstance(value, list) else value for key, value in theirs.items()}


def test_generated_code_is_current(tmp_path: Path) -> None:
    path = ROOT / "proto" / "generate.py"
    specification = importlib.util.spec_from_file_location("generate", path)
    assert specification
    assert specification.loader
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    generator.generate(tmp_path)
    fresh = {file.name: file.read_text() for file in (tmp_path / "optserve" / "v1").iterdir()}
    folder = ROOT / "client" / "optserve" / "v1"
    committed = {file.name: file.read_text() for file in folder.iterdir() if file.suffix in (".py", ".pyi")}
    committed.pop("__init__.py")
    assert fresh == committed
