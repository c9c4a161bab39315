"""What torch's own tests of optimizers, `test/test_optim.py`, ask of one that they can't look into, of `RemoteOptimizer`.

Each test here names the one of torch that it is after, and holds for all of torch's configurations of all optimizers that are
here; where torch asks that a loss falls, this asks for the parameters of the local optimizer, too. What is not asked here:

- of implementations that a server has not: `test_foreach_*`, `test_fused_*`, `test_set_default_dtype_works_with_foreach`,
  `test_peak_memory_foreach`, `test_mixed_device_dtype`, `test_defaults_changed_to_foreach`, `test_cpu_load_state_dict`,
  `test_optim_infos_do_not_specify_global_cliquey_kwargs`, all of `TestDifferentiableOptimizer`
- of several devices: `test_forloop_goes_right_direction_multigpu`, `test_state_dict_with_cuda_params`
- of optimizers that evaluate the loss several times in one step: `test_second_order_optims_return_consistent_types`
- `test_complex`, `test_complex_2d`: no set has complex numbers; `test_errors` here says how they are refused
- `test_non_empty_state` and the rest of `test_state_dict_deterministic`, which extends `param_groups` by themselves: state is
  the server's, and only `add_param_group` gives a set more tensors; `test_the_state_is_the_server_s` says what holds instead
"""

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import optserve
from optimizer_table import muon_in_full_precision, torch_in_float64
from optserve.torch import RemoteOptimizer
from torch_database import HERE, IMPLEMENTATION, OptimizerInfo, case, ours

NewId = Callable[[], str]
Scheduler = Callable[[torch.optim.Optimizer], Any]
Build = Callable[..., RemoteOptimizer]

STEPS = 20
EXACT = 1e-9  # of a tensor's largest magnitude, in float64: the rounding of some steps, and no rule's mistake
FIXED = ("Rprop",)  # whose learning rate is where step sizes begin: torch lets it change, and does not look
CYCLES: list[Sequence[Scheduler]] = [  # which write betas or momentum as well; torch's database has no such
    [lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=STEPS + 1)],
    [lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.001, 0.01, step_size_up=3)],
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate"),
]
infos = pytest.mark.parametrize("info", HERE, ids=lambda info: info.optim_cls.__name__)
scheduled = pytest.mark.parametrize(
    ("info", "schedulers"),
    [
        case(info, schedulers, str(number))
        for info in HERE
        for number, schedulers in enumerate(
            [*info.scheduler_inputs, *(CYCLES if info.optim_cls.__name__ in ("Adam", "SGD") else [])]
        )
        if info.optim_cls.__name__ not in FIXED
    ],
)
named = pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])


class Regression(nn.Module):
    """Two matrices, as every optimizer takes them, that are to map a vector to zero."""

    def __init__(self, *, contiguous: bool = True) -> None:
        super().__init__()
        randomness = torch.Generator().manual_seed(0)

        def made(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, 2, generator=randomness)[..., 0]
            assert not values.is_contiguous()
            return values.contiguous() if contiguous else values

        self.weight, self.bias = nn.Parameter(made(10, 5)), nn.Parameter(made(10, 1))
        self.inputs = made(5, 1)

    def loss(self) -> torch.Tensor:
        return (self.weight @ self.inputs + self.bias).square().sum()


def info_of(name: str) -> OptimizerInfo:
    return next(info for info in HERE if info.optim_cls.__name__ == name)


