"""Streamed blocks: the same bits as resident ones, whatever the slots; copies begin early and never too early."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_dit import small_dit
from torch import Tensor, nn

from solostep.engine.config import GenerationSettings
from solostep.engine.headers import read_header, torch_type
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.text import PromptEmbedding
from solostep.offload.pinned import ALIGNMENT, HostSlab, lay_out
from solostep.offload.reader import Extent, Ring
from solostep.offload.streamer import BlockStreamer, laid_out, spread

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
    lock: threading.Lock = field(default_factory=threading.Lock)

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        assert after is None or after.done, "a copy into a slot that is in use"
        target.fill_(0x7F)  # a huge number in bf16, NaN in e4m3, 127 in int8
        self.log.append(("copy", source.numel()))
        self.under_way.append(Mark(target=target, source=source))
        return self.under_way[-1]

    def wait(self, mark: Mark) -> None:
        self.log.append(("wait", 0))
        self.ended(mark)

    def used(self) -> Mark:
        return Mark(done=True)

    def ended(self, mark: Mark) -> None:
        with self.lock:
            if not mark.done and mark.target is not None and mark.source is not None:
                mark.target.copy_(mark.source)
                mark.done = True

    def finish(self) -> None:
        for mark in self.under_way:
            self.wait(mark)

    def copies(self) -> list[int]:
        return [size for what, size in self.log if what == "copy"]


make = functools.partial(small_dit, layers=LAYERS)


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


def every(nth: int, *choices: list[Any]) -> list[Any]:
    """All combinations, of which each n-th runs by default: with an n prime to their numbers, every choice with many
    of the others."""
    return [
        case if i % nth == 0 else pytest.param(*case, marks=pytest.mark.more)
        for i, case in enumerate(itertools.product(*choices))
    ]


@functools.cache
def resident(precision: str | None, fused: bool) -> list[Tensor]:
    return list(passes(make(precision), fused=fused, count=4))


@pytest.mark.parametrize(
    ("precision", "fused", "places"),
    every(4, [None, "int8", "fp8", "int8-weight"], [False, True],
          [(0, 1), (0, 2), (2, 2), (1, 3), (4, 2), (5, 2), (0, 9)]),
)  # fmt: skip
def test_streamed_is_resident_bit_for_bit(precision: str | None, fused: bool, places: tuple[int, int]) -> None:
    """``places``: blocks that are resident, and slots for the others."""
    want, stay = resident(precision, fused), places[0]
    model = make(precision)
    lane = LateLane()
    blocks = BlockStreamer(
        model.transformer_blocks, "cpu", resident=stay, slots=places[1], last=["attn2.wkv"], lane=lane
    )
    for velocity, known in zip(passes(model, blocks, fused, count=4), want, strict=True):
        assert torch.equal(velocity, known)
    assert bool(lane.copies()) == (stay < LAYERS)
    blocks.close()
    for velocity, known in zip(passes(model, fused=fused, count=1), want, strict=False):  # the blocks are whole again
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


@dataclass
class Fences(LateLane):
    """Notes when each slot was used last: a copy into it has to come after that, and after what was there before."""

    begun: int = 0
    uses: dict[int, int] = field(default_factory=dict)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Mark:
        assert isinstance(after, int), "a copy that comes after nothing"
        assert after >= self.uses.get(target.data_ptr(), 0), "a copy that may come before the end of a use"
        return super().copy(target, source, None)

    def used(self) -> Any:
        return self.begun

    def use(self, block: nn.Module) -> None:
        self.begun += 1
        self.uses[min(p.data_ptr() for p in block.parameters() if not p.is_meta)] = self.begun


@pytest.mark.parametrize(("stay", "slots"), [(0, 1), (0, 2), (2, 2), (1, 3), (0, 9)])
def test_no_copy_comes_before_the_last_use_of_its_slot(stay: int, slots: int) -> None:
    """On a card the host is ahead of the computation: what orders the two is the mark alone."""
    model, lane = make(), Fences()
    blocks = BlockStreamer(model.transformer_blocks, "cpu", resident=stay, slots=slots, last=["attn2.wkv"], lane=lane)
    for number, leave in enumerate([LAYERS, LAYERS, 3, LAYERS, 1, LAYERS]):
        for i, block in enumerate(blocks):
            lane.use(block)
            if i == leave:
                break
        blocks.short = number % 3 > 0
    assert len(lane.copies()) >= LAYERS - stay


def test_a_pass_that_ends_late_disturbs_no_other() -> None:
    """An interrupted one lives as long as its traceback; one that goes on beside another would see wrong weights."""
    model = make()
    want = [block.attn1.wqkv.weight.clone() for block in model.transformer_blocks]
    blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=2, lane=LateLane())
    for reached in (1, 2, 3):
        late, inside = iter(blocks), iter(blocks)
        for _ in range(reached):
            next(late)
        for i, block in enumerate(inside):
            if i == 1:
                before = [p.data_ptr() for p in block.parameters()]
                late.close()
                assert [p.data_ptr() for p in block.parameters()] == before
            assert torch.equal(block.attn1.wqkv.weight, want[i])
    late, other = iter(blocks), iter(blocks)
    next(late), next(other)
    with pytest.raises(RuntimeError, match="one at a time"):
        next(late)
    assert sum(1 for _ in other) == LAYERS - 1


def test_a_streamer_that_nobody_closes_ends_its_copies_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is given back while a copy to or from it is under way may be another tensor's by then."""
    done: list[str] = []
    lane = LateLane()
    monkeypatch.setattr(lane, "finish", lambda: done.append("finish"))
    blocks = BlockStreamer(make().transformer_blocks, "cpu", lane=lane)
    list(blocks)
    for item in blocks.streamed:
        assert item.slab is not None
        weakref.finalize(item.slab, done.append, "a slab")
    del item
    blocks.blocks.append(blocks)  # what is in a cycle goes in no order
    del blocks
    gc.collect()
    assert done == ["finish", *["a slab"] * LAYERS]
    done.clear()
    blocks = BlockStreamer(make().transformer_blocks, "cpu", lane=lane)
    blocks.close()
    del blocks
    gc.collect()
    assert done == ["finish"]


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
    with pytest.raises(ValueError, match="resident has to be 0 to 5: 6"):
        BlockStreamer(blocks, "cpu", resident=6)
    with pytest.raises(ValueError, match="slots and staging have to be 1 or more: 0, 2"):
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


