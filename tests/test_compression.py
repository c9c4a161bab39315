"""Formats on the way to a server and back: what it reads is what was encoded, and what was not said is said later."""

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optserve
from direct import DirectSet
from optserve import formats, optim
from optserve._codecs import codec
from optserve._specification import BLOCK, Run
from optserve.formats import Format
from optserve_server import Server
from optserve_server.engine.push import Declared
from optserve_server.engine.staging import Staging
from optserve_server.engine.threads import INLINE, Threads
from proxy import Proxy

Array = np.ndarray[Any, Any]
NewId = Callable[[], str]

FORMATS = [formats.BFloat16(), formats.Float16(), formats.Int8(), formats.TopK(0.03), formats.TopK(1.0)]
ADDING = optim.SGD(lr=1.0, maximize=True)
SHAPES = {"matrix": (130, 70), "row": (1,), "scalar": (), "empty": (0, 3), "long": (3 * BLOCK + 17,)}


def gradients(seed: int, dtype: Any = np.float32) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    scaled = (random.normal(size=shape) * 10.0 ** random.integers(-6, 6) for shape in SHAPES.values())
    return {name: np.asarray(values, dtype) for name, values in zip(SHAPES, scaled, strict=True)}


def zeros(dtype: Any = np.float32) -> dict[str, Array]:
    return {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}


def decoded(format: Format, values: Mapping[str, Array]) -> dict[str, Array]:
    """What arrives of values."""
    result = {}
    for name, value in values.items():
        flat = value.reshape(-1).astype(np.float32)
        data, out = np.empty(format.encoded_size(flat.size), np.uint8), np.empty_like(flat)
        codec(format).encode(flat, np.zeros_like(flat), np.empty_like(flat), data)
        codec(format).decode(data, out)
        result[name] = out.reshape(value.shape)
    return result


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_the_server_reads_what_was_encoded(
    transport: str, format: Format, request: pytest.FixtureRequest, new_id: NewId
) -> None:
    client: optserve.Client = request.getfixturevalue(f"{transport}_client")
    with client.create_parameter_set(new_id(), zeros(), ADDING, push_format=format) as weights:
        params = weights.step(gradients(0))
    for name, expected in decoded(format, gradients(0)).items():
        np.testing.assert_array_equal(params[name], expected)


@pytest.mark.parametrize("format", [formats.Int8(), formats.TopK(0.03)], ids=str)
def test_what_a_push_leaves_unsaid_is_said_later_and_a_refused_push_changes_nothing(
    format: Format, tcp_client: optserve.Client, new_id: NewId
) -> None:
    total: dict[str, Array] = zeros(np.float64)
    with tcp_client.create_parameter_set(new_id(), zeros(), ADDING, push_format=format) as weights:
        for step in range(12):
            if step % 4 == 1:
                spoilt = gradients(100 + step)
                spoilt["matrix"][3, 5] = np.nan
                with pytest.raises(optserve.NonFiniteValue, match="matrix"):
                    weights.step(spoilt)
            pushed = gradients(step)
            params = weights.step(pushed)
            for name, gradient in pushed.items():
                total[name] = total[name] + gradient
        assert weights._compressor is not None
        for name, residual in weights._compressor.residuals.items():
            said = params[name] + residual.reshape(SHAPES[name])
            np.testing.assert_allclose(said, total[name], rtol=1e-4, atol=1e-5 * np.abs(total[name]).max(initial=1))


