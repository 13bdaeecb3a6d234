"""Makes the results that are kept under benchmarks/results/ anew: every measurement that README.md quotes, on the cards
that are here, one at a time on each.

    python -m solostep.benchmarks.record OUT --model /dev/shm/synthetic --list
    python -m solostep.benchmarks.record OUT --model /dev/shm/synthetic --seconds 1700

A measurement is a command of its own, with its own log below OUT/logs, a limit of time and a mark below OUT/done once
it has ended well. Run again, what is marked is passed over, and what failed or was cut is tried again; a bench goes on
from the step it was cut at. With --seconds everything is ended then, and only what goes on later is begun without the
time to end. Several cards share the list: each takes the first measurement that may begin. They should be alike, and
nothing else should run on them. All of it takes one H200 about three hours: every precision at 204 frames and shorter
clips, and within budgets of the card's memory; drift at the released size and of the demo; kernels and decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from solostep.benchmarks.cell_state import terminated_like_interrupted
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.files import replacing
from solostep.engine.progress import duration

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-m")
BENCH = (*PYTHON, "solostep.benchmarks.bench")
SPEED = (*BENCH, "--levels", "speed", "-n", "1", "--seeds", "1")
SYNTHETIC = (*PYTHON, "solostep.benchmarks.synthetic")
WIDTH = (*PYTHON, "solostep.benchmarks.full_width")
MODEL, MODEL_FP8, MODEL_TEXT, MODEL_TI2V = "model", "model-fp8", "model-text", "model-ti2v"
"""In bf16 with Step-LLM in int8; in fp8; in fp8 with Step-LLM in bf16; and the first for image-to-video."""
LEAST = 180.0
"""Seconds below which nothing is begun that would be cut."""
SLACK = 1.6
"""A measurement is stopped when it takes so much longer than expected, and a minute more."""


@dataclass(frozen=True)
class Job:
    """A measurement: a command, the seconds that it is expected to take on an H200, and what has to be there before."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    resumes: bool = False
    """Whether it goes on where it was cut: then it may begin without the time to end."""

    @property
    def limit(self) -> float:
        return SLACK * self.seconds + 60


def tests_of(name: str, seconds: float, *paths: str, processes: int = 0) -> Job:
    """Tests on the card, from the checkout."""
    options = ("-m", "gpu", "-q", "-n", str(processes), "-o", "addopts=", "--import-mode=importlib")
    return Job(name, (*PYTHON, "pytest", *options, *paths), seconds)


def speed_job(
    name: str, seconds: float, *options: str, steps: int = 2, roles: str = "mode", needs: tuple[str, ...] = (MODEL,)
) -> Job:  # fmt: skip
    """Speed and memory of modes of the full size, on a model of drawn weights: the first of ``needs``."""
    folder = "{model}" + needs[0].removeprefix(MODEL)
    command = (
        *SPEED, "-m", folder, "--roles", roles, "--steps", str(steps), "-o", f"{{out}}/h200/{name}", *options
    )  # fmt: skip
    return Job(name, command, seconds, needs, resumes=True)


def drift_job(name: str, seconds: float, *options: str) -> Job:
    """Drift of all modes and floors at the released size, on weights that are drawn as it goes."""
    command = (*PYTHON, "solostep.benchmarks.full_size", "drift", *options, "-o", f"{{out}}/h200/{name}")
    return Job(name, command, seconds, resumes=True)


def whole_job(
    name: str, seconds: float, budgets: tuple[str, ...], *options: str, to: str = "whole-h200", stored: bool = False
) -> Job:  # fmt: skip
    """The pipeline in fp8 within budgets of the card; lines go to a file of one size of frame. stored: of a model that
    is in fp8 already."""
    vram = [part for size in budgets for part in ("--vram", size)]
    modes = ("--precision", "fp8", "--text-precision", "int8", "-o", f"{{out}}/{to}.jsonl")
    folder = "{model}-fp8" if stored else "{model}"
    command = (*PYTHON, "solostep.benchmarks.whole_pipeline", "run", folder, *modes, *vram, *options)
    return Job(name, command, seconds, (MODEL_FP8 if stored else MODEL,))