def backward(info: OptimizerInfo, model: Regression, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The loss, as a closure has it."""
    optimizer.zero_grad()
    loss = model.loss()
    loss.backward()
    if info.only_supports_sparse_grads:
        for tensor in model.parameters():
            tensor.grad = tensor.grad.to_sparse(1)
    return loss


def follow(schedulers: Sequence[Any], loss: float) -> None:
    for scheduler in schedulers:
        scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def descend(
    info: OptimizerInfo,
    model: Regression,
    optimizer: torch.optim.Optimizer,
    schedulers: Sequence[Scheduler] = (),
    steps: int = STEPS,
) -> tuple[float, float]:
    """The loss before some steps, and after them."""
    following = [scheduler(optimizer) for scheduler in schedulers]
    before = model.loss().item()
    for _ in range(steps):
        loss = optimizer.step(functools.partial(backward, info, model, optimizer))
        follow(following, loss.item())
    return before, model.loss().item()


def options_of(info: OptimizerInfo) -> list[dict[str, Any]]:
    """The valid configurations; a number may be in a tensor, which schedulers write to: so each call makes them anew."""
    return [dict(each.kwargs) for each in info.optim_inputs_func("cpu")]


def local(info: OptimizerInfo, params: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """torch's loop over tensors."""
    loop = {"foreach": False} if "foreach" in info.supported_impls else {}
    return info.optim_cls(params, **{**options, **loop})  # type: ignore[no-any-return]


def params_of(model: nn.Module, named: bool) -> Any:
    return list(model.named_parameters() if named else model.parameters())


@pytest.fixture
def remote(memory_client: optserve.Client, new_id: NewId) -> Iterator[Build]:
    """A remote optimizer with what torch's was given."""
    made = []

    def remote(info: OptimizerInfo, params: Any, options: Mapping[str, Any] | None = None) -> RemoteOptimizer:
        made.append(RemoteOptimizer(params, memory_client, new_id(), ours(info, options or {})))
        return made[-1]

    yield remote
    for each in made:
        each.weights.delete()
        each.close()


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Let torch calculate in float64, whatever it would round."""
    with torch_in_float64(), muon_in_full_precision():
        yield


def assert_close(model: Regression, expected: Regression, options: Mapping[str, Any]) -> None:
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert (one - two).abs().max() <= EXACT * two.abs().max(), options


def assert_right_direction(losses: tuple[float, float], options: Mapping[str, Any]) -> None:
    before, after = losses
    assert after > before if options.get("maximize", False) else after < before, options


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@infos
def test_a_loss_goes_the_right_direction(info: OptimizerInfo, contiguous: bool, remote: Build) -> None:
    """test_forloop_goes_right_direction, test_optimizer_can_be_printed."""
    for options, theirs in zip(options_of(info), options_of(info), strict=True):
        model, expected = Regression(contiguous=contiguous), Regression(contiguous=contiguous)
        optimizer = remote(info, model.parameters(), options)
        assert info.optim_cls.__name__ in repr(optimizer)
        assert_right_direction(descend(info, model, optimizer), options)
        descend(info, expected, local(info, expected.parameters(), theirs))
        assert_close(model, expected, options)
        assert model.weight.is_contiguous() == contiguous


@scheduled
def test_it_does_with_schedulers(info: OptimizerInfo, schedulers: Sequence[Scheduler], remote: Build) -> None:
    """test_forloop_goes_right_direction, with_lrsched."""
    for options, theirs in zip(options_of(info), options_of(info), strict=True):
        if schedulers in CYCLES and info.optim_cls is torch.optim.SGD and not options.get("momentum"):
            continue  # there is nothing to cycle
        model, expected = Regression(), Regression()
        losses = descend(info, model, remote(info, model.parameters(), options), schedulers)
        assert_right_direction(losses, options)
        descend(info, expected, local(info, expected.parameters(), theirs), schedulers)
        assert_close(model, expected, options)


@scheduled
def test_it_does_with_schedulers_and_groups(
    info: OptimizerInfo, schedulers: Sequence[Scheduler], remote: Build
) -> None:
    """test_param_group_with_lrscheduler_goes_right_direction."""
    model, expected = Regression(), Regression()
    options = {"momentum": 0.9} if info.optim_cls is torch.optim.SGD else {}

    def groups(each: Regression) -> list[dict[str, Any]]:
        return [{"params": [each.weight]}, {"params": [each.bias], "lr": 0.005}]

    assert_right_direction(descend(info, model, remote(info, groups(model), options), schedulers), {})
    descend(info, expected, local(info, groups(expected), options), schedulers)
    assert_close(model, expected, options)


@pytest.mark.parametrize("name", FIXED)
def test_a_learning_rate_that_can_not_change_is_not_taken(name: str, remote: Build) -> None:
    """torch's Rprop takes what a scheduler writes, and goes on as before; here it is said."""
    info = info_of(name)
    model = Regression()
    with pytest.raises(optserve.InvalidHyperparameter, match="lr"):
        descend(info, model, remote(info, model.parameters()), [lambda each: lr_scheduler.ExponentialLR(each, 0.9)])


@infos
def test_a_learning_rate_in_a_tensor_is_the_number_in_it(info: OptimizerInfo, remote: Build) -> None:
    """test_tensor_lr; and in a parameter group, where a scheduler writes to the tensor."""
    schedulers = [] if info.optim_cls.__name__ in FIXED else [lambda each: lr_scheduler.ExponentialLR(each, 0.9)]
    for options in options_of(info):
        models, rate = [Regression() for _ in range(3)], torch.tensor(1e-3)
        number = {**options, "lr": 1e-3}
        for model, optimizer in zip(
            models,
            (
                remote(info, models[0].parameters(), number),
                remote(info, models[1].parameters(), {**options, "lr": rate}),
                remote(info, [{"params": models[2].parameters(), "lr": rate.clone()}], options),
            ),
            strict=True,
        ):
            descend(info, model, optimizer, schedulers, 5)
        for model in models[1:]:
            torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=0, atol=0)


