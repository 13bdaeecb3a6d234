"""safetensors files written in a thread: shard by shard, or one file of any size tensor by tensor.

A file gets its name when it is whole and on disk. Shards say in their metadata which conversion they are of.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .convert import CONVERSION, Item, Shard, Spec, nbytes

BACKLOG = 512 << 20
"""Bytes on their way to a single file."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


class ShardWriter:
    """Fills shards in order; a full one is written while the next is filled. Use as a context.

    Raises:
        OSError: a shard could not be written (disk full, say); those before it are kept.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], conversion: str) -> None:
        self.folder = folder
        self.metadata = {CONVERSION: conversion}  # one entry: safetensors writes several in any order
        self.shards = {item.name: shard for shard in shards for item in shard.items}
        self.filling: dict[str, Tensor] = {}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="convert-writer")
        self.writing: Future[None] | None = None

    def take(self, item: Item, made: Mapping[str, Tensor]) -> None:
        self.filling.update(made)
        shard = self.shards[item.name]
        if self.filling.keys() != shard.outputs.keys():
            return
        self._wait()
        full, self.filling = self.filling, {}
        self.writing = self.pool.submit(self._write, self.folder / shard.name, full)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        def write(part: Path) -> None:
            try:
                save_file(tensors, part, self.metadata)
            except SafetensorError as error:
                raise _as_os_error(error, path) from error

        replace(path, write)
        tensors.clear()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self.pool.shutdown(wait=True)  # a shard that is being written is not lost, whatever happened


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under a temporary name, flushes it to disk, and gives it its name; nothing is left of a failure."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _as_os_error(error: Exception, path: Path) -> OSError:
    """The system's error that safetensors puts into words."""
    found = re.search(r"os error (\d+)", str(error))
    code = int(found[1]) if found else errno.EIO
    return OSError(code, os.strerror(code), str(path))


class FileWriter:
    """One safetensors file of any size, each tensor written to its place as it comes. Use as a context.

    safetensors' own writer wants all tensors at once. The order is its own too: wide types first, so that every
    tensor is aligned.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """

    def __init__(self, path: Path, outputs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}.part")
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self.places: dict[str, int] = {}
        end = 0
        for name in sorted(outputs, key=lambda n: (-outputs[n][1].itemsize, n)):
            start, end = end, end + nbytes(outputs[name])
            shape, dtype = outputs[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.places[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self.size = len(self.head) + end
        self.outputs = outputs
        self.written: set[str] = set()
        self.pending: deque[tuple[Future[None], int]] = deque()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="convert-writer")

    def __enter__(self) -> FileWriter:
        self.stream = self.part.open("wb", buffering=0)
        self.stream.truncate(self.size)
        self._put(0, memoryview(self.head))
        return self

    def take(self, item: Item, made: Mapping[str, Tensor]) -> None:
        self.put(made)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors in a thread; waits while more than :data:`BACKLOG` bytes are on their way."""
        for name, tensor in tensors.items():
            if (tuple(tensor.shape), tensor.dtype) != (tuple(self.outputs[name][0]), self.outputs[name][1]):
                raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype} and was announced otherwise.")
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            self.pending.append((self.pool.submit(self._put, len(self.head) + self.places[name], data), tensor.nbytes))
            self.written.add(name)
        while sum(size for _, size in self.pending) > BACKLOG:
            self.pending.popleft()[0].result()

    def _put(self, offset: int, data: memoryview) -> None:
        self.stream.seek(offset)
        while len(data):
            data = data[self.stream.write(data) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for pending, _ in self.pending:
                    pending.result()
                if missing := sorted(set(self.outputs) - self.written):
                    raise ValueError(f"{self.path}: tensor {missing[0]} was announced and not written.")
                os.fsync(self.stream.fileno())
                os.replace(self.part, self.path)
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.stream.close()
            self.part.unlink(missing_ok=True)
