"""The timed run of a cell: one video as a user makes it, with each step's seconds and every peak of memory.

Steps are timed with the device synchronized after each; recording what drift needs is done between them and taken out
of the times. What is measured once for a card (which attention is the fastest; its rates, where they are asked for) is
measured before. The first step, in which kernels are compiled and texts embedded, stands apart. The card's own peak is
what its driver counts, sampled every 20 ms, less what was taken before this process.

A run that is interrupted goes on after its last step in another process. Its seconds are then those of every step,
each computed once, and what comes before and behind them once: what later processes load again, and a step that was cut
off, is time of the interruption and not of the video. The first step in each process is slower, and is counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solostep.benchmarks.cell_card import Card, Sample, Sampling, cards, sampling, summary, taken
from solostep.benchmarks.environment import environment
from solostep.benchmarks.reference import RUN, Recorder, kept_latents, noise_of, recording, run_once
from solostep.benchmarks.results import read_json, write_json
from solostep.benchmarks.whole_pipeline import Frames, driver_peak
from solostep.engine.choices import settle
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.progress import Progress
from solostep.engine.request import Request
from solostep.engine.runtime import host_peak
from solostep.engine.video import VideoWriter, find_ffmpeg

LENGTHS = (50, 15)
"""Steps that the time of a whole video is told for: the released models' and the distilled one's."""
DENOISE, WRITE = "denoise", "decode and write"
RAN = ("precision", "text_precision", "attention", "attention_backend", "kernels", "device")
WHERE = ("date", "commit", "driver", "cpu")
"""Of an environment, what may differ between the processes of one run; the card and the computing code do not."""
BEFORE = "everything before the steps"
"""In the place of stages that an interrupted process could not tell one by one."""


def driver_before() -> list[Card] | None:
    """What is taken of all cards before this process takes anything; None without one, or if it is too late."""
    if not torch.cuda.is_available() or torch.cuda.is_initialized():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        return cards()
    return None


# --- what is kept of a run ------------------------------------------------------------------------------------------


@dataclass
class Part:
    """What one process did of a run: its steps, and what it took until they were done.

    ``load_seconds`` is everything before the first of its steps. ``stages``, ``plan`` and ``events`` are known once all
    steps are done; a process that was interrupted before does not tell them. ``where``: when and on what it ran.
    """

    load_seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    gpu_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    driver_peak_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    stages: list[dict[str, Any]] | None = None
    plan: dict[str, Any] | None = None
    events: list[str] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For the result of a run that was made in several processes."""
        names = ("load_seconds", "gpu_peak_bytes", "host_peak_bytes", "driver_peak_bytes")
        return {"steps": len(self.steps)} | {name: getattr(self, name) for name in names} | self.where


class Kept:
    """The parts of a run in ``folder``, beside its latents ``run``.

    After each step first the pipeline puts its latents on disk, then the step's seconds get there. If a process ends
    between the two, the step is made again from the latents before it, which are kept under a second name.
    """

    def __init__(self, folder: Path, run: Path) -> None:
        self.file, self.run = folder / "parts.json", run
        self.previous = run.with_name(f"previous-{run.name}")
        self.parts = self._read()
        self._fit()

    def _read(self) -> list[Part]:
        try:
            return [Part(**part) for part in read_json(self.file)]
        except (UsageError, TypeError):
            return []

    @property
    def done(self) -> int:
        return sum(len(part.steps) for part in self.parts)

    def _fit(self) -> None:
        """Makes times and latents those of the same steps."""
        there = kept_latents(self.run)
        if there is not None and there.step > self.done:
            there = kept_latents(self.previous)
            if there is not None:
                self.previous.replace(self.run)
        if there is None or there.step > self.done:
            self.clear()
            return
        while self.done > there.step:  # latents could not be written: those steps are made again
            self.parts[-1].steps.pop()
            self.parts = [part for part in self.parts if part.steps]
        write_json(self.file, [asdict(part) for part in self.parts])

    def clear(self) -> None:
        """Begins anew."""
        self.parts = []
        for file in (self.file, self.run, self.previous):
            file.unlink(missing_ok=True)

    def step(self, part: Part) -> None:
        """Keeps what a process has done so far."""
        write_json(self.file, [asdict(each) for each in (*self.parts, part)])
        if not self.run.exists():  # a full disk, which the pipeline has told of
            return
        self.previous.unlink(missing_ok=True)
        try:
            os.link(self.run, self.previous)  # the pipeline replaces its file, so this one stays as it is
        except OSError:  # not on every file system
            shutil.copyfile(self.run, self.previous)