@infos
def test_groups_may_decay_or_not(info: OptimizerInfo, remote: Build) -> None:
    """test_param_groups_weight_decay."""

    def groups(each: Regression, options: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [each.weight], **options}, {"params": [each.bias], **options, "weight_decay": 0.0}]

    for options, theirs in zip(options_of(info), options_of(info), strict=True):
        model, expected = Regression(), Regression()
        assert_right_direction(descend(info, model, remote(info, groups(model, options))), options)
        # torch's Adagrad looks for that in what its constructor is given, and not in a group.
        given = {key: value for key, value in theirs.items() if key == "initial_accumulator_value"}
        descend(info, expected, local(info, groups(expected, theirs), given))
        assert_close(model, expected, options)


@pytest.mark.parametrize(
    "info",
    [info for info in HERE if info.optim_cls.__name__ not in FIXED],
    ids=lambda info: info.optim_cls.__name__,
)
def test_groups_have_learning_rates_of_their_own(info: OptimizerInfo, remote: Build) -> None:
    """test_param_groups_lr."""
    for options in options_of(info):
        model, other = Regression(), nn.Parameter(torch.ones(2, 1))
        groups = [{"params": list(model.parameters()), "lr": options.get("lr", 1e-3)}, {"params": [other]}]
        optimizer = remote(info, groups, {**options, "lr": 1e-28})

        def push_the_other(*_: object, other: nn.Parameter = other) -> None:
            other.grad = torch.ones_like(other)

        optimizer.register_step_pre_hook(push_the_other)
        assert_right_direction(descend(info, model, optimizer), options)
        assert optimizer.receipt is not None
        torch.testing.assert_close(other.detach(), torch.ones(2, 1), rtol=torch.finfo(torch.float64).eps, atol=0)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Rprop", {"lr": 0.01}, {"lr": 0.1}),
        ("Rprop", {"lr": 0.02}, {}),
        ("Adam", {"amsgrad": True}, {}),
        ("SGD", {"momentum": 0.9}, {}),
        ("SGD", {}, {"momentum": 0.9}),
    ],
)
def test_what_tensors_have_of_a_state_is_the_same_in_all_groups(
    name: str, first: dict[str, Any], second: dict[str, Any], remote: Build
) -> None:
    """torch has groups with other momentum buffers or step sizes; who asks for them here is told so, before there is a set."""
    groups = [{"params": [nn.Parameter(torch.ones(1, 1))], **each} for each in (first, second)]
    with pytest.raises(optserve.InvalidArgument, match="expected"):
        remote(info_of(name), groups)


@infos
def test_a_step_without_gradients_changes_nothing(info: OptimizerInfo, remote: Build) -> None:
    """test_step_is_noop_when_params_have_no_grad."""
    for options in options_of(info):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = copy.deepcopy(params)
        optimizer = remote(info, params, options)
        assert optimizer.step(lambda: torch.ones(1)) == torch.ones(1)
        torch.testing.assert_close(params, before, rtol=0, atol=0)


