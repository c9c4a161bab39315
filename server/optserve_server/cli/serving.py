"""Commands that run servers: `serve`, `demo`; and `health`, which asks one how it is."""

import signal
from contextlib import ExitStack, closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import optserve
from optserve._transport import connect_to
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from optserve_server import logs
from optserve_server.cli.app import DEFAULT, Address, Rules, Timeout, app, reported
from optserve_server.config import Config
from optserve_server.demo.tuning import LEARNING_RATES
from optserve_server.server import Server

OptimizerName = StrEnum("OptimizerName", {name: name for name in LEARNING_RATES})  # type: ignore[misc]
DEFAULT_OPTIMIZER = OptimizerName("Adam")


@app.command()
def serve(
    listen: Annotated[
        str,
        typer.Option(envvar="OPTSERVE_LISTEN", help="host:port, \\[ipv6]:port or unix:/path; port 0 takes a free one."),
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
    checkpoint_store: Annotated[
        str | None,
        typer.Option(
            envvar="OPTSERVE_CHECKPOINT_STORE", help="URL where checkpoints are copied to: s3://bucket/prefix."
        ),
    ] = None,
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
    lease: Annotated[float, typer.Option(help="Seconds of silence after which others wait for a worker no more.")] = (
        DEFAULT.lease
    ),
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
    with reported(ValueError):
        logs.configure(log_level)
    optserve.keep_freed_memory()
    # Blocked in every thread, they wait for `sigwait`. A handler would run in the middle of anything, a lock's code included.
    stopping = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    with ExitStack() as stack:
        with reported(ValueError, OSError):
            config = Config(
                listen=listen,
                data_dir=data_dir,
                checkpoint_interval=checkpoint_interval,
                checkpoints_kept=checkpoints_kept,
                checkpoint_copy=checkpoint_copy,
                checkpoint_store=checkpoint_store,
                rules=tuple(rules or ()),
                threads=threads,
                max_streams=max_streams,
                max_bytes_in_flight=max_bytes_in_flight,
                max_shared_memory=max_shared_memory,
                upload_timeout=upload_timeout,
                grace=grace,
                lease=lease,
                follow=follow,
                promote_after=promote_after,
                wait_for_standby=wait_for_standby,
            )
            server = stack.enter_context(Server(config))
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
    with reported(ModuleNotFoundError, hint="install optserve[demo]"):
        from optserve_server.demo import compare as comparison
        from optserve_server.demo import train as training
        from optserve_server.demo.processes import ChildFailed
    given: dict[str, Any] = {"seed": seed}
    given |= {} if steps is None else {"steps": steps}
    given |= {} if output is None else {"output": output}
    with reported(optserve.OptserveError, ChildFailed, ValueError):
        if compare:
            comparison.compare(**given)
        else:
            training.train(optimizer=optimizer.value, workers=workers, address=address, **given)


@app.command()
def promote(address: Address = DEFAULT.listen, timeout: Timeout = 300.0) -> None:
    """Let a standby serve instead of its primary, or a server serve again that stopped because of its standby."""
    with reported(optserve.OptserveError), closing(connect_to(address)) as transport:
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
    with reported(optserve.OptserveError), closing(connect_to(address)) as transport:
        answer = transport.call("GetServerStatus", pb.GetServerStatusRequest(), timeout)
    print(f"{address}: {pb.Phase.Name(answer.phase).removeprefix('PHASE_').lower()}")
    if answer.primary:
        promotable = "could be promoted" if answer.promotable else "has not got everything yet"
        print(f"follows {answer.primary}, {answer.lag:,} events behind; {promotable}")
    elif answer.standby:
        print(f"followed by {answer.standby}, {answer.lag:,} events behind")


@app.command()
def health(address: Address = DEFAULT.listen, timeout: Timeout = 5.0) -> None:
    """Exit with 0 if the server serves, for health checks; if it restores, say how far it is."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            why = "" if answer.status == serving else _doing(OptimizerServiceStub(channel), timeout)
        except grpc.RpcError as error:
            typer.echo(f"{address}: {error.code().name}: {error.details()}", err=True)
            raise typer.Exit(1) from None
    print(f"{address}: {status}{why}")
    if answer.status != serving:
        raise typer.Exit(1)


def _doing(server: OptimizerServiceStub, timeout: float) -> str:
    """What a server does instead of serving."""
    status = server.GetServerStatus(pb.GetServerStatusRequest(), timeout=timeout)
    if status.phase == pb.PHASE_RESTORING:
        return f", restoring: {status.bytes_read:,} of {status.bytes_total:,} bytes read"
    return ", draining" if status.phase == pb.PHASE_DRAINING else ""
