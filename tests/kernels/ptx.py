"""Inline assembly under Triton's interpreter, which has none: the few instructions of the kernels' forms for cards, in
NumPy. What a card approximates (tanh, powers, reciprocals) is exact here, and subnormals stay.

One element at a time (pack 1); registers are 32 bits, those of 16 their low half.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bits = NDArray[np.uint32]


def _float(bits: Bits) -> NDArray[np.float64]:
    return bits.view(np.float32).astype(np.float64)


def _bits(x: NDArray[Any]) -> Bits:
    return np.ascontiguousarray(x.astype(np.float32)).view(np.uint32)


def _halves(bits: Bits) -> NDArray[np.float64]:
    """The low and the high half of words, ``[2, ...]``."""
    pair = np.stack([bits & 0xFFFF, bits >> 16]).astype(np.uint16)
    return pair.view(np.float16).astype(np.float64)


def _word(low: NDArray[Any], high: NDArray[Any]) -> Bits:
    """Two numbers, each rounded once to fp16."""
    low, high = (np.ascontiguousarray(x.astype(np.float16)).view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | (high << np.uint32(16))


def _on_halves(function: Callable[..., NDArray[Any]]) -> Callable[..., Bits]:
    return lambda *words: _word(*function(*map(_halves, words)))


def _permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    """prmt: each digit of the selector names one of the eight bytes of a and b; no signs are copied."""
    word = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for byte in range(4):
        number = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        assert (number < 8).all()
        out |= ((word >> (number.astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32) << (8 * byte)
    return out


def _to_e4m3(high: Bits, low: Bits) -> Bits:
    """Two numbers as the bytes of 16 bits, clipped at 448; NaN stays."""
    pair = torch.from_numpy(np.stack([_float(low), _float(high)])).float().clamp(-448, 448)
    low, high = pair.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)
    return low | (high << np.uint32(8))


def _from_e4m3(pair: Bits) -> Bits:
    both = np.stack([pair & 255, (pair >> 8) & 255]).astype(np.uint8)
    return _word(*torch.from_numpy(both).view(torch.float8_e4m3fn).double().numpy())


INSTRUCTIONS: dict[str, Callable[..., Bits]] = {
    "add.rn.f16x2": _on_halves(lambda a, b: a + b),
    "sub.rn.f16x2": _on_halves(lambda a, b: a - b),
    "fma.rn.f16x2": _on_halves(lambda a, b, c: a * b + c),
    "max.NaN.f16x2": _on_halves(np.maximum),
    "cvt.rn.f16x2.f32": lambda high, low: _word(_float(low), _float(high)),
    "cvt.rn.satfinite.e4m3x2.f32": _to_e4m3,
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
    "tanh.approx.f32": lambda x: _bits(np.tanh(_float(x))),
    "ex2.approx.ftz.f32": lambda x: _bits(np.exp2(_float(x))),
    "rcp.approx.ftz.f32": lambda x: _bits(1 / _float(x)),
    "add.ftz.f32": lambda a, b: _bits(_float(a) + _float(b)),
    "prmt.b32": _permute,
    "mov.b32": lambda x: x,
}


def run(assembly: str, operands: list[Bits]) -> Bits:
    """What $0 holds in the end; ``operands`` are $1 and on."""
    registers = {f"${i + 1}": x for i, x in enumerate(operands)}

    def value(name: str) -> Bits:
        number = name[2:] if name[:2] == "0f" else name[2:] if name[:2] == "0x" else None
        return registers[name] if number is None else np.full_like(operands[0], int(number, 16))

    for line in assembly.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        parts = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if parts[0][0] == "{":  # a word is taken apart
            word = value(parts[1])
            low, high = re.findall(r"\w+", parts[0])
            registers[low], registers[high] = word & np.uint32(0xFFFF), word >> np.uint32(16)
        else:
            with np.errstate(all="ignore"):
                registers[parts[0]] = INSTRUCTIONS[name](*map(value, parts[1:]))
    return registers["$0"]


def install() -> None:
    """From now on the interpreter of this process takes inline assembly."""
    from triton.runtime import interpreter

    def create(builder: Any, assembly: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        assert pack == 1 and len(types) == 1, assembly
        result = run(assembly, [np.ascontiguousarray(x.data).view(np.uint32) for x in values])
        kind = types[0].scalar
        if kind.primitive_bitwidth == 16:
            result = result.astype(np.uint16)
        result = result.view(interpreter._get_np_dtype(kind))

        class Call:
            def get_result(self, index: int) -> Any:
                return interpreter.TensorHandle(result, kind)

        return Call()

    interpreter.InterpreterBuilder.create_inline_asm = create
