"""Compiles kernels for cards that are not here. Run in a process of its own: Triton's driver is replaced."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Card:
    """Stands in for a card: compiling needs its name only."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(kernel: Any) -> tuple[int, int, int]:
    """Registers, bytes of stack (what is spilled lies there) and of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        told = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout).groups()  # type: ignore[union-attr]
    return int(registers), int(stack), kernel.metadata.shared


def bytes_of_floats(ptx: str) -> set[str]:
    """Registers that a floating-point instruction writes and a store of bytes takes as they are: ptxas may convert such
    a float to u8 (F2IP.U8), where its low bits are meant."""
    stored = re.findall(r"^\s*(?:@\S+ )?st\.\S*b8\s+\[[^]]+\],([^;]+);", ptx, re.MULTILINE)
    floats = re.findall(r"^\s*(?:@\S+ )?(?!cvt|setp)\S+\.f32\s+(%\w+),", ptx, re.MULTILINE)
    return set(re.findall(r"%\w+", " ".join(stored))) & set(floats)


def compile_for(
    arch: int, kernels: list[tuple[ModuleType, str]], run: Callable[[], object], only: Collection[str]
) -> None:
    """Runs launchers with their kernels compiled in place of started, those of other names than ``only`` not even that;
    prints a line for each compilation."""
    driver.set_active(Card(arch))
    real = {(module, name): getattr(module, name) for module, name in kernels}

    class Compile:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def start(*args: Any, **options: Any) -> None:
                if self.name in only:
                    kernel = self.kernel.warmup(*args, grid=grid, **options)
                    assert not bytes_of_floats(kernel.asm["ptx"]), (self.name, arch)
                    print(self.name, arch, *resources(kernel))

            return start

    try:
        for (module, name), kernel in real.items():
            setattr(module, name, Compile(name, kernel))
        run()
    finally:
        for (module, name), kernel in real.items():
            setattr(module, name, kernel)
