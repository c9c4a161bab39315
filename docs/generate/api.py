"""Pages of the Python API: what to write for mkdocstrings, so that no public name is missing."""

import enum
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import griffe

import optserve
from optserve import _errors, aio, optim

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT / "client", ROOT / "server"]  # read, not imported: some of it needs torch or JAX
HANDLES = ("Client", "ParameterSet", "DiLoCo", "Identity", "keep_freed_memory")
MODULES = {
    "schedules": ("Schedules", ["optserve.schedules"]),
    "staleness": ("Staleness", ["optserve.staleness"]),
    "aggregation": ("Aggregation", ["optserve.aggregation"]),
    "formats": ("Wire formats", ["optserve.formats"]),
    "presets": ("Presets", ["optserve.presets"]),
    "interop": ("Moving in and out", ["optserve.interop.torch", "optserve.interop.optax", "optserve.interop.keras"]),
    "torch": ("PyTorch", ["optserve.torch"]),
    "jax": ("JAX", ["optserve.jax"]),
    "keras": ("Keras", ["optserve.keras"]),
    "aio": ("asyncio", ["optserve.aio"]),
    "server": ("Server", ["optserve_server"]),
}  # by page: its title, and the modules whose public names it has
OPTIONS = {
    "optserve.ParameterSet": {"merge_init_into_class": "false"},  # a client makes it
    "optserve.aio.ParameterSet": {"merge_init_into_class": "false"},
}


def pages() -> dict[str, str]:
    """The text of each page by its path."""
    sources = griffe.GriffeLoader(search_paths=PATHS)
    for package in ("optserve", "optserve_server"):
        sources.load(package)
    code = sources.modules_collection
    found = {
        "client": "# Client and handles\n\n" + _objects("optserve", HANDLES),
        "values": "# Policies, transforms, answers\n\n" + "\n\n".join(_values(code)),
        "errors": "# Errors\n\n" + _tree(),
        "optim": "# What an optimizer is\n\nThe optimizers themselves: [the catalogue](optimizers.md).\n\n"
        + _objects("optserve.optim", (name for name in optim.__all__ if name not in optim.catalogue())),
    }
    for page, (title, modules) in MODULES.items():
        found[page] = f"# {title}\n\n" + "\n\n".join(_module(code[name]) for name in modules)
    found["aio"] += f"\n\n{_twins()}"
    return {f"reference/{page}.md": text + "\n" for page, text in found.items()}


def _values(code: griffe.ModulesCollection) -> Iterator[str]:
    """The rest of `optserve`, by the modules that have it."""
    homes = {
        name: code["optserve"][name].target_path.rpartition(".")[0]
        for name in optserve.__all__
        if name not in (*HANDLES, *vars(_errors)) and not inspect.ismodule(getattr(optserve, name))
    }
    for home in sorted(set(homes.values())):
        names = [name for name in code[home].members if homes.get(name) == home]
        yield f"## {_title(code[home].docstring.value)}\n\n{_objects('optserve', names)}"


def _title(about: str) -> str:
    return about.partition("\n")[0].partition(":")[0].removesuffix(".")


def _tree() -> str:
    about, _, tree = (inspect.getdoc(_errors) or "").partition("\n\n")
    errors = [each.__name__ for each in _errors._tree(_errors.OptserveError)]
    return f"{about}\n\n```text\n{tree}\n```\n\n{_objects('optserve', (*errors, 'Refusal'))}"


def _twins() -> str:
    """Methods that are made of others when the module is imported, which griffe does not do."""
    twins = [name for name, value in vars(aio.ParameterSet).items() if hasattr(value, "__wrapped__")]
    listed = ", ".join(f"`{name}`" for name in twins if not name.startswith("_"))
    twin = "[`optserve.ParameterSet`](client.md)"
    return f"`ParameterSet` has these as well, to be awaited, with the arguments of {twin}: {listed}."


def _module(module: griffe.Module) -> str:
    exported = set(map(str, module.exports or ()))
    names = [name for name in module.members if name in exported]
    about = module.docstring.value if module.docstring else ""
    return f"## {module.path}\n\n{about}\n\n{_objects(module.path, names)}"


def _objects(module: str, names: Iterable[str]) -> str:
    return "\n\n".join(_object(f"{module}.{name}") for name in names)


def _object(path: str) -> str:
    options = OPTIONS.get(path, {})
    value = getattr(optserve, path.removeprefix("optserve."), None)
    if isinstance(value, type) and issubclass(value, enum.Enum):
        options = {"show_if_no_docstring": "true"}  # of its members
    if isinstance(value, type) and issubclass(value, _errors.OptserveError):
        options = {"merge_init_into_class": "false"}  # they all take a message
    lines = "".join(f"      {name}: {choice}\n" for name, choice in options.items())
    return f"::: {path}\n" + (f"    options:\n{lines}" if options else "")
