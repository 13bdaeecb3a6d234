"""Blocks that come from files at every use: read into a few pinned buffers ahead of it, in the order asked for.

    reads.ask(use, index, short)      # while there is room; threads begin to read
    memory = reads.take(wait=True)    # of the oldest asked for, when it is whole
    reads.copied(mark)                # its buffer may be read into again when the copy behind the mark has ended

Threads read pieces of the files (a read releases Python's lock) straight to where each tensor lies in its block's slab;
the files hold just the bytes that are used. It is a thread that waits until the last copy from a buffer has ended, not
the caller: that one waits only for bytes.

Host memory: the buffers. What the system keeps of the files in its cache it gives back when memory is short.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pinned import HostSlab, Layout
from .reader import Extent, ReadError, Ring, _File, _Piece, _pieces, _stamp


@dataclass
class _Run:
    """Neighbouring bytes of a file, and where in a slab they go."""

    piece: _Piece
    offsets: list[int]
    """Of each of the piece's parts, from the slab's start."""


@dataclass(eq=False)
class _Read:
    """A block that was asked for: the runs no thread has begun, and how many have not ended."""

    use: int
    short: bool
    buffer: int
    after: Any
    todo: deque[_Run]
    left: int
    error: Exception | None = None


def check_extents(layout: Layout, extents: Mapping[str, Extent], name: str) -> None:
    """Whether the bytes in files are those of a slab.

    Raises:
        ValueError: other tensors, shapes or types, or tensors whose strides are not those of a file.
    """
    if set(layout.places) != set(extents):
        wrong = ", ".join(sorted(set(layout.places) ^ set(extents)))
        raise ValueError(f"{name} and its files hold different tensors: {wrong}")
    for key, place in layout.places.items():
        stored = extents[key]
        if (place.shape, place.dtype) != (tuple(stored.shape), stored.dtype):
            raise ValueError(
                f"{name} has {key} as {place.dtype} {list(place.shape)}, "
                f"{stored.file} as {stored.dtype} {list(stored.shape)}"
            )
        if not torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous():
            raise ValueError(f"{name} has {key} with the strides {place.stride}; a file holds it row by row")


class BlockReads:
    """Reads of blocks, in the order asked for, into buffers that take turns.

    All methods are for one thread, the one that computes.

    Args:
        blocks: by index, a block's slab and where its tensors lie in files.
        ended: waits, on any thread, until the copy that ends with a mark has ended.
        buffers: how many blocks are read, or wait for their copy, at once; no more are made than there are blocks.
        ring: how many threads read, and pieces of what size.
        pin: whether copies go to a CUDA device.

    Raises:
        ValueError: files that hold other tensors than the block.
        ReadError: a file cannot be opened.
        PinError: the host memory cannot be pinned.
    """

    def __init__(
        self, blocks: Mapping[int, tuple[Layout, Mapping[str, Extent]]], ended: Callable[[Any], None], *,
        buffers: int, ring: Ring, pin: bool,
    ) -> None:  # fmt: skip
        self._ended = ended
        self.read_bytes = 0
        """What was read from files until now."""
        self.asked: deque[_Read] = deque()
        self._next = self._busy = self._running = 0
        """The buffer that is asked for next; how many runs are being read; how many threads there are."""
        self._stopped = False
        self._lock = threading.RLock()  # reentrant: a collection of garbage may call stop() on a thread that holds it
        self._work, self._news = threading.Condition(self._lock), threading.Condition(self._lock)
        self._slabs: list[HostSlab] = []
        self._threads: list[threading.Thread] = []
        self._held = contextlib.ExitStack()
        try:
            self._runs: dict[tuple[int, bool], list[_Run]] = {}
            for index, (layout, extents) in blocks.items():
                check_extents(layout, extents, f"block {index}")
                for short in (False, True):
                    names = [name for name in extents if not (short and name in layout.last)]
                    self._runs[index, short] = _in_runs(layout, [(name, extents[name]) for name in names], ring.size)
            files = {extent.file for _, extents in blocks.values() for extent in extents.values()}
            self._stamps = {file: _stamp(file) for file in files}
            self._files = {file: self._held.enter_context(_File(file)) for file in files}
            size = max(layout.nbytes for layout, _ in blocks.values())
            for _ in range(min(buffers, len(blocks))):
                self._slabs.append(HostSlab(Layout({}, size, size)))
                if pin:
                    self._slabs[-1].pin()
            self.host_bytes = size * len(self._slabs)
            self._bytes = [memoryview(slab.memory.numpy()) for slab in self._slabs]
            self._after: list[Any] = [None] * len(self._slabs)
            for _ in range(ring.threads):
                thread = threading.Thread(target=self._read_on, name="solostep block reads", daemon=True)
                thread.start()
                self._threads.append(thread)
                with self._lock:
                    self._running += 1
        except BaseException:
            self.close()
            raise

    @property
    def room(self) -> bool:
        """Whether there is a buffer for one more block."""
        return not self._stopped and len(self.asked) < len(self._slabs)

    def ask(self, use: int, index: int, short: bool) -> None:
        """Begins to read a block, without what is last if ``short``; there has to be room. ``use`` is a label."""
        runs = self._runs[index, short]
        with self._lock:
            self.asked.append(_Read(use, short, self._next, self._after[self._next], deque(runs), len(runs)))
            self._next = (self._next + 1) % len(self._slabs)
            self._work.notify_all()

    def take(self, wait: bool) -> Tensor | None:
        """The oldest block asked for, uint8 ``[at least its slab]``, in its buffer.

        None without ``wait`` if it is not whole; what went wrong is told to one who waits, and forgotten then.

        Raises:
            ReadError: a file cannot be read, ends early, or changed since the reads began.
        """
        with self._lock:
            read = self.asked[0]
            while wait and read.left and read.error is None:
                self._news.wait()
            if read.error is None:
                return None if read.left else self._slabs[read.buffer].memory
        if not wait:
            return None
        self.forget()
        raise read.error

    def copied(self, mark: Any) -> None:
        """The oldest block is on its way to the device; ``mark`` is the end of that copy."""
        with self._lock:
            self._after[self.asked.popleft().buffer] = mark

    def forget(self) -> None:
        """All that was asked for, and not copied, is not wanted any more. Waits for the pieces that are being read."""
        with self._lock:
            self.asked.clear()
            while self._busy:
                self._news.wait()

    def stop(self) -> None:
        """Lets the threads end when they have read the pieces they are at."""
        with self._lock:
            self._stopped = True
            self.asked.clear()
            self._work.notify_all()

    def close(self) -> None:
        """Ends the threads and gives the memory back. No copy from it may be under way."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._held.close()
        self._bytes = []
        for slab in self._slabs:
            slab.close()
        self._slabs = []

    def _read_on(self) -> None:
        """What a thread does."""
        while (task := self._begin()) is not None:
            read, run = task
            error: Exception | None = None
            try:
                if read.after is not None:
                    self._ended(read.after)
                self._fill(self._bytes[read.buffer], run)
            except Exception as raised:  # told to the one who takes the block
                error = raised
            with self._lock:
                self._busy -= 1
                read.left -= 1
                if error is None:
                    self.read_bytes += run.piece.length
                else:
                    read.error = read.error or error
                    read.todo.clear()
                if not self._busy or not read.left or error is not None:
                    self._news.notify_all()
        with self._lock:
            self._running -= 1
            if not self._running:  # also when nobody calls close()
                self._held.close()

    def _begin(self) -> tuple[_Read, _Run] | None:
        """The next run of the oldest block that has one left; None when no more are wanted."""
        with self._lock:
            while not self._stopped:
                for read in tuple(self.asked):  # stop() may clear it, see above
                    if read.todo:
                        self._busy += 1
                        return read, read.todo.popleft()
                self._work.wait()
        return None

    def _fill(self, memory: memoryview, run: _Run) -> None:
        piece = run.piece
        for part, offset in zip(piece.parts, run.offsets, strict=True):
            self._files[piece.file].read(memory[offset : offset + part.count], piece.offset + part.start)
        # After each piece: a look at the file costs microseconds, and a piece that came before a change is sound.
        if _stamp(piece.file) != self._stamps[piece.file]:
            raise ReadError(f"{piece.file} changed while blocks were read from it")


def _in_runs(layout: Layout, extents: Sequence[tuple[str, Extent]], size: int) -> list[_Run]:
    """Tensors of a block, cut into runs of at most ``size`` bytes in the order of the files."""
    ordered = sorted(extents, key=lambda item: (str(item[1].file), item[1].offset))
    places = [layout.places[name] for name, _ in ordered]
    return [
        _Run(piece, [places[part.index].offset + part.at for part in piece.parts])
        for piece in _pieces([extent for _, extent in ordered], size)
    ]