def vae_jobs() -> Iterator[Job]:
    ways = ((0, 0), (4, 1), (8, 8), (8, 16), (4, 8), (4, 16), (2, 8), (2, 16), (1, 16), (2, 1), (1, 1), (4, 4), (2, 4))
    for frames, strips in ways:
        options = ("--at-once", str(frames), "--strips", str(strips)) if frames else ()
        yield Job(f"vae-{frames}-{strips}", (*WIDTH, "vae", *options, "-o", "{out}/vae-h200.jsonl"), 22)
    exact = ("--precision", "fp32", "--repeats", "1", "-o", "{out}/vae-fp32-h200.jsonl")
    for frames, strips in ((4, 1), (4, 8), (4, 16), (2, 16)):
        options = ("--at-once", str(frames), "--strips", str(strips))
        yield Job(f"vae-fp32-{frames}-{strips}", (*WIDTH, "vae", *options, *exact), 35)
    for strips in (1, 4, 16):
        options = ("--strips", str(strips), "-o", "{out}/encode-h200.jsonl")
        yield Job(f"encode-{strips}", (*WIDTH, "vae-encode", *options), 15)
        yield Job(f"encode-fp32-{strips}", (*WIDTH, "vae-encode", "--precision", "fp32", *options), 15)


def kernels_job(tokens: int, seconds: float) -> Job:
    """Every kernel at the tokens of 204 frames, or fewer."""
    name = "kernels-h200" if tokens == 75_888 else f"kernels-h200-{tokens}"
    options = ("--tokens", str(tokens), "-o", f"{{out}}/{name}.jsonl", "--markdown", f"{{out}}/{name}.md")
    return Job(name.replace("-h200", ""), (*PYTHON, "solostep.benchmarks.kernels", *options), seconds)


