"""Commands about what is on stable storage: checkpoints, data directories, files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

import optserve
from optserve._errors import InvalidArgument
from optserve_server.cli.app import (
    DEFAULT,
    PATIENT,
    Address,
    Rules,
    SetId,
    Timeout,
    app,
    connected,
    load,
    reported,
    show,
)
from optserve_server.cli.bars import byte_bar
from optserve_server.storage import exports
from optserve_server.storage.tensors import Damaged
from optserve_server.storage.verify import Finding
from optserve_server.storage.verify import verify as findings


@app.command()
def checkpoint(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Ids of parameter sets; by default all.", show_default=False),
    ] = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = 120.0,
) -> None:
    """Write parameter sets to the server's data directory now."""
    failed = False
    with connected(address, timeout) as client, byte_bar("writing") as progress:
        sizes = {each.id: each.state_bytes for each in client.list_parameter_sets()}
        chosen = list(dict.fromkeys(ids)) if ids else list(sizes)
        done, total = 0, sum(sizes.get(id, 0) for id in chosen)
        for id in chosen:
            progress(done, total)
            try:
                with client.parameter_set(id) as weights:
                    position = weights.checkpoint()
            except optserve.OptserveError as error:  # the others can still be written
                typer.echo(f"optserve: {id}: {error}", err=True)
                failed = True
            else:
                print(f"{id}: version {position.durable_version} is on stable storage", flush=True)
            done += sizes.get(id, 0)
    if failed:
        raise typer.Exit(1)


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(help="A server's data directory; the server may be running.", show_default=False)
    ],
    rules: Rules = None,
) -> None:
    """Read and check all checkpoints and journals in a data directory; exit with 1 if anything is damaged."""
    load(rules)
    with reported(OSError), byte_bar("reading") as progress:
        found = list(findings(directory, progress))
    table = Table(Column("id", overflow="fold"), "checkpoint", "journal", "state")
    for each in found:
        table.add_row(each.set_id or each.directory.name, _checkpoint(each), f"{each.events:,} events", _state(each))
    show(table)
    if any(each.damage is not None for each in found):
        raise typer.Exit(1)


@app.command()
def export(
    id: SetId,
    file: Annotated[Path, typer.Argument(help="Where to write it: FILE.safetensors.", show_default=False)],
    parameters_only: Annotated[
        bool, typer.Option("--parameters-only", help="Only the parameters, under their own names, for inference.")
    ] = False,
    rules: Rules = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = PATIENT,
) -> None:
    """Write a parameter set's whole state from a running server to a file."""
    load(rules)
    with reported(OSError, ValueError), connected(address, timeout) as client, client.parameter_set(id) as weights:
        if file.suffix != exports.SUFFIX:
            raise ValueError(f"expected a file that ends in {exports.SUFFIX}; got {file}")
        description = weights.describe()
        if parameters_only:
            version = _export_parameters(weights, description, file)
        else:
            with byte_bar("receiving") as progress:
                state = weights.state(progress=lambda done: progress(done, description.state_bytes))
            with byte_bar("writing") as progress:
                exports.write_state(file, description.spec, state, progress)
            version = state.version
    print(f"{id}: version {version} is in {file}")


@app.command()
def restore(
    path: Annotated[
        Path, typer.Argument(help="A file from `optserve export`, or one checkpoint's directory.", show_default=False)
    ],
    id: Annotated[str | None, typer.Option(help="Id of the new parameter set; by default as it was.")] = None,
    journal: Annotated[
        optserve.Journal | None, typer.Option(help="Journal of the new parameter set; by default as it was.")
    ] = None,
    rules: Rules = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = PATIENT,
) -> None:
    """Create a parameter set on a running server from a file, to go on where it stood, bit for bit."""
    load(rules)
    with reported(OSError, InvalidArgument, Damaged), byte_bar("reading") as progress:
        spec, state = exports.read_state(path, progress)
    total = sum(array.nbytes for array in state.packed()[1])
    with connected(address, timeout) as client, byte_bar("sending") as progress:
        restored = client.create_parameter_set(
            id or spec.id,
            state,
            holds=spec.holds,
            guard=spec.guard,
            policy=spec.policy,
            transforms=spec.transforms,
            state=spec.state,
            journal=journal or spec.journal,
            progress=lambda done: progress(done, total),
        )
    print(f"{restored.id}: restored at version {state.version}")


def _export_parameters(weights: optserve.ParameterSet, description: optserve.Description, file: Path) -> int:
    """Write the parameters as the set was given them; their version."""
    if description.spec.holds is optserve.Holds.MOMENTS:
        raise ValueError(f"parameter set {weights.id!r} holds moments only; its parameters are with whoever pushes")
    if description.spec.tables:
        raise ValueError(f"parameter set {weights.id!r} has tables, which don't travel yet")
    parameters = weights.pull()
    with byte_bar("writing") as progress:
        exports.write_parameters(file, weights.id, parameters.version, parameters, progress)
    return parameters.version


def _checkpoint(finding: Finding) -> str:
    if finding.event is None:
        return "none"
    version = "?" if finding.version is None else f"{finding.version:,}"
    return f"version {version}, event {finding.event:,}"


def _state(finding: Finding) -> str:
    if finding.damage is not None:
        return f"damaged: {finding.damage}"
    if finding.event is None:
        return "sound; nothing was written yet"
    if finding.unfinished is not None:
        return f"sound; event {finding.unfinished:,} was cut short, and is passed over"
    return "sound"
