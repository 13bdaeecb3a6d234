"""What a number format does to one block: each linear on its real input, and the block with only this one quantized.

A block in bf16 rounds after every operation, and a small change anywhere rolls all of these dice again: on the demo
model that moves a block's output by 0.5 % whatever the change was, which would hide int8 (0.1 to 0.5 %). So the error
that a format makes is taken on the real input, as the block runs, and what this error does to the block's output is
followed in fp32 (TF32 products on CUDA). There the squares of the linears' effects add up to within a few percent.
What bf16 does to a linear's output is measured likewise, as a format among the others.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.foreign import is_foreign
from ..quant.formats import UNQUANTIZED, quantize_linear
from .choices import use_right_products
from .errors import SolostepError


def quantized(path: str, linear: nn.Module, name: str) -> nn.Module:
    """A loaded linear in a format; the linear itself stays as it is.

    Raises:
        SolostepError: a format of another package refuses it on this device.
    """
    assert isinstance(linear, nn.Linear)
    if name == UNQUANTIZED:
        return InType(linear, torch.bfloat16)
    try:
        # Another package's converter takes the linear that it is given apart.
        made = quantize_linear(copy.deepcopy(linear) if is_foreign(name) else linear, name)
    except ValueError as error:
        raise SolostepError(f"{path}: {str(error).removesuffix('.')}; choose other --formats.") from None
    use_right_products(made, linear.weight.device)
    return made


def relative_square(value: Tensor, reference: Tensor, size: Tensor | None = None) -> Tensor:
    """|value - reference|^2 / |size|^2, in fp32; ``size`` is by default the reference."""
    of = reference if size is None else size
    error = torch.linalg.vector_norm(value.float() - reference.float())
    return (error / torch.linalg.vector_norm(of.float()).clamp_min(1e-30)).square()


class InType(nn.Module):
    """A module that computes in another type; its output stays in that type, or is cast to ``out``.

    The tables of a rotary embedding keep their values: what shows is the rounding of the module's own arithmetic.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, out: torch.dtype | None = None) -> None:
        super().__init__()
        same = next(module.parameters()).dtype == dtype
        self.module = module if same else copy.deepcopy(module).to(dtype)
        self.dtype, self.out = dtype, out

    def forward(self, *args: Any) -> Tensor:
        made = self.module(*cast_floats(args, self.dtype))
        return made if self.out is None else made.to(self.out)


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(cast_floats(v, dtype) for v in value) if isinstance(value, tuple) else value


