"""Blocks read from files at every use: their bytes, whatever the system does and when; errors are told; ends."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import solostep.offload.streamer as streamer
from solostep.engine.headers import read_header, torch_type
from solostep.offload.disk import BlockReads, _in_runs
from solostep.offload.pinned import lay_out
from solostep.offload.reader import Extent, ReadError, Ring
from solostep.offload.streamer import BlockStreamer

COUNT = 6
THREADS = "solostep block reads"


class Mixed(nn.Module):
    """Parameters of many types, with sizes that no alignment divides; empty ones and scalars among them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)

        def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=made).to(torch.uint8)
            return nn.Parameter(raw.view(dtype)[..., 0].contiguous(), requires_grad=False)

        self.eight = parameter((33 + seed, 65), torch.int8)
        self.scale = parameter((33 + seed,), torch.float32)
        self.e4m3 = parameter((17, 31), torch.float8_e4m3fn)
        self.empty = parameter((0, 3), torch.float16)
        self.late = nn.Module()
        self.late.weight = parameter((48, 64), torch.bfloat16)
        self.late.scalar = parameter((), torch.float32)
        self.aligned = parameter((4, 256), torch.bfloat16)


def raw(parameter: torch.Tensor) -> bytes:
    return bytes(parameter.detach().reshape(-1).view(torch.uint8).numpy())


class Stored:
    """Blocks, and the same in two files."""

    def __init__(self, folder: Path) -> None:
        self.blocks = [Mixed(i) for i in range(COUNT)]
        self.known = [{n: raw(p) for n, p in block.named_parameters()} for block in self.blocks]
        self.files: dict[int, dict[str, Extent]] = {i: {} for i in range(COUNT)}
        for half in (0, 1):
            some = [i for i in range(COUNT) if i % 2 == half]
            file = folder / f"{half}.safetensors"
            save_file({f"{i}.{n}": p.detach() for i in some for n, p in self.blocks[i].named_parameters()}, file)
            for info in read_header(file).values():
                index, name = info.stored_name.split(".", 1)
                self.files[int(index)][name] = Extent(file, info.offset, info.shape, torch_type(info.dtype))

    def streamer(self, disk: Any = range(COUNT), **settings: Any) -> BlockStreamer:
        files = {i: self.files[i] for i in disk}
        return BlockStreamer(self.blocks, "cpu", files=files, last=["late"], **settings)

    def check(self, index: int, block: nn.Module, left_out: bool = False) -> None:
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                assert left_out and name.startswith("late"), name
            else:
                assert raw(parameter) == self.known[index][name], (index, name)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stored]:
    monkeypatch.setattr(streamer, "default_ring", lambda device: Ring(3, 1, 1000))
    yield Stored(tmp_path)
    gc.collect()
    until = time.monotonic() + 20
    while readers() and time.monotonic() < until:  # those of a streamer that was not closed end by themselves
        time.sleep(0.01)
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREADS]


