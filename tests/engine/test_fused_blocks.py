"""The DiT's blocks by fused kernels: the official block's numbers, in every precision and mode, in any pieces."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small_dit import small_dit
from torch import Tensor

from solostep.engine.config import GenerationSettings
from solostep.engine.models import fused as fused_module
from solostep.engine.models.fused import FusedBlocks, Parking
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.text import PromptEmbedding
from solostep.kernels.attention import MODES
from solostep.kernels.scaled_mm import row_parts
from solostep.offload.planner import Savings
from solostep.offload.streamer import BlockStreamer, HostLane

HEADS = 2

TEXTS = [82, 80]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"latents": normal(2, 3, 4, 10, 6), "llm": normal(2, 5, 64), "clip": normal(2, 77, 32)}


def make(dtype: torch.dtype, precision: str | None = None, heads: int = HEADS) -> StepVideoTransformer:
    return small_dit(precision, dtype, heads)


def both(model: StepVideoTransformer, inputs: dict[str, Tensor], **more: object) -> tuple[Tensor, Tensor]:
    """The official blocks' velocity and the fused ones'."""
    given = {name: x.to(model.dtype) for name, x in inputs.items()}
    time = torch.tensor([0.3, 0.7])
    context = model.embed_text(given["llm"], given["clip"], TEXTS)
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


def test_a_single_frame(inputs: dict[str, Tensor]) -> None:
    """Its tokens come out of the convolution with channels apart."""
    want, found = both(make(torch.float32), inputs | {"latents": inputs["latents"][:, :1]})
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


def steps(
    model: StepVideoTransformer, inputs: dict[str, Tensor], mode: str, park: bool = False, blocks: object = None,
    count: int = 2, **more: object,
) -> list[Tensor]:  # fmt: skip
    """Velocities of some steps by fused blocks, whatever they save."""
    device = model.proj_out.weight.device
    given = {name: x.to(device, model.dtype) for name, x in inputs.items()}
    with torch.inference_mode():
        context = model.embed_text(given["llm"], given["clip"], TEXTS)
        fused = FusedBlocks(context, mode, blocks=len(model.transformer_blocks), **more)  # type: ignore[arg-type]
        parking = Parking() if park else None
        found = []
        for step in range(count):
            time = torch.tensor([0.3, 0.7], device=device) + 0.1 * step
            found.append(
                model(given["latents"], time, context, blocks=blocks, fused=fused, parking=parking)  # type: ignore[arg-type]
            )
    assert len(fused.text) == (4 if fused.keep_text else 0)
    # What stays lies together, a row's text of all blocks: not between what each pass takes and gives back.
    assert len({part.untyped_storage().data_ptr() for pair in fused.text.values() for part in pair}) == (
        2 if fused.keep_text else 0
    )
    return found


SAVINGS: list[dict[str, object]] = [
    {"head_groups": 2}, {"head_groups": 4}, {"keep_text": False}, {"park": True}, {"chunk": 50},
    {"park": True, "chunk": 50}, {"head_groups": 2, "keep_text": False, "park": True},
    {"head_groups": 4, "keep_text": False, "park": True, "chunk": 50},
]  # fmt: skip


def check(precision: str | None, savings: dict[str, object], found: list[Tensor], want: list[Tensor]) -> None:
    """Not a bit may differ. Sums of int8 products are exact, and so every CPU says the same; the other products are
    torch's, and some CPU may add otherwise when fewer channels or tokens come at a time (none was seen to)."""
    exact = precision == "int8" or not {"head_groups", "chunk"} & set(savings)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b) if exact else relative(a, b) < 1e-2, savings


