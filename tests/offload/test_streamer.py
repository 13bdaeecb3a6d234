"""Streamed blocks: the same bits as resident ones, whatever the slots; copies begin early and never too early."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solostep.engine.config import GenerationSettings, TransformerConfig
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.text import PromptEmbedding
from solostep.offload.pinned import ALIGNMENT, HostSlab, lay_out
from solostep.offload.streamer import BlockStreamer, spread
from solostep.quant.formats import install, quantize
from solostep.quant.linear import assign
from solostep.quant.recipe import default_recipe

CPU = torch.device("cpu")
LAYERS = 5


@dataclass
class Mark:
    done: bool = False
    target: Tensor | None = None
    source: Tensor | None = None


@dataclass
class LateLane:
    """Copies that do not happen before they are waited for, into memory that is poisoned when they begin."""

    log: list[tuple[str, int]] = field(default_factory=list)
    under_way: list[Mark] = field(default_factory=list)

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        assert after is None or after.done, "a copy into a slot that is in use"
        target.fill_(0x7F)  # a huge number in bf16, NaN in e4m3, 127 in int8
        self.log.append(("copy", source.numel()))
        self.under_way.append(Mark(target=target, source=source))
        return self.under_way[-1]

    def wait(self, mark: Mark) -> None:
        self.log.append(("wait", 0))
        if not mark.done and mark.target is not None and mark.source is not None:
            mark.target.copy_(mark.source)
            mark.done = True

    def used(self) -> Mark:
        return Mark(done=True)

    def finish(self) -> None:
        for mark in self.under_way:
            self.wait(mark)

    def copies(self) -> list[int]:
        return [size for what, size in self.log if what == "copy"]


def make(precision: str | None = None, dtype: torch.dtype = torch.bfloat16) -> StepVideoTransformer:
    config = TransformerConfig.from_dict(
        {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": LAYERS, "caption_channels": [64, 32],
         "in_channels": 4, "out_channels": 4}
    )  # fmt: skip
    torch.manual_seed(0)
    model = StepVideoTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    model = model.to(dtype)
    if precision:
        weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        chosen = default_recipe(precision, "transformer").resolve(weights)
        stored = {n: quantize(f, weights[n].data) for n, f in chosen.items()}
        install(model, chosen, dtype)
        for name, tensors in stored.items():
            assign(model.get_submodule(name), tensors)
    return model.requires_grad_(False)


def passes(
    model: StepVideoTransformer, blocks: Any = None, fused: bool = False, count: int = 3, device: str = "cpu"
) -> Iterator[Tensor]:
    """Velocities of some steps, two rows of a batch in each."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    latents, llm, clip = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((2, 2, 4, 6, 4), (2, 5, 64), (2, 77, 32))
    )
    with torch.inference_mode():
        context = model.embed_text(llm, clip, [82, 80])
        run = FusedBlocks(context) if fused else None
        for step in range(count):
            time = torch.tensor([0.2, 0.2], device=device) * step
            yield model(latents, time, context, blocks=blocks, fused=run)
            if fused and hasattr(blocks, "short"):
                blocks.short = True


@pytest.mark.parametrize("precision", [None, "int8", "fp8", "int8-weight"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 2), (2, 2), (1, 3), (4, 2), (5, 2), (0, 9)])
def test_streamed_is_resident_bit_for_bit(precision: str | None, fused: bool, resident: int, slots: int) -> None:
    want = list(passes(make(precision), fused=fused))
    model = make(precision)
    lane = LateLane()
    blocks = BlockStreamer(
        model.transformer_blocks, "cpu", resident=resident, slots=slots, last=["attn2.wkv"], lane=lane
    )
    for velocity, known in zip(passes(model, blocks, fused), want, strict=True):
        assert torch.equal(velocity, known)
    assert bool(lane.copies()) == (resident < LAYERS)
    blocks.close()
    for velocity, known in zip(passes(model, fused=fused), want, strict=True):  # the blocks are whole afterwards
        assert torch.equal(velocity, known)


def test_copies_run_ahead_and_around_the_end() -> None:
    model = make()
    lane = LateLane()
    blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=2, lane=lane)
    begun = [len(lane.copies()) for _ in range(3) for _ in blocks]
    assert begun == list(range(2, 3 * LAYERS + 2))  # while use n computes, copy n + 1 is begun, also of the next pass
    assert set(lane.copies()) == {lay_out(dict(model.transformer_blocks[0].named_parameters())).nbytes}


def test_what_has_its_own_slot_is_copied_once() -> None:
    lane = LateLane()
    blocks = BlockStreamer(make().transformer_blocks, "cpu", resident=LAYERS - 2, slots=3, lane=lane)
    for _ in range(4):
        assert sum(1 for _ in blocks) == LAYERS
    assert len(lane.copies()) == 2


def test_short_copies_leave_out_what_is_not_needed_and_its_use_is_an_error() -> None:
    model = make("int8")
    lane = LateLane()
    blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=1, last=["attn2.wkv"], lane=lane)
    list(blocks)
    whole = lane.copies()[0]
    blocks.short = True
    lane.log.clear()
    for _ in range(2):
        list(blocks)
    kept = model.transformer_blocks[0].attn2.wkv
    assert lane.copies()[-1] <= whole - kept.weight.nbytes - kept.weight_scale.nbytes
    with torch.inference_mode():
        for block in blocks:
            assert block.attn2.wkv.weight.is_meta and not block.attn2.wq.weight.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        list(passes(model, blocks, count=1))
    blocks.short = False  # whole again, from the next copies on
    list(blocks)
    assert all(not block.attn2.wkv.weight.is_meta for block in blocks)


