"""8-bit matrix products with a scale a row and a column, and what follows a product in a network, before it is rounded:

    y = (a @ b^T) * scale_a[:, None] * scale_b + bias;  y = residual + gate * y

`a` is the activation `[M, K]`, `b` the weight `[N, K]`, both int8 or both e4m3 as quantize_rows() makes them. All that
follows the product is fp32 and in this order, each part only if asked for. (GELU does not belong here: in the epilogue
of the FFN's first product it costs an H200 5 ms, in a pass of its own 2.)

Several back ends compute it, and a registry of them says which are to be had where (PRODUCTS). Whether one is right on
a card, and which is the fastest, scaled_mm_check.py measures; the engine keeps that, and passes the names of those that
are right, the fastest first. Operands take the first of them that they fit: the Hopper kernel wants addresses that TMA
has, more than 64 rows, and 16-bit outputs.

int8: the dot product is exact (int32), then one fp32 multiplication by each scale, one addition of the bias, one
rounding; every back end gives the same bits: ``hopper`` (scaled_mm_hopper.py); ``triton``, a plain kernel for every
card and every shape; ``torch`` (_int_mm, and a pass behind it: sums.py); and ``float64``, which is slow and always
there.

fp8: the same two kernels, where the card has e4m3; ``torch`` (_scaled_mm), on the CPU too; and ``bf16``, which cards
without FP8 units have. With fast accumulation Hopper adds in some 14 bits: 2e-3 against exact sums at K = 6,144, 4e-3
at 24,576, where e4m3 itself costs 3.7e-2. Emulated at K = 24,576 (benchmarks/fp8_sums.py), adding to a true fp32 sum
every 16 k-steps of 32 would turn 3.9e-3 with N(0, 1) and 4.2e-3 after GELU into 4e-4, which the 4e-2 of the format
hide; with weights of a common mean besides, whose sums all have one sign, 5.7e-3 into 1e-4, where the format costs
5.9e-3.

On an H200 (700 W, 75,888 rows) the int8 kernel runs at 1,390-1,470 TFLOP/s, cuBLAS at 1,250-1,310 in fp8 and 680-700 in
bf16: the power limit binds, and of the three int8 takes least of it.

Memory: the output; in torch, copies of operands whose K or N is no multiple of 16 (8 for int8) and what it follows up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import block_scaled, cards
from .adaln import gate_residual
from .block_scaled import dot_e4m3
from .quantize import _has_kernel, _jit, warn_once
from .sums import launch_follow

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

MAX_K = 131_071
"""The longest int8 dot product that cannot overflow int32: (2^31 - 1) / 128^2."""
GROUP = 12
"""Rows of tiles that programs walk over together: 12 x 11 tiles are one wave of an H200, and their operands fit L2."""
ROWS = 2048
"""Rows of a product in place of its residual that plain torch follows up at once: it takes 16 bytes a value."""
FEW = 128
"""Rows that are no part of their own behind others: their product may be another kernel's, which rounds otherwise."""


@dataclass(frozen=True)
class After:
    """What follows a product before it is rounded.

    residual ``[M, N]`` with gate ``[N]`` (both or none): residual + gate y, both of the output's type; the result is
    written over the residual.
    """

    residual: Tensor | None = None
    gate: Tensor | None = None


NOTHING = After()


def _scaled(
    product: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, after: After, out_dtype: torch.dtype
) -> Tensor:
    """The epilogue in plain torch; over ``after.residual`` if there is one."""
    y = product * scale_a[:, None] * scale_b
    y = y if bias is None else y + bias.float()
    if after.residual is None or after.gate is None:
        return y.to(out_dtype)
    return after.residual.copy_(after.residual.float() + after.gate.float() * y)


# ---------------------------------------------------------------- int8


def scaled_mm_int8_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING,
) -> Tensor:  # fmt: skip
    """What `scaled_mm_int8` computes, in plain torch."""
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.int8, after)
    return _scaled(_exact_sums(a, b), scale_a, scale_b, bias, after, out_dtype)


def _exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """The int8 product, rounded to fp32."""
    if a.is_cuda:  # fp64 holds these sums exactly; torch._int_mm has rules about shapes there
        return (a.double() @ b.double().t()).float()
    if a.shape[1] == 1:  # on a CPU _int_mm reads past such operands (torch 2.13)
        return a.float() * b.float().t()
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return torch._int_mm(a, b.t()).float()
    if a.shape[1] <= 1024:  # without such instructions _int_mm takes 50 times as long as floats that are exact, too
        return a.float() @ b.float().t()
    return (a.double() @ b.double().t()).float()


