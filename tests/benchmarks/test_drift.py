"""Distances, and the floors that they are read beside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from solostep.benchmarks import drift, floors
from solostep.benchmarks.floors import PermutedLinear, permute
from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.models.transformer import TransformerBlock, rope_table
from solostep.offload.streamer import BlockStreamer

CPU = torch.device("cpu")


def test_equal_tensors_are_at_no_distance() -> None:
    for seed in range(50):
        x = torch.randn(997, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
        assert drift.relative(x, x.clone()) == 0.0
        assert drift.cosine(x, x.clone()) == 1.0


def test_distances_are_what_they_say() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    assert drift.relative(a, b) == pytest.approx(math.sqrt(10) / 5)
    assert drift.cosine(a, b) == pytest.approx(0.8)
    assert drift.cosine(a, -a) == -1.0
    assert drift.relative(a * 1.25, a) == 0.25
    velocity = torch.tensor([1.0, -2.0])
    assert torch.equal(drift.velocity_of(a, a + 0.25 * velocity, 0.5, 0.75), velocity.double())


@pytest.mark.parametrize("reference", [torch.zeros(3), torch.tensor([1.0, math.nan, 1.0])])
def test_what_cannot_be_told_is_an_error(reference: torch.Tensor) -> None:
    with pytest.raises(SolostepError, match="cannot be measured"):
        drift.relative(torch.ones(3), reference)


def test_when_a_run_has_diverged() -> None:
    assert drift.diverged_at([0.1, 0.31, 0.2, 0.9]) == 1
    assert drift.diverged_at([0.1, 0.3]) is None


def test_steps_are_spread() -> None:
    assert drift.spread_steps(50) == [0, 24, 49]
    assert drift.spread_steps(6) == [0, 2, 5] and drift.spread_steps(5) == [0, 4] and drift.spread_steps(2) == [0, 1]
    assert drift.spread_steps(1) == [0]
    assert drift.block_pairs(7_000_000) == 8 and drift.block_pairs(30_000_000_000) == 2


def block_and_input(dtype: torch.dtype) -> tuple[TransformerBlock, tuple[torch.Tensor, ...], tuple]:
    generator = torch.Generator().manual_seed(0)
    block = TransformerBlock(256, 128)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(256**-0.5).to(dtype)
    inputs = (torch.randn(1, 96, 256), torch.randn(1, 20, 256), torch.randn(1, 6 * 256))
    inputs = tuple(torch.randn(t.shape, generator=generator).to(dtype) for t in inputs)
    return block, inputs, rope_table((3, 4, 8), dtype)


@torch.no_grad()
def test_another_order_changes_bits_and_nothing_else() -> None:
    block, inputs, rope = block_and_input(torch.bfloat16)
    plain = block(*inputs, rope)
    names = [name for name, _ in block.named_parameters()]
    assert permute(block) is block
    assert sum(isinstance(m, PermutedLinear) for m in block.modules()) == 7
    assert [name for name, _ in block.named_parameters()] == names
    other = block(*inputs, rope)
    assert 0 < drift.relative(other, plain) < 1e-2
    assert torch.equal(other, block(*inputs, rope))
    wide, inputs, rope = block_and_input(torch.float64)
    plain = wide(*inputs, rope)
    assert 0 < drift.relative(permute(wide)(*inputs, rope), plain) < 1e-13


@torch.no_grad()
def test_blocks_that_stream_can_be_permuted() -> None:
    blocks, (_, inputs, rope) = [block_and_input(torch.bfloat16)[0] for _ in range(2)], block_and_input(torch.bfloat16)
    plain = blocks[0](*inputs, rope)
    streamer = BlockStreamer(blocks, CPU, resident=0, slots=1)
    for block in blocks:
        permute(block)
    outputs = [block(*inputs, rope) for block in streamer]
    streamer.close()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], permute(block_and_input(torch.bfloat16)[0])(*inputs, rope))
    assert not torch.equal(outputs[0], plain)


def test_the_permutation_is_one() -> None:
    order = floors.channel_order(512, CPU)
    assert torch.equal(order.sort().values, torch.arange(512))
    assert not torch.equal(order, torch.arange(512))


def otherwise(x: tuple[torch.Tensor, ...], block: TransformerBlock, rope: tuple, name: str) -> float:
    plain = block(*x, rope)
    return drift.relative(floors.attend_by(block, name)(*x, rope), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["math", "permuted"])
def test_another_attention_changes_bits_and_nothing_else(name: str) -> None:
    block, inputs, rope = block_and_input(torch.bfloat16)
    names = [name for name, _ in block.named_parameters()]
    assert 0 < otherwise(inputs, block, rope, name) < 1e-2
    assert [name for name, _ in block.named_parameters()] == names
    assert torch.equal(block(*inputs, rope), block(*inputs, rope))
    wide, inputs, rope = block_and_input(torch.float64)
    assert 0 < otherwise(inputs, wide, rope, name) < 1e-13
    outside = F.scaled_dot_product_attention(*[torch.randn(1, 2, 9, 128)] * 3)
    assert outside.isfinite().all()  # nothing stays switched off


def test_the_other_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch takes its flash kernel."""
    assert floors.other_backend(100, CPU) == ("math", "torch's math kernel in place of its own choice (flash)")
    monkeypatch.setattr(floors, "QUADRATIC_TOKENS", 120)
    name, words = floors.other_backend(121, CPU)
    assert name == "permuted" and "another order" in words
    assert floors.attention_of_floor("flash", 121, CPU)[0] == "flash"
    with pytest.raises(UsageError, match="of 121 tokens are too many"):
        floors.attention_of_floor("math", 121, CPU)
    with pytest.raises(UsageError, match="needs a CUDA card"):
        floors.attention_of_floor("cudnn", 121, CPU)
    with pytest.raises(UsageError, match="one of cudnn, flash, efficient, math, permuted"):
        floors.attention_of_floor("hopper", 121, CPU)


def test_floors_are_of_the_official_blocks() -> None:
    small, config = GenerationSettings(num_frames=17, height=96, width=96), TransformerConfig()
    options = floors.floor_options({"vram": "9GB", "attention_backend": "flash"})
    assert options == {"vram": "9GB", "precision": "bf16", "attention": "official", "attention_backend": None}
    change, name, words = floors.change_of("floor-backend", None, small, config, CPU)
    assert name == "math" and "torch's math kernel" in words
    block = change(block_and_input(torch.bfloat16)[0])
    assert (block.attn1.attended_by, block.attn2.attended_by) == ("math", "math")
    assert floors.change_of("floor-order", None, small, config, CPU) == (permute, None, None)
