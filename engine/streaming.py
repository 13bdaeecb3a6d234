"""The transformer as a plan places it: blocks on the device, in pinned host memory, or in their files.

    placed = place(component, mode, device, plan)
    placed.network, placed.blocks        # the network, and where its blocks come from
    placed.move(smaller_plan)            # when other programs took memory

Each tensor goes from its file to where it stays: blocks that stream never lie on the device at once, and blocks that
come from files are read only to be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..offload.pinned import HostSlab, PinError
from ..offload.planner import BlockPlan, Savings
from ..offload.reader import Extent
from ..offload.streamer import BlockStreamer, laid_out, spread
from .errors import SolostepError
from .headers import torch_type
from .precision import Mode
from .runtime import release_memory
from .weights import Component, load

BLOCKS = "transformer_blocks"
LAST = ("attn2.wkv",)
"""Of a block, what is not needed after the first step."""


class PlacedTransformer:
    """A transformer whose blocks are where a plan wants them."""

    def __init__(self, component: Component, network: Any, device: torch.device) -> None:
        self.component, self.network, self.device = component, network, device
        self.streamer: BlockStreamer | None = None
        count = len(network.transformer_blocks)
        self.plan = BlockPlan(count, 0, 0, 0)
        self.savings = Savings()
        self.streamed: tuple[int, ...] = ()
        self.from_files: tuple[int, ...] = ()

    @property
    def blocks(self) -> Iterable[nn.Module] | None:
        """Where the blocks come from; None for the network's own list."""
        return self.streamer

    @property
    def device_bytes(self) -> int:
        """What the weights take on the device."""
        if self.streamer is None:
            return sum(p.nbytes for p in self.network.parameters())
        own = sum(p.nbytes for n, p in self.network.named_parameters() if not n.startswith(BLOCKS))
        return own + self.streamer.device_bytes

    @property
    def host_bytes(self) -> int:
        """What the blocks take in host memory."""
        return 0 if self.streamer is None else self.streamer.host_bytes

    def move(self, plan: BlockPlan) -> None:
        """Takes on a plan that keeps no more blocks on the device than the present one.

        Raises:
            SolostepError: the host's memory cannot be pinned.
            ReadError: a file of the model cannot be opened.
        """
        count = len(self.network.transformer_blocks)
        streamed = more_of(count, self.streamed, count - plan.resident)
        if plan.disk > len(self.from_files):
            others = [i for i in streamed if i not in self.from_files]
            more = (others[i] for i in spread(len(others), plan.disk - len(self.from_files)))
            self.from_files = tuple(sorted((*self.from_files, *more)))
        slabs: dict[int, HostSlab] = {}
        if self.streamer is not None:
            # What waits in pinned memory goes on waiting there: to pin it anew takes seconds, and twice the memory.
            slabs = self.streamer.close(keep=[i for i in streamed if i not in self.from_files])
            self.streamer = None
        release_memory(self.device)
        self.attach(plan, streamed, slabs)

    def attach(self, plan: BlockPlan, streamed: tuple[int, ...], slabs: Mapping[int, HostSlab]) -> None:
        """Makes the streamer for blocks that are already where ``plan`` wants them, or on the device."""
        # What streams already goes on doing so, however much memory there is now.
        resident = len(self.network.transformer_blocks) - len(streamed)
        slots = max(1, plan.slots) if streamed else 0
        plan = replace(plan, resident=resident, slots=slots, disk=len(self.from_files))
        if streamed:
            files = {i: self._extents(i) for i in streamed if i in self.from_files}
            try:
                self.streamer = BlockStreamer(
                    self.network.transformer_blocks, self.device, streamed=streamed, slots=plan.slots, last=LAST,
                    slabs=slabs, files=files,
                )  # fmt: skip
            except PinError as error:
                raise _not_pinned(error) from None
        self.plan, self.streamed, self.savings = plan, streamed, plan.savings

    def _extents(self, index: int) -> dict[str, Extent]:
        """Where each tensor of a block lies, by its name in the block."""
        prefix = f"{BLOCKS}.{index}."
        found = {}
        for name, info in self.component.tensors.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = Extent(info.file, info.offset, info.shape, torch_type(info.dtype))
        return found

    def close(self) -> None:
        """Gives the streamer's memory back."""
        if self.streamer is not None:
            self.streamer.close()
            self.streamer = None


def more_of(count: int, chosen: tuple[int, ...], wanted: int) -> tuple[int, ...]:
    """``wanted`` of ``count`` indices: those that are chosen, and more of the others, evenly spread."""
    if not chosen:
        return tuple(spread(count, wanted))
    others = [i for i in range(count) if i not in chosen]
    return tuple(sorted([*chosen, *(others[i] for i in spread(len(others), max(0, wanted - len(chosen))))]))


def place(
    component: Component, mode: Mode, device: torch.device, plan: BlockPlan | None,
    progress: Callable[[int, int], None] | None = None,
) -> PlacedTransformer:  # fmt: skip
    """Loads a transformer as ``plan`` places it; all of it on the device without one.

    Raises:
        CheckpointError, UsageError: see :func:`solostep.engine.weights.load`.
        NotPinned: the host's memory cannot be pinned; nothing is left of it.
    """
    slabs: dict[int, HostSlab] = {}
    streamed: tuple[int, ...] = ()
    from_files: tuple[int, ...] = ()

    def homes(network: nn.Module) -> dict[str, Tensor | None]:
        """Where the parameters of streamed blocks go: into slabs, or nowhere."""
        nonlocal streamed, from_files
        assert plan is not None
        blocks: Any = network.get_submodule(BLOCKS)
        streamed = tuple(spread(len(blocks), len(blocks) - plan.resident))
        from_files = tuple(streamed[i] for i in spread(len(streamed), plan.disk))
        slabs.update(laid_out(blocks, [i for i in streamed if i not in from_files], LAST, pin=device.type == "cuda"))
        found: dict[str, Tensor | None] = {}
        for index, slab in slabs.items():
            found |= {f"{BLOCKS}.{index}.{name}": view for name, view in slab.views().items()}
        for index in from_files:
            found |= {f"{BLOCKS}.{index}.{name}": None for name, _ in blocks[index].named_parameters()}
        return found

    try:
        network = load(
            component, device, mode.dtype, progress=progress, recipe=mode.on_load,
            homes=homes if plan is not None and plan.streams else None,
        )  # fmt: skip
    except BaseException as error:
        for slab in slabs.values():
            slab.close()
        if isinstance(error, PinError):
            raise _not_pinned(error) from None
        raise
    placed = PlacedTransformer(component, network, device)
    placed.from_files = from_files
    if plan is not None:
        placed.attach(plan, streamed, slabs)
    return placed


class NotPinned(SolostepError):
    """The host's memory for streamed blocks cannot be pinned: the system allows no more."""


def _not_pinned(error: PinError) -> NotPinned:
    return NotPinned(
        f"{str(error)[0].upper()}{str(error)[1:]}; raise the limit of locked memory (ulimit -l, or the container's), "
        "or give --vram more."
    )