@_jit
def _tile(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of tiles: GROUP rows at a time, down each column of the group, then on to the next column."""
    first = tile // (GROUP * columns) * GROUP
    size = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return first + inside % size, inside // size


@_jit
def _scaled_mm_kernel(
    a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, gate_ptr, out_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, APART: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of BM x BN a program, any shape: rows and columns past the end repeat others and are not stored.

    APART: the e4m3 product of each step begins at zero and is added in fp32. Without the last argument of that product
    the compiler would merge the sum back into it. SCALED: by the product of block_scaled.py.
    """
    INT8: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    SUMS: tl.constexpr = tl.int32 if INT8 else tl.float32
    ZERO: tl.constexpr = 0 if INT8 else 0.0
    row, column = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = row * BM + tl.arange(0, BM)
    columns = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), SUMS)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(a_ptrs + start)
            b = tl.load(b_ptrs + start)
        else:
            a = tl.load(a_ptrs + start, mask=(k < K - start)[None, :], other=ZERO)
            b = tl.load(b_ptrs + start, mask=(k < K - start)[:, None], other=ZERO)
        if APART:
            total += tl.dot(a, b, max_num_imprecise_acc=BK)
        elif SCALED:
            total = dot_e4m3(a, b, total)
        else:
            total = tl.dot(a, b, total, out_dtype=SUMS)
    inside = columns < N
    y = total.to(tl.float32) * tl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)[:, None]
    y = y * tl.load(scale_b_ptr + columns, mask=inside, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    keep = (rows < M)[:, None] & inside[None, :]
    if GATED:
        gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(out_ptrs, mask=keep, other=0.0).to(tl.float32) + gate[None, :] * y
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=keep)


def _check(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    dtype: torch.dtype, after: After,
) -> None:  # fmt: skip
    for name, operand in {"a": a, "b": b}.items():
        if operand.dtype != dtype or operand.ndim != 2 or not operand.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix in {dtype}, not {operand.dtype} {list(operand.shape)}, "
                f"strides {operand.stride()}"
            )
    if b.shape[1] != a.shape[1]:
        raise ValueError(f"b must be [N, {a.shape[1]}] for a {list(a.shape)}, not {list(b.shape)}")
    if a.shape[1] < 1 or dtype == torch.int8 and a.shape[1] > MAX_K:
        raise ValueError(f"a must have 1 to {MAX_K} columns, not {a.shape[1]}: longer sums can overflow int32")
    for name, scale, count in (("scale_a", scale_a, len(a)), ("scale_b", scale_b, len(b))):
        if scale.dtype != torch.float32 or scale.shape != (count,) or not scale.is_contiguous():
            raise ValueError(f"{name} must be [{count}] in float32, not {list(scale.shape)} in {scale.dtype}")
    if bias is not None and (bias.shape != (len(b),) or not bias.is_floating_point() or not bias.is_contiguous()):
        raise ValueError(f"bias must be [{len(b)}] in a floating type, not {list(bias.shape)} in {bias.dtype}")
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, not {out_dtype}")
    residual, gate = after.residual, after.gate
    if (residual is None) != (gate is None):
        raise ValueError("residual and gate belong together: give both or none")
    for name, other, shape in (("residual", residual, (len(a), len(b))), ("gate", gate, (len(b),))):
        if other is not None and (other.shape != shape or other.dtype != out_dtype or not other.is_contiguous()):
            raise ValueError(
                f"{name} must be a contiguous {list(shape)} in {out_dtype}, not {list(other.shape)} in {other.dtype}"
            )
    others = {"b": b, "scale_a": scale_a, "scale_b": scale_b, "bias": bias, "residual": residual, "gate": gate}
    for name, other in others.items():
        if other is not None and other.device != a.device:
            raise ValueError(f"{name} must be on {a.device} as a is, not on {other.device}")


