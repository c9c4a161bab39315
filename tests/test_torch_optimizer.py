"""`RemoteOptimizer` in training loops that were written for `torch.optim`, against the local optimizer of the same name."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.models import OPTIONS, Convolutions, Transformer, backward, loss_of, made
from torch import nn

import optserve
import ranks
from optimizer_table import muon_in_full_precision, torch_in_float64
from optserve import Outcome, Sync, optim, schedules
from optserve.torch import RemoteOptimizer, _hooks, _optimizer
from optserve_server import Server

NewId = Callable[[], str]
ParamGroups = list[dict[str, Any]]

STEPS = 200
SHARED = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "Adafactor",
)
# In shares of a tensor's largest magnitude: of two float32 runs with the same gradients, each rounds a parameter by half of eps
# in each step. The roundings within an update are of numbers that are smaller by the learning rate.
ROUNDING = STEPS * torch.finfo(torch.float32).eps
FIXED = ("Rprop",)  # whose learning rate can't change: it is where step sizes begin


def groups_of(model: nn.Module, rate: float) -> ParamGroups:
    """Tensors of one dimension are a group of their own, with a learning rate of its own."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, tensor) for name, tensor in named if tensor.ndim > 1]},
        {"params": [(name, tensor) for name, tensor in named if tensor.ndim <= 1], "lr": rate},
    ]


def local(name: str, groups: ParamGroups, options: dict[str, Any]) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(groups, **options)  # type: ignore[no-any-return]


