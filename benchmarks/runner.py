"""Runs planned cells, each in a process of its own, into a folder of results: one after the other, or the references
first and then several at a time.

A process of its own: no cell sees the memory, the allocator or the compiled kernels of another, and one that
crashes takes nothing with it; where the runner itself is killed, they end as well (Linux). A result is there once it
is whole. Run again, a folder's finished cells are passed over: those of the same identity, versions and machine. One
that was stopped goes on where it was. What failed is kept beside the results and tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from solostep.benchmarks import cell_state
from solostep.benchmarks.cell_state import terminated_like_interrupted
from solostep.benchmarks.disk import bytes_to_come
from solostep.benchmarks.environment import clocks_of, environment
from solostep.benchmarks.matrix import Matrix, Planned, code_identity, weights_identity
from solostep.benchmarks.results import (
    FAILED,
    MARK,
    VERSION,
    Result,
    free_place,
    read_json,
    same_measurement,
    write_json,
    write_result,
)
from solostep.benchmarks.synthetic import marker
from solostep.engine.errors import OutputError, SolostepError, UsageError
from solostep.engine.progress import duration
from solostep.engine.units import size

CELL = (sys.executable, "-m", "solostep.benchmarks.cell")
MEASURED = ("speed", "memory", "plan", "events", "pairs", "drift", "score", "frames")
"""Keys of a result that the cell's process fills in."""
WORK = "cache"
"""Folder below that of the results: references, embeddings and what unfinished cells have done. It may be deleted
afterwards."""
GRACE = 15.0
"""Seconds that a process gets to end by itself after Ctrl-C."""
TAIL = 30
"""Last lines of a failed process's output that are kept."""