def _launch(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor, after: After = NOTHING,
    fast: bool = True, scaled: bool = False,
) -> None:  # fmt: skip
    """The Triton kernel: every card that has the type, every shape. Some 64 KiB of shared memory at most, which all
    cards have."""
    (m, k), n = a.shape, len(b)
    bm = 128 if m > 64 else 64
    tiles = triton.cdiv(m, bm) * triton.cdiv(n, 128)
    _scaled_mm_kernel[(tiles,)](
        a, b, scale_a, scale_b, scale_b if bias is None else bias, out if after.gate is None else after.gate, out,
        m, n, k, BM=bm, BN=128, BK=64, GROUP=GROUP, EVEN=k % 64 == 0, BIAS=bias is not None,
        GATED=after.gate is not None, APART=a.dtype != torch.int8 and not fast, SCALED=scaled, num_warps=8,
        num_stages=4, enable_fp_fusion=False,
    )  # fmt: skip


# ---------------------------------------------------------------- fp8


def scaled_mm_fp8_reference(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING,
) -> Tensor:  # fmt: skip
    """What `scaled_mm_fp8` computes, in plain torch: fp32 sums."""
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.float8_e4m3fn, after)
    return _scaled(a.float() @ b.float().t(), scale_a, scale_b, bias, after, out_dtype)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    if x.shape == (rows, columns):
        return x
    out = torch.zeros(rows, columns, dtype=x.dtype, device=x.device)
    out[: x.shape[0], : x.shape[1]] = x
    return out


# ---------------------------------------------------------------- the back ends


@dataclass(frozen=True)
class Operands:
    """One product, as its caller gave it, checked."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype
    after: After
    fast: bool = True
    """Whether sums of fp8 may be those of Hopper's fast accumulation."""
    place: Tensor | None = None
    """Where the result goes, if not over a residual; not all back ends look at it."""

    def rows(self, start: int, end: int) -> Operands:
        """The product of some rows of ``a``."""
        residual, place = self.after.residual, self.place
        after = self.after if residual is None else After(residual[start:end], self.after.gate)
        place = None if place is None else place[start:end]
        return replace(self, a=self.a[start:end], scale_a=self.scale_a[start:end], after=after, place=place)

    def output(self) -> Tensor:
        """Where the result goes: over the residual, if there is one."""
        if self.after.residual is not None:
            return self.after.residual
        if self.place is not None:
            return self.place
        return torch.empty((len(self.a), len(self.b)), dtype=self.out_dtype, device=self.a.device)


@dataclass(frozen=True)
class Product:
    """One way to compute the products of some kinds of operands."""

    name: str
    kinds: tuple[str, ...]
    available: Callable[[torch.device, str], str | None]
    """(device, kind) -> None if it can be used there, else why not."""
    fits: Callable[[Operands], bool]
    """Whether it takes these operands, where it is available."""
    run: Callable[[Operands], Tensor | None]
    """The product; None if it found that it cannot, before anything was written."""
    slow: bool = False
    """It is there for where nothing else is right, and not worth timing."""
    instead: str = ""
    """What is said once where it is taken: that there is nothing better on this card."""


def _hopper_available(device: torch.device, kind: str) -> str | None:
    return cards.hopper_missing(device, ".scaled_mm_hopper")


def _fits_hopper(x: Operands) -> bool:
    """Whether TMA can address the operands: 16-byte rows and starts."""
    if not x.a.is_cuda or not x.fast or x.out_dtype == torch.float32 or len(x.a) <= 64:
        return False
    placed = [x.a, x.b] if x.after.residual is None else [x.a, x.b, x.after.residual]
    wide = x.a.shape[1] % 16 == 0 and len(x.b) * x.out_dtype.itemsize % 16 == 0
    return wide and all(t.data_ptr() % 16 == 0 for t in placed)


def _hopper(x: Operands) -> Tensor | None:
    from .scaled_mm_hopper import launch_hopper

    out = x.output()
    processors = torch.cuda.get_device_properties(out.device).multi_processor_count
    try:
        with torch.cuda.device(out.device):
            launch_hopper(x.a, x.b, x.scale_a, x.scale_b, x.bias, out, processors, x.after)
    except triton.CompilationError as error:  # Gluon's interface is not settled
        reason = str(error).strip().splitlines()[-1]
        warn_once(f"scaled_mm: the Hopper kernel does not compile for {x.a.dtype}, another instead: {reason}")
        return None
    return out


def by_triton(x: Operands) -> Tensor:
    """The product by the plain Triton kernel."""
    out = x.output()
    scaled = x.fast and x.a.dtype != torch.int8 and block_scaled.is_taken(out.device)
    with torch.cuda.device(out.device):
        _launch(x.a, x.b, x.scale_a, x.scale_b, x.bias, out, x.after, x.fast, scaled)
    return out


