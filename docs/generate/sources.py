"""Sources as pages, and where these are."""

import posixpath
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {".py": "python", ".proto": "protobuf", ".yml": "yaml", ".toml": "toml"}


def uri(path: Path) -> str:
    """The page, or the picture, that a file of the repository is on the site."""
    return f"source/{path.as_posix()}" + ("" if path.suffix == ".png" else ".md")


def page(path: Path) -> str:
    """A file as it is; not searched."""
    language = LANGUAGES.get(path.suffix, "text")
    text = (ROOT / path).read_text()
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}\n````\n"


def target(page: str, link: str) -> Path:
    """The file of the repository that a page of the documentation links to."""
    return Path(posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link)))


def is_source(path: Path) -> bool:
    """Whether there is such a file beside the documentation."""
    return path.parts[0] != "docs" and (ROOT / path).is_file()


def relative(page: str, uri: str) -> str:
    """A link from one page of the site to another."""
    return posixpath.relpath(uri, posixpath.dirname(page) or ".")
