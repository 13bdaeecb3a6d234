"""Drift of several modes in one pass over a DiT's blocks, each of which is loaded, or drawn, once.

The reference is bf16 in the official order of operations. Its residual stream and those of all modes go through block i
together, then the block is dropped. For each mode and sample (a prompt, a noise level, a guidance branch):

- block level: the mode's block on the reference's input, |mode - reference| / |reference - input|, relative L2 of what
  the block adds;
- operators: those of the mode's block, each on the input that it has in the reference's (drift_operators.py);
- teacher-forced: the mode's own stream through all blocks and the output layer, then the guided velocity, relative L2
  error and cosine against the reference's. The latents are given: this is the error of one step, not of a video.

Two modes are noise floors, the official blocks rounded otherwise and no less right: with attention by another kernel of
torch ("floor-backend"), and with linears that sum over their input channels in another order ("floor-order").

Memory: a block in bf16 (1.2 GB at full width) and one mode's, with operators those of all modes; two streams for each
sample and one more for each mode (S d values, 0.93 GB at 544x992x204); and what a block takes for one row (11 streams
in the official order). Streams wait in host memory where the device has too little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from solostep.benchmarks.drift_operators import Other, watched
from solostep.benchmarks.floors import attend_by, attention_of_floor, permute
from solostep.benchmarks.full_width import recipe_of
from solostep.engine.activations import TransformerSamples
from solostep.engine.choices import attention_choice
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import RopeTable, TransformerBlock, rope_table
from solostep.engine.precision import ATTENTION, OFFICIAL
from solostep.engine.rates import quantized_block
from solostep.engine.runtime import free_memory, host_room
from solostep.quant.formats import FORMATS, UNQUANTIZED

Say = Callable[[str, int, int], None]
ROLES = ("mode", "floor-backend", "floor-order")
WORKING = 17
"""Streams that a block takes for one row: 11 in the official order, and 4 more where inputs are reordered."""
CHUNK = 4096
"""Tokens that are compared at a time: 0.1 GB in fp32."""


@dataclass(frozen=True)
class Mode:
    """One way to compute the blocks.

    Args:
        precision: of the linears, by the default recipe: bf16 or one of our formats.
        attention: official, or a mode of the fused blocks.
        backend: what computes that attention; default: what the engine itself would take, and for floor-backend another
            one than torch takes by itself.
        role: mode, floor-backend or floor-order.

    Raises:
        UsageError: there is no such thing.
    """

    precision: str = UNQUANTIZED
    attention: str = OFFICIAL
    backend: str | None = None
    role: str = "mode"

    def __post_init__(self) -> None:
        if self.precision != UNQUANTIZED and self.precision not in FORMATS:
            raise UsageError(
                f"--mode {self}: the precision {self.precision} is unknown; "
                f"choose one of {', '.join([UNQUANTIZED, *FORMATS])}."
            )
        if self.attention not in ATTENTION:
            raise UsageError(
                f"--mode {self}: the attention {self.attention} is unknown; choose one of {', '.join(ATTENTION)}."
            )
        if self.attention == OFFICIAL and self.backend is not None and self.role != "floor-backend":
            raise UsageError(f"--mode {self}: the official attention has no back ends; leave out @{self.backend}.")
        if self.role not in ROLES:
            raise UsageError(f"the role {self.role} is unknown; choose one of {', '.join(ROLES)}.")
        if self.role != "mode" and (self.precision, self.attention) != (UNQUANTIZED, OFFICIAL):
            raise UsageError(f"--mode {self}: a noise floor is bf16 with the official attention.")

    def __str__(self) -> str:
        return f"{self.precision}/{self.attention}" + (f"@{self.backend}" if self.backend else "")

    @classmethod
    def parse(cls, text: str) -> Mode:
        """``precision/attention``, or ``precision/attention@backend``.

        Raises:
            UsageError: it is not of this form, or names what there is not.
        """
        names, at, backend = text.partition("@")
        parts = names.split("/")
        if len(parts) != 2 or not all(parts) or (at and not backend):
            raise UsageError(f"--mode {text} has to be PRECISION/ATTENTION, such as int8/int8 or fp8/bf16@cudnn.")
        return cls(parts[0], parts[1], backend or None)

    def block(self, block: TransformerBlock, samples: TransformerSamples, backend: str | None) -> TransformerBlock:
        """A block in this mode's precision; what is not quantized is shared. ``backend`` is the one that was chosen."""
        if self.role == "floor-order":
            return cast(TransformerBlock, permute(shared(block)))
        if self.role == "floor-backend":
            return cast(TransformerBlock, attend_by(shared(block), cast(str, backend)))
        return quantized_block(block, recipe_of(self.precision), samples.shell.config)


