"""Pages of host memory: there before they are pinned, and what they hold stays."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from solostep.offload import pinned
from solostep.offload.pinned import HostSlab, PinError, host_memory, lay_out, take_pages

KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) if sys.platform == "linux" else (0, 0)
linux = pytest.mark.skipif(KERNEL < (5, 14), reason="asks Linux for pages, which it can from 5.14 on")
SIZE = 40 << 20


def taken() -> int:
    """Bytes of this process that are in memory."""
    return mmap.PAGESIZE * int(Path("/proc/self/statm").read_text().split()[1])


@linux
def test_pages_are_taken_and_keep_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "TAKEN_AT_ONCE", 6 << 20)  # several threads, and a last part that is smaller
    memory = host_memory(SIZE)
    part = memory[12_345:-6_789]  # not on the border of a page
    part[7_000_000:7_000_100] = 7
    before = taken()
    take_pages(part)
    assert taken() - before > 0.7 * SIZE
    assert int(memory.count_nonzero()) == 100 and bool((part[7_000_000:7_000_100] == 7).all())
    before = taken()
    take_pages(part)
    take_pages(part[:0])
    assert taken() - before < 0.1 * SIZE


@linux
def test_a_slab_s_pages_are_there_when_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that takes them itself does it with one thread. Where the system cannot be asked it still does."""
    seen: list[int] = []
    start = [0]

    def register(address: int, count: int, flags: int) -> int:
        seen.append(taken() - start[0])
        return 0 if len(seen) < 3 else 2

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(pinned, "forget_error", lambda: None)
    slabs = [HostSlab(lay_out({"weight": torch.empty(SIZE, dtype=torch.uint8, device="meta")})) for _ in range(3)]
    start[0] = taken()
    slabs[0].pin()
    assert seen[0] > 0.7 * SIZE and slabs[0].pinned
    monkeypatch.setattr(pinned, "_madvise", lambda: lambda *_: -1)
    start[0] = taken()
    slabs[1].pin()
    assert seen[1] < 0.1 * SIZE and slabs[1].pinned
    with pytest.raises(PinError, match="could not be pinned"):
        slabs[2].pin()
    slabs[0].pinned = slabs[1].pinned = False  # no driver pinned them
    for slab in slabs:
        if hasattr(slab, "_give_back"):
            slab._give_back.detach()
