"""Tensors on their way from a file to their place in a network: read, checked, cast or quantized."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..offload.reader import Extent, ReadError, read_tensors
from ..quant import foreign
from ..quant.formats import FORMATS, install, quantize
from ..quant.linear import QuantizedLinear, assign
from .errors import CheckpointError, SolostepError
from .headers import TensorInfo, read_bin, read_header, torch_type


def read_infos(infos: Sequence[TensorInfo], device: torch.device) -> Generator[Tensor, None, None]:
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


Homes = Callable[[nn.Module], Mapping[str, Tensor | None]]
"""From a network without memory to the places of some of its parameters, by name; see :func:`.weights.load`."""


class Placer:
    """Fills a network on the meta device, tensor by tensor. What a recipe quantizes is float for a moment only.

    Args:
        formats: the format of each linear that is quantized as it arrives, by its path in ``module``.
        homes: called once, with ``module`` as it will be, but for its memory.

    Raises:
        SolostepError: a home for a layer in a format of another package.
        ValueError: a home of no parameter, or of another shape or type.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, dtype: torch.dtype, formats: Mapping[str, str],
        homes: Homes | None = None,
    ) -> None:  # fmt: skip
        self.module, self.device, self.dtype = module, device, dtype
        self.formats = formats
        install(module, formats, dtype)
        for part, name, parameter in _floats(module):
            if parameter.dtype != dtype:
                empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        self.empty = {part: dict(part._parameters) for part in module.modules() if part._parameters}
        """What :meth:`drop` goes back to."""
        self.converted: dict[str, nn.Module] = {}
        self.homes = {} if homes is None else dict(homes(module))
        self._check_homes()
        self.checks = Checks(device)
        for part in module.modules():  # few and small (BERT's position numbers)
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)

    def _check_homes(self) -> None:
        own = dict(self.module.named_parameters()) if self.homes else {}
        for name, home in self.homes.items():
            if name not in own:
                raise ValueError(f"{name} is no parameter of this network and cannot have a home.")
            path = name.rpartition(".")[0]
            form = self.formats.get(path, "")
            if foreign.is_foreign(form):
                raise SolostepError(
                    f"{path}: {form} keeps its weights where they are made and they cannot leave the device; "
                    "choose another --precision."
                )
            if home is not None and (home.shape, home.dtype) != (own[name].shape, own[name].dtype):
                raise ValueError(
                    f"The home of {name} is {list(home.shape)} in {home.dtype} and has to be "
                    f"{list(own[name].shape)} in {own[name].dtype}."
                )

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
            names = [f"{path}.{own}" for own in owner._parameters if own != "bias"]
            if any(self._is_kept(own) for own in names):
                # From the type of the file, as a converter does it; every kernel takes fp32.
                assign(owner, quantize(form, tensor.float() if tensor.dtype == torch.float64 else tensor))
            for own in names:
                self._send_home(owner, own)
        else:
            is_quantized = isinstance(owner, QuantizedLinear) and leaf != "bias"
            stays = name not in self.homes and (is_quantized or tensor.dtype == self.dtype)
            self.checks.add(info, tensor, stays=stays)
            if self._is_kept(name):
                value = tensor if is_quantized else tensor.to(self.dtype)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            self._send_home(owner, name)
        if foreign.is_foreign(form) and not any(p.is_meta for p in owner.parameters()):
            try:
                made = foreign.convert(cast(nn.Linear, owner), form)
            except ValueError as error:
                raise SolostepError(f"{path}: {str(error).removesuffix('.')}; choose another --precision.") from None
            if made is not owner:
                self.module.set_submodule(path, made)
                self.converted[path] = owner
                owner._parameters.update(self.empty[owner])  # its float weight goes

    def _is_kept(self, name: str) -> bool:
        """Whether a parameter gets a value: one whose home is None is read only to be checked."""
        return name not in self.homes or self.homes[name] is not None

    def _send_home(self, owner: Any, name: str) -> None:
        """Moves a parameter of ``owner``, named as in the network, from the device to its home, if it has one."""
        home, leaf = self.homes.get(name), name.rpartition(".")[2]
        if home is None:
            return
        # With gaps or in another order a copy goes through a temporary, whose second half would not wait for the first.
        home.copy_(owner._parameters[leaf], non_blocking=home.is_contiguous())
        owner._parameters[leaf] = nn.Parameter(home, requires_grad=False)

    def check(self) -> None:
        """Raises CheckpointError if a tensor placed since the last check holds what is no number."""
        self.checks.finish()

    def finish(self) -> None:
        """Waits until everything is in its home."""
        if self.homes and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def drop(self) -> None:
        """Takes all parameters back, to the meta device."""
        for path, linear in self.converted.items():
            self.module.set_submodule(path, linear)
        self.converted.clear()
        for part, parameters in self.empty.items():
            part._parameters.update(parameters)


def _floats(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters that come in the network's own type: their module, their name in it, and themselves."""
    for part in module.modules():
        exact = isinstance(part, QuantizedLinear)
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not exact or name == "bias":
                yield part, name, parameter


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

    def finish(self) -> None:
        """Waits for all flags.

        Raises:
            CheckpointError: names the first tensor, and its file, that is bad.
        """
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
                    f"{info.file}: tensor {info.stored_name} holds {what}; the file is damaged, download it again."
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
