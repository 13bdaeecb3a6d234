"""What a run takes, told before it begins: memory, disk and time of each stage within a budget.

A plan is arithmetic on sizes (offload/planner.py, and the VAE's own count); it needs a model's headers or just its
name, no weights and no card. Times come from rates measured on the card (rates.py), and are left out without them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ..offload.planner import (
    BlockPlan,
    BudgetError,
    Clip,
    Network,
    Rates,
    activation_bytes,
    all_savings,
    plan_blocks,
    step_seconds,
)
from .config import CLIP_TOKENS, HOST_RAM, LLM_TOKENS, GenerationSettings
from .decoding import Decoding, by_speed, choose_decoding, choose_encoding, decode_seconds
from .errors import SolostepError, UsageError
from .models.vae_bytes import host_bytes
from .models.vae_bytes_cpu import this_processor
from .precision import OFFICIAL
from .sizes import Sizes
from .units import as_option, rounded_down, rounded_up

CONTEXT = 850 << 20
"""Of a card's memory, what a process takes outside of torch's allocator: the driver's context and loaded kernels. On
an H200 0.65 GB at first and 0.81 GB after all kinds of kernels had run."""
PROGRAM = 1_700 << 20
"""Of host memory, what a process takes on a card before it holds any weights: libraries, the driver's part, buffers.
On the machine of an H200 1.6 to 1.7 GB."""
LONGEST_TEXT = LLM_TOKENS + CLIP_TOKENS
"""Tokens of the longest text that the encoders give."""
# Of runs on an H200 whose files were in memory (benchmarks/results/h200, whole-h200.jsonl): what loading takes besides
# reading from a disk.
IN_MEMORY = 18e9
"""Bytes a second of files in the system's cache, on their way to the card: the DiT in bf16 in 2.4 to 4.1 s."""
PINNING = 2.1e-10
"""Seconds a byte of host memory in which blocks wait, in the mean: 1 to 1.5e-10 where the memory had been in use, 3e-10
where a virtual machine's host had to find it first."""
ROUNDING = {"int8": 1.4e-10, "int4-weight": 4.4e-10}
"""Seconds a number of weights that are rounded meanwhile: of the DiT 3 s to int8, which rotates them, and 13 s to int4,
whose scales are searched for. Other formats take none that could be told from reading."""
FIRST_FRAME = 0.5
"""Seconds of encoding the first frame of image-to-video."""
TEXTS = 2.3
"""Seconds of encoding the texts of one video, beside the reading of Step-LLM."""
FIRST_STEP = 0.56
"""Seconds that the first step takes on a card beside what all take: texts' keys and values, and what begins."""
LOADING_VAE = 0.1
"""Seconds of building the VAE's half, beside its reading."""


@dataclass(frozen=True)
class Rated:
    """Rates of a card for one precision and kind of attention, as measured: those of blocks, and what decoding makes of
    frames, in pixels a second."""

    blocks: Rates
    decode: float
    source: str = "measured on this card"
    disk: str = "assumed"
    """Where the disk's rate comes from."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """The share of each network's files that is in memory already, by the names of Sizes.on_disk; else none."""


