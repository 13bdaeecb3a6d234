"""The reader: the same bytes as safetensors' own reading, whatever the pieces, and clear errors."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import solostep.offload.reader as reader
from solostep.engine.headers import read_header, torch_type
from solostep.offload.reader import Extent, ReadError, Ring, default_ring, read_tensors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RINGS = [Ring(1, 1, 1), Ring(3, 2, 5), Ring(4, 7, 64), Ring(2, 3, 1 << 20)]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn]


@pytest.fixture(autouse=True)
def card(request: pytest.FixtureRequest) -> None:
    if "cuda" in request.node.name and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Tensors of all types and odd shapes: scalars, empty ones, rows of 7; behind the bytes, offsets of any kind."""
    shapes = [(), (1,), (0, 3), (7,), (3, 5), (2, 3, 11), (129,)]
    made = torch.Generator().manual_seed(0)
    tensors = {
        f"{n}.{dtype}": torch.randint(0, 256, (*shape, dtype.itemsize), generator=made)
        .to(torch.uint8)
        .view(dtype)[..., 0]
        for n, shape in enumerate(shapes)
        for dtype in TYPES
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def extents(file: Path) -> dict[str, Extent]:
    """By name, in the order of the file."""
    infos = sorted(read_header(file).values(), key=lambda info: info.offset)
    return {i.stored_name: Extent(file, i.offset, i.shape, torch_type(i.dtype)) for i in infos}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ring", [*RINGS, None], ids=str)
def test_the_bytes_are_those_of_safetensors(device: str, ring: Ring | None, file: Path) -> None:
    known, asked = load_file(file), extents(file)
    assert len(asked) == len(known) == 49
    read = list(read_tensors(list(asked.values()), device, ring))
    for name, tensor in zip(asked, read, strict=True):
        assert same_bytes(tensor, known[name]), name
        assert tensor.device.type == device
        assert tensor.data_ptr() % 16 == 0, "kernels load 16 bytes at once"
    owners = {t.untyped_storage().data_ptr() for t in read if t.numel()}
    assert len(owners) == sum(t.numel() > 0 for t in read), "each can be freed alone"


@pytest.mark.parametrize("device", DEVICES)
def test_any_order_any_part_and_several_files(device: str, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.arange(1000), "b": torch.arange(10).float()}, other)
    header = json.loads(other.read_bytes()[8 : 8 + struct.unpack("<Q", other.read_bytes()[:8])[0]])
    start = os.path.getsize(other) - max(entry["data_offsets"][1] for entry in header.values())
    beside = {n: start + header[n]["data_offsets"][0] for n in ("a", "b")}
    known = load_file(file) | load_file(other)
    asked = [*extents(file).items()][::3]
    asked += [
        ("a", Extent(other, beside["a"], (1000,), torch.int64)),
        ("b", Extent(other, beside["b"], (10,), torch.float32)),
    ]
    random.Random(0).shuffle(asked)
    for ring in (*RINGS, None):
        read = read_tensors([extent for _, extent in asked], device, ring)
        for name, _ in asked:
            assert same_bytes(next(read), known[name]), name
        assert next(read, None) is None


def test_nothing_is_read_for_nothing() -> None:
    assert list(read_tensors([], "cpu")) == []


def test_pieces_are_read_ahead_but_no_more_than_the_ring(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    real = reader._ToHost.target
    monkeypatch.setattr(reader._ToHost, "target", lambda self, n, piece: (begun.append(n), real(self, n, piece))[1])
    asked = [e for e in extents(file).values() if e.nbytes]
    read = read_tensors(asked, "cpu", Ring(2, 3, 8))
    taken = 0
    for extent in asked:
        next(read)
        taken += extent.nbytes
        pieces = -(-taken // 8)
        assert len(begun) <= pieces + 4
    read.close()


def test_stopping_early_leaves_no_thread(file: Path) -> None:
    before = set(threading.enumerate())
    read = read_tensors(list(extents(file).values()), "cpu", Ring(3, 4, 16))
    next(read)
    read.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("device", DEVICES)
def test_a_file_that_is_cut_short(device: str, file: Path) -> None:
    asked = list(extents(file).values())
    size = file.stat().st_size
    with file.open("rb+") as stream:
        stream.truncate(size - 1)
    for ring in (Ring(2, 2, 64), None):
        with pytest.raises(ReadError, match=rf"all\.safetensors ends early, at byte {size - 1:,}$"):
            list(read_tensors(asked, device, ring))


def consume_and_change(read: Iterator[torch.Tensor], file: Path, how: str) -> None:
    next(read)
    if how == "written":
        with file.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"x")
        os.utime(file, ns=(1, 1))  # clocks of file systems are coarse
    elif how == "replaced":
        copy = file.with_name("copy")
        copy.write_bytes(file.read_bytes())
        os.utime(copy, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        os.replace(copy, file)
    else:
        file.unlink()
    list(read)


@pytest.mark.skipif(os.name == "nt", reason="a file that is open cannot be replaced there")
@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read(how: str, file: Path) -> None:
    read = read_tensors(list(extents(file).values()), "cpu", Ring(1, 1, 64))
    words = "cannot be read" if how == "removed" else "changed while it was read"
    with pytest.raises(ReadError, match=rf"all\.safetensors {words}"):
        consume_and_change(read, file, how)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"gone cannot be read \(No such file"):
        list(read_tensors([Extent(tmp_path / "gone", 0, (1,), torch.uint8)], "cpu"))


def test_the_ring_is_small() -> None:
    """Host memory beside the tensors, and what pinning costs at each start."""
    for device in ("cpu", "cuda"):
        ring = default_ring(torch.device(device))
        assert ring.buffers * ring.size <= 512 << 20
        assert 1 <= ring.threads <= ring.buffers


def test_a_buffer_that_cannot_be_pinned_is_read_into_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked once, and nothing is taken back that it did not give."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(64)))
    asked: list[str] = []
    driver = SimpleNamespace(
        cudaHostRegister=lambda *_: asked.append("pin") or 2, cudaHostUnregister=lambda *_: asked.append("unpin")
    )
    event = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(reader.torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(reader.torch.cuda, "Event", lambda **_: event)
    slot = reader._Slot(torch.zeros(32, dtype=torch.uint8))
    with reader._File(path) as opened:
        for start in (0, 20):
            slot.fill(opened, reader._Piece(path, start, 32))
            assert slot.buffer.tolist() == list(range(start, start + 32))
    slot.close()
    assert asked == ["pin"] and not slot.pinned
