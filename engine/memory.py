"""The memory of one pipeline: its budgets, what is loaded, what fits beside it, and what a run took.

A network is loaded when its stage begins and freed when it is no longer needed. What is planned here is kept to by
torch itself (:meth:`Memory.capped`); where other programs take memory meanwhile, the plan becomes smaller.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from ..kernels.cards import ran_out
from .checkpoint import ModelFolder, tokenizer_files
from .config import CLIP_TOKENS, HOST_RAM, VRAM, GenerationSettings, from_environment
from .decoding import Decoding, by_speed, choose_decoding, first_choice, slower
from .errors import SolostepError, UsageError
from .forecast import where_blocks_stay
from .models.vae_bytes_cpu import this_processor
from .plan import (
    CONTEXT,
    LONGEST_TEXT,
    MOST,
    PROGRAM,
    Limits,
    Plan,
    Rated,
    Use,
    as_placed,
    check_host,
    first_frame,
    make_plan,
    smallest,
)
from .precision import Mode
from .progress import Progress, stage_of
from .request import Job
from .runtime import free_memory, host_room, measured, release_memory, require_memory, return_large_tensors
from .sizes import Sizes, sizes_of
from .streaming import NotPinned, PlacedTransformer, place
from .text import LLMTokenizer
from .units import parse_size, rounded_down

PATIENCE = 3.0
"""Seconds before what has run out of memory is tried again as it was."""
SPARE = 200 << 20
"""Of a card's free memory, what is not planned with: kernels take some when they are first used."""
Modes = Callable[[], tuple[Mode, Mode, str]]
"""How the transformer and Step-LLM run, and the transformer's attention; to be measured, perhaps, when first asked."""


HOST_ALONE = (
    "--host-ram (host_ram) counts on a card, or together with --vram (vram): without that, a run on a CPU takes the "
    "memory that it needs."
)
"""Said where a budget is given that holds nothing back."""


def read_budgets(vram: str | int | None, host_ram: str | int | None) -> tuple[int | None, int | None]:
    """Bytes of what was given, or stands in the environment.

    Raises:
        UsageError: no size.
    """
    found = []
    for given, option, variable in ((vram, "--vram", VRAM), (host_ram, "--host-ram", HOST_RAM)):
        if given is None and (set_there := from_environment(variable)) is not None:
            given, option = set_there, f"${variable}"
        found.append(None if given is None else parse_size(given, option))
    return found[0], found[1]