@pytest.mark.parametrize(
    ("precision", "mode", "tried"),
    [
        (None, "bf16", SAVINGS[-1:]), ("int8", "int8", SAVINGS), (None, "int8-fp8", SAVINGS[-1:]),
        ("fp8", "int8", SAVINGS[-1:]),
        *(pytest.param(*case, SAVINGS, marks=pytest.mark.more) for case in (
            (None, "bf16"), (None, "int8"), (None, "int8-fp8"), ("int8", "bf16"), ("int8", "int8-fp8"),
        )),
        *(pytest.param(*case, SAVINGS[-2:], marks=pytest.mark.more) for case in (
            ("fp8", "int8"), ("int8-weight", "bf16"), ("nf4", "int8-fp8"),
        )),
    ],
)  # fmt: skip
def test_savings_change_nothing(
    precision: str | None, mode: str, tried: list[dict[str, object]], inputs: dict[str, Tensor]
) -> None:
    """Each alone, and together; together only in formats that differ from the others in their products alone."""
    model = make(torch.bfloat16, precision, heads=4)
    want = steps(model, inputs, mode)
    for savings in tried:
        check(precision, savings, steps(model, inputs, mode, **savings), want)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "precision", [None, "int8", *(pytest.param(p, marks=pytest.mark.more) for p in ("nf4", "fp8"))]
)
def test_savings_with_streamed_blocks(precision: str | None, inputs: dict[str, Tensor]) -> None:
    """A slot holds one block after the other: what was narrowed from one must not serve for the next."""
    want = steps(make(torch.bfloat16, precision, heads=4), inputs, "int8")
    for savings in SAVINGS[-2:]:
        model = make(torch.bfloat16, precision, heads=4)
        blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=1, lane=HostLane())
        check(precision, savings, steps(model, inputs, "int8", blocks=blocks, **savings), want)  # type: ignore[arg-type]
        blocks.close()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_heads_are_computed_a_group_at_a_time(
    precision: str | None, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one normed input; of qkv only a group's part is there when the next one's is made."""
    model, seen, alive = make(torch.bfloat16, precision, heads=4), [], []
    real = fused_module.product

    def watch(linear, rows, dtype):  # type: ignore[no-untyped-def]
        made = real(linear, rows, dtype)
        if linear.out_features == 3 * 128:
            assert not any(ref() is not None for ref in alive)
            seen.append(rows[0].data_ptr() if isinstance(rows, tuple) else rows.data_ptr())
            alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(fused_module, "product", watch)
    steps(model, inputs, "int8", count=1, head_groups=4)
    assert len(seen) == 2 * 2 * 4  # blocks, rows, groups
    assert all(len(set(seen[i : i + 4])) == 1 for i in range(0, len(seen), 4))


def test_heads_that_cannot_be_grouped(inputs: dict[str, Tensor]) -> None:
    model = make(torch.bfloat16, heads=4)
    with pytest.raises(ValueError, match="head_groups has to divide the 4 heads, and 3 does not"):
        steps(model, inputs, "bf16", head_groups=3)
    with pytest.raises(ValueError, match="head_groups has to be at least 1"):
        FusedBlocks([], head_groups=0)
    model.transformer_blocks[0].attn1.wqkv = torch.nn.Sequential(model.transformer_blocks[0].attn1.wqkv)
    steps(model, inputs, "bf16", count=1)
    with pytest.raises(ValueError, match="head groups are not possible"):
        steps(model, inputs, "bf16", count=1, head_groups=2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parked_rows_take_turns(count: int) -> None:
    """Every row once a turn, each with its own values, the one that is there first; final tokens leave early."""
    rows = [torch.full((1, 10, 4), float(i)) for i in range(count)]
    parked = Parking().park((row.clone() for row in rows), count)
    place, last = parked.place.data_ptr(), count - 1
    for _ in range(3):
        order = []
        for i, x in parked.turns():
            assert x.data_ptr() == place and torch.equal(x, rows[i])
            order.append(i)
            for start, stop in ((0, 4), (4, 8)):  # the last two tokens are not told of
                x[:, start:stop] += 10
                parked.final(stop)
            x[:, 8:] += 10
            rows[i] += 10
        assert order[0] == last and sorted(order) == list(range(count))
        last = order[-1]
    with pytest.raises(ValueError, match="fewer than 3 rows"):
        Parking().park(iter(rows[:1]), 3)


def test_parking_takes_its_memory_once_and_gives_it_back() -> None:
    parking = Parking()
    hosts = [parking.park([torch.zeros(1, 5, 4), torch.ones(1, 5, 4)], 2).host for _ in range(2)]
    assert hosts[0][0].data_ptr() == hosts[1][0].data_ptr() != hosts[0][1].data_ptr()
    slab = weakref.ref(parking._slab)  # type: ignore[arg-type]
    parking.park([torch.zeros(1, 6, 4), torch.ones(1, 6, 4)], 2)  # another length
    del hosts
    gc.collect()
    assert slab() is None
    slab = weakref.ref(parking._slab)  # type: ignore[arg-type]
    del parking
    gc.collect()
    assert slab() is None


@pytest.mark.parametrize("keep_text", [True, False])
def test_a_guided_run_saves(keep_text: bool) -> None:
    """The same velocities; weights of the text's keys and values come at each step unless those are kept."""
    settings = GenerationSettings(num_frames=17, height=160, width=96)
    texts = [PromptEmbedding(torch.randn(5, 64), torch.randn(77, 32), length) for length in TEXTS]
    latents, sigma = torch.randn(1, 3, 4, 10, 6), torch.tensor(0.5)
    model = make(torch.bfloat16, "int8")
    savings = Savings(2, keep_text, park=True, chunk=50)
    with torch.inference_mode():
        want = GuidedVelocity(model, texts, settings, attention="int8")(latents, sigma)
        blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=1, last=["attn2.wkv"])
        blocks.short = True  # as a run before this one left it
        velocity = GuidedVelocity(model, texts, settings, attention="int8", blocks=blocks, savings=savings)
        assert not blocks.short and not velocity._records
        for _ in range(3):
            assert torch.equal(velocity(latents, sigma), want)
            assert blocks.short == keep_text
        one = GuidedVelocity(model, texts[:1], settings, attention="int8", blocks=blocks, savings=savings)
        assert one.parking is None  # nothing to take turns with