@dataclass
class Marks:
    """A progress function that notes when each step ends, what recording had taken by then, and keeps it."""

    device: torch.device
    recorder: Recorder | None
    progress: Progress
    kept: Kept
    sampled: Sampling
    driver: dict[str, int | None]
    start: float = 0.0
    times: list[float] = field(default_factory=list)
    part: Part = field(default_factory=Part)
    keeping: float = 0.0
    """Seconds that keeping it took."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == DENOISE:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self._ended(now - self.spent)
            self.sampled.busy = done < total
            self.keeping += time.perf_counter() - now
        self.progress(stage, done, total)

    @property
    def spent(self) -> float:
        return self.keeping + (0.0 if self.recorder is None else self.recorder.step_seconds)

    def _ended(self, now: float) -> None:
        self.times.append(now)
        self.part.steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        self.part.load_seconds = self.times[0] - self.start
        self.part.host_peak_bytes, self.part.driver_peak_bytes = host_peak(), self.driver["bytes"]
        if self.device.type == "cuda":
            self.part.gpu_peak_bytes = torch.cuda.max_memory_allocated(self.device)
        self.part.samples = list(self.sampled.samples)
        if self.part.steps:
            self.kept.step(self.part)

    def all_steps(self, record: dict[str, Any]) -> None:
        """Keeps what is known once the steps are done, if any were made here."""
        if self.part.steps:
            self.part.stages, self.part.plan, self.part.events = record["stages"], record["plan"], record["events"]
            self.kept.step(self.part)


class Tee:
    """A sink that gives frames to several."""

    def __init__(self, *sinks: Any) -> None:
        self.sinks = sinks

    def write(self, frames: np.ndarray) -> None:
        for sink in self.sinks:
            sink.write(frames)


@dataclass
class Timed:
    """What one timed run took; ``parts`` are those of the processes it was made in, this one's behind the others."""

    seconds: float
    parts: list[Part]
    stages: list[dict[str, Any]]
    recorded: tuple[float, float]
    frames: int
    film: bool
    told: dict[str, Any]
    driver: int | None = None

    @property
    def earlier(self) -> list[Part]:
        """Of the processes before this one."""
        return self.parts[:-1]

    @property
    def steps(self) -> list[float]:
        return [seconds for part in self.parts for seconds in part.steps]

    @property
    def only_decoded(self) -> bool:
        """Whether this process found all steps done, and so loaded nothing for them."""
        return not self.parts[-1].steps

    def result(self) -> dict[str, Any]:
        """The keys of a result that it fills."""
        video = self.seconds - sum(self.recorded) + sum(sum(part.steps) for part in self.earlier)
        if self.only_decoded:
            video += self.earlier[-1].load_seconds
        later = [part.steps[0] for part in self.parts[1:] if part.steps]
        speed: dict[str, Any] = {
            "first_step_seconds": self.steps[0], "step_seconds": [s for part in self.parts for s in part.steps[1:]],
            "stages": self._stages(), "video_seconds": video, "frames_written": self.frames,
            "written": "mp4" if self.film else "counted", "end_to_end": self._end_to_end(video),
            "ran": {name: self.told.get(name) for name in RAN},
            "clocks": summary([sample for part in self.parts for sample in part.samples]),
        }  # fmt: skip
        if self.earlier:
            speed["resumed"] = [len(part.steps) for part in self.parts]
            speed["resumed_first_step_seconds"] = later
            speed["resumed_load_seconds"] = self._loaded_again()
            speed["processes"] = [part.told() for part in self.parts]
        rows = [*self._rows(), *(asdict(part) for part in self.earlier)]
        return {
            "speed": speed,
            "memory": {
                "gpu_peak_bytes": _peak(rows, "gpu_peak_bytes"), "host_peak_bytes": _peak(rows, "host_peak_bytes"),
                "driver_peak_bytes": self._driver(), "stages": self._rows(),
            },
            "plan": self.earlier[-1].plan if self.only_decoded else self.told["plan"], "events": self._events(),
        }  # fmt: skip

    def _rows(self) -> list[dict[str, Any]]:
        """The stages of this process, and those before the decoding from the one that made the last step."""
        if not self.only_decoded:
            return self.stages
        part = self.earlier[-1]
        if part.stages is not None:
            return [*part.stages, *self.stages]
        peaks = {"gpu_peak_bytes": part.gpu_peak_bytes, "host_peak_bytes": part.host_peak_bytes}
        return [
            {"stage": BEFORE, "seconds": part.load_seconds, "gpu_peak_bytes": None, "host_peak_bytes": None},
            {"stage": DENOISE, "seconds": sum(part.steps)} | peaks, *self.stages,
        ]  # fmt: skip

    def _stages(self) -> dict[str, float]:
        """Seconds by name: each stage once, and the steps of all processes."""
        found: dict[str, float] = {}
        for row in self._rows():
            found[row["stage"]] = found.get(row["stage"], 0.0) + row["seconds"]
        if self.only_decoded:  # with what recording took there
            found[DENOISE] = sum(self.steps)
        else:
            found[DENOISE] += sum(sum(part.steps) for part in self.earlier) - self.recorded[0]
        found[WRITE] = found.get(WRITE, 0.0) - self.recorded[1]
        return found

    def _driver(self) -> int | None:
        peaks = [self.driver, *(part.driver_peak_bytes for part in self.earlier)]
        return None if None in peaks else max(peak for peak in peaks if peak is not None)

    def _loaded_again(self) -> float:
        """Seconds of loading that are not in those of the video: of every process but the last one that loaded."""
        return sum(part.load_seconds for part in (self.earlier[:-1] if self.only_decoded else self.earlier))

    def _events(self) -> list[str]:
        if not self.earlier:
            return self.told["events"]
        counts = " + ".join(str(len(part.steps)) for part in self.parts)
        unknown = [part for part in self.earlier if part.stages is None]
        said = [
            f"The timed run was interrupted and went on: {counts} steps in {len(self.parts)} processes. Its seconds "
            f"are the sum over them, with the loading of one; {self._loaded_again():.1f} s of loading in the others, "
            "and steps that were cut off, are not in it."
        ]  # fmt: skip
        if unknown:
            said.append("What the interrupted processes did beside their steps (events, plans) was not kept.")
        said += self._differing()
        return [*said, *(event for part in self.earlier for event in part.events), *self.told["events"]]

    def _differing(self) -> list[str]:
        """In what the processes of one run were not alike, in words."""
        found = []
        for name in dict.fromkeys(name for part in self.parts for name in part.where if name != "date"):
            values = list(dict.fromkeys(str(part.where[name]) for part in self.parts if name in part.where))
            if len(values) > 1:
                same = ", with the same computing code" if name == "commit" else ""
                found.append(f"Its processes differ in {name.replace('_', ' ')}: {', then '.join(values)}{same}.")
        return found

    def _end_to_end(self, video: float) -> dict[str, Any]:
        """A whole video of 50 and of 15 steps: as run, else everything but the steps, the first step, and the median of
        the others for each that follows. One step alone says nothing about the others."""
        steps, found = self.steps, {}
        others = [s for part in self.parts for s in part.steps[1:]] or steps[1:]
        for length in LENGTHS:
            if length == len(steps):
                found[str(length)] = {"seconds": video, "extrapolated": False}
            elif others:
                seconds = video - sum(steps) + steps[0] + (length - 1) * statistics.median(others)
                found[str(length)] = {"seconds": seconds, "extrapolated": True}
        return found