def stored(blocks: Any, folder: Path, per_file: int = 2) -> dict[int, dict[str, Extent]]:
    """The blocks' parameters in files of so many blocks: where each lies."""
    found: dict[int, dict[str, Extent]] = {i: {} for i in range(len(blocks))}
    for first in range(0, len(blocks), per_file):
        some = range(first, min(first + per_file, len(blocks)))
        file = folder / f"{first}.safetensors"
        save_file({f"{i}.{n}": p.detach().contiguous() for i in some for n, p in blocks[i].named_parameters()}, file)
        for info in read_header(file).values():
            index, name = info.stored_name.split(".", 1)
            found[int(index)][name] = Extent(file, info.offset, info.shape, torch_type(info.dtype))
    return found


TIERS = {
    "all files": (range(LAYERS), range(LAYERS)), "one": (range(LAYERS), [3]), "some resident": ([0, 2, 3], [2, 3]),
    "three places": ([1, 2, 4], [1, 4]), "alone": ([2], [2]), "ends": (range(LAYERS), [0, 4]),
}  # fmt: skip
"""Which blocks stream, and which of those come from files."""


FROM_FILES = [
    ("all files", "int8", True), ("one", None, True), ("some resident", "fp8", False), ("ends", "int8-weight", True),
    ("three places", "fp8", True), ("alone", "int8", False),
]  # fmt: skip