def _triton_available(device: torch.device, kind: str) -> str | None:
    missing = cards.triton_missing(device)
    return cards.needs(device, (8, 9), "e4m3") if missing is None and kind == "fp8" else missing


def _torch_available(device: torch.device, kind: str) -> str | None:
    if kind != "fp8" or device.type != "cuda":
        return None
    reason = cards.needs(device, (8, 9), "e4m3")
    if reason is None and cards.capability(device) == (8, 9) and cards.torch_version() < (2, 12):
        # pytorch/pytorch issue 177651: right on the default stream only, and a CUDA graph records nothing of it.
        return "torch before 2.12 starts its product of scaled rows on another stream on cards of 8.9"
    return reason


def _torch(x: Operands) -> Tensor:
    if x.a.dtype == torch.float8_e4m3fn:
        if x.after.residual is None:
            return _scaled_mm_torch(x)
        return _in_parts(x, _scaled_mm_torch, 2 if _rounds_itself(x) else _sums_bytes(x))
    if not x.a.is_cuda:
        return follow_sums(x, _exact_sums(x.a, x.b))
    # On a card _int_mm wants more than 16 rows, and K and N in multiples of 8.
    k, n = (-(-size // 8) * 8 for size in (x.a.shape[1], len(x.b)))
    right = _padded(x.b, n, k).t()

    def product(part: Operands) -> Tensor:
        left = _padded(part.a, max(32, len(part.a)), k)
        return follow_sums(part, torch._int_mm(left, right)[: len(part.a), : len(x.b)])

    return _in_parts(x, product, _sums_bytes(x))


def _float64(x: Operands) -> Tensor:
    right = x.b.double().t()

    def product(part: Operands) -> Tensor:
        sums = (part.a.double() @ right).float()
        return _scaled(sums, part.scale_a, part.scale_b, part.bias, part.after, part.out_dtype)

    return _in_parts(x, product)


def _bf16(x: Operands) -> Tensor:
    """Operands that were dequantized to bf16."""
    right = (x.b.float() * x.scale_b[:, None]).bfloat16().t()
    one = torch.ones((), device=x.b.device)

    def product(part: Operands) -> Tensor:
        left = (part.a.float() * part.scale_a[:, None]).bfloat16()
        if _rounds_itself(part):
            return followed(left @ right, part.after)
        return _scaled((left @ right).float(), one[None], one, part.bias, part.after, part.out_dtype)

    return _in_parts(x, product)


def _rounds_itself(x: Operands) -> bool:
    """Whether torch's product in bf16 is whole, but for a gate."""
    return x.bias is None and x.out_dtype == torch.bfloat16


def followed(y: Tensor, after: After) -> Tensor:
    """What follows a bf16 product that is whole but for that: one pass over 6 bytes a value, for another rounding to
    bf16; from fp32 in plain torch it would be six passes over 50."""
    return y if after.residual is None or after.gate is None else gate_residual(after.residual, y, after.gate)


def follow_sums(x: Operands, sums: Tensor) -> Tensor:
    """What follows sums in int32 or fp32, rounded once; on a card in one pass, where that is right."""
    if not _has_kernel("follow_sums", sums):
        return _scaled(sums.float(), x.scale_a, x.scale_b, x.bias, x.after, x.out_dtype)
    out = x.output()
    with torch.cuda.device(out.device):
        launch_follow(sums, x.scale_a, x.scale_b, x.bias, x.after.gate, out)
    return out


def _sums_bytes(x: Operands) -> int:
    """Bytes a value that sums and what follows them take."""
    return 4 if _has_kernel("follow_sums", x.a) else 16


def _in_parts(x: Operands, product: Callable[[Operands], Tensor], each: int = 16) -> Tensor:
    """Some rows at a time, as many as take what ROWS rows take in plain torch; ``each``: bytes a value."""
    out = x.output()
    whole = replace(x, place=out)
    for start, end in row_parts(len(x.a), ROWS * 16 // each):
        made = product(whole.rows(start, end))
        if made.data_ptr() != out[start:end].data_ptr():  # else it is there already
            out[start:end] = made
    return out


def row_parts(count: int, size: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of each part; the last takes a few more where little would be left."""
    start = 0
    while start < count:
        end = start + size if count - start - size >= FEW else count
        yield start, end
        start = end


def _scaled_mm_torch(x: Operands) -> Tensor:
    """The e4m3 product by torch, which wants K and N in multiples of 16."""
    n = len(x.b)
    k, wide = (-(-size // 16) * 16 for size in (x.a.shape[1], n))
    a, b = _padded(x.a, len(x.a), k), _padded(x.b, wide, k).t()
    scale_b = _padded(x.scale_b[None], 1, wide)
    if _rounds_itself(x):
        out = torch._scaled_mm(a, b, x.scale_a[:, None], scale_b, out_dtype=x.out_dtype, use_fast_accum=x.fast)
        return followed(out if wide == n else out[:, :n].contiguous(), x.after)
    # Scales of rows and columns come with bf16 outputs only: here they follow, and so the result is rounded once.
    one = torch.ones((), device=a.device)
    out = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=x.fast)
    return follow_sums(x, out[:, :n])


def _needs_card(device: torch.device, kind: str) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA card"


PRODUCTS: dict[str, Product] = {
    product.name: product
    for product in (
        Product("hopper", ("int8", "fp8"), _hopper_available, _fits_hopper, _hopper),
        Product("triton", ("int8", "fp8"), _triton_available, lambda x: x.a.is_cuda, by_triton),
        Product("torch", ("int8", "fp8"), _torch_available, lambda x: True, _torch),
        Product(
            "bf16",
            ("fp8",),
            _needs_card,
            lambda x: True,
            _bf16,
            instead="this card has no right FP8 product, bf16 instead; the precision int8 has one",
        ),
        Product(
            "float64",
            ("int8",),
            _needs_card,
            lambda x: True,
            _float64,
            slow=True,
            instead="no other product is to be had on this card, slow ones in fp64 instead",
        ),
    )  # fmt: skip
}
"""In the order in which they are taken where nothing was measured."""
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def default_products(device: torch.device, kind: str) -> tuple[str, ...]:
    """Those that are to be had for a kind of operands, in the order of PRODUCTS."""
    return tuple(n for n, p in PRODUCTS.items() if kind in p.kinds and p.available(device, kind) is None)


def _multiply(x: Operands, kind: str, backends: Sequence[str] | None) -> Tensor:
    """By the first of ``backends`` that takes these operands."""
    if not len(x.a) or not len(x.b):
        return x.output()
    names = default_products(x.a.device, kind) if backends is None else backends
    for name in names:
        product = PRODUCTS.get(name)
        if product is None or kind not in product.kinds:
            known = ", ".join(n for n, p in PRODUCTS.items() if kind in p.kinds)
            raise ValueError(f"backends for {kind} must be some of {known}, not {name!r}")
        if product.fits(x):
            found = product.run(x)
            if found is not None:
                if product.instead:
                    warn_once(f"scaled_mm_{kind}: {product.instead}")
                return found
    shape = f"{len(x.a)} x {len(x.b)} x {x.a.shape[1]}"
    raise ValueError(f"no product of {kind} takes {shape} to {x.out_dtype}; there are {', '.join(names) or 'none'}")


# ---------------------------------------------------------------- what callers use


def scaled_mm_int8(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING, *, backends: Sequence[str] | None = None,
) -> Tensor:  # fmt: skip
    """The product `[M, N]` of int8 `a` `[M, K]` and `b` `[N, K]` with fp32 scales `[M]` and `[N]`, bias `[N]` or None.

    `out_dtype` is bfloat16, float16 or float32; `after` is what follows before the rounding (with a residual, the
    result takes its place). `backends` are those of PRODUCTS that may compute it, the best first; default: all that are
    to be had. Raises ValueError, naming the argument, for what does not fit.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.int8, after)
    return _multiply(Operands(a, b, scale_a, scale_b, bias, out_dtype, after), "int8", backends)


def scaled_mm_fp8(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16, after: After = NOTHING, *, use_fast_accum: bool = True,
    backends: Sequence[str] | None = None,
) -> Tensor:  # fmt: skip
    """The product `[M, N]` of e4m3 `a` `[M, K]` and `b` `[N, K]` with fp32 scales `[M]` and `[N]`, bias `[N]` or None.

    As :func:`scaled_mm_int8`. Without `use_fast_accum` CUDA adds in fp32 and takes a tenth longer.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype, torch.float8_e4m3fn, after)
    return _multiply(Operands(a, b, scale_a, scale_b, bias, out_dtype, after, use_fast_accum), "fp8", backends)
