"""The formats by name, and putting them in the place of a network's linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import foreign
from .four_bit import Int4WeightLinear, Nf4Linear
from .linear import (
    EightBitLinear,
    Fp8Linear,
    Fp8WeightLinear,
    Int8Linear,
    Int8PlainLinear,
    Int8WeightLinear,
    QuantizedLinear,
    assign,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNQUANTIZED = "bf16"
"""The name under which a recipe leaves a linear as it is."""


@dataclass(frozen=True)
class Format:
    """One of our formats. ``bits`` are those of a weight with its scales, at the DiT's widths."""

    name: str
    kind: type[QuantizedLinear]
    bits: float
    summary: str


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("int8", Int8Linear, 8.0, "int8 weights and activations, rotated by a Hadamard transform"),
        Format("int8-plain", Int8PlainLinear, 8.0, "int8 weights and activations"),
        Format("fp8", Fp8Linear, 8.0, "e4m3 weights and activations"),
        Format("int8-weight", Int8WeightLinear, 8.0, "int8 weights, products in bf16"),
        Format("fp8-weight", Fp8WeightLinear, 8.0, "e4m3 weights, products in bf16"),
        Format("nf4", Nf4Linear, 4.5, "4-bit NormalFloat weights in blocks of 64, products in bf16"),
        Format("int4-weight", Int4WeightLinear, 4.25, "4-bit weights in groups of 128, products in bf16"),
    )
}


def _ours(name: str) -> type[QuantizedLinear]:
    """The class of one of our formats; ValueError for any other name."""
    if name not in FORMATS:
        check_format(name)
        raise ValueError(f"{name} cannot be stored; the formats that can are {', '.join(FORMATS)}.")
    return FORMATS[name].kind


def check_format(name: str) -> None:
    """Raises ValueError for what is no format, ours, torchao's or bitsandbytes'."""
    if name == UNQUANTIZED or name in FORMATS:
        return
    if foreign.is_foreign(name):
        foreign.check(name)
        return
    raise ValueError(f"The format {name!r} is unknown; choose one of {', '.join([UNQUANTIZED, *FORMATS])}, "
                     f"or for comparison {', '.join(foreign.names())}.")  # fmt: skip


def kinds_of(names: Iterable[str]) -> set[str]:
    """The kinds of operands (int8, fp8) that linears in these formats multiply in 8 bits."""
    classes = (FORMATS[name].kind for name in names if name in FORMATS)
    return {found.kind for found in classes if issubclass(found, EightBitLinear)}


def is_storable(name: str) -> bool:
    """Whether a format can be written to a file."""
    return name == UNQUANTIZED or name in FORMATS


def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight ``[N, K]`` in one of our formats, by the names that follow the module's.

    Raises:
        ValueError: the weight is not a matrix of fp32, bf16, fp16 or fp64 numbers, or the format is none of ours.
    """
    kind = _ours(name)
    if weight.ndim != 2 or weight.dtype not in FLOATS or weight.numel() == 0:
        raise ValueError(f"Only a matrix of floats can be quantized, not {list(weight.shape)} in {weight.dtype}.")
    return kind.quantize(weight.float() if weight.dtype == torch.float64 else weight)


def stored(name: str, in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of the tensors of a linear in one of our formats, without the bias.

    Raises:
        ValueError: the format is none of ours.
    """
    return dict(_ours(name).layout(in_features, out_features))


def install(module: nn.Module, formats: Mapping[str, str], dtype: torch.dtype) -> None:
    """Puts empty quantized linears (on the meta device) in the place of ``nn.Linear`` modules, by path -> format.

    Formats of other packages are left out: they are made from a loaded linear (:func:`solostep.quant.foreign.convert`).

    Raises:
        ValueError: a path is not a linear of the module, or a format is unknown; the module is as it was then.
    """
    made = {}
    for path, name in formats.items():
        if name == UNQUANTIZED or foreign.is_foreign(name):
            continue
        try:
            linear = module.get_submodule(path)
        except AttributeError:
            linear = None
        if not path or not isinstance(linear, nn.Linear):
            raise ValueError(f"{path or 'The whole network'} is not a linear layer inside this network.")
        made[path] = _ours(name)(linear.in_features, linear.out_features, linear.bias is not None, dtype)
    for path, linear in made.items():
        module.set_submodule(path, linear.eval())


def quantize_linear(linear: nn.Linear, name: str) -> nn.Module:
    """A loaded linear in any format, ours or another package's; the linear itself is left as it is (ours)."""
    if name == UNQUANTIZED:
        return linear
    if foreign.is_foreign(name):
        return foreign.convert(linear, name)
    made = _ours(name)(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
    assign(made, quantize(name, linear.weight.detach()))
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made.eval()
