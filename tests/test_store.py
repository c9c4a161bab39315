"""Checkpoints in an object store: what is copied, when, and what a server comes back from that has lost its disk."""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import optserve
from equality import same
from optserve import optim
from optserve_server import Config, Server
from optserve_server.storage import checkpoint
from optserve_server.storage.verify import verify
from processes import ServerProcess, optserve_command, running

ONES = {"x": np.ones(3, np.float32)}
START = {"x": np.zeros(3, np.float32)}
FILES = ["exp_avg.safetensors", "exp_avg_sq.safetensors", "parameters.safetensors"]

Hook = Callable[[str, str], None]  # called with an operation and a path before it happens


class WatchedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory, of which a test says what happens before each operation: `watched://...`."""

    protocol = "watched"
    store: ClassVar[dict[str, MemoryFile]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    hook: ClassVar[Hook]
    operations: ClassVar[list[tuple[str, str]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("watched://", "memory://")))

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.let()

    @classmethod
    def let(cls, hook: Hook = lambda operation, path: None) -> None:
        """From now on, call this."""
        cls.operations.clear()
        cls.hook = staticmethod(hook)

    def note(self, operation: str, path: str) -> None:
        name = "/".join(path.rsplit("/", 2)[-2:])
        self.operations.append((operation, name))
        type(self).hook(operation, name)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self.note("write" if "w" in mode else "read", path)
        return super().open(path, mode, **options)

    def cat_file(self, path: str, **options: Any) -> bytes:
        return bytes(super().cat_file(path, **options))  # opens it

    def rm_file(self, path: str) -> None:
        self.note("remove", path)
        super().rm_file(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.note("list", path)
        return super().ls(path, detail=detail, **options)


fsspec.register_implementation("watched", WatchedFileSystem, clobber=True)
URL = "watched://bucket/prefix"


@pytest.fixture(autouse=True)
def watched() -> Iterator[type[WatchedFileSystem]]:
    """An empty store."""
    WatchedFileSystem.reset()
    yield WatchedFileSystem
    WatchedFileSystem.reset()


def serving(directory: Path, url: str = URL, **options: Any) -> Server:
    return Server(Config(listen="127.0.0.1:0", data_dir=directory, checkpoint_store=url, **options))


def copies() -> list[str]:
    """The names of the directories in the store, in order."""
    return sorted({path.split("/")[-2] for path in WatchedFileSystem.store if "/checkpoint-" in path})


def events() -> list[int]:
    """After which events there are copies."""
    return [int(name.split("-")[1]) for name in copies()]


def path_in_store(name: str, place: int = -1) -> str:
    """The path of a file in one of the copies, the newest by default."""
    (path,) = [path for path in WatchedFileSystem.store if path.endswith(f"{copies()[place]}/{name}")]
    return path


def change(path: str, changed: Callable[[bytes], bytes]) -> None:
    """Let a file in the store have other content."""
    data = WatchedFileSystem.store[path].getvalue()
    del WatchedFileSystem.store[path]
    with MemoryFileSystem.open(WatchedFileSystem(), path, "wb") as file:
        file.write(changed(data))


def train(server: Server, updates: int, id: str = "a") -> None:
    """Push so often, with a checkpoint at the beginning and after each update."""
    with optserve.Client(server.address) as client:
        weights = client.create_parameter_set(id, START, optim.Adam(), exist_ok=True, journal="always")
        for _ in range(updates):
            weights.push(ONES)
            weights.checkpoint()


def version(server: Server, id: str = "a") -> int:
    with optserve.Client(server.address) as client:
        return client.parameter_set(id).describe().version


def trained(updates: int) -> optserve.State:
    """What a set is after so many pushes, with nothing else in between."""
    with optserve.Client(":memory:") as client:
        weights = client.create_parameter_set("a", START, optim.Adam())
        for _ in range(updates):
            weights.push(ONES)
        return weights.state()


def test_a_server_without_its_disk_comes_back_from_the_store(tmp_path: Path) -> None:
    """Real processes, a directory as the store; the worker that pushed goes on with the same handle."""
    store = ("--checkpoint-store", f"file://{tmp_path}/store")
    log = tmp_path / "log"
    first = ServerProcess("--listen", "127.0.0.1:0", "--data-dir", f"{tmp_path}/one", *store, log=log)
    with optserve.Client(first.address) as client:
        weights = client.create_parameter_set("a/b", START, optim.Adam(), journal="always")
        for _ in range(3):
            weights.push(ONES)
        assert first.stop() == 0
        shutil.rmtree(tmp_path / "one")
        with running("--listen", first.address, "--data-dir", f"{tmp_path}/two", *store, log=log):
            assert weights.push(ONES).sequence == 4
            assert same(weights.state(), trained(4))
            assert [each.damage for each in verify(tmp_path / "two")] == [None]


@pytest.mark.parametrize("url", ["memory://bucket/prefix", "local://{}/store", "file://{}/store/"])
def test_a_store_is_whatever_the_library_knows(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path)
    for turn in range(3):
        with serving(tmp_path / str(turn), url) as server:
            train(server, 2)
            assert version(server) == 2 * turn + 2
    files, root = fsspec.core.url_to_fs(url)
    (home,) = files.ls(f"{root}/sets", detail=False)
    assert len(files.ls(home)) == 2
    files.rm(root, recursive=True)


def test_the_manifest_is_the_last_that_is_written_and_the_first_that_is_removed(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        train(server, 1)
        uploaded(server)
        oldest, _ = copies()
        WatchedFileSystem.let()
        train(server, 1)
    done = WatchedFileSystem.operations
    written = [name for operation, name in done if operation == "write"]
    removed = [name for operation, name in done if operation == "remove"]
    assert sorted(name.split("/")[1] for name in written) == [*FILES[:2], "manifest.json", FILES[2]]
    assert written[-1].endswith("/manifest.json")
    assert removed[0] == f"{oldest}/manifest.json"
    assert {name.split("/")[0] for name in removed} == {oldest}
    assert done.index(("remove", removed[0])) > done.index(("write", written[-1]))
    assert oldest not in copies()


def test_so_many_copies_are_kept_as_checkpoints(tmp_path: Path) -> None:
    with serving(tmp_path, checkpoints_kept=3) as server:
        for _ in range(6):
            train(server, 1)
            uploaded(server)
    assert events() == [4, 5, 6]


def uploaded(server: Server) -> None:
    """Wait until everything that was offered is in the store."""
    assert server._storage is not None
    assert server._storage._uploads is not None
    server._storage._uploads.wait()


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        train(server, 1)
    WatchedFileSystem.let()
    with serving(tmp_path):
        pass
    assert [name for operation, name in WatchedFileSystem.operations if operation == "write"] == ["prefix/OWNER"]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "never finished": ("manifest.json", None),
    "a manifest with another bit": ("manifest.json", lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]),
    "a manifest that was cut": ("manifest.json", lambda data: data[:-70]),
    "a file with another bit": ("exp_avg.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "a file that was cut": ("exp_avg.safetensors", lambda data: data[:-1]),
    "a file that is missing": ("parameters.safetensors", None),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_copy_that_is_not_whole_is_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    with serving(tmp_path / "one") as server:
        train(server, 1)
        uploaded(server)
        train(server, 1)
    assert events() == [1, 2]
    path = path_in_store(name)
    if damage is None:
        del WatchedFileSystem.store[path]
    else:
        change(path, damage)
    capfd.readouterr()
    with serving(tmp_path / "two") as server:
        assert "copy of a checkpoint is passed over" in "".join(capfd.readouterr())
        with optserve.Client(server.address) as client:
            assert same(client.parameter_set("a").state(), trained(1))
        assert [each.damage for each in verify(tmp_path / "two")] == [None]
        train(server, 2)
    assert len(copies()) == 2


def test_a_set_whose_copies_are_all_damaged_is_not_here_and_its_id_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server:
        train(server, 1, id="a")
        train(server, 1, id="b")
    manifests = [path for path in WatchedFileSystem.store if path.endswith("manifest.json")]
    victims = [path for path in manifests if b'"id": "a"' in WatchedFileSystem.store[path].getvalue()]
    assert len(victims) == 2
    for path in victims:
        change(path, lambda data: data[10:])
    with serving(tmp_path / "two") as server, optserve.Client(server.address) as client:
        assert [each.id for each in client.list_parameter_sets()] == ["b"]
        with pytest.raises(optserve.ParameterSetExists, match="no copy of it in watched://bucket/prefix is whole"):
            client.create_parameter_set("a", START, optim.Adam())


def test_what_the_disk_has_only_older_events_of_is_fetched(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server:
        train(server, 2)
    shutil.copytree(tmp_path / "one", tmp_path / "old")
    with serving(tmp_path / "one") as server:
        train(server, 3)
    with serving(tmp_path / "old") as server, optserve.Client(server.address) as client:
        weights = client.parameter_set("a")
        assert same(weights.state(), trained(5))
        weights.push(ONES)
        (found,) = verify(tmp_path / "old")
        assert (found.event, found.events, found.damage) == (5, 1, None)


def test_a_history_that_went_back_is_the_one_that_comes_back(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server, optserve.Client(server.address) as client:
        train(server, 3)
        shutil.copytree(tmp_path / "one", tmp_path / "old")
        client.parameter_set("a").rewind(2)
    for disk in ("lost", "old"):
        with serving(tmp_path / disk) as server, optserve.Client(server.address) as client:
            assert same(client.parameter_set("a").state(), trained(2))


def test_what_the_disk_has_newer_events_of_is_left_alone(tmp_path: Path) -> None:
    """The journal has them; the checkpoint in the store is newer than the one on the disk."""
    with serving(tmp_path / "one") as server, optserve.Client(server.address) as client:
        weights = client.create_parameter_set("a", START, optim.Adam(), journal="always")
        for _ in range(4):
            weights.push(ONES)
        shutil.copytree(tmp_path / "one", tmp_path / "journaled")
        weights.checkpoint()
        uploaded(server)
    assert events() == [0, 4]
    assert [
        checkpoint.event_of(path) for path in checkpoint.present(next((tmp_path / "journaled" / "sets").iterdir()))
    ] == [0]
    WatchedFileSystem.let()
    with serving(tmp_path / "journaled") as server:
        assert not any(
            name.endswith(tuple(FILES)) for operation, name in WatchedFileSystem.operations if operation == "read"
        )
        assert version(server) == 4


def test_a_disk_of_which_every_checkpoint_is_damaged_is_repaired_from_the_store(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        train(server, 2)
        with optserve.Client(server.address) as client:
            client.parameter_set("a").push(ONES)
            shutil.copytree(tmp_path, tmp_path / "crashed", ignore=shutil.ignore_patterns("crashed"))
            uploaded(server)
    (home,) = (tmp_path / "crashed" / "sets").iterdir()
    for path in checkpoint.present(home):
        (path / "parameters.safetensors").write_bytes(b"damaged")
    with serving(tmp_path / "crashed") as server, optserve.Client(server.address) as client:
        assert same(client.parameter_set("a").state(), trained(3))


def test_steps_and_local_checkpoints_go_on_while_the_store_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def unreachable(operation: str, path: str) -> None:
        raise ConnectionError("no route to host")

    with serving(tmp_path / "one") as server:
        WatchedFileSystem.let(unreachable)
        train(server, 3)
        uploaded(server)
        assert copies() == []
        assert "no route to host" in "".join(capfd.readouterr())
        WatchedFileSystem.let()
        train(server, 1)
    assert events() == [4]
    with serving(tmp_path / "two") as server:
        assert version(server) == 4


def test_a_store_that_fails_at_any_moment_has_a_whole_copy(tmp_path: Path) -> None:
    """Each operation fails in turn, and every one after it; a server without its disk comes back from what is there."""
    with serving(tmp_path / "first") as server:
        train(server, 2)
    before = {path: file.getvalue() for path, file in WatchedFileSystem.store.items()}
    shutil.copytree(tmp_path / "first", tmp_path / "disk")
    versions = []
    for moment in itertools.count():
        WatchedFileSystem.reset()
        for path, data in before.items():
            with MemoryFileSystem.open(WatchedFileSystem(), path, "wb") as file:
                file.write(data)
        shutil.rmtree(tmp_path / "disk")
        shutil.copytree(tmp_path / "first", tmp_path / "disk")
        left = itertools.count(moment, -1)
        failed = False

        def fail(operation: str, path: str, left: Iterator[int] = left) -> None:
            nonlocal failed
            if next(left) <= 0:
                failed = True
                raise OSError("failed")

        with serving(tmp_path / "disk") as server:
            uploaded(server)
            WatchedFileSystem.let(fail)
            train(server, 1)
        WatchedFileSystem.let()
        with serving(tmp_path / f"lost-{moment}") as server:
            versions.append(version(server))
        if not failed:
            break
    assert versions == sorted(versions)
    assert (versions[0], versions[-1]) == (2, 3)
    assert len(versions) > 8


def test_a_file_of_another_size_than_was_written_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MemoryFile.write

    def lossy(file: Any, data: bytes) -> int:
        return write(file, data[:-1] if len(data) > 4096 else data)

    with serving(tmp_path / "one") as server:
        with monkeypatch.context() as patched:
            patched.setattr(MemoryFile, "write", lossy, raising=False)
            train(server, 1)
            uploaded(server)
        assert not any(path.endswith("manifest.json") for path in WatchedFileSystem.store)
        train(server, 1)
    assert events() == [2]


def test_a_store_that_falls_behind_gets_the_newest_only_whatever_the_disk_has_removed(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(operation: str, path: str) -> None:
        if operation == "write":
            begun.set()
            go_on.wait()

    with serving(tmp_path) as server:
        WatchedFileSystem.let(hold)
        train(server, 1)
        begun.wait()
        train(server, 6)
        (home,) = (tmp_path / "sets").iterdir()
        assert [checkpoint.event_of(path) for path in checkpoint.present(home)] == [7, 6]
        go_on.set()
    assert events() == [0, 7]
    for name in (*FILES, "manifest.json"):
        assert WatchedFileSystem.store[path_in_store(name, 0)].size > 0


def test_a_deleted_set_is_removed_from_the_store(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server, optserve.Client(server.address) as client:
        train(server, 1, id="a")
        train(server, 1, id="b")
        uploaded(server)
        client.parameter_set("a").delete()
    assert len({path.split("/")[4] for path in WatchedFileSystem.store if "/sets/" in path}) == 1
    with serving(tmp_path / "two") as server, optserve.Client(server.address) as client:
        assert [each.id for each in client.list_parameter_sets()] == ["b"]


def test_a_set_deleted_while_the_store_can_not_be_reached_does_not_come_back(tmp_path: Path) -> None:
    def unreachable(operation: str, path: str) -> None:
        raise ConnectionError("no route to host")

    with serving(tmp_path) as server, optserve.Client(server.address) as client:
        train(server, 1)
        uploaded(server)
        WatchedFileSystem.let(unreachable)
        client.parameter_set("a").delete()
    assert events() == [0, 1]
    WatchedFileSystem.let()
    with serving(tmp_path) as server, optserve.Client(server.address) as client:
        assert client.list_parameter_sets() == []
        assert copies() == []
        train(server, 2)
    assert events()[-1] == 2
    with serving(tmp_path / "lost") as server:
        assert version(server) == 2


def test_a_set_that_is_created_again_is_another(tmp_path: Path) -> None:
    with serving(tmp_path / "one") as server, optserve.Client(server.address) as client:
        train(server, 5)
        uploaded(server)
        client.parameter_set("a").delete()
        train(server, 2)
    with serving(tmp_path / "two") as server:
        assert version(server) == 2


def test_a_server_whose_store_another_uses_writes_nothing_there_any_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path / "one") as first:
        train(first, 1)
        uploaded(first)
        with serving(tmp_path / "two") as second:
            train(second, 1)
            uploaded(second)
            present = copies()
            capfd.readouterr()
            train(first, 3)
            with optserve.Client(first.address) as client:
                client.parameter_set("a").delete()
            uploaded(first)
            assert copies() == present
            assert "another server has begun to use the checkpoint store" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///dev/null/store", "checkpoint store file:///dev/null/store: "),
        ("nothing://user:secret@bucket", "checkpoint store nothing://bucket: ValueError: Protocol not known"),
        ("bucket", "expected a checkpoint store as a URL"),
    ],
)
def test_a_store_that_can_not_be_reached_at_the_start_is_one_line(tmp_path: Path, url: str, message: str) -> None:
    result = optserve_command(
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        str(tmp_path),
        "--checkpoint-store",
        url,
        "--log-level",
        "error",
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("optserve: ")
    assert message in result.stderr
    assert "secret" not in result.stderr


def test_a_store_needs_a_data_directory() -> None:
    with pytest.raises(ValueError, match="and a data directory to copy from"):
        Config(checkpoint_store=URL)