@pytest.mark.parametrize(("case", "slots", "staging"), every(5, FROM_FILES, [1, 2, 3, 4], [1, 2, 3]))
def test_from_files_is_resident_bit_for_bit(
    case: tuple[str, str | None, bool], slots: int, staging: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers, precision, fused = case
    monkeypatch.setattr("solostep.offload.streamer.default_ring", lambda device: Ring(3, 1, 5000))
    want = resident(precision, fused)
    model, (streamed, disk) = make(precision), TIERS[tiers]
    files = stored(model.transformer_blocks, tmp_path)
    blocks = BlockStreamer(
        model.transformer_blocks, "cpu", streamed=streamed, slots=slots, last=["attn2.wkv"], lane=LateLane(),
        files={i: files[i] for i in disk}, staging=staging,
    )  # fmt: skip
    for velocity, known in zip(passes(model, blocks, fused, count=4), want, strict=True):
        assert torch.equal(velocity, known)
    for index, block in enumerate(model.transformer_blocks):
        assert all(p.is_meta == (index in disk) for p in block.parameters())
    blocks.close()
    for index, block in enumerate(model.transformer_blocks):
        assert all(p.is_meta == (index in disk) for p in block.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        list(passes(model, count=1))


@pytest.mark.parametrize(("slots", "staging"), [(1, 1), (2, 2), (3, 1), (2, 4), (9, 2), (4, 2)])
def test_short_reads_and_whole_ones_again(slots: int, staging: int, tmp_path: Path) -> None:
    model, known = make("int8"), make("int8")
    files = stored(model.transformer_blocks, tmp_path)
    lane = LateLane()
    streamed, disk = [0, 1, 2, 4], [0, 2, 4]
    blocks = BlockStreamer(
        model.transformer_blocks, "cpu", streamed=streamed, slots=slots, last=["attn2.wkv"], lane=lane,
        files={i: files[i] for i in disk}, staging=staging,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for n in range(40):
        before = blocks.short or n % 11 == 0  # copies that are under way stay as they are
        if n % 2 == 0:
            blocks.short = bool(torch.randint(2, (), generator=generator))
        for index, block in enumerate(blocks):
            for (name, parameter), right in zip(
                block.named_parameters(), known.transformer_blocks[index].parameters(), strict=True
            ):
                left_out = parameter.is_meta
                assert not left_out or ((blocks.short or before) and name.startswith("attn2.wkv") and index in streamed)
                assert left_out or torch.equal(parameter.float(), right.float())
            if n % 7 == 6 and index == n % 5:
                break
            if n % 11 == 10 and index == 3:  # turned over in the middle of a pass
                blocks.short = not blocks.short
                break
    blocks.close()


def test_short_passes_read_less_and_copies_and_reads_are_counted(tmp_path: Path) -> None:
    model = make("int8")
    one = dict(model.transformer_blocks[0].named_parameters())
    whole = sum(p.nbytes for p in one.values())
    short = sum(p.nbytes for n, p in one.items() if not n.startswith("attn2.wkv"))
    files = stored(model.transformer_blocks, tmp_path)
    lane = LateLane()
    blocks = BlockStreamer(
        model.transformer_blocks, "cpu", last=["attn2.wkv"], lane=lane, files={i: files[i] for i in (0, 1, 3)}
    )
    layout = blocks.streamed[0].layout
    assert blocks.host_bytes == 4 * layout.nbytes  # two slabs and two buffers
    assert blocks.device_bytes == 2 * layout.nbytes
    assert blocks.read_bytes == blocks.copied_bytes == 0

    def reads(count: int) -> int:
        """Bytes of so many passes. Afterwards the next blocks are read ahead: that ends when asked for."""
        before = blocks.read_bytes
        for _ in range(count):
            list(blocks)
        until = time.monotonic() + 30
        while any(read.left for read in blocks._reads.asked) and time.monotonic() < until:
            time.sleep(0.001)
        return blocks.read_bytes - before

    ahead = 2 + 2  # blocks that were read for the next pass: in the buffers, and in the slots
    assert reads(1) in [n * whole for n in range(3, 3 + ahead + 1)]
    assert reads(2) in [n * whole for n in range(6 - ahead, 6 + ahead + 1)]
    blocks.short = True
    reads(2)
    assert reads(3) in [n * short for n in range(9 - ahead, 9 + ahead + 1)]
    assert blocks.copied_bytes == sum(lane.copies())
    assert set(lane.copies()) == {layout.nbytes, layout.needed}
    blocks.close()


def test_what_has_its_own_slot_is_read_once(tmp_path: Path) -> None:
    model = make()
    files = stored(model.transformer_blocks, tmp_path)
    size = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
    blocks = BlockStreamer(model.transformer_blocks, "cpu", slots=9, lane=LateLane(), files=files)
    for _ in range(4):
        assert sum(1 for _ in blocks) == LAYERS
    assert blocks.read_bytes == LAYERS * size
    blocks.close()


def test_slabs_that_a_loader_fills(tmp_path: Path) -> None:
    want = list(passes(make("int8")))
    known, model = make("int8"), make("int8")
    blocks = model.transformer_blocks.to("meta")
    slabs = laid_out(blocks, [0, 3], ["attn2.wkv"])
    assert set(slabs) == {0, 3} and slabs[0].layout.last
    for index, block in enumerate(blocks):
        views = slabs[index].views() if index in slabs else {}
        for name, parameter in known.transformer_blocks[index].named_parameters():
            if name in views:
                views[name].copy_(parameter)
            module, _, own = name.rpartition(".")
            value = nn.Parameter(views.get(name, parameter), requires_grad=False)
            setattr(block.get_submodule(module), own, value)
    memory = {i: slab.memory.data_ptr() for i, slab in slabs.items()}
    lane = LateLane()
    streamer = BlockStreamer(
        blocks, "cpu", streamed=[0, 2, 3], last=["attn2.wkv"], lane=lane, slabs=slabs,
        files={2: stored(known.transformer_blocks, tmp_path)[2]},
    )  # fmt: skip
    for velocity, right in zip(passes(model, streamer), want, strict=True):
        assert torch.equal(velocity, right)
    copied = {mark.source.data_ptr() for mark in lane.under_way if mark.source is not None}
    assert set(memory.values()) <= copied and streamer.streamed[0].slab is slabs[0]
    kept = streamer.close(keep=[1, 2, 3])
    assert kept == {3: slabs[3]}  # of what had one
    fewer = BlockStreamer(
        blocks, "cpu", streamed=range(LAYERS), files={2: stored(known.transformer_blocks, tmp_path)[2]},
        last=["attn2.wkv"], slabs=kept,
    )  # fmt: skip
    assert fewer.streamed[3].slab is slabs[3] and fewer.streamed[0].slab is not slabs[0]
    for velocity, right in zip(passes(model, fewer), want, strict=True):  # a block's values outlive its streamer
        assert torch.equal(velocity, right)
    fewer.close()


def test_slabs_and_files_of_other_blocks_are_refused(tmp_path: Path) -> None:
    model = make()
    blocks, files = model.transformer_blocks, stored(model.transformer_blocks, tmp_path)
    slabs = laid_out(blocks, [1])
    with pytest.raises(ValueError, match="is not in the slab"):
        BlockStreamer(blocks, "cpu", slabs=slabs)
    with pytest.raises(ValueError, match="block 1 was laid out for other"):
        BlockStreamer(blocks, "cpu", slabs=laid_out(blocks, [1], ["attn2"]))
    with pytest.raises(ValueError, match="block 1 has both"):
        BlockStreamer(blocks, "cpu", slabs=slabs, files={1: files[1]})
    for wrong in ({"slabs": slabs}, {"files": {1: files[1]}}, {"files": {7: files[1]}}):
        with pytest.raises(ValueError, match="does not stream"):
            BlockStreamer(blocks, "cpu", streamed=[0, 2], **wrong)
    with pytest.raises(ValueError, match="not those of 5 blocks"):
        BlockStreamer(blocks, "cpu", streamed=[0, 5])
    with pytest.raises(ValueError, match="2 of 5 blocks stream, and 2 are resident"):
        BlockStreamer(blocks, "cpu", streamed=[0, 4], resident=2)
    with pytest.raises(ValueError, match="slots and staging"):
        BlockStreamer(blocks, "cpu", files=files, staging=0)
    with pytest.raises(ValueError, match="block 0 and its files hold different tensors: attn1.wo.weight"):
        BlockStreamer(blocks, "cpu", files={0: {n: e for n, e in files[0].items() if n != "attn1.wo.weight"}})
    other = files[0] | {"attn1.wo.weight": files[0]["attn1.wqkv.weight"]}
    with pytest.raises(ValueError, match="block 0 has attn1.wo.weight as"):
        BlockStreamer(blocks, "cpu", files={0: other})
    assert all(not p.is_meta for p in blocks.parameters())
    blocks.to("meta")
    with pytest.raises(ValueError, match="block 0 has no values"):
        BlockStreamer(blocks, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("staging", [1, 2, 3])
@pytest.mark.parametrize("disk", [range(8), [1, 5], [6]])
def test_from_files_on_a_card(slots: int, staging: int, disk: Any, tmp_path: Path) -> None:
    """Square matrices of 8 MB one after the other, with work on the card that takes longer than its launching."""
    torch.manual_seed(0)
    size = 2048
    known = [nn.Linear(size, size, dtype=torch.bfloat16, device="cuda").requires_grad_(False) for _ in range(8)]
    files = stored(known, tmp_path, 3)
    blocks = nn.ModuleList(nn.Linear(size, size, dtype=torch.bfloat16, device="meta") for _ in range(8))
    slabs = laid_out(blocks, [i for i in range(7) if i not in disk], pin=True)
    for index, block in enumerate(blocks):
        views = slabs[index].views() if index in slabs else {}
        for name, parameter in known[index].named_parameters():
            if index in slabs:
                views[name].copy_(parameter)
            if index not in disk:
                setattr(block, name, nn.Parameter(views.get(name, parameter), requires_grad=False))
    streamer = BlockStreamer(
        blocks, "cuda", streamed=[*slabs, *disk], slots=slots, slabs=slabs, files={i: files[i] for i in disk},
        staging=staging, last=["bias"] if not slabs else (),
    )  # fmt: skip

    def run(through: Any) -> list[Tensor]:
        values, x = [], torch.randn(4096, size, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
        with torch.inference_mode():
            for _ in range(6):
                for block in through:
                    for _ in range(4):
                        x = nn.functional.rms_norm(x @ block.weight, [size])
                values.append(x.clone())
                if not slabs and isinstance(through, BlockStreamer):
                    through.short = True
        return values

    before = set(threading.enumerate())
    for value, right in zip(run(streamer), run(known), strict=True):
        assert torch.equal(value, right)
    for _ in streamer:  # left early, with reads and copies under way
        break
    for value, right in zip(run(streamer), run(known), strict=True):
        assert torch.equal(value, right)
    for _ in streamer:
        break
    streamer.close()
    assert len(threading.enumerate()) < len(before)


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