class _Tap(nn.Module):
    """A linear that remembers its input and output, or gives an output that it was told."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.calls: list[_Tap] | None = None
        self.told: Tensor | None = None
        self.given = self.made = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.told is not None:
            return self.told
        out = self.linear(x)
        if self.calls is not None:
            self.given, self.made = x, out
            self.calls.append(self)
        return out


@contextlib.contextmanager
def _tapped(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Tap]]:
    """Puts taps in the place of linears for a while."""
    taps = {name: _Tap(block.get_submodule(name)) for name in names}
    try:
        for name, tap in taps.items():
            block.set_submodule(name, tap)
        yield taps
    finally:
        for name, tap in taps.items():
            block.set_submodule(name, tap.linear)


@contextlib.contextmanager
def _fast_products() -> Iterator[None]:
    """TF32 on CUDA: its rounding is an eighth of bf16's, and nothing between the products is rounded to it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Probe(nn.Module):
    """A block that measures its linears on the rows that go through it, and gives what the block itself gives.

    Linears called before the one that is looked at are not computed again: they give what they gave. Memory: the block
    in both types, the quantized linears of all formats, and all linears' outputs for one row in both types (66 d bytes
    a token for the DiT).

    Args:
        names: the linears, by their path in the block.
        rows: on which rows to measure; the others just pass.
        done: called after each row.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        names: Sequence[str],
        formats: Sequence[str],
        rows: Sequence[int],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.block, self.names, self.rows, self.done = block, names, set(rows), done
        self.wide: InType | None = InType(block, torch.float32)
        self.narrow: InType | None = InType(block, torch.bfloat16)
        self.formats = [*formats] + [UNQUANTIZED] * (UNQUANTIZED not in formats)
        self.variants = {
            n: {f: quantized(f"{prefix}.{n}", block.get_submodule(n), f) for f in self.formats} for n in names
        }
        self.row = 0
        self.measured = 0
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.floor_sum: Tensor | float = 0.0
        self.tokens = dict.fromkeys(names, 0)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.row in self.rows:
            with _tapped(self.block, self.names) as taps:
                calls: list[_Tap] = []
                for tap in taps.values():
                    tap.calls = calls
                out = self.block(x, *args)
                given = {name: tap.given for name, tap in taps.items()}
            self._measure(given, x, args)
            self.measured += 1
        else:
            out = self.block(x, *args)
        self.row += 1
        self.done()
        return out

    def _measure(self, given: Mapping[str, Tensor], x: Tensor, args: Sequence[Any]) -> None:
        """``given``: the real input of each linear."""
        wide_args = cast_floats((x, *args), torch.float32)
        assert self.wide is not None and self.narrow is not None
        block = self.wide.module
        with _tapped(block, self.names) as taps, _fast_products():
            calls: list[_Tap] = []
            for tap in taps.values():
                tap.calls = calls
            out = block(*wide_args)
            update = out - wide_args[0]
            self.floor_sum = self.floor_sum + relative_square(self.narrow(x, *args), out, update).double()
            for tap in taps.values():
                tap.calls = None
            names = {id(tap): name for name, tap in taps.items()}
            for i, tap in enumerate(calls):
                name = names[id(tap)]
                self.tokens[name] += given[name].numel() // given[name].shape[-1]
                for earlier in calls[:i]:
                    earlier.told = earlier.made
                self._measure_linear(name, tap, given[name], lambda: block(*wide_args), out, update)
                tap.told = None

    def _measure_linear(
        self, name: str, tap: _Tap, given: Tensor, again: Callable[[], Tensor], out: Tensor, update: Tensor
    ) -> None:
        exact = _exact_product(tap.linear, given)
        for form, variant in self.variants[name].items():
            made = variant(given)
            # Only the format's own error: the linear's input in the fp32 block differs from the real one by roundings.
            tap.told = tap.made + (made.float() - exact)
            changed = again()
            errors = [
                relative_square(made, exact),
                relative_square(changed, out, update),
                relative_square(changed, out),
            ]
            self.sums[name, form] = torch.stack(errors).double() + self.sums.get((name, form), 0.0)

    def results(self) -> dict[tuple[str, str], list[float]]:
        """Root mean squares over the measured rows: (linear, format) -> errors of output, update and stream."""
        return {key: (total / self.measured).sqrt().tolist() for key, total in self.sums.items()}

    def release(self) -> None:
        """Lets go of what was made beside the block: whoever runs the blocks may hold this one until the next."""
        self.variants = {}
        self.wide = self.narrow = None

    @property
    def floor(self) -> float:
        """Error of the whole block in bf16, relative to what it adds."""
        return float((self.floor_sum / self.measured) ** 0.5)


def _exact_product(linear: nn.Module, x: Tensor) -> Tensor:
    """In fp32; TF32 is exact for what comes from bf16, and is not used for the rest."""
    assert isinstance(linear, nn.Linear)
    fast = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = fast and x.dtype == torch.bfloat16
    try:
        return linear(x.float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = fast


class Mixed(nn.Module):
    """A block for rows of several mixes: the first ``rows`` rows run in the first mix, and so on.

    Args:
        mixes: for each, the format of every quantized linear by its path in the block; bf16 is an empty one.
    """

    def __init__(self, block: nn.Module, prefix: str, mixes: Sequence[Mapping[str, str]], rows: int) -> None:
        super().__init__()
        self.block, self.rows, self.row = block, rows, 0
        made: dict[tuple[str, str], nn.Module] = {}
        self.mixes: list[dict[str, nn.Module]] = []
        for mix in mixes:
            for name, form in mix.items():
                if (name, form) not in made:
                    made[name, form] = quantized(f"{prefix}.{name}", block.get_submodule(name), form)
            self.mixes.append({name: made[name, form] for name, form in mix.items()})

    def forward(self, *args: Any) -> Tensor:
        mix = self.mixes[self.row // self.rows]
        self.row += 1
        own = {name: self.block.get_submodule(name) for name in mix}
        try:
            for name, linear in mix.items():
                self.block.set_submodule(name, linear)
            return self.block(*args)
        finally:
            for name, linear in own.items():
                self.block.set_submodule(name, linear)
            if self.row == self.rows * len(self.mixes):
                self.mixes.clear()  # whoever runs the blocks may hold this one until the next
