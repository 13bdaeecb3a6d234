"""The passes in their forms for Hopper: the one before 8-bit attention compiles for it, and has its order of channels;
rows that are rotated on tensor cores, whose assembly is computed in NumPy; on a card, the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from separate import run_separately

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from solostep.kernels import qk_hopper, qk_norm_rope, rows_hopper  # noqa: E402
from solostep.kernels.quantize import hadamard, rotate  # noqa: E402

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)

COMPILE = """
import sys
import torch
from compiling import compile_for
from solostep.kernels import qk_hopper, qk_norm_rope

qkv, weight, table = torch.empty(300, 6, 384).bfloat16(), torch.empty(128).bfloat16(), torch.empty(300, 128)
table = table.to(getattr(torch, sys.argv.pop()))

def run():
    qk_norm_rope.launch(qkv, weight, weight, table, table, True, 1e-6, plan=qk_norm_rope.HOPPER)

kernels = [(qk_norm_rope, "_k_mean_kernel"), (qk_hopper, "_qk_hopper_kernel")]
compile_for(90, kernels, run, sys.argv[1:])
"""


@pytest.mark.parametrize("tables", ["bfloat16", pytest.param("float32", marks=pytest.mark.more)])
def test_compiles_for_three_programs_a_multiprocessor(tables: str, tmp_path: Path) -> None:
    """With the official tables, of angles in bf16, and with exact ones."""
    found, _, registers, stack, shared = run_separately(COMPILE, tmp_path, "_qk_hopper_kernel", tables).split()
    assert found == "_qk_hopper_kernel" and int(stack) <= 400
    assert 128 * int(registers) * 3 <= 65536 and 3 * (int(shared) + 1024) <= 227 * 1024


def test_the_matrix_is_in_the_order_of_the_operand_and_of_the_stores() -> None:
    pair = torch.arange(64)
    first = pair + 32 * (pair >= 32) + 16 * (pair >= 48)
    second = first + torch.where(pair < 32, 32, 16)
    x = torch.randn(64, 128)
    h = qk_hopper.walsh(x.device).float()

    def operand(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(64, 2, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(64, 64)

    y = operand(x[:, first]) @ h[:64] + operand(x[:, second]) @ h[64:]
    y = y.reshape(64, 2, 8, 4, 2).permute(0, 1, 3, 2, 4).reshape(64, 128)
    assert torch.allclose(y, hadamard(x, 128) * 128**0.5, atol=1e-4)


def test_four_values_are_rounded_into_a_word() -> None:
    x = torch.tensor([[0.5, 1.5, -2.5, 126.75], [-127.0, 0.0, -0.5, 63.5]]) / 2
    words = [np.ascontiguousarray(column).view(np.uint32) for column in [*x.t().numpy(), *np.full((4, 2), 2, "f")]]
    (word,) = ptx.run(qk_hopper._ROUND.value, words)
    assert word.view(np.int8).reshape(2, 4).tolist() == [[0, 2, -2, 127], [-127, 0, 0, 64]]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Signs and Hadamard matrix of the lanes of a warp, by the kernel's own functions."""
    monkeypatch.setattr(rows_hopper, "_odd_ones", rows_hopper._odd_ones.fn)
    at = np.arange(rows_hopper.WORDS, dtype=np.int64)
    signs, h8 = rows_hopper._sign_bits.fn(at), rows_hopper._hadamard.fn(at)
    return signs.astype(np.uint32), h8.astype(np.uint32)


def by_register(words: np.ndarray) -> list[np.ndarray]:
    """128 words as the four of each of 32 lanes."""
    return [np.ascontiguousarray(x) for x in words.reshape(32, 4).T]


