"""The timed run of a cell: one video as a user makes it, with each step's seconds and every peak of memory.

Steps are timed with the device synchronized after each; recording what drift needs is done between them and taken out
of the times. What is measured once for a card (which attention is the fastest; its rates, where they are asked for) is
measured before. The first step, in which kernels are compiled and texts embedded, stands apart. The card's own peak is
what its driver counts, sampled every 20 ms, less what was taken before this process.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solostep.benchmarks.reference import Recorder, noise_of, recording, run_once
from solostep.benchmarks.whole_pipeline import Frames, driver_bytes, driver_peak
from solostep.engine.errors import SolostepError
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.progress import Progress
from solostep.engine.request import Request
from solostep.engine.video import VideoWriter, find_ffmpeg

LENGTHS = (50, 15)
"""Steps that the time of a whole video is told for: the released models' and the distilled one's."""
DENOISE, WRITE = "denoise", "decode and write"


def driver_before() -> int | None:
    """What is taken of the card before this process takes anything; None without a card, or if it is too late."""
    if not torch.cuda.is_available() or torch.cuda.is_initialized():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
        return driver_bytes()
    return None


@dataclass
class Marks:
    """A progress function that notes when each step ends, and what recording had taken by then."""

    device: torch.device
    recorder: Recorder | None
    progress: Progress
    times: list[float] = field(default_factory=list)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == DENOISE:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            recording = 0.0 if self.recorder is None else self.recorder.step_seconds
            self.times.append(time.perf_counter() - recording)
        self.progress(stage, done, total)

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Tee:
    """A sink that gives frames to several."""

    def __init__(self, *sinks: Any) -> None:
        self.sinks = sinks

    def write(self, frames: np.ndarray) -> None:
        for sink in self.sinks:
            sink.write(frames)


@dataclass
class Timed:
    """What one timed run took."""

    seconds: float
    steps: list[float]
    stages: list[dict[str, Any]]
    recorded: tuple[float, float]
    frames: int
    film: bool
    driver: int | None
    told: dict[str, Any]

    def result(self) -> dict[str, Any]:
        """The keys of a result that it fills."""
        stages: dict[str, float] = {}
        for row in self.stages:
            stages[row["stage"]] = stages.get(row["stage"], 0.0) + row["seconds"]
        for name, spent in zip((DENOISE, WRITE), self.recorded, strict=True):
            stages[name] = stages.get(name, 0.0) - spent
        video = self.seconds - sum(self.recorded)
        ran = ("precision", "text_precision", "attention", "attention_backend", "device")
        return {
            "speed": {
                "first_step_seconds": self.steps[0], "step_seconds": self.steps[1:], "stages": stages,
                "video_seconds": video, "frames_written": self.frames, "written": "mp4" if self.film else "counted",
                "end_to_end": self._end_to_end(video), "ran": {name: self.told.get(name) for name in ran},
            },
            "memory": {
                "gpu_peak_bytes": _peak(self.stages, "gpu_peak_bytes"), "driver_peak_bytes": self.driver,
                "host_peak_bytes": _peak(self.stages, "host_peak_bytes"), "stages": self.stages,
            },
            "plan": self.told["plan"], "events": self.told["events"],
        }  # fmt: skip

    def _end_to_end(self, video: float) -> dict[str, Any]:
        """A whole video of 50 and of 15 steps: as run, else everything but the steps, the first step, and the median of
        the others for each that follows. One step alone says nothing about the others."""
        found = {}
        for length in LENGTHS:
            if length == len(self.steps):
                found[str(length)] = {"seconds": video, "extrapolated": False}
            elif len(self.steps) > 1:
                rest = video - sum(self.steps)
                seconds = rest + self.steps[0] + (length - 1) * statistics.median(self.steps[1:])
                found[str(length)] = {"seconds": seconds, "extrapolated": True}
        return found


def _peak(stages: list[dict[str, Any]], name: str) -> int | None:
    return max((row[name] for row in stages if row[name] is not None), default=None)


def timed_run(
    pipe: StepVideoPipeline, request: Request, scratch: Path, recorder: Recorder | None, before: int | None,
    film: bool, progress: Progress, rates: bool = False,
) -> Timed:  # fmt: skip
    """One video: texts encoded, networks loaded, frames written to an mp4 file if ``film`` and ffmpeg starts.

    Args:
        recorder: gets the latents and frames, which is taken out of the times; None records nothing.
        before: what the driver counted before this process; without it the card's own peak is not told.
        rates: has the card's rates measured first, where they are not known, so that the plan holds seconds: 20 to
            45 s for the first precision and attention, less for the others.
    """
    settings, device = request.settings, pipe.device
    film = film and has_ffmpeg()
    asked = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift")
    with pipe.memory.capped():
        if pipe.memory.is_planned:
            pipe.memory.refuse_early(settings)  # before a second is spent on what cannot be made
        pipe._attention_backend(settings)  # measured once for a card, and kept
    if rates and device.type == "cuda":
        pipe.plan(**{name: getattr(settings, name) for name in asked})
    marks, count = Marks(device, recorder, progress), Frames()
    if recorder is not None:
        recorder.step(0, noise_of(pipe, request))
        recorder.step_seconds = 0.0

    @contextlib.contextmanager
    def open_sink(i: int, request: Request, record: dict[str, Any]) -> Iterator[Tee]:
        sinks: list[Any] = [count] if recorder is None else [count, recorder]
        if not film:
            yield Tee(*sinks)
            return
        with VideoWriter(scratch / "video.mp4", settings.width, settings.height) as writer:
            yield Tee(*sinks, writer)

    watched = driver_peak(device, before) if before is not None and device.type == "cuda" else None
    with watched or contextlib.nullcontext({"bytes": None}) as driver:
        start = time.perf_counter()
        callback = None if recorder is None else recording(recorder)
        told = run_once(pipe, request, scratch, callback, open_sink, marks)
        seconds = time.perf_counter() - start
    (scratch / "video.mp4").unlink(missing_ok=True)
    spent = (0.0, 0.0) if recorder is None else (recorder.step_seconds, recorder.frame_seconds)
    return Timed(seconds, marks.steps, pipe.memory_report(), spent, count.count, film, driver["bytes"], told)


def has_ffmpeg() -> bool:
    """Whether videos can be written and compared here."""
    with contextlib.suppress(SolostepError):
        find_ffmpeg()
        return True
    return False
