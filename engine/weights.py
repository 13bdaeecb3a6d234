"""One network's weights on disk: headers, strict checks, and loading them straight to their place.

Networks are built on the meta device; each tensor then goes from the file to its place on its device, so a model is
never held twice. Names, shapes and types are checked from the headers, before the first byte of data is read.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import StepLLMConfig, TransformerConfig, VAEConfig
from .errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""safetensors names of the types that can be read, and their bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its name there, shape and safetensors type name."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Component:
    """One network of a model folder, known from its configuration and file headers."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    ignored: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(_product(t.shape) for t in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)

    @property
    def dtypes(self) -> list[str]:
        return sorted({t.dtype for t in self.tensors.values()})

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: configuration, headers, sizes and 16 samples of the data of each file."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True, default=str).encode())
        for name in sorted(self.tensors):
            digest.update(f"{name}:{self.tensors[name].shape}:{self.tensors[name].dtype}".encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                for i in range(16):
                    stream.seek(size * i // 16)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]


def _product(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


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
        tensors = {
            name: TensorInfo(path, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()
        }
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        end = 8 + length + max((stop for _, stop, _ in places), default=0)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read ({error.strerror}); download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
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
        needed = FLOAT_TYPES.get(tensors[name].dtype)
        fits = needed is None or stop - start == needed * _product(tensors[name].shape)
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


def type_name(tensor: torch.Tensor) -> str:
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def build_on_meta(component: Component) -> nn.Module:
    """The network of a component, with parameters that have shapes but no memory.

    Raises:
        CheckpointError: its configuration makes no network.
    """
    from accelerate import init_empty_weights

    from .models.clip import HunyuanClip
    from .models.step_llm import StepLLM
    from .models.transformer import StepVideoTransformer
    from .models.vae import VideoAutoencoder

    makers: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
        "transformer": lambda c: StepVideoTransformer(TransformerConfig.from_dict(c)),
        "vae": lambda c: VideoAutoencoder(VAEConfig.from_dict(c)),
        "step_llm": lambda c: StepLLM(StepLLMConfig.from_dict(c)),
        "hunyuan_clip": HunyuanClip,
    }
    try:
        with init_empty_weights(include_buffers=False):
            return makers[component.name](component.config).eval().requires_grad_(False)
    except CheckpointError:
        raise
    except Exception as error:  # values of a wrong type or that do not fit together fail anywhere in a constructor
        raise CheckpointError(
            f"{component.folder / 'config.json'} does not describe a {component.name} network ({first_line(error)}); "
            "download it again."
        ) from error


def check_tensors(component: Component, module: nn.Module, prefix: str = "") -> None:
    """Holds a component's tensors against a module's parameters: names, shapes and types, strictly.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown, of a wrong shape or of no float type.
    """
    expected = {prefix + name: tuple(p.shape) for name, p in module.named_parameters()}
    found = {k: t for k, t in component.tensors.items() if k.startswith(prefix)}
    where = component.folder
    missing = sorted(set(expected) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {missing[0]}{more} is missing; a file is incomplete or config.json is of another model: "
            "download them again."
        )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{found[unknown[0]].file}: tensor {unknown[0]}{more} is unknown to this network; "
            "the file or config.json is of another model: download them again."
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)} and has to have {list(shape)}; "
                "the file or config.json is of another model: download them again."
            )
        if info.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{info.file}: tensor {name} is stored as {info.dtype} and only {', '.join(FLOAT_TYPES)} can be read; "
                "download it again."
            )


def load(
    component: Component,
    device: torch.device | str,
    dtype: torch.dtype,
    part: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Builds a network and fills it, tensor by tensor, each straight from its file to its place.

    Args:
        part: load only this submodule (``decoder`` of the VAE, say).
        progress: called with (bytes placed, bytes in all).

    Raises:
        CheckpointError: a tensor with NaN or infinity, a file that changed or ends early, or any mismatch.
    """
    from accelerate.utils import set_module_tensor_to_device

    module = build_on_meta(component)
    if part:
        module = module.get_submodule(part)
    prefix = f"{part}." if part else ""
    check_tensors(component, module, prefix)
    wanted = {name: component.tensors[prefix + name] for name, _ in module.named_parameters()}
    total = sum(_product(t.shape) for t in wanted.values())
    done = 0
    for file in sorted({t.file for t in wanted.values()}):
        with _open_tensors(file, device) as read:
            for name, info in wanted.items():
                if info.file != file:
                    continue
                tensor = read(info.stored_name)
                _check_finite(tensor, info.stored_name, file)
                # A mapped tensor would share the file's pages; the copy owns its memory and outlives the file.
                tensor = tensor.to(device, dtype, copy=True) if tensor.device.type == "cpu" else tensor.to(dtype)
                set_module_tensor_to_device(module, name, device, value=tensor, dtype=dtype, clear_cache=False)
                done += _product(info.shape)
                if progress is not None:
                    progress(done, total)
    return module.to(device)  # moves the few buffers (BERT's position numbers)


class _open_tensors:
    """Opens a .safetensors or .bin file; gives a function from a stored name to its tensor."""

    def __init__(self, file: Path, device: torch.device | str) -> None:
        self.file, self.device = file, device

    def __enter__(self) -> Callable[[str], torch.Tensor]:
        if self.file.suffix == ".bin":
            self.handle = None
            return read_bin(self.file).__getitem__
        from safetensors import SafetensorError, safe_open

        try:
            self.handle = safe_open(str(self.file), framework="pt", device=str(self.device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} cannot be opened ({first_line(error)}); download it again.") from None
        self.handle.__enter__()
        return self.handle.get_tensor

    def __exit__(self, *exception: object) -> None:
        if self.handle is not None:
            self.handle.__exit__(None, None, None)


def _check_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    import torch

    low, high = torch.aminmax(tensor)  # NaN wins in both, without a mask in memory
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(f"{file}: tensor {name} holds NaN or infinity; the file is damaged, download it again.")
