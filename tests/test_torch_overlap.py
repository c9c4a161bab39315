"""`RemoteOptimizer` with overlap: the same bits as without, in whatever way a script uses gradients and parameters."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.models import Convolutions, Transformer, backward, inputs_of, loss_of, made
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optserve
from optserve import optim
from optserve.torch import RemoteOptimizer, _awaited, _hooks, _optimizer
from optserve_server import Server
from proxy import Proxy

NewId = Callable[[], str]
Loop = Callable[[nn.Module, torch.optim.Optimizer], None]

ADAM = optim.AdamW(lr=1e-2)
STEPS = 6


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in these tests overlap as large ones do."""
    monkeypatch.setattr(_hooks, "BUCKET", 1 << 10)
    monkeypatch.setattr(_optimizer, "WORTH_AWAITING", 0)


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the gradients that were staged."""
    names: list[str] = []
    stage = optserve.ParameterSet.stage

    def noted(self: optserve.ParameterSet, gradients: Any, *, expected: Any) -> None:
        names.extend(gradients)
        stage(self, gradients, expected=expected)

    monkeypatch.setattr(optserve.ParameterSet, "stage", noted)
    return names


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def clipped_at_times(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        if step % 3 == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(1 + step % 3):
            backward(model, 10 * step + micro)
        optimizer.step()


def with_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)  # after gradients were sent
        optimizer.step()


def partial(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        for number, tensor in enumerate(model.parameters()):
            if number % 3 == step % 3:
                tensor.grad = None if step % 2 else torch.ones_like(tensor)
        optimizer.step()


def skipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As a GradScaler does that finds infinity: some steps are not made."""
    for step in range(2 * STEPS):
        optimizer.zero_grad()
        backward(model, step)
        if step % 3:
            optimizer.step()


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            return backward(model, step)

        optimizer.step(closure)


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A GradScaler divides gradients in a way that does not count their versions."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def changed_unseen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        if step % 3 == 2:
            for tensor in model.parameters():
                if tensor.grad is not None:
                    tensor.grad.data.mul_(0.5)
        optimizer.step()


