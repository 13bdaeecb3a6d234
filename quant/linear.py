"""Linear layers with 8-bit weights: what they store, how a weight becomes that, and what they compute.

Every tensor is an ordinary parameter (``weight``, ``weight_scale``, ``bias``), so whatever moves a module's bytes can
move these. Scales are computed in fp32, one for each output channel; activations get one for each token, on the fly.

| format | weight | activation | relative L2 error of a product, N(0,1) | memory beside the weights |
|---|---|---|---|---|
| int8 | int8, rotated | int8, rotated | 1.3e-2, whatever the data | M K bytes |
| int8-plain | int8 | int8 | 1.3e-2; 6e-2 where channels have outliers | M K bytes |
| fp8 | e4m3 | e4m3 | 3.7e-2, whatever the data | M K bytes |
| int8-weight | int8 | as it comes | 9e-3 | 2 N K bytes |
| fp8-weight | e4m3 | as it comes | 2.7e-2 | 2 N K bytes |

Rotated: an orthonormal Walsh-Hadamard transform H over groups of 256 input channels, after a sign for each. x W^T =
(x D H)(W D H)^T, so it is folded into the weight offline; on x it spreads an outlier over its group (QuaRot, Ashkboos
et al. 2024). The signs are such that a mean is spread too: without them, inputs after GELU would err by 2.4e-2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.quantize import quantize_rows, rotate, unrotate
from ..kernels.scaled_mm import NOTHING, After, scaled_mm_fp8, scaled_mm_int8

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""The tensors of a format: name -> (shape, type)."""

MAX_GROUP = 256
RANGES = (0.97, 0.93)
"""Parts of its whole range that a row of int8 weights tries: finer steps for all can be worth more than a few largest
values. The error is smaller by 1.5 % at K = 6144 and by 4 % at K = 24576; the price is paid once, in quantizing."""


