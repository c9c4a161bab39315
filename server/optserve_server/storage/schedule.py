"""The schedule: threads that write checkpoints when they are due, and sync journals that may wait a little."""

import threading
import time
from collections.abc import Callable

import structlog

from optserve._errors import OptserveError
from optserve_server.storage.directory import DataDirectory
from optserve_server.storage.journal import WINDOW

log = structlog.get_logger()


class Schedule:
    """Keeps a data directory up to date: every set is written `interval` seconds after its last checkpoint if it has changed,
    a new one at once. `failed` is called once if a set acknowledges nothing any more, so that the server is restarted."""

    def __init__(self, directory: DataDirectory, interval: float, failed: Callable[[], None]) -> None:
        self._directory = directory
        self._interval = interval
        self._failed = failed
        self._ended = threading.Event()
        self._wanted = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, name="optserve-checkpoints", daemon=True),
            threading.Thread(target=self._sync, name="optserve-journals", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There is a new set."""
        self._wanted.set()

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._ended.set()
        self._wanted.set()
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        while not self._ended.is_set():
            self._wanted.wait(min(1.0, self._interval))
            self._wanted.clear()
            for keeper in self._directory.keepers:
                due = not keeper.written_at or time.monotonic() - keeper.written_at >= self._interval
                if due and keeper.is_behind and not self._ended.is_set():
                    set_id = keeper.parameter_set.spec.id
                    try:
                        self._directory.checkpoint(set_id)
                    except Exception as error:  # deleted since, for one; the next time will tell
                        unexpected = None if isinstance(error, OptserveError) else error
                        log.error("no checkpoint", parameter_set=set_id, reason=str(error), exc_info=unexpected)
                        keeper.written_at = time.monotonic()

    def _sync(self) -> None:
        failed = False
        while not self._ended.wait(WINDOW / 8):
            for keeper in self._directory.keepers:
                try:
                    keeper.sync_if_due()
                except OptserveError:  # the log has it, and who pushes will hear it
                    continue
                except Exception as error:
                    log.error("journal not synced", home=str(keeper.home), exc_info=error)
            if not failed and any(keeper.failure for keeper in self._directory.keepers):
                failed = True
                self._failed()