def test_a_compressed_push_whose_answer_is_lost_is_applied_once_and_leaves_its_residual_once(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    direct = tcp_client.create_parameter_set(new_id(), {"x": np.zeros(9000, np.float32)}, ADDING)
    random = np.random.default_rng(0)
    total = np.zeros(9000)
    with Proxy(server.address) as proxy, optserve.Client(proxy.address) as client, ThreadPoolExecutor(1) as pool:
        weights = client.parameter_set(direct.id, push_format=formats.TopK(0.1))
        for number in range(6):
            gradient = random.normal(size=9000).astype(np.float32)
            total += gradient
            if number % 2 == 0:
                assert not weights.push({"x": gradient}).duplicate
                continue
            proxy.swallow_answers()
            pushing = pool.submit(weights.push, {"x": gradient})
            while direct.describe().version <= number:
                assert not pushing.done()
            proxy.cut()
            assert pushing.result().duplicate
        assert weights._compressor is not None
        said = direct.pull()["x"] + weights._compressor.residuals["x"]
    np.testing.assert_allclose(said, total, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("format", "half"), [(formats.BFloat16(), ml_dtypes.bfloat16), (formats.Float16(), np.float16)]
)
def test_a_pull_can_be_rounded(
    format: formats.BFloat16 | formats.Float16, half: Any, dtype: Any, tcp_client: optserve.Client, new_id: NewId
) -> None:
    """Arrays keep the set's dtype; what is as small already travels as it is."""
    values = {name: value.clip(-1e4, 1e4).astype(dtype) for name, value in gradients(1, np.float64).items()}
    with tcp_client.create_parameter_set(new_id(), values, ADDING, pull_format=format) as weights:
        for params in (weights.pull(), weights.step({"row": np.zeros(1, dtype)})):
            for name, value in values.items():
                expected = value if dtype is ml_dtypes.bfloat16 else value.astype(np.float32).astype(half).astype(dtype)
                assert params[name].dtype == dtype
                np.testing.assert_array_equal(params[name], expected)
                params[name][...] = 0  # one's own, to write to


def test_a_set_of_half_precision_takes_any_format(tcp_client: optserve.Client, new_id: NewId) -> None:
    parameters, pushed = zeros(ml_dtypes.bfloat16), gradients(2, ml_dtypes.bfloat16)
    with tcp_client.create_parameter_set(new_id(), parameters, ADDING, push_format=formats.Int8()) as weights:
        params = weights.step(pushed)
    for name, expected in decoded(formats.Int8(), pushed).items():
        np.testing.assert_array_equal(params[name], expected.astype(ml_dtypes.bfloat16))


def test_a_tensor_of_float64_must_travel_as_it_is(tcp_client: optserve.Client, new_id: NewId) -> None:
    parameters = {"x": np.zeros(3)}
    with (
        tcp_client.create_parameter_set(new_id(), parameters, ADDING, push_format=formats.Int8()) as weights,
        pytest.raises(optserve.TensorMismatch, match="float64.* as it is; got it encoded as Int8"),
    ):
        weights.push({"x": np.ones(3)})


def test_several_readers_of_one_version_share_one_encoding(
    server: Server, tcp_client: optserve.Client, new_id: NewId
) -> None:
    weights = tcp_client.create_parameter_set(new_id(), {"x": np.ones(5, np.float32)}, ADDING)
    held = server._engine.get(weights.id)
    bfloat16 = optserve.TensorSpec.of("x", np.zeros(1, ml_dtypes.bfloat16)).dtype
    first, second = (held.snapshot(dtype=bfloat16) for _ in range(2))
    assert first is second
    weights.push({"x": np.ones(5, np.float32)})
    assert held.snapshot(dtype=bfloat16) is not first


@settings(max_examples=20)
@given(st.integers(INLINE, 3 * INLINE), st.lists(st.integers(1, 20), max_size=6), st.randoms(use_true_random=False))
def test_int8_is_read_where_it_lies_however_it_came(size: int, cuts: list[int], random: Any) -> None:
    """In chunks of whole blocks in any order, some of which replace others, cut over threads in the middle of records."""
    format, direct = formats.Int8(), DirectSet({"x": np.zeros(size, np.float32)}, ADDING)
    right, wrong = (np.empty(format.encoded_size(size), np.uint8) for _ in range(2))
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    codec(format).encode(values, None, None, right)
    codec(format).encode(-values, None, None, wrong)
    edges = sorted({0, size, *(cut * BLOCK for cut in cuts if cut * BLOCK < size)})
    chunks = [(wrong, 0, size), *((right, begin, end) for begin, end in itertools.pairwise(edges))]
    chunks[1:] = random.sample(chunks[1:], len(chunks) - 1)
    spec = direct.set.spec.tensors[0]
    push = direct.set.begin(1, [Declared(spec, format=format)])
    for data, begin, end in chunks:
        part = data[format.encoded_size(begin) : format.encoded_size(end)]
        push.add([Run(0, begin, end - begin)], part, replace=data is right)
    push.finish()
    receipt, _ = direct.set.push(direct.session, direct, push, pull=False)
    expected = np.empty(size, np.float32)
    codec(format).decode(right, expected)
    assert direct.pull()["x"].tobytes() == expected.tobytes()
    np.testing.assert_allclose(receipt.gradient_norm, np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("format", [None, *FORMATS], ids=str)
def test_weight_decay_in_a_set_of_moments_reads_parameters_as_they_are(
    tcp_client: optserve.Client, new_id: NewId, format: Format | None
) -> None:
    start = {"x": np.linspace(1, 2, 2 * BLOCK + 1, dtype=np.float32)}
    weights = tcp_client.create_parameter_set(
        new_id(), start, optim.SGD(lr=1.0, weight_decay=0.5), holds="moments", push_format=format
    )
    pushed = {"x": np.zeros_like(start["x"])}
    np.testing.assert_array_equal(weights.step(pushed, parameters=start)["x"], -start["x"] / 2)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(st.integers(1, 2 * BLOCK + 9), st.floats(0.0005, 1), st.integers(0, 2**32 - 1))
def test_indices_that_are_not_ascending_or_outside_are_refused(size: int, fraction: float, seed: int) -> None:
    format = formats.TopK(fraction)
    random = np.random.default_rng(seed)
    data = np.empty(format.encoded_size(size), np.uint8)
    codec(format).encode(random.normal(size=size).astype(np.float32), None, None, data)
    first = data[: 2 * format.kept(min(size, BLOCK))].view("<u2")
    spoilt = random.integers(len(first))
    first[spoilt] = random.choice([min(size, BLOCK), 65535, *first[:spoilt]])
    staging = Staging([optserve.TensorSpec.of("x", np.zeros(size, np.float32))], Threads(1), [format])
    with pytest.raises(optserve.InvalidChunk, match="ascending"):
        staging.add([Run(0, 0, size)], data)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"push_format": "int8"}, "expected push_format to be a format"),
        ({"pull_format": formats.Int8()}, "expected pull_format to be formats.BFloat16"),
    ],
)
def test_formats_that_make_no_sense_are_refused(
    choice: dict[str, Any], message: str, tcp_client: optserve.Client, new_id: NewId
) -> None:
    with pytest.raises(optserve.InvalidFormat, match=message):
        tcp_client.create_parameter_set(new_id(), zeros(), ADDING, **choice)
    with pytest.raises(optserve.InvalidFormat, match=message):
        tcp_client.parameter_set("any", **choice)


def test_formats_and_shared_memory_exclude_each_other(shared_memory_client: optserve.Client, new_id: NewId) -> None:
    with pytest.raises(optserve.InvalidFormat, match="choose one"):
        shared_memory_client.create_parameter_set(new_id(), zeros(), ADDING, push_format=formats.Int8())