def refused_by_its_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step that is refused before anything is sent, and made once the gradients are others."""
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = 10**400
        with pytest.raises(optserve.InvalidHyperparameter):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def frozen_in_the_middle(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    first = next(model.parameters())
    for step in range(STEPS):
        first.requires_grad_(step not in (2, 3))
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


LOOPS = [plain, clipped, clipped_at_times, in_place, accumulated, with_rates, partial, skipped, with_closure]
LOOPS += [frozen_in_the_middle, scaled, changed_unseen, refused_by_its_rate]


NOT_AHEAD = (clipped, scaled, refused_by_its_rate)  # since all gradients are changed after their hooks


@pytest.mark.parametrize("kind", [Convolutions, Transformer])
@pytest.mark.parametrize("loop", LOOPS)
def test_parameters_are_the_same_bits(
    loop: Loop, kind: type[nn.Module], client: optserve.Client, new_id: NewId, staged: list[str]
) -> None:
    models = [made(kind), made(kind)]
    for model, overlap in zip(models, (True, False), strict=True):
        staged.clear()
        optimizer = RemoteOptimizer(model.named_parameters(), client, new_id(), ADAM, overlap=overlap)
        loop(model, optimizer)
        assert bool(staged) is (overlap and loop not in NOT_AHEAD)
        optimizer.close()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert type(one) is nn.Parameter
        assert torch.equal(one, two)


@pytest.fixture
def model() -> nn.Module:
    return made(Convolutions)


@pytest.fixture
def optimizer(
    model: nn.Module, tcp_client: optserve.Client, new_id: NewId, staged: list[str]
) -> Iterator[RemoteOptimizer]:
    optimizer = RemoteOptimizer(model.named_parameters(), tcp_client, new_id(), ADAM)
    yield optimizer
    optimizer.close()


def names_of(model: nn.Module) -> list[str]:
    """Of the tensors that get gradients."""
    return [name for name, _ in model.named_parameters() if "unused" not in name]


def test_gradients_go_while_backward_runs_in_the_reverse_order_of_use(
    model: nn.Module, optimizer: RemoteOptimizer, staged: list[str]
) -> None:
    plain(model, optimizer)
    assert len(staged) == (STEPS - 1) * len(names_of(model))  # nothing is known of the first step
    assert staged[: len(names_of(model))] != names_of(model)
    staged.clear()
    optimizer.zero_grad()
    backward(model, 0)
    ahead = list(staged)
    optimizer.step()
    assert ahead == staged[: len(ahead)]
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
    assert 0 < sum(sizes[name] for name in staged[len(ahead) :]) < _hooks.BUCKET  # the last bucket's, which is not full


def test_what_was_changed_after_backward_is_sent_again(
    model: nn.Module, optimizer: RemoteOptimizer, staged: list[str]
) -> None:
    """And, as it may well be changed the next time, not sent ahead then."""
    sent = []
    for step, clips in enumerate((False, False, True, True, False, False)):
        staged.clear()
        optimizer.zero_grad()
        backward(model, step)
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        sent.append(len(staged) / len(names_of(model)))
    assert sent == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("says", [True, False])
def test_what_only_accumulates_is_not_sent(
    says: bool, model: nn.Module, optimizer: RemoteOptimizer, staged: list[str]
) -> None:
    """If the script says so, however often; if it does not, once a step has been seen, and as long as others are like that."""
    for step in range(STEPS):
        staged.clear()
        optimizer.zero_grad()
        for micro in range(2 + (step % 3 if says else 0)):
            with optimizer.no_push() if says else torch.enable_grad():
                backward(model, 10 * step + micro)
        backward(model, 10 * step + 9)
        optimizer.step()
        assert sorted(staged) == sorted(names_of(model) * bool(step))


def test_nothing_is_sent_ahead_of_rows(tcp_client: optserve.Client, new_id: NewId, staged: list[str]) -> None:
    """Which rows an embedding's gradient will have is not known, and a push says what it has before it has anything."""
    model = nn.Sequential(nn.Embedding(100, 16, sparse=True), nn.Linear(16, 16))
    optimizer = RemoteOptimizer(model.named_parameters(), tcp_client, new_id(), optim.SGD(lr=0.1))
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.tensor([step, step + 1])).square().sum().backward()
        optimizer.step()
    optimizer.close()
    assert staged == []


def test_the_norm_is_clipped_by_the_server(memory_client: optserve.Client, new_id: NewId, staged: list[str]) -> None:
    models = [made(Convolutions), made(Convolutions)]
    clipped(models[0], torch.optim.AdamW(models[0].parameters(), lr=1e-2))
    clipping = RemoteOptimizer(models[1].named_parameters(), memory_client, new_id(), ADAM, max_norm=0.1)
    plain(models[1], clipping)
    assert len(staged) == (STEPS - 1) * len(names_of(models[1]))
    clipping.close()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)
    with pytest.raises(optserve.InvalidTransform, match="either max_norm or transforms that clip"):
        RemoteOptimizer(
            models[1].named_parameters(),
            memory_client,
            new_id(),
            ADAM,
            max_norm=0.1,
            transforms=optserve.Transforms(clip=optserve.ClipValue(1.0)),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_checksum_of_a_gradient_sees_any_element(dtype: torch.dtype) -> None:
    """Wherever it lies: DDP's gradients are parts of a buffer, others lie in another order."""
    memory = torch.arange(1, 65).to(dtype)
    parts = [
        memory[:0],
        memory[0],
        memory[:24],
        memory[3:24],
        memory[1:25].view(4, 6),
        memory[1:25].view(4, 6).T,
        memory[::3],
    ]
    for part in parts:
        before = _hooks.checksum(part)
        assert before == _hooks.checksum(part)
        for place in np.ndindex(*part.shape):
            kept = part[place].clone()
            part[place] = 0
            assert before != _hooks.checksum(part)
            part[place] = kept


def test_a_refused_push_is_refused_by_step_and_leaves_everything(model: nn.Module, optimizer: RemoteOptimizer) -> None:
    plain(model, optimizer)
    optimizer.zero_grad()
    backward(model, 0)
    before = [tensor.detach().clone() for tensor in model.parameters()]
    next(model.parameters()).grad.fill_(torch.nan)
    with pytest.raises(optserve.NonFiniteValue):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    plain(model, optimizer)


def test_an_optimizer_that_is_gone_sends_nothing(
    model: nn.Module, tcp_client: optserve.Client, new_id: NewId, staged: list[str]
) -> None:
    def use() -> None:
        plain(model, RemoteOptimizer(model.named_parameters(), tcp_client, new_id(), ADAM))

    use()
    gc.collect()
    staged.clear()
    backward(model, 0)
    assert not staged


def test_parameters_are_asked_for_in_the_order_of_their_use(
    memory_client: optserve.Client, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 1), nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(inputs))  # type: ignore[no-any-return]

    asked: list[list[str]] = []
    step = optserve.ParameterSet.step

    def noted(self: optserve.ParameterSet, gradients: Any, **options: Any) -> optserve.Parameters:
        asked.append(options["tensors"])
        return step(self, gradients, **options)

    monkeypatch.setattr(optserve.ParameterSet, "step", noted)
    model = Backwards()
    optimizer = RemoteOptimizer(model.named_parameters(), memory_client, new_id(), ADAM)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert asked[0] == ["last.weight", "last.bias", "first.weight", "first.bias"]
    optimizer.close()
    assert asked[1] == asked[2] == ["first.weight", "first.bias", "last.weight", "last.bias"]


