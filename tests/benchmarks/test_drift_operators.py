"""Operators of a block: what was put in is what is read, on the rows that are compared, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from solostep.benchmarks import drift_operators
from solostep.benchmarks.drift_distances import relative
from solostep.benchmarks.drift_operators import Other, sampled, watched
from solostep.benchmarks.lockstep import shared
from solostep.engine.errors import SolostepError
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import TransformerBlock, apply_rope, attend, rope_table
from solostep.kernels.attention import self_attention

FHW = (3, 4, 8)
Inputs = tuple[Tensor, Tensor, Tensor]


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.25 * super().forward(x)


@pytest.fixture(scope="module")
def made() -> tuple[TransformerBlock, Inputs]:
    generator = torch.Generator().manual_seed(0)
    block = TransformerBlock(256, 128)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(256**-0.5).bfloat16()
    shapes = ((1, 96, 256), (1, 20, 256), (1, 6 * 256))
    x, context, modulation = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return block.requires_grad_(False), (x, context, modulation)


def run(block: TransformerBlock, inputs: Inputs, *others: Other) -> None:
    rope = rope_table(FHW, torch.bfloat16)
    with watched(block, others, rope):
        block(*inputs, rope)


def test_only_what_differs_is_measured(made: tuple[TransformerBlock, Inputs]) -> None:
    block, inputs = made
    same, loud = Other(shared(block)), Other(shared(block))
    for name in ("ff.net.2", "attn2.wkv"):
        loud.block.get_submodule(name).__class__ = Louder
    for _ in range(2):
        run(block, inputs, same, loud)
    assert same.errors == {}
    assert {name: pytest.approx([0.25] * 2, rel=1e-2) for name in loud.errors} == loud.errors
    assert list(loud.errors) == ["attn2.wkv", "ff.net.2"]
    block(*inputs, rope_table(FHW, torch.bfloat16))  # no longer watched
    assert len(loud.errors["ff.net.2"]) == 2


@pytest.mark.parametrize("tokens", [4096, 40])
@pytest.mark.parametrize("mode", ["int8", "int8-fp8"])
def test_attention_of_some_queries_is_that_of_all(
    made: tuple[TransformerBlock, Inputs], mode: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_operators, "TOKENS", tokens)
    block, inputs = made
    other = Other(shared(block), FusedBlocks([inputs[1]], mode))
    products: list[Tensor] = []
    hook = block.attn1.wqkv.register_forward_hook(lambda linear, given, out: products.append(out))
    run(block, inputs, other)
    hook.remove()
    rope = rope_table(FHW, torch.bfloat16)
    q, k, v = products[0].unflatten(-1, (-1, 384)).chunk(3, dim=-1)
    want = attend(apply_rope(block.attn1.q_norm(q), rope), apply_rope(block.attn1.k_norm(k), rope), v)
    whole = self_attention(
        products[0].view(96, 2, 384), block.attn1.q_norm.weight, block.attn1.k_norm.weight, rope[0][:, 0],
        rope[1][:, 0], mode=mode,
    )  # fmt: skip
    some = sampled(96, torch.device("cpu"))
    assert other.errors["attn1.attention"] == pytest.approx([relative(whole[None][:, some], want[:, some])], rel=1e-4)
    assert set(other.errors) == {"attn1.attention", "attn2.attention"}
    assert 0 < other.errors["attn2.attention"][0] < 1e-2


def test_tokens_are_spread_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_operators, "TOKENS", 5)
    assert sampled(5, torch.device("cpu")) == slice(None)
    assert sampled(101, torch.device("cpu")).tolist() == [0, 25, 50, 75, 100]


def test_an_error_that_cannot_be_told_names_the_operator(made: tuple[TransformerBlock, Inputs]) -> None:
    block, inputs = made
    other = Other(shared(block), name="block 7 in the mode x")
    other.block.ff.net[2] = Louder(1024, 256, bias=False).bfloat16().requires_grad_(False)
    other.block.ff.net[2].weight[0, 0] = float("nan")
    with pytest.raises(SolostepError, match=r"ff\.net\.2 of block 7 in the mode x: An error cannot be measured"):
        run(block, inputs, other)
