"""The fused passes of a block: their kernels under the interpreter against the references, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from solostep.engine.models.transformer import RMSNorm, apply_rope, rope_table
from solostep.kernels import adaln, qk_norm_rope
from solostep.kernels.quantize import hadamard

COMPARE = """
import json
import sys
import torch
from solostep.kernels import adaln, qk_norm_rope
from solostep.kernels.quantize import quantize_rows_reference

device, rows, roped = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
worst = lambda a, b: float((a.float() - b.float()).abs().max())
ratio = lambda a, b: worst(a / b, torch.ones_like(a))
found = {}
for tokens, d in rows:
    x, y, shift, scale = normal(tokens, d), normal(tokens, d), normal(d), normal(d)
    x[0, 3] = 40
    want = adaln.layer_norm_modulate_reference(x, shift, scale, 1e-5)
    case = found[f"{tokens}x{d}"] = {}
    case["norm"] = worst(adaln.launch(x, torch.float32, 1, shift, scale, 1e-5), want)
    case["gelu"] = worst(adaln.launch(x, torch.float32, 1, None, None, 0.0), adaln.gelu_reference(x))
    for group in {1, min(256, d & -d)}:
        q, s = adaln.launch(x, torch.int8, group, shift, scale, 1e-5)
        q_want, s_want = quantize_rows_reference(want, torch.int8, group)
        case[f"norm int8 {group}"] = max(worst(q, q_want) / 1e3, ratio(s, s_want))
    q, s = adaln.launch(x, torch.int8, 1, None, None, 0.0)
    q_want, s_want = quantize_rows_reference(adaln.gelu_reference(x), torch.int8)
    case["gelu int8"] = max(worst(q, q_want) / 1e3, ratio(s, s_want))
    gated = x.clone()
    adaln.launch_gate(gated, y, scale)
    case["gate"] = worst(gated, x + scale * y)
for tokens, heads in roped:
    qkv, angles = normal(tokens, heads, 384), normal(tokens, 128)
    weights = normal(128), normal(128)
    cos, sin = angles.cos(), angles.sin()
    case = found[f"rope {tokens}x{heads}"] = {}
    got = qk_norm_rope.launch(qkv, *weights, cos, sin, False, 1e-6)
    want = qk_norm_rope._on_cpu(qkv, *weights, cos, sin, False, 1e-6)
    case["q"], case["k"] = (worst(a, b) for a, b in zip(got[:2], want[:2]))
    got = qk_norm_rope.launch(qkv, *weights, cos, sin, True, 1e-6)
    want = qk_norm_rope._on_cpu(qkv, *weights, cos, sin, True, 1e-6)
    case["int8"] = max(worst(a, b) for a, b in zip(got[:2], want[:2])) / 1e3
    case["scales"] = max(ratio(a, b) for a, b in zip(got[2:], want[2:]))
print(json.dumps(found))
"""


def _compare(device: str, rows: list[tuple[int, int]], roped: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Largest differences between kernels and references, by case and operator."""
    env = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    run = [sys.executable, "-c", COMPARE, device, json.dumps(rows), json.dumps(roped)]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    assert len(found) == len(rows) + len(roped)
    return found


def test_kernels_under_the_interpreter() -> None:
    """fp32 to rounding; a quantized value may differ by one step (1e-3 here) where two ways of summing round apart."""
    pytest.importorskip("triton")
    found = _compare("cpu", [(5, 256), (2, 300), (1, 17), (2, 1536)], [(3, 1), (131, 2)])
    for case, values in found.items():
        for name, worst in values.items():
            assert worst <= (1.1e-3 if "int8" in name else 2e-5), (case, name, worst)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_kernels_on_a_card() -> None:
    """The tensor cores that rotate q and k keep 11 bits: a scale may be 1e-3 off."""
    found = _compare("cuda", [(1000, 6144), (77, 24_576), (5, 300), (1, 17), (64, 5120)], [(3, 1), (131, 2), (5007, 3)])
    for case, values in found.items():
        for name, worst in values.items():
            assert worst <= (1.1e-3 if "int8" in name or name == "scales" else 5e-5), (case, name, worst)


# --- the references are the network's own numbers -----------------------------------------------------------------


def test_the_rotary_reference_is_the_network_s() -> None:
    fhw = (3, 2, 4)
    tokens = 24
    x, gain = torch.randn(tokens, 3, 128), torch.rand(128) + 0.5
    rope = rope_table(fhw, torch.float32)
    norm = RMSNorm(128)
    norm.weight.data = gain
    want = apply_rope(norm(x)[None], rope)[0]
    got = qk_norm_rope.qk_norm_rope_reference(x, gain, rope[0][:, 0], rope[1][:, 0])
    assert torch.allclose(got, want, atol=2e-6)


def test_modulation_is_the_network_s() -> None:
    x, shift, scale = torch.randn(7, 64), torch.randn(64), torch.randn(64)
    want = F.layer_norm(x, (64,), eps=1e-5) * (1 + scale) + shift
    assert torch.allclose(adaln.layer_norm_modulate(x, shift, scale), want, atol=1e-6)  # type: ignore[arg-type]


def test_quantized_scores_are_those_of_normed_keys() -> None:
    """Rotating q and k, and taking a mean out of all keys, leave the softmax alone."""
    qkv = torch.randn(300, 2, 384)
    qkv[..., 128 + 5] += 30
    cos, sin = torch.ones(300, 128), torch.zeros(300, 128)
    gains = torch.ones(128), torch.ones(128)
    q8, k8, q_scale, k_scale = qk_norm_rope.qk_norm_rope(qkv, *gains, cos, sin, quantize=True)
    q, k, _, _ = qk_norm_rope.qk_norm_rope(qkv, *gains, cos, sin)
    assert q_scale is not None and k_scale is not None
    scores = torch.einsum("shd,lhd->hsl", q8.float(), k8.float()) * q_scale[:, :, None]
    scores = scores * k_scale.repeat_interleave(128, 1)[:, None, :300]
    want = torch.einsum("shd,lhd->hsl", q, k) / 128**0.5
    got = (scores / 128**0.5).softmax(-1)
    assert float((got - want.softmax(-1)).norm() / want.softmax(-1).norm()) < 0.02
    assert torch.allclose(hadamard(hadamard(q, 128), 128), q, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adaln.layer_norm_modulate(torch.ones(2, 3, 4), torch.ones(4), torch.ones(4)), "x must be"),
        (lambda: adaln.layer_norm_modulate(torch.ones(2, 4), torch.ones(5), torch.ones(4)), "shift must be"),
        (lambda: adaln.layer_norm_modulate(torch.ones(2, 4), torch.ones(4), torch.ones(8)[::2]), "scale must be"),
        (lambda: adaln.gate_residual(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), "one shape"),
        (lambda: adaln.gelu(torch.ones(4, 2).t()), "x must be"),
        (
            lambda: qk_norm_rope.qk_norm_rope(torch.ones(2, 1, 256), *[torch.ones(128)] * 2, *[torch.ones(2, 128)] * 2),
            "qkv has to be",
        ),
        (
            lambda: qk_norm_rope.qk_norm_rope(torch.ones(2, 1, 384), *[torch.ones(128)] * 2, *[torch.ones(3, 128)] * 2),
            "cos has to be",
        ),
    ],
)
def test_wrong_operands_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