@pytest.fixture
def remote(memory_client: optserve.Client, new_id: NewId) -> Callable[..., RemoteOptimizer]:
    """A remote optimizer of that name."""

    def remote(name: str, groups: Any, options: dict[str, Any], **creation: Any) -> RemoteOptimizer:
        return RemoteOptimizer(groups, memory_client, new_id(), optim.catalogue()[name](**options), **creation)

    return remote


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    exchange: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] = lambda optimizer: optimizer,
    *,
    steady: bool = False,
) -> nn.Module:
    """After a loop with all that loops have: a scheduler, unless the rates are to be steady, clipping now and then, gradients
    that are missing, and an exchange of the optimizer for another one, twice."""

    def share(step: int) -> float:
        return 1.0 if steady else 1.0 / (1.0 + step / STEPS)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in range(STEPS):
        if step in (STEPS // 3, 2 * STEPS // 3):
            kept, optimizer = scheduler.state_dict(), exchange(optimizer)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share, last_epoch=step)
            scheduler.load_state_dict(kept)
        optimizer.zero_grad()
        backward(model, step)
        if step % 5 == 4:
            next(model.parameters()).grad = None
        if step % 4 < 2:  # so that in some steps gradients are changed that were sent ahead
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference, in shares of each tensor's largest magnitude."""
    return max(
        float((one.detach() - two.detach()).abs().max() / two.detach().abs().max().clamp_min(1e-30))
        for one, two in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.fixture
def float64() -> Iterator[None]:
    """Let torch keep what it knows of a tensor in float64."""
    with torch_in_float64():
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Convolutions, Transformer])
@pytest.mark.parametrize("name", SHARED)
def test_a_loop_leads_where_it_leads_with_the_local_optimizer(
    name: str, kind: type[nn.Module], remote: Callable[..., RemoteOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with groups, a scheduler, clipping, and gradients that are missing; on the way, the optimizer goes from the
    server to this process and back. With overlap and without, it leads to the same bits."""
    monkeypatch.setattr(_hooks, "BUCKET", 1 << 9)
    monkeypatch.setattr(_optimizer, "WORTH_AWAITING", 0)
    options, steady = OPTIONS.get(name, {"lr": 1e-2}), name in FIXED
    rate = options["lr"] * (1.0 if steady else 0.5)
    expected = made(kind)
    trained(expected, local(name, groups_of(expected, rate), options), steady=steady)

    def led(*, overlap: bool) -> nn.Module:
        model = made(kind)

        def exchanged(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            saved, groups = copy.deepcopy(optimizer.state_dict()), groups_of(model, rate)
            here = isinstance(optimizer, RemoteOptimizer)
            other = local(name, groups, options) if here else remote(name, groups, options, overlap=overlap)
            other.load_state_dict(saved)
            return other

        return trained(model, remote(name, groups_of(model, rate), options, overlap=overlap), exchanged, steady=steady)

    overlapped = led(overlap=True)
    assert distance(overlapped, expected) < 1e-9
    assert distance(led(overlap=False), overlapped) == 0


@pytest.mark.usefixtures("float64")
def test_muon_on_matrices(remote: Callable[..., RemoteOptimizer]) -> None:
    options = {"lr": 0.02, "weight_decay": 0.1}
    expected, model = (
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)) for _ in range(2)
    )
    model.load_state_dict(expected.state_dict())
    with muon_in_full_precision():
        for each, optimizer in (
            (expected, local("Muon", [{"params": list(expected.parameters())}], options)),
            (model, remote("Muon", model.named_parameters(), options)),
        ):
            for step in range(STEPS):
                optimizer.zero_grad()
                inputs, targets = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(step))
                (each(inputs) - targets[:, :3]).square().mean().backward()
                optimizer.step()
    assert distance(model, expected) < 1e-9


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SGD", "SparseAdam", "Adagrad"])
def test_sparse_gradients_of_embeddings_travel_as_rows(name: str, remote: Callable[..., RemoteOptimizer]) -> None:
    expected, model = (nn.EmbeddingBag(50, 4, sparse=True, mode="sum") for _ in range(2))
    model.load_state_dict(expected.state_dict())
    optimizer = remote(name, model.named_parameters(), {"lr": 0.1})
    for each, stepping in (
        (expected, local(name, [{"params": list(expected.parameters())}], {"lr": 0.1})),
        (model, optimizer),
    ):
        for step in range(STEPS):
            stepping.zero_grad()
            words = torch.randint(50, (5, 3), generator=torch.Generator().manual_seed(step))
            (each(words) - 1.0).square().mean().backward()
            stepping.step()
    assert distance(model, expected) < 1e-9


@pytest.mark.parametrize("name", SHARED)
def test_half_precision_is_that_of_a_float32_master(name: str, remote: Callable[..., RemoteOptimizer]) -> None:
    """Gradients are of the rounded parameters; what is rounded is a copy of those that are trained.

    Those are parameters that are float32 on the server, bit for bit, and those of torch's loop but for float32's own rounding:
    where that crosses the middle of two numbers of half precision, and only there, the copy has the other one.
    """
    halves = [made(Convolutions, dtype) for dtype in (torch.bfloat16, torch.float16)]
    twins, expected = ([copy.deepcopy(half).float() for half in halves] for _ in range(2))
    options = OPTIONS.get(name, {"lr": 1e-2})
    ours = remote(name, [tensor for model in halves + twins for tensor in model.parameters()], options)
    masters = [tensor for model in expected for tensor in model.parameters()]
    theirs = local(name, [{"params": masters}], options | {"foreach": False})
    for step in range(STEPS):
        for half, *others in zip(halves, twins, expected, strict=True):
            half.zero_grad()
            backward(half, step)
            for rounded, *kept in zip(half.parameters(), *(each.parameters() for each in others), strict=True):
                for each in kept:
                    each.grad = None if rounded.grad is None else rounded.grad.float()
        ours.step()
        theirs.step()
    for half, twin, there in zip(halves, twins, expected, strict=True):
        assert distance(twin, there) <= ROUNDING
        for rounded, kept, master in zip(half.parameters(), twin.parameters(), there.parameters(), strict=True):
            assert torch.equal(rounded, kept.to(rounded.dtype))
            near = ROUNDING * master.abs().max()
            assert ((master - near).to(rounded.dtype) <= rounded).all()
            assert (rounded <= (master + near).to(rounded.dtype)).all()


def test_a_state_dict_is_that_of_torch_and_the_worker_keeps_nothing(remote: Callable[..., RemoteOptimizer]) -> None:
    expected, model = made(Convolutions), made(Convolutions)
    theirs = local("AdamW", groups_of(expected, 0.5), {"lr": 1.0})
    ours = remote("AdamW", groups_of(model, 0.5), {"lr": 1.0})
    for each, optimizer in ((expected, theirs), (model, ours)):
        backward(each, 0)
        optimizer.step()
    saved, kept = theirs.state_dict(), ours.state_dict()
    assert kept["state"].keys() == saved["state"].keys()
    for index, values in saved["state"].items():
        assert {key: value.dtype for key, value in kept["state"][index].items()} == {
            key: value.dtype for key, value in values.items()
        }
    for one, two in zip(kept["param_groups"], saved["param_groups"], strict=True):
        assert {key: two[key] for key in one if key in two} == {key: one[key] for key in one if key in two}
        assert two.keys() - one.keys() <= {"foreach", "capturable", "differentiable", "fused"}
    assert not ours.state


def test_a_closure_is_evaluated_once_with_gradients(remote: Callable[..., RemoteOptimizer]) -> None:
    model = made(Convolutions)
    optimizer = remote("SGD", model.named_parameters(), {"lr": 0.1})
    losses = [optimizer.step(lambda: backward(model, 0)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.weights.describe().position.version == 3


def test_hooks_and_autograd_see_a_step(remote: Callable[..., RemoteOptimizer]) -> None:
    model, seen = made(Convolutions), []
    optimizer = remote("SGD", model.named_parameters(), {"lr": 0.1})
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    weight = model.head.weight  # type: ignore[union-attr]
    output = (weight * weight).sum()
    backward(model, 0)
    optimizer.step()
    assert seen == ["before", "after"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_without_a_gradient_nothing_is_pushed(remote: Callable[..., RemoteOptimizer]) -> None:
    model = made(Convolutions)
    optimizer = remote("SGD", model.named_parameters(), {"lr": 0.1})
    optimizer.step()
    assert optimizer.receipt is None
    assert optimizer.weights.describe().position.version == 0


def test_a_group_that_is_added_later_learns_and_the_others_go_on(remote: Callable[..., RemoteOptimizer]) -> None:
    expected, model = made(Convolutions), made(Convolutions)
    for each, build in ((expected, local), (model, remote)):
        heads = [(f"head.{name}", tensor) for name, tensor in each.head.named_parameters()]  # type: ignore[union-attr]
        bodies = [(name, tensor) for name, tensor in each.named_parameters() if not name.startswith("head.")]
        optimizer = build("Adam", [{"params": heads}], {"lr": 1e-2})
        for step in range(20):
            if step == 10:
                optimizer.add_param_group({"params": bodies, "lr": 1e-3})
            optimizer.zero_grad()
            backward(each, step)
            optimizer.step()
    assert distance(model, expected) < 1e-9
    assert optimizer.weights.describe().position.version == 20


def test_a_grad_scaler_leaves_out_what_is_not_finite(remote: Callable[..., RemoteOptimizer]) -> None:
    model = made(Convolutions, torch.float32)
    optimizer = remote("SGD", model.named_parameters(), {"lr": 0.1})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step, poison in enumerate((False, True, False)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) * (torch.inf if poison else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.weights.describe().position.version == 2
    assert scaler.get_scale() == 2.0**9


def test_workers_of_a_round_begin_and_stay_alike(
    server: Server, new_id: NewId, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_id, models, optimizers = new_id(), [], []
    for rank in range(2):
        torch.manual_seed(rank)
        models.append(Convolutions())
        monkeypatch.setenv("RANK", str(rank))
        optimizers.append(
            RemoteOptimizer(
                models[-1].named_parameters(), server.address, set_id, optim.Adam(), policy=Sync(2, deterministic=True)
            )
        )
    assert distance(models[1], models[0]) == 0.0
    with ThreadPoolExecutor(2) as pool:
        for step in range(3):
            for rank, model in enumerate(models):
                model.zero_grad()
                backward(model, 2 * step + rank)
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
    assert distance(models[1], models[0]) == 0.0
    assert [each.client_id for each in optimizers[0].weights.workers()] == ["rank-0", "rank-1"]
    assert optimizers[0].receipt is not None
    assert optimizers[0].receipt.outcome is Outcome.APPLIED
    for optimizer in optimizers:
        optimizer.close()


def test_an_optimizer_that_comes_back_goes_on(server: Server, new_id: NewId) -> None:
    set_id, model, other = new_id(), made(Convolutions), Convolutions().double()
    first = RemoteOptimizer(model.named_parameters(), server.address, set_id, optim.Adam())
    backward(model, 0)
    first.step()
    first.close()
    second = RemoteOptimizer(other.named_parameters(), server.address, set_id, optim.Adam())
    assert distance(other, model) == 0.0
    second.close()


def test_ranks_that_resume_together_have_one_set_and_lose_no_update(
    server: Server, new_id: NewId, tmp_path: Path
) -> None:
    """All of them load, and all add a group, whoever is first."""
    parameter = nn.Parameter(torch.zeros(3))
    saved = torch.optim.Adam([("first", parameter)], lr=0.1)
    parameter.grad = torch.ones(3)
    saved.step()
    torch.save(saved.state_dict(), tmp_path / "saved.pt")
    torch.multiprocessing.spawn(ranks.resumed, (server.address, new_id(), str(tmp_path)), nprocs=2)
    (first, second, state), other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert [int(kept["step"]) for kept in state["state"].values()] == [5, 2]
    torch.testing.assert_close(first, torch.full((3,), -0.4))
    torch.testing.assert_close(second, torch.full((2,), -0.02))
    assert torch.equal(first, other[0])
    assert torch.equal(second, other[1])


def test_a_state_or_parameters_that_were_changed_by_hand_are_taken(remote: Callable[..., RemoteOptimizer]) -> None:
    model = made(Convolutions)
    optimizer = remote("Adam", model.named_parameters(), {"lr": 0.1})
    backward(model, 0)
    optimizer.step()
    given = optimizer.state_dict()
    given["state"][0]["exp_avg"].zero_()
    optimizer.load_state_dict(given)
    assert not optimizer.state_dict()["state"][0]["exp_avg"].any()
    with torch.no_grad():
        model.head.bias.fill_(7.0)  # type: ignore[union-attr, operator]
    optimizer.load_state_dict(given)
    assert (optimizer.weights.pull()["head.bias"] == 7.0).all()


def test_a_rank_hears_what_stopped_the_one_that_makes_the_set(
    remote: Callable[..., RemoteOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = remote("SGD", made(Convolutions).named_parameters(), {"lr": 0.1})
    monkeypatch.setattr(_optimizer, "own_rank", lambda: 1)
    monkeypatch.setattr(_optimizer, "of_all_ranks", lambda fact: ["no room", fact] if fact == "" else [fact, fact])
    with pytest.raises(optserve.FailedPrecondition, match="expected rank 0 to make the set anew; there, no room"):
        optimizer.load_state_dict(local("SGD", [{"params": list(made(Convolutions).parameters())}], {}).state_dict())


def test_what_it_gave_itself_is_there_already_when_it_is_loaded(server: Server, new_id: NewId) -> None:
    """As accelerate does, which wraps an optimizer, while other workers train."""
    set_id, models = new_id(), [made(Convolutions), made(Convolutions)]
    early, late = (
        RemoteOptimizer(model.named_parameters(), server.address, set_id, optim.Adam(lr=0.1)) for model in models
    )
    given = late.state_dict()
    for step in range(2):
        backward(models[0], step)
        early.step()
        late.load_state_dict({**given, "state": dict(given["state"])})
    assert early.weights.describe().position.version == 2
    backward(models[1], 2)
    late.step()
    late.load_state_dict(given)  # that was before its own step
    assert late.weights.describe().position.version == 0
    early.close()
    late.close()


def test_schedules_of_the_set_go_on_where_they_were_when_a_state_is_loaded(
    remote: Callable[..., RemoteOptimizer],
) -> None:
    model, rates = made(Convolutions), []
    schedule = schedules.Linear(1e-2, 1e-3, transition_steps=6)
    optimizer = remote("Adam", groups_of(model, 0.5), {"lr": schedule})
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = remote("Adam", groups_of(model, 0.5), {"lr": schedule})
            optimizer.load_state_dict(saved)
        backward(model, step)
        optimizer.step()
        assert optimizer.receipt is not None
        rates.append(dict(optimizer.receipt.learning_rates))
    assert rates == [{"default": pytest.approx(1e-2 - 1.5e-3 * step), "group-1": 0.5} for step in range(4)]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (lambda model: [("x", model.head.weight), ("x", model.head.bias)], optserve.InvalidName, "got several of 'x'"),
        (
            lambda model: [{"params": [model.head.weight]}, {"params": [model.head.bias], "name": "default"}],
            optserve.InvalidGroup,
            "got several of 'default'",
        ),
        (lambda model: [{"params": [model.head.weight], "lr": -1.0}], optserve.InvalidHyperparameter, "expected lr"),
        (lambda model: [model.head.weight.detach().long()], optserve.InvalidTensor, "int64"),
    ],
)
def test_bad_groups_are_refused(
    groups: Callable[[Any], Any], error: type[Exception], message: str, remote: Callable[..., RemoteOptimizer]
) -> None:
    with pytest.raises(error, match=message):
        remote("SGD", groups(made(Convolutions)), {"lr": 0.1})