def test_a_pass_that_was_left_early_is_forgotten() -> None:
    want = list(passes(make()))
    model = make()
    blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=2, lane=LateLane())
    for _ in blocks:
        break
    with pytest.raises(ZeroDivisionError):
        for i, _ in enumerate(blocks):
            1 / (2 - i)
    for velocity, known in zip(passes(model, blocks), want, strict=True):
        assert torch.equal(velocity, known)


def test_memory_is_what_it_says() -> None:
    model = make("int8")
    one = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    blocks = BlockStreamer(model.transformer_blocks, "cpu", resident=2, slots=2)
    padding = ALIGNMENT * len(list(model.transformer_blocks[0].parameters()))
    assert 4 * one <= blocks.device_bytes <= 4 * one + 2 * padding
    assert 3 * one <= blocks.host_bytes <= 3 * one + 3 * padding
    assert len(blocks) == LAYERS


def test_strides_types_and_empty_tensors_survive_a_slab() -> None:
    tensors = {
        "turned": torch.randn(6, 4).t(), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 3),
        "eight": torch.randint(-128, 128, (7,), dtype=torch.int8), "every other": torch.arange(10)[::2],
        "e4m3": torch.randn(5).to(torch.float8_e4m3fn),
    }  # fmt: skip
    layout = lay_out(tensors, last=["e"])
    slab = HostSlab(layout)
    slab.fill(tensors)
    moved = slab.memory.clone()
    for name, tensor in tensors.items():
        found = layout.places[name].view(moved)
        assert found.stride() == tensor.stride() and found.dtype == tensor.dtype
        assert torch.equal(found.float(), tensor.float())
    assert layout.last == {"empty", "eight", "every other", "e4m3"}
    assert max(layout.places[n].offset for n in ("turned", "scalar")) < layout.needed <= layout.nbytes
    assert all(place.offset % ALIGNMENT == 0 for place in layout.places.values())


class Tagged(Tensor):
    pass


def test_what_cannot_stream_is_refused() -> None:
    blocks = make().transformer_blocks
    with pytest.raises(ValueError, match="resident has to be 0 to 5 and slots 1 or more: 6, 2"):
        BlockStreamer(blocks, "cpu", resident=6)
    with pytest.raises(ValueError, match="slots 1 or more"):
        BlockStreamer(blocks, "cpu", slots=0)
    with pytest.raises(ValueError, match="block 0 has buffers"):
        BlockStreamer([nn.BatchNorm1d(3)], "cpu")
    with pytest.raises(ValueError, match="a is a Tagged"):
        lay_out({"a": torch.ones(3).as_subclass(Tagged)})
    with pytest.raises(ValueError, match="share memory"):
        lay_out({"a": torch.ones(3).expand(2, 3)})


@pytest.mark.parametrize(("count", "chosen"), [(48, 0), (48, 1), (48, 13), (48, 48), (5, 3), (1, 1), (7, 4)])
def test_spread(count: int, chosen: int) -> None:
    found = spread(count, chosen)
    assert len(set(found)) == chosen and all(0 <= i < count for i in found) and found == sorted(found)
    if chosen > 1:
        gaps = [b - a for a, b in zip(found, [*found[1:], found[0] + count], strict=True)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("attention", ["official", "bf16", "int8-fp8"])
def test_a_guided_run_streams_and_stops_bringing_the_text_s_weights(attention: str) -> None:
    settings = GenerationSettings(num_frames=17, height=32, width=48)
    texts = [PromptEmbedding(torch.randn(5, 64), torch.randn(77, 32), 80) for _ in range(2)]
    latents = torch.randn(1, settings.latent_frames, 4, settings.latent_height, settings.latent_width)
    sigma = torch.tensor(0.5)
    with torch.inference_mode():
        want = GuidedVelocity(make(), texts, settings, attention=attention)(latents, sigma)
        model, lane = make(), LateLane()
        blocks = BlockStreamer(model.transformer_blocks, "cpu", last=["attn2.wkv"], lane=lane)
        velocity = GuidedVelocity(model, texts, settings, attention=attention, blocks=blocks)
        for _ in range(3):
            assert torch.equal(velocity(latents, sigma), want)
    assert blocks.short == (attention != "official") == (len(set(lane.copies())) == 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("precision", [None, "int8", "fp8"])
@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 2), (2, 2), (0, 3)])
def test_on_a_card(precision: str | None, resident: int, slots: int) -> None:
    want = list(passes(make(precision).cuda(), fused=True, device="cuda", count=6))
    model = make(precision)
    blocks = BlockStreamer(model.transformer_blocks, "cuda", resident=resident, slots=slots, last=["attn2.wkv"])
    for name, child in model.named_children():
        if name != "transformer_blocks":
            child.cuda()
    model.scale_shift_table.data = model.scale_shift_table.data.cuda()
    for velocity, known in zip(passes(model, blocks, True, 6, "cuda"), want, strict=True):
        assert torch.equal(velocity, known)
    blocks.close()