FLOORS = (Mode(role="floor-backend"), Mode(role="floor-order"))


def shared(block: TransformerBlock) -> TransformerBlock:
    """A block with the same weights, in the same memory."""
    with torch.device("meta"):
        made = TransformerBlock(len(block.norm1.weight), block.attn1.head_dim)
    made.load_state_dict(block.state_dict(), assign=True)
    return made.eval().requires_grad_(False)


# ---------------------------------------------------------------- results


@dataclass
class Drift:
    """Of one mode. ``None`` where it was not asked for.

    Attributes:
        blocks: relative L2 of what a block adds, ``[block][sample]``.
        velocity: relative L2 of the model's output, by sample (no guidance).
        error, cosine: of the guided velocity, by prompt and noise level, in the samples' order.
        stream: relative L2 of the mode's own stream behind each block, ``[block][sample]``.
        operators: relative L2 of single operators' outputs, ``{name: [block][sample]}``; those that differ.
        backend: what computes attention, and ``note`` a sentence on it where it is a floor's.
    """

    mode: Mode
    blocks: list[list[float]] | None = None
    velocity: list[float] | None = None
    error: list[float] | None = None
    cosine: list[float] | None = None
    stream: list[list[float]] | None = None
    operators: dict[str, list[list[float]]] | None = None
    backend: str | None = None
    note: str | None = None


def squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """|a - b|^2 and |b|^2 of two streams ``[1, S, d]``, in fp32, summed in fp64."""
    total = torch.zeros(2, dtype=torch.float64, device=a.device)
    for x, y in zip(a[0].split(CHUNK), b[0].split(CHUNK), strict=True):
        y = y.float()
        total[0] += (x.float() - y).square_().sum(dtype=torch.float64)
        total[1] += y.square().sum(dtype=torch.float64)
    error, size = total.tolist()
    return error, size


