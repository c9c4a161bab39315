"""The server as a process: ports, signals, draining, restarts, the command line."""

import errno
import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest

import optserve
from optserve import optim
from optserve._messages import encode_spec
from optserve._specification import ParameterSetSpec
from optserve._wire import Frame
from optserve.v1 import optimizer_service_pb2 as pb
from optserve_server import Config, Server
from optserve_server.storage import files
from processes import ServerProcess, optserve_command, running
from proxy import Proxy

ONES = {"x": np.ones(3, np.float32)}
START = {"x": np.zeros(3, np.float32)}


def test_a_free_port_is_taken_on_request_and_loopback_is_the_default() -> None:
    assert Config().is_local
    with Server(Config(listen="127.0.0.1:0")) as one, Server(Config(listen="127.0.0.1:0")) as two:
        assert one.address != two.address
        assert not one.address.endswith(":0")


def test_a_unix_socket_works(tmp_path: Path) -> None:
    with Server(Config(listen=f"unix:{tmp_path}/socket")) as server, optserve.Client(server.address) as client:
        assert client.create_parameter_set("a", START, optim.SGD()).push(ONES).version == 1


def test_a_second_server_on_one_port_is_refused() -> None:
    with Server(Config(listen="127.0.0.1:0")) as server, pytest.raises(OSError, match="is another server there"):
        Server(Config(listen=server.address))