@dataclass(frozen=True)
class StageForecast:
    """What a stage takes at its peak, and in all: bytes on the card (as torch counts them), bytes of host memory (the
    program itself included), bytes read from files, seconds (None: not known)."""

    name: str
    device: int
    host: int
    disk: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """How a clip is made within a budget."""

    budget: int
    """Bytes that torch may take on the card."""
    blocks: BlockPlan
    network: Network
    decode: Decoding
    """Latent frames that are decoded at a time (None: a whole chunk) and strips of a frame."""
    stages: tuple[StageForecast, ...]
    step_seconds: float | None
    context: int = CONTEXT
    """Bytes of the card that are taken outside of torch."""
    program: int = PROGRAM
    """Bytes of each stage's host memory that are the program's own."""
    rated: Rated | None = None
    """What the seconds come from."""
    text_tokens: int = LONGEST_TEXT
    """Of a row, by which the text's keys and values are counted."""
    frame_strips: int = 1
    """Strips that the first frame is encoded in, where there is one."""

    @property
    def on_card(self) -> bool:
        """Whether it is for a card's memory, and not for a CPU's in its place."""
        return self.context > 0

    def __str__(self) -> str:
        from .forecast import plan_text

        return plan_text(self)

    @property
    def device(self) -> int:
        """The peak of all stages on the card."""
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        """The peak of all stages in host memory, the program included."""
        return max(stage.host for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """All of it."""
        parts = [stage.seconds for stage in self.stages]
        return None if any(s is None for s in parts) else sum(s for s in parts if s is not None)

    def stage(self, name: str) -> StageForecast:
        """A stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "budget_bytes": self.budget,
            "resident_blocks": self.blocks.resident,
            "streamed_blocks": self.network.blocks - self.blocks.resident,
            "blocks_from_disk": self.blocks.disk,
            "slots": self.blocks.slots,
            **asdict(self.blocks.savings),
            "decode_frames": self.decode[0],
            "decode_strips": self.decode[1],
            "frame_strips": self.frame_strips,
            "text_tokens": self.text_tokens,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "device_bytes": self.device,
            "host_bytes": self.host,
            "context_bytes": self.context,
            "program_bytes": self.program,
            "rates": None if self.rated is None else self.rated.source,
            "disk_rate": None if self.rated is None else self.rated.disk,
            "disk_bytes_per_second": None if self.rated is None else self.rated.blocks.disk,
            "stages": [asdict(stage) for stage in self.stages],
        }


# --- plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a run may take: ``device`` bytes of the card within torch, and ``host`` bytes of host memory beside the
    program (None: any). ``context`` and ``program`` are taken already, on a CPU nothing; ``given`` is whether a user
    set the budget: an error advises accordingly. ``pinned`` is what blocks may take of host memory at most,
    ``both`` what a stage may take of device and host together where they are one memory, a CPU's."""

    device: int
    host: int | None = None
    context: int = CONTEXT
    program: int = PROGRAM
    given: bool = True
    pinned: int | None = None
    both: int | None = None

    @property
    def on_card(self) -> bool:
        """Whether it is a card's memory, and not a CPU's in its place."""
        return self.context > 0


@dataclass(frozen=True)
class Use:
    """What a run does beside its settings: ``text_tokens`` of its prompts, the mean of both rows; and whether frames go
    to a video ``file`` while they are decoded."""

    text_tokens: int = LONGEST_TEXT
    file: bool = True


Within = Callable[[int, "int | None"], Plan]
"""A plan for bytes of the card and of the host, beside what is taken already; raises BudgetError."""
SHARES = tuple(n / 20 for n in range(20, 0, -1))
"""Of memory that is the card's and the host's in one: parts that are tried for what would be the card's."""


def make_plan(
    sizes: Sizes, settings: GenerationSettings, attention: str, limits: Limits, rated: Rated | None = None,
    itemsize: int = 2, use: Use = Use(),
) -> Plan:  # fmt: skip
    """The fastest way to make a clip within limits.

    Raises:
        SolostepError: nothing fits; it names the stage and the least that would do.
    """
    within = partial(_plan_within, sizes, settings, attention, rated, itemsize, limits, use)
    if limits.both is None:
        with contextlib.suppress(BudgetError):
            return within(limits.device, limits.host)
    else:
        found = _in_one_memory(within, limits.device, limits.host, limits.both)
        if found is not None:
            return found
    converted = None
    if sizes.could_be_converted:
        from_files = replace(sizes, from_files=True)
        converted = partial(_plan_within, from_files, settings, attention, rated, itemsize, limits, use)
    unquantized = limits.on_card and not sizes.quantized and attention != OFFICIAL
    raise _refusal(within, converted, settings, limits, unquantized)


def _in_one_memory(within: Within, device: int, host: int | None, both: int) -> Plan | None:
    """A plan for device and host in one memory, with ``device`` bytes or else with less; None where nothing fits."""
    with contextlib.suppress(BudgetError):
        plan = within(device, host)
        if _together(plan) <= both:
            return plan
    for part in SHARES:
        mine = min(device, int(part * both))
        with contextlib.suppress(BudgetError):
            return within(mine, both - mine if host is None else min(both - mine, host))
    return None


def _together(plan: Plan) -> int:
    return max(stage.device + stage.host for stage in plan.stages)


def _plan_within(
    sizes: Sizes, settings: GenerationSettings, attention: str, rated: Rated | None, itemsize: int, limits: Limits,
    use: Use, device: int, host: int | None,
) -> Plan:  # fmt: skip
    """Raises BudgetError where nothing fits."""
    clip = replace(clip_of(sizes, settings, itemsize, use.text_tokens), on_card=limits.on_card)
    network, rates = sizes.network, Rates() if rated is None else rated.blocks
    if attention == OFFICIAL:  # its blocks keep nothing of the text, so all of each has to come at every step
        network = replace(network, dropped=0)
    if sizes.streams:
        most = min((n for n in (host, limits.pinned) if n is not None), default=None)
        blocks = plan_blocks(network, clip, device, attention, host=most, rates=rates, from_files=sizes.from_files)
    else:
        blocks = _all_there(network, clip, device, attention)
    size = settings.height, settings.width
    fast, cpu = by_speed(limits.on_card, attention), None if limits.on_card else this_processor()
    decode, needed = choose_decoding(sizes.vae_config, *size, device - sizes.vae, itemsize, host, fast, cpu)
    seconds = None if rated is None else step_seconds(network, clip, blocks, rates)
    steps, program = settings.num_inference_steps, limits.program

    def stage(name: str, on_card: int, on_host: int, read: str, more: float = 0.0) -> StageForecast:
        """A stage that reads what Sizes.on_disk calls so, and takes ``more`` seconds besides."""
        disk, takes = sizes.on_disk[read], None
        if rated is not None:
            kept = rated.kept.get(read, 0.0)
            takes = disk * ((1 - kept) / rates.disk + kept / IN_MEMORY) + more
        return StageForecast(name, on_card, program + on_host, disk, takes)

    rounding = sum(ROUNDING.get(kind, 0.0) * numbers for kind, numbers in sizes.rounded.items())
    loaded = network.rest + (blocks.resident + blocks.slots) * network.block
    decoded = decode_seconds(None if rated is None else rated.decode, decode, settings, use.file)
    strips = host_bytes(sizes.vae_config, *size, decode[1], itemsize)
    stages = [
        stage("text", sizes.text, sizes.table, "text", TEXTS),
        stage("load transformer", loaded, blocks.host, "transformer", rounding + PINNING * blocks.host),
        StageForecast("denoise", blocks.device, program + blocks.host, _read_by_steps(network, blocks, steps),
                      None if seconds is None else seconds * steps + FIRST_STEP * limits.on_card),
        stage("load vae", sizes.vae, 0, "decoder", LOADING_VAE),
        StageForecast("decode and write", sizes.vae + needed, program + strips, 0, decoded),
    ]  # fmt: skip
    frame_strips = 1
    if settings.image_to_video:
        frame_strips, needed = first_frame(sizes, settings, device, itemsize)
        stages.insert(1, stage("first frame", needed, 0, "encoder", FIRST_FRAME))
    for one in stages:
        if one.device > device:
            raise BudgetError(device, one.device)
        if host is not None and one.host - program > host:
            raise BudgetError(host, one.host - program, host=True)
    context, tokens = limits.context, use.text_tokens
    return Plan(device, blocks, network, decode, tuple(stages), seconds, context, program, rated, tokens, frame_strips)


def _read_by_steps(network: Network, blocks: BlockPlan, steps: int) -> int:
    """Bytes that blocks from files are in so many steps; after the first without what is kept of the text."""
    later = network.block - (network.dropped if blocks.savings.keep_text else 0)
    return blocks.disk * (network.block + later * (steps - 1))


def clip_of(sizes: Sizes, settings: GenerationSettings, itemsize: int = 2, text_tokens: int = LONGEST_TEXT) -> Clip:
    """What goes through the blocks."""
    tokens = settings.latent_frames * settings.latent_height * settings.latent_width // sizes.config.patch_size**2
    return Clip(tokens, sizes.config.inner_dim, 2 if settings.use_guidance else 1, text_tokens, itemsize)


def as_placed(plan: Plan, placed: BlockPlan) -> Plan:
    """The plan for a clip whose blocks already are where an earlier plan put them; only its savings are new."""
    more = (placed.resident + placed.slots - plan.blocks.resident - plan.blocks.slots) * plan.network.block
    blocks = replace(placed, savings=plan.blocks.savings, device=plan.blocks.device + more)
    host = plan.program + blocks.host
    stages = [
        replace(s, device=s.device + more, host=host) if s.name in ("load transformer", "denoise") else s
        for s in plan.stages
    ]
    return replace(plan, blocks=blocks, stages=tuple(stages))


def _all_there(network: Network, clip: Clip, budget: int, attention: str) -> BlockPlan:
    """For blocks that cannot stream, and whose products cannot be made for some heads alone."""
    for savings in (s for s in all_savings(network, clip, attention) if s.head_groups == 1):
        device = network.rest + network.blocks * network.block + activation_bytes(network, clip, attention, savings)
        if device <= budget:
            return BlockPlan(network.blocks, 0, device, 0, 0, savings)
    raise BudgetError(budget, device)


def first_frame(sizes: Sizes, settings: GenerationSettings, room: int, itemsize: int) -> tuple[int, int]:
    """Strips that the first frame is encoded in, and what that takes, weights included: the fewest that fit in so much
    room, or else the most. At 544x992 in bf16 0.22 GB and 3.1, in 4 strips 0.98, in 16 strips 0.49."""
    size = settings.height, settings.width
    strips, needed = choose_encoding(sizes.vae_config, *size, room - sizes.encoder, itemsize)
    return strips, sizes.encoder + needed


def check_host(count: int | None) -> None:
    """Refuses a budget of the host that the program alone does not keep, on a card.

    Raises:
        UsageError: it names the least.
    """
    if count is not None and count < PROGRAM:
        raise UsageError(
            f"--host-ram (or ${HOST_RAM}) is {rounded_down(count)}, and the program itself takes "
            f"{rounded_up(PROGRAM)} of host memory; give {as_option(PROGRAM)} at least, and more for what waits there."
        )


# --- what does not fit --------------------------------------------------------------------------------------------

MOST = 10**30
"""Bytes that no machine has, and no clip takes that anybody asks for."""


def least(fits: Callable[[int], bool], exact: float = 5e-4) -> int | None:
    """The least number of bytes that is enough, or at most this part more; None if none is. More is never worse."""
    low, high = 10**6, MOST
    if not fits(high):
        return None
    while high > low * (1 + exact):
        middle = math.isqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def smallest(
    sizes: Sizes, settings: GenerationSettings, attention: str, itemsize: int = 2, limits: Limits = Limits(MOST)
) -> int:
    """The least of a card's memory within torch, or of a CPU's by the kind of ``limits``, that a plan exists for, with
    any amount of host memory."""
    within = partial(_plan_within, sizes, settings, attention, None, itemsize, limits, Use())
    found = least(lambda count: _fits(within, count, None))
    assert found is not None
    return found


def _fits(within: Within, device: int, host: int | None) -> bool:
    try:
        within(device, host)
    except BudgetError:
        return False
    return True


def _refusal(
    within: Within, converted: Within | None, settings: GenerationSettings, limits: Limits, unquantized: bool
) -> SolostepError:  # fmt: skip
    """The error for limits that nothing fits in, in the units of --vram and --host-ram; ``converted`` is of the model
    as it would be after a conversion, where there could be one. What is ``unquantized`` needs more of a card than what
    computes in 8 bits; weights alone in 4 need less than that for a short clip."""
    clip = f"{settings.num_frames} frames of {settings.height}x{settings.width}"
    smaller = "or make a smaller or shorter clip (--height, --width, --frames)"
    if unquantized:
        smaller = f"compute in 8 bits (--precision int8), {smaller}"
    convert = "convert the model first (`solostep quantize`), so that its blocks can come from files"
    both, host = limits.both, limits.host

    def planned(device: int, of: Within = within) -> Plan | None:
        """With so much of the device, and any host memory; or with what both have."""
        if both is not None:
            return _in_one_memory(of, device, host, both)
        with contextlib.suppress(BudgetError):
            return of(device, None)
        return None

    if planned(limits.device) is None:
        device = least(lambda count: planned(count) is not None)
        if device is None:
            assert both is not None
            needed = least(lambda total: _in_one_memory(within, total, None, total) is not None)
            assert needed is not None
            ways = ["close other programs"]
            if converted is not None and _in_one_memory(converted, both, host, both) is not None:
                ways.append(f"or {convert}")
            return SolostepError(
                f"{rounded_up(needed)} of memory are needed beside the program itself, for {clip}, and "
                f"{rounded_down(both)} are free; {', '.join(ways)}, {smaller}."
            )
        plan = planned(device)
        assert plan is not None
        stage = max(plan.stages, key=lambda one: one.device)
        more = "give --vram more" if limits.given else "close other programs"
        own = f", {limits.context / 1e9:.2g} of them outside of torch" if limits.context else ""
        return SolostepError(
            f"The stage {stage.name!r} takes {rounded_up(device + limits.context)} at least for {clip}{own}, and "
            f"there are {rounded_down(limits.device + limits.context)}; {more}, {smaller}."
        )
    needed = least(lambda count: _fits(within, limits.device, count))
    device = least(lambda count: _fits(within, count, host))
    assert needed is not None and host is not None
    own = f" ({limits.program / 1e9:.2g} of them for the program itself)" if limits.program else ""
    where = "the card" if limits.on_card else "memory (--vram)"
    ways = [f"raise --host-ram to {as_option(needed + limits.program)} or close other programs"]
    if device is not None:
        ways.append(f"give --vram {as_option(device + limits.context)}")
    if converted is not None:
        then = least(lambda count: _fits(converted, limits.device, count))
        if then is not None and then < needed:
            more = f", and raise --host-ram to {as_option(then + limits.program)}" if then > host else ""
            ways.append(convert + more)
    return SolostepError(
        f"{rounded_up(needed + limits.program)} of host memory{own} are needed, and there are "
        f"{rounded_down(host + limits.program)}, for {clip} within "
        f"{rounded_down(limits.device + limits.context)} of {where}; {', or '.join(ways)}."
    )