def compared(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Relative L2 |a - b| / |b| and cosine, in fp64. Identical tensors give 0 and 1."""
    a, b = a.double().flatten(), b.double().flatten()
    if torch.equal(a, b):
        return 0.0, 1.0
    norm = b.norm().clamp_min(1e-300)
    return float((a - b).norm() / norm), float(a @ b / (a.norm().clamp_min(1e-300) * norm))


# ---------------------------------------------------------------- streams


class Streams:
    """Residual streams by name, on the device or waiting in host memory (pinned where that is possible)."""

    def __init__(self, device: torch.device, parked: bool) -> None:
        self.device, self.parked = device, parked
        self.held: dict[Any, Tensor] = {}

    def put(self, key: Any, stream: Tensor) -> None:
        if not self.parked:
            self.held[key] = stream
            return
        place = self.held.get(key)
        if place is None:
            place = torch.empty(stream.shape, dtype=stream.dtype, pin_memory=self.device.type == "cuda")
        self.held[key] = place.copy_(stream)

    def get(self, key: Any) -> Tensor:
        """The stream on the device: a copy of a parked one, else the very tensor that was put."""
        return self.held[key].to(self.device, copy=self.parked)

    def own(self, key: Any) -> Tensor:
        """The stream on the device, to be changed."""
        return self.get(key) if self.parked else self.held.pop(key)

    def __contains__(self, key: Any) -> bool:
        return key in self.held

    def rename(self, old: Any, new: Any) -> None:
        """What was under ``new`` is let go; parked, its memory is used again."""
        spare = self.held.pop(new, None)
        self.held[new] = self.held.pop(old)
        if self.parked and spare is not None:
            self.held[old] = spare


def stream_count(rows: int, modes: int, own: bool) -> int:
    """Streams that wait at the same time: the reference's before and behind a block, and each mode's."""
    return rows * (2 + modes * own)


def fits(samples: TransformerSamples, rows: int, modes: int, own: bool, operators: bool) -> bool:
    """Whether the streams have room on the device beside the blocks and what these take."""
    dim = samples.shell.config.inner_dim
    block = 16 * dim * dim * samples.dtype.itemsize
    needed = (stream_count(rows, modes, own) + WORKING) * samples.stream_bytes + (4 + modes * operators) * block
    return needed < free_memory(samples.device)


# ---------------------------------------------------------------- the pass


@dataclass
class Lockstep:
    """One pass of some samples and modes.

    Args:
        samples: of engine.activations, or synthetic ones.
        rows: which of them, all branches of a prompt and noise level side by side; default: all.
        block_level, own: what is measured (see the module); at least one.
        operators: with the block level, whether single operators are measured, too.
        count: only so many blocks, the first ones, for trials.
        parked: whether streams wait in host memory; default: where they do not fit.

    Raises:
        UsageError: nothing to measure, or a back end that is not to be had here.
        SolostepError: too little memory for the streams; or numbers that are not finite, when run.
    """

    samples: TransformerSamples
    modes: Sequence[Mode]
    rows: Sequence[int] | None = None
    block_level: bool = True
    own: bool = True
    operators: bool = True
    count: int | None = None
    parked: bool | None = None
    say: Say = lambda stage, done, total: None
    fused: dict[Mode, FusedBlocks] = field(default_factory=dict, init=False)
    backends: dict[Mode, tuple[str, str | None]] = field(default_factory=dict, init=False)
    """What computes the attention of a mode that is not torch's own choice, and a sentence on it."""

    def __post_init__(self) -> None:
        samples = self.samples
        if not self.block_level and not self.own:
            raise UsageError("There is nothing to measure without the blocks' errors and without own streams.")
        if self.count is not None and self.count < 1:
            raise UsageError(f"--blocks has to be at least 1, not {self.count}.")
        self.operators = self.operators and self.block_level
        self.rows = list(range(len(samples.labels))) if self.rows is None else list(self.rows)
        whole = samples.blocks.count
        self.count = whole if self.count is None else min(self.count, whole)
        waiting = stream_count(len(self.rows), len(self.modes), self.own) * samples.stream_bytes
        if self.parked is None:
            self.parked = not fits(samples, len(self.rows), len(self.modes), self.own, self.operators)
        if self.parked and waiting > host_room():
            raise SolostepError(
                f"{waiting / 1e9:.1f} GB of residual streams fit neither {samples.device} nor host memory; give fewer "
                "modes or noise levels at a time, or a shorter clip."
            )
        self._prepare()

    def _prepare(self) -> None:
        samples, rows = self.samples, cast("list[int]", self.rows)
        latents, patch = samples.latents[rows[0]], samples.shell.config.patch_size
        self.fhw = (latents.shape[1], latents.shape[3] // patch, latents.shape[4] // patch)
        self.rope: RopeTable = rope_table(self.fhw, samples.dtype, samples.device)
        score = None if samples.condition is None else samples.settings.motion_score
        self.times = [samples.shell.adaln_single(samples.sigmas[r][None], score) for r in rows]
        self.contexts = [samples.contexts[r] for r in rows]
        tokens = math.prod(self.fhw)
        for mode in self.modes:
            if mode.attention != OFFICIAL:
                backend = attention_choice(samples.device, mode.attention, tokens, mode.backend)
                self.fused[mode] = FusedBlocks(self.contexts, mode.attention, backend, keep_text=False)
                self.backends[mode] = backend, None
            elif mode.role == "floor-backend":
                self.backends[mode] = attention_of_floor(mode.backend, tokens, samples.device)

    @property
    def work(self) -> int:
        """Passes of one row through one block, the reference's among them."""
        runs = 1 + len(self.modes) * (self.block_level + self.own)
        return cast(int, self.count) * len(cast("list[int]", self.rows)) * runs

    def run(self) -> list[Drift]:
        """Each mode's drift; samples in the order of ``rows``."""
        rows, count = range(len(self.contexts)), cast(int, self.count)
        streams = Streams(self.samples.device, bool(self.parked))
        for r, row in enumerate(cast("list[int]", self.rows)):
            streams.put(("in", r), self.samples.shell.embed_latents(self.samples.latents[row], self.samples.condition))
        drifts = [self._empty(mode) for mode in self.modes]
        self.done = 0
        self.say("blocks", 0, self.work)
        for i in range(count):
            block = cast(TransformerBlock, self.samples.blocks.block(i))
            # To measure operators, the blocks of all modes have to be there while the reference's one runs.
            made = [
                Other(self._block(d.mode, block), self.fused.get(d.mode), f"block {i} in the mode {d.mode}")
                for d in drifts
            ] if self.operators else []  # fmt: skip
            self._reference(i, block, streams, made)
            for m, drift in enumerate(drifts):
                one = made[m].block if made else self._block(drift.mode, block)
                self._mode(i, m, drift, cast(TransformerBlock, one), streams)
                if made:
                    self._keep(i, drift, made[m].errors)
                    made[m].block = torch.nn.Identity()
                del one
            for r in rows:
                streams.rename(("out", r), ("in", r))
            del block, made
        if self.own:
            self._velocities(drifts, streams)
        return drifts

    def _empty(self, mode: Mode) -> Drift:
        made = Drift(mode, [] if self.block_level else None, stream=[] if self.own else None)
        made.operators = {} if self.operators else None
        made.backend, made.note = self.backends.get(mode, (None, None))
        return made

    def _block(self, mode: Mode, block: TransformerBlock) -> TransformerBlock:
        return mode.block(block, self.samples, self.backends.get(mode, (None, None))[0])

    def _keep(self, i: int, drift: Drift, errors: dict[str, list[float]]) -> None:
        """Of block i; an operator that differs in some blocks only is exact in the others."""
        kept, exact = cast("dict[str, list[list[float]]]", drift.operators), [0.0] * len(self.contexts)
        for name in dict.fromkeys([*kept, *errors]):
            kept.setdefault(name, [exact] * i).append(errors.get(name, exact))

    def _reference(self, i: int, block: TransformerBlock, streams: Streams, others: Sequence[Other]) -> None:
        self.added: list[float] = []
        for r, context in enumerate(self.contexts):
            x = streams.get(("in", r))
            with watched(block, others, self.rope):
                out = block(x, context, self.times[r][0], self.rope)
            change, _ = squares(out, x)
            if not math.isfinite(change):
                raise SolostepError(f"Block {i} of the reference makes numbers that are not finite.")
            self.added.append(max(change, 1e-300))
            streams.put(("out", r), out)
            del x, out
            self._count()

    def _mode(self, i: int, m: int, drift: Drift, made: TransformerBlock, streams: Streams) -> None:
        """Block i in a mode, on all rows."""
        errors, apart = [], []
        for r in range(len(self.contexts)):
            want = streams.get(("out", r))
            first = ("own", m, r) not in streams  # what it would begin with is the reference's own input
            if self.block_level:
                out = self._through(i, r, drift.mode, made, streams.get(("in", r)), keep=True)
                error, size = squares(out, want)
                errors.append(math.sqrt(error / self.added[r]))
                if self.own and first:
                    streams.put(("own", m, r), out)
                    apart.append(math.sqrt(error / max(size, 1e-300)))
                    self._count()
                del out
                self._count()
            if self.own and not (first and self.block_level):
                x = streams.get(("in", r)) if first else streams.own(("own", m, r))
                out = self._through(i, r, drift.mode, made, x, keep=first)
                del x
                error, size = squares(out, want)
                apart.append(math.sqrt(error / max(size, 1e-300)))
                streams.put(("own", m, r), out)
                del out
                self._count()
            del want
        if not all(map(math.isfinite, [*errors, *apart])):
            raise SolostepError(f"Block {i} in the mode {drift.mode} makes numbers that are not finite.")
        if drift.blocks is not None:
            drift.blocks.append(errors)
        if drift.stream is not None:
            drift.stream.append(apart)

    def _through(self, i: int, r: int, mode: Mode, block: TransformerBlock, x: Tensor, keep: bool) -> Tensor:
        """A row through a mode's block; ``keep`` if ``x`` must not change (fused blocks work in place)."""
        if mode not in self.fused:
            return block(x, self.contexts[r], self.times[r][0], self.rope)
        x = x.clone() if keep and not self.parked else x
        return self.fused[mode](i, r, block, x, self.times[r][0], self.rope)

    def _count(self) -> None:
        self.done += 1
        self.say("blocks", self.done, self.work)

    def _velocities(self, drifts: Sequence[Drift], streams: Streams) -> None:
        samples, rows = self.samples, range(len(self.contexts))

        def heads(name: tuple[Any, ...]) -> list[Tensor]:
            return [samples.shell.head(streams.own((*name, r)), self.times[r][1], self.fhw) for r in rows]

        branches = 1 + samples.settings.use_guidance
        starts = range(0, len(rows), branches)
        want = heads(("in",))
        guided = [samples.guided(want[s : s + branches]) for s in starts]
        for m, drift in enumerate(drifts):
            made = heads(("own", m))
            drift.velocity = [compared(a, b)[0] for a, b in zip(made, want, strict=True)]
            pairs = [compared(samples.guided(made[s : s + branches]), g) for s, g in zip(starts, guided, strict=True)]
            drift.error, drift.cosine = ([pair[k] for pair in pairs] for k in (0, 1))
            if not all(map(math.isfinite, drift.error)):
                raise SolostepError(f"The velocity in the mode {drift.mode} is not finite.")