def halves(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.float16)).float()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_on_tensor_cores(gelu: bool, exact: bool, pieces: tuple[np.ndarray, np.ndarray]) -> None:
    """256 channels from bf16 to int8: two products of matrices end in the order they began with."""
    signs, h8 = pieces
    generator = torch.Generator().manual_seed(0)
    x, shift, gain = torch.randn(3, 256, generator=generator)
    x = (3 * x).bfloat16()
    words = x.view(torch.int16).numpy().view(np.uint32)
    if gelu:
        true = torch.nn.functional.gelu(x.float(), approximate="tanh")
        code = rows_hopper._GELU_FP32 if exact else rows_hopper._GELU
        (y,) = ptx.run(code.value, [words, signs ^ np.uint32(0x38003800)])
    else:
        true = 0.5 * x.float() * gain.half().float() - 0.25 * gain.half().float() + shift.half().float()
        pairs = [v.half().view(torch.int16).numpy().view(np.uint32) ^ signs for v in (gain, shift)]
        factors = [np.full(128, v, np.float32).view(np.uint32) for v in (0.5, -0.25)]
        (y,) = ptx.run(rows_hopper._NORM.value, [words, *factors, *pairs])
    turned = ptx.run(rows_hopper._ROTATE.value, [*by_register(y), *by_register(h8)], 4)
    found, want = halves(np.stack(turned, 1).reshape(-1)), rotate(true, 256) * 16
    assert float((found - want).norm() / want.norm()) < (1.5e-3 if gelu and not exact else 6e-4)
    inverse = (127 / found.abs().max()).half()
    pair = torch.full((64,), float(inverse)).half().view(torch.int16).numpy().view(np.uint32)
    stored = ptx.run(rows_hopper._ROUND.value, [*turned, *[pair] * 4], 2)
    q = torch.from_numpy(np.stack(stored, 1).reshape(-1).view(np.int8))
    assert torch.equal(q.float(), (found * inverse.float()).round()) and int(q.abs().max()) == 127


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tokens", [2, 33, 1003, 20_011])
def test_q_and_k_are_the_reference_s_but_for_roundings(tokens: int) -> None:
    """fp16 holds more than int8: a step at most where a value is near the middle of two."""
    qkv = torch.randn(tokens, 6, 384, device="cuda")
    qkv[..., 128 + 5] += 8
    frame, row, column = (torch.randn(tokens, width, device="cuda") for width in (32, 16, 16))
    angles = torch.cat([frame, frame, row, row, column, column], dim=1)
    gains = [(1 + torch.rand(128, device="cuda")).bfloat16() for _ in range(2)]
    operands = qkv.bfloat16(), *gains, angles.cos().bfloat16(), angles.sin().bfloat16()
    assert (tokens > 20_000) == bool(qk_norm_rope.hopper_plan(operands[0], tokens))  # fewer leave programs without work
    got = qk_norm_rope.launch(*operands, True, 1e-6, plan=qk_norm_rope.HOPPER)
    again = qk_norm_rope.launch(*operands, True, 1e-6, plan=qk_norm_rope.HOPPER)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    want = qk_norm_rope._on_cpu(*operands, True, 1e-6)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert int((a.int() - b.int()).abs().max()) <= 1 and float((a != b).float().mean()) < 0.05
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a is not None and b is not None and float((a / b - 1).abs().max()) < 1.1e-3


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_what_is_no_number_is_noticed(number: float) -> None:
    """A scale that is not finite, which makes NaN of scores; large gains are far from there."""
    qkv = torch.randn(20_011, 6, 384, device="cuda").bfloat16()
    qkv[777, 2, 5] = qkv[1500, 3, 130] = number
    gains = [torch.full((128,), 100.0, device="cuda").bfloat16() for _ in range(2)]
    cos, sin = (torch.full((20_011, 128), x, device="cuda").bfloat16() for x in (1, 0))
    _, _, q_scale, k_scale = qk_norm_rope.launch(qkv, *gains, cos, sin, True, 1e-6, plan=qk_norm_rope.HOPPER)
    assert q_scale is not None and (~q_scale.isfinite()).nonzero().tolist() == [[2, 777]]
    assert k_scale is not None and (~k_scale.isfinite()).nonzero().tolist() == [
        [3, int(qk_norm_rope.group_of(torch.tensor(1500)))]
    ]