@infos
def test_a_step_with_gradients_of_zero_changes_nothing(info: OptimizerInfo, remote: Build) -> None:
    """test_step_is_noop_for_zero_grads: but for what decays, which is what decays in torch."""
    for options, theirs in zip(options_of(info), options_of(info), strict=True):
        if options.get("weight_decay", 0) != 0:
            continue
        rate = {"lr": 1e-5} if info.optim_cls in (torch.optim.AdamW, torch.optim.Muon) else {}  # they decay by default
        if info.optim_cls is torch.optim.ASGD:
            rate = {"lambd": 0.0}  # and this one in another way
        before = torch.linspace(-1, 1, 5)[:, None]
        ours, other = nn.Parameter(before.clone()), nn.Parameter(before.clone())
        optimizer = remote(info, [ours], {**options, **rate})
        for param, each in ((ours, optimizer), (other, local(info, [other], {**theirs, **rate}))):
            param.grad = torch.zeros_like(param)
            if info.only_supports_sparse_grads:
                param.grad = torch.sparse_coo_tensor(torch.empty(1, 0), torch.empty(0, 1), (5, 1))
            each.step()
        torch.testing.assert_close(ours.detach(), before, rtol=2e-6, atol=0)
        torch.testing.assert_close(ours, other, rtol=EXACT, atol=0)
        assert optimizer.weights.describe().position.version == 1


def assert_same(kept: dict[str, Any], expected: dict[str, Any]) -> None:
    """That two state dicts are equal but for names, which parameters may have or not."""

    def groups(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**each, "param_names": None} for each in state_dict["param_groups"]]

    assert groups(kept) == groups(expected)
    torch.testing.assert_close(kept["state"], expected["state"], rtol=0, atol=0)


@pytest.mark.parametrize("other_named", [False, True], ids=["to numbers", "to names"])
@named
@infos
def test_another_one_goes_on_from_a_state_dict(
    info: OptimizerInfo, named: bool, other_named: bool, remote: Build
) -> None:
    """test_state_dict_deterministic, test_can_load_from_to_named_state_dict; what was given is not changed."""
    for options in options_of(info)[: 1 if named or other_named else None]:  # names are the same to all
        model = Regression()
        optimizer = remote(info, params_of(model, named), options)
        descend(info, model, optimizer, steps=5)
        other_model = copy.deepcopy(model)
        other = remote(info, params_of(other_model, other_named), options)
        saved = optimizer.state_dict()
        given = copy.deepcopy(saved)
        other.load_state_dict(given)
        assert_same(given, saved)
        for each, stepping in ((model, optimizer), (other_model, other)):
            descend(info, each, stepping, steps=5)
        torch.testing.assert_close(other_model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert_same(other.state_dict(), optimizer.state_dict())
        if named or other_named:
            assert other.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@infos
def test_a_group_may_be_added_after_names_were_loaded(info: OptimizerInfo, remote: Build) -> None:
    """A set keeps the names that it has, whatever a state dict calls its parameters."""
    model, added = Regression(), nn.Parameter(torch.ones(2, 2))
    optimizer = remote(info, model.parameters())
    saved = remote(info, [(f"other-{name}", tensor) for name, tensor in model.named_parameters()]).state_dict()
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [("added", added)]})
    added.grad = torch.ones_like(added)
    before = added.detach().clone()
    if info.only_supports_sparse_grads:
        added.grad = added.grad.to_sparse(1)
    optimizer.step()
    assert not torch.equal(added.detach(), before)


@infos
def test_older_state_dicts_can_be_loaded(info: OptimizerInfo, remote: Build) -> None:
    """test_can_load_older_state_dict, test_load_nontensor_step."""
    for options in options_of(info):
        model = Regression()
        optimizer = remote(info, model.parameters(), options)
        descend(info, model, optimizer, steps=3)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        for kept in saved["state"].values():
            if "step" in kept:
                kept["step"] = float(kept["step"])
        optimizer.load_state_dict(saved)
        descend(info, model, optimizer, steps=1)
        counted = [kept["step"] for kept in optimizer.state_dict()["state"].values() if "step" in kept]
        assert counted in ([], [4, 4])
        assert optimizer.weights.describe().groups[0].optimizer == ours(
            info, {key: value for key, value in options.items() if key not in info.not_og_supported_flags}
        )


@named
@infos
def test_a_state_dict_is_saved_and_loaded_with_nothing_but_weights(
    info: OptimizerInfo, named: bool, remote: Build
) -> None:
    """test_save_load_equality_with_weights_only."""
    for options in options_of(info):
        model, file = Regression(), io.BytesIO()
        optimizer = remote(info, params_of(model, named), options)
        descend(info, model, optimizer, steps=3)
        saved = optimizer.state_dict()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert loaded["param_groups"] == saved["param_groups"]
        assert_same(loaded, saved)


