"""Commands about the parameter sets on a running server."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from optserve import Async, BoundedStaleness, Buffered, InvalidPolicy, Policy, Sync, optim
from optserve_server.cli.app import DEFAULT, PATIENT, Address, Rules, SetId, Timeout, app, connected, load, show

CHANGES_SHOWN = 10
POLICIES: dict[str, type[Policy]] = {
    "async": Async,
    "sync": Sync,
    "bounded-staleness": BoundedStaleness,
    "buffered": Buffered,
}


@app.command("list")
def list_sets(address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """List the parameter sets on a server, with the number of versions that are not on stable storage yet."""
    table = Table(
        Column("id", overflow="fold"), "rule", "version", "not durable", "journal", "tensors", "elements", "state"
    )
    with connected(address, timeout) as client:
        for each in client.list_parameter_sets():
            table.add_row(
                each.id,
                each.rule,
                str(each.version),
                str(each.version - each.position.durable_version),
                each.journal.value,
                str(each.tensor_count),
                f"{each.element_count:,}",
                f"{each.state_bytes / 2**20:,.1f} MiB",
            )
    show(table)


@app.command()
def describe(id: SetId, rules: Rules = None, address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """Show a parameter set's tensors, groups and hyperparameters."""
    load(rules)
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        description = weights.describe()
    console = Console()
    console.print(f"{description.id} holds {description.spec.holds.value}, version {description.version}")
    console.print(f"policy: {description.policy}, state: {description.spec.state.value}", highlight=False)
    console.print(f"workers push {description.spec.pushes.value}", highlight=False)
    tensors = Table("tensor", "dtype", "shape", "group")
    groups = {tensor: group.name for group in description.groups for tensor in group.tensors}
    for tensor in description.spec.tensors:
        tensors.add_row(tensor.name, tensor.dtype.name, str(list(tensor.shape)), groups[tensor.name])
    show(tensors)
    for group in description.groups:
        console.print(f"{group.name}: {group.optimizer.rule}({_assignments(group.optimizer.hyperparameters)})")
        for name, schedule in group.schedules.items():
            console.print(f"{group.name}: {name} follows {schedule}")
    if description.staleness:
        staleness = Table("staleness from", "pushes")
        for least, count in description.staleness.items():
            staleness.add_row(f"{least:,}", f"{count:,}")
        show(staleness)
    if description.changes:
        changes = Table("changed after version", "group", "to", title=f"the last of {len(description.changes)} changes")
        for change in description.changes[-CHANGES_SHOWN:]:
            changes.add_row(f"{change.version:,}", change.group, _assignments(change.values))
        show(changes)


@app.command()
def workers(id: SetId, address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """List the members of a parameter set."""
    table = Table(Column("worker", overflow="fold"), "member since", "silent for", "pushes", "staleness", "state")
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        for each in weights.workers():
            table.add_row(
                each.client_id,
                f"{each.join_time:%Y-%m-%d %H:%M:%S} UTC",
                f"{each.idle:.1f} s",
                f"{each.pushes:,}",
                "" if each.staleness is None else f"{each.staleness:,}",
                "quarantined" if each.quarantined else "waiting" if each.waiting else "working",
            )
    show(table)


@app.command()
def policy(
    id: SetId,
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(POLICIES)}.", show_default=False)],
    values: Annotated[list[str] | None, typer.Argument(help="Its values, such as workers=8 quorum=6.")] = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = 10.0,
) -> None:
    """Change when pushes become an update, while the parameter set is in use."""
    if kind not in POLICIES:
        raise typer.BadParameter(f"expected {', '.join(POLICIES)}; got {kind!r}")
    arguments = {name: _whole(value) for name, value in map(_assignment, values or ())}
    try:
        chosen = POLICIES[kind](**arguments)
    except (TypeError, InvalidPolicy) as error:
        raise typer.BadParameter(f"expected values of {POLICIES[kind].__name__}; {error}") from None
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        description = weights.update(policy=chosen)
    print(f"{id}: {description.policy} after version {description.version}")


@app.command("set")
def set_hyperparameters(
    id: SetId,
    values: Annotated[list[str], typer.Argument(help="New values, such as lr=3e-4.", show_default=False)],
    group: Annotated[str, typer.Option(help="The group to change.")] = optim.Group.DEFAULT,
    rules: Rules = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = 10.0,
) -> None:
    """Change hyperparameters of a parameter set while it is in use."""
    changes = dict(_assignment(value) for value in values)
    load(rules)
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        description = weights.update(group=group, **changes)
    print(f"{id}: {', '.join(changes)} changed after version {description.version}")


@app.command()
def rewind(
    id: SetId,
    version: Annotated[int, typer.Argument(help="The version to go back to.", show_default=False)],
    address: Address = DEFAULT.listen,
    timeout: Timeout = PATIENT,
) -> None:
    """Let a parameter set go back to an earlier version, for every worker."""
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        weights.rewind(version)
    print(f"{id}: is what it was at version {version}")


@app.command()
def fork(
    id: SetId,
    new_id: Annotated[str, typer.Argument(help="Id of the new parameter set.", show_default=False)],
    version: Annotated[int | None, typer.Option(help="Where to begin; by default where it is now.")] = None,
    address: Address = DEFAULT.listen,
    timeout: Timeout = PATIENT,
) -> None:
    """Create a parameter set from what another is, or was at an earlier version."""
    with (
        connected(address, timeout) as client,
        client.parameter_set(id) as weights,
        weights.fork(new_id, version) as new,
    ):
        begun = new.describe().version
    print(f"{new_id}: begins at version {begun} of {id}")


@app.command()
def delete(id: SetId, address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """Delete a parameter set and its checkpoints."""
    with connected(address, timeout) as client, client.parameter_set(id) as weights:
        weights.delete()
    print(f"{id}: deleted")


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"expected name=value; got {text!r}")
    return name, _value(value)


def _whole(value: Any) -> Any:
    """A number without a fraction as an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _value(text: str) -> Any:
    """A hyperparameter as people write it: true, 3e-4, none, or 0.9,0.999."""
    if text.lower() == "none":
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "," in text:
        return [_value(part) for part in text.split(",")]
    try:
        return float(text)
    except ValueError:
        return text