LONG, SHORT = ("--frames", "204"), ("--frames", "136,102,51")
BUDGETS = "48GB,24GB,16GB,12GB"
WEIGHTS = "int8-weight,fp8-weight,nf4,int4-weight"
"""Precisions of weights alone."""
LATENTS = ("--latents-only", "--cached-texts")
MORE = ("--steps", "6", *LATENTS)
"""Of clips whose second step still prepares what later ones repeat."""
DEMO = (
    *BENCH, "--device", "cuda", "-n", "32", "--seeds", "4", "--levels", "blocks,teacher,free,video,score",
    "--jobs", "12", "-o", "{out}/demo",
)  # fmt: skip
JOBS: tuple[Job, ...] = (
    Job(MODEL, (*SYNTHETIC, "{model}"), 65),
    tests_of("tests-attention", 90, "tests/kernels/test_attention_hopper.py", processes=8),
    # Its kernel is looked at first: a wrong one would cost twenty minutes.
    speed_job(
        "fifty", 1050, *LONG, "--precision", "int8", "--attention", "int8-fp8", steps=50,
        needs=(MODEL, "tests-attention"),
    ),
    drift_job("drift-204", 650, *LONG, "--times", "1", "--what", "own"),
    Job("demo", (*DEMO, "--precision", "bf16,int8,fp8,int8-weight,fp8-weight,nf4,int4-weight"), 480, resumes=True),
    kernels_job(75_888, 340),
    speed_job("budgets", 560, *LONG, "--precision", "int8", "--vram", "80GB,48GB,24GB,16GB,12GB,8GB"),
    speed_job("weights", 320, *LONG, "--precision", "int8-weight,fp8-weight,nf4", "--vram", "none"),
    speed_job("resident", 330, *LONG, "--precision", "int8,fp8,bf16", "--vram", "none"),
    speed_job("reference", 115, *LONG, "--precision", "int8", roles="reference"),
    speed_job("short", 330, *SHORT, "--precision", "int8", "--vram", "48GB,12GB"),
    speed_job("int4", 110, *LONG, "--precision", "int4-weight", "--vram", "none"),
    speed_job("budgets-fp8", 340, *LONG, "--precision", "fp8", "--vram", BUDGETS),
    # Up to 53 GB of blocks lie in pinned memory beside the model.
    speed_job("budgets-bf16", 400, *LONG, "--precision", "bf16", "--vram", BUDGETS),
    speed_job("short-rest", 900, *SHORT, "--precision", f"bf16,fp8,{WEIGHTS}", "--vram", "none"),
    speed_job("budgets-weights", 850, *LONG, "--precision", WEIGHTS, "--vram", "24GB,12GB"),
    speed_job("short-int8", 390, *SHORT, "--precision", "int8", "--vram", "none,24GB,16GB"),
    # All of the 8-bit modes is on the card in 48 GB.
    speed_job("budgets-weights-rest", 850, *LONG, "--precision", WEIGHTS, "--vram", "16GB,48GB"),
    # Six texts, which is the fewest that make an interval.
    drift_job("drift-texts", 450, "--frames", "51", "--times", "1", "--texts", "6", "--what", "own"),
    Job(MODEL_FP8, (*SYNTHETIC, "{model}-fp8", "--precision", "fp8"), 65),
    # Blocks come from files in the form in which they are computed only.
    whole_job("files", 130, ("12GB",), *LONG, *LATENTS, "--host-ram", "4GB", stored=True, to="files-h200"),
    # The same model from pinned memory: the SHA-256 of the latents has to be the same.
    whole_job("files-pinned", 100, ("12GB",), *LONG, *LATENTS, stored=True, to="files-h200"),
    # And with all of it on the card, and in the least that there is: attention in groups, small chunks.
    whole_job("files-beside", 260, ("80GB", "5.6GB"), *LONG, *LATENTS, stored=True, to="files-h200"),
    # To an mp4 with the decoder in strips of four frames, which takes less than 3 GB.
    speed_job("budgets-8", 95, *LONG, "--precision", "int8", "--vram", "8GB"),
    Job(MODEL_TEXT, (*SYNTHETIC, "{model}-text", "--precision", "fp8", "--text-precision", "bf16"), 110),
    Job(
        "text-bf16",
        (*PYTHON, "solostep.benchmarks.whole_pipeline", "run", "{model}-text", "--vram", "8GB", "--frames", "17",
         "--latents-only", "-o", "{out}/text-h200.jsonl"),
        60, (MODEL_TEXT,),
    ),
    Job(MODEL_TI2V, (*SYNTHETIC, "{model}-ti2v", "--image-to-video"), 65),
    # With the first frame encoded, at that model's own length.
    speed_job(
        "image-to-video", 110, "--frames", "102", "--precision", "int8", "--vram", "24GB,8GB", needs=(MODEL_TI2V,)
    ),
    # What streaming costs: beside the least computation of this size, beside the most, and where copies take longer by
    # the plan (0.40 s a step for 0.14).
    whole_job("whole-17", 80, ("80GB", "8GB"), "--frames", "17", *MORE),
    whole_job("whole-51", 80, ("80GB", "48GB", "12GB", "8GB"), "--frames", "51", *LATENTS),
    whole_job("whole-204", 420, ("80GB", "48GB", "24GB", "16GB", "12GB", "8GB", "6GB"), *LONG, *LATENTS),
    whole_job(
        "whole-small", 60, ("80GB", "8GB"), "--frames", "17", "--height", "272", "--width", "496", *MORE,
        to="whole-small-h200",
    ),
    speed_job("bf16", 130, *LONG, "--precision", "bf16", "--vram", "80GB"),
    Job("block", (*WIDTH, "block", "--repeats", "3", "-o", "{out}/block-h200.jsonl"), 120),
    drift_job("drift-51", 350, "--frames", "51", "--times", "2"),
    Job("folds", (*PYTHON, "solostep.benchmarks.fp8_sums", "--card", "-o", "{out}/folds-h200.jsonl"), 90),
    Job("demo-fast", (*DEMO, "--precision", "int8", "--attention", "int8-fp8"), 90, ("demo",), resumes=True),
    kernels_job(5_007, 110),
    kernels_job(18_972, 145),
    *vae_jobs(),
    tests_of("tests", 180, "tests", processes=8),
)  # fmt: skip
"""In the order in which they are begun, what most depends on first."""


