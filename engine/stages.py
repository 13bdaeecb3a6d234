"""What the networks do to one job: texts -> first frame -> denoise -> decode, each measured, each within its memory.

Latents are on disk after every step; what runs out of memory is tried again with less.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.cards import ran_out
from . import latents as storage
from .checkpoint import ModelFolder, load
from .decoding import how_decoded
from .errors import OutputError
from .failures import steps_are_kept
from .memory import PATIENCE, Memory
from .models.vae import decode_chunks
from .precision import Mode
from .progress import Progress, stage_of
from .request import FrameSink, Job
from .runtime import Stage, measured, release_memory
from .sampling import GuidedVelocity, first_frame_condition, initial_noise, to_uint8
from .scheduler import euler_step, make_sigmas
from .streaming import PlacedTransformer
from .text import PromptEmbedding, encode_prompts
from .units import rounded_down, rounded_up

log = logging.getLogger("solostep")
T = TypeVar("T")

StepEnd = Callable[[int, float, Tensor], "Tensor | None"]
"""Called with a step's number, its sigma and the latents ``[1, f, c, h, w]`` behind it; may return others."""


class Stages:
    """The stages of a generation, on one device and within one memory."""

    def __init__(self, model: ModelFolder, device: torch.device, dtype: torch.dtype, memory: Memory) -> None:
        self.model, self.device, self.dtype, self.memory = model, device, dtype, memory

    def embed(
        self, texts: Sequence[str], mode: Mode, cache: Path | None, jobs: Sequence[Job], stages: list[Stage],
        say: Progress,
    ) -> dict[str, PromptEmbedding]:  # fmt: skip
        """Encodes all texts of ``jobs`` in one pass of the encoders; its measurement goes to ``stages``."""
        self.memory.make_room(self.memory.sizes.text if self.memory.is_planned else 0)
        named = stage_of(say, "text encoders")

        def encode() -> dict[str, PromptEmbedding]:
            with measured("text", self.device, stages):
                return encode_prompts(self.model, texts, self.device, self.dtype, cache, named, mode)

        def failed() -> None:
            for job in jobs:
                job.event("Out of memory in the text encoders; they begin again alone.", quiet=job is not jobs[0])

        return self._again(encode, failed)

    def first_frame(self, job: Job, say: Progress) -> None:
        """Encodes the first frame, if there is one, before the DiT takes the memory."""
        image, settings = job.request.image, job.request.settings
        if image is None:
            return
        if self.memory.is_planned:
            self.memory.make_room(self.memory.first_frame(settings)[1])

        def smaller(how: str) -> None:
            job.event(f"Out of memory while the first frame was encoded; going on {how}.")

        def encode() -> Tensor:
            with measured("first frame", self.device, job.stages):
                say("first frame", 0, 1)
                strips = self.memory.first_frame(settings)[0] if self.memory.is_planned else 1
                if strips > 1:
                    said = f"The first frame is encoded in {strips} strips, for want of memory."
                    job.event(said, quiet=self.memory.vram is not None)
                encoder = load(self.model.components["vae"], self.device, self.dtype, part="encoder")
                _, generator = initial_noise(settings, self.model.transformer_config.in_channels, job.saved.seed)
                return first_frame_condition(encoder, image, settings, generator, strips, smaller).cpu()

        alone = "Out of memory while the first frame was encoded; it is encoded again alone."
        job.condition = self._again(encode, lambda: job.event(alone))
        release_memory(self.device)
        say("first frame", 1, 1)

    def _again(self, work: Callable[[], T], failed: Callable[[], None]) -> T:
        """Where other programs took memory: again with nothing else of ours on the device, and then twice more, after a
        while each, as these programs may be gone."""
        waits = [0.0, PATIENCE, PATIENCE]
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or not waits:
                    raise
            for name in ("transformer", "vae"):
                self.memory.free(name, always=True)
            release_memory(self.device)
            failed()
            time.sleep(waits.pop(0))

    def denoise(
        self, job: Job, embeddings: list[PromptEmbedding], attention: str, backend: str | None, ended: StepEnd | None,
        say: Progress,
    ) -> None:  # fmt: skip
        """Runs the steps that are left; the latents are on disk after each."""
        saved, sigmas = job.saved, make_sigmas(job.saved.steps, job.request.settings.time_shift)
        transformer = self.memory.transformer(job, say)
        velocity: GuidedVelocity | None = None
        latents: Tensor | None = None  # those of `saved`, on the device

        def attempt(step: int) -> Tensor | None:
            """The latents after a step; None if the device ran out of memory, whose remains are gone then."""
            nonlocal velocity, latents
            try:
                if velocity is None:
                    velocity = _velocity(transformer, embeddings, job, attention, backend)
                if latents is None:
                    latents = saved.latents.to(self.device)
                return euler_step(latents, velocity(latents, sigmas[step]), sigmas[step], sigmas[step + 1])
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                why = " ".join(str(error).split()).partition(" If reserved")[0]  # without torch's advice
                log.warning("Step %d: %s", step + 1, why or "out of memory")
            return None

        with measured("denoise", self.device, job.stages):
            saved.info["attention_backend"] = backend
            say("denoise", saved.step, saved.steps)
            for step in range(saved.step, saved.steps):
                while (made := attempt(step)) is None:  # other programs took memory: a smaller plan, and again
                    velocity = None
                    del transformer  # nobody else may hold it while it moves
                    with steps_are_kept(job):
                        transformer = self.memory.spare(job, say)
                latents = made
                _keep(job, latents, step + 1)
                changed = None if ended is None else ended(step, float(sigmas[step]), latents)
                if changed is not None and changed is not latents:
                    latents = None
                    _keep(job, changed.cpu().float(), step + 1)
                say("denoise", step + 1, saved.steps)

    def decode(
        self, job: Job, sink: contextlib.AbstractContextManager[FrameSink], say: Progress, dtype: torch.dtype
    ) -> None:
        """Decodes chunk by chunk; frames leave as they are ready."""
        total = job.request.settings.num_frames
        networks = self.memory.networks

        def begin() -> Tensor:
            """The VAE and the latents on the device."""
            if "vae" not in networks or next(networks["vae"].parameters()).dtype != dtype:
                with measured("load vae", self.device, job.stages):
                    networks["vae"] = load(self.model.components["vae"], self.device, dtype, part="decoder")
            return job.saved.latents.to(self.device, dtype)

        said = "Out of memory while the VAE was loaded; it is loaded again alone."
        latents = self._again(begin, lambda: job.event(said))
        with measured("decode and write", self.device, job.stages), sink as open_sink:
            say("decode", 0, total)
            room, done = self.memory.room(), 0
            (slices, strips), needed = self.memory.decoding(job.request.settings, room, dtype)
            if needed > room:
                left = rounded_down(max(0, room))  # of a budget that the VAE alone is over, less than nothing
                log.warning(
                    "Decoding may run out of memory: beside the VAE it takes %s at least, and %s are left.",
                    rounded_up(needed), left,
                )  # fmt: skip
            if (slices, strips) != self.memory.decodes_at_best:
                asked = self.memory.vram is not None
                job.event(f"Decoding {how_decoded(slices, strips)}, for want of memory.", quiet=asked)

            def smaller(setting: str) -> None:
                job.event(f"Out of memory while decoding; going on {setting}.")

            def alone() -> bool:
                return self._without_transformer(job)

            for frames in decode_chunks(networks["vae"], latents, slices, strips, on_retry=smaller, make_room=alone):
                open_sink.write(_pixels(frames[0], job).numpy())
                done += frames.shape[1]
                say("decode", done, total)

    def _without_transformer(self, job: Job) -> bool:
        """Gives a transformer that was kept up for the decoding; False if there is none."""
        if self.memory.placed is None:
            return False
        self.memory.free("transformer", always=True)
        job.event("Out of memory while decoding in the smallest pieces; going on without the kept transformer.")
        return True


