"""What a weight file holds, read from its header alone; and the one released pickle file, as plain tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""safetensors names of the types that a weight can be stored in, and their bytes."""
QUANTIZED_TYPES = {"I8": 1, "U8": 1, "F8_E4M3": 1}
"""Types that only tensors of a quantized linear have."""
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its name there, shape, safetensors type name, and first byte in the file."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers the stored tensor has (a byte of packed 4-bit values is one)."""
        return product(self.shape)


def product(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def torch_type(name: str) -> torch.dtype:
    """The torch type of a safetensors type name that can be read."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def type_name(tensor: torch.Tensor) -> str:
    """The safetensors name of a tensor's type; torch's own name for a type that is not read."""
    given = str(tensor.dtype).removeprefix("torch.")
    return next((name for name, known in _TORCH_NAMES.items() if known == given), given)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read ({error.strerror}); download it again.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({first_line(error)}); download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has to hold a JSON object; download it again.")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header; the header is checked against itself and the file's length.

    Raises:
        CheckpointError: not a safetensors file, or damaged, or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > min(size, 100_000_000):
                raise ValueError("bad header length")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        tensors = {
            name: TensorInfo(path, name, tuple(entry["shape"]), entry["dtype"], data + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        end = data + max((stop for _, stop, _ in places), default=0)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read ({error.strerror}); download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        raise CheckpointError(
            f"{path} is not a safetensors file, or its start is damaged; download it again."
        ) from None
    if size != end:
        how = "is cut short" if size < end else "is too long"
        raise CheckpointError(
            f"{path} {how}: its header promises {end:,} bytes and it has {size:,}; download it again."
        )
    expected = 0
    for start, stop, name in places:  # one behind the other, without gaps, as safetensors asks for
        needed = (FLOAT_TYPES | QUANTIZED_TYPES).get(tensors[name].dtype)
        fits = needed is None or stop - start == needed * tensors[name].numbers
        if start != expected or not fits:
            raise CheckpointError(f"{path}: its header contradicts itself at tensor {name}; download it again.")
        expected = stop
    return tensors


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The one released pickle file. ``weights_only`` refuses anything but tensors: nothing in it is executed."""
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own message is left out: it tells how to run the code
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: it is damaged, or holds code, which is never run; "
            "download it again."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{path} does not hold a table of tensors; download it again.")
    return state