@infos
def test_the_state_is_the_server_s(info: OptimizerInfo, remote: Build) -> None:
    """In the place of test_non_empty_state: the worker has none, and a state dict what torch's has."""
    for options, theirs in zip(options_of(info), options_of(info), strict=True):
        model, expected = Regression(), Regression()
        optimizer, other = remote(info, model.parameters(), options), local(info, expected.parameters(), theirs)
        descend(info, model, optimizer, steps=1)
        descend(info, expected, other, steps=1)
        assert not optimizer.state
        kept, there = optimizer.state_dict()["state"], other.state_dict()["state"]
        for index, values in there.items():
            assert kept.get(index, {}).keys() == {key for key, value in values.items() if value is not None}, options
        assert not optimizer.state


def test_hooks_of_state_dicts(remote: Build) -> None:
    """test_state_dict_pre_hook, _post_hook and _pre_post_hook: what a hook writes to `state` is in it, and stays there."""
    info, param = HERE[0], nn.Parameter(torch.ones(2, 3))
    optimizer = remote(info, [param])
    before = optimizer.register_state_dict_pre_hook(lambda each: each.state.update({"mark": 1}))
    assert optimizer.state_dict()["state"]["mark"] == 1

    def without_mark(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {}, "marked": "mark" in state_dict["state"]}

    optimizer.register_state_dict_post_hook(without_mark)
    assert optimizer.state_dict()["marked"]
    before.remove()
    assert optimizer.state == {"mark": 1}
    optimizer.state.clear()
    assert not optimizer.state_dict()["marked"]


@infos
def test_hooks_of_loading(info: OptimizerInfo, remote: Build) -> None:
    """test_load_state_dict_pre_hook_and_prepend, _post_hook and _pre_post_hook; what they make of the rate is the set's."""
    param, seen = nn.Parameter(torch.ones(2, 3)), []
    optimizer = remote(info, [param])

    def in_place(_: object, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def another(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.003
        return changed

    def look(each: torch.optim.Optimizer) -> None:
        each.state["seen"] = True
        seen.append(each.param_groups[0]["lr"])

    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_post_hook(look)
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(saved)
    first = optimizer.register_load_state_dict_pre_hook(another, prepend=True)
    optimizer.load_state_dict(saved)
    first.remove()
    optimizer.register_load_state_dict_pre_hook(another)
    optimizer.load_state_dict(saved)
    assert seen == [0.002, 0.002, 0.003]
    assert optimizer.state["seen"]
    assert optimizer.weights.describe().groups[0].optimizer.lr == 0.003


def test_a_hook_of_loading_may_change_the_state(remote: Build) -> None:
    """The typical use that torch's suite speaks of: another state altogether."""
    info = info_of("Adam")
    model = Regression()
    optimizer = remote(info, model.parameters())
    descend(info, model, optimizer, steps=3)

    def forget_the_bias(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {0: state_dict["state"][0]}}

    optimizer.register_load_state_dict_pre_hook(forget_the_bias)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"].keys() == {0}


def test_a_state_dict_that_is_refused_changes_nothing(remote: Build) -> None:
    info = info_of("Adam")
    model = Regression()
    optimizer = remote(info, model.parameters())
    descend(info, model, optimizer, steps=3)
    before = optimizer.state_dict()
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["lr"] = 0.5
    bad["state"][0]["exp_avg"] = torch.zeros(7)
    with pytest.raises(optserve.InvalidState):
        optimizer.load_state_dict(bad)
    assert_same(optimizer.state_dict(), before)


def test_hooks_of_steps(remote: Build) -> None:
    """test_step_pre_hook, test_step_post_hook and test_step_all_hooks: around a step, those of all optimizers outermost."""
    info, params, seen = HERE[0], [torch.ones(2)], []
    optimizer = remote(info, params)

    def note(word: str) -> Callable[..., None]:
        return lambda *_: seen.append(word)

    handles = [
        register_optimizer_step_pre_hook(note("before all")),
        register_optimizer_step_post_hook(note("after all")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
    ]
    try:
        optimizer.step()
        torch.optim.SGD(params).step()
        optimizer.step(lambda: seen.append("loss"))
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    around = ["before all", "before", "after", "after all"]
    assert seen == [*around, "before all", "after all", *around[:2], "loss", *around[2:]]


@pytest.mark.parametrize("with_schedulers", [False, True], ids=["steady", "scheduled"])
@pytest.mark.parametrize(
    "info",
    [info for info in HERE if info.supports_sparse or info.only_supports_sparse_grads],
    ids=lambda info: info.optim_cls.__name__,
)
def test_sparse_gradients_lead_down_the_rosenbrock_valley(
    info: OptimizerInfo, with_schedulers: bool, remote: Build
) -> None:
    """test_rosenbrock_sparse: one coordinate at a time, each gradient in two entries for the same row."""
    options, schedulers = info.metadata_for_sparse
    start = torch.full((2,), 1.5)
    ends = []
    for build in (remote, local):
        param = nn.Parameter(start.clone())
        optimizer = build(info, [param], options)
        following = [scheduler(optimizer) for scheduler in schedulers if with_schedulers]
        for step in range(600):
            param.grad = rosenbrock_gradient(param.detach(), step % 2)
            optimizer.step()
            follow(following, rosenbrock(param.detach()).item())
        ends.append(param.detach())
    assert rosenbrock(ends[0]) < rosenbrock(start)
    torch.testing.assert_close(*ends, rtol=EXACT, atol=0)


def rosenbrock(point: torch.Tensor) -> torch.Tensor:
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rosenbrock_gradient(point: torch.Tensor, row: int) -> torch.Tensor:
    x, y = point
    value = (-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2))[row]
    return torch.sparse_coo_tensor(torch.tensor([[row, row]]), torch.stack([value / 4, value - value / 4]), (2,))


def test_a_copy_is_refused(remote: Build) -> None:
    """In the place of test_deepcopy_copies_all_public_attrs: two optimizers would be one worker of one set."""
    optimizer = remote(HERE[0], [nn.Parameter(torch.ones(2))])
    for take_copy in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="state_dict"):
            take_copy(optimizer)


def test_an_empty_tensor_is_as_good_as_others(remote: Build) -> None:
    """torch's comparisons of implementations have one as their last parameter."""
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(0, 3))]
    optimizer = remote(HERE[0], params, {"lr": 1.0})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert (params[0] < 1).all()
    assert optimizer.state_dict()["state"].keys() == {0, 1}