def _peak(stages: Sequence[dict[str, Any]], name: str) -> int | None:
    return max((row[name] for row in stages if row[name] is not None), default=None)


def timed_run(
    pipe: StepVideoPipeline, request: Request, folder: Path, recorder: Recorder | None, before: list[Card] | None,
    film: bool, progress: Progress, rates: bool = True,
) -> Timed:  # fmt: skip
    """One video: texts encoded, networks loaded, frames written to an mp4 file if ``film`` and ffmpeg starts.

    It goes on from what an interrupted process left in ``folder``, and leaves its own there: the caller removes it.

    Args:
        recorder: gets the latents and frames, which is taken out of the times; None records nothing.
        before: what the driver counted before this process; without it the card's own peak is not told.
        rates: has a card's rates measured first, where they are not known, so that the plan holds seconds: 20 to
            45 s for the first precision and attention, less for the others; none of it is in the times.
    """
    settings, device = request.settings, pipe.device
    film = film and has_ffmpeg()
    asked = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift")
    with pipe.memory.capped():
        if pipe.memory.is_planned:
            pipe.memory.refuse_early(settings)  # before a second is spent on what cannot be made
        # Kernels are examined once for a card, and kept.
        backend = pipe._attention_backend(settings)
        settle(device, pipe.mode.product_kinds | pipe.text_mode.product_kinds)
    if rates and device.type == "cuda":
        pipe.plan(**{name: getattr(settings, name) for name in asked})
    kept, count = _found(folder, recorder), Frames()
    if recorder is not None:
        recorder.step(0, noise_of(pipe, request))
        recorder.step_seconds = 0.0
    taken_before = taken(device, before)
    watched = driver_peak(device, taken_before) if taken_before is not None else None
    nothing: dict[str, int | None] = {"bytes": None}
    with sampling(device) as sampled, watched or contextlib.nullcontext(nothing) as driver:
        part = Part(where=_where(device, backend))
        marks = Marks(device, recorder, progress, kept, sampled, driver, time.perf_counter(), part=part)

        def open_sink(i: int, request: Request, record: dict[str, Any]) -> contextlib.AbstractContextManager[Tee]:
            marks.all_steps(record)
            return sink()

        @contextlib.contextmanager
        def sink() -> Iterator[Tee]:
            sinks: list[Any] = [count] if recorder is None else [count, recorder]
            if not film:
                yield Tee(*sinks)
                return
            with VideoWriter(folder / "video.mp4", settings.width, settings.height) as writer:
                yield Tee(*sinks, writer)

        callback = None if recorder is None else recording(recorder)
        told = run_once(pipe, request, kept.run, callback, open_sink, marks, resume=True, to_file=film)
        seconds = time.perf_counter() - marks.start
    (folder / "video.mp4").unlink(missing_ok=True)
    spent = (marks.spent, 0.0 if recorder is None else recorder.frame_seconds)
    parts = [*kept.parts, marks.part]
    return Timed(seconds, parts, pipe.memory_report(), spent, count.count, film, told, driver["bytes"])


def _where(device: torch.device, backend: str | None) -> dict[str, Any]:
    """When, with what and on what a process runs, as far as the processes of one run may differ in it."""
    here = environment(device)
    power = (here["clocks"] or {}).get("power_limit_w")
    return {name: here[name] for name in WHERE} | {"power_limit_w": power, "attention_backend": backend}


def _found(folder: Path, recorder: Recorder | None) -> Kept:
    """What an interrupted process left of a timed run. Its recording has to hold the same steps: those that were made
    without being timed are made again."""
    kept = Kept(folder, folder / RUN if recorder is None else recorder.run)
    if recorder is not None and recorder.resumed() != kept.done:
        kept.clear()
        recorder.clear()
    return kept


def has_ffmpeg() -> bool:
    """Whether videos can be written and compared here."""
    with contextlib.suppress(SolostepError):
        find_ffmpeg()
        return True
    return False
