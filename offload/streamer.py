"""Blocks that take turns in a few slots of device memory, each brought there while the ones before it compute.

    for block in streamer:   # every block in order, its parameters on the device, the same object each time
        x = block(x)

Each streamed block is one slab in pinned host memory; one copy brings it, on a stream of its own. Each use of a slot
is fenced by events on both sides: computation waits for the copy, the copy for the end of the use before it; the host
waits for neither. Copies run ahead by as many blocks as there are slots less one, and around the end: while the last
blocks of a pass compute, the first ones of the next are on their way. Blocks that stay on the device are spread evenly
between the streamed ones, so that each copy has the same time to hide in.

Where host memory is short, some of the streamed blocks come from their files at every use: threads read them into a few
staging buffers, ahead of the copies. The host waits for a block only if it is not read when its use begins.

Device memory: the resident blocks and `slots` times the largest streamed one. Host memory: the streamed blocks that are
not read from files, and `staging` times the largest one that is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .disk import BlockReads
from .pinned import HostSlab, Layout, lay_out
from .reader import Extent, default_ring


class Lane(Protocol):
    """Copies beside a computation, and what orders the two. A mark is a point in time on one of both sides."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begins a copy that does not start before the mark ``after`` (None: at once); gives the mark of its end."""

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes after the copy."""

    def used(self) -> Any:
        """The mark of all that was computed until now."""

    def ended(self, mark: Any) -> None:
        """Waits, on the host and whatever the thread, until the copy that ends with ``mark`` has ended."""

    def finish(self) -> None:
        """Waits, on the host, until nothing is under way."""


class CudaLane:
    """A stream for copies, and events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        end = torch.cuda.Event(blocking=True)  # threads that wait for it sleep
        end.record(self.stream)
        return end

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def used(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def ended(self, mark: torch.cuda.Event) -> None:
        with torch.cuda.device(self.device):  # a thread begins at card 0, and would make a context there
            mark.synchronize()

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


class HostLane:
    """For a device without streams: a copy is done when it has begun."""

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        target.copy_(source)

    def wait(self, mark: None) -> None:
        """Nothing is under way."""

    def used(self) -> None:
        """Everything is done."""

    def ended(self, mark: None) -> None:
        """It has."""

    def finish(self) -> None:
        """Nothing is under way."""


def spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` indices, as evenly as they go."""
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def laid_out(
    blocks: Sequence[nn.Module], indices: Iterable[int], last: Sequence[str] = (), *, pin: bool = False
) -> dict[int, HostSlab]:
    """Empty slabs for some of the blocks, by index, for a loader to fill: see :meth:`HostSlab.views`.

    Of the parameters only shapes, strides and types count; they may be on the meta device. A :class:`BlockStreamer`
    takes the slabs when the parameters are the views. With ``pin`` all memory is taken and pinned at once.

    Raises:
        ValueError: parameters that cannot stream.
        PinError: the host memory cannot be pinned; none of it stays pinned then.
    """
    slabs: dict[int, HostSlab] = {}
    try:
        for index in indices:
            slabs[index] = HostSlab(_layout(blocks[index], index, last))
            if pin:
                slabs[index].pin()
    except BaseException:
        for slab in slabs.values():
            slab.close()
        raise
    return slabs


def _layout(block: nn.Module, index: int, last: Sequence[str]) -> Layout:
    if next(block.buffers(), None) is not None:
        raise ValueError(f"block {index} has buffers; only parameters stream")
    return lay_out(dict(block.named_parameters()), last)


class _Streamed:
    """A streamed block: its slab, if it is in host memory, and its parameters there and in each slot."""

    def __init__(
        self, block: nn.Module, index: int, last: Sequence[str], slab: HostSlab | None, from_files: bool
    ) -> None:
        self.block, self.index = block, index
        self.layout: Layout = _layout(block, index, last)
        owners = {id(p): (m, n) for m in block.modules() for n, p in m._parameters.items() if p is not None}
        tensors = dict(block.named_parameters())
        self.owners = {name: owners[id(parameter)] for name, parameter in tensors.items()}
        self.in_slots: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
        self.slab: HostSlab | None = None
        """None: its bytes come from files."""
        if from_files:
            self.host = self._parameters(torch.empty(0, dtype=torch.uint8), frozenset(tensors))
            return
        if slab is None:
            if any(parameter.is_meta for parameter in tensors.values()):
                raise ValueError(f"block {index} has no values that could stream")
            slab = HostSlab(self.layout)
            slab.fill({name: p.detach() for name, p in tensors.items()})
        else:
            self._check(slab, tensors)
        self.slab = slab
        self.host = self._parameters(slab.memory)

    def _check(self, slab: HostSlab, tensors: Mapping[str, Tensor]) -> None:
        """A slab that was laid out for something else, or was not filled, would give wrong values without a word."""
        if slab.layout != self.layout:
            raise ValueError(f"the slab of block {self.index} was laid out for other parameters")
        for name, view in slab.views().items():
            if view.numel() and (tensors[name].device != view.device or tensors[name].data_ptr() != view.data_ptr()):
                raise ValueError(f"{name} of block {self.index} is not in the slab of the block")

    def _parameters(self, memory: Tensor, without: frozenset[str] = frozenset()) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(
                torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device="meta")
                if name in without
                else place.view(memory),
                requires_grad=False,
            )
            for name, place in self.layout.places.items()
        }

    def in_slot(self, slot: int, memory: Tensor, short: bool) -> dict[str, nn.Parameter]:
        """Its parameters in a slot. What a short copy leaves out has no values there, and says so if it is used."""
        found = self.in_slots.get((slot, short))
        if found is None:
            found = self._parameters(memory, self.layout.last if short else frozenset())
            self.in_slots[slot, short] = found
        return found

    def put(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, (module, own) in self.owners.items():
            module._parameters[own] = parameters[name]


class BlockStreamer:
    """Every block of a network in order, with its parameters on a device, again and again.

    Args:
        blocks: what to iterate over. The streamed ones' parameters move to host memory, one block at a time.
        device: where blocks are used.
        resident: how many stay there, if ``streamed`` does not say which do not; by default none.
        slots: places on the device for the others; 2 let one block's copy run beside another's computation.
        last: beginnings of names of parameters that :attr:`short` leaves out.
        lane: how copies are made; by default what the device has.
        streamed: the indices of the blocks that stream; by default as many as are not resident, evenly spread.
        slabs: the memory of streamed blocks that lie in such already, see :func:`laid_out`. It is theirs from now on,
            and pinned if it was not.
        files: for streamed blocks that come from files at every use, where each tensor lies, by its name in the block.
            Their parameters have no values but while they are used, also after :meth:`close`.
        staging: into how many buffers of host memory such blocks are read; 2 let a read run beside a copy.

    Raises:
        ValueError: impossible numbers, parameters that cannot stream, slabs or files of other blocks or other tensors.
        PinError: the host memory cannot be pinned.
        ReadError: a file cannot be opened; when iterating, it ended early or changed since. Another pass may follow.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device | str, *, resident: int | None = None, slots: int = 2,
        last: Sequence[str] = (), lane: Lane | None = None, streamed: Iterable[int] | None = None,
        slabs: Mapping[int, HostSlab] | None = None, files: Mapping[int, Mapping[str, Extent]] | None = None,
        staging: int = 2,
    ) -> None:  # fmt: skip
        self.blocks, self.device = list(blocks), torch.device(device)
        slabs, files = slabs or {}, files or {}
        chosen = _chosen(len(self.blocks), resident, streamed)
        if slots < 1 or staging < 1:
            raise ValueError(f"slots and staging have to be 1 or more: {slots}, {staging}")
        for index in sorted({*slabs, *files}):
            if index not in chosen or (index in slabs and index in files):
                kind = "has both a slab and files" if index in chosen else "has a slab or files and does not stream"
                raise ValueError(f"block {index} {kind}")
        self._short = self._lacks = False
        self.copied_bytes = 0
        """What was copied to the device until now."""
        self.lane: Lane = lane or (CudaLane(self.device) if self.device.type == "cuda" else HostLane())
        self.streamed: list[_Streamed] = []
        self._order: dict[int, _Streamed] = {}
        self._reads: BlockReads | None = None
        self._slots: list[Tensor] = []
        self._closed = False
        self._pass: object = None
        """The pass that began last; an earlier one that was left and not ended counts no more."""
        self._unclosed: weakref.finalize | None = None
        """For a streamer that nobody closes."""
        cuda = self.device.type == "cuda"
        try:
            for index in chosen:
                item = _Streamed(self.blocks[index], index, last, slabs.get(index), index in files)
                self.streamed.append(item)
                self._order[index] = item
                if item.slab is None:
                    continue  # its values go when it is known that the files hold it
                item.put(item.host)
                if cuda:
                    item.slab.pin()
            if files:
                described = {i.index: (i.layout, files[i.index]) for i in self.streamed if i.slab is None}
                ring = default_ring(self.device)
                self._reads = BlockReads(described, self.lane.ended, buffers=staging, ring=ring, pin=cuda)
                for index in described:
                    self._order[index].put(self._order[index].host)
            for index, block in enumerate(self.blocks):
                if index not in self._order:
                    block.to(self.device)
            size = max((item.layout.nbytes for item in self.streamed), default=0)
            count = min(slots, len(self.streamed))
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count)]
            kept = [item.slab for item in self.streamed if item.slab is not None]
            self._unclosed = weakref.finalize(self, _let_go, self.lane, self._reads, kept)
        except BaseException:
            for slab in slabs.values():
                slab.close()
            self.close()
            raise
        self._begin()

    @property
    def short(self) -> bool:
        """Whether copies leave out the parameters that are ``last``: they are not needed any more. Set to False, the
        next pass brings them again."""
        return self._short

    @short.setter
    def short(self, value: bool) -> None:
        self._lacks |= self._short and not value  # what was copied ahead
        self._short = value

    def _begin(self) -> None:
        self._lacks = False
        count = len(self._slots)
        self._copied = self._used = 0
        self._arrived: list[Any] = [None] * count
        # What had the slots' memory before may still be computed with.
        self._free: list[Any] = [self.lane.used()] * count
        self._holds: list[tuple[int, bool] | None] = [None] * count
        """Which block is in a slot, or on its way there, and whether without what is last."""
        if self._reads is not None:
            self._reads.forget()

    @property
    def device_bytes(self) -> int:
        """What the blocks take on the device."""
        stays = (b for i, b in enumerate(self.blocks) if i not in self._order)
        return sum(p.nbytes for b in stays for p in b.parameters()) + sum(s.numel() for s in self._slots)

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory, the buffers for those from files included."""
        slabs = sum(item.layout.nbytes for item in self.streamed if item.slab is not None)
        return slabs + (0 if self._reads is None else self._reads.host_bytes)

    @property
    def read_bytes(self) -> int:
        """What was read from files until now."""
        return 0 if self._reads is None else self._reads.read_bytes

    def _is_there(self, use: int) -> bool:
        """Whether the slot of the next copy, or the one of a later copy if each block has a slot, holds its block."""
        held = self._holds[use % len(self._slots)]
        return held is not None and held[0] == self.streamed[use % len(self.streamed)].index and held[1] <= self.short

    def _copy_ahead(self, now: bool) -> None:
        """Begins the copies for which there is a slot: all until the use that is `slots` ahead of the next one, or
        until one whose block is not read yet. With ``now`` the next use begins: its block is waited for."""
        self._read_ahead()
        while self._copied < self._used + len(self._slots):
            slot, item = self._copied % len(self._slots), self.streamed[self._copied % len(self.streamed)]
            if not self._is_there(self._copied):  # else it is there since the last pass
                memory = self._source(item, now and self._copied == self._used)
                if memory is None:
                    return
                short, size = self.short, item.layout.needed if self.short else item.layout.nbytes
                self._arrived[slot] = self.lane.copy(self._slots[slot][:size], memory[:size], self._free[slot])
                self._holds[slot] = item.index, short
                self.copied_bytes += size
                if item.slab is None and self._reads is not None:
                    self._reads.copied(self._arrived[slot])
            self._copied += 1
            self._read_ahead()

    def _source(self, item: _Streamed, wait: bool) -> Tensor | None:
        """Where the next copy is from; None if it is not read yet, and not waited for."""
        if item.slab is not None:
            return item.slab.memory
        assert self._reads is not None
        head = self._reads.asked[0] if self._reads.asked else None
        if head is None or head.use != self._copied or head.short > self.short:
            # What is needed changed since it was asked for: parameters that were left out are wanted again.
            self._reads.forget()
            self._read_ahead()
        return self._reads.take(wait)

    def _read_ahead(self) -> None:
        """Asks for the next blocks that are copied from files, as many as there are buffers for, within one pass."""
        if self._reads is None:
            return
        asked, count = self._reads.asked, len(self.streamed)
        turns = count > len(self._slots)  # else each block has a slot of its own, and stays there
        use = asked[-1].use + 1 if asked else self._copied
        while use < self._copied + count and self._reads.room:
            item = self.streamed[use % count]
            if item.slab is None and (turns or not self._is_there(use)):
                self._reads.ask(use, item.index, self.short)
            use += 1

    def __iter__(self) -> Iterator[nn.Module]:
        """One pass over all blocks. A pass that was left early is forgotten; the next one begins anew.

        Raises:
            RuntimeError: another pass began meanwhile, or the blocks were closed.
        """
        self._pass = mine = object()
        if self.streamed and (self._lacks or self._used % len(self.streamed)):
            self.lane.finish()
            self._begin()
        for index, block in enumerate(self.blocks):
            item = self._order.get(index)
            if self._pass is not mine:
                raise RuntimeError("another pass over the blocks began; they stream to one at a time")
            if item is None:
                yield block
                continue
            if self._closed:
                raise RuntimeError("the blocks were closed; they stream no more")
            self._copy_ahead(True)
            slot = self._used % len(self._slots)
            if self._arrived[slot] is not None:
                self.lane.wait(self._arrived[slot])
            item.put(item.in_slot(slot, self._slots[slot], (self._holds[slot] or (0, False))[1]))
            try:
                yield block
            finally:
                # One that was interrupted may end late, held by a traceback until then: in the midst of another.
                if self._pass is mine:
                    item.put(item.host)
                    if not self._closed:
                        self._free[slot] = self.lane.used()
                        self._used += 1
        if self.streamed and self._pass is mine and not self._closed:
            self._copy_ahead(False)

    def __len__(self) -> int:
        return len(self.blocks)

    def close(self, keep: Collection[int] = ()) -> dict[int, HostSlab]:
        """Ends all copies and reads and gives slots and pinned memory back.

        The blocks keep their values, in host memory; those from files have none. Slabs of the blocks in ``keep`` stay
        pinned, for the streamer that comes next: they are returned, by index, and are the caller's to close.
        """
        self._closed = True
        if self._unclosed is not None:
            self._unclosed.detach()
        self.lane.finish()
        if self._reads is not None:
            self._reads.close()
        self._slots = []
        kept: dict[int, HostSlab] = {}
        for item in self.streamed:
            if item.in_slots:  # a pass may be under way
                item.put(item.host)
            item.in_slots.clear()
            if item.slab is None:
                continue
            if item.index in keep:
                kept[item.index] = item.slab
            else:
                item.slab.close()
        return kept


def _let_go(lane: Lane, reads: BlockReads | None, slabs: Sequence[HostSlab]) -> None:
    """Of a streamer that is gone: the copies from its ``slabs``, which live until then, and to its slots end before the
    memory does; and so do its threads."""
    with contextlib.suppress(RuntimeError):  # a context that is broken copies no more
        lane.finish()
    if reads is not None:
        reads.stop()


def _chosen(count: int, resident: int | None, streamed: Iterable[int] | None) -> list[int]:
    """Which of ``count`` blocks stream."""
    if streamed is None:
        stay = resident or 0
        if not 0 <= stay <= count:
            raise ValueError(f"resident has to be 0 to {count}: {stay}")
        return spread(count, count - stay)
    chosen = sorted(set(streamed))
    if chosen and not (0 <= chosen[0] and chosen[-1] < count):
        raise ValueError(f"streamed has indices that are not those of {count} blocks: {chosen}")
    if resident not in (None, count - len(chosen)):
        raise ValueError(f"{len(chosen)} of {count} blocks stream, and {resident} are resident")
    return chosen
