"""What happens around the rule: against torch and optax, on the engine and over the wire."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optserve
from direct import DirectSet
from optimizer_table import torch_in_float64
from optserve import (
    EMA,
    SWA,
    ClipAdaptive,
    ClipGlobalNorm,
    ClipNorm,
    ClipValue,
    Lookahead,
    Outcome,
    SkipNonFinite,
    Transforms,
    optim,
)
from optserve._messages import decode_spec, encode_spec
from optserve._specification import Holds, ParameterSetSpec, TensorSpec

jax.config.update("jax_enable_x64", True)

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

SHAPES = {"matrix": (7, 5), "kernel": (2, 3, 4, 6), "vector": (4097,), "scalar": ()}
STEPS = 12


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradients() -> list[Tensors]:
    """Some large, some small, so that a bound on their norm matters for some only."""
    return [tensors(100 + k, scale=10.0 ** (k % 4 - 2)) for k in range(STEPS)]


def run(transforms: Transforms, optimizer: optim.Optimizer, pushes: Sequence[Tensors], **options: Any) -> DirectSet:
    direct = DirectSet(tensors(0), optimizer, transforms=transforms, **options)
    for each in pushes:
        receipt = direct.push(each)
        assert receipt.refusal is None, receipt
    return direct


def assert_close(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.abs(ours[name] - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max()), name


def torch_run(change: Callable[[list[torch.nn.Parameter]], object], optimizer: optim.Optimizer) -> Tensors:
    """The same by torch, with its gradients changed before every step."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in tensors(0).items()}
    options = {name: value for name, value in optimizer.hyperparameters.items() if name != "convention"}
    theirs = getattr(torch.optim, optimizer.rule)(parameters.values(), foreach=False, **options)
    for each in gradients():
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(each[name])
        change(list(parameters.values()))
        theirs.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def optax_run(*transformations: optax.GradientTransformation) -> Tensors:
    theirs = optax.chain(*transformations)
    parameters = {name: jax.numpy.asarray(value) for name, value in tensors(0).items()}
    state, update = theirs.init(parameters), jax.jit(theirs.update)
    for each in gradients():
        updates, state = update(each, state, parameters)
        parameters = optax.apply_updates(parameters, updates)  # type: ignore[assignment]
    return {name: np.asarray(value) for name, value in parameters.items()}


MOMENTUM = optim.SGD(lr=0.05, momentum=0.9, weight_decay=0.01, maximize=True)
SGD = optim.SGD(lr=0.05, momentum=0.9)


def by_hand(changed: Callable[[Tensors], Tensors], optimizer: optim.Optimizer = SGD) -> Tensors:
    """Gradients changed before they are pushed to a set without transforms."""
    return run(Transforms(), optimizer, [changed(each) for each in gradients()]).pull()