class QuantizedLinear(nn.Module):
    """x ``[..., K]`` -> ``[..., N]`` with a quantized weight; the base of every format.

    Its parameters are made without memory (on the meta device); :meth:`quantize` gives their values.
    """

    storable: ClassVar[bool] = True
    """Whether the tensors can be written to a file and read again."""
    activation: ClassVar[torch.dtype | None] = None
    """The 8-bit type that rows of the activation are quantized to; None if the product takes them as they come."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        for name, (shape, kind) in self.layout(in_features, out_features).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=kind, device="meta"), requires_grad=False)
            )
        value = torch.empty(out_features, dtype=dtype, device="meta") if bias else None
        self.bias = None if value is None else nn.Parameter(value, requires_grad=False)

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        """Names, shapes and types of the stored tensors, without the bias."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight ``[N, K]``, on its device. Computed in fp32."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The weight ``[N, K]`` that the layer stands for, fp32, not rotated."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The product in the activation's type, by way of a weight in it; formats with 8-bit products do their own."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.compute_weight(x.dtype), bias)

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight in the type that a product is computed in."""
        return self.dequantized().to(dtype)

    def channels(self, start: int, stop: int) -> dict[str, Tensor]:
        """Views of the stored tensors that make the output channels ``start`` ... ``stop``, without the bias.

        Raises:
            ValueError: they share bytes or scales with other channels.
        """
        return {name: getattr(self, name)[start:stop] for name in self.layout(self.in_features, self.out_features)}

    @property
    def rotated_together(self) -> int:
        """Channels of the activation that are rotated together before they are quantized; 1 for none."""
        return 1

    def product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype, after: After = NOTHING) -> Tensor:
        """The product of rows that are quantized already, in ``activation`` with their scales ``[M]``; and what follows
        it (see kernels/scaled_mm.py)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves between devices; ``module.to(dtype)`` leaves quantized weights and their scales in their types."""

        def careful(t: Tensor) -> Tensor:
            asked = t if t is self.bias else fn(t.new_empty(0))  # an empty one: no float copy of the weight
            return fn(t) if asked.dtype == t.dtype or t is self.bias else t.to(asked.device)

        super()._apply(careful, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """As any module's, but a tensor of another format is an error: copying it would cast it to nonsense."""
        for name in self.layout(self.in_features, self.out_features):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if given is not None and given.dtype != own.dtype:
                error_msgs.append(f"{prefix}{name} is {given.dtype} and has to be {own.dtype}.")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def row_chunks(weight: Tensor, elements: int = 1 << 24) -> Iterator[Tensor]:
    """Rows of a weight, a few at a time: quantizing makes several fp32 copies of what it works on."""
    return iter(weight.split(max(1, elements // max(1, weight.shape[1]))))


def _quantize_weight(weight: Tensor, dtype: torch.dtype, group: int = 1) -> dict[str, Tensor]:
    """Rows with a scale each; an int8 row takes, of the ranges in RANGES, the one with the least squared error."""
    parts = []
    for rows in row_chunks(weight):
        y = rotate(rows, group)
        q, scale = quantize_rows(y, dtype)
        if dtype == torch.int8:
            q, scale = _best_range(y, q, scale)
        parts.append((q, scale))
    q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"weight": q, "weight_scale": scale}


def _best_range(y: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    error, amax = _squared_error(y, q, scale), y.abs().amax(1, keepdim=True)
    for part in RANGES:
        other, its_scale = quantize_rows(y.clamp(-amax * part, amax * part), q.dtype)
        its_error = _squared_error(y, other, its_scale)
        better = its_error < error
        q, scale = torch.where(better[:, None], other, q), torch.where(better, its_scale, scale)
        error = torch.where(better, its_error, error)
    return q, scale


def _squared_error(y: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(y, q.float(), scale[:, None], value=-1).square_().sum(1)


def _row_scaled(in_features: int, out_features: int, dtype: torch.dtype) -> Layout:
    return {"weight": ((out_features, in_features), dtype), "weight_scale": ((out_features,), torch.float32)}


def rotation_group(channels: int) -> int:
    """Channels that are rotated together: the largest power of two that divides them, at most 256."""
    return min(channels & -channels, MAX_GROUP)


class EightBitLinear(QuantizedLinear):
    """W8A8: the base of the formats whose products are of 8-bit rows."""

    kind: ClassVar[str]
    """Of the products' operands, as kernels/scaled_mm.py calls it."""
    products: Sequence[str] | None = None
    """The back ends that may compute the product, the best first; None: all that are to be had. See use_products()."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.activation is not None
        q, scale = quantize_rows(_rows(x), self.activation, self.rotated_together)
        return self.product(q, scale, x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Linear(EightBitLinear):
    """W8A8 on INT8 tensor cores (sm_80 and up), rotated."""

    activation = torch.int8
    kind = "int8"
    rotated: ClassVar[bool] = True

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        return _row_scaled(in_features, out_features, torch.int8)

    @classmethod
    def group(cls, in_features: int) -> int:
        return rotation_group(in_features) if cls.rotated else 1

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        return _quantize_weight(weight, torch.int8, cls.group(weight.shape[1]))

    def dequantized(self) -> Tensor:
        return unrotate(self.weight.float() * self.weight_scale[:, None], self.group(self.in_features))

    @property
    def rotated_together(self) -> int:
        return self.group(self.in_features)

    def product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype, after: After = NOTHING) -> Tensor:
        operands = rows, self.weight, scale, self.weight_scale, self.bias
        return scaled_mm_int8(*operands, dtype, after, backends=self.products)


class Int8PlainLinear(Int8Linear):
    """W8A8 without the rotation, for inputs that it does not help (after GELU)."""

    rotated: ClassVar[bool] = False


class Fp8Linear(EightBitLinear):
    """W8A8 in e4m3 on FP8 tensor cores (sm_89 and up); on older cards the product runs in bf16."""

    activation = torch.float8_e4m3fn
    kind = "fp8"

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        return _row_scaled(in_features, out_features, torch.float8_e4m3fn)

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        return _quantize_weight(weight, torch.float8_e4m3fn)

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.weight_scale[:, None]

    def product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype, after: After = NOTHING) -> Tensor:
        operands = rows, self.weight, scale, self.weight_scale, self.bias
        return scaled_mm_fp8(*operands, dtype, after, backends=self.products)


class Int8WeightLinear(QuantizedLinear):
    """8-bit weights only. An int8 is exact in bf16; what the product sees is q * scale, rounded to its type."""

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        return _row_scaled(in_features, out_features, torch.int8)

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        return _quantize_weight(weight, torch.int8)

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.weight_scale[:, None]

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        # One pass without an fp32 copy: the product of two types is computed in fp32 and rounded once.
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight, self.weight_scale[:, None], out=out)


class Fp8WeightLinear(Int8WeightLinear):
    """e4m3 weights only."""

    @classmethod
    def layout(cls, in_features: int, out_features: int) -> Layout:
        return _row_scaled(in_features, out_features, torch.float8_e4m3fn)

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        return Fp8Linear.quantize(weight)

    def compute_weight(self, dtype: torch.dtype) -> Tensor:
        # torch promotes no float8: e4m3 is exact in bf16 and fp32, so the scale is what is rounded with.
        weight = self.weight.to(dtype)
        return torch.mul(weight, self.weight_scale[:, None], out=weight)


def product_kinds(module: nn.Module) -> set[str]:
    """The kinds of operands that a network's linears multiply in 8 bits."""
    return {part.kind for part in module.modules() if isinstance(part, EightBitLinear)}


def use_products(module: nn.Module, products: Mapping[str, Sequence[str]]) -> None:
    """Tells a network's linears which back ends may compute their products, by the kind of operands, the best first.
    Those of a kind that is not named take what is to be had."""
    for part in module.modules():
        if isinstance(part, EightBitLinear):
            part.products = products.get(part.kind)


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of a module's parameters, without a copy.

    Raises:
        ValueError: a shape or type that is not the parameter's.
    """
    for name, tensor in tensors.items():
        own = cast(Any, module)._parameters[name]
        if own.shape != tensor.shape or (own.dtype != tensor.dtype and name != "bias"):
            raise ValueError(
                f"{name} is {list(tensor.shape)} in {tensor.dtype} and has to be {list(own.shape)} in {own.dtype}."
            )
        cast(Any, module)._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def narrowed(linear: nn.Module, start: int, stop: int) -> nn.Module:
    """A linear that gives the output channels ``start`` ... ``stop`` of another one, for use at once: its tensors are
    views of what the other's are now. Making it takes some 40 microseconds.

    Raises:
        ValueError: channels that there are not or that cannot be had alone, or a layer of another package.
    """
    ours = isinstance(linear, QuantizedLinear)
    # torchao keeps nn.Linear and puts a subclass of Tensor into it.
    if not ours and (type(linear) is not nn.Linear or type(linear.weight) not in (nn.Parameter, Tensor)):
        weight = type(getattr(linear, "weight", None)).__name__
        raise ValueError(
            f"A {type(linear).__name__} with a {weight} gives all of its channels or none: head groups are not "
            "possible with it."
        )
    whole = cast("nn.Linear | QuantizedLinear", linear)
    if not 0 <= start < stop <= whole.out_features:
        raise ValueError(f"Channels {start} ... {stop} are not among the {whole.out_features} of the layer.")
    parts = cast(QuantizedLinear, linear).channels(start, stop) if ours else {"weight": whole.weight[start:stop]}
    parts["bias"] = cast(Tensor, None if whole.bias is None else whole.bias[start:stop])
    made = copy.copy(whole)
    made.__dict__["_parameters"] = parts  # the copy shares it with the other
    made.out_features = stop - start
    return made
