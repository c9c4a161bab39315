"""Rules of one's own: from a file to the wire, a checkpoint and back; and files that can't be used."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

import optserve
from direct import DirectSet
from optimizer_table import Array
from optserve import optim
from optserve.v1 import optimizer_service_pb2, optimizer_service_pb2_grpc
from optserve_server import Config, Server
from optserve_server.engine.rules import own
from processes import ServerProcess, running
from test_server import optserve_command

EXAMPLE = Path(__file__).parent.parent / "examples" / "my_rule.py"
SIZE = 4097
RULE = ("--listen", "127.0.0.1:0", "--rule", str(EXAMPLE))


@pytest.fixture(scope="module")
def soft_sign() -> Callable[..., optim.Optimizer]:
    """The example's optimizer, as a worker that imports the file has it."""
    own.load(EXAMPLE)
    return sys.modules["my_rule"].SoftSign  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that was given the example."""
    with running(*RULE, log=tmp_path_factory.mktemp("own") / "log") as server:
        yield server


def gradients(dtype: type, count: int = 20) -> list[Array]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=SIZE) * 10.0 ** rng.uniform(-6, 1, SIZE)).astype(dtype) for _ in range(count)]


def transcribed(optimizer: optim.Optimizer, parameters: Array, pushed: list[Array]) -> Array:
    """The example's equations in NumPy, in the dtype of the arrays."""
    lr, alpha, eps = (parameters.dtype.type(value) for value in optimizer.hyperparameters.values())
    p, m = parameters, np.zeros_like(parameters)
    for g in pushed:
        m = m + alpha * (g - m)
        p = p - lr * m / (np.abs(m) + eps)
    return p


def test_the_example_is_short_and_in_the_documentation() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 20
    assert f"```python\n{text}```" in (EXAMPLE.parent.parent / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_equals_its_equations_to_the_bit(
    soft_sign: Callable[..., optim.Optimizer], own_server: ServerProcess, new_id: Callable[[], str], dtype: type
) -> None:
    optimizer = soft_sign(lr=0.01, alpha=0.2)
    parameters, pushed = gradients(dtype)[0], gradients(dtype)[1:]
    expected = transcribed(optimizer, parameters, pushed)
    assert expected.dtype == dtype
    direct = DirectSet({"x": parameters}, optimizer)
    with optserve.Client(own_server.address) as client:
        weights = client.create_parameter_set(new_id(), {"x": parameters}, optimizer)
        for each in pushed:
            direct.push({"x": each})
            weights.push({"x": each})
        assert weights.describe().groups[0].optimizer == optimizer
        np.testing.assert_array_equal(weights.pull()["x"], expected)
    np.testing.assert_array_equal(direct.pull()["x"], expected)


def test_it_is_listed_with_its_documentation_after_the_others(own_server: ServerProcess) -> None:
    with grpc.insecure_channel(own_server.address) as channel:
        stub = optimizer_service_pb2_grpc.OptimizerServiceStub(channel)
        listed = stub.ListRules(optimizer_service_pb2.ListRulesRequest()).rules[-1]
    assert listed.rule == "SoftSign"
    assert "a sign, but in proportion" in listed.summary
    assert [each.name for each in listed.hyperparameters] == ["lr", "alpha", "eps"]
    assert list(listed.slots) == ["exp_avg"]


def test_who_has_not_imported_it_may_use_a_set_and_is_told_what_to_do_to_describe_it(
    soft_sign: Callable[..., optim.Optimizer], own_server: ServerProcess
) -> None:
    with optserve.Client(own_server.address) as client:
        client.create_parameter_set("theirs", {"x": np.ones(3)}, soft_sign())
    described = optserve_command("describe", "theirs", "--address", own_server.address)
    assert described.returncode == 1
    assert "got 'SoftSign'" in described.stderr
    assert "import the file that defines it" in described.stderr
    described = optserve_command("describe", "theirs", "--address", own_server.address, "--rule", str(EXAMPLE))
    assert "SoftSign(lr=0.001, alpha=0.1, eps=0.001)" in described.stdout
    assert optserve_command("delete", "theirs", "--address", own_server.address).returncode == 0


def test_a_server_that_was_not_given_it_refuses_it_with_advice(
    tcp_client: optserve.Client, new_id: Callable[[], str]
) -> None:
    @dataclass(frozen=True)
    class Homeless(optim.Optimizer):
        """An optimizer without a rule."""

    with pytest.raises(optserve.UnknownRule, match="Homeless.*--rule FILE"):
        tcp_client.create_parameter_set(new_id(), {"x": np.ones(3)}, Homeless())


def test_a_set_outlives_a_server_that_was_not_given_its_rule(
    soft_sign: Callable[..., optim.Optimizer], tmp_path: Path
) -> None:
    """Nor one whose rule has other slots."""
    optimizer, (start, *pushed) = soft_sign(lr=0.01), gradients(np.float32, 5)
    data, log = ("--data-dir", str(tmp_path / "data")), tmp_path / "log"
    with running(*RULE, *data, log=log) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a/set", {"x": start}, optimizer)
        for each in pushed[:2]:
            weights.push({"x": each})
        assert server.stop() == 0
    before = files(tmp_path / "data")
    changed = tmp_path / EXAMPLE.name
    changed.write_text(EXAMPLE.read_text().replace("exp_avg", "average"))
    for others in ((), ("--rule", str(changed))):
        with (
            running("--listen", "127.0.0.1:0", *others, *data, log=log) as server,
            optserve.Client(server.address) as client,
        ):
            assert client.list_parameter_sets() == []
            with pytest.raises(optserve.ParameterSetExists, match="in the data directory, but this server could not"):
                client.create_parameter_set("a/set", {"x": start}, optim.SGD())
            assert server.stop() == 0
        assert files(tmp_path / "data") == before
    assert "got 'SoftSign'" in log.read_text()
    assert "optserve serve --rule FILE" in log.read_text()
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path / "data", rules=(EXAMPLE,))
    with Server(config) as restarted, optserve.Client(restarted.address) as client:
        weights = client.parameter_set("a/set")
        for each in pushed[2:]:
            weights.push({"x": each})
        np.testing.assert_array_equal(weights.pull()["x"], transcribed(optimizer, start, pushed))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


