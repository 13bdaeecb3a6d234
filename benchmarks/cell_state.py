"""What a cell has done already, on disk: one that is interrupted goes on where it was.

    cells/NAME/about.json          what it is of; another cell, code, device or set of weights begins anew
               speed.json ...      a finished part: the timed run, a pair of a level of drift, the blocks
               speed/ free-0/ ...  a run in progress: its latents, and what was measured of its steps

A process of the same cell reads what is finished and goes on with the run. Whoever has put the result in its place
removes the folder. Disk: at most one recording (1.4 GB for 50 steps of 204 frames at 544x992) and small files.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from solostep.benchmarks.reference import CODE, held, sweep
from solostep.benchmarks.results import read_json, write_json
from solostep.engine.errors import OutputError, SolostepError, UsageError

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""
PR_SET_PDEATHSIG = 1
"""Of Linux: the signal for a process whose parent ends."""
CELLS = "cells"
"""Folder below that of work."""
ANEW = "began-anew"
"""Kept until the cell is done, for its result."""


class State:
    """The folder of one cell. ``began_anew``: what differed in what an earlier process had done, which was removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def began_anew(self) -> list[str]:
        return self.there(ANEW) or []

    def there(self, name: str) -> Any:
        """A finished part; None if it is not."""
        with contextlib.suppress(UsageError):
            return read_json(self.folder / f"{name}.json")
        return None

    def put(self, name: str, value: Any) -> Any:
        """Keeps a part that is finished, and gives it in JSON's types."""
        value = plain(value, name)
        write_json(self.folder / f"{name}.json", value)
        return value

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A part: what an earlier process made of it, else what ``make`` makes now. Its folder is gone then."""
        found = self.there(name)
        if found is None:
            found = self.put(name, make())
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return found

    def place(self, name: str) -> Path:
        """A folder for a part in progress."""
        try:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}); give another --work.") from error
        return self.folder / name


@contextlib.contextmanager
def opened(work: Path, name: str, identity: Mapping[str, Any]) -> Iterator[State]:
    """The state of a cell, for this process alone; ``identity["code"]`` is the code that can go on with it.

    Raises:
        UsageError: another process measures the cell.
        OutputError: it cannot be written.
    """
    from filelock import Timeout

    state = State(work / CELLS / name)
    sweep(work / CELLS, "*", identity["code"])
    try:
        with held(state.folder, wait=False):
            about, own = state.there("about"), plain(identity)
            if about != own:
                was = about if isinstance(about, dict) else {}
                differing = [name for name in own if was and was.get(name) != own[name]]
                shutil.rmtree(state.folder, ignore_errors=True)
                state.put("about", identity)
                if differing:
                    state.put(ANEW, differing)
                (state.folder / CODE).write_text(identity["code"], encoding="utf-8")
            yield state
    except Timeout:
        raise UsageError(f"Another process is measuring this cell in {work}; wait for it, or end it.") from None


def unfinished(work: Path, code: str) -> tuple[list[str], list[str]]:
    """Names of the cells that were begun in a folder of work: those that this code goes on with, and those of other
    code, which are removed as soon as a cell is measured there."""
    own, other = [], []
    for file in sorted((work / CELLS).glob(f"*/{CODE}")):
        with contextlib.suppress(OSError):
            (own if file.read_text(encoding="utf-8") == code else other).append(file.parent.name)
    return own, other


def remove(work: Path, name: str) -> None:
    """Removes the state of a cell whose result is in its place."""
    shutil.rmtree(work / CELLS / name, ignore_errors=True)


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, as of a batch system, ends a run like Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ends_with(parent: int) -> None:
    """Has this process get SIGTERM when ``parent``, the process that started it, ends in whatever way: killed, that can
    stop nobody, and a cell that goes on would hold the card. On Linux; elsewhere this does nothing. There it is the end
    of the thread that started it, which has to wait for it.

    Raises:
        SystemExit: the parent has ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
    if os.getppid() != parent:
        sys.exit(INTERRUPTED)


def plain(value: Any, where: str = "") -> Any:
    """In JSON's types.

    Raises:
        SolostepError: a number that is not finite; it is named.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (np.floating, np.integer)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise SolostepError(f"{where} is {value}: the result cannot be used.")
    return value
