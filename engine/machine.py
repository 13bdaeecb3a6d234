"""Facts and rates of this machine: processor, memory, card and driver, and how fast bytes move between them."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_check import median_ms
from ..offload.pinned import forget_error
from .request import versions
from .runtime import free_memory

# ---------------------------------------------------------------- facts


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def installed(name: str) -> str | None:
    """The version of a package, if it is there."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
_LIMITED = (  # of version 2 and 1: the limit, what is used, and what of it the kernel gives back when asked
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def _cgroups() -> list[Path]:
    """Folders of the control groups that this process is in, from its own outwards."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in OWN_CGROUP.read_text().splitlines():
            number, _, rest = line.partition(":")
            kinds, _, name = rest.partition(":")
            if number == "0" or "memory" in kinds.split(","):
                root = CGROUPS if number == "0" else CGROUPS / "memory"
                here = root / name.strip("/")
                found += [here, *(outer for outer in here.parents if outer == root or root in outer.parents)]
    # Where a container shows its own group only, that one lies at the root, whatever its name outside.
    return list(dict.fromkeys([*found, CGROUPS, CGROUPS / "memory"]))


def _limits() -> list[tuple[int, Path, str, tuple[str, ...]]]:
    """Each limit of the control groups, with its group and the names of the files that say what is used."""
    found = []
    for group in _cgroups():
        for limit, used, given_back in _LIMITED:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                found.append((int((group / limit).read_text()), group, used, given_back))
    return [entry for entry in found if entry[0] < 1 << 60]  # version 1 writes a huge number for no limit


def cgroup_limit() -> int | None:
    """Bytes that this process's control groups may use, where a container or a service limits it."""
    return min((limit for limit, *_ in _limits()), default=None)


def cgroup_room() -> int | None:
    """Bytes that are left below the limits of the control groups, all their processes and files in memory (tmpfs)
    counted; the kernel's cache of other files makes way and does not count."""
    rooms = []
    for limit, group, used, given_back in _limits():
        with contextlib.suppress(OSError, ValueError):
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            rooms.append(limit - int((group / used).read_text()) + sum(int(stat[name]) for name in given_back))
    return min(rooms, default=None)


def host_facts() -> dict[str, Any]:
    """Processor, memory, system, versions."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(), "python": platform.python_version(), "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": memory.total, "ram_available_bytes": memory.available, "cgroup_limit_bytes": cgroup_limit(),
        "triton": installed("triton"), **{name: versions()[name] for name in ("solostep", "torch", "cuda")},
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


PROC = Path("/proc/driver/nvidia")


def cards_there() -> list[str]:
    """NVIDIA cards that the system knows of, whether or not torch sees them."""
    told = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if told is not None:
        return [line.strip() for line in told.splitlines() if line.strip()]
    names = []
    for place in sorted(PROC.glob("gpus/*/information")):
        with contextlib.suppress(OSError):
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
            names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names or (["a driver for NVIDIA cards"] if (PROC / "version").exists() else [])


@functools.cache
def _nvidia_smi(uuid: str) -> dict[str, str]:
    names = ("driver_version", "power.limit", "clocks.max.sm", "pcie.link.gen.max", "pcie.link.width.max")
    for which in ([f"--id={uuid}"], []):
        text = _run("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", *which)
        if text is not None and "\n" not in text and text.count(",") == len(names) - 1:
            return dict(zip(names, (part.strip() for part in text.split(",")), strict=True))
    return {}


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """The card, its driver and its memory."""
    properties = torch.cuda.get_device_properties(device)
    smi = _nvidia_smi(f"GPU-{getattr(properties, 'uuid', '')}")
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count, "memory_bytes": total, "memory_free_bytes": free,
        "driver": smi.get("driver_version", "unknown"), "power_limit": smi.get("power.limit"),
        "clock": smi.get("clocks.max.sm"),
        "pcie": f"gen {smi['pcie.link.gen.max']} x{smi['pcie.link.width.max']}" if smi else None,
    }  # fmt: skip


# ---------------------------------------------------------------- rates


def pinned_memory(quick: bool) -> dict[str, Any]:
    """The largest block of 1, 4, 16, 64 GB that the driver pins, and at what rate.

    It stops at half of what is free, and before a step that would take more than about eight seconds.
    """
    import psutil

    room = min(psutil.virtual_memory().available, cgroup_limit() or 1 << 60) // 2
    runtime, best, rate, why = torch.cuda.cudart(), 0, 0.0, ""
    for size in (10**9, 4 * 10**9) if quick else (10**9, 4 * 10**9, 16 * 10**9, 64 * 10**9):
        if size > room:
            why = f"half of the free memory is {room / 1e9:.1f} GB"
            break
        if rate and size / rate > 8:
            why = "more would take long"
            break
        block = torch.empty(size, dtype=torch.uint8)
        start = time.perf_counter()
        code = int(runtime.cudaHostRegister(block.data_ptr(), size, 0))
        seconds = time.perf_counter() - start
        if code:
            why = f"the driver refused {size / 1e9:.0f} GB (error {code})"
            forget_error()
            break
        runtime.cudaHostUnregister(block.data_ptr())
        best, rate = size, size / seconds
    return {"largest_bytes": best, "bytes_per_second": rate, "stopped": why or "not tried further"}


def transfer_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Bytes a second between host and card, pinned and pageable, and read and written by a copy on the card."""
    size = 64 << 20 if quick else 256 << 20
    on_card = torch.empty(size, dtype=torch.uint8, device=device)
    pageable, rates = torch.ones(size, dtype=torch.uint8), {}
    for kind, host in (("pinned", pageable.pin_memory()), ("pageable", pageable)):

        def to_device(host: Tensor = host) -> Tensor:
            return on_card.copy_(host, non_blocking=True)

        def to_host(host: Tensor = host) -> Tensor:
            return host.copy_(on_card, non_blocking=True)

        rates[f"host_to_device_{kind}"] = size / median_ms(to_device, device, 200) * 1e3
        rates[f"device_to_host_{kind}"] = size / median_ms(to_host, device, 200) * 1e3
    rates["device_copy"] = copy_rate(device)
    return rates


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy of a big bf16 tensor reads and writes: the ceiling of a pass over memory."""
    count = min(1 << 30, free_memory(device) // 16)
    source = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()  # zeros take less power
    target = torch.empty_like(source)
    return 4 * count / median_ms(lambda: target.copy_(source), device, 200) * 1e3