def within(seconds: float, work: Callable[[], None]) -> None:
    """Fails if ``work`` hangs."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("ring", [Ring(1, 1, 1 << 20), Ring(4, 1, 77), Ring(2, 1, 4096)], ids=str)
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("staging", [1, 2, 3, 9])
def test_all_bytes_of_all_types(
    stored: Stored, ring: Ring, slots: int, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamer, "default_ring", lambda device: ring)

    def work() -> None:
        for streamed, disk in (([2], [2]), ([1, 4], [4]), ([0, 2, 3, 5], [0, 5]), (range(COUNT), range(COUNT))):
            blocks = stored.streamer(disk, streamed=streamed, slots=slots, staging=staging)
            for step in range(4):
                for index, block in enumerate(blocks):
                    stored.check(index, block, left_out=step > 0)
                blocks.short = True
            blocks.close()
            for index in disk:  # for the next round
                assert all(p.is_meta for p in stored.blocks[index].parameters())
                stored.blocks[index] = Mixed(index)

    within(60, work)


def test_reads_that_are_slow_and_short(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, itertools.count()

    def preadv(handle: int, views: list[memoryview], offset: int) -> int:
        call = next(calls)
        time.sleep(0.002 * (call % 3))
        return real(handle, [views[0][: 1 + call * 37 % 400]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    blocks = stored.streamer([0, 1, 3], slots=2)

    def work() -> None:
        for _ in range(3):
            for index, block in enumerate(blocks):
                stored.check(index, block)

    within(60, work)
    blocks.close()
    assert next(calls) > 100


def test_reads_run_ahead_of_the_use_and_around_the_end(stored: Stored) -> None:
    blocks = stored.streamer(slots=2, staging=2)
    size = [sum(map(len, known.values())) for known in stored.known]
    iterator = iter(blocks)
    next(iterator)
    until = time.monotonic() + 20
    while blocks.read_bytes < sum(size[:3]) and time.monotonic() < until:
        time.sleep(0.001)  # nobody asks for anything meanwhile
    assert sum(size[:3]) <= blocks.read_bytes <= sum(size[:4])
    list(iterator)
    while blocks.read_bytes < sum(size) + sum(size[:2]) and time.monotonic() < until:
        time.sleep(0.001)
    assert sum(size) + sum(size[:2]) <= blocks.read_bytes <= sum(size) + sum(size[:4])
    blocks.close()


def test_the_one_who_computes_waits_only_for_what_it_needs(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six blocks the fourth comes from a disk that hangs: three are used without it, and then it is waited for."""
    real, gate = os.preadv, threading.Event()

    def preadv(handle: int, views: list[memoryview], offset: int) -> int:
        gate.wait(30)
        return real(handle, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    blocks = stored.streamer([3], slots=3, streamed=range(COUNT))
    used: list[int] = []

    def work() -> None:
        for index, block in enumerate(blocks):
            stored.check(index, block)
            used.append(index)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while len(used) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert used == [0, 1, 2]
    gate.set()
    thread.join(20)
    assert used == list(range(COUNT))
    blocks.close()


def test_a_buffer_is_read_into_when_its_copy_has_ended(stored: Stored) -> None:
    """The wait is on a reading thread; whoever asks goes on."""
    layouts = {i: (lay_out(dict(b.named_parameters())), stored.files[i]) for i, b in enumerate(stored.blocks)}
    gate, waited = threading.Event(), list[str]()

    def ended(mark: Any) -> None:
        waited.append(threading.current_thread().name)
        gate.wait(30)

    reads = BlockReads(layouts, ended, buffers=1, ring=Ring(2, 1, 1 << 20), pin=False)

    def same(memory: torch.Tensor, index: int) -> bool:
        places = layouts[index][0].places
        return all(raw(place.view(memory)) == stored.known[index][name] for name, place in places.items())

    def work() -> None:
        reads.ask(0, 4, False)
        assert not reads.room
        first = reads.take(True)
        assert first is not None and same(first, 4)
        reads.copied("the mark")
        reads.ask(1, 5, False)
        time.sleep(0.05)
        assert reads.take(False) is None and same(first, 4) and set(waited) == {THREADS}
        gate.set()
        second = reads.take(True)
        assert second is not None and same(second, 5)
        assert second.data_ptr() == first.data_ptr()

    within(30, work)
    reads.close()


def test_what_is_forgotten_does_not_arrive_late(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is being read when its block is forgotten would land in the buffer's next block."""
    real, entered, gate = os.preadv, threading.Event(), threading.Event()

    def preadv(handle: int, views: list[memoryview], offset: int) -> int:
        entered.set()
        gate.wait(30)
        return real(handle, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    layouts = {0: (lay_out(dict(stored.blocks[0].named_parameters())), stored.files[0])}
    reads = BlockReads(layouts, lambda mark: None, buffers=1, ring=Ring(1, 1, 100), pin=False)
    reads.ask(0, 0, False)
    assert entered.wait(20)
    thread = threading.Thread(target=reads.forget, daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    gate.set()
    thread.join(20)
    assert not thread.is_alive() and reads.room and reads.read_bytes == 100
    within(20, reads.close)


def test_neighbours_in_a_file_are_read_together(stored: Stored) -> None:
    layout = lay_out(dict(stored.blocks[0].named_parameters()))
    runs = _in_runs(layout, list(stored.files[0].items()), 1 << 20)
    size = sum(map(len, stored.known[0].values()))
    assert sum(run.piece.length for run in runs) == size
    for cut in (1, 100, 4096):
        runs = _in_runs(layout, list(stored.files[0].items()), cut)
        assert sum(run.piece.length for run in runs) == size and max(run.piece.length for run in runs) <= cut


def use_all(blocks: BlockStreamer, count: int = 2) -> None:
    for _ in range(count):
        for _ in blocks:
            pass


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("staging", [1, 2])
def test_what_goes_wrong_is_told_with_the_file_s_name(
    stored: Stored, slots: int, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = stored.streamer(slots=slots, staging=staging)
    within(20, lambda: use_all(blocks))
    real = os.preadv
    broken = stored.files[1]["late.scalar"].file

    def preadv(handle: int, views: list[memoryview], offset: int) -> int:
        if os.path.samestat(os.fstat(handle), broken.stat()):
            raise OSError(5, "Input/output error")
        return real(handle, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(3):  # again and again
        with pytest.raises(ReadError, match=r"1\.safetensors cannot be read \(Input/output error\)"):
            within(20, lambda: use_all(blocks))
    monkeypatch.setattr(os, "preadv", real)

    def work() -> None:
        for index, block in enumerate(blocks):  # the disk is back: a new pass begins anew
            stored.check(index, block)

    within(20, work)
    monkeypatch.setattr(os, "preadv", preadv)
    within(20, blocks.close)
    assert not readers()


@pytest.mark.parametrize("what", ["truncated", "written to", "replaced", "gone"])
def test_files_that_change_during_the_run(stored: Stored, what: str, tmp_path: Path) -> None:
    blocks = stored.streamer()
    within(20, lambda: use_all(blocks, 1))
    file = tmp_path / "1.safetensors"
    if what == "truncated":
        os.truncate(file, 5000)
    elif what == "written to":
        with file.open("r+b") as handle:
            handle.seek(-1, os.SEEK_END)
            handle.write(b"x")
        os.utime(file, ns=(1, 1))
    elif what == "replaced":
        (tmp_path / "new").write_bytes(file.read_bytes())
        os.replace(tmp_path / "new", file)
    else:
        file.unlink()
    words = {"truncated": "ends early, at byte|changed while", "gone": "cannot be read"}.get(what, "changed while")
    with pytest.raises(ReadError, match=rf"1\.safetensors ({words})"):
        within(20, lambda: use_all(blocks, 3))
    within(20, blocks.close)
    assert not readers()


def test_a_file_that_is_not_there_is_told_at_once(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(ReadError, match=r"0\.safetensors cannot be read"):
        stored.streamer()
    assert not readers()
    assert all(not p.is_meta for block in stored.blocks for p in block.parameters())  # nothing is lost


@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("slow", [False, True])
def test_left_early_and_closed_in_the_middle(
    stored: Stored, slots: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    if slow:
        monkeypatch.setattr(os, "preadv", lambda *a: (time.sleep(0.003), real(*a))[1])

    def work() -> None:
        blocks = stored.streamer([0, 1, 2, 4], slots=slots)
        for stop in (0, 3, 1, 5, 2):
            for index, block in enumerate(blocks):
                stored.check(index, block)
                if index == stop:
                    break
        for index, block in enumerate(blocks):
            stored.check(index, block)
        iterator = iter(blocks)
        for _ in range(3):
            next(iterator)
        blocks.close()
        for index, block in enumerate(stored.blocks):
            assert all(p.is_meta == (index in (0, 1, 2, 4)) for p in block.parameters())
        with pytest.raises(RuntimeError, match="closed"):
            next(iterator)
        with pytest.raises(RuntimeError, match="closed"):
            list(blocks)
        blocks.close()

    within(60, work)
    assert not readers()


def test_a_streamer_that_nobody_closes_leaves_no_threads_and_no_open_files(stored: Stored, tmp_path: Path) -> None:
    blocks = stored.streamer()
    for _ in blocks:
        break
    assert readers()
    del blocks
    gc.collect()
    until = time.monotonic() + 20
    while readers() and time.monotonic() < until:
        time.sleep(0.01)
    assert not readers()
    if os.path.isdir("/proc/self/fd"):
        held = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        assert not [name for name in held if name.startswith(str(tmp_path.resolve()))]


def test_extents_have_to_be_those_of_the_block(stored: Stored) -> None:
    stored.blocks[0].eight = nn.Parameter(torch.zeros(65, 33, dtype=torch.int8).t(), requires_grad=False)
    with pytest.raises(ValueError, match="block 0 has eight with the strides"):
        stored.streamer()
    assert not readers()
