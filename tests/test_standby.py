"""A warm standby has what its primary has, and takes over from it: nothing acknowledged is lost, nothing is there twice."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

import optserve
from equality import assert_same
from optserve import formats, optim, staleness
from optserve._transport import connect
from optserve.v1 import optimizer_service_pb2 as pb
from optserve.v1.standby_pb2 import FollowRequest
from optserve_server import Config, Server
from optserve_server.cli import app
from optserve_server.replication import lease, primary
from optserve_server.replication.lease import Lease
from optserve_server.replication.replica import Replica
from processes import running
from proxy import Proxy

Array = np.ndarray[Any, Any]
COUNTING = optim.SGD(lr=1.0, maximize=True)  # parameters add up the gradients
SHAPES = {"w": (130, 33), "b": (7,), "scalar": ()}

KINDS: dict[str, dict[str, Any]] = {
    "AdamW in groups": {"optimizer": optim.AdamW(lr=0.01), "groups": [optim.Group("slow", "b", lr=0.001)]},
    "accumulation and averages": {
        "optimizer": optim.SGD(lr=0.1),
        "transforms": optserve.Transforms(accumulate=3, average=optserve.EMA(0.9)),
    },
    "Muon": {"optimizer": optim.Muon(lr=0.01)},
    "int8 state": {"optimizer": optim.Adam(lr=0.01), "state": "int8"},
    "moments only": {"optimizer": optim.Adam(lr=0.01), "holds": "moments"},
    "int8 gradients": {"optimizer": optim.Adam(lr=0.01), "push_format": formats.Int8()},
}


def tensors(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def until(condition: Callable[[], object]) -> None:
    """Wait for something that other threads, or processes, bring about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def serving(directory: Path | None, **options: Any) -> Server:
    return Server(Config(listen="127.0.0.1:0", data_dir=directory, **options))


def status_of(server: str | Server) -> pb.GetServerStatusResponse:
    transport = connect(server if isinstance(server, str) else server.address)
    with contextlib.closing(transport):
        return transport.call("GetServerStatus", pb.GetServerStatusRequest(), 10.0)  # type: ignore[no-any-return]


def promote(server: str | Server) -> pb.PromoteServerResponse:
    transport = connect(server if isinstance(server, str) else server.address)
    with contextlib.closing(transport):
        return transport.call("PromoteServer", pb.PromoteServerRequest(), 60.0)  # type: ignore[no-any-return]


def armed(standby: Server) -> bool:
    """Whether it would promote itself: the primary has granted a lease, and it has heard of it."""
    assert standby._pair.follower is not None
    return standby._pair.follower._leased


def promotable(server: str | Server) -> bool:
    return status_of(server).promotable


def sets_of(server: Server) -> dict[str, int]:
    """Events by id."""
    return {each.spec.id: each.events for each in server._engine.list()}


def await_equal(ours: Server, theirs: Server) -> None:
    """Wait until the standby has as much, and then see that it has the same."""
    until(lambda: sets_of(ours) == sets_of(theirs))
    for each in ours._engine.list():
        assert_same(each, theirs._engine.get(each.spec.id))


@pytest.fixture
def leader(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "leader") as server:
        yield server


@pytest.fixture(params=["on disk", "in memory"])
def standby(leader: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    directory = tmp_path / "standby" if request.param == "on disk" else None
    with serving(directory, follow=leader.address) as server:
        yield server


@pytest.fixture
def worker(leader: Server) -> Iterator[optserve.Client]:
    with optserve.Client(leader.address) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "journal"), [*((kind, "always") for kind in KINDS), *((kind, "everysec") for kind in [*KINDS][:3])]
)
def test_a_standby_has_the_same_bits(
    kind: str, journal: str, leader: Server, standby: Server, worker: optserve.Client
) -> None:
    options = dict(KINDS[kind])
    weights = worker.create_parameter_set("set", tensors(), options.pop("optimizer"), journal=journal, **options)
    for step in range(7):
        weights.push(tensors(step + 1))
        if step == 3:
            weights.update(lr=0.003)
            with pytest.raises(optserve.NonFiniteValue):
                weights.push({**tensors(), "b": np.full(7, np.nan, np.float32)})
    await_equal(leader, standby)