ERRORS = {
    TypeError: TypeError,
    ValueError: ValueError,
    RuntimeError: ValueError,  # complex numbers, which torch finds in a step, and a set before there is one
    UserWarning: optserve.InvalidGroup,  # that a parameter comes twice, which torch will refuse one day
}
NO_ERROR = {
    "lr as Tensor doesn't work with foreach & not capturable": "the implementation that is asked for has no meaning here",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "neither has it here",
    "betas must be either both floats or both Tensors": "a tensor of one element is the number in it, each for itself",
    "only support 2D parameters": "what is no matrix follows AdamW here",
}


@pytest.mark.parametrize(
    ("info", "error"),
    [
        case(info, error, error.optimizer_error_input.desc)
        for info in HERE
        for error in info.optim_error_inputs_func("cpu", torch.float32)
        if error.optimizer_error_input.desc not in NO_ERROR
    ],
)
def test_what_torch_refuses_is_refused(info: OptimizerInfo, error: Any, remote: Build) -> None:
    """test_errors: each is of torch's kind, so that who catches torch's catches it, and says what was expected."""
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ERRORS[error.error_type], match=f"expected|{error.error_regex}"):
            remote(info, params, {key: value for key, value in given.kwargs.items() if key not in IMPLEMENTATION})


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ([], ValueError, "empty parameter list"),
        (["x"], TypeError, "only optimize Tensors"),
        ([nn.Parameter(torch.ones(1)) * 2], ValueError, "non-leaf"),
        ([{"params": [nn.Parameter(torch.ones(1))], "lr": -1.0}], ValueError, "expected lr"),
    ],
)
def test_parameters_that_no_optimizer_takes_are_refused(
    params: Any, kind: type[Exception], message: str, remote: Build
) -> None:
    info = info_of("SGD")
    with pytest.raises(kind, match=message):
        remote(info, params)
