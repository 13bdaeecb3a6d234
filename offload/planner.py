"""What fits where: how many blocks stay on the card, and what a step then takes. Arithmetic only: nothing is measured.

Memory of the denoising stage is a sum of counted tensors (S tokens, width d, bytes):

    weights        blocks that stay, slots for the streamed ones, everything beside the blocks
    streams        2 S d for each row of the batch: the residual streams
    text           keys and values of every block and row, 2 x 2 L d, if blocks are fused
    block          the most that one block needs beside its input, one row at a time (ACTIVATIONS)

and a margin for what libraries take. The block's part was measured on an H200 at 75,888 tokens: 3.47, 4.36 and 4.79 GiB
for 8, 10 and 11 bytes a value, as counted.
"""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = {"official": 20.0, "bf16": 8.0, "int8": 10.0, "int8-fp8": 11.0}
"""Bytes for each of the S d values while attention runs: qkv 6, its output 2, and in 8 bits q, k (2) and v (1) beside
them; the official order of operations keeps more."""
FEED_FORWARD = 16.0
"""Bytes for each of the chunk's values: the hidden layer in 16 bits and in 8 (12), and what it is made from."""
MARGIN = 400 << 20
"""What cuBLAS, cuDNN and the allocator's rounding take."""


@dataclass(frozen=True)
class Network:
    """A network of equal blocks, in bytes. ``dropped`` is what a block need not bring after the first step."""

    blocks: int
    block: int
    rest: int
    dropped: int = 0


@dataclass(frozen=True)
class Clip:
    """What goes through it: tokens of one row, their width, rows of the batch, text tokens of a row."""

    tokens: int
    width: int
    rows: int = 2
    text: int = 397


@dataclass(frozen=True)
class Rates:
    """Of a card: FLOP/s of attention and of the linears, bytes/s of a pinned copy to it."""

    attention: float
    linears: float
    bus: float


@dataclass(frozen=True)
class BlockPlan:
    """``resident`` blocks stay on the card; the others take turns in ``slots``. Bytes on the card at the peak, and in
    host memory."""

    resident: int
    slots: int
    device: int
    host: int

    @property
    def streams(self) -> bool:
        return self.slots > 0


class BudgetError(Exception):
    """A budget that nothing fits in; ``least`` is the smallest that would do."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"{budget / 1e9:.1f} GB are too little: {least / 1e9:.1f} GB are the least that would do")
        self.budget, self.least = budget, least


def activation_bytes(network: Network, clip: Clip, attention: str, chunk: int) -> int:
    """All that is not weights, at its peak.

    Raises:
        ValueError: an unknown kind of attention.
    """
    if attention not in ACTIVATIONS:
        raise ValueError(f"attention has to be one of {', '.join(ACTIVATIONS)}, not {attention!r}")
    values = clip.tokens * clip.width
    whole = clip.tokens if attention == "official" else min(chunk, clip.tokens)
    block = max(ACTIVATIONS[attention] * values, FEED_FORWARD * whole * clip.width)
    text = 0 if attention == "official" else 4 * network.blocks * clip.text * clip.width
    return int(block + clip.rows * (2 * values + text)) + MARGIN


def plan_blocks(
    network: Network, clip: Clip, budget: int, attention: str, *, chunk: int = 18_972, slots: int = 2
) -> BlockPlan:
    """As many resident blocks as a budget of device memory lets stay; fewer slots before giving up.

    Raises:
        BudgetError: not even one block at a time fits.
        ValueError: an unknown kind of attention.
    """
    fixed = network.rest + activation_bytes(network, clip, attention, chunk)
    if fixed + network.blocks * network.block <= budget:
        return BlockPlan(network.blocks, 0, fixed + network.blocks * network.block, 0)
    for places in range(min(slots, network.blocks), 0, -1):
        resident = (budget - fixed) // network.block - places
        if resident >= 0:
            resident = min(resident, network.blocks - places)
            weights = (resident + places) * network.block
            return BlockPlan(resident, places, fixed + weights, (network.blocks - resident) * network.block)
    raise BudgetError(budget, fixed + network.block)


def step_seconds(network: Network, clip: Clip, plan: BlockPlan, rates: Rates) -> float:
    """A step after the first: computation, and what of the copies it cannot hide.

    Copies run beside everything, so a pass takes the longer of the two; with one slot, a copy waits for the computation
    of the block before it, and hides only behind resident ones.
    """
    values = clip.tokens * clip.width
    products = 28.0 * clip.width  # qkv 3, wo, q, o, feed-forward 8, each 2 S d^2
    block = clip.rows * values * (4.0 * clip.tokens / rates.attention + products / rates.linears)
    streamed = network.blocks - plan.resident if plan.streams else 0
    copy = (network.block - network.dropped) / rates.bus
    if plan.slots == 1:
        return network.blocks * block + max(0.0, streamed * copy - plan.resident * block)
    return max(network.blocks * block, streamed * copy)