class Show(Protocol):
    """What is told while cells run."""

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: done, skipped (it was there), or failed."""

    planned: Planned
    status: str
    path: Path
    seconds: float = 0.0
    error: str = ""


class Runner:
    """One run of a matrix into a folder."""

    def __init__(
        self, matrix: Matrix, folder: Path, show: Show, overwrite: bool = False, command: Sequence[str] | None = None,
        called: str | None = None, jobs: int = 1, rates: bool | None = None, timeout: float | None = None,
    ) -> None:  # fmt: skip
        if rates and matrix.device.type != "cuda":
            raise UsageError(f"--rates measures a CUDA card, and this runs on {matrix.device}; leave it out.")
        if jobs > 1 and any("speed" in planned.cell.levels for planned in matrix.planned):
            raise UsageError(
                "--jobs: processes beside one another slow each other; leave speed out of --levels, or --jobs out."
            )
        self.matrix, self.folder, self.show, self.overwrite = matrix, folder, show, overwrite
        self.command, self.called, self.jobs = tuple(command or CELL), called, jobs
        self.rates = matrix.device.type == "cuda" if rates is None else rates
        self.timeout = timeout
        self.spent = self.worked = 0.0
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    # --- before ---------------------------------------------------------------------------------------------------

    def there(self) -> dict[str, Path]:
        """Finished cells by id: those of this machine and these versions."""
        if self.overwrite or not self.folder.is_dir():
            return {}
        now = environment(self.matrix.device, self.called)
        found = {}
        for planned in self.matrix.planned:
            for path in sorted(self.folder.glob(f"{planned.name}*.json")):
                if not path.name.endswith(FAILED) and same_measurement(path, planned.id, now):
                    found[planned.id] = path
        return found

    def unfinished(self) -> tuple[list[str], list[str]]:
        """Ids of the cells that this code goes on with, and what is to be said of those that this run does not."""
        own, other = cell_state.unfinished(self.folder / WORK, code_identity())
        place, said = self.folder / WORK / cell_state.CELLS, []
        if other:
            said.append(
                f"Unfinished cells in {place}, begun by other code, torch or triton: {len(other)}. This version cannot "
                "go on with them, and removes them when it measures a cell here. To keep them, use the version that "
                "began them, or another -o."
            )
        left = set(own) - {planned.id for planned in self.matrix.planned}
        if left:
            said.append(
                f"Unfinished cells in {place}, of other options or weights: {len(left)}. They stay as they are."
            )
        return own, said

    def check_disk(self) -> None:
        """Raises UsageError where the references would not fit the disk."""
        place = next(p for p in (self.folder, *self.folder.resolve().parents) if p.is_dir())
        there, free = self.there(), shutil.disk_usage(place).free
        left = [planned for planned in self.matrix.planned if planned.id not in there]
        needed = bytes_to_come(self.matrix, left, self.folder / WORK)
        if needed > 0.95 * free:
            raise UsageError(
                f"The reference runs take {size(needed)} more at {self.folder}, and {size(free)} are free; choose "
                "another -o, or fewer prompts, seeds or --steps."
            )

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Outcome]:
        """The outcome of each cell, as soon as it is known.

        Raises:
            UsageError: another run is busy in the folder.
            OutputError: the folder cannot be written.
        """
        with self._alone(), terminated_like_interrupted():
            there, busy = self.there(), set[Future[Outcome]]()
            waiting = [planned for planned in self.matrix.planned if planned.id not in there]
            todo, ended = sum(planned.work for planned in waiting), 0
            begun, lost = self.unfinished()
            for text in lost:
                self.show.note(text)
            with ThreadPoolExecutor(self.jobs) as pool, self._ended():
                for number, planned in enumerate(self.matrix.planned, 1):
                    head = f"[{number}/{len(self.matrix.planned)}] {planned.label}, {planned.cell.clip}"
                    if planned.id in there:
                        self.show.note(f"{head}: there already, {there[planned.id].name}")
                        yield Outcome(planned, "skipped", there[planned.id])
                        continue
                    left = self._left(todo - self.worked, len(waiting) - ended)
                    said = f"; about {left} left in all" if left else ""
                    said += "; begun before, goes on where it was" if planned.id in begun else ""
                    self.show.note(f"{head}: {planned.runs:.3g} videos{said}")
                    busy.add(pool.submit(self._cell, planned, head))
                    # Others wait for what they are compared with.
                    while busy and (len(busy) >= self.jobs or planned.cell.role == "reference"):
                        done, busy = wait(busy, return_when=FIRST_COMPLETED)
                        ended += len(done)
                        yield from self._told(done)
                while busy:
                    done, busy = wait(busy, return_when=FIRST_COMPLETED)
                    yield from self._told(done)

    def _told(self, done: set[Future[Outcome]]) -> Iterator[Outcome]:
        for future in done:
            outcome = future.result()
            self.spent, self.worked = self.spent + outcome.seconds, self.worked + outcome.planned.work
            ended = f"done in {duration(outcome.seconds)}" if outcome.status == "done" else f"failed: {outcome.error}"
            self.show.note(f"{outcome.planned.label}, {outcome.planned.cell.clip}: {ended}")
            yield outcome

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """Processes that still run when this ends by an exception, or early, are stopped."""
        try:
            yield
        finally:
            self.stopped = bool(self.processes)
            for process in list(self.processes):
                process.send_signal(signal.SIGINT)
            late = time.monotonic() + GRACE
            for process in list(self.processes):
                _wait_or_kill(process, late - time.monotonic())

    def _left(self, todo: float, cells: int) -> str:
        """How long so many cells will take, of those that run beside one another what one of them does."""
        return duration(self.spent / self.worked * todo / min(self.jobs, cells)) if self.worked else ""

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            with lock.acquire(timeout=0):
                for left in self.folder.glob(".running-*"):  # nobody else runs here
                    shutil.rmtree(left, ignore_errors=True)
                yield
        except Timeout:
            raise UsageError(f"Another `solostep bench` is running in {self.folder}; choose another -o.") from None
        except FileExistsError:
            raise UsageError(f"-o {self.folder} is a file; give the name of a folder.") from None
        except PermissionError as error:
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}); choose another -o.") from None

    def _cell(self, planned: Planned, head: str) -> Outcome:
        start = time.monotonic()
        failed = self.folder / f"{planned.name}{FAILED}"
        with tempfile.TemporaryDirectory(prefix=".running-", dir=self.folder) as scratch:
            spec, out = Path(scratch) / "spec.json", Path(scratch) / "result.json"
            write_json(spec, spec_of(planned, str(self.matrix.device), self.rates))
            lines: list[str] = []
            call = [*self.command, str(spec), str(out), "--work", str(self.folder / WORK), "--parent", str(os.getpid())]
            code, late = self._watched(call, lines, lambda line: self.show.status(f"{head}: {line}"))
            seconds = time.monotonic() - start
            if self.stopped:  # not a failure of the cell
                raise KeyboardInterrupt
            here = environment(self.matrix.device, self.called)
            try:
                if late and code:
                    raise SolostepError(
                        f"it took longer than --cell-timeout ({duration(self.timeout or 0)}) and was stopped; the same "
                        "command goes on with it where it was"
                    )
                if code < 0:
                    last = f"; its last words: {lines[-1]}" if lines else ""
                    raise SolostepError(f"the process was ended by signal {-code}, and may go on where it was{last}")
                if code:
                    raise SolostepError(lines[-1] if lines else f"the process ended with {code} and said nothing")
                path = self._keep(planned, out, here, seconds)
            except SolostepError as error:
                about = {"cell": planned.cell.as_dict(), "id": planned.id, "label": planned.label, "environment": here}
                write_json(failed, about | {"seconds": seconds, "exit_code": code, "error": str(error),
                                            "output": lines[-TAIL:]})  # fmt: skip
                return Outcome(planned, "failed", failed, seconds, str(error))
        failed.unlink(missing_ok=True)
        cell_state.remove(self.folder / WORK, planned.id)
        return Outcome(planned, "done", path, seconds)

    def _watched(self, call: Sequence[str], lines: list[str], said: Callable[[str], None]) -> tuple[int, bool]:
        """Runs a process, collects its output and tells each line; its exit code, and whether its time was up."""
        late = threading.Event()
        with subprocess.Popen(
            call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", bufsize=1, env=self._environment(),
        ) as process:  # fmt: skip
            self.processes.add(process)

            def stop() -> None:
                late.set()
                process.send_signal(signal.SIGINT)
                _wait_or_kill(process, GRACE)

            timer = None if self.timeout is None else threading.Timer(self.timeout, stop)
            try:
                if timer is not None:
                    timer.start()
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip():
                        lines.append(line.rstrip())
                        said(lines[-1])
                        del lines[: -10 * TAIL]
                return process.wait(), late.is_set()
            finally:
                if timer is not None:
                    timer.cancel()
                self.processes.discard(process)

    def _environment(self) -> dict[str, str] | None:
        """Of processes beside one another, each takes its part of the cores: torch would take all of them in each."""
        if self.jobs == 1:
            return None
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        return {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)

    def _keep(self, planned: Planned, out: Path, here: dict[str, Any], seconds: float) -> Path:
        """Puts what a process measured in its place, checked."""
        measured = read_json(out)
        if not isinstance(measured, dict):
            raise SolostepError(f"{out.name} of the cell is no object")
        here = clocks_of(here, (measured.get("speed") or {}).get("clocks"))
        values = {
            MARK: VERSION, "id": planned.id, "label": planned.label, "cell": planned.cell.as_dict(),
            "synthetic": marker(self.matrix.folder.root), "weights": weights_identity(self.matrix.folder),
            "environment": here, "seconds": round(seconds, 3),
            **{k: measured[k] for k in MEASURED if k in measured},
        }  # fmt: skip
        result = Result.from_dict(values, out)
        place = free_place(self.folder / f"{planned.name}.json", result, self.overwrite)
        if result.frames is not None:
            frames = out.parent / result.frames["file"]
            if not frames.is_file():
                raise SolostepError(f"the frames {frames.name} are missing")
            frames.replace(place.with_suffix(".frames.npz"))
            values["frames"] = result.frames | {"file": place.with_suffix(".frames.npz").name}
        return write_result(place, values, overwrite=self.overwrite)


def spec_of(planned: Planned, device: str, rates: bool = False) -> dict[str, Any]:
    """What the cell's process is told. A recipe takes the place of a precision."""
    cell = planned.cell.as_dict() | {"device": device}
    if planned.cell.recipe is not None:
        cell["precision"] = None
    return {"cell": cell, "id": planned.id, "state": planned.id, "rates": rates}


def _wait_or_kill(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()


def as_json(outcomes: Sequence[Outcome]) -> str:
    """For --json: one object a cell."""
    rows = [
        {"id": o.planned.id, "label": o.planned.label, "status": o.status, "file": str(o.path),
         "seconds": round(o.seconds, 1)} | ({"error": o.error} if o.error else {})
        for o in outcomes
    ]  # fmt: skip
    return json.dumps(rows, ensure_ascii=False, indent=1)