@pytest.fixture
def compiler() -> Iterator[Any]:
    """What counts compiled graphs in this process; from none to none."""
    from torch._dynamo import reset, utils

    utils.counters.clear()
    yield utils.counters
    reset()
    utils.counters.clear()


def test_a_compiled_model_is_compiled_once_and_its_gradients_overlap(
    optimizer: RemoteOptimizer, model: nn.Module, staged: list[str], compiler: Any
) -> None:
    compiled = torch.compile(model, backend="eager")
    for step in range(STEPS):
        staged.clear()
        optimizer.zero_grad()
        inputs, classes = inputs_of(model, step)
        torch.nn.functional.cross_entropy(compiled(inputs), classes).backward()
        optimizer.step()
    assert len(staged) == len(names_of(model))
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


def test_a_model_that_is_compiled_after_a_step_is_compiled_whole(
    optimizer: RemoteOptimizer, model: nn.Module, compiler: Any
) -> None:
    plain(model, optimizer)
    inputs, _ = inputs_of(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are hooks of all modules
        torch.compile(model, backend="eager", fullgraph=True)(inputs)
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_evaluates_as_it_does_without(new_id: NewId, memory_client: optserve.Client) -> None:
    """torch takes a faster way then, which leaves out padding, if all parameters are of the usual class."""
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 4:] = True
    seen = []
    for overlap in (True, False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, 2)
        inputs = torch.randn(2, 6, 16)
        optimizer = RemoteOptimizer(model.named_parameters(), memory_client, new_id(), ADAM, overlap=overlap)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()
            model(inputs).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                seen.append(model(inputs, src_key_padding_mask=mask))
        optimizer.close()
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_what_a_set_does_not_take_is_said_by_step_and_not_in_backward(
    model: nn.Module, optimizer: RemoteOptimizer
) -> None:
    plain(model, optimizer)
    model.float()
    optimizer.zero_grad()
    images, classes = inputs_of(model, 0)
    torch.nn.functional.cross_entropy(model(images.float()), classes).backward()
    with pytest.raises(optserve.TensorMismatch):
        optimizer.step()
    model.double()
    optimizer.pull()
    plain(model, optimizer)


