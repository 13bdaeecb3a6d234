"""What a device is asked for: how torch takes its memory, and what is given back."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from solostep.engine import runtime

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize("configured", [None, *NAMES])
def test_segments_grow_unless_the_environment_says_how(configured: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if configured is not None:
        monkeypatch.setenv(configured, "max_split_size_mb:64")
    runtime.use_growing_segments.__wrapped__()
    assert asked == ([] if configured else ["expandable_segments:True"])


def test_a_torch_without_growing_segments_works_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", None, raising=False)
    monkeypatch.setattr(torch.cuda, "memory", SimpleNamespace())
    runtime.use_growing_segments.__wrapped__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_what_stays_does_not_hold_what_was_freed() -> None:
    """Small tensors that are made where a large one was leave room for the next."""
    device = runtime.pick_device("cuda")
    runtime.release_memory(device)
    before, size, kept = torch.cuda.memory_reserved(device), 1 << 30, []
    for _ in range(4):
        large = torch.empty(size, dtype=torch.uint8, device=device)
        del large
        kept.append(torch.empty(2 << 20, dtype=torch.uint8, device=device))
    assert torch.cuda.memory_reserved(device) - before < 1.25 * size


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own")
def test_what_the_host_freed_is_given_back() -> None:
    """Pieces below the size that the C library maps one by one, and one behind them that stays."""
    if runtime._trim() is None:
        pytest.skip("another C library than glibc")
    process = psutil.Process()
    pieces = [bytearray(60_000) for _ in range(2_000)]
    last = bytearray(60_000)
    held = process.memory_info().rss
    del pieces
    runtime.release_memory(torch.device("cpu"))
    assert held - process.memory_info().rss > 100e6 and len(last) == 60_000
