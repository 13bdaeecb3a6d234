"""Tensors on their way from a file to their place in a network: read, checked, cast or quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..offload.reader import Extent, ReadError, read_tensors
from ..quant import foreign
from ..quant.formats import FORMATS, install, quantize
from ..quant.linear import QuantizedLinear, assign
from .errors import CheckpointError, SolostepError
from .headers import TensorInfo, read_bin, read_header, torch_type


def read_infos(infos: Sequence[TensorInfo], device: torch.device) -> Iterator[Tensor]:
    """Stored tensors on ``device``, in the order of ``infos``; fastest in the order of the files.

    Raises:
        CheckpointError: a file is not what it was when its header was read, ends early, or cannot be read.
    """
    files = {info.file for info in infos}
    if any(file.suffix == ".bin" for file in files):
        states = {file: read_bin(file) for file in files}
        for info in infos:
            # A mapped tensor would share the file's pages; the copy owns its memory and outlives the file.
            yield states[info.file][info.stored_name].to(device, copy=True)
        return
    now = {file: read_header(file) for file in files}
    for info in infos:
        if now[info.file].get(info.stored_name) != info:
            raise CheckpointError(
                f"{info.file} changed after it was checked; wait until it is written, and start again."
            )
    extents = [Extent(info.file, info.offset, info.shape, torch_type(info.dtype)) for info in infos]
    try:
        yield from read_tensors(extents, device)
    except ReadError as error:
        raise CheckpointError(f"{error}; if nothing else writes it, download it again.") from None


class Placer:
    """Fills a network on the meta device, tensor by tensor. What a recipe quantizes is float for a moment only.

    Args:
        formats: the format of each linear that is quantized as it arrives, by its path in ``module``.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype, formats: Mapping[str, str]) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self.formats = formats
        install(module, formats, dtype)
        self.checks = Checks(device)
        for part in module.modules():  # few and small (BERT's position numbers)
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)

    def place(self, name: str, info: TensorInfo, tensor: Tensor) -> None:
        """Takes a tensor, which the caller lets go of.

        Raises:
            SolostepError: a format of another package refuses the layer.
        """
        path, _, leaf = name.rpartition(".")
        owner: Any = self.module.get_submodule(path)
        form = self.formats.get(path, "")
        if form in FORMATS and leaf == "weight":
            self.checks.add(info, tensor, stays=False)
            # From the type of the file, as a converter does it; every kernel takes fp32.
            assign(owner, quantize(form, tensor.float() if tensor.dtype == torch.float64 else tensor))
        else:
            is_quantized = isinstance(owner, QuantizedLinear) and leaf != "bias"
            self.checks.add(info, tensor, stays=is_quantized or tensor.dtype == self.dtype)
            value = tensor if is_quantized else tensor.to(self.dtype)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        if foreign.is_foreign(form) and not any(p.is_meta for p in owner.parameters()):
            try:
                self.module.set_submodule(path, foreign.convert(cast(nn.Linear, owner), form))
            except ValueError as error:
                raise SolostepError(f"{path}: {str(error).removesuffix('.')}; choose another --precision.") from None

    def check(self, file: Path) -> None:
        """Raises CheckpointError if a tensor placed since the last check holds what is no number."""
        self.checks.finish(file)


class Checks:
    """Looks for NaN and infinity on the device, beside the copies; the host waits once a file, not once a tensor."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.flags: list[tuple[TensorInfo, Tensor]] = []

    def add(self, info: TensorInfo, tensor: Tensor, stays: bool) -> None:
        """Looks at a tensor; one that ``stays`` in memory may be looked at later, while the next is copied."""
        if tensor.numel() == 0 or tensor.dtype in (torch.int8, torch.uint8):
            return  # every value of these is a number
        if self.stream is None or not stays:
            self.flags.append((info, _is_bad(tensor, info.stored_name)))
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.flags.append((info, _is_bad(tensor, info.stored_name)))

    def finish(self, file: Path) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        flags, self.flags = self.flags, []
        if not flags:
            return
        bad = torch.stack([flag for _, flag in flags]).tolist()
        for (info, _), is_bad in zip(flags, bad, strict=True):
            if is_bad:
                what = "NaN, infinity or a negative scale" if _is_scale(info.stored_name) else "NaN or infinity"
                raise CheckpointError(
                    f"{file}: tensor {info.stored_name} holds {what}; the file is damaged, download it again."
                )


def _is_scale(name: str) -> bool:
    return name.endswith(".weight_scale")


def _is_bad(tensor: Tensor, name: str) -> Tensor:
    """Whether a tensor holds what no weight can be, as a flag on its device; no mask in memory.

    A scale of zero is right for a row of zeros; a negative one is not.
    """
    if tensor.dtype == torch.float8_e4m3fn:  # no infinity; NaN is 0x7f or 0xff, the largest byte of its sign
        return (tensor.view(torch.int8).amax() == 0x7F) | (tensor.view(torch.uint8).amax() == 0xFF)
    low, high = torch.aminmax(tensor)  # NaN wins in both
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    return bad | (low < 0) if _is_scale(name) else bad
