"""Inline assembly under Triton's interpreter, which has none: the few instructions of the kernels' forms for cards, in
NumPy. What a card approximates (tanh, powers, reciprocals) is exact here, and subnormals stay.

Registers are 32 bits, those of 16 their low half. Arrays are of elements, or, for products, of the lanes of one warp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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


def _mma(left: list[Bits], right: list[Bits], begin: list[Bits]) -> list[Bits]:
    """mma.sync.m16n8k16 in fp16: 16 x 16 by 16 x 8, one rounding. Lanes 4 g + t have rows g and g + 8, columns 2 t and
    the next, of the right operand the other way round."""

    def tile(word: Bits) -> NDArray[np.float64]:
        """8 x 8: a word of each lane, row g."""
        return np.moveaxis(_halves(word).reshape(2, 8, 4), 0, 2).reshape(8, 8)

    a = np.block([[tile(left[0]), tile(left[2])], [tile(left[1]), tile(left[3])]])
    b = np.concatenate([tile(word).T for word in right])
    c = a @ b + np.concatenate([tile(word) for word in begin])
    return [_word(*np.moveaxis(half.reshape(32, 2), 1, 0)) for half in np.split(c, 2)]


def _of_quads(x: Bits, lanes: Bits, *_: Bits) -> Bits:
    """shfl.bfly: what the lane has whose number differs in these bits."""
    return x[np.arange(len(x)) ^ int(lanes[0])]


INSTRUCTIONS: dict[str, Callable[..., Bits]] = {
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "fma.rn.f32": lambda a, b, c: _bits(_float(a) * _float(b) + _float(c)),
    "mul.rn.f32": lambda a, b: _bits(_float(a) * _float(b)),
    "mul.rn.f16x2": _on_halves(lambda a, b: a * b),
    "tanh.approx.f16x2": _on_halves(np.tanh),
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
    "add.f32": lambda a, b: _bits(_float(a) + _float(b)),
    "max.f32": lambda a, b: _bits(np.fmax(_float(a), _float(b))),
    "sub.f32": lambda a, b: _bits(_float(a) - _float(b)),
    "neg.f32": lambda a: _bits(-_float(a)),
    "lg2.approx.f32": lambda a: _bits(np.log2(_float(a))),
    "setp.gt.f32": lambda a, b: _float(a) > _float(b),
    "setp.gt.or.f32": lambda a, b, c: (_float(a) > _float(b)) | c,
    "vote.sync.any.pred": lambda a, _: np.full_like(a, a.any()),
    "shfl.sync.bfly.b32": _of_quads,
    "mov.b32": lambda x: x,
}


def run(assembly: str, operands: list[Bits], outputs: int = 1, tied: Mapping[int, int] | None = None) -> list[Bits]:
    """What $0 and the next ``outputs`` hold in the end; ``operands`` follow them. ``tied``: outputs that begin as an
    operand. A branch, which a vote decides, leaves."""
    registers = {f"${outputs + i}": x for i, x in enumerate(operands)}
    registers |= {f"${to}": registers[f"${of}"] for to, of in (tied or {}).items()}

    def value(name: str) -> Bits:
        if not name[0].isdigit():
            return registers[name]
        number = int(name[2:], 16) if name[:2] in ("0f", "0x") else int(name)
        return np.full_like(operands[0], number)

    for line in assembly.strip().strip("{}").split(";"):
        name, _, rest = re.sub(r"^\w+:\s*", "", line.strip()).partition(" ")
        if not name or name in (".reg", "}"):
            continue
        guard = None
        if name[0] == "@":
            guard = registers[name.lstrip("@!")] != (name[1] == "!")
            name, _, rest = rest.partition(" ")
        if name == "bra.uni":
            if guard is None or guard.all():
                break
            continue
        parts = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if name.startswith("mma"):
            to, *of = ([*re.findall(r"\$?\w+", part)] for part in parts)
            registers |= zip(to, _mma(*([value(n) for n in names] for names in of)), strict=True)
        elif parts[0][0] == "{":  # a word is taken apart
            word = value(parts[1])
            low, high = re.findall(r"\w+", parts[0])
            registers[low], registers[high] = word & np.uint32(0xFFFF), word >> np.uint32(16)
        else:
            with np.errstate(all="ignore"):
                found = INSTRUCTIONS[name](*map(value, parts[1:]))
            registers[parts[0]] = found if guard is None else np.where(guard, found, registers[parts[0]])
    return [registers[f"${i}"] for i in range(outputs)]


def install() -> None:
    """From now on the interpreter of this process takes inline assembly."""
    from triton.runtime import interpreter

    def create(builder: Any, assembly: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        assert pack == 1 and len(types) == 1, assembly
        (result,) = run(assembly, [np.ascontiguousarray(x.data).view(np.uint32) for x in values])
        kind = types[0].scalar
        if kind.primitive_bitwidth == 16:
            result = result.astype(np.uint16)
        result = result.view(interpreter._get_np_dtype(kind))

        class Call:
            def get_result(self, index: int) -> Any:
                return interpreter.TensorHandle(result, kind)

        return Call()

    interpreter.InterpreterBuilder.create_inline_asm = create