def test_a_second_server_on_one_data_directory_is_refused(tmp_path: Path) -> None:
    with (
        Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)),
        pytest.raises(OSError, match="another server uses the data directory"),
    ):
        Server(Config(listen="127.0.0.1:0", data_dir=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listen": "nowhere"}, "host:port"),
        ({"threads": 0}, "thread"),
        ({"max_streams": 0}, "stream"),
        ({"grace": -1}, "grace"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)  # type: ignore[arg-type]


def test_streams_beyond_the_limit_are_told_to_try_again() -> None:
    with (
        Server(Config(listen="127.0.0.1:0", max_streams=2)) as server,
        optserve.Client(server.address, timeout=0.5) as client,
    ):
        handles = [client.create_parameter_set("a", START, optim.SGD()), client.parameter_set("a")]
        for handle in handles:
            handle.push(ONES)
        third = client.parameter_set("a")
        with pytest.raises((optserve.ServerBusy, optserve.DeadlineExceeded), match="at most 2 streams"):
            third.push(ONES)
        handles[0].close()
        with optserve.Client(server.address) as patient:
            assert patient.parameter_set("a").push(ONES).version == 3


def test_uploads_that_say_nothing_more_leave_health_and_control_alone() -> None:
    """Twenty creations that begin and never go on, where there is room for four: the rest are told to try again."""
    begun = Frame(pb.CreateParameterSetRequest(spec=encode_spec(ParameterSetSpec("a", SPECS, optim.SGD())))).to_bytes()
    never = threading.Event()

    def stalled() -> Iterator[bytes]:
        yield begun
        never.wait()

    with (
        Server(Config(listen="127.0.0.1:0", max_streams=4)) as server,
        optserve.Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        create = channel.stream_unary("/optserve.v1.OptimizerService/CreateParameterSet")
        uploads = [create.future(stalled()) for _ in range(20)]
        busy = [upload for upload in uploads if refused_at_once(upload)]
        assert len(busy) >= 16
        assert client.list_parameter_sets() == []
        assert serving(server.address)
        never.set()


SPECS = (optserve.TensorSpec.of("x", np.zeros(3, np.float32)),)


def refused_at_once(upload: Any) -> bool:
    """Whether a call ended with RESOURCE_EXHAUSTED within some seconds; one that is held does not end."""
    try:
        return upload.exception(timeout=3).code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[no-any-return]
    except grpc.FutureTimeoutError:
        return False


def serving(address: str) -> bool:
    return optserve_command("health", "--address", address).returncode == 0


def test_pushes_beyond_the_bytes_in_flight_wait_their_turn_and_none_is_lost() -> None:
    """Eight workers push at once where there is room for two: only retryable refusals, and every update is made."""
    size = 1 << 20
    large = {"x": np.ones(size, np.float32)}
    config = Config(listen="127.0.0.1:0", max_bytes_in_flight=9 * size)
    with Server(config) as server, optserve.Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        weights = client.create_parameter_set("a", large, optim.SGD(lr=1.0, maximize=True))
        most: list[int] = []

        def work(handle: optserve.ParameterSet) -> None:
            for _ in range(3):
                handle.push(large)
                most.append(server._service.pushes._inside)

        list(pool.map(work, [client.parameter_set("a") for _ in range(8)]))
        assert max(most) <= 9 * size
        params = weights.pull()
        assert params.version == 24
        assert (params["x"] == 25).all()


def test_a_push_in_flight_is_finished_and_kept_when_the_server_stops(tmp_path: Path) -> None:
    """The push is held half way, the server is told to stop, and only then the rest is sent: it must be applied."""
    go_on = threading.Event()
    large = {"x": np.ones(1 << 20, np.float32)}
    server = Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)).start()
    with optserve.Client(server.address, transport="stream") as client, ThreadPoolExecutor(2) as pool:
        weights = client.create_parameter_set("a", large, optim.SGD(lr=1.0, maximize=True))
        weights.push(large)
        stream = weights._session._stream
        assert stream is not None
        send = stream.send

        def held(frames: Iterable[Any]) -> Iterator[Any]:
            for frame in frames:
                yield frame
                if frame.payload is not None:  # a heartbeat has none
                    go_on.wait()

        stream.send = lambda frames: send(held(frames))  # type: ignore[method-assign]
        gate = server._service.pushes
        with gate._changed:
            gate._changed.wait_for(lambda: gate._inside == 0)  # the first push has left
        pushing = pool.submit(weights.push, large)
        with gate._changed:
            gate._changed.wait_for(lambda: gate._inside == 4 << 20)
            stopping = pool.submit(server.stop)
            gate._changed.wait_for(lambda: gate._closed)
        go_on.set()
        assert pushing.result().version == 2
        stopping.result()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        params = client.parameter_set("a").pull()
        assert params.version == params.position.durable_version == 2
        np.testing.assert_array_equal(params["x"], 3)


def test_a_draining_server_takes_no_new_push(tmp_path: Path) -> None:
    server = Server(Config(listen="127.0.0.1:0")).start()
    with optserve.Client(server.address, timeout=0.5) as client:
        weights = client.create_parameter_set("a", START, optim.SGD())
        weights.push(ONES)
        server._service.pushes.close()
        with pytest.raises(optserve.ServerDraining, match="draining"):
            weights.push(ONES)
        assert weights.describe().version == 1
    server.stop()


def test_a_worker_goes_on_over_a_restart_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """The same pushes with and without a restart in the middle give the same bits, state included."""
    arguments = ("--data-dir", str(tmp_path / "data"))
    log = tmp_path / "log"
    gradients = [{"x": np.random.default_rng(k).normal(size=3).astype(np.float32)} for k in range(10)]
    first = ServerProcess("--listen", "127.0.0.1:0", *arguments, log=log)
    with optserve.Client(first.address) as client, optserve.Client(":memory:") as undisturbed:
        weights = client.create_parameter_set("a", START, optim.NAdam(lr=0.1), groups=[optim.Group("g", "x", eps=1e-3)])
        twin = undisturbed.create_parameter_set(
            "a", START, optim.NAdam(lr=0.1), groups=[optim.Group("g", "x", eps=1e-3)]
        )
        for each in (weights, twin):
            for gradient in gradients[:4]:
                each.push(gradient)
            each.update(group="g", lr=0.05)
        assert first.stop() == 0
        with running("--listen", first.address, *arguments, log=log):
            for gradient in gradients[4:]:
                expected, params = twin.step(gradient), weights.step(gradient)
                assert params.receipt is not None
                assert expected.receipt is not None
                assert (params.version, params.receipt.sequence) == (expected.version, expected.receipt.sequence)
                np.testing.assert_array_equal(params["x"], expected["x"])


def test_a_killed_server_comes_back_at_its_checkpoint_and_says_what_is_lost(tmp_path: Path) -> None:
    arguments = ("--data-dir", str(tmp_path / "data"))
    first = ServerProcess("--listen", "127.0.0.1:0", *arguments, log=tmp_path / "log")
    with optserve.Client(first.address) as client:
        weights = client.create_parameter_set("a", START, optim.SGD(lr=1.0, maximize=True))
        weights.push(ONES)
        assert weights.checkpoint().durable_version == 1
        for _ in range(3):
            weights.push(ONES)
        first.stop(signal.SIGKILL)
        with running("--listen", first.address, *arguments, log=tmp_path / "log"):
            with pytest.raises(optserve.RolledBack, match=r"came back at version 1.*of its 4 pushes 1 are left"):
                weights.push(ONES)
            params = weights.step(ONES)
            assert params.version == 2
            np.testing.assert_array_equal(params["x"], 2)


def test_stopping_twice_writes_once_and_leaves_the_next_server_alone(tmp_path: Path) -> None:
    first = Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)).start()
    with optserve.Client(first.address) as client:
        client.create_parameter_set("a", START, optim.SGD(lr=1.0, maximize=True)).push(ONES)
    first.stop()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as second, optserve.Client(second.address) as client:
        client.parameter_set("a").push(ONES)
        first.stop()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as third, optserve.Client(third.address) as client:
        assert client.parameter_set("a").pull().version == 2


def test_a_server_that_cannot_listen_gives_its_data_directory_back(tmp_path: Path) -> None:
    with Server(Config(listen="127.0.0.1:0")) as other, pytest.raises(OSError, match="is another server there"):
        Server(Config(listen=other.address, data_dir=tmp_path))
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)):
        pass


