"""sha256 of files while they are read by something else."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .errors import CheckpointError

CHUNK = 8 << 20


class Digests:
    """sha256 of source files, in threads that follow the reader through the page cache. Use as a context.

    One core hashes 1.5 GB/s and a disk reads more, so a file may still be hashed while the next ones are converted.
    What was just read comes from memory; nothing but a short buffer is held.

    Args:
        known: hashes by key; new ones are put into it.
        save: called when there is a new one.
    """

    def __init__(self, known: dict[str, str], save: Callable[[], None]) -> None:
        self.known = known
        self.save = save
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="convert-sha256")
        self.running: list[tuple[Follower, Future[None]]] = []
        self.writing = threading.Lock()

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for _follower, future in self.running:
                    future.result()
        finally:
            for follower, _future in self.running:
                follower.stop()
            self.pool.shutdown(wait=True, cancel_futures=True)

    def follow(self, key: str, file: Path) -> Follower | None:
        """Begins to hash a file, unless its hash is known; its ``reached`` has to be told how far the reader is."""
        for _follower, future in self.running:
            if future.done():
                future.result()
        if key in self.known:
            return None
        follower = Follower(file)
        self.running.append((follower, self.pool.submit(self._keep, key, follower)))
        return follower

    def _keep(self, key: str, follower: Follower) -> None:
        value = follower.run()
        if value is not None:
            with self.writing:
                self.known[key] = value
                self.save()


class Follower:
    """Hashes a file up to where its reader is."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before = file.stat()
        self.limit = 0.0
        self.stopped = False
        self.changed = threading.Condition()

    def reached(self, offset: float) -> None:
        with self.changed:
            self.limit = offset
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _may_read(self, end: int) -> bool:
        """Waits for the reader; false if there is nothing more to do."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.limit >= end)
            return not self.stopped

    def run(self) -> str | None:
        """The hash of the whole file; None if it was stopped."""
        digest, buffer, done, before = hashlib.sha256(), bytearray(CHUNK), 0, self.before
        with self.file.open("rb", buffering=0) as stream:
            while done < before.st_size:
                if not self._may_read(min(done + CHUNK, before.st_size)):
                    return None
                count = stream.readinto(buffer)
                digest.update(memoryview(buffer)[:count])
                done += count
                if not count:
                    break
        after = self.file.stat()
        if (before.st_ino, done, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{self.file} changed while it was read; wait until it is written, and start again.")
        return digest.hexdigest()