def test_a_guided_run_refuses_what_it_cannot_save() -> None:
    model, settings = make(torch.bfloat16), GenerationSettings(num_frames=17, height=160, width=96)
    texts = [PromptEmbedding(torch.randn(5, 64), torch.randn(77, 32), length) for length in TEXTS]
    with pytest.raises(ValueError, match="only fused blocks save memory"):
        GuidedVelocity(model, texts, settings, savings=Savings(park=True))
    GuidedVelocity(model, texts, settings, savings=Savings())
    with pytest.raises(ValueError, match="head_groups has to divide the 2 heads, and 4 does not"):
        GuidedVelocity(model, texts, settings, attention="bf16", savings=Savings(head_groups=4))
    with pytest.raises(ValueError, match="between fused blocks only"):
        model(torch.zeros(1, 3, 4, 10, 6), torch.zeros(1), [], parking=Parking())


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
    with pytest.raises(ValueError, match="backend for int8 has to be one of hopper, triton, torch, not 'sdpa'"):
        FusedBlocks([], mode="int8", backend="sdpa")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("mode", MODES)
def test_workspaces_are_taken_once(mode: str) -> None:
    """After the first step nothing comes from the driver, and nothing goes back to it."""
    model = make(torch.bfloat16, "int8", heads=4).cuda()
    settings = GenerationSettings(num_frames=17, height=544, width=480)
    texts = [PromptEmbedding(torch.randn(5, 64), torch.randn(77, 32), length) for length in (82, 80)]
    taken = []
    with torch.inference_mode():
        velocity = GuidedVelocity(model, texts, settings, attention=mode, graph=False)
        for step in range(4):
            velocity(torch.randn(1, 3, 4, 34, 30), torch.tensor(1 - 0.2 * step))
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            taken.append([stats[f"segment.all.{name}"] for name in ("allocated", "freed")])
    assert taken[0][0] > 0 and taken[1:] == taken[:1] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_savings_change_nothing_on_a_card(precision: str, mode: str) -> None:
    """Not a bit, with copies beside computation and with streamed blocks; and memory is what they are there for."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = {"latents": normal(2, 6, 4, 34, 30), "llm": normal(2, 5, 64), "clip": normal(2, 77, 32)}
    model = make(torch.bfloat16, precision, heads=4).cuda()
    want = steps(model, inputs, mode, count=3)
    peaks = []
    # Chunks of 50 tokens go to another fp8 kernel; plans have none below 4,743.
    larger = [s | {"chunk": 700} if "chunk" in s else s for s in SAVINGS]
    tried = [{}, {"park": True}, {"chunk": 1500}, {"chunk": 1500, "head_groups": 4}, *larger]
    for savings in tried:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = steps(model, inputs, mode, count=3, **savings)  # type: ignore[arg-type]
        peaks.append(torch.cuda.max_memory_allocated())
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), savings
    row = 6 * 34 * 30 * 4 * 128 * 2
    assert peaks[0] - peaks[1] > 0.9 * row  # at the peak, in the feed-forward, one row less
    assert peaks[2] - peaks[3] > row  # 10 or 8 bytes a value in attention, and 5 or 4.5
    blocks = BlockStreamer(model.transformer_blocks, "cuda", slots=2)
    found = steps(model, inputs, mode, count=3, blocks=blocks, **larger[-1])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    blocks.close()


@pytest.mark.parametrize(
    ("tokens", "size", "ends"),
    [(100, 1000, [100]), (1000, 300, [300, 600, 1000]), (1000, 400, [400, 800, 1000]), (50, 20, [50]), (0, 5, []),
     (427, 300, [427]), (428, 300, [300, 428])],
)  # fmt: skip
def test_no_chunk_is_a_few_tokens(tokens: int, size: int, ends: list[int]) -> None:
    found = list(row_parts(tokens, size))
    assert [end for _, end in found] == ends
    assert [start for start, _ in found] == [0, *ends][: len(ends)]