def test_a_thread_that_can_not_start_keeps_nobody_waiting(
    model: nn.Module, optimizer: RemoteOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    backward(model, 0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            optimizer.step()
    plain(model, optimizer)


def test_what_kept_parameters_away_is_raised_to_who_saves_or_closes_and_not_after_others_came(
    model: nn.Module, optimizer: RemoteOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = _awaited.Arrival.arrived

    def stopped(self: _awaited.Arrival, name: str, array: Any) -> None:
        if name == "head.weight":
            raise optserve.DeadlineExceeded("too late")
        arrived(self, name, array)

    backward(model, 0)
    with monkeypatch.context() as patched:
        patched.setattr(_awaited.Arrival, "arrived", stopped)
        optimizer.step()
        for raising in (optimizer.wait, optimizer.state_dict, model.head.weight.sum):
            with pytest.raises(optserve.DeadlineExceeded, match="too late"):
                raising()
    optimizer.pull()
    assert type(model.head.weight) is nn.Parameter
    np.testing.assert_array_equal(model.head.weight.detach(), optimizer.weights.pull()["head.weight"])
    plain(model, optimizer)


def test_a_script_that_ends_right_after_a_step_ends_well(server: Server, new_id: NewId) -> None:
    script = f"""
import torch
from optserve import optim
from optserve.torch import RemoteOptimizer
model = torch.nn.Linear(1000, 1000)
optimizer = RemoteOptimizer(model.named_parameters(), {server.address!r}, {new_id()!r}, optim.SGD())
model(torch.ones(1, 1000)).sum().backward()
optimizer.step()
"""
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == 0


class TestAwaited:
    """Parameters of which the elements come when somebody waits for them, and not before: reads the old ones who does not."""

    @pytest.fixture
    def weight(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Parameter]:
        weight = nn.Parameter(torch.zeros(3))
        arrival = _awaited.Arrival({"weight": weight}, ["weight"], learns=False)

        def bringing(way: Callable[..., None]) -> Callable[..., None]:
            def come(self: _awaited.Arrival, *names: str) -> None:
                bringer = threading.Thread(target=self.arrived, args=("weight", np.ones(3, np.float32)))
                bringer.start()
                bringer.join()
                way(self, *names)

            return come

        for way in (_awaited.Arrival.wait, _awaited.Arrival.settle):
            monkeypatch.setattr(_awaited.Arrival, way.__name__, bringing(way))
        assert isinstance(weight, nn.Parameter)
        yield weight
        arrival.finish()

    READS: dict[str, Callable[[Any], Any]] = {  # noqa: RUF012
        "sum": lambda weight: weight.sum() / 3,
        "operator": lambda weight: (weight * 1)[0],
        "reflected operator": lambda weight: (torch.ones(3) * weight)[0],
        "comparison": lambda weight: (weight == 1)[0],
        "index": lambda weight: weight[0],
        "item": lambda weight: weight[0].item(),
        "list": lambda weight: weight.tolist()[0],
        "data": lambda weight: weight.data[0],
        "detach": lambda weight: weight.detach()[0],
        "array": lambda weight: weight.detach().numpy()[0],
        "NumPy": lambda weight: np.asarray(weight.data)[0],
        "function": lambda weight: torch.nn.functional.linear(torch.ones(1, 3), weight.reshape(1, 3))[0, 0] / 3,
        "list of tensors": lambda weight: torch.stack([weight, weight])[0, 0],
        "foreach": lambda weight: torch._foreach_mul([weight], 1.0)[0][0],
        "written to": lambda weight: torch.zeros(3).copy_(weight)[0],
        "keyword": lambda weight: torch.sum(input=weight) / 3,
        "parameters to a vector": lambda weight: torch.nn.utils.parameters_to_vector([weight])[0],
        "clone": lambda weight: weight.clone()[0],
        "copy": lambda weight: copy.copy(weight)[0],
        "deep copy": lambda weight: copy.deepcopy(weight)[0],
        "pickle": lambda weight: pickle.loads(pickle.dumps(weight))[0],
        "text": lambda weight: float(str(weight).split("tensor([")[1].split(",")[0].rstrip(".")),
        "moved": lambda weight: weight.to(torch.float64)[0],
        "memory": lambda weight: np.ctypeslib.as_array(
            (np.ctypeslib.ctypes.c_float * 3).from_address(weight.data_ptr())
        )[0],
        "state_dict": lambda weight: nn.ParameterDict({"weight": weight}).state_dict()["weight"][0],
    }

    @pytest.mark.parametrize("way", READS)
    def test_who_reads_waits(self, way: str, weight: nn.Parameter) -> None:
        assert self.READS[way](weight) == 1
        assert type(weight) is nn.Parameter

    def test_file(self, weight: nn.Parameter, tmp_path: Path) -> None:
        torch.save({"weight": weight}, tmp_path / "saved")
        loaded = torch.load(tmp_path / "saved", weights_only=True)["weight"]
        assert type(loaded) is nn.Parameter
        assert loaded[0] == 1

    @pytest.mark.parametrize(
        "ask",
        [
            lambda weight: weight.shape,
            lambda weight: weight.grad,
            lambda weight: setattr(weight, "grad", torch.ones(3)),
            lambda weight: torch.optim.SGD([weight]).zero_grad(),
            lambda weight: weight.requires_grad_ is not None and weight.requires_grad,
            lambda weight: (weight.dtype, weight.device, weight.is_leaf, weight.numel(), weight.dim(), weight.ndim),
            lambda weight: hash(weight),
            lambda weight: weight.register_hook(print).remove(),
            lambda weight: weight.register_post_accumulate_grad_hook(print).remove(),
        ],
    )
    def test_who_asks_for_something_else_does_not(self, ask: Callable[[Any], Any], weight: nn.Parameter) -> None:
        ask(weight)
        assert isinstance(weight, _awaited.Awaited)

    def test_who_writes_waits_so_that_what_is_written_stays(self, weight: nn.Parameter) -> None:
        with torch.no_grad():
            weight.fill_(5.0)
        assert weight.tolist() == [5.0] * 3

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.usefixtures("compiler")
    def test_compiled(self, backend: str, weight: nn.Parameter) -> None:
        def double(inputs: torch.Tensor) -> torch.Tensor:
            return inputs * weight

        compiled = torch.compile(double, backend=backend)
        assert compiled(torch.ones(3)).tolist() == [1.0] * 3

    def test_who_used_one_before_hears_that_it_changed(self, weight: nn.Parameter) -> None:
        square = weight.square().sum()  # which needs it for its gradient
        _awaited.Arrival({"weight": weight}, ["weight"], learns=False).arrived("weight", np.zeros(3, np.float32))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()

    @pytest.mark.parametrize("transformed", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
    def test_function_transforms(self, transformed: Callable[..., Any], weight: nn.Parameter) -> None:
        assert transformed(lambda tensor: (tensor * tensor).sum())(weight).sum() != 0

    def test_another_parameter_of_it(self, weight: nn.Parameter) -> None:
        assert nn.Parameter(weight).tolist() == [1.0] * 3
        assert type(weight.detach()) is torch.Tensor

    def test_another_class_has_its_say(self, weight: nn.Parameter) -> None:
        class Marked(torch.Tensor):
            pass

        assert type(torch.ones(3).as_subclass(Marked) * weight) is Marked

    def test_two_arrivals_of_one_parameter_are_not_taken_for_each_other(self) -> None:
        weight = nn.Parameter(torch.zeros(3))
        first = _awaited.Arrival({"weight": weight}, ["weight"], learns=False)
        first.arrived("weight", np.ones(3, np.float32))
        second = _awaited.Arrival({"weight": weight}, ["weight"], learns=False)
        first.finish()
        first.forget()
        assert type(weight) is _awaited.Awaited
        second.arrived("weight", np.full(3, 2, np.float32))
        assert weight.tolist() == [2.0] * 3

    def test_nothing_is_left_of_it(self) -> None:
        hooks = torch.nn.modules.module._global_forward_pre_hooks
        before = len(hooks), torch._functorch.vmap._add_batch_dim
        weight = nn.Parameter(torch.zeros(3))
        arrival = _awaited.Arrival({"weight": weight}, ["weight"], learns=False)
        assert len(hooks) == before[0] + 1
        arrival.arrived("weight", np.ones(3, np.float32))
        assert before == (len(hooks), torch._functorch.vmap._add_batch_dim)

    def test_what_came_is_not_taken_over_once_more(self) -> None:
        """By then the script may have changed it."""
        weight = nn.Parameter(torch.zeros(3))
        arrival = _awaited.Arrival({"weight": weight}, ["weight"], learns=False)
        arrival.arrived("weight", np.ones(3, np.float32))
        with torch.no_grad():
            weight.fill_(5.0)
        arrival.arrived("weight", np.ones(3, np.float32))
        assert weight.tolist() == [5.0] * 3

    def test_what_can_not_come_is_an_error_for_who_reads_it_until_it_is_pulled(self) -> None:
        weight, bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        arrival = _awaited.Arrival({"weight": weight, "bias": bias}, ["weight", "bias"], learns=False)
        arrival.decided(
            optserve.Receipt(sequence=1, position=optserve.Position(1, 1), outcome=optserve.Outcome.APPLIED)
        )
        arrival.arrived("bias", np.ones(3, np.float32))
        arrival.finish(optserve.DeadlineExceeded("too late"))
        assert bias.tolist() == [1.0] * 3
        for _ in range(2):
            with pytest.raises(optserve.DeadlineExceeded, match="too late"):
                weight.sum()
        with pytest.raises(optserve.DeadlineExceeded):
            arrival.wait()
        arrival.forget()
        assert weight.tolist() == [0.0] * 3


def test_a_connection_that_ends_after_the_receipt_is_made_again(
    server: Server, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is over by then; who reads the parameters gets them."""
    with Proxy(server.address) as proxy, optserve.Client(proxy.address, transport="stream") as client:
        decided = _awaited.Arrival.decided
        model, twin = made(Convolutions), made(Convolutions)
        optimizer = RemoteOptimizer(model.named_parameters(), client, new_id(), ADAM)

        def cut(self: _awaited.Arrival, receipt: optserve.Receipt) -> None:
            proxy.cut()
            decided(self, receipt)

        monkeypatch.setattr(_awaited.Arrival, "decided", cut)
        plain(model, optimizer)
        optimizer.close()
        plain(twin, RemoteOptimizer(twin.named_parameters(), client, new_id(), ADAM, overlap=False))
        assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
        assert proxy.connections > STEPS


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_process_forked_right_after_a_step_has_its_parameters(model: nn.Module, optimizer: RemoteOptimizer) -> None:
    plain(model, optimizer)

    def sums(_: Any) -> torch.Tensor:
        return torch.stack([tensor.detach().sum() for tensor in model.parameters()])

    (forked,) = DataLoader(TensorDataset(torch.ones(1)), num_workers=1, multiprocessing_context="fork", collate_fn=sums)
    torch.testing.assert_close(forked, sums(None), rtol=0, atol=0)


def add_group(optimizer: RemoteOptimizer) -> None:
    optimizer.add_param_group({"params": [("another", nn.Parameter(torch.zeros(2)))]})


def step_again(optimizer: RemoteOptimizer) -> None:
    for tensor in optimizer.param_groups[0]["params"]:
        tensor.grad = torch.zeros(tensor.shape, dtype=tensor.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    "act", [RemoteOptimizer.pull, RemoteOptimizer.state_dict, RemoteOptimizer.close, add_group, step_again]
)
def test_nothing_else_is_asked_of_the_server_before_a_step_is_over(
    act: Callable[[RemoteOptimizer], object],
    model: nn.Module,
    shared_memory_client: optserve.Client,
    new_id: NewId,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What comes would else be newer or older than what is there, or be overwritten in shared memory while it is copied."""
    waited_for = threading.Event()
    arrived, wait, wait_over = _awaited.Arrival.arrived, _awaited.Arrival.wait, _awaited.Arrival.wait_over

    def held(self: _awaited.Arrival, name: str, array: Any) -> None:
        waited_for.wait()
        arrived(self, name, array)

    def noted(way: Callable[[_awaited.Arrival], Any]) -> Callable[[_awaited.Arrival], Any]:
        return lambda self: (waited_for.set(), way(self))[1]

    monkeypatch.setattr(_awaited.Arrival, "arrived", held)
    monkeypatch.setattr(_awaited.Arrival, "wait", noted(wait))
    monkeypatch.setattr(_awaited.Arrival, "wait_over", noted(wait_over))
    optimizer = RemoteOptimizer(model.named_parameters(), shared_memory_client, new_id(), ADAM)
    backward(model, 0)
    optimizer.step()
    arrival = optimizer._arrival
    assert arrival is not None
    assert not arrival._over
    act(optimizer)
    assert arrival._over
    optimizer.close()


def test_threads_read_parameters_as_they_come(model: nn.Module, optimizer: RemoteOptimizer) -> None:
    """As evaluation beside training does."""
    plain(model, optimizer)
    seen: list[bool] = []

    def read() -> None:
        seen.append(all(bool(torch.isfinite(tensor).all()) for tensor in model.parameters()))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert seen == [True] * 4