class Memory:
    """What a pipeline has loaded on a device, and what there is room for within ``vram`` and ``host_ram``."""

    def __init__(
        self, model: ModelFolder, device: torch.device, dtype: torch.dtype, vram: int | None, host_ram: int | None,
        keep_loaded: bool, modes: Modes,
    ) -> None:  # fmt: skip
        self.model, self.device, self.dtype = model, device, dtype
        self.vram, self.host_ram = vram, host_ram  # checked, see below
        self.keep_loaded = keep_loaded
        self.modes = modes
        self.pinned: int | None = None  # what blocks may take of host memory, where the system refused to pin more
        self.networks: dict[str, Any] = {}

    @property
    def vram(self) -> int | None:
        """Bytes of the card to stay in; None: what is free."""
        return self._vram

    @vram.setter
    def vram(self, size: str | int | None) -> None:
        count = None if size is None else parse_size(size, "--vram")
        if self.device.type == "cuda" and count is not None and count < 2 * CONTEXT:
            raise UsageError(f"--vram {rounded_down(count)} is less than any card's driver and a model take.")
        self._vram = count

    @property
    def host_ram(self) -> int | None:
        """Bytes of host memory to stay in; None: what is free."""
        return self._host_ram

    @host_ram.setter
    def host_ram(self, size: str | int | None) -> None:
        count = None if size is None else parse_size(size, "--host-ram")
        if self.device.type == "cuda":
            check_host(count)
        self._host_ram = count

    @cached_property
    def sizes(self) -> Sizes:
        """What the networks take."""
        mode, text_mode, _ = self.modes()
        return sizes_of(self.model.components, mode, text_mode)

    @property
    def is_planned(self) -> bool:
        """Whether memory is planned: on a card, and on a CPU that got a budget."""
        return self.device.type == "cuda" or self.vram is not None

    @property
    def placed(self) -> PlacedTransformer | None:
        """The transformer, if it is loaded."""
        return self.networks.get("transformer")

    @contextlib.contextmanager
    def capped(self) -> Iterator[None]:
        """Holds torch to the budget: what goes beyond is an allocation that fails, and is met by a smaller plan.

        torch has one limit for all of a process, so it holds only while this pipeline works. On a CPU it has none. The
        card is the current one meanwhile: pinning memory would make a context on card 0 otherwise, and fail where that
        one is full.
        """
        if self.device.type != "cuda":
            if self.vram is not None:
                return_large_tensors()
            yield
            return
        with torch.cuda.device(self.device), self._limited():
            yield

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        if self.vram is None:
            yield
            return
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (self.vram - CONTEXT) / total)), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def free(self, name: str, always: bool = False) -> None:
        """Lets a network go, unless it is to be kept."""
        if self.keep_loaded and not always:
            return
        network = self.networks.pop(name, None)
        if network is not None:
            if isinstance(network, PlacedTransformer):
                network.close()
            del network
            release_memory(self.device)

    # --- what there is room for -----------------------------------------------------------------------------------

    def room(self) -> int:
        """Bytes that may still be allocated on the device."""
        free, allowed = free_memory(self.device), self._allowed
        if allowed is None:
            # Kernels that are loaded later take of it too, outside of torch's allocator.
            return free - SPARE if self.device.type == "cuda" else free
        return min(free, allowed)

    @property
    def _allowed(self) -> int | None:
        """Bytes of the budget that are not taken; None without one."""
        if self.vram is None:
            return None
        if self.device.type == "cuda":
            return self.vram - CONTEXT - torch.cuda.memory_allocated(self.device)
        return self.vram - self._held

    @property
    def _held(self) -> int:
        """Bytes of the device that loaded networks take."""
        return sum(
            n.device_bytes if isinstance(n, PlacedTransformer) else sum(p.nbytes for p in n.parameters())
            for n in self.networks.values()
        )

    def plan(
        self, settings: GenerationSettings, room: int | None = None, rated: bool = False, moves: bool = False,
        texts: Sequence[str] | None = None, to_file: bool = True,
    ) -> Plan:  # fmt: skip
        """How a clip is made in the room that there is; with ``moves``, also in that of the loaded transformer. A VAE
        that an earlier video left goes, if nothing fits beside it.

        ``texts`` are its prompts, by default the longest that the encoders read. ``to_file``: a video file is written
        while it is decoded, which takes time. ``rated`` has a card's rates measured where they are not known.

        Raises:
            SolostepError: nothing fits.
        """
        make = partial(self._plan, settings, room, rated, moves, texts, to_file)
        try:
            return make()
        except SolostepError:
            if room is not None or "vae" not in self.networks:
                raise
        self.free("vae", always=True)
        return make()

    def _plan(
        self, settings: GenerationSettings, room: int | None, rated: bool, moves: bool, texts: Sequence[str] | None,
        to_file: bool,
    ) -> Plan:  # fmt: skip
        held, speed = self.placed if moves else None, self._rated(measure=rated)  # before room is looked at
        itemsize = 4 if self.dtype == torch.float32 else 2
        given = self.vram is not None
        if room is None:
            room, allowed = self.room(), self._allowed
            given = allowed is not None and room > allowed - SPARE  # else other programs leave no more
            room += 0 if held is None else held.device_bytes
        context, program = (CONTEXT, PROGRAM) if self.device.type == "cuda" else (0, 0)
        host = self.host_room(held)
        both = None
        if self.device.type != "cuda" and (self.host_ram is None or self.vram is None):
            both = free_memory(self.device) + (0 if held is None else held.device_bytes + held.host_bytes)
        limits = Limits(room, host, context, program, given, self.pinned, both)
        use = Use(self.text_tokens(texts) if texts else LONGEST_TEXT, to_file)
        return make_plan(self.sizes, settings, self.modes()[2], limits, speed, itemsize, use)

    def _plan_of(self, job: Job, room: int | None = None, moves: bool = False) -> Plan:
        """The plan for the steps that a job has left."""
        return self.plan(job.left, room, moves=moves, texts=job.request.texts, to_file=job.to_file)

    def expected(self, job: Job) -> Plan | None:
        """The plan of a job; where none was made, on a CPU without a budget, that of a run that holds nothing back."""
        if job.plan is not None or self.is_planned:
            return job.plan
        limits = Limits(MOST, None, context=0, program=0, given=False)
        use = Use(self.text_tokens(job.request.texts) if job.request.texts else LONGEST_TEXT, job.to_file)
        return make_plan(self.sizes, job.left, self.modes()[2], limits, None, self.dtype.itemsize, use)

    @cached_property
    def _tokenizer(self) -> LLMTokenizer:
        return LLMTokenizer(tokenizer_files(self.model.root)[0])

    def text_tokens(self, texts: Sequence[str]) -> int:
        """What the blocks see of texts, as a mean: their keys and values stay on the card."""
        return CLIP_TOKENS + math.ceil(sum(self._tokenizer(text)[1] for text in texts) / len(texts))

    def host_room(self, held: PlacedTransformer | None = None) -> int:
        """Bytes of host memory that may be taken beside the program, what ``held`` has of it among them."""
        if self.host_ram is None or not self.is_planned:
            return host_room() + (0 if held is None else held.host_bytes)
        # A budget is for the whole process; on a CPU, whose memory stands for a card's, the program is not counted.
        room = self.host_ram - (PROGRAM if self.device.type == "cuda" else 0)
        if self.placed is not None and held is None:
            room -= self.placed.host_bytes
        return max(0, room)

    def _rated(self, measure: bool) -> Rated | None:
        if self.device.type != "cuda":
            return None
        from .rates import known_rates, measured_rates, with_disk

        mode, _, attention = self.modes()
        found = (measured_rates if measure else known_rates)(self.device, mode, attention)
        return with_disk(found, self.model.components)

    def refuse_early(
        self, settings: GenerationSettings, rated: bool = False, texts: Sequence[str] | None = None,
        to_file: bool = True,
    ) -> Plan | None:  # fmt: skip
        """The plan for a clip, where memory is planned; see :meth:`plan`.

        Raises:
            SolostepError: the clip cannot be made in the memory that there is.
        """
        if self.is_planned:
            return self.plan(settings, rated=rated, texts=texts, to_file=to_file)
        mode = self.modes()[0]
        weights = mode.memory_bytes(self.model.components["transformer"])
        require_memory(weights, self.device, f"The transformer in {mode.name}")
        return None

    def make_room(self, needed: int) -> None:
        """Lets kept networks go if a stage that comes before them has no room beside them."""
        for name in ("vae", "transformer"):
            if self.is_planned and needed > self.room():
                self.free(name, always=True)

    def first_frame(self, settings: GenerationSettings) -> tuple[int, int]:
        """Strips for the first frame, and the bytes that it takes so: as many as where no other network is loaded, so
        that a clip is the same whatever was made before it."""
        return first_frame(self.sizes, settings, self.room() + self._held, self.dtype.itemsize)

    def decoding(
        self, settings: GenerationSettings, room: int, dtype: torch.dtype | None = None,
        without: PlacedTransformer | None = None,
    ) -> tuple[Decoding, int]:  # fmt: skip
        """How the VAE decodes in so much room beside its weights, and what it takes; ``without`` the transformer, if
        that is to go."""
        itemsize = (dtype or self.dtype).itemsize
        host = self.host_room(without) if self.is_planned else None
        cpu = None if self.device.type == "cuda" else this_processor()
        return choose_decoding(
            self.model.vae_config, settings.height, settings.width, room, itemsize, host, self._fast_decoding, cpu
        )

    @property
    def decodes_at_best(self) -> Decoding:
        """How the VAE decodes where there is memory enough."""
        return first_choice(self._fast_decoding)

    @property
    def _fast_decoding(self) -> bool:
        return by_speed(self.device.type == "cuda", self.modes()[2])

    def decodes_better_alone(self, settings: GenerationSettings) -> bool:
        """Whether decoding beside the transformer is much slower than without it, or has no room at all."""
        if self.placed is None:
            return False
        room = self.room() - (0 if "vae" in self.networks else self.sizes.vae)
        beside, needed = self.decoding(settings, room)
        alone, _ = self.decoding(settings, room + self.placed.device_bytes, None, self.placed)
        return needed > room or slower(beside, alone)

    # --- the transformer ------------------------------------------------------------------------------------------

    def transformer(self, job: Job, say: Progress) -> PlacedTransformer:
        """The transformer, placed for a clip; loaded, if it is not there."""
        placed = self.placed
        if placed is not None and not self.is_planned:
            return placed
        if placed is not None:
            plan = self._plan_of(job, moves=True)
            if not _fits(placed, plan):
                self.free("vae", always=True)
                plan = self._plan_of(job, moves=True)
            if not _fits(placed, plan):
                del placed
                if not self._move(plan, job, say):
                    return self.networks["transformer"]
                placed = self.networks["transformer"]
            placed.savings = plan.blocks.savings
            job.plan = as_placed(plan, placed.plan)
            return placed
        self.free("vae")
        if self.is_planned:
            job.plan = self._plan_of(job)
        else:
            self.refuse_early(job.left)
        with measured("load transformer", self.device, job.stages):
            return self._loaded(job, say)

    def _loaded(self, job: Job, say: Progress) -> PlacedTransformer:
        placed = None
        while placed is None:
            placed = self._load(job, say)
        self.networks["transformer"] = placed
        # Weights that arrived in float to be quantized leave gigabytes in torch's cache, beside what the steps take.
        release_memory(self.device)
        return placed

    def spare(self, job: Job, say: Progress) -> PlacedTransformer:
        """Moves the transformer, which nobody else may hold, to a plan for nine tenths of the memory, or of what there
        still is, or else to the smallest there is; if the host has no room for what leaves the card, it is loaded anew.
        Where it is on the smallest already, a step may be repeated once as it is: who took the memory may be gone.

        Raises:
            SolostepError: there is less memory than any plan takes, or a repeated step had too little once more.
        """
        release_memory(self.device)
        if job.plan is None or self.placed is None:
            raise torch.OutOfMemoryError("there is nothing to give up")
        plan = self._smaller(job, job.plan, self.room() + self.placed.device_bytes)
        if plan is None:
            job.event(
                f"Out of memory at step {job.saved.step + 1}: no plan takes less, and the step is repeated as it is."
            )
            time.sleep(PATIENCE)
            return self.placed
        before = self.placed.plan.resident
        moved = self._move(plan, job, say)
        placed: PlacedTransformer = self.networks["transformer"]
        if moved:
            job.plan = as_placed(plan, placed.plan)
        job.event(
            f"Out of memory at step {job.saved.step + 1}: {placed.plan.resident} of {plan.network.blocks} blocks "
            f"stay {where_blocks_stay(plan)}, where {before} did; the step is repeated."
        )
        return placed

    def _smaller(self, job: Job, plan: Plan, room: int) -> Plan | None:
        """A plan that takes less than ``plan``, in the room that there is; None for the same once more."""
        try:
            return self._plan_of(job, min(int(plan.blocks.device * 0.9), room), moves=True)
        except SolostepError as error:
            refused = error
        limits = Limits(MOST, None, plan.context, plan.program)
        least = smallest(self.sizes, job.left, self.modes()[2], self.dtype.itemsize, limits)
        if least > room:
            raise refused
        if least < plan.blocks.device:
            return self._plan_of(job, least, moves=True)
        if job.repeated == job.saved.step:
            raise SolostepError(
                f"Out of memory twice at step {job.saved.step + 1}, with the smallest plan there is; close other "
                "programs that use this memory, or make a smaller or shorter clip (--height, --width, --frames)."
            )
        job.repeated = job.saved.step
        return None

    def _load(self, job: Job, say: Progress) -> PlacedTransformer | None:
        """The transformer, loaded; None if its plan was too large for what there is. Then the job has a smaller one.

        Raises:
            SolostepError: nothing smaller is possible.
        """
        refused: NotPinned | None = None
        try:
            return self._place(job, say)
        except NotPinned as error:
            if job.plan is None or not job.plan.blocks.host:
                raise
            refused = error.with_traceback(None)
        except (RuntimeError, MemoryError) as error:
            if job.plan is None or not ran_out(error):
                raise
        release_memory(self.device)  # here, where no traceback holds what was loaded
        if refused is not None:
            job.plan = self._from_files(job, job.plan.blocks.host, refused)
            return None
        # Other programs took memory meanwhile.
        job.plan = self._plan_of(job, min(self.room(), int(job.plan.budget * 0.9)))
        job.event("Out of memory while the transformer was loaded; it is loaded again, more of it elsewhere.")
        return None

    def _place(self, job: Job, say: Progress) -> PlacedTransformer:
        blocks = None if job.plan is None else job.plan.blocks
        component = self.model.components["transformer"]
        return place(component, self.modes()[0], self.device, blocks, stage_of(say, "load transformer"))

    def _from_files(self, job: Job, asked: int, refused: NotPinned, room: int | None = None) -> Plan:
        """A plan with half of the pinned memory that was refused."""
        self.pinned = asked // 2
        try:
            plan = self._plan_of(job, room)
        except SolostepError:
            if self.sizes.could_be_converted:
                more = "convert the model first (`solostep quantize`), so that its blocks can come from files"
                raise NotPinned(f"{str(refused).removesuffix('.')}; or {more}.") from None
            raise refused from None
        job.event("So much host memory cannot be pinned: more blocks come from their files; loading begins anew.")
        return plan

    def _move(self, plan: Plan, job: Job, say: Progress) -> bool:
        """Moves the transformer to a plan; False if it was loaded anew, for want of pinned memory or of the card's, as
        the job's plan then says.

        Raises:
            SolostepError: nothing smaller is possible.
        """
        placed: PlacedTransformer | None = self.networks["transformer"]
        refused: NotPinned | None = None
        try:
            placed.move(plan.blocks)
            return True
        except NotPinned as error:
            refused = error.with_traceback(None)
        except BaseException as error:  # what is left of it would be taken for a whole one
            if not ran_out(error):
                self.free("transformer", always=True)
                raise
        placed = None  # here, where no traceback holds it
        self.free("transformer", always=True)
        if refused is None:
            job.plan = self._plan_of(job, min(self.room(), int(plan.budget * 0.9)))
            job.event("Out of memory while blocks were moved; the transformer is loaded anew, more of it elsewhere.")
        elif not plan.blocks.host:
            raise refused
        else:
            job.plan = self._from_files(job, plan.blocks.host, refused, min(self.room(), plan.budget))
        self._loaded(job, say)
        return False


def _fits(placed: PlacedTransformer, plan: Plan) -> bool:
    """Whether a transformer is placed in no more memory than a plan has for it."""
    return placed.plan.resident + placed.plan.slots <= plan.blocks.resident + plan.blocks.slots


def report(job: Job, plan: Plan | None) -> list[dict[str, Any]]:
    """What each stage took, beside what the plan said."""
    planned = {} if plan is None else {stage.name: stage for stage in plan.stages}
    lines = []
    for stage in job.stages:
        said = planned.get(stage.name)
        lines.append(stage.as_dict() | {
            "planned_gpu_bytes": None if said is None else said.device,
            "planned_context_bytes": None if said is None or plan is None else plan.context,
            "planned_host_bytes": None if said is None else said.host,
            "planned_disk_bytes": None if said is None else said.disk,
            "planned_seconds": None if said is None else said.seconds,
        })  # fmt: skip
    return lines