@pytest.mark.parametrize("accumulated", [False, True], ids=["read where they arrived", "gathered"])
class TestClipping:
    """Gradients that are gathered first take another path; accumulating one with itself gives the same."""

    def clipped(self, clip: Any, accumulated: bool, optimizer: optim.Optimizer = SGD) -> Tensors:
        times = 2 if accumulated else 1
        pushes = [each for each in gradients() for _ in range(times)]
        return run(Transforms(clip=clip, accumulate=times), optimizer, pushes).pull()

    def test_global_norm_is_torchs(self, accumulated: bool) -> None:
        expected = torch_run(lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 2.0), MOMENTUM)
        assert_close(self.clipped(ClipGlobalNorm(2.0), accumulated, MOMENTUM), expected)

    def test_global_norm_is_optaxs(self, accumulated: bool) -> None:
        expected = optax_run(optax.clip_by_global_norm(2.0), optax.sgd(0.05, 0.9))
        assert_close(self.clipped(ClipGlobalNorm(2.0, convention="optax"), accumulated), expected)

    def test_norm_of_each_tensor_is_torchs(self, accumulated: bool) -> None:
        def change(parameters: list[torch.nn.Parameter]) -> None:
            for each in parameters:
                torch.nn.utils.clip_grad_norm_([each], 0.3)

        assert_close(self.clipped(ClipNorm(0.3), accumulated, MOMENTUM), torch_run(change, MOMENTUM))

    def test_value_is_torchs(self, accumulated: bool) -> None:
        expected = torch_run(lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.1), MOMENTUM)
        assert_close(self.clipped(ClipValue(0.1), accumulated, MOMENTUM), expected)

    def test_adaptive_is_optaxs(self, accumulated: bool) -> None:
        expected = optax_run(optax.adaptive_grad_clip(0.05), optax.sgd(0.05, 0.9))
        assert_close(self.clipped(ClipAdaptive(0.05, convention="optax"), accumulated), expected)

    def test_adaptive_in_torchs_convention_takes_rows_for_units(self, accumulated: bool) -> None:
        def transposed(each: Tensors) -> Tensors:
            return {name: np.moveaxis(value, 0, -1).copy() if value.ndim else value for name, value in each.items()}

        ours = self.clipped(ClipAdaptive(0.05), accumulated)
        turned = DirectSet(
            transposed(tensors(0)), SGD, transforms=Transforms(clip=ClipAdaptive(0.05, convention="optax"))
        )
        for each in gradients():
            turned.push(transposed(each))
        assert_close(transposed(ours), turned.pull())

    def test_it_makes_no_difference_to_float32_but_rounding(self, accumulated: bool) -> None:
        pushes = [{name: value.astype(np.float32) for name, value in each.items()} for each in gradients()]
        start = {name: value.astype(np.float32) for name, value in tensors(0).items()}
        times = 2 if accumulated else 1
        direct = DirectSet(start, SGD, transforms=Transforms(clip=ClipGlobalNorm(2.0), accumulate=times))
        for each in pushes:
            for _ in range(times):
                direct.push(each)
        exact = self.clipped(ClipGlobalNorm(2.0), accumulated)
        for name, value in direct.pull().items():
            assert np.abs(value - exact[name]).max() <= 2e-6 * np.abs(exact[name]).max()


def test_kerass_clipnorm() -> None:
    def clipped(each: Tensors) -> Tensors:
        return {name: value * 0.3 / max(float(np.linalg.norm(value)), 0.3) for name, value in each.items()}

    ours = run(Transforms(clip=ClipNorm(0.3, convention="keras")), SGD, gradients()).pull()
    assert_close(ours, by_hand(clipped))


