"""What a device is asked for: how torch takes its memory, and what is given back."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from solostep.engine import runtime

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(("configured", "maps"), [(None, True), (None, False), *((name, True) for name in NAMES)])
def test_segments_grow_unless_the_environment_says_how(
    configured: str | None, maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(runtime, "_maps_memory", lambda index: maps)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if configured is not None:
        monkeypatch.setenv(configured, "max_split_size_mb:64")
    runtime.use_growing_segments.__wrapped__(0)
    assert asked == ([] if configured or not maps else ["expandable_segments:True"])


class Driver:
    """Stands in for libcuda: a card that maps memory, or not; and one that is not there."""

    def __init__(self, maps: int) -> None:
        self.maps = maps

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 7 + index
        return 101 if index else 0  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        assert (attribute, device.value) == (102, 7)
        value._obj.value = self.maps
        return 0


def test_the_driver_is_asked_whether_it_maps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Driver:
        raise OSError(name)

    for library, index, answer in (
        (lambda name: Driver(1), 0, True), (lambda name: Driver(0), 0, False), (lambda name: Driver(1), 1, False),
        (lambda name: SimpleNamespace(), 0, False), (missing, 0, False),
    ):  # fmt: skip
        monkeypatch.setattr(runtime.ctypes, "CDLL", library)
        assert runtime._maps_memory(index) is answer


def test_a_torch_without_growing_segments_works_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "_maps_memory", lambda index: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", None, raising=False)
    monkeypatch.setattr(torch.cuda, "memory", SimpleNamespace())
    runtime.use_growing_segments.__wrapped__(0)


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