class Recording:
    """One run through a list of measurements."""

    def __init__(self, jobs: Sequence[Job], out: Path, model: Path, seconds: float | None = None) -> None:
        self.jobs, self.out, self.model = list(jobs), out, model
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.known = {job.name for job in jobs}
        self.done = {job.name for job in jobs if self._is_there(job)}
        self.waiting = [job for job in jobs if job.name not in self.done]
        self.failed: set[str] = set()
        self.running: dict[str, subprocess.Popen[bytes] | None] = {}
        self.changed = threading.Condition()
        self.stopped = False

    def run(self, cards: Sequence[str]) -> bool:
        """Works through the list with one thread for each card; whether everything is there now."""
        for folder in ("logs", "done"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        threads = [threading.Thread(target=self._work, args=(card,), daemon=True) for card in cards]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        except KeyboardInterrupt:
            self._stop()
            raise
        return self.known <= self.done

    def _work(self, card: str) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            self._say(f"{job.name} begins on card {card}, about {duration(job.seconds)}")
            why = self._measure(job, card)
            took = time.monotonic() - start
            with self.changed:
                self.running.pop(job.name)
                if why is None:
                    self.done.add(job.name)
                    with replacing(self._mark(job)) as part:
                        part.write_text(f"{took:.0f} s\n")
                else:
                    self.failed.add(job.name)
                self.changed.notify_all()
            self._say(f"{job.name} {'ended well' if why is None else why} after {duration(took)}")

    def _next(self) -> Job | None:
        """The first measurement that may begin; waits while one that runs may let others begin."""
        with self.changed:
            while not self.stopped:
                for job in self.waiting:
                    if all(n in self.done or n not in self.known for n in job.needs) and self._in_time(job):
                        self.waiting.remove(job)
                        self.running[job.name] = None
                        return job
                blocked = [job for job in self.waiting if set(job.needs) & set(self.running) and self._in_time(job)]
                if not blocked:
                    return None
                self.changed.wait(1)
            return None

    def _in_time(self, job: Job) -> bool:
        return (LEAST if job.resumes else job.seconds) <= self._left()

    def _left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    def _measure(self, job: Job, card: str) -> str | None:
        """Runs the command; None where it ended well, else what happened."""
        command = [part.format(out=self.out, model=self.model) for part in job.command]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": card, "PYTHONUNBUFFERED": "1"}
        with (self.out / "logs" / f"{job.name}.txt").open("ab") as log:
            log.write((" ".join(command) + "\n").encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
                )
            except OSError as error:
                return f"could not be started: {error}"
            with self.changed:
                self.running[job.name] = process
            try:
                limit = min(job.limit, self._left())
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                _end(process)
                return "was cut: the time is over" if limit < job.limit else "was stopped at its limit of time"
        return None if code == 0 else f"failed (exit code {code}, see logs/{job.name}.txt)"

    def _stop(self) -> None:
        with self.changed:
            self.stopped = True
            running = [process for process in self.running.values() if process is not None]
            self.changed.notify_all()
        for process in running:
            _end(process)

    def _is_there(self, job: Job) -> bool:
        """A model is there or not, whatever a mark says that came from another machine."""
        if job.name in (MODEL, MODEL_FP8, MODEL_TEXT, MODEL_TI2V):
            return self.model.with_name(self.model.name + job.name.removeprefix(MODEL)).is_dir()
        return self._mark(job).exists()

    def _mark(self, job: Job) -> Path:
        return self.out / "done" / job.name

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, which lets a command keep what it has."""
    for kind, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def chosen(only: Sequence[str], jobs: Sequence[Job] = JOBS) -> list[Job]:
    """The measurements of these names, all where none are given.

    Raises:
        UsageError: there is no such one.
    """
    known = {job.name: job for job in jobs}
    wanted = list(only)
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"--only {unknown[0]}: there is no such measurement; there are {', '.join(known)}.")
    for name in wanted:  # what they need comes with them
        wanted += [need for need in known[name].needs if need not in wanted]
    return [job for job in jobs if not only or job.name in wanted]


def cards_here(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The cards to measure on, as CUDA_VISIBLE_DEVICES names them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m solostep.benchmarks.record", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, help="the folder that takes results, logs and marks")
    parser.add_argument(
        "--model", type=Path, help="the model of drawn weights, 80 GB; made where it is not (default: OUT/model)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these measurements, of --list")
    parser.add_argument("--seconds", type=float, help="end after so many, in a state to go on from")
    parser.add_argument("--list", action="store_true", help="say what would be measured, and do nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parse_args(argv)
    try:
        jobs, out = chosen(args.only), args.out.resolve()
        model = (args.model or out / "model").resolve()
        recording = Recording(jobs, out, model, args.seconds)
        if args.list:
            for job in jobs:
                state = "there" if job.name in recording.done else duration(job.seconds)
                print(f"{job.name:16} {state:>8}  {' '.join(job.command).format(out=out, model=model)}")
            return 0
        if not (cards := cards_here()):
            raise UsageError("There is no CUDA card here to measure on.")
        with terminated_like_interrupted():
            whole = recording.run(cards)
        for job in recording.waiting:
            print(f"{job.name} did not begin: what it needs failed, or the time that is left would not do")
        return 0 if whole else 1
    except SolostepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
