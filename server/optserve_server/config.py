"""The server's configuration: one value, checked when it is built."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from optserve_server.storage.keeper import Retention

SHORTEST_LEASE = 0.2  # seconds; less is not told from a busy processor
LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How to run a server; raises ValueError for values that can't be meant.

    `listen` is `host:port`, `[ipv6]:port` or `unix:/path`; port 0 takes a free one. There is no authentication yet:
    listen beyond loopback only on a network that you trust. `data_dir` is where state is kept over restarts; None keeps
    it in memory only. Every `checkpoint_interval` seconds, and at the end, each set that has changed is written there;
    `checkpoints_kept` are kept of each, the older ones in case that the newest is damaged, or to go back to. `checkpoint_copy`
    is the part of a set's state that is copied so that steps go on meanwhile: less takes less memory, and lets one step wait.
    `checkpoint_store` is the URL of an object store, or of a directory elsewhere (s3://bucket/prefix, file:///..., whatever
    fsspec knows), to which checkpoints are copied in the background, and from which a server without its disk comes back.
    `rules` are Python files that define rules of your own. `threads` is how many run the update loops
    (None: one for each processor). `max_streams` bounds the workers connected at a time, each of which costs a thread;
    `max_bytes_in_flight` the gradients and initial values that are being received at a time, beyond which workers are told to
    try again. `max_shared_memory` bounds the bytes that workers on this host may hold for gradients in memory shared with the
    server, beyond which, and with 0, they send them. An upload that makes no progress for `upload_timeout` seconds is ended.
    `grace` is how many seconds pushes in flight get to finish on shutdown. A worker that is not heard of for `lease` seconds is
    no member of its sets any more, and others wait for it no longer; the SDK says three times in a lease that it is alive.

    With `follow`, the server is a standby of the one at that address: it has the same sets, and serves once it is promoted, by
    itself if `promote_after` seconds have passed without a word of that one. With `wait_for_standby`, a server acknowledges
    pushes to sets with a journal only once its standby has confirmed them, and none without one.
    """

    listen: str = "127.0.0.1:50051"
    data_dir: Path | None = None
    checkpoint_interval: float = 300.0
    checkpoints_kept: int = 2
    checkpoint_copy: float = 1.0
    checkpoint_store: str | None = None
    rules: tuple[Path, ...] = ()
    threads: int | None = None
    max_streams: int = 1024
    max_bytes_in_flight: int = 4 << 30
    max_shared_memory: int = 4 << 30
    upload_timeout: float = 30.0
    grace: float = 30.0
    lease: float = 10.0
    follow: str | None = None
    promote_after: float | None = None
    wait_for_standby: bool = False

    def __post_init__(self) -> None:
        if ":" not in self.listen:
            raise ValueError(f"expected listen as host:port, [ipv6]:port or unix:/path; got {self.listen!r}")
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", Path(os.fspath(self.data_dir)))
        if not self.checkpoint_interval > 0:
            raise ValueError(f"expected a checkpoint interval above 0 seconds; got {self.checkpoint_interval}")
        if self.checkpoints_kept < 2:
            raise ValueError(f"expected at least 2 checkpoints to be kept; got {self.checkpoints_kept}")
        if not 0 <= self.checkpoint_copy <= 1:
            raise ValueError(f"expected a part of the state from 0 to 1 to be copied; got {self.checkpoint_copy}")
        if self.checkpoint_store is not None and (self.data_dir is None or "://" not in self.checkpoint_store):
            raise ValueError(
                "expected a checkpoint store as a URL such as s3://bucket/prefix, and a data directory to copy from; "
                f"got {self.checkpoint_store!r} and {self.data_dir}"
            )
        if isinstance(self.rules, (str, os.PathLike)):
            raise ValueError(f"expected rules as a sequence of files; got {self.rules!r}")
        object.__setattr__(self, "rules", tuple(Path(os.fspath(path)) for path in self.rules))
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"expected at least one thread; got {self.threads}")
        if self.max_streams < 1:
            raise ValueError(f"expected room for at least one stream; got {self.max_streams}")
        if self.max_bytes_in_flight < 1:
            raise ValueError(f"expected room for at least one byte in flight; got {self.max_bytes_in_flight}")
        if self.max_shared_memory < 0:
            raise ValueError(f"expected room for at least 0 bytes of shared memory; got {self.max_shared_memory}")
        if self.upload_timeout <= 0:
            raise ValueError(f"expected an upload timeout above 0 seconds; got {self.upload_timeout}")
        if self.grace < 0:
            raise ValueError(f"expected a grace of at least 0 seconds; got {self.grace}")
        if not SHORTEST_LEASE <= self.lease < math.inf:
            raise ValueError(f"expected a lease of at least {SHORTEST_LEASE} seconds; got {self.lease}")
        self._check_standby()

    def _check_standby(self) -> None:
        if self.follow is not None and ":" not in self.follow:
            raise ValueError(f"expected the address of a primary to follow, as host:port; got {self.follow!r}")
        if self.promote_after is not None and self.follow is None:
            raise ValueError("expected the primary that this server follows, with the time after which it is promoted")
        if self.promote_after is not None and not SHORTEST_LEASE <= self.promote_after < math.inf:
            raise ValueError(f"expected promotion after at least {SHORTEST_LEASE} seconds; got {self.promote_after}")
        if self.follow is not None and self.checkpoint_store is not None:
            raise ValueError(
                "expected no checkpoint store for a standby: the primary copies its checkpoints there; give the store to this "
                "server when it is started as a primary"
            )
        if self.wait_for_standby and self.data_dir is None:
            raise ValueError(
                "expected a data directory for a server that waits for its standby, which gets what that has"
            )

    @property
    def retention(self) -> Retention:
        """How checkpoints are made and kept."""
        return Retention(self.checkpoints_kept, self.checkpoint_copy)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.listen.startswith(LOOPBACK)