def test_a_standby_has_the_rounds_and_the_rows_of_tables(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    table = optserve.Table((5,), capacity=64, initial=optserve.Normal(std=0.1, seed=3))
    weights = worker.create_parameter_set(
        "set",
        {"table": table, "b": np.zeros(7, np.float32)},
        optim.Adagrad(lr=0.1),
        journal="always",
        policy=optserve.Sync(workers=2),
    )
    handles = [weights, worker.parameter_set("set")]

    def push(k: int, step: int) -> None:
        random = np.random.default_rng(10 * step + k)
        values = random.standard_normal((6, 5)).astype(np.float32)
        rows = optserve.RowSparse(random.integers(0, 50, 6), values)
        handles[k].push({"table": rows, "b": random.standard_normal(7).astype(np.float32)})

    with ThreadPoolExecutor(2) as pool:
        for step in range(5):
            list(pool.map(lambda k: push(k, step), range(2)))  # noqa: B023
    await_equal(leader, standby)


def test_a_standby_follows_policies_and_has_what_waits_in_a_buffer(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    statistics = {"scalar": "average", "b": "replace"}
    weights = worker.create_parameter_set(
        "set", tensors(), optim.Adam(), journal="always", pushes="deltas", buffers=statistics
    )
    policies = (
        optserve.Buffered(samples=5.0),
        optserve.Async(staleness.DelayCompensation()),
        optserve.Buffered(pushes=3),
    )
    for turn, policy in enumerate(policies):
        weights.update(policy=policy)
        for step in range(2):
            weights.push(tensors(10 * turn + step), samples=2.0)
    await_equal(leader, standby)
    (followed,) = standby._engine.list()
    assert followed.capture().progress.accumulated == 2


def test_what_was_there_before_the_standby_comes_with_the_events_since_the_checkpoint(
    leader: Server, worker: optserve.Client, tmp_path: Path
) -> None:
    weights = worker.create_parameter_set("set", tensors(), optim.Adam(), journal="always")
    for step in range(5):
        weights.push(tensors(step))
    with serving(tmp_path / "standby", follow=leader.address) as standby:
        await_equal(leader, standby)
        weights.push(tensors(5))
        await_equal(leader, standby)


def test_a_set_without_a_journal_comes_with_each_checkpoint(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    weights = worker.create_parameter_set("set", tensors(), optim.Adam())
    for step in range(3):
        weights.push(tensors(step))
        weights.checkpoint()
        await_equal(leader, standby)


def test_new_deleted_rewound_and_forked_sets_are_followed(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    kept = worker.create_parameter_set("kept", tensors(), optim.Adam(), journal="always")
    gone = worker.create_parameter_set("gone", tensors(), optim.Adam(), journal="always")
    for step in range(4):
        kept.push(tensors(step))
        gone.push(tensors(step))
    await_equal(leader, standby)
    gone.delete()
    kept.rewind(2)
    kept.fork("forked", version=1)
    until(lambda: sets_of(standby).keys() == {"kept", "forked"})
    await_equal(leader, standby)
    anew = worker.create_parameter_set("gone", tensors(9), optim.SGD(), journal="always")
    anew.push(tensors(10))
    with worker.parameter_set("kept") as other:
        other.push(tensors(11))
    await_equal(leader, standby)


def test_a_standby_refuses_clients_and_says_whom_to_ask(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    worker.create_parameter_set("set", tensors(), optim.Adam(), journal="always")
    until(lambda: promotable(standby))
    with optserve.Client(standby.address, timeout=0.2) as client:
        with pytest.raises(optserve.ServerUnavailable, match=f"standby of {leader.address}"):
            client.list_parameter_sets()
        with pytest.raises(optserve.ServerUnavailable, match="promote"):
            client.create_parameter_set("other", tensors(), optim.Adam())
    assert health_of(standby) == health_pb2.HealthCheckResponse.NOT_SERVING
    status = status_of(standby)
    assert (status.phase, status.primary, status.lag) == (pb.PHASE_STANDBY, leader.address, 0)
    assert status_of(leader).standby == standby.address


def health_of(server: Server) -> int:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return answer.status  # type: ignore[no-any-return]


def test_a_promoted_standby_serves_with_everything_and_the_deposed_primary_refuses_everything(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    weights = worker.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
    unjournaled = worker.create_parameter_set("unjournaled", {"x": np.zeros(3)}, COUNTING)
    until(lambda: sets_of(standby).keys() == {"set", "unjournaled"})
    for _ in range(5):
        weights.push({"x": np.ones(3)})
        unjournaled.push({"x": np.ones(3)})
    answer = promote(standby)
    assert (answer.promoted, answer.deposed) == (True, True)
    assert health_of(standby) == health_pb2.HealthCheckResponse.SERVING
    assert health_of(leader) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert status_of(leader).phase == pb.PHASE_DEPOSED
    weights._session._timeout = 0.2
    with pytest.raises(optserve.ServerUnavailable, match=f"deposed by.*{standby.address}"):
        weights.pull()
    with optserve.Client(standby.address) as client:
        for handle in (weights, unjournaled):
            again = client.parameter_set(handle.id, identity=handle.identity)
            assert again.pull()["x"].tolist() == [5, 5, 5]
            assert again.push({"x": np.ones(3)}).sequence == 6
    assert not promote(standby).promoted


def test_a_push_that_reached_the_standby_is_a_duplicate_there(
    leader: Server, standby: Server, worker: optserve.Client
) -> None:
    weights = worker.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
    weights.pull()
    before = weights.identity
    receipt = weights.push({"x": np.ones(3)})
    promote_when_ready(standby)
    with optserve.Client(standby.address) as client:
        again = client.parameter_set("set", identity=before)  # as if the receipt had never come
        repeated = again.push({"x": np.ones(3)})
        assert (repeated.sequence, repeated.version, repeated.duplicate) == (1, receipt.version, True)
        assert not again.push({"x": np.ones(3)}).duplicate
        assert again.pull()["x"].tolist() == [2, 2, 2]


def promote_when_ready(standby: str | Server) -> pb.PromoteServerResponse:
    until(lambda: promotable(standby))
    return promote(standby)


def test_operators_promote_and_ask_by_command(leader: Server, standby: Server) -> None:
    until(lambda: promotable(standby))
    command = CliRunner()
    assert "0 events behind; could be promoted" in command.invoke(app, ["status", "--address", standby.address]).output
    assert f"followed by {standby.address}" in command.invoke(app, ["status", "--address", leader.address]).output
    promoted = command.invoke(app, ["promote", "--address", standby.address])
    assert "the former primary has stopped" in promoted.output
    assert "serves already" in command.invoke(app, ["promote", "--address", standby.address]).output
    assert ": deposed" in command.invoke(app, ["status", "--address", leader.address]).output
    assert "must not serve any more" in command.invoke(app, ["promote", "--address", leader.address]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"follow": "nowhere"}, "host:port"),
        ({"promote_after": 10.0}, "primary that this server follows"),
        ({"follow": "a:1", "promote_after": 0.0}, "at least 0.2 seconds"),
        ({"wait_for_standby": True}, "data directory"),
        ({"follow": "a:1", "data_dir": Path("x"), "checkpoint_store": "file:///y"}, "no checkpoint store"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_one_that_has_not_got_everything_is_not_promoted(tmp_path: Path) -> None:
    with serving(tmp_path / "standby", follow="127.0.0.1:1") as standby:
        with pytest.raises(optserve.FailedPrecondition, match="has not got everything"):
            promote(standby)
        assert status_of(standby).phase == pb.PHASE_STANDBY


def test_a_primary_without_a_data_directory_is_not_followed() -> None:
    with serving(None) as leader, serving(None, follow=leader.address) as standby:
        with pytest.raises(optserve.NoDataDirectory):
            next(iter(standby._pair.follower._connect(iter([FollowRequest()]))))  # type: ignore[union-attr]
        assert not promotable(standby)


def test_there_is_one_standby_at_a_time(leader: Server, standby: Server, tmp_path: Path) -> None:
    until(lambda: promotable(standby))
    with serving(tmp_path / "other", follow=leader.address) as other:
        with pytest.raises(optserve.FailedPrecondition, match=standby.address):
            next(iter(other._pair.follower._connect(iter([FollowRequest(hello=other._pair._hello())]))))  # type: ignore[union-attr]
        standby.stop()
        until(lambda: promotable(other))


@pytest.mark.parametrize("failure", ["killed, promoted by hand", "killed, promoted by itself", "paused"])
def test_nothing_acknowledged_is_lost_if_the_primary_waits_for_its_standby_and_fails(
    failure: str, tmp_path: Path
) -> None:
    """Four workers push at full speed, and go on at the standby: each push that was acknowledged is there, each once."""
    listen = ("--listen", "127.0.0.1:0", "--data-dir")
    lease = () if "by hand" in failure else ("--promote-after", "1")
    with (
        running(*listen, f"{tmp_path}/a", "--wait-for-standby", log=tmp_path / "a.log") as leader,
        running(*listen, f"{tmp_path}/b", "--follow", leader.address, *lease, log=tmp_path / "b.log") as standby,
        optserve.Client([leader.address, standby.address]) as client,
    ):
        until(lambda: promotable(standby.address))
        client.create_parameter_set("set", {"x": np.zeros(4)}, COUNTING, journal="always")
        acknowledged = [0] * 4
        stopped = threading.Event()

        def push(k: int) -> None:
            with client.parameter_set("set") as mine:
                while not stopped.is_set():
                    mine.push({"x": np.eye(4)[k]})
                    acknowledged[k] += 1

        with ThreadPoolExecutor(4) as pool:
            pushing = [pool.submit(push, k) for k in range(4)]
            until(lambda: min(acknowledged) >= 20)
            if failure == "paused":
                leader.process.send_signal(signal.SIGSTOP)
                until(lambda: status_of(standby.address).phase == pb.PHASE_SERVING)
                leader.process.send_signal(signal.SIGCONT)
                until(lambda: status_of(leader.address).phase == pb.PHASE_DEPOSED)
            else:
                leader.stop(signal.SIGKILL)
            if "by hand" in failure:
                assert not promote(standby.address).deposed
            before = list(acknowledged)
            until(lambda: all(now > then + 20 for now, then in zip(acknowledged, before, strict=True)))
            stopped.set()
            for each in pushing:
                each.result()
        assert client.parameter_set("set").pull()["x"].tolist() == acknowledged


def test_without_waiting_a_worker_hears_of_what_had_not_reached_the_standby(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "a") as leader,
        Proxy(leader.address) as proxy,
        serving(tmp_path / "b", follow=proxy.address) as standby,
        optserve.Client([leader.address, standby.address]) as client,
    ):
        weights = client.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
        weights.push({"x": np.ones(3)})
        until(lambda: sets_of(standby).get("set") == 1)
        proxy.close()
        until(lambda: not status_of(leader).standby)
        weights.push({"x": np.ones(3)})
        leader.stop()
        promote(standby)
        with pytest.raises(optserve.RolledBack):
            weights.pull()
        assert weights.push({"x": np.ones(3)}).version == 2


def test_a_primary_that_waits_acknowledges_nothing_without_a_standby(tmp_path: Path) -> None:
    with serving(tmp_path / "a", wait_for_standby=True) as leader, optserve.Client(leader.address) as client:
        weights = client.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="everysec")
        unjournaled = client.create_parameter_set("unjournaled", {"x": np.zeros(3)}, COUNTING)
        assert unjournaled.push({"x": np.ones(3)}).version == 1
        weights._session._timeout = 0.5
        with pytest.raises(optserve.OutcomeUnknown):
            weights.push({"x": np.ones(3)})
        with pytest.raises(optserve.ServerUnavailable, match="no standby is connected"):
            leader._engine.get("set")._log.wait(1)
        with serving(tmp_path / "b", follow=leader.address) as standby:
            until(lambda: sets_of(standby).get("set") == 1)
            weights._session._timeout = 30.0
            receipt = weights.settle()
            assert receipt is not None
            assert receipt.sequence == 1
            assert weights.push({"x": np.ones(3)}).version == 2


def test_a_primary_stops_acknowledging_before_its_standby_promotes_itself(tmp_path: Path) -> None:
    """The connection between them breaks while a worker pushes at full speed; nobody tells the primary."""
    with serving(tmp_path / "a") as leader, Proxy(leader.address) as proxy, optserve.Client(leader.address) as client:
        promoted_at: list[float] = []
        standby = serving(tmp_path / "b", follow=proxy.address, promote_after=0.6)
        serve = standby._pair.follower._promoted  # type: ignore[union-attr]

        def promoted() -> None:
            promoted_at.append(time.monotonic())
            serve()

        standby._pair.follower._promoted = promoted  # type: ignore[union-attr]
        with standby:
            weights = client.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
            until(lambda: "set" in sets_of(standby) and armed(standby))
            acknowledged: list[float] = []
            weights._session._timeout = 0.1

            def push() -> None:
                with contextlib.suppress(optserve.OptserveError):
                    while True:
                        weights.push({"x": np.ones(3)})
                        acknowledged.append(time.monotonic())

            with ThreadPoolExecutor(1) as pool:
                pushing = pool.submit(push)
                until(lambda: len(acknowledged) > 20)
                cut_at = time.monotonic()
                proxy.close()
                until(lambda: promoted_at)
                pushing.result()
            assert cut_at < max(acknowledged) < promoted_at[0]
            assert status_of(standby).phase == pb.PHASE_SERVING
            assert status_of(leader).phase == pb.PHASE_LAPSED
            with pytest.raises(optserve.OptserveError, match="waits for its standby"):
                weights.push({"x": np.ones(3)})


def test_a_primary_that_was_cut_off_is_deposed_once_it_is_reached_again(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as leader, Proxy(leader.address) as proxy:
        with serving(tmp_path / "b", follow=proxy.address, promote_after=0.4) as standby:
            until(lambda: armed(standby))
            proxy.swallow_answers()
            until(lambda: status_of(standby).phase == pb.PHASE_SERVING)
            proxy.cut()
            until(lambda: status_of(leader).phase == pb.PHASE_DEPOSED)
        assert promote(leader).promoted  # by an operator who knows that the other one is gone
        assert status_of(leader).phase == pb.PHASE_SERVING


def test_a_lease_ends_with_the_standby_that_resigns_and_not_with_one_that_is_lost(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as leader, optserve.Client(leader.address, timeout=1.0) as client:
        with serving(tmp_path / "b", follow=leader.address, promote_after=0.4) as standby:
            until(lambda: armed(standby))
        assert client.list_parameter_sets() == []
        with (
            Proxy(leader.address) as proxy,
            serving(tmp_path / "b", follow=proxy.address, promote_after=0.4) as standby,
        ):
            until(lambda: armed(standby))
            proxy.close()
            until(lambda: status_of(leader).phase == pb.PHASE_LAPSED)
            with pytest.raises(optserve.ServerUnavailable, match="promote this one if that is gone"):
                client.list_parameter_sets()
            until(lambda: status_of(standby).phase == pb.PHASE_SERVING)


def test_a_primary_with_a_lease_waits_for_its_standby_when_it_restarts(tmp_path: Path) -> None:
    leader = serving(tmp_path / "a")
    with (
        Proxy(leader.address) as proxy,
        leader,
        serving(tmp_path / "b", follow=proxy.address, promote_after=60.0) as standby,
    ):
        until(lambda: armed(standby))
        proxy.close()
        leader.stop()
        with serving(tmp_path / "a") as again:
            assert status_of(again).phase == pb.PHASE_LAPSED
            assert promote(again).promoted
            assert status_of(again).phase == pb.PHASE_SERVING


def test_a_standby_starts_over_with_a_primary_that_was_killed_and_keeps_its_sets_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    with Proxy("127.0.0.1:1") as proxy, serving(tmp_path / "b", follow=proxy.address) as standby:
        with serving(tmp_path / "a") as leader, optserve.Client(leader.address) as client:
            proxy.target = leader.address
            weights = client.create_parameter_set("set", tensors(), optim.Adam(), journal="always")
            for step in range(4):
                weights.push(tensors(step))
            await_equal(leader, standby)
            shutil.copytree(tmp_path / "a", tmp_path / "killed")  # a checkpoint of the beginning, and a journal
            proxy.cut()
            proxy.target = "127.0.0.1:1"
        add = standby._engine.add

        def noted(parameter_set: Any) -> None:
            published.append(parameter_set.events)
            add(parameter_set)

        monkeypatch.setattr(standby._engine, "add", noted)
        with serving(tmp_path / "killed") as again, optserve.Client(again.address) as client:
            proxy.target = again.address
            until(lambda: published)
            assert published == [4]
            client.parameter_set("set").push(tensors(4))
            await_equal(again, standby)


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "a") as leader,
        Proxy(leader.address) as proxy,
        serving(tmp_path / "b", follow=proxy.address) as standby,
        optserve.Client(leader.address) as client,
    ):
        weights = client.create_parameter_set("set", tensors(), optim.Adam(), journal="always")
        until(lambda: "set" in sets_of(standby))
        before = standby._engine.get("set")
        for step in range(12):
            weights.push(tensors(step))
            if step % 3 == 0:
                proxy.cut()
        await_equal(leader, standby)
        assert standby._engine.get("set") is before


def test_a_set_that_is_another_one_by_now_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "a") as leader,
        Proxy(leader.address) as proxy,
        serving(tmp_path / "b", follow=proxy.address) as standby,
        optserve.Client(leader.address) as client,
    ):
        for seed, pushes in ((0, 3), (10, 5)):
            weights = client.create_parameter_set("set", tensors(seed), optim.Adam(), journal="always")
            client.create_parameter_set(f"gone-{seed}", tensors(), optim.Adam(), journal="always")
            for step in range(pushes):
                weights.push(tensors(seed + step))
            proxy.target = leader.address
            await_equal(leader, standby)
            proxy.target = "127.0.0.1:1"
            proxy.cut()
            until(lambda: not status_of(leader).standby)
            for each in client.list_parameter_sets():
                client.parameter_set(each.id).delete()
        client.create_parameter_set("set", tensors(20), optim.SGD(), journal="always").push(tensors())
        proxy.target = leader.address
        until(lambda: sets_of(standby) == {"set": 1})
        await_equal(leader, standby)


def test_a_standby_confirms_what_is_on_its_own_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(tmp_path / "a", wait_for_standby=True) as leader,
        serving(tmp_path / "b", follow=leader.address) as standby,
        optserve.Client(leader.address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
        weights.push({"x": np.ones(3)})
        assert standby._storage is not None
        keeper = standby._storage.keeper("set")
        assert keeper is not None
        reached, released, sync = threading.Event(), threading.Event(), keeper.sync

        def held() -> None:
            reached.set()
            assert released.wait(60)
            sync()

        monkeypatch.setattr(keeper, "sync", held)
        pushing = pool.submit(weights.push, {"x": np.ones(3)})
        assert reached.wait(60)
        assert sets_of(standby) == {"set": 2}
        assert not pushing.done()
        released.set()
        assert pushing.result().version == 2


def test_a_slow_standby_costs_the_primary_nothing_and_gets_a_newer_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, take = threading.Event(), Replica.take

    def slow(replica: Replica, message: Any) -> None:
        if message.data:
            assert held.wait(60)
        take(replica, message)

    monkeypatch.setattr(Replica, "take", slow)
    with (
        serving(tmp_path / "a") as leader,
        serving(tmp_path / "b", follow=leader.address) as standby,
        optserve.Client(leader.address) as client,
    ):
        weights = client.create_parameter_set("set", {"x": np.zeros(1 << 20, np.float32)}, COUNTING, journal="always")
        until(lambda: status_of(leader).standby)
        following = leader._pair.primary._following  # type: ignore[union-attr]
        assert following is not None
        for step in range(24):
            weights.push({"x": np.full(1 << 20, step, np.float32)})
            if step % 8 == 7:
                weights.checkpoint()
        until(lambda: following._sent >= primary.WINDOW)
        assert following._sent <= primary.WINDOW + (2 << 20)
        assert leader._pair.primary.lag >= 23  # type: ignore[union-attr]
        held.set()
        await_equal(leader, standby)


def test_sets_that_a_standby_had_before_are_kept_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with serving(tmp_path / name) as server, optserve.Client(server.address) as client:
            client.create_parameter_set(f"of-{name}", tensors(), optim.Adam(), journal="always").push(tensors())
            client.create_parameter_set("of-both", {"x": np.full(3, float(ord(name)))}, COUNTING, journal="always")
    with serving(tmp_path / "a") as leader:
        with serving(tmp_path / "b", follow=leader.address) as standby:
            await_equal(leader, standby)
            until(lambda: (tmp_path / "b" / "former").exists())
        assert len(list((tmp_path / "b" / "former").iterdir())) == 1
        with serving(tmp_path / "b") as alone:
            await_equal(leader, alone)


def test_who_was_promoted_or_deposed_is_so_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "a") as leader:
        with optserve.Client(leader.address) as client:
            client.create_parameter_set("set", {"x": np.zeros(3)}, COUNTING, journal="always")
        with serving(tmp_path / "b", follow=leader.address) as standby:
            assert promote_when_ready(standby).deposed
        with serving(tmp_path / "b", follow=leader.address) as standby:  # as the same command line would
            assert status_of(standby).phase == pb.PHASE_SERVING
            with optserve.Client(standby.address) as client:
                assert client.parameter_set("set").push({"x": np.ones(3)}).version == 1
            leader.stop()
            with serving(tmp_path / "a") as again:
                assert status_of(again).phase == pb.PHASE_DEPOSED
            with serving(tmp_path / "a", follow=standby.address) as follower:
                await_equal(standby, follower)
                assert promote_when_ready(follower).deposed
                assert status_of(standby).phase == pb.PHASE_DEPOSED
                with optserve.Client(follower.address) as client:
                    assert client.parameter_set("set").pull()["x"].tolist() == [1, 1, 1]


def test_a_lease_lasts_for_less_than_the_standby_waits_from_when_an_echoed_heartbeat_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(lease, "now", lambda: now[0])
    held = Lease()
    assert not held.lapsed
    held.grant(10.0)
    first, leased = held.sending()
    assert leased
    now[0] = 104.0
    second, _ = held.sending()
    now[0] = 108.0
    held.echoed(first)  # says nothing of what was sent since
    assert not held.lapsed
    now[0] = 109.0
    assert held.lapsed
    held.echoed(second)
    assert not held.lapsed
    now[0] = 113.0
    assert held.lapsed
    held.echoed(second)
    assert held.lapsed
    held.end()
    assert not held.lapsed


def test_a_shorter_lease_counts_from_now_and_a_longer_one_from_the_next_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(lease, "now", lambda: now[0])
    held = Lease()
    held.grant(10.0)
    held.grant(100.0)
    now[0] = 9.0
    assert held.lapsed
    restarted = Lease()
    restarted.grant(10.0, lapsed=True)
    assert restarted.lapsed
    number, _ = restarted.sending()
    restarted.grant(10.0)
    assert restarted.lapsed
    restarted.echoed(number)
    assert not restarted.lapsed
    restarted.grant(1.0)
    now[0] = 10.0
    assert restarted.lapsed