def test_a_loss_scale_is_divided_out_before_anything_else() -> None:
    transforms = Transforms(clip=ClipGlobalNorm(2.0))
    plain, scaled = DirectSet(tensors(0), SGD, transforms=transforms), DirectSet(tensors(0), SGD, transforms=transforms)
    for each in gradients():
        expected = plain.push(each)
        receipt = scaled.push({name: 1024 * value for name, value in each.items()}, loss_scale=1024.0)
        assert receipt.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-14)
    assert_close(scaled.pull(), plain.pull())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_that_is_none_is_refused(
    scale: float, memory_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    with memory_client.create_parameter_set(new_id(), tensors(0), SGD) as weights:
        with pytest.raises(optserve.InvalidTransform, match="loss_scale"):
            weights.push(tensors(1), loss_scale=scale)
        weights.delete()
    direct = DirectSet(tensors(0), SGD)
    receipt = direct.push(tensors(1), loss_scale=scale)
    assert receipt.refusal is not None
    assert receipt.refusal.reason == "INVALID_TRANSFORM"
    assert_close(direct.pull(), tensors(0))


@pytest.mark.parametrize("transforms", [Transforms(), Transforms(accumulate=2), Transforms(clip=ClipAdaptive(0.1))])
def test_a_loss_scale_that_overflows_is_refused(transforms: Transforms) -> None:
    start = {"x": np.zeros(3, np.float32)}
    direct = DirectSet(start, SGD, transforms=transforms)
    for _ in range(2):
        receipt = direct.push({"x": np.ones(3, np.float32)}, loss_scale=1e-40)
        assert receipt.refusal is not None
        assert receipt.refusal.reason == "INVALID_HYPERPARAMETER"
    np.testing.assert_array_equal(direct.pull()["x"], 0)


class TestAccumulation:
    def test_the_mean_of_k_pushes_makes_an_update(self) -> None:
        direct = DirectSet(tensors(0), SGD, transforms=Transforms(accumulate=3))
        receipts = [direct.push(each) for each in gradients()]
        assert [each.outcome for each in receipts] == [Outcome.ACCUMULATED, Outcome.ACCUMULATED, Outcome.APPLIED] * 4
        assert [each.version for each in receipts] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
        assert receipts[2].learning_rate == SGD.lr
        assert np.isnan(receipts[1].learning_rate)
        threes = [gradients()[k : k + 3] for k in range(0, STEPS, 3)]
        means = [{name: np.mean([each[name] for each in three], axis=0) for name in SHAPES} for three in threes]
        assert_close(direct.pull(), run(Transforms(), SGD, means).pull())

    def test_nothing_changes_before(self) -> None:
        direct = run(Transforms(accumulate=4), SGD, gradients()[:3])
        assert_close(direct.pull(), tensors(0))

    def test_each_push_has_its_own_loss_scale(self) -> None:
        direct = DirectSet(tensors(0), SGD, transforms=Transforms(accumulate=2))
        plain = run(Transforms(accumulate=2), SGD, gradients()[:2])
        for each, scale in zip(gradients(), (4.0, 0.5), strict=False):
            direct.push({name: scale * value for name, value in each.items()}, loss_scale=scale)
        assert_close(direct.pull(), plain.pull())

    def test_other_tensors_are_refused_and_leave_the_mean_alone(self) -> None:
        first, second = gradients()[:2]
        direct = DirectSet(tensors(0), SGD, transforms=Transforms(accumulate=2))
        direct.push(first)
        receipt = direct.push({"matrix": second["matrix"]})
        assert (receipt.outcome, receipt.refusal and receipt.refusal.reason) == (Outcome.REFUSED, "TENSOR_MISMATCH")
        assert direct.push(second).applied
        assert_close(direct.pull(), run(Transforms(accumulate=2), SGD, [first, second]).pull())

    def test_a_set_of_moments_has_nothing_to_add_before(self, memory_client: optserve.Client) -> None:
        transforms = Transforms(accumulate=2)
        with memory_client.create_parameter_set(
            "a", tensors(0), SGD, holds="moments", transforms=transforms
        ) as weights:
            for k, each in enumerate(gradients()):
                updates = weights.step(each)
                assert set(updates) == (set(SHAPES) if k % 2 else set())
            weights.delete()


class TestNonFinite:
    def nan(self) -> Tensors:
        return tensors(1) | {"scalar": np.array(np.nan)}

    def test_a_push_is_skipped_and_nothing_changes(self) -> None:
        direct = run(Transforms(nonfinite=SkipNonFinite()), SGD, gradients()[:3])
        before = direct.pull()
        receipt = direct.push(self.nan(), changes={"default": {"lr": 7.0}})
        assert (receipt.outcome, receipt.version) == (Outcome.SKIPPED, 3)
        assert receipt.refusal is not None
        assert "scalar" in receipt.refusal.message
        assert_close(direct.pull(), before)
        assert direct.push(gradients()[3]).learning_rate == SGD.lr
        assert_close(direct.pull(), run(Transforms(), SGD, gradients()[:4]).pull())

    def test_so_many_in_a_row_and_then_they_are_refused(self) -> None:
        direct = DirectSet(tensors(0), SGD, transforms=Transforms(nonfinite=SkipNonFinite(at_most=2)))
        outcomes = [direct.push(self.nan()).outcome for _ in range(4)]
        assert outcomes == [Outcome.SKIPPED, Outcome.SKIPPED, Outcome.REFUSED, Outcome.REFUSED]
        assert direct.push(tensors(1)).applied
        assert direct.push(self.nan()).outcome is Outcome.SKIPPED

    def test_a_mean_goes_on_after_one(self) -> None:
        transforms = Transforms(nonfinite=SkipNonFinite(), accumulate=2)
        direct = DirectSet(tensors(0), SGD, transforms=transforms)
        first, second = gradients()[:2]
        outcomes = [direct.push(each).outcome for each in (first, self.nan(), second)]
        assert outcomes == [Outcome.ACCUMULATED, Outcome.SKIPPED, Outcome.APPLIED]
        assert_close(direct.pull(), run(Transforms(accumulate=2), SGD, [first, second]).pull())

    def test_the_worker_sees_it_in_the_receipt(self, tcp_client: optserve.Client, new_id: Callable[[], str]) -> None:
        transforms = Transforms(nonfinite=SkipNonFinite())
        with tcp_client.create_parameter_set(new_id(), tensors(0), SGD, transforms=transforms) as weights:
            result = weights.step(self.nan())
            assert result.receipt is not None
            assert result.receipt.outcome is Outcome.SKIPPED
            assert_close(result, tensors(0))
            weights.delete()


def followed(update: Callable[[Tensors | None, Tensors, int], Tensors]) -> tuple[Tensors, Tensors]:
    """Parameters, and what follows them by hand: (before, parameters, t) -> after, for every tensor."""
    direct, average = DirectSet(tensors(0), SGD), None
    for t, each in enumerate(gradients(), start=1):
        direct.push(each)
        average = update(average, direct.pull(), t)
    assert average is not None
    return direct.pull(), average


class TestAverages:
    def test_ema_is_torchs(self) -> None:
        model = torch.nn.ParameterDict({name: torch.tensor(value) for name, value in tensors(0).items()})
        theirs = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

        def update(average: Tensors | None, parameters: Tensors, t: int) -> Tensors:
            for name, value in parameters.items():
                model[name].data = torch.tensor(value)
            theirs.update_parameters(model)
            return {name: value.detach().numpy() for name, value in theirs.module.items()}

        parameters, average = followed(update)
        direct = run(Transforms(average=EMA(0.9)), SGD, gradients())
        assert_close(direct.pull(), parameters)
        assert_close(direct.pull(evaluation=True), average)

    @pytest.mark.parametrize(("start", "every"), [(1, 1), (3, 4), (12, 1), (20, 1)])
    def test_swa_is_the_mean_of_some_versions(self, start: int, every: int) -> None:
        seen: list[Tensors] = []

        def update(average: Tensors | None, parameters: Tensors, t: int) -> Tensors:
            if t >= start and (t - start) % every == 0:
                seen.append(parameters)
            some = seen or [parameters]
            return {name: np.mean([each[name] for each in some], axis=0) for name in parameters}

        _, average = followed(update)
        direct = run(Transforms(average=SWA(start, every)), SGD, gradients())
        assert_close(direct.pull(evaluation=True), average)

    def test_lookahead_is_optaxs(self) -> None:
        theirs = optax.lookahead(optax.sgd(0.05, 0.9), sync_period=5, slow_step_size=0.3)
        parameters = optax.LookaheadParams.init_synced({k: jax.numpy.asarray(v) for k, v in tensors(0).items()})
        state = theirs.init(parameters)
        for each in gradients():
            updates, state = theirs.update(each, state, parameters)
            parameters = optax.apply_updates(parameters, updates)  # type: ignore[assignment]
        ours = run(Transforms(lookahead=Lookahead(5, 0.3)), SGD, gradients()).pull()
        assert_close(ours, {name: np.asarray(value) for name, value in parameters.fast.items()})

    def test_the_average_is_of_what_lookahead_leaves(self) -> None:
        both = run(Transforms(lookahead=Lookahead(1, 0.5), average=SWA(STEPS)), SGD, gradients())
        assert_close(both.pull(evaluation=True), both.pull())

    def test_it_is_the_parameters_before_the_first_update_and_where_a_tensor_has_had_none(self) -> None:
        direct = DirectSet(tensors(0), SGD, transforms=Transforms(average=EMA(0.9)))
        assert_close(direct.pull(evaluation=True), tensors(0))
        direct.push({"vector": gradients()[3]["vector"]})
        assert_close(direct.pull(evaluation=True), direct.pull())

    def test_pushes_that_share_a_pass_are_averaged_one_after_the_other(self) -> None:
        """As `test_coalescing` has it for rules."""
        transforms = Transforms(lookahead=Lookahead(2, 0.5), average=EMA(0.5))
        one, together = (DirectSet(tensors(0), SGD, transforms=transforms) for _ in range(2))
        for each in gradients():
            one.push(each)
        together.push_together(gradients())
        for evaluation in (False, True):
            for name, value in one.pull(evaluation=evaluation).items():
                np.testing.assert_array_equal(value, together.pull(evaluation=evaluation)[name])

    def test_a_pull_of_what_is_not_there_is_refused(
        self, tcp_client: optserve.Client, memory_client: optserve.Client, new_id: Callable[[], str]
    ) -> None:
        for client in (tcp_client, memory_client):
            with client.create_parameter_set(new_id(), tensors(0), SGD) as weights:
                with pytest.raises(optserve.InvalidTransform, match="EMA"):
                    weights.pull(evaluation=True)
                weights.push(gradients()[0])
                weights.delete()

    def test_asgds_own_average_can_be_pulled(self) -> None:
        optimizer = optim.ASGD(lr=0.05, t0=4.0)
        direct = DirectSet(tensors(0), optimizer)
        parameters = [torch.nn.Parameter(torch.tensor(value)) for value in tensors(0).values()]
        theirs = torch.optim.ASGD(parameters, lr=0.05, t0=4.0)
        for each in gradients():
            direct.push(each)
            for parameter, gradient in zip(parameters, each.values(), strict=True):
                parameter.grad = torch.tensor(gradient)
            with torch_in_float64():  # ASGD keeps its scalars in the default dtype
                theirs.step()
        assert_close(
            direct.pull(evaluation=True),
            {name: theirs.state[parameter]["ax"].numpy() for name, parameter in zip(SHAPES, parameters, strict=True)},
        )


@pytest.mark.parametrize("clip", [None, ClipGlobalNorm(1.0), ClipValue(0.1)])
def test_rules_for_whole_tensors_have_transforms_too(clip: Any) -> None:
    transforms = Transforms(clip=clip, lookahead=Lookahead(3, 0.5), average=EMA(0.5))
    direct = run(transforms, optim.LAMB(lr=0.01), gradients())

    def changed(each: Tensors) -> Tensors:
        if isinstance(clip, ClipGlobalNorm):
            norm = np.sqrt(sum(np.sum(value**2) for value in each.values()))
            return {name: value * min(1.0, 1.0 / (norm + 1e-6)) for name, value in each.items()}
        return {name: np.clip(value, -0.1, 0.1) if clip else value for name, value in each.items()}

    plain, slow, average = DirectSet(tensors(0), optim.LAMB(lr=0.01)), tensors(0), tensors(0)
    for t, each in enumerate(gradients()[:3], start=1):
        plain.push(changed(each))
        if t == 3:
            slow = {name: (slow[name] + value) / 2 for name, value in plain.pull().items()}
        after = slow if t == 3 else plain.pull()
        average = after if t == 1 else {name: (average[name] + after[name]) / 2 for name in after}
    short = run(transforms, optim.LAMB(lr=0.01), gradients()[:3])
    assert_close(short.pull(), slow)
    assert_close(short.pull(evaluation=True), average)
    assert np.isfinite(direct.pull()["vector"]).all()


EVERYTHING = Transforms(
    nonfinite=SkipNonFinite(3), accumulate=2, clip=ClipGlobalNorm(1.0), lookahead=Lookahead(3, 0.5), average=EMA(0.8)
)


def test_engine_memory_and_tcp_agree_bitwise(
    memory_client: optserve.Client, tcp_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    direct = run(EVERYTHING, optim.AdamW(lr=0.01), gradients())
    for client in (memory_client, tcp_client):
        with client.create_parameter_set(new_id(), tensors(0), optim.AdamW(lr=0.01), transforms=EVERYTHING) as weights:
            for each in gradients():
                weights.step(each)
            for evaluation in (False, True):
                pulled = weights.pull(evaluation=evaluation)
                for name, value in direct.pull(evaluation=evaluation).items():
                    np.testing.assert_array_equal(pulled[name], value)
            weights.delete()


def test_a_restored_set_goes_on_in_the_middle_of_a_mean() -> None:
    through = run(EVERYTHING, optim.AdamW(lr=0.01), gradients())
    stopped = run(EVERYTHING, optim.AdamW(lr=0.01), gradients()[:7])
    resumed = stopped.restored()
    for each in gradients()[7:]:
        resumed.push(each)
    for evaluation in (False, True):
        for name, value in through.pull(evaluation=evaluation).items():
            np.testing.assert_array_equal(resumed.pull(evaluation=evaluation)[name], value)


positive = st.floats(1e-6, 1e6)
conventions = st.sampled_from(["torch", "optax", "keras"])
clips = st.one_of(
    st.builds(ClipGlobalNorm, positive, conventions),
    st.builds(ClipNorm, positive, conventions),
    st.builds(ClipValue, positive),
    st.builds(ClipAdaptive, positive, positive, conventions),
)
some_transforms = st.builds(
    Transforms,
    nonfinite=st.one_of(st.just(optserve.RefuseNonFinite()), st.builds(SkipNonFinite, st.none() | st.integers(1, 99))),
    accumulate=st.integers(1, 1000),
    clip=st.none() | clips,
    lookahead=st.none() | st.builds(Lookahead, st.integers(1, 99), st.floats(0.01, 1.0)),
    average=st.none() | st.builds(EMA, st.floats(0.01, 0.99)) | st.builds(SWA, st.integers(1, 99), st.integers(1, 99)),
)


@given(some_transforms)
@settings(deadline=None)
def test_transforms_travel(transforms: Transforms) -> None:
    spec = ParameterSetSpec("a", (TensorSpec.of("x", np.zeros(1)),), SGD, transforms=transforms)
    assert decode_spec(encode_spec(spec)) == spec


@pytest.mark.parametrize(
    "build",
    [
        lambda: ClipGlobalNorm(0.0),
        lambda: ClipGlobalNorm(1.0, convention="jax"),
        lambda: ClipNorm(float("nan")),
        lambda: ClipValue(True),
        lambda: ClipAdaptive(-1.0),
        lambda: EMA(1.0),
        lambda: SWA(0),
        lambda: Lookahead(6, 1.5),
        lambda: Lookahead(2.5),  # type: ignore[arg-type]
        lambda: SkipNonFinite(0),
        lambda: Transforms(accumulate=0),
        lambda: Transforms(clip=1.0),  # type: ignore[arg-type]
        lambda: Transforms(average=Lookahead()),  # type: ignore[arg-type]
    ],
)
def test_what_can_not_be_meant_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(optserve.InvalidTransform, match="expected"):
        build()


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        ({"transforms": Transforms(average=EMA()), "holds": Holds.MOMENTS}, SGD),
        ({"transforms": Transforms(lookahead=Lookahead()), "holds": Holds.MOMENTS}, SGD),
        ({"transforms": Transforms(clip=ClipAdaptive(0.1)), "holds": Holds.MOMENTS}, SGD),
        ({"transforms": Transforms(clip=ClipNorm(1.0)), "guard": False}, SGD),
        ({"transforms": Transforms(nonfinite=SkipNonFinite()), "guard": False}, SGD),
        ({"transforms": Transforms(average=EMA())}, optim.ASGD()),
    ],
)
def test_sets_that_could_not_do_it_are_not_created(
    options: dict[str, Any], optimizer: optim.Optimizer, memory_client: optserve.Client
) -> None:
    with pytest.raises(optserve.InvalidTransform, match="expected"):
        memory_client.create_parameter_set("never", tensors(0), optimizer, **options)
    assert "never" not in [each.id for each in memory_client.list_parameter_sets()]
