"""Training on the digits: a server, worker processes that push to it, and this process, which watches."""

import json
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

import optserve
from optserve import Parameters, ParameterSet, optim
from optserve_server.demo import digits, plots, tuning
from optserve_server.demo.display import Display
from optserve_server.demo.history import History, Measurement
from optserve_server.demo.processes import Child, deferred_interrupts, local_server, python
from optserve_server.demo.worker import TIMEOUT

REFRESH = 0.1  # seconds between two looks at the parameters
SINGLE_THREADED = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


@dataclass(frozen=True, slots=True)
class Result:
    """How training ended: accuracy on the test images, mean loss over the training images, and how long it all took."""

    accuracy: float
    loss: float
    seconds: float
    picture: Path


def train(
    *,
    optimizer: str = "Adam",
    workers: int = 4,
    steps: int = 2000,
    seed: int = 0,
    address: str | None = None,
    output: Path = Path("optserve-demo.png"),
) -> Result:
    """Train with `workers` processes, `steps` updates in all, and draw what happened into `output`.

    Starts a server, unless the `address` of one is given. Raises ValueError, UnknownRule, ChildFailed if a process fails, and
    what the SDK raises if the server does.
    """
    if workers < 1 or steps < 1:
        raise ValueError(f"expected at least one worker and one step; got {workers} and {steps}")
    began = time.monotonic()
    console = Console()
    console.print(f"starting {workers} workers" + (" and a server" if address is None else ""), style="dim")
    rule = tuning.for_digits(optimizer)
    history = History()
    with (
        deferred_interrupts() as check_interrupts,
        local_server() if address is None else nullcontext(address) as server,
        optserve.Client(server, timeout=TIMEOUT) as client,
        _temporary_set(client, rule, seed) as weights,
        ThreadPoolExecutor(workers) as readers,
        _workers(server, weights.id, count=workers, seed=seed, steps=steps) as children,
    ):
        training, test = digits.load()
        title = f"{rule.rule}, learning rate {rule.lr:g}, {workers} workers"
        with Live(Display(history, title, steps), console=console, refresh_per_second=1 / REFRESH):
            for parameters in _progress(children, readers, weights, history):
                history.accuracies.append((parameters.version, digits.accuracy(parameters, test)))
                check_interrupts()
    plots.draw_training(history, title, output)
    seconds = time.monotonic() - began
    result = Result(digits.accuracy(parameters, test), digits.loss(parameters, training), seconds, output)
    console.print(f"\n{result.accuracy:.1%} of the test images read correctly, {seconds:.1f} s in all: see {output}")
    return result


@contextmanager
def _temporary_set(client: optserve.Client, rule: optim.Optimizer, seed: int) -> Iterator[ParameterSet]:
    set_id = f"demo/digits-{secrets.token_hex(4)}"
    weights = client.create_parameter_set(set_id, digits.initial_parameters(seed), rule)
    try:
        yield weights
    finally:
        with suppress(optserve.OptserveError):  # what went wrong before it matters more
            weights.delete()


@contextmanager
def _workers(address: str, set_id: str, *, count: int, seed: int, steps: int) -> Iterator[list[Child]]:
    """Processes that wait for a line to begin, each with its share of the steps."""
    with ExitStack() as stack:
        children = []
        for worker in range(count):
            share = steps // count + (worker < steps % count)
            arguments = (address, set_id, str(worker), str(seed), str(share))
            process = python("optserve_server.demo.worker", *arguments, environment=SINGLE_THREADED)
            children.append(stack.enter_context(process))
        for child in children:
            child.read_line()
        yield children


def _progress(
    children: list[Child], readers: Executor, weights: ParameterSet, history: History
) -> Iterator[Parameters]:
    """Let the workers go: the parameters every now and then, and once more when all are done."""
    pending = {readers.submit(_collect, child, history) for child in children}
    for child in children:
        child.write_line("go")
    while pending:
        done, pending = wait(pending, timeout=REFRESH, return_when=FIRST_EXCEPTION)
        for reader in done:
            reader.result()
        yield weights.pull()


def _collect(child: Child, history: History) -> None:
    for line in child.lines():
        history.measurements.append(Measurement(**json.loads(line)))