def test_checkpoints_from_many_threads_and_deletions_do_not_mix(tmp_path: Path) -> None:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        handles = [client.create_parameter_set(f"set-{k}", START, optim.SGD()) for k in range(8)]

        def work(handle: optserve.ParameterSet) -> None:
            for _ in range(3):
                handle.push(ONES)
                handle.checkpoint()

        def delete(handle: optserve.ParameterSet) -> None:
            try:
                work(handle)
            except optserve.ParameterSetNotFound:
                return

        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(work, client.parameter_set(handle.id)) for handle in handles[:4] for _ in range(2)]
            futures += [pool.submit(delete, client.parameter_set(handle.id)) for handle in handles[4:]]
            for handle in handles[4:]:
                handle.delete()
            for future in futures:
                future.result()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        listed = {each.id: each.version for each in client.list_parameter_sets()}
        assert listed == {f"set-{k}": 6 for k in range(4)}


def test_a_step_of_moments_whose_updates_a_restart_lost_is_not_mistaken_for_one_without(tmp_path: Path) -> None:
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path)
    server = Server(config).start()
    with (
        Proxy(server.address) as proxy,
        optserve.Client(proxy.address, transport="stream") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        weights = client.create_parameter_set("a", START, optim.SGD(), holds="moments")
        weights.step(ONES)
        proxy.swallow_answers()
        stepping = pool.submit(weights.step, ONES)
        while server._engine.get("a").position.version < 2:
            assert not stepping.done()
        server.stop()
        with Server(Config(listen=server.address, data_dir=tmp_path)):
            proxy.cut()
            with pytest.raises(optserve.OutcomeUnknown, match="its updates were gone"):
                stepping.result()


def test_a_deletion_that_the_disk_does_not_take_is_said(tmp_path: Path) -> None:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("set", {"x": np.zeros(3)}, optim.SGD(), journal="always")
        failing = mock.patch.object(files, "rename", side_effect=OSError(errno.EROFS, "Read-only file system"))
        with failing, pytest.raises(optserve.StorageFailed, match=r"was not deleted.*Read-only"):
            weights.delete()
        assert weights.push({"x": np.ones(3)}).version == 1
        weights.delete()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as again:
        assert again._engine.list() == []


def test_a_deleted_set_stays_deleted(tmp_path: Path) -> None:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", START, optim.SGD())
        weights.checkpoint()
        weights.delete()
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        assert client.list_parameter_sets() == []


def test_checkpoint_without_a_data_directory_is_refused(client: optserve.Client, new_id: Callable[[], str]) -> None:
    weights = client.create_parameter_set(new_id(), START, optim.SGD())
    with pytest.raises(optserve.NoDataDirectory, match="--data-dir"):
        weights.checkpoint()


def test_the_command_line_operates_a_running_server(tmp_path: Path) -> None:
    with running("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"), log=tmp_path / "log") as server:
        at = ("--address", server.address)
        assert optserve_command("health", *at).stdout == f"{server.address}: SERVING\n"
        with optserve.Client(server.address) as client:
            client.create_parameter_set("digits/mlp", START, optim.Adam()).push(ONES)
        assert "digits/mlp" in optserve_command("list", *at).stdout
        changed = optserve_command("set", "digits/mlp", "lr=3e-4", "betas=0.8,0.99", "maximize=true", *at)
        assert changed.stdout == "digits/mlp: lr, betas, maximize changed after version 1\n"
        described = optserve_command("describe", "digits/mlp", *at).stdout
        assert "betas=(0.8, 0.99)" in " ".join(described.split())
        assert "the last of 1 changes" in described
        assert (
            optserve_command("checkpoint", "digits/mlp", *at).stdout == "digits/mlp: version 1 is on stable storage\n"
        )
        refused = optserve_command("set", "digits/mlp", "lr=-1", *at)
        assert refused.returncode == 1
        assert refused.stderr.startswith("optserve: expected lr to be finite, at least 0")
        assert optserve_command("delete", "digits/mlp", *at).returncode == 0
        missing = optserve_command("describe", "digits/mlp", *at)
        assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
        assert server.stop() == 0
        events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
        assert [event["event"] for event in events][:1] == ["serving"]
        assert events[-1]["event"] == "stopped"
        refusals = [event["reason"] for event in events if event["event"] == "call refused"]
        assert refusals == ["INVALID_HYPERPARAMETER", "PARAMETER_SET_NOT_FOUND"]


def test_a_port_in_use_is_one_line_on_standard_error() -> None:
    with Server(Config(listen="127.0.0.1:0")) as server:
        result = optserve_command("serve", "--listen", server.address)
    assert result.returncode == 1
    assert "is another server there?" in result.stderr
    assert "Traceback" not in result.stderr