def _velocity(
    transformer: PlacedTransformer, embeddings: list[PromptEmbedding], job: Job, attention: str, backend: str | None
) -> GuidedVelocity:
    return GuidedVelocity(
        transformer.network, embeddings, job.request.settings, job.condition, attention, backend, transformer.blocks,
        savings=transformer.savings,
    )  # fmt: skip


def _pixels(frames: Tensor, job: Job) -> Tensor:
    """Frames as uint8 on the host; made there, to the same bits, if the device has no memory for it."""
    try:
        return to_uint8(frames).cpu()
    except RuntimeError as error:
        if not ran_out(error):
            raise
    said = "Out of memory while frames were made of what was decoded; the host makes them."
    if said not in job.events:
        job.event(said)
    return to_uint8(frames.cpu())


def _keep(job: Job, latents: Tensor, step: int) -> None:
    """Puts a finished step on disk. A full disk does not end the run: the video may still find its place."""
    job.saved.latents, job.saved.step = latents.cpu(), step
    try:
        if not job.saved.finished:
            storage.save_latents(job.path, job.saved)
            return
        job.saved_at = storage.save_or_rescue(job.path, job.saved)
        if job.saved_at != job.path:
            log.warning("%s could not be written: the latents are kept in %s.", job.path, job.saved_at)
    except OutputError as error:
        if not job.save_failed or job.saved.finished:
            log.warning("%s Going on without: an interruption now loses the steps made since.", error)
        job.save_failed = True
