"""The DiT's blocks by fused kernels: the official block's numbers, in every precision and mode, in any pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.models import fused as fused_module
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.text import PromptEmbedding
from solostep.kernels.attention import MODES
from solostep.quant.formats import install, quantize
from solostep.quant.linear import assign
from solostep.quant.recipe import default_recipe

HEADS = 2
CONFIG = TransformerConfig.from_dict(
    {"num_attention_heads": HEADS, "attention_head_dim": 128, "num_layers": 2, "caption_channels": [64, 32],
     "in_channels": 4, "out_channels": 4}
)  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"latents": normal(2, 3, 4, 10, 6), "llm": normal(2, 5, 64), "clip": normal(2, 77, 32)}


def make(dtype: torch.dtype, precision: str | None = None) -> StepVideoTransformer:
    torch.manual_seed(0)
    model = StepVideoTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.data += 1
    model = model.to(dtype)
    if precision:
        recipe = default_recipe(precision, "transformer")
        weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        chosen = recipe.resolve(weights)
        stored = {n: quantize(f, weights[n].data) for n, f in chosen.items()}
        install(model, chosen, dtype)
        for name, tensors in stored.items():
            assign(model.get_submodule(name), tensors)
    return model.requires_grad_(False)


def both(model: StepVideoTransformer, inputs: dict[str, Tensor], **more: object) -> tuple[Tensor, Tensor]:
    """The official blocks' velocity and the fused ones'."""
    given = {name: x.to(model.dtype) for name, x in inputs.items()}
    time = torch.tensor([0.3, 0.7])
    context = model.embed_text(given["llm"], given["clip"], [82, 80])
    with torch.inference_mode():
        want = model(given["latents"], time, context)
        blocks = FusedBlocks(context, **more)  # type: ignore[arg-type]
        first = model(given["latents"], time, context, fused=blocks)
        again = model(given["latents"], time, context, fused=blocks)  # the text's keys and values come from the first
    assert torch.equal(first, again) and len(blocks.text) == 4
    return want, first


def test_fp32_is_the_official_block(inputs: dict[str, Tensor]) -> None:
    want, found = both(make(torch.float32), inputs)
    assert relative(found, want) < 1e-5


def test_bf16_is_as_near_to_fp32_as_the_official_block(inputs: dict[str, Tensor]) -> None:
    exact, _ = both(make(torch.float32), inputs)
    want, found = both(make(torch.bfloat16), inputs)
    assert relative(found, exact) < 1.05 * relative(want, exact) < 0.05


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["int8", "fp8", "int8-weight"])
def test_quantized(precision: str, mode: str, inputs: dict[str, Tensor]) -> None:
    want, found = both(make(torch.bfloat16, precision), inputs, mode=mode)
    assert 0 < relative(found, want) < (0.06 if "fp8" in (precision, mode) or mode == "int8-fp8" else 0.03)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_chunks_change_nothing(precision: str | None, inputs: dict[str, Tensor]) -> None:
    model = make(torch.bfloat16, precision)
    whole, parts = (both(model, inputs, chunk=chunk)[1] for chunk in (1000, 13))
    if precision == "int8":  # sums of int8 products are exact
        assert torch.equal(whole, parts)
    assert relative(parts, whole) < 1e-2


def test_nothing_of_16_bits_feeds_an_8_bit_product(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(torch.bfloat16, "int8")
    seen: list[tuple[str, bool]] = []
    real = fused_module.add_product

    def watch(linear, rows, x, gate):  # type: ignore[no-untyped-def]
        seen.append((type(linear).__name__, isinstance(rows, tuple)))
        real(linear, rows, x, gate)

    monkeypatch.setattr(fused_module, "add_product", watch)
    both(model, inputs)
    assert seen and all(eight for _, eight in seen)


def test_unknown_modes_and_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="mode has to be one of bf16, int8, int8-fp8"):
        FusedBlocks([], mode="int4")
    with pytest.raises(ValueError, match="chunk has to be at least 1"):
        FusedBlocks([], chunk=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_graph_repeats_what_it_recorded(precision: str | None) -> None:
    """Bit for bit, whatever goes in."""
    device = torch.device("cuda")
    model = make(torch.bfloat16, precision).to(device)
    settings = GenerationSettings(num_frames=17, height=160, width=96)
    texts = [PromptEmbedding(torch.randn(5, 64), torch.randn(77, 32), length) for length in (82, 80)]
    mode = "int8" if precision else "bf16"
    with torch.inference_mode():
        eager, recorded = (GuidedVelocity(model, texts, settings, attention=mode, graph=g) for g in (False, True))
        for step in range(4):
            latents = torch.randn(1, 3, 4, 10, 6) * (step + 1)
            sigma = torch.tensor(1 - 0.2 * step)
            want, found = eager(latents, sigma).clone(), recorded(latents, sigma)
            assert torch.equal(want, found) and bool(want.isfinite().all())
        assert recorded._graph is not None and eager._graph is None
