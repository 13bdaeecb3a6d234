"""Blocks that take turns in a few slots of device memory, each brought there while the ones before it compute.

    for block in streamer:   # every block in order, its parameters on the device, the same object each time
        x = block(x)

Each streamed block is one slab in pinned host memory; one copy brings it, on a stream of its own. Each use of a slot
is fenced by events on both sides: computation waits for the copy, the copy for the end of the use before it; the host
waits for neither. Copies run ahead by as many blocks as there are slots less one, and around the end: while the last
blocks of a pass compute, the first ones of the next are on their way. Blocks that stay on the device are spread evenly
between the streamed ones, so that each copy has the same time to hide in.

Device memory: the resident blocks and `slots` times the largest streamed one. Host memory: the streamed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .pinned import HostSlab, Layout, lay_out


class Lane(Protocol):
    """Copies beside a computation, and what orders the two. A mark is a point in time on one of both sides."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Begins a copy that does not start before the mark ``after`` (None: at once); gives the mark of its end."""

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes after the copy."""

    def used(self) -> Any:
        """The mark of all that was computed until now."""

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
        end = torch.cuda.Event()
        end.record(self.stream)
        return end

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def used(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

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

    def finish(self) -> None:
        """Nothing is under way."""


def spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` indices, as evenly as they go."""
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


class _Streamed:
    """A block in host memory: its slab, and its parameters there and in each slot."""

    def __init__(self, block: nn.Module, index: int, last: Sequence[str]) -> None:
        self.block, self.index = block, index
        if next(block.buffers(), None) is not None:
            raise ValueError(f"block {index} has buffers; only parameters stream")
        owners = {id(p): (m, n) for m in block.modules() for n, p in m._parameters.items() if p is not None}
        tensors = dict(block.named_parameters())
        self.owners = {name: owners[id(parameter)] for name, parameter in tensors.items()}
        self.layout: Layout = lay_out(tensors, last)
        self.slab = HostSlab(self.layout)
        self.slab.fill({name: p.detach() for name, p in tensors.items()})
        self.host = self._parameters(self.slab.memory)
        self.in_slots: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
        self.put(self.host)

    def _parameters(self, memory: Tensor, without: frozenset[str] = frozenset()) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(
                torch.empty(place.shape, dtype=place.dtype, device="meta") if name in without else place.view(memory),
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
        resident: how many stay there.
        slots: places on the device for the others; 2 let one block's copy run beside another's computation.
        last: beginnings of names of parameters that :attr:`short` leaves out.
        lane: how copies are made; by default what the device has.

    Raises:
        ValueError: impossible numbers, or parameters that cannot stream.
        PinError: the host memory cannot be pinned.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device | str, *, resident: int = 0, slots: int = 2,
        last: Sequence[str] = (), lane: Lane | None = None,
    ) -> None:  # fmt: skip
        self.blocks, self.device = list(blocks), torch.device(device)
        if not 0 <= resident <= len(self.blocks) or slots < 1:
            raise ValueError(f"resident has to be 0 to {len(self.blocks)} and slots 1 or more: {resident}, {slots}")
        self.short = False
        """Whether copies leave out the parameters that are ``last``: they are not needed any more."""
        self.lane: Lane = lane or (CudaLane(self.device) if self.device.type == "cuda" else HostLane())
        self.streamed: list[_Streamed] = []
        self._order: dict[int, _Streamed] = {}
        try:
            for index in spread(len(self.blocks), len(self.blocks) - resident):
                item = _Streamed(self.blocks[index], index, last)
                self.streamed.append(item)
                self._order[index] = item
                if self.device.type == "cuda":
                    item.slab.pin()
            for index, block in enumerate(self.blocks):
                if index not in self._order:
                    block.to(self.device)
            size = max((item.layout.nbytes for item in self.streamed), default=0)
            count = min(slots, len(self.streamed))
            self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count)]
        except BaseException:
            self.close()
            raise
        self._begin()

    def _begin(self) -> None:
        count = len(self._slots)
        self._copied = self._used = 0
        self._arrived: list[Any] = [None] * count
        self._free: list[Any] = [None] * count
        self._holds: list[tuple[int, bool] | None] = [None] * count
        """Which block is in a slot, or on its way there, and whether without what is last."""

    @property
    def device_bytes(self) -> int:
        """What the blocks take on the device."""
        stays = (b for i, b in enumerate(self.blocks) if i not in self._order)
        return sum(p.nbytes for b in stays for p in b.parameters()) + sum(s.numel() for s in self._slots)

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory."""
        return sum(item.layout.nbytes for item in self.streamed)

    def _copy_ahead(self) -> None:
        """Begins the copies for which there is a slot: all until the use that is `slots` ahead of the next one."""
        while self._copied < self._used + len(self._slots):
            slot, item = self._copied % len(self._slots), self.streamed[self._copied % len(self.streamed)]
            held = self._holds[slot]
            if held is None or held[0] != item.index or held[1] > self.short:  # else it is there since the last pass
                size = item.layout.needed if self.short else item.layout.nbytes
                self._arrived[slot] = self.lane.copy(
                    self._slots[slot][:size], item.slab.memory[:size], self._free[slot]
                )
                self._holds[slot] = item.index, self.short
            self._copied += 1

    def __iter__(self) -> Iterator[nn.Module]:
        """One pass over all blocks. A pass that was left early is forgotten; the next one begins anew."""
        if self.streamed and self._used % len(self.streamed):
            self.lane.finish()
            self._begin()
        for index, block in enumerate(self.blocks):
            item = self._order.get(index)
            if item is None:
                yield block
                continue
            self._copy_ahead()
            slot = self._used % len(self._slots)
            if self._arrived[slot] is not None:
                self.lane.wait(self._arrived[slot])
            item.put(item.in_slot(slot, self._slots[slot], (self._holds[slot] or (0, False))[1]))
            try:
                yield block
            finally:
                item.put(item.host)
                self._free[slot] = self.lane.used()
                self._used += 1
        if self.streamed:
            self._copy_ahead()

    def __len__(self) -> int:
        return len(self.blocks)

    def close(self) -> None:
        """Ends all copies and gives slots and pinned memory back. The blocks keep their values, in host memory."""
        self.lane.finish()
        self._slots = []
        for item in self.streamed:
            item.in_slots.clear()
            item.slab.close()
