"""The passes before 8-bit attention in their forms for Hopper: they compile for it; their order of channels; on a card,
the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from separate import run_separately

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from solostep.kernels import qk_hopper, qk_norm_rope, values  # noqa: E402
from solostep.kernels.quantize import hadamard  # noqa: E402

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)

COMPILE = """
import sys
import torch
from compiling import compile_for
from solostep.kernels import qk_hopper, qk_norm_rope, values, values_hopper

qkv, weight, table = torch.empty(300, 6, 384).bfloat16(), torch.empty(128).bfloat16(), torch.empty(300, 128).bfloat16()

def run():
    qk_norm_rope.launch(qkv, weight, weight, table, table, True, 1e-6, plan=qk_norm_rope.HOPPER)
    values.launch(qkv[..., 256:], values.HOPPER)

kernels = [(qk_norm_rope, "_k_mean_kernel"), (qk_hopper, "_qk_hopper_kernel"), (values_hopper, "_values_kernel")]
compile_for(90, kernels, run, sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("name", "most"), [("_qk_hopper_kernel", 256), pytest.param("_values_kernel", 400, marks=pytest.mark.more)]
)
def test_compiles_for_three_programs_a_multiprocessor(name: str, most: int, tmp_path: Path) -> None:
    """Triton 3.6 keeps all that q and k need in registers, 3.9 puts a part aside, and both do of V's two passes."""
    found, _, registers, stack, shared = run_separately(COMPILE, tmp_path, name).split()
    assert found == name and int(stack) <= most
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


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("tokens", "group"), [(1, 32), (33, 16), (1003, 64), (5007, 32)])
def test_q_and_k_are_the_reference_s_but_for_roundings(tokens: int, group: int) -> None:
    """fp16 holds more than int8: a step at most where a value is near the middle of two."""
    qkv = torch.randn(tokens, 6, 384, device="cuda")
    qkv[..., 128 + 5] += 8
    frame, row, column = (torch.randn(tokens, width, device="cuda") for width in (32, 16, 16))
    angles = torch.cat([frame, frame, row, row, column, column], dim=1)
    gains = [(1 + torch.rand(128, device="cuda")).bfloat16() for _ in range(2)]
    operands = qkv.bfloat16(), *gains, angles.cos().bfloat16(), angles.sin().bfloat16()
    assert qk_norm_rope.hopper_plan(operands[0], tokens)
    got = qk_norm_rope.launch(*operands, True, 1e-6, group)
    want = qk_norm_rope._on_cpu(*operands, True, 1e-6, group)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert int((a.int() - b.int()).abs().max()) <= 1 and float((a != b).float().mean()) < 0.05
    for a, b in zip(got[2:], want[2:], strict=True):
        assert a is not None and b is not None and float((a / b - 1).abs().max()) < 1.1e-3


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tokens", [1, 33, 1003, 20_011])
def test_v_is_the_reference_s(tokens: int) -> None:
    v = (torch.randn(tokens, 3, 384, device="cuda") * 3 + 2).bfloat16()[..., 256:]
    v[tokens // 2, 1, 5] = 4000
    assert values.hopper_plan(v)
    got, again, want = values.launch(v), values.launch(v), values.quantize_v_reference(v)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, again, strict=True))
    assert float((got[0].float() != want[0].float()).float().mean()) < 1e-2  # by a step, where sums round apart
    assert float((got[0].float() - want[0].float()).abs().max()) <= 32
    assert torch.allclose(got[1], want[1], rtol=2e-5)
    added = v.float().mean(0) - got[1] * got[0].float().sum(-1) / tokens
    assert torch.allclose(got[2], added, atol=5e-5 * 4)
