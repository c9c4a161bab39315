"""A hook of MkDocs: pages that are made of the code when the site is built, and links to sources that lead somewhere on it.

On GitHub a link to a source shows the source. The site has no sources but those that pages link to; and where it has a page
made of a source, that one is meant.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for benchmarks, whose figures one page shows

import api  # noqa: E402 (MkDocs lets a hook import what is beside it)
import catalogue  # noqa: E402
import performance  # noqa: E402
import sources  # noqa: E402
import wire  # noqa: E402

MADE_OF = {
    "client/optserve/_errors.py": "reference/errors.md",
    "client/optserve/interop": "reference/interop.md",
    "client/optserve/optim": "reference/optimizers.md",
    "client/optserve/presets.py": "reference/presets.md",
    "client/optserve/schedules.py": "reference/schedules.md",
    "proto/optserve/v1": "reference/wire/index.md",
}
LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FIGURES = re.compile(r"<!-- figures: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of code, and the sources that any page links to."""
    pages = {**api.pages(), **wire.pages(), "reference/optimizers.md": catalogue.page()}
    pages["reference/commands.md"] = commands()
    written = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {path for uri, text in (written | pages).items() for path in _linked(uri, text)}
    for path in sorted(linked):
        if path.suffix == ".png":
            files.append(File.generated(config, sources.uri(path), abs_src_path=str(ROOT / path)))
        else:
            pages[sources.uri(path)] = sources.page(path)
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put figures in their places, and let links to sources lead to pages."""
    markdown = FIGURES.sub(lambda found: performance.table(found[1]), markdown)

    def lead(found: re.Match[str]) -> str:
        path = sources.target(page.file.src_uri, found["path"])
        uri = MADE_OF.get(path.as_posix()) or (sources.uri(path) if sources.is_source(path) else None)
        if uri is None:
            return found[0]  # to another page; or nowhere, and MkDocs says so
        return f"]({sources.relative(page.file.src_uri, uri)}{found['anchor'] or ''})"

    return LINK.sub(lead, markdown)


def commands() -> str:
    """The command line, as Typer documents it."""
    command = [sys.executable, "-m", "typer", "optserve_server.cli", "utils", "docs", "--name", "optserve"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    first = text.index("## `")  # after a list of all commands, each described by half a sentence
    return f"# Command line\n\n`optserve` has these commands; each also says what it takes with `--help`.\n\n{text[first:]}"


def _linked(uri: str, text: str) -> Iterator[Path]:
    for found in LINK.finditer(text):
        path = sources.target(uri, found["path"])
        if path.as_posix() not in MADE_OF and sources.is_source(path):
            yield path
