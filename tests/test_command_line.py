"""What operators type about stable storage: checkpoints, data directories, exports, and a server that restores."""

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

import optserve
from equality import same
from optserve import EMA, Transforms, optim
from optserve_server import Config, Server
from optserve_server.storage import checkpoint, journal
from processes import ServerProcess, optserve_command, running

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
ONES = {"x": np.ones(3, np.float32)}
START = {"x": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server process with a data directory."""
    path = tmp_path_factory.mktemp("operated")
    with running("--listen", "127.0.0.1:0", "--data-dir", str(path / "data"), log=path / "log") as server:
        yield server


def home_of(directory: Path) -> Path:
    """The only set's directory."""
    (home,) = (directory / "sets").iterdir()
    return home


def rows(output: str) -> list[list[str]]:
    """The cells of a printed table, without its head."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def filled(directory: Path, *, setting: str = "always") -> None:
    """A data directory with checkpoints after events 0, 2 and 4, of which two are kept, and a journal to event 5."""
    with running("--listen", "127.0.0.1:0", "--data-dir", str(directory), log=directory / "log") as server:
        with optserve.Client(server.address) as client:
            weights = client.create_parameter_set("a/b", START, optim.Adam(), journal=setting)
            for _ in range(2):
                weights.push(ONES)
                weights.push(ONES)
                weights.checkpoint()
            weights.push(ONES)
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a directory, not to be changed."""
    path = tmp_path_factory.mktemp("sound")
    filled(path)
    return path


def test_all_sets_are_checkpointed_and_a_missing_one_does_not_keep_the_others_back(operated: ServerProcess) -> None:
    at = ("--address", operated.address)
    with optserve.Client(operated.address) as client:
        for name in ("one", "two"):
            client.create_parameter_set(name, START, optim.SGD()).push(ONES)
        everything = optserve_command("checkpoint", *at)
        assert (everything.returncode, everything.stderr) == (0, "")
        assert {"one: version 1 is on stable storage", "two: version 1 is on stable storage"} <= set(
            everything.stdout.splitlines()
        )
        client.parameter_set("two").push(ONES)
        some = optserve_command("checkpoint", "missing", "two", *at)
        assert some.returncode == 1
        assert some.stdout == "two: version 2 is on stable storage\n"
        assert some.stderr.startswith("optserve: missing: expected the id of a parameter set on this server")


def test_the_list_says_which_journal_a_set_has_and_how_far_stable_storage_is_behind(operated: ServerProcess) -> None:
    with optserve.Client(operated.address) as client:
        for setting in ("off", "always"):
            weights = client.create_parameter_set(f"listed/{setting}", START, optim.SGD(), journal=setting)
            weights.checkpoint()
            weights.push(ONES)
            weights.push(ONES)
    listed = {row[0]: row for row in rows(optserve_command("list", "--address", operated.address).stdout)}
    assert listed["listed/off"][2:5] == ["2", "2", "off"]
    assert listed["listed/always"][2:5] == ["2", "0", "always"]


def test_a_set_goes_back_and_is_forked(operated: ServerProcess, new_id: Callable[[], str]) -> None:
    at, id = ("--address", operated.address), new_id()
    with optserve.Client(operated.address) as client:
        weights = client.create_parameter_set(id, START, optim.Adam(), journal="always")
        versions = [weights.step(ONES) for _ in range(4)]
        assert optserve_command("fork", id, f"{id}/now", *at).stdout == f"{id}/now: begins at version 4 of {id}\n"
        forked = optserve_command("fork", id, f"{id}/then", "--version", "3", *at)
        assert forked.stdout == f"{id}/then: begins at version 3 of {id}\n"
        assert optserve_command("rewind", id, "2", *at).stdout == f"{id}: is what it was at version 2\n"
        for name, version in (("/now", 4), ("/then", 3), ("", 2)):
            assert same(dict(client.parameter_set(f"{id}{name}").pull()), dict(versions[version - 1]))
        refused = optserve_command("rewind", id, "9", *at)
        assert (refused.returncode, refused.stderr.startswith("optserve: expected a version of")) == (1, True)


def test_a_restoring_server_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    arrived, go_on = threading.Event(), threading.Event()
    fill = checkpoint.fill

    def held(*arguments: Any) -> Iterator[int]:
        for nbytes in fill(*arguments):
            yield nbytes
            arrived.set()
            go_on.wait()

    monkeypatch.setattr(checkpoint, "fill", held)
    server = Server(Config(listen="127.0.0.1:0", data_dir=tmp_path))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(server.start)
        arrived.wait()
        asked = optserve_command("health", "--address", server.address)
        go_on.set()
        starting.result()
        with server._acquired:
            serving = optserve_command("health", "--address", server.address)
    total = sum(path.stat().st_size for path in sorted(home_of(tmp_path).glob("checkpoint-*"))[-1].iterdir())
    total += sum(path.stat().st_size for _, path in journal.segments(home_of(tmp_path)))
    assert asked.returncode == 1
    assert asked.stdout.startswith(f"{server.address}: NOT_SERVING, restoring: 12 of ")
    assert asked.stdout.endswith(" bytes read\n")
    assert serving.stdout == f"{server.address}: SERVING\n"


def test_a_sound_data_directory_is_verified(sound: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    verified = optserve_command("verify", str(sound))
    assert rows(verified.stdout) == [
        ["a/b", "version 4, event 4", "1 events", "sound"],
        ["a/b", "version 2, event 2", "3 events", "sound"],
    ]
    assert (verified.returncode, verified.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == before


def test_a_data_directory_is_verified_while_a_server_writes_to_it(tmp_path: Path) -> None:
    with Server(Config(listen="127.0.0.1:0", data_dir=tmp_path)) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", START, optim.Adam(), journal="always")
        ended = threading.Event()

        def work() -> None:
            while not ended.is_set():
                for _ in range(20):
                    weights.push(ONES)
                weights.checkpoint()

        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work)
            results = [optserve_command("verify", str(tmp_path)) for _ in range(4)]
            ended.set()
            working.result()
    for result in results:
        assert result.returncode == 0, result.stdout
        assert {row[3].split(";")[0] for row in rows(result.stdout)} == {"sound"}


CHECKPOINT_FILES = ("manifest.json", "parameters.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("change", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_found_and_the_other_is_still_sound(
    sound: Path, tmp_path: Path, name: str, change: str
) -> None:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    victim = max(home_of(tmp_path).glob("checkpoint-*")) / name
    if change == "flipped":
        flip(victim, -5)
    elif change == "cut":
        victim.write_bytes(victim.read_bytes()[:-5])
    else:
        victim.unlink()
    verified = optserve_command("verify", str(tmp_path))
    newest, older = rows(verified.stdout)
    assert verified.returncode == 1
    assert newest[3].startswith("damaged: ")
    assert older == ["a/b", "version 2, event 2", "3 events", "sound"]


def test_a_damaged_journal_is_found(sound: Path, tmp_path: Path) -> None:
    """In the older segment, from which the newest checkpoint needs nothing."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (_, old), *_ = journal.segments(home_of(tmp_path))
    flip(old, old.read_bytes().index(ONES["x"].tobytes()))
    verified = optserve_command("verify", str(tmp_path))
    newest, older = rows(verified.stdout)
    assert verified.returncode == 1
    assert newest[2:] == ["1 events", "sound"]
    assert older[3].startswith("damaged: journal: ")


def test_a_missing_segment_of_the_journal_is_found(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (_, old), *_ = journal.segments(home_of(tmp_path))
    old.unlink()
    verified = optserve_command("verify", str(tmp_path))
    assert verified.returncode == 1
    assert rows(verified.stdout)[1][3].startswith("damaged: journal: ")


def test_an_end_of_the_journal_that_a_crash_cut_short_is_no_damage(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    *_, (_, last) = journal.segments(home_of(tmp_path))
    flip(last, last.read_bytes().rindex(ONES["x"].tobytes()))
    verified = optserve_command("verify", str(tmp_path))
    assert verified.returncode == 0
    assert rows(verified.stdout)[0][2:] == ["0 events", "sound; event 5 was cut short, and is passed over"]


@pytest.mark.parametrize("setting", ["off", "always"])
def test_a_history_that_went_back_is_sound(tmp_path: Path, setting: str) -> None:
    config = Config(listen="127.0.0.1:0", data_dir=tmp_path, checkpoints_kept=9)
    with Server(config) as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", START, optim.Adam(), journal=setting)
        for back in (1, 2):
            for _ in range(2):
                weights.push(ONES)
                weights.checkpoint()
            if setting == "always":
                weights.push(ONES)
            weights.rewind(back)
        weights.push(ONES)
        verified = optserve_command("verify", str(tmp_path))
    assert verified.returncode == 0, verified.stdout
    assert [row[3] for row in rows(verified.stdout)] == ["sound"] * len(rows(verified.stdout))
    after = [int(row[2].split()[0]) for row in rows(verified.stdout)]
    assert (after[0], max(after)) == ((1, 3) if setting == "always" else (0, 0))


def test_what_is_no_data_directory_is_said_so(tmp_path: Path) -> None:
    result = optserve_command("verify", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "expected a server's data directory" in result.stderr


EXPORTED: dict[str, tuple[optim.Optimizer, dict[str, Any]]] = {
    "memory": (optim.NAdam(lr=0.1), {"journal": "everysec"}),
    "averages, and pushes that wait": (optim.AMSGrad(), {"transforms": Transforms(accumulate=2, average=EMA(0.9))}),
    "moments only": (optim.Adam(betas=(0.8, 0.99)), {"holds": "moments", "guard": False}),
    "in sync": (optim.Momentum(), {"policy": optserve.Sync(1)}),
}


def gradients(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(7, 5)),
        "layer/b": rng.normal(size=4097).astype(np.float32),
        "half": rng.normal(size=()).astype(bfloat16),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize(("optimizer", "options"), EXPORTED.values(), ids=EXPORTED.keys())
def test_an_exported_set_goes_on_elsewhere_with_the_same_bits(
    operated: ServerProcess,
    tmp_path: Path,
    new_id: Callable[[], str],
    optimizer: optim.Optimizer,
    options: dict[str, Any],
) -> None:
    at, file, id = ("--address", operated.address), tmp_path / "set.safetensors", new_id()
    with optserve.Client(operated.address) as client:
        groups = [optim.Group("few", "half", lr=0.5)]
        weights = client.create_parameter_set(id, gradients(0), optimizer, groups=groups, **options)
        for seed in range(1, 4):
            weights.push(gradients(seed))
        weights.update(lr=0.25)
        version = weights.describe().version
        exported = optserve_command("export", id, str(file), *at)
        assert (exported.returncode, exported.stdout) == (0, f"{id}: version {version} is in {file}\n"), exported.stderr
        restored = optserve_command("restore", str(file), "--id", f"{id}/again", *at)
        assert restored.stdout == f"{id}/again: restored at version {version}\n", restored.stderr
        again = client.parameter_set(f"{id}/again")
        ours, theirs = weights.describe().spec, again.describe().spec
        for name in ("tensors", "holds", "guard", "policy", "transforms", "journal"):
            assert getattr(ours, name) == getattr(theirs, name)
        for seed in range(4, 8):
            assert same(weights.step(gradients(seed)), again.step(gradients(seed)))
        assert same(weights.state(), again.state())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_export_is_an_ordinary_safetensors_file(operated: ServerProcess, tmp_path: Path) -> None:
    with optserve.Client(operated.address) as client:
        weights = client.create_parameter_set("ordinary", gradients(0), optim.Adam())
        weights.push(gradients(1))
        state, pulled = weights.state(), weights.pull()
    at = ("--address", operated.address)
    assert optserve_command("export", "ordinary", str(tmp_path / "a.safetensors"), *at).returncode == 0
    whole = load_file(tmp_path / "a.safetensors")
    parts = {"parameters": state.parameters, **state.slots}
    assert whole.keys() == {f"{part}/{name}" for part, arrays in parts.items() for name in arrays}
    for part, arrays in parts.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(whole[f"{part}/{name}"], array)
    only = ("export", "ordinary", str(tmp_path / "b.safetensors"), "--parameters-only", *at)
    assert optserve_command(*only).returncode == 0
    parameters = load_file(tmp_path / "b.safetensors")
    assert same(parameters, dict(pulled))
    assert {name: array.dtype for name, array in parameters.items()} == {
        name: array.dtype for name, array in pulled.items()
    }


def test_what_can_not_be_exported_is_said_so_and_no_file_is_left(operated: ServerProcess, tmp_path: Path) -> None:
    at = ("--address", operated.address)
    with optserve.Client(operated.address) as client:
        client.create_parameter_set("no/parameters", START, optim.Adam(), holds="moments")
        client.create_parameter_set("few/bits", START, optim.Adam(), state="int8")
    file = tmp_path / "file.safetensors"
    for arguments, message in (
        (("missing", str(file)), "expected the id of a parameter set"),
        (("no/parameters", str(file), "--parameters-only"), "holds moments only"),
        (("few/bits", str(file)), "few/bits"),
        (("few/bits", str(tmp_path / "file.pt")), "expected a file that ends in .safetensors"),
        (("few/bits", str(tmp_path / "missing" / "x.safetensors"), "--parameters-only"), "No such file or directory"),
    ):
        result = optserve_command("export", *arguments, *at)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(operated: ServerProcess, tmp_path: Path) -> None:
    file, at = tmp_path / "set.safetensors", ("--address", operated.address)
    with optserve.Client(operated.address) as client:
        weights = client.create_parameter_set("replaced", START, optim.SGD())
        assert optserve_command("export", "replaced", str(file), *at).returncode == 0
        weights.push(ONES)
        (tmp_path / "set.safetensors.new").write_bytes(b"what a crash left")
        assert optserve_command("export", "replaced", str(file), *at).stdout.startswith("replaced: version 1 is in")
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
        assert same(load_file(file), {"parameters/x": weights.pull()["x"]})


def test_files_that_are_damaged_or_foreign_are_refused(operated: ServerProcess, tmp_path: Path) -> None:
    file, at = tmp_path / "set.safetensors", ("--address", operated.address)
    with optserve.Client(operated.address) as client:
        client.create_parameter_set("bad", START, optim.Adam()).push(ONES)
        assert optserve_command("export", "bad", str(file), *at).returncode == 0
        assert (
            optserve_command("export", "bad", str(tmp_path / "p.safetensors"), "--parameters-only", *at).returncode == 0
        )
        data = file.read_bytes()
        with safetensors.safe_open(file, "np") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        (tmp_path / "flipped.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        (tmp_path / "cut.safetensors").write_bytes(data[:-1])
        (tmp_path / "text.safetensors").write_bytes(b"no such thing")
        save_file({"x": ONES["x"]}, tmp_path / "foreign.safetensors")
        save_file({"x": ONES["x"]}, tmp_path / "other.safetensors", metadata)
        save_file({**tensors, "parameters/x": np.ones(4, np.float32)}, tmp_path / "shape.safetensors", metadata)
        save_file(tensors, tmp_path / "json.safetensors", metadata | {"optserve": "{"})
        save_file(tensors, tmp_path / "empty.safetensors", metadata | {"optserve": "{}"})
        save_file(tensors, tmp_path / "list.safetensors", metadata | {"optserve": "[]"})
        (tmp_path / "directory").mkdir()
        for name, message in (
            ("flipped.safetensors", "the checksum of"),
            ("cut.safetensors", "expected a file that `optserve export` wrote"),
            ("text.safetensors", "expected a file that `optserve export` wrote"),
            ("json.safetensors", "expected a file that `optserve export` wrote"),
            ("empty.safetensors", "expected a file that `optserve export` wrote"),
            ("list.safetensors", "expected a file that `optserve export` wrote"),
            ("foreign.safetensors", "this file has tensors only"),
            ("p.safetensors", "this file has tensors only"),
            ("other.safetensors", "4 differ"),
            ("shape.safetensors", "expected 'parameters/x'"),
            ("missing.safetensors", "No such file"),
            ("directory", "expected a checkpoint's directory"),
        ):
            result = optserve_command("restore", str(tmp_path / name), "--id", "good", *at)
            assert (result.returncode, result.stderr.count("\n")) == (1, 1), (name, result.stderr)
            assert message in result.stderr, name
        assert "good" not in [each.id for each in client.list_parameter_sets()]
        taken = optserve_command("restore", str(file), *at)
        assert (taken.returncode, taken.stderr.startswith("optserve: parameter set 'bad' exists")) == (1, True)


def test_a_set_is_restored_from_one_checkpoint(operated: ServerProcess, sound: Path) -> None:
    path = max(home_of(sound).glob("checkpoint-*"))
    at = ("--address", operated.address)
    result = optserve_command("restore", str(path), "--id", "from/directory", "--journal", "off", *at)
    assert result.stdout == "from/directory: restored at version 4\n", result.stderr
    with optserve.Client(operated.address) as client, optserve.Client(":memory:") as undisturbed:
        twin = undisturbed.create_parameter_set("a", START, optim.Adam())
        for _ in range(4):
            twin.push(ONES)
        weights = client.parameter_set("from/directory")
        assert same(weights.state(), twin.state())
        assert weights.describe().spec.journal is optserve.Journal.OFF


def test_a_journal_is_refused_by_a_server_that_has_no_disk(tmp_path: Path, sound: Path) -> None:
    path = max(home_of(sound).glob("checkpoint-*"))
    with Server(Config(listen="127.0.0.1:0")) as server:
        refused = optserve_command("restore", str(path), "--address", server.address)
        assert (refused.returncode, "--data-dir" in refused.stderr) == (1, True)
        assert optserve_command("restore", str(path), "--journal", "off", "--address", server.address).returncode == 0


@pytest.mark.parametrize("command", ["verify", "restore", "export", "checkpoint"])
def test_people_on_a_terminal_see_how_many_bytes_are_done(
    operated: ServerProcess,
    sound: Path,
    tmp_path: Path,
    new_id: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    at, id = ("--address", operated.address), new_id()
    path = str(max(home_of(sound).glob("checkpoint-*")))
    large = {"x": np.zeros(1 << 20, np.float32)}
    with optserve.Client(operated.address) as client:
        client.create_parameter_set(id, large, optim.SGD())
    arguments, doing = {
        "verify": ((str(sound),), ("reading",)),
        "restore": ((path, "--id", f"{id}/restored", *at), ("reading", "sending")),
        "export": ((id, str(tmp_path / "set.safetensors"), *at), ("receiving", "writing")),
        "checkpoint": ((id, *at), ("writing",)),
    }[command]
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = optserve_command(command, *arguments)
    assert shown.returncode == 0
    for each in doing:
        assert re.search(rf"{each} .*\d+(\.\d)?/\d+(\.\d)?.* [kM]?B|{each}.*bytes", shown.stderr), shown.stderr


def test_operators_see_workers_and_change_the_policy(operated: ServerProcess) -> None:
    address = ("--address", operated.address)
    with optserve.Client(operated.address) as client:
        weights = client.create_parameter_set("watched", START, optim.SGD(), client_id="gpu-0")
        late = client.parameter_set("watched", client_id="gpu-1")
        late.pull()
        weights.push(ONES)
        late.push(ONES)
        listed = rows(optserve_command("workers", "watched", *address).stdout)
        assert [(row[0], row[3], row[4], row[5]) for row in listed] == [
            ("gpu-0", "1", "0", "working"),
            ("gpu-1", "1", "1", "working"),
        ]
        said = optserve_command("policy", "watched", "sync", "workers=2", "quorum=1", "deadline=2.5", *address)
        assert "after version 2" in said.stdout
        policy = optserve.Sync(workers=2, quorum=1, deadline=2.5)
        assert weights.describe().policy == policy
        described = optserve_command("describe", "watched", *address).stdout
        assert str(policy)[:40] in described
        assert rows(described)[-2:] == [["0", "1"], ["1", "1"]]
        for wrong in (("synchronous",), ("sync", "workers=2", "quorum=3"), ("sync", "worker=2")):
            refused = optserve_command("policy", "watched", *wrong, *address)
            assert refused.returncode != 0
            assert "expected" in refused.stderr
            assert "Traceback" not in refused.stderr
        assert weights.describe().policy == policy
