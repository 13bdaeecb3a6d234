"""What fits where: which blocks stay on the card, what is spared besides, and how long a step then takes.

Arithmetic only: nothing is measured here, and what was measured comes in as :class:`Rates`. Memory of the denoising
stage is a sum of counted tensors (S tokens, width d, bytes):

    weights        blocks that stay, slots for the streamed ones, everything beside the blocks
    streams        2 S d for each row of the batch: the residual streams; for one row if the others are parked
    text           keys and values of every block and row, 2 x 2 L d, if blocks are fused and keep them
    block          the most that one block needs beside its input, one row at a time (ACTIVATIONS)

and a margin for what libraries take. The block's part was measured on an H200 at 75,888 tokens: 3.47, 4.36 and 4.79 GiB
for 8, 10 and 11 bytes a value, as counted.

Of all the ways to keep a budget the plan is the fastest, so that more memory is never slower; of equally fast ones, the
one that spares least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

ACTIVATIONS = {"official": 20.0, "bf16": 8.0, "int8": 10.0, "int8-fp8": 11.0}
"""Bytes for each of the S d values while attention runs: qkv 6, its output 2, and in 8 bits q, k (2) and v (1) beside
them; the official order of operations keeps more."""
OUTPUT = 2.0
"""Of these, attention's output, which is whole whatever the heads do."""
FEED_FORWARD = 12.0
"""Bytes for each of the chunk's values: the hidden layer in 16 bits and in 8, or in 16 bits beside its product."""
LEAST = 4.0
"""Bytes a value that cross-attention takes, and the head behind the last block."""
MARGIN = 300 << 20
"""What cuBLAS, cuDNN and the allocator's rounding take: 0.2 to 0.26 GB on an H200."""
CPU_VALUES = {2.0: 28.0, 1.0: 92.0}
"""On a CPU, bytes for each of the S d values in 16 bits (twice that in 32) at the peak of a step, both streams counted,
by Network.rows: 8-bit products are emulated there, with sums in 32 bits. Whatever is spared, as there is no other
order of operations."""
CPU_MARGIN = 48 << 20
"""And beside them. With its weights the demo model took 10 to 68 MB less than all this (17 to 68 frames, 96x96 to
640x640)."""
CHUNK = 18_972
"""Tokens that go through the feed-forward at a time: a quarter of 204 frames at 544x992."""
SMALL_CHUNK = CHUNK // 4
GROUP_SECONDS = 1e-3
"""What a further group of heads costs in a block: smaller products, more kernels."""
STAGING = 2
"""Blocks in host memory while others are read from files."""
GUESS = (800e12, 1300e12, 50e9, 2e9)
"""Rates that plans are compared by where none were measured: those of an H200 with int8, about."""


@dataclass(frozen=True)
class Network:
    """A network of equal blocks, in bytes. ``dropped`` is what a block need not bring after the first step."""

    blocks: int
    block: int
    rest: int
    dropped: int = 0
    heads: int = 48
    rows: float = 1.0
    """Bytes for each value of what its products multiply: 1 in 8 bits, 2 in 16."""


@dataclass(frozen=True)
class Clip:
    """What goes through it: tokens of one row, their width, rows of the batch, text tokens of a row."""

    tokens: int
    width: int
    rows: int = 2
    text: int = 397
    itemsize: int = 2
    """Bytes of a value that is not quantized."""
    on_card: bool = True


@dataclass(frozen=True)
class Rates:
    """Of a card: FLOP/s of attention and of the linears (with all passes between), bytes/s of a pinned copy to it; and
    bytes/s of the disk."""

    attention: float = GUESS[0]
    linears: float = GUESS[1]
    bus: float = GUESS[2]
    disk: float = GUESS[3]


@dataclass(frozen=True)
class Savings:
    """What a plan does to take less memory. With our 8-bit products it changes no bit of the result; products in 16
    bits, a library's, may round otherwise for fewer channels or tokens at a time."""

    head_groups: int = 1
    """Attention in so many groups of heads, one after the other."""
    keep_text: bool = True
    """Whether the text's keys and values are kept from step to step."""
    park: bool = False
    """Whether a row's residual stream waits in host memory while another one is computed."""
    chunk: int = CHUNK
    """Tokens that go through the feed-forward at a time."""


@dataclass(frozen=True)
class BlockPlan:
    """``resident`` blocks stay on the card; the others take turns in ``slots``, ``disk`` of them read from files at
    every use. Bytes on the card at the peak, and in host memory."""

    resident: int
    slots: int
    device: int
    host: int
    disk: int = 0
    savings: Savings = Savings()

    @property
    def streams(self) -> bool:
        return self.slots > 0


class BudgetError(Exception):
    """A budget that nothing fits in; ``least`` is the smallest that would do. ``host`` says whose memory it is of."""

    def __init__(self, budget: int, least: int, host: bool = False) -> None:
        super().__init__(f"{budget / 1e9:.1f} GB are too little: {least / 1e9:.1f} GB are the least that would do")
        self.budget, self.least, self.host = budget, least, host


def activation_bytes(network: Network, clip: Clip, attention: str, savings: Savings = Savings()) -> int:
    """All that is not weights, at its peak.

    Raises:
        ValueError: an unknown kind of attention.
    """
    if attention not in ACTIVATIONS:
        raise ValueError(f"attention has to be one of {', '.join(ACTIVATIONS)}, not {attention!r}")
    values, text = clip.tokens * clip.width * clip.itemsize / 2, 0.0
    if attention == "official":
        block = ACTIVATIONS[attention] * values
    else:
        a_value = ACTIVATIONS[attention]
        if savings.head_groups > 1:
            a_value = network.rows + OUTPUT + (a_value - OUTPUT) / savings.head_groups
        block = max(a_value * values, LEAST * values, FEED_FORWARD * values * min(savings.chunk / clip.tokens, 1))
        text = 2 * clip.itemsize * clip.text * clip.width * (network.blocks * clip.rows if savings.keep_text else 1)
    if not clip.on_card:
        return int(CPU_VALUES[network.rows] * values + text) + CPU_MARGIN
    streams = 2 * values * (1 if savings.park else clip.rows)
    return int(block + streams + text) + MARGIN


