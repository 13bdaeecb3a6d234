"""Runs of bytes in files -> tensors on a device, as fast as the disk or the bus allows.

Threads read pieces of the files (a read releases Python's lock) while earlier pieces are on their way:

- CUDA: into a small ring of pinned buffers, each copied to its tensors on the device without waiting; a buffer is read
  into again when the event behind its copies has passed. Host memory: the ring, given back at the end. Device memory:
  the tensors.
- CPU: straight into the tensors' own memory. No page of the file stays mapped.

What a piece costs in Python, about 0.1 ms, is what limits small ones: all threads take turns at it.

Every tensor has an allocation of its own, so that it is aligned for any kernel and can be freed alone. Tensors come out
in the order asked for; while one is used, at most the ring's size of later ones is read ahead.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from .pinned import HUGE_PAGE, host_memory


class ReadError(Exception):
    """A file that ended early or changed while it was read. The message names it."""


@dataclass(frozen=True)
class Extent:
    """A tensor in a file: its first byte, shape and type. Little-endian, as safetensors stores it."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Ring:
    """How much is read at once: ``threads`` threads, ``buffers`` pieces in flight of ``size`` bytes at most."""

    threads: int
    buffers: int
    size: int


def default_ring(device: torch.device) -> Ring:
    """What :func:`read_tensors` takes where nothing is said.

    On an H200 with 16 cores 8 threads and 10 buffers of 8 MiB were the fastest of eight settings from page cache, the
    pinning counted: 46 GB/s, 0.84 of the bus. From disk all were alike.
    """
    cores = os.cpu_count() or 1
    if device.type == "cuda":
        return Ring(threads=min(8, cores), buffers=10, size=8 << 20)
    return Ring(threads=min(4, cores), buffers=8, size=4 << 20)


@dataclass
class _Part:
    """Bytes of one tensor within a piece: ``count`` bytes from ``start`` in the piece go to ``at`` in the tensor."""

    index: int
    at: int
    start: int
    count: int


@dataclass
class _Piece:
    """Neighbouring bytes of a file that are read at once."""

    file: Path
    offset: int
    length: int = 0
    parts: list[_Part] = field(default_factory=list)


def _pieces(extents: Sequence[Extent], size: int) -> Iterator[_Piece]:
    """Cuts the extents, in order, into pieces of at most ``size`` bytes; neighbours in a file share one."""
    piece: _Piece | None = None
    for index, extent in enumerate(extents):
        at = 0
        while True:
            place = extent.offset + at
            if (
                piece is None
                or piece.length == size
                or (piece.file, piece.offset + piece.length) != (extent.file, place)
            ):
                if piece is not None:
                    yield piece
                piece = _Piece(extent.file, place)
            count = min(extent.nbytes - at, size - piece.length)
            piece.parts.append(_Part(index, at, piece.length, count))
            piece.length += count
            at += count
            if at == extent.nbytes:
                break
    if piece is not None:
        yield piece


def read_tensors(extents: Sequence[Extent], device: torch.device | str, ring: Ring | None = None) -> Iterator[Tensor]:
    """Tensors on ``device``, one for each extent and in their order; fastest where that is the order in the files.

    On CUDA the copies are on the current stream: what is launched on it after a tensor came out sees its values. A
    caller that drops a tensor before it asks for the next one holds one at a time.

    Raises:
        ReadError: a file cannot be read, ends early, or changed since the reading began.
    """
    device = torch.device(device)
    ring = ring or default_ring(device)
    pieces = list(_pieces(extents, ring.size))
    begun = {extent.file: _stamp(extent.file) for extent in extents}
    with contextlib.ExitStack() as held:
        files = {file: held.enter_context(_File(file)) for file in begun}
        mover = _ToCuda(extents, device, ring, len(pieces)) if device.type == "cuda" else _ToHost(extents)
        held.callback(mover.close)
        threads = held.enter_context(_Threads(ring, len(pieces)))
        threads.begin([_filling(mover, n, pieces[n], files) for n in range(min(ring.buffers, len(pieces)))])
        for n, piece in enumerate(pieces):
            threads.wait(n)
            mover.deliver(n, piece)
            if n + ring.buffers < len(pieces):  # before the caller works on what comes out
                threads.begin([_filling(mover, n + ring.buffers, pieces[n + ring.buffers], files)])
            for part in piece.parts:
                if part.at + part.count == extents[part.index].nbytes:
                    yield mover.tensors.pop(part.index)
    for file, stamp in begun.items():
        if _stamp(file) != stamp:
            raise ReadError(f"{file} changed while it was read")


def _filling(mover: _ToHost | _ToCuda, n: int, piece: _Piece, files: dict[Path, _File]) -> Callable[[], None]:
    fill, file = mover.target(n, piece), files[piece.file]
    return lambda: fill(file)


