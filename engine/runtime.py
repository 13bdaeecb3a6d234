"""The device a run is on: choosing it, its numerics, its free memory, and what a stage took."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .config import PRECISIONS, allocator_is_configured
from .errors import SolostepError, UsageError


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else the first CUDA card, else the CPU.

    Raises:
        UsageError: not a device, or not here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device} is not a device; use cpu, cuda or cuda:1.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is not supported; use cpu, cuda or cuda:1.")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"--device {device}: this torch ({torch.__version__}) sees no CUDA card; use --device cpu."
            )
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA cards.")
        use_growing_segments(chosen.index)
    return chosen


@functools.cache
def use_growing_segments(index: int) -> None:
    """Has torch's allocator map memory of a card page by page, unless it is configured.

    By default it takes segments as large as what is asked for, and splits them: a small tensor that stays in one keeps
    a gigabyte from serving as one. On an H200, within 12 GB, a step that takes 10.7 failed, most likely for that.
    """
    if allocator_is_configured() or not _maps_memory(index):
        return
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    with contextlib.suppress(RuntimeError, AttributeError):  # a torch that has no such setting
        (configure or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def _maps_memory(index: int) -> bool:
    """Whether the driver can map a card's memory page by page, which some virtual cards cannot; asked of it directly,
    as torch takes half a gigabyte of the card before it answers anything."""
    device, found = ctypes.c_int(), ctypes.c_int()
    virtual_memory_management = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        asked = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), index)
            or driver.cuDeviceGetAttribute(ctypes.byref(found), virtual_memory_management, device)
        )
    except (OSError, AttributeError):
        return False
    return asked == 0 and found.value == 1


def pick_dtype(precision: str) -> torch.dtype:
    """The type of ``bf16`` or ``fp32``, for networks that come in no other precision.

    Raises:
        UsageError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision} is unknown; choose one of {', '.join(PRECISIONS)}.")
    return torch.bfloat16 if precision == "bf16" else torch.float32


@functools.cache
def slow_in_bf16() -> bool:
    """Whether this CPU lacks what oneDNN computes bf16 with (AVX-512). torch's own loops, which then take its place,
    need 17 to 40 times as long as fp32 for a convolution, and 7 times as long for a linear."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class RoundedOnce(TorchFunctionMode):
    """Linears of bf16 on the CPU in fp32, where products of bf16 numbers are exact, rounded at the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and all(map(_in_bf16_on_cpu, args)):
            return F.linear(*(None if a is None else a.float() for a in args)).to(torch.bfloat16)
        return func(*args, **(kwargs or {}))


def _in_bf16_on_cpu(x: Any) -> bool:
    """Of a plain tensor, or None in its place: quantized tensors of other packages have products of their own."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return x is None or (plain and x.dtype == torch.bfloat16 and x.device.type == "cpu")


@contextlib.contextmanager
def numerics() -> Iterator[None]:
    """No gradients, and no TF32: an fp32 run means fp32, in convolutions too (cuDNN's default is TF32). On a CPU that
    is slow in bf16, products of bf16 are computed in fp32."""
    wide = RoundedOnce() if slow_in_bf16() else contextlib.nullcontext()
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), wide:
        matmul = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, the allocator's own cache included; of a process that is held to
    a part of a card, or to its containers' memory, what that leaves."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + torch.cuda.memory_reserved(device) - allocated, max(0, limit - allocated))
    import psutil

    from .machine import cgroup_room

    free, room = psutil.virtual_memory().available, cgroup_room()
    return max(0, free if room is None else min(free, room))


def host_room() -> int:
    """Bytes of host memory that a run may take: nine tenths of what is free, within the containers' limits."""
    return free_memory(torch.device("cpu")) * 9 // 10


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuses before a long load what cannot fit.

    Raises:
        SolostepError: names what, how much it takes and how much there is.
    """
    free = free_memory(device)
    if needed > free:
        raise SolostepError(
            f"{what} takes {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; "
            "close other programs or use a device with more memory."
        )


def release_memory(device: torch.device) -> None:
    """Gives back what a finished stage held, of the host too: what compilers and readers freed stays with the C library
    otherwise, 0.6 GB after kernels were examined."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def return_large_tensors() -> None:
    """Has the C library give memory of 1 MiB and more back when it is freed, for all of the process from then on.

    By default glibc raises that to 32 MiB as such sizes are freed, and holes stay between what is kept: decoding 17
    frames of 96x96 on a CPU then took up to 160 MB more than its tensors. Every such tensor is mapped anew then, so it
    is for runs within a budget.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):  # another C library
        if sys.platform == "linux":
            ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function that returns freed memory to the system, where that is the C library."""
    try:
        return ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None


@dataclass
class Stage:
    """What one stage took. Peaks are of this stage; ``host_peak``, and ``read``, the bytes that the process read from
    files (from the system's cache too, pipes among them), are None where the system does not tell."""

    name: str
    seconds: float = 0.0
    gpu_peak: int | None = None
    gpu_reserved_peak: int | None = None
    host_peak: int | None = None
    read: int | None = None

    def as_dict(self) -> dict[str, float | int | str | None]:
        return {
            "stage": self.name,
            "seconds": round(self.seconds, 4),
            "gpu_peak_bytes": self.gpu_peak,
            "gpu_reserved_peak_bytes": self.gpu_reserved_peak,
            "host_peak_bytes": self.host_peak,
            "read_bytes": self.read,
        }


@contextlib.contextmanager
def measured(name: str, device: torch.device, stages: list[Stage]) -> Iterator[Stage]:
    """Times a stage and takes its memory peaks; it is recorded even if it fails."""
    stage = Stage(name)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    _reset_host_peak()
    before = bytes_read()
    start = time.perf_counter()
    try:
        yield stage
    finally:
        if device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a broken context must not hide the error that broke it
                torch.cuda.synchronize(device)
                stage.gpu_peak = torch.cuda.max_memory_allocated(device)
                stage.gpu_reserved_peak = torch.cuda.max_memory_reserved(device)
        stage.seconds = time.perf_counter() - start
        stage.host_peak, after = host_peak(), bytes_read()
        stage.read = None if before is None or after is None else after - before
        stages.append(stage)


def _reset_host_peak() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def host_peak() -> int | None:
    """Peak resident bytes of this process since the last stage began (on Linux; None elsewhere)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def bytes_read() -> int | None:
    """Bytes that all threads of this process asked files for until now (on Linux; None elsewhere). What is mapped into
    memory is not among them."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    return None