def all_savings(network: Network, clip: Clip, attention: str) -> Iterator[Savings]:
    """Every combination that can make a difference, those that spare least first."""
    if attention == "official":
        yield Savings()
        return
    groups = [n for n in (1, 2, 3, 4, 6, 8, 12) if network.heads % n == 0]
    chunks = [CHUNK, SMALL_CHUNK] if clip.tokens > SMALL_CHUNK else [CHUNK]
    for park, count, keep_text, chunk in product((False, True)[: min(clip.rows, 2)], groups, (True, False), chunks):
        yield Savings(count, keep_text, park, chunk)


def plan_blocks(
    network: Network, clip: Clip, budget: int, attention: str, *, host: int | None = None, slots: int = 2,
    rates: Rates = Rates(), from_files: bool = True,
) -> BlockPlan:  # fmt: skip
    """The fastest way to keep a budget of device memory, and one of host memory (None: all that is needed).

    Args:
        from_files: whether blocks may be read from files at every use: where host memory is too little.

    Raises:
        BudgetError: not even one block at a time fits.
        ValueError: an unknown kind of attention.
    """
    best: tuple[float, BlockPlan] | None = None
    least = wanted = None
    for savings in all_savings(network, clip, attention):
        fixed = network.rest + activation_bytes(network, clip, attention, savings)
        least = fixed + network.block if least is None else min(least, fixed + network.block)
        for plan in _placements(network, clip, budget, fixed, savings, slots):
            placed = _tiers(network, clip, plan, host, from_files)
            if placed is None:
                needed = _least_host(network, clip, plan, from_files)
                wanted = needed if wanted is None else min(wanted, needed)
                continue
            seconds = step_seconds(network, clip, placed, rates)
            if best is None or seconds < best[0]:
                best = seconds, placed
    if best is None:
        if wanted is not None and host is not None:
            raise BudgetError(host, wanted, host=True)
        assert least is not None
        raise BudgetError(budget, least)
    return best[1]


def _placements(
    network: Network, clip: Clip, budget: int, fixed: int, savings: Savings, slots: int
) -> Iterator[BlockPlan]:
    """All blocks on the card, or as many as there is room for beside slots for the others."""
    if fixed + network.blocks * network.block <= budget:
        yield BlockPlan(network.blocks, 0, fixed + network.blocks * network.block, 0, 0, savings)
        return
    for places in range(min(slots, network.blocks), 0, -1):
        resident = min((budget - fixed) // network.block - places, network.blocks - places)
        if resident >= 0:
            yield BlockPlan(resident, places, fixed + (resident + places) * network.block, 0, 0, savings)


def parked_bytes(clip: Clip, savings: Savings) -> int:
    """Host memory for residual streams."""
    return clip.itemsize * clip.tokens * clip.width * clip.rows if savings.park else 0


def _least_host(network: Network, clip: Clip, plan: BlockPlan, from_files: bool) -> int:
    """Host memory without which a plan is none: for all that streams, or two buffers that it passes through."""
    streamed = network.blocks - plan.resident
    there = min(streamed, STAGING) if from_files else streamed
    return there * network.block + parked_bytes(clip, plan.savings)


def _tiers(network: Network, clip: Clip, plan: BlockPlan, host: int | None, from_files: bool) -> BlockPlan | None:
    """The plan with its streamed blocks in host memory, or as many as go there; None if the others have no place."""
    parked = parked_bytes(clip, plan.savings)
    streamed = network.blocks - plan.resident
    needed = streamed * network.block + parked
    if host is None or needed <= host:
        return BlockPlan(plan.resident, plan.slots, plan.device, needed, 0, plan.savings)
    staging = STAGING * network.block
    if not from_files or not streamed or staging + parked > host:
        return None
    there = max(0, (host - parked - staging) // network.block)
    count = staging + parked + there * network.block
    return BlockPlan(plan.resident, plan.slots, plan.device, count, streamed - there, plan.savings)


def step_seconds(network: Network, clip: Clip, plan: BlockPlan, rates: Rates) -> float:
    """A step after the first: computation, and what of the copies it cannot hide.

    Copies run beside everything, so a pass takes the longest of computing, copying and reading; with one slot, a copy
    waits for the computation of the block before it, and hides only behind resident ones.
    """
    values = clip.tokens * clip.width
    products = 28.0 * clip.width  # qkv 3, wo, q, o, feed-forward 8, each 2 S d^2
    block = clip.rows * values * (4.0 * clip.tokens / rates.attention + products / rates.linears)
    block += clip.rows * (plan.savings.head_groups - 1) * GROUP_SECONDS
    if plan.savings.park:  # there and back, beside the feed-forward but for its last chunk of tokens
        block += clip.rows * 4.0 * values * min(1.0, plan.savings.chunk / clip.tokens) / rates.bus
    if not plan.savings.keep_text:
        block += clip.rows * 4.0 * clip.text * clip.width**2 / rates.linears
    streamed = network.blocks - plan.resident if plan.streams else 0
    size = network.block - (network.dropped if plan.savings.keep_text else 0)
    copy = size / rates.bus
    if plan.slots == 1:
        compute = network.blocks * block + max(0.0, streamed * copy - plan.resident * block)
    else:
        compute = max(network.blocks * block, streamed * copy)
    return max(compute, plan.disk * size / rates.disk)
