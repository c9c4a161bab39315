"""The command line: `optserve serve`, `optserve demo`, and what an operator asks of a running server."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import optserve
from optserve import optim
from optserve._transport import connect
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server import logs
from optserve_server.config import Config
from optserve_server.demo.tuning import LEARNING_RATES
from optserve_server.engine.rules import own
from optserve_server.server import Server

app = typer.Typer(help="The optimizer step as a service.", no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULT = Config()
CHANGES_SHOWN = 10
OptimizerName = StrEnum("OptimizerName", {name: name for name in LEARNING_RATES})  # type: ignore[misc]
DEFAULT_OPTIMIZER = OptimizerName("Adam")

Address = Annotated[str, typer.Option(envvar="OPTSERVE_ADDRESS", help="Where the server listens, host:port.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for an answer.")]
Rules = Annotated[
    list[Path] | None,
    typer.Option("--rule", envvar="OPTSERVE_RULES", help="A Python file with rules of your own; may be repeated."),
]
SetId = Annotated[str, typer.Argument(help="Id of a parameter set.", show_default=False)]


@app.command()
def serve(
    listen: Annotated[
        str,
        typer.Option(envvar="OPTSERVE_LISTEN", help="host:port, [ipv6]:port or unix:/path; port 0 takes a free one."),
    ] = DEFAULT.listen,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="OPTSERVE_DATA_DIR", help="Where checkpoints are kept; without, memory only.")
    ] = None,
    checkpoint_interval: Annotated[
        float, typer.Option(help="Seconds between checkpoints of a set that changes.")
    ] = DEFAULT.checkpoint_interval,
    checkpoints_kept: Annotated[
        int, typer.Option(help="Checkpoints of each set that are kept, with the journal since the oldest.")
    ] = DEFAULT.checkpoints_kept,
    checkpoint_copy: Annotated[
        float,
        typer.Option(help="Part of a set's state that may be copied while it is written; steps wait for the rest."),
    ] = DEFAULT.checkpoint_copy,
    rules: Rules = None,
    threads: Annotated[int | None, typer.Option(help="Threads for updates; by default one for each processor.")] = None,
    max_streams: Annotated[int, typer.Option(help="Workers that may be connected at a time.")] = DEFAULT.max_streams,
    max_bytes_in_flight: Annotated[
        int, typer.Option(help="Bytes of gradients that may be under way at a time.")
    ] = DEFAULT.max_bytes_in_flight,
    max_shared_memory: Annotated[
        int, typer.Option(help="Bytes that workers on this host may hold for gradients in shared memory; 0: none.")
    ] = DEFAULT.max_shared_memory,
    upload_timeout: Annotated[
        float, typer.Option(help="Seconds after which an upload that makes no progress is ended.")
    ] = DEFAULT.upload_timeout,
    grace: Annotated[float, typer.Option(help="Seconds that pushes in flight get on shutdown.")] = DEFAULT.grace,
    follow: Annotated[
        str | None, typer.Option(envvar="OPTSERVE_FOLLOW", help="Be a standby of the server at this address.")
    ] = None,
    promote_after: Annotated[
        float | None, typer.Option(help="Seconds without a word of that server after which this one takes over.")
    ] = None,
    wait_for_standby: Annotated[
        bool, typer.Option("--wait-for-standby", help="Acknowledge only what the standby has confirmed.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(envvar="OPTSERVE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run a server until SIGTERM or Ctrl-C, then drain it."""
    with _reported(ValueError):
        logs.configure(log_level)
    optserve.keep_freed_memory()
    # Blocked in every thread, they wait for `sigwait`. A handler would run in the middle of anything, a lock's code included.
    stopping = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    with _reported(ValueError, OSError):
        config = Config(
            listen=listen,
            data_dir=data_dir,
            checkpoint_interval=checkpoint_interval,
            checkpoints_kept=checkpoints_kept,
            checkpoint_copy=checkpoint_copy,
            rules=tuple(rules or ()),
            threads=threads,
            max_streams=max_streams,
            max_bytes_in_flight=max_bytes_in_flight,
            max_shared_memory=max_shared_memory,
            upload_timeout=upload_timeout,
            grace=grace,
            follow=follow,
            promote_after=promote_after,
            wait_for_standby=wait_for_standby,
        )
        server = Server(config)
    with server:
        print(f"listening on {server.address}", flush=True)  # for scripts that asked for a free port
        signal.sigwait(stopping)


@app.command()
def demo(
    optimizer: Annotated[OptimizerName, typer.Option(help="The rule to train with.")] = DEFAULT_OPTIMIZER,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates over all workers.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the network and of the batches.")] = 0,
    address: Annotated[
        str | None, typer.Option(envvar="OPTSERVE_ADDRESS", help="A running server; by default one is started.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the picture.", show_default=False)] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train with every rule and format, and draw how they differ.")
    ] = False,
) -> None:
    """Train a network that reads handwritten digits, with worker processes against a server."""
    with _reported(ModuleNotFoundError, hint="install optserve[demo]"):
        from optserve_server.demo import compare as comparison
        from optserve_server.demo import train as training
        from optserve_server.demo.processes import ChildFailed
    given: dict[str, Any] = {"seed": seed}
    given |= {} if steps is None else {"steps": steps}
    given |= {} if output is None else {"output": output}
    with _reported(optserve.OptserveError, ChildFailed, ValueError):
        if compare:
            comparison.compare(**given)
        else:
            training.train(optimizer=optimizer.value, workers=workers, address=address, **given)


