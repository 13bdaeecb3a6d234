"""All tensors of a module in one run of host memory, so that one copy brings them to a device.

A slab holds each tensor at an offset that suits any kernel, with its strides, whatever its type; what it is on the
device is rebuilt there by offset. Host memory for CUDA is registered (pinned): copies from it run at the speed of the
bus and beside computation. torch's own pinned allocator rounds sizes up to powers of two, 1 GiB for a block of 0.6 GB;
here a slab takes its bytes, in huge pages where the system has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Of each tensor within a slab, in bytes: what torch's own allocations are aligned to at least."""
HUGE_PAGE = 2 << 20
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name."""
TAKERS, TAKEN_AT_ONCE = 16, 64 << 20
"""Threads that take pages from the system, and how many bytes each does at a time."""


class PinError(MemoryError):
    """Host memory could not be had, or not pinned: the system or the container allows no more of it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a slab."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """From its first to its last byte, what lies between included."""
        if 0 in self.shape:
            return 0
        return (sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in a slab's memory, uint8 ``[nbytes]``."""
        part = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return part.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Layout:
    """Places of tensors by name; those that may be left out of a copy come last, from byte ``needed`` on."""

    places: Mapping[str, Place]
    needed: int
    nbytes: int
    last: frozenset[str] = frozenset()


def lay_out(tensors: Mapping[str, Tensor], last: Sequence[str] = ()) -> Layout:
    """A slab for tensors. Those whose name begins with one of ``last`` lie behind all others.

    Raises:
        ValueError: a tensor that is more than its bytes: a subclass, or one whose elements overlap.
    """
    behind = {name for name in tensors if any(name.startswith(prefix) for prefix in last)}
    places: dict[str, Place] = {}
    offset = needed = 0
    for name in [*(n for n in tensors if n not in behind), *(n for n in tensors if n in behind)]:
        tensor = tensors[name]
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise ValueError(f"{name} is a {type(tensor).__name__}, whose bytes alone do not make it; it cannot stream")
        if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} has elements that share memory; make it contiguous before it streams")
        places[name] = Place(offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        offset = -(-(offset + places[name].nbytes) // ALIGNMENT) * ALIGNMENT
        if name not in behind:
            needed = offset
    return Layout(places, needed, offset, frozenset(behind))


def host_memory(count: int) -> Tensor:
    """Bytes that are not yet taken from the system, in huge pages where it has them, aligned to one.

    Raises:
        PinError: the system gives no more, as where a process's memory is limited (ulimit -v).
    """
    if sys.platform != "linux":
        return torch.empty(count, dtype=torch.uint8)
    try:
        mapping = mmap.mmap(-1, count + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise PinError(f"{count:,} bytes of host memory could not be had ({error.strerror})") from None
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + count]


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    call: Callable[[int, int, int], int] = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[attr-defined]
    return call


def take_pages(memory: Tensor) -> None:
    """Has the system give all pages of host memory that are not there yet; what they hold stays.

    It clears each page first, which is most of what pinning new memory takes, and several threads do that beside one
    another. A driver does it with one: 5 GB/s on an H200's machine; 0.3 GB/s were seen on a virtual one, whose host had
    to find the memory first. Where the system has no such call, pinning takes the pages as before.
    """
    if sys.platform != "linux" or memory.numel() == 0:
        return
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
    # Whole pages: those at the ends may hold something beside it, which stays as well.
    begin, end = begin // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    starts = range(begin, end, TAKEN_AT_ONCE)

    def take(start: int) -> int:
        return _madvise()(start, min(TAKEN_AT_ONCE, end - start), POPULATE_WRITE)  # other threads run meanwhile

    with ThreadPoolExecutor(min(TAKERS, len(os.sched_getaffinity(0)), len(starts))) as pool:
        list(pool.map(take, starts))


class HostSlab:
    """Host memory for a layout. Pinned, if copies go to a CUDA device: once it is filled, or before."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.memory = host_memory(max(1, layout.nbytes))
        self.pinned = False

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values over, from whatever device."""
        for name, place in self.layout.places.items():
            place.view(self.memory).copy_(tensors[name])

    def views(self) -> dict[str, Tensor]:
        """Its tensors by name, in its memory: for a loader to fill."""
        return {name: place.view(self.memory) for name, place in self.layout.places.items()}

    def pin(self) -> None:
        """Registers the memory with CUDA. Pages that are not there yet are taken from the system before.

        What is filled from host memory is best pinned afterwards, while other blocks are read; what a device fills is
        pinned before, so that copies from it run at the speed of the bus.

        Raises:
            PinError: no more memory can be pinned.
        """
        if self.pinned:
            return
        take_pages(self.memory)
        portable = 1  # for every card, whichever this thread has in mind
        code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.memory.numel(), portable))
        if code != 0:
            forget_error()
            raise PinError(f"{self.memory.numel():,} bytes of host memory could not be pinned (CUDA error {code})")
        self.pinned = True
        # A slab that nobody closes does not leave its memory pinned: the mapping stays until it is given back.
        self._give_back = weakref.finalize(self, _unregister, self.memory, torch.cuda.current_device())
        self._give_back.atexit = False

    def close(self) -> None:
        """Gives the registration back; the memory goes with the slab."""
        if self.pinned:
            self._give_back()
            self.pinned = False


def forget_error() -> None:
    """What the driver refused stays behind until a call reports it, and would be taken for that call's own."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").item()


def _unregister(memory: Tensor, card: int) -> None:
    with torch.cuda.device(card):  # whatever the thread has in mind may be a card that nobody uses
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
