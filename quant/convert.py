"""A checkpoint of any size in another format: tensor by tensor, from reading threads over the device to a writing one.

Host memory holds, whatever the model's size, what the reader reads ahead, one tensor, the shard that is being filled,
and the one before it, which is being written (writing.py). Device memory: a tensor, what quantizing it takes, and what
became of two others. Reading, quantizing, fetching and writing run at the same time; the slowest of them sets the pace.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .formats import quantize, stored


class ConversionError(ValueError):
    """What is wrong with a file, in one sentence that names it."""


Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""
SHARD = 2_000_000_000
"""Bytes of an output shard; less where the source's own shards are smaller."""
CONVERSION = "solostep_conversion"
"""The key under which a shard's metadata names its conversion."""


# --- what becomes of each tensor ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One tensor of the source, and the tensors that it becomes. ``make`` is None for what is stored as it is."""

    name: str
    origin: Path
    nbytes: int
    outputs: Mapping[str, Spec]
    make: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    @property
    def output_bytes(self) -> int:
        return sum(nbytes(spec) for spec in self.outputs.values())


def nbytes(spec: Spec) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def kept(name: str, origin: Path, spec: Spec) -> Item:
    """A tensor that stays as it is."""
    return Item(name, origin, nbytes(spec), {name: spec})


def quantized(path: str, origin: Path, spec: Spec, form: str) -> Item:
    """The weight ``[N, K]`` of the linear at ``path``, in one of our formats."""
    (rows, columns), dtype = spec

    def make(weight: Tensor) -> dict[str, Tensor]:
        # Computed in fp32 from the type of the file, as a loader does it.
        made = quantize(form, weight.float() if dtype == torch.float64 else weight)
        return {f"{path}.{name}": tensor for name, tensor in made.items()}

    outputs = {f"{path}.{name}": spec for name, spec in stored(form, columns, rows).items()}
    return Item(f"{path}.weight", origin, nbytes(spec), outputs, make)


def cast(name: str, origin: Path, spec: Spec, dtype: torch.dtype, scale: float = 1.0) -> Item:
    """A tensor in another type, times a number; computed in fp32 and rounded once."""

    def make(tensor: Tensor) -> dict[str, Tensor]:
        return {name: (tensor.float() * scale).to(dtype)}

    return Item(name, origin, nbytes(spec), {name: (spec[0], dtype)}, make)


@dataclass(frozen=True)
class Shard:
    """An output file and the items that fill it."""

    name: str
    items: tuple[Item, ...]

    @property
    def outputs(self) -> dict[str, Spec]:
        return {name: spec for item in self.items for name, spec in item.outputs.items()}

    @property
    def nbytes(self) -> int:
        return sum(item.output_bytes for item in self.items)


def plan_shards(items: Iterable[Item], stem: str, limit: int = SHARD) -> list[Shard]:
    """Items in the order of the source, in files of at most ``limit`` bytes (or of one item)."""
    groups: list[list[Item]] = []
    size = 0
    for item in items:
        if not groups or (groups[-1] and size + item.output_bytes > limit):
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.output_bytes
    count = len(groups)
    return [Shard(f"{stem}-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def index(shards: Sequence[Shard]) -> dict[str, object]:
    """What the index file of the shards holds, in the layout of the release."""
    names = {name: shard.name for shard in shards for name in shard.outputs}
    return {"metadata": {"total_size": sum(s.nbytes for s in shards)}, "weight_map": dict(sorted(names.items()))}


def is_finished(folder: Path, shard: Shard, conversion: str) -> bool:
    """Whether a shard is there, whole, and of this conversion.

    Raises:
        ConversionError: a file of its name is of another conversion, or none of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / shard.name
    if not path.exists():
        return False
    try:
        with safe_open(str(path), framework="pt") as file:  # refuses a file that is longer or shorter than it says
            metadata, names = file.metadata() or {}, set(file.keys())
    except (SafetensorError, OSError):
        metadata, names = {}, set()
    if metadata.get(CONVERSION) != conversion or names != set(shard.outputs):
        raise ConversionError(f"{path} is not of this conversion; delete it or choose another folder.")
    return True


# --- the stream ---------------------------------------------------------------------------------------------------


def stream(
    source: Iterator[tuple[Item, Tensor]],
    take: Callable[[Item, Mapping[str, Tensor]], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Makes of every tensor of ``source``, on the device where it comes, its outputs, and hands them to ``take``.

    Args:
        take: gets the outputs on the host, in a thread of its own, in order.
        progress: called with the bytes of the source that are done.

    Raises:
        ConversionError: a tensor holds NaN or infinity; it is named.
        Exception: what ``source`` or ``take`` raised.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="convert-fetch")
    pending: deque[tuple[Item, Future[None]]] = deque()
    failed = threading.Event()
    done = 0

    def fetch(item: Item, made: dict[str, Tensor], finite: Tensor) -> None:
        if failed.is_set():  # nothing is taken behind a gap
            return
        try:
            take(item, _fetched(item, made, finite))
        except BaseException:
            failed.set()
            raise

    def settle(count: int) -> None:
        nonlocal done
        while len(pending) > count:
            item, fetching = pending.popleft()
            fetching.result()
            done += item.nbytes
            if progress is not None:
                progress(done)

    try:
        while (entry := next(source, None)) is not None:
            item, tensor = entry
            made = dict.fromkeys(item.outputs, tensor) if item.make is None else item.make(tensor)
            pending.append((item, pool.submit(fetch, item, dict(made), _is_finite(tensor))))
            del entry, tensor, made  # before the next one is asked for
            settle(1)
        settle(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _fetched(item: Item, made: dict[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
    """The outputs of an item on the host, if they are what was planned."""
    for name, tensor in made.items():
        made[name] = _to_host(tensor)
    if not bool(finite):
        raise ConversionError(
            f"{item.origin}: tensor {item.name} holds NaN or infinity; the file is damaged, download it again."
        )
    for name, (shape, dtype) in item.outputs.items():
        if made[name].shape != shape or made[name].dtype != dtype:
            raise ValueError(f"{name} became {list(made[name].shape)} {made[name].dtype}, not {list(shape)} {dtype}.")
    return made


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    # New memory is taken from the system page by page when it is first written. All cores do that here; the copy's one
    # thread alone came to 1.4 GB/s instead of 8.
    host.view(-1).view(torch.uint8).zero_()
    return host.copy_(tensor)


def _is_finite(tensor: Tensor) -> Tensor:
    """A flag on the tensor's device; no mask in memory for floats of 16 bits and more."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return torch.tensor(True)
    if tensor.dtype == torch.float8_e4m3fn:  # no infinity; NaN is the largest byte of its sign
        return (tensor.view(torch.int8).amax() != 0x7F) & (tensor.view(torch.uint8).amax() != 0xFF)
    if tensor.dtype == torch.float8_e5m2:  # infinity and NaN are the four largest bytes of their sign
        return (tensor.view(torch.int8).amax() < 0x7C) & (tensor.view(torch.uint8).amax() < 0xFC)
    low, high = torch.aminmax(tensor)  # NaN wins in both
    return torch.isfinite(low) & torch.isfinite(high)