@app.command("list")
def list_sets(address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """List the parameter sets on a server."""
    table = Table("id", "rule", "version", "durable", "tensors", "elements", "state")
    with _client(address, timeout) as client:
        for each in client.list_parameter_sets():
            table.add_row(
                each.id,
                each.rule,
                str(each.version),
                str(each.position.durable_version),
                str(each.tensor_count),
                f"{each.element_count:,}",
                f"{each.state_bytes / 2**20:,.1f} MiB",
            )
    Console().print(table)


@app.command()
def describe(id: SetId, rules: Rules = None, address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """Show a parameter set's tensors, groups and hyperparameters."""
    _load(rules)
    with _client(address, timeout) as client, client.parameter_set(id) as weights:
        description = weights.describe()
    console = Console()
    console.print(f"{description.id} holds {description.spec.holds.value}, version {description.version}")
    console.print(f"policy: {description.spec.policy}, state: {description.spec.state.value}", highlight=False)
    tensors = Table("tensor", "dtype", "shape", "group")
    groups = {tensor: group.name for group in description.groups for tensor in group.tensors}
    for tensor in description.spec.tensors:
        tensors.add_row(tensor.name, tensor.dtype.name, str(list(tensor.shape)), groups[tensor.name])
    console.print(tensors)
    for group in description.groups:
        console.print(f"{group.name}: {group.optimizer.rule}({_assignments(group.optimizer.hyperparameters)})")
        for name, schedule in group.schedules.items():
            console.print(f"{group.name}: {name} follows {schedule}")
    if description.changes:
        changes = Table("changed after version", "group", "to", title=f"the last of {len(description.changes)} changes")
        for change in description.changes[-CHANGES_SHOWN:]:
            changes.add_row(f"{change.version:,}", change.group, _assignments(change.values))
        console.print(changes)


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
    _load(rules)
    with _client(address, timeout) as client, client.parameter_set(id) as weights:
        description = weights.update(group=group, **changes)
    print(f"{id}: {', '.join(changes)} changed after version {description.version}")


@app.command()
def checkpoint(id: SetId, address: Address = DEFAULT.listen, timeout: Timeout = 120.0) -> None:
    """Write a parameter set to the server's data directory now."""
    with _client(address, timeout) as client, client.parameter_set(id) as weights:
        position = weights.checkpoint()
    print(f"{id}: version {position.durable_version} is on stable storage")


@app.command()
def delete(id: SetId, address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """Delete a parameter set and its checkpoints."""
    with _client(address, timeout) as client, client.parameter_set(id) as weights:
        weights.delete()
    print(f"{id}: deleted")


@app.command()
def promote(address: Address = DEFAULT.listen, timeout: Timeout = 300.0) -> None:
    """Let a standby serve instead of its primary, or a server serve again that stopped because of its standby."""
    with _reported(optserve.OptserveError), closing(connect(address)) as transport:
        answer = transport.call("PromoteServer", pb.PromoteServerRequest(), timeout)
    if not answer.promoted:
        print(f"{address}: serves already")
    elif answer.deposed:
        print(f"{address}: serves now; the former primary has stopped, and this server has all that it had")
    else:
        print(f"{address}: serves now; the other server did not answer, and must not serve any more")


@app.command()
def status(address: Address = DEFAULT.listen, timeout: Timeout = 10.0) -> None:
    """Show what a server does, and how far a standby is behind."""
    with _reported(optserve.OptserveError), closing(connect(address)) as transport:
        answer = transport.call("GetServerStatus", pb.GetServerStatusRequest(), timeout)
    print(f"{address}: {pb.Phase.Name(answer.phase).removeprefix('PHASE_').lower()}")
    if answer.primary:
        promotable = "could be promoted" if answer.promotable else "has not got everything yet"
        print(f"follows {answer.primary}, {answer.lag:,} events behind; {promotable}")
    elif answer.standby:
        print(f"followed by {answer.standby}, {answer.lag:,} events behind")


@app.command()
def health(address: Address = DEFAULT.listen, timeout: Timeout = 5.0) -> None:
    """Exit with 0 if the server serves, for health checks."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            typer.echo(f"{address}: {error.code().name}: {error.details()}", err=True)
            raise typer.Exit(1) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{address}: {status}")
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)


def _load(rules: list[Path] | None) -> None:
    """Know rules of one's own, as the server does."""
    with _reported(ValueError):
        for path in rules or ():
            own.load(path)


@contextmanager
def _client(address: str, timeout: float) -> Iterator[optserve.Client]:
    with _reported(optserve.OptserveError), optserve.Client(address, timeout=timeout) as client:
        yield client


@contextmanager
def _reported(*expected: type[Exception], hint: str = "") -> Iterator[None]:
    """End with the error's message and exit code 1, without a traceback."""
    try:
        yield
    except expected as error:
        typer.echo(f"optserve: {error}" + (f"; {hint}" if hint else ""), err=True)
        raise typer.Exit(1) from None


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"expected name=value; got {text!r}")
    return name, _value(value)


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