class _Threads:
    """Runs fillings in the order in which they are begun; the n-th one can be waited for, with what it raised."""

    def __init__(self, ring: Ring, count: int) -> None:
        self.tasks: SimpleQueue[tuple[int, Callable[[], None]] | None] = SimpleQueue()
        # As many are under way at most, so that each place holds one result.
        self.ended: list[SimpleQueue[Exception | None]] = [SimpleQueue() for _ in range(ring.buffers)]
        self.begun = 0
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(ring.threads, count))]

    def __enter__(self) -> _Threads:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Empty):
            while True:
                self.tasks.get_nowait()
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()

    def begin(self, fillings: Sequence[Callable[[], None]]) -> None:
        for filling in fillings:
            self.tasks.put((self.begun, filling))
            self.begun += 1

    def wait(self, n: int) -> None:
        error = self.ended[n % len(self.ended)].get()
        if error is not None:
            raise error

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            n, filling = task
            error: Exception | None = None
            try:
                filling()
            except Exception as raised:  # told to the one who waits
                error = raised
            self.ended[n % len(self.ended)].put(error)


class _ToHost:
    """Pieces go straight into the tensors. Memory that is not yet read into is not yet taken from the system."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self.extents = extents
        self.tensors: dict[int, Tensor] = {}

    def target(self, n: int, piece: _Piece) -> Callable[[_File], None]:
        views = []
        for part in piece.parts:
            if part.index not in self.tensors:
                extent = self.extents[part.index]
                self.tensors[part.index] = torch.empty(extent.shape, dtype=extent.dtype)
            memory = memoryview(_bytes(self.tensors[part.index]).numpy())
            views.append((memory[part.at : part.at + part.count], piece.offset + part.start))

        def fill(file: _File) -> None:
            for view, offset in views:
                file.read(view, offset)

        return fill

    def deliver(self, n: int, piece: _Piece) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is held."""


class _ToCuda:
    """Pieces go through the ring's buffers, in turn; a tensor is made when its first bytes are there."""

    def __init__(self, extents: Sequence[Extent], device: torch.device, ring: Ring, pieces: int) -> None:
        self.extents, self.device = extents, device
        self.stream = torch.cuda.current_stream(device)
        count = min(ring.buffers, pieces)
        size = -(-min(ring.size, sum(extent.nbytes for extent in extents)) // HUGE_PAGE) * HUGE_PAGE
        memory = host_memory(count * size)
        self.slots = [_Slot(memory[i * size : (i + 1) * size]) for i in range(count)]
        self.tensors: dict[int, Tensor] = {}

    def target(self, n: int, piece: _Piece) -> Callable[[_File], None]:
        slot = self.slots[n % len(self.slots)]

        def fill(file: _File) -> None:
            with torch.cuda.device(self.device):  # a thread begins at card 0, and would make a context there
                slot.fill(file, piece)

        return fill

    def deliver(self, n: int, piece: _Piece) -> None:
        slot = self.slots[n % len(self.slots)]
        for part in piece.parts:
            if part.index not in self.tensors:
                extent = self.extents[part.index]
                self.tensors[part.index] = torch.empty(extent.shape, dtype=extent.dtype, device=self.device)
            target = _bytes(self.tensors[part.index])[part.at : part.at + part.count]
            target.copy_(slot.buffer[part.start : part.start + part.count], non_blocking=True)
        slot.copied.record(self.stream)

    def close(self) -> None:
        self.stream.synchronize()  # also copies that were begun when something failed
        with torch.cuda.device(self.device):
            for slot in self.slots:
                slot.close()


class _Slot:
    """A buffer of the ring. It is pinned after its first filling, when its pages are there, and beside other reads;
    where no more can be pinned, copies from it take longer and bring the same.

    Pinning what an allocator gives takes 0.35 s a GB, as much as reading ten: page by page. Huge pages are 512 times
    fewer.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.memory = memoryview(buffer.numpy())
        self.copied = torch.cuda.Event(blocking=True)
        self.tried = self.pinned = False

    def fill(self, file: _File, piece: _Piece) -> None:
        self.copied.synchronize()  # at once, if nothing was copied yet
        file.read(self.memory[: piece.length], piece.offset)
        if not self.tried:
            self.tried = True
            portable = 1  # for every card, whichever this thread has in mind
            code = torch.cuda.cudart().cudaHostRegister(self.buffer.data_ptr(), self.buffer.numel(), portable)
            self.pinned = int(code) == 0

    def close(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.buffer.data_ptr())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file does: which file it is, its size, and when it was written."""
    try:
        found = file.stat()
    except OSError as error:
        raise ReadError(f"{file} cannot be read ({error.strerror})") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


class _File:
    """An open file that threads read at any place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()

    def __enter__(self) -> _File:
        try:
            self.handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ReadError(f"{self.path} cannot be read ({error.strerror})") from None
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.handle)

    def read(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` with the bytes from ``offset`` on."""
        while len(view):
            try:
                count = self._read(view, offset)
            except OSError as error:
                raise ReadError(f"{self.path} cannot be read ({error.strerror})") from None
            if not count:
                raise ReadError(f"{self.path} ends early, at byte {offset:,}")
            view, offset = view[count:], offset + count

    def _read(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.handle, [view], offset)
        with self.lock:  # Windows: one position for all
            os.lseek(self.handle, offset, os.SEEK_SET)
            data = os.read(self.handle, len(view))
        view[: len(data)] = data
        return len(data)