STEP = "h.lr * m"
BAD = {
    "a number in the function": (
        STEP,
        "0.5 * h.lr * m",
        r"soft_sign of Rough to compute in float32 .*returns p as float64\. A number written .*hyperparameter",
    ),
    "an integer in the function": ("m + h.alpha", "2 * m + h.alpha", "p as float64, exp_avg as float64"),
    "too few arguments": (
        "(p, g, m, h):",
        "(p, g, h):\n    m = g",
        r"soft_sign\(p, g, exp_avg, h\).*got soft_sign\(p, g, h\)",
    ),
    "too few values": (", m\n", "\n", "to return p, exp_avg; it returns float32"),
    "too many values": (", m\n", ", m, m\n", "to return p, exp_avg; it returns UniTuple"),
    "a function that Numba can't compile": (
        STEP,
        "unheard_of(m)",
        "(?s)soft_sign of Rough.*Numba compiles.*unheard_of",
    ),
    "a scalar that is not there": ("h.alpha", "h.beta", "(?s)Numba compiles.*beta"),
    "a plain field": (
        'hyperparameter(1e-3, "ε, the size below which m is small.")',
        "1e-3",
        r"Rough\.eps to be declared",
    ),
    "no dataclass": ("@dataclass(frozen=True)\n", "", "expected Rough to be a dataclass"),
    "no table": ("RULES", "RULE", "expected a table RULES"),
    "an empty table": ('{Rough: Rule(soft_sign, slots=("exp_avg",))}', "{}", "expected a table RULES"),
    "no rule in the table": (
        'Rule(soft_sign, slots=("exp_avg",))',
        "soft_sign",
        r"expected a Rule\(function, ...\) for Rough",
    ),
    "slots that are a word": ('("exp_avg",)', '"exp_avg"', "slots of Rough as a tuple"),
    "a slot named as what every set has": ('"exp_avg"', '"parameters"', 'none of them "parameters"'),
    "scalars that fail": ("soft_sign, ", "soft_sign, lambda o, t, memory: 1 / (t - 1), ", "ZeroDivisionError"),
    "scalars without names": (
        "soft_sign, ",
        "soft_sign, lambda o, t, memory: (o.lr,), ",
        "to be a NamedTuple of numbers; got",
    ),
    "a name of the catalogue": (
        "Rough",
        "Adam",
        r"name for bad_rule\.Adam that no other.*optserve\.optim\._adam has it",
    ),
    "another's optimizer": (
        "RULES = {Rough",
        "from optserve.optim import SGD\nRULES = {SGD",
        "that this file defines.*SGD",
    ),
    "a syntax error": ("return", "return return", "SyntaxError: invalid syntax .*line 16"),
    "an error at import": ("RULES", "1 / 0\nRULES", "line 19: ZeroDivisionError"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD.keys())
def test_a_file_that_can_not_be_used_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad_rule.py"
    path.write_text(EXAMPLE.read_text().replace("SoftSign", "Rough").replace(old, new))
    with pytest.raises(optserve.InvalidRule, match=message) as raised:
        own.load(path)
    assert str(raised.value).startswith(str(path))


def test_a_server_says_what_is_wrong_with_a_file_and_does_not_start(tmp_path: Path) -> None:
    result = optserve_command("serve", "--listen", "127.0.0.1:0", "--rule", str(tmp_path / "missing.py"))
    assert result.returncode == 1
    assert result.stderr.strip().endswith("missing.py: expected a Python file such as my_rule.py; there is none")
    with pytest.raises(ValueError, match="expected rules as a sequence of files"):
        Config(rules="my_rule.py")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LBFGS", "line search"),
        ("SAM", "a second pass.*in the worker"),
        ("Sophia", "Hessian"),
        ("AdaHessian", "Hessian"),
        ("PolyakSGD", "value of the loss.*step size in the worker"),
        ("polyak_sgd", "value of the loss"),
        ("MoMo", "value of the loss"),
    ],
)
def test_rules_that_need_more_than_gradients_are_refused_with_the_reason(name: str, why: str) -> None:
    assert not hasattr(optim, name)
    with pytest.raises(optserve.UnknownRule, match=f"nothing but gradients; got '{name}'.*{why}"):
        getattr(optim, name)
    with pytest.raises(optserve.UnknownRule, match=f"nothing but gradients; got '{name}'.*{why}"):
        optim.from_hyperparameters(name, {})


def test_other_names_are_missing_as_from_any_module() -> None:
    with pytest.raises(AttributeError, match=r"module 'optserve\.optim' has no 'Adm'"):
        _ = optim.Adm  # type: ignore[attr-defined]
