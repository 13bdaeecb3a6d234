"""What a card and the installed packages can run: capabilities, versions, and why something is not to be had."""

from __future__ import annotations

import functools
import importlib
import re

import torch

try:
    import triton
except ImportError:  # a CPU build of torch brings none
    triton = None

HOPPER_TRITON = ((3, 6), (3, 9))
"""First and last Triton that the Gluon kernels may be used with: they were run with the first only, and compiled
without a card for those up to the last. Gluon's interface changes without notice, and so do the registers that ptxas
gives a schedule."""


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def needs(device: torch.device, least: tuple[int, int], what: str) -> str | None:
    """None on a card of at least this compute capability, else why not."""
    if device.type != "cuda":
        return f"{what} needs a CUDA card"
    if capability(device) < least:
        return f"{what} needs compute capability {dotted(least)}; this card has {dotted(capability(device))}"
    return None


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def torch_version() -> tuple[int, int]:
    return _version(torch.__version__)


def triton_version() -> tuple[int, int] | None:
    return None if triton is None else _version(triton.__version__)


@functools.cache
def loads(module: str) -> str | None:
    """None if a module of this package (``.name``), or an installed one, can be imported; else why not."""
    try:
        importlib.import_module(module, __package__)
    except Exception as error:  # another package's import may raise anything: a missing symbol, a wrong CUDA
        return f"{module.rsplit('.', 1)[-1]} does not load: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """An exception's text, cut to what fits a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


OUT_OF_MEMORY = "out of memory"
"""The reason of a failure that says nothing about a kernel."""
_ALLOCATIONS = re.compile(
    r"DefaultCPUAllocator|size calculation overflowed|STATUS_ALLOC_FAILED"
    r"|(CUDA error|Triton Error \[CUDA\]): out of memory"
)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that an allocation failed. On the CPU, and where a library or the driver allocates, it has
    no type of its own; the second of the words is a size beyond all counting."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _ALLOCATIONS.search(str(error)) is not None


def reason_of(error: BaseException) -> str:
    """Why a kernel failed, for its verdict."""
    return OUT_OF_MEMORY if ran_out(error) else one_line(error)


def triton_missing(device: torch.device) -> str | None:
    """None where Triton's kernels can be started, else why not."""
    if device.type != "cuda":
        return "it needs a CUDA card"
    return "Triton is not installed" if triton_version() is None else None


def hopper_missing(device: torch.device, module: str) -> str | None:
    """None where the Gluon kernels of a module of this package can be used, else why not."""
    if device.type != "cuda":
        return "it needs a CUDA card"
    if capability(device) != (9, 0):
        return f"its products exist on compute capability 9.0 only; this card has {dotted(capability(device))}"
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    first, last = HOPPER_TRITON
    if not first <= version <= last:
        return (
            f"it was run with Triton {dotted(first)} and, up to {dotted(last)}, only compiled; "
            f"this is {triton.__version__}"
        )
    return loads(module)
