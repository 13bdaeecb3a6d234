"""One measured cell is one JSON file: reading, checking and writing it.

What a file holds is said at :class:`Result`; all numbers are finite (an infinite PSNR is null, and NaN is an error that
is refused on both ways). Errors are relative L2 distances |a - b| / |b| to the reference run. A file is written to a
temporary name and renamed, so that what has its name is whole, and none takes the place of another measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import escape
from pathlib import Path
from typing import Any, NoReturn

from solostep.engine.errors import OutputError, UsageError
from solostep.engine.files import replacing

VERSION = 1
MARK = "solostep_bench"
"""The key by which such a file is known; its value is :data:`VERSION`."""
FAILED = ".failed.json"
"""Behind the name of a cell that failed: why it did. No result, and passed over when a folder is read."""
ASIDE = ("cache", "passes", "logs", "done")
"""Folders below those of results that hold none: parts of measurements, outputs and marks."""
ROLES = ("reference", "floor-backend", "floor-order", "mode", "other-seed")
"""The BF16 reference run in the official numerics; two equal computations in another order, between which and the
reference lies the noise; a mode that is judged; and the reference with other seeds, which is as far as two good videos
of one prompt are apart."""
LEVELS = ("speed", "blocks", "teacher", "free", "video", "score")
VIDEO = ("psnr", "psnr_video", "ssim", "vmaf", "xpsnr", "lpips", "flicker", "motion")
UNSTEADY = ("clocks", "command", "date", "commit", "host_memory_bytes")
"""Keys of an environment that differ from one run to the next of the same measurement on the same machine. A commit may
change a text; the code that numbers come from is part of a cell's id. Some virtual machines are given more memory while
they use it."""
PLACES = ("CUDA_VISIBLE_DEVICES",)
"""Variables that say where something is, and not how it computes, like those whose value is a path."""
PATH = ".../"
"""How a path begins in a recorded variable: nobody needs to know the folders of a machine."""


@dataclass(frozen=True)
class Cell:
    """What is run: one way to compute, one clip size, its prompts and seeds (every prompt with every seed)."""

    model: str
    precision: str
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    time_shift: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    text_precision: str | None = None
    attention: str | None = None
    attention_backend: str | None = None
    recipe: str | None = None
    vram: str | None = None
    host_ram: str | None = None
    role: str = "mode"
    levels: tuple[str, ...] = LEVELS

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """From JSON's types, already checked."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Every prompt with every seed, in the order of all that is kept pair by pair."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def clip(self) -> str:
        return f"{self.num_frames} x {self.height}x{self.width}, {self.num_inference_steps} steps"


@dataclass(frozen=True)
class Result:
    """One measured cell.

    Attributes:
        id: 16 hexadecimal digits of the cell, the model's weights and the code (:func:`solostep.benchmarks.matrix`).
        label: the mode in a few words.
        environment: card, driver, clocks, processor, versions, variables, commit, command, date (environment.py).
        seconds: of the whole cell, or of the process that finished it, if it was interrupted.
        speed: ``step_seconds``, ``first_step_seconds``, seconds of ``stages``, ``video_seconds``, ``frames_written``,
            and ``end_to_end`` for a number of steps: seconds, and whether they are extrapolated; ``clocks`` of the card
            while steps were computed; of a run that was interrupted and went on, ``resumed``: the steps each process
            made, and beside it the first step and the loading of the later ones, and ``processes``: of each its steps,
            peaks, date, commit, driver and attention back end (cell_speed.py).
        memory: ``gpu_peak_bytes``, ``driver_peak_bytes``, ``host_peak_bytes``, and ``stages`` beside the plan.
        pairs: prompt and seed of everything that is kept for each pair.
        drift: None for the reference; else ``blocks``, ``operators``, ``teacher``, ``free`` and ``video``, those of the
            levels that were measured.
        score: hits and tries of the demo model's prompt following by aspect; ``pairs``: whether each pair's video is
            one, by aspect.
        frames: the file beside this one that holds a few frames, and which they are; the pair that is furthest off.
        synthetic: the generator of weights that nobody trained, or False.
        weights: 12 hexadecimal digits of the model's weights, whatever its folder is called; None in older results.
        path: where it was read from.
    """

    id: str
    cell: Cell
    label: str
    environment: dict[str, Any]
    seconds: float
    speed: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    events: list[str] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    drift: dict[str, Any] | None = None
    score: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None
    synthetic: dict[str, Any] | bool = False
    weights: str | None = None
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: Path | None = None) -> Result:
        """From JSON's types.

        Raises:
            UsageError: a key is missing or wrong; the message names file and key.
        """
        check(values, path or "the result")
        known = {f.name for f in fields(cls)} - {"path", "cell"}
        return cls(
            cell=Cell.from_dict(values["cell"]), path=path, **{k: v for k, v in values.items() if k in known}
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types, as it is written."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        if self.weights is None:  # as older files have it
            del own["weights"]
        return {MARK: VERSION} | own | {"cell": self.cell.as_dict()}

    @property
    def role(self) -> str:
        return self.cell.role


def environment_key(environment: Mapping[str, Any]) -> str:
    """Equal for two runs on one machine, with one set of versions and of variables that say how to compute."""
    steady = {k: v for k, v in environment.items() if k not in UNSTEADY}
    variables = environment.get("variables") or {}
    steady["variables"] = {k: v for k, v in variables.items() if k not in PLACES and PATH not in str(v)}
    return hashlib.sha256(json.dumps(steady, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --- what a file has to hold --------------------------------------------------------------------------------------

Checker = Callable[[Any, str], None]


class _Wrong(Exception):
    """A key and what is wrong with it."""


def _wrong(key: str, meant: str, value: Any) -> NoReturn:
    shown = repr(value)
    raise _Wrong(f"{key} has to be {meant}, not {shown if len(shown) < 60 else shown[:57] + '...'}")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plainly(meant: str, test: Callable[[Any], bool]) -> Checker:
    def checked(value: Any, key: str) -> None:
        if not test(value):
            _wrong(key, meant, value)

    return checked


number = _plainly("a finite number", _finite)
text = _plainly("text", lambda v: isinstance(v, str))
filled = _plainly("text that is not empty", lambda v: isinstance(v, str) and bool(v.strip()))
flag = _plainly("true or false", lambda v: isinstance(v, bool))
whole = _plainly("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))
count = _plainly("a whole number above 0", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0)
positive = _plainly("a number of at least 0", lambda v: _finite(v) and v >= 0)
anything = _plainly("anything", lambda v: True)


def _or_null(inner: Checker) -> Checker:
    def checked(value: Any, key: str) -> None:
        if value is not None:
            inner(value, key)

    return checked


def _one_of(*names: str) -> Checker:
    return _plainly(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def _list(inner: Checker, least: int = 0) -> Checker:
    def checked(value: Any, key: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            _wrong(key, "a list" if not least else f"a list of at least {least}", value)
        for i, each in enumerate(value):
            inner(each, f"{key}[{i}]")

    return checked


def _map(inner: Checker) -> Checker:
    def checked(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            _wrong(key, "an object", value)
        for name, each in value.items():
            inner(each, f"{key}.{name}")

    return checked


def _object(required: Mapping[str, Checker], optional: Mapping[str, Checker] | None = None) -> Checker:
    """An object with these keys; others are let pass, for what later versions add."""

    def checked(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            _wrong(key, "an object", value)
        inside = f"{key}." if key else ""
        for name, inner in required.items():
            if name not in value:
                raise _Wrong(f"{inside}{name} is missing")
            inner(value[name], inside + name)
        for name, inner in (optional or {}).items():
            if name in value:
                inner(value[name], inside + name)

    return checked


_rows = _list(_list(positive))
_hits = _plainly(
    "[hits, tries]", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_finite, v)) and 0 <= v[0] <= v[1]
)


def _score(value: Any, key: str) -> None:
    _map(anything)(value, key)
    _map(_hits)({k: v for k, v in value.items() if k != "pairs"}, key)
    _map(_list(flag))(value.get("pairs", {}), f"{key}.pairs")


CELL = _object(
    {
        "model": filled, "precision": filled, "num_frames": count, "height": count, "width": count,
        "num_inference_steps": count, "guidance_scale": positive, "time_shift": positive,
        "prompts": _list(text, 1), "seeds": _list(whole, 1), "role": _one_of(*ROLES),
        "levels": _list(_one_of(*LEVELS)),
    },
    {k: _or_null(filled) for k in
     ("text_precision", "attention", "attention_backend", "recipe", "vram", "host_ram")},
)  # fmt: skip
SPEED = _object(
    {
        "step_seconds": _list(positive), "first_step_seconds": _or_null(positive), "stages": _map(positive),
        "video_seconds": positive, "frames_written": whole,
        "end_to_end": _map(_object({"seconds": positive, "extrapolated": flag})),
    },
    {
        "resumed": _list(whole, 2), "resumed_first_step_seconds": _list(positive), "resumed_load_seconds": positive,
        "processes": _list(_object({"steps": whole}), 2),
        "clocks": _or_null(_map(_or_null(number))),
    },
)  # fmt: skip
MEMORY = _object(
    {"gpu_peak_bytes": _or_null(positive), "host_peak_bytes": _or_null(positive), "stages": _list(_map(anything))},
    {"driver_peak_bytes": _or_null(positive)},
)
DRIFT = _object(
    {},
    {
        "blocks": _or_null(_object({"names": _list(text), "error": _rows, "samples": _list(_map(anything))})),
        "operators": _or_null(_map(_rows)),
        "teacher": _or_null(
            _object({"sigmas": _list(number), "error": _rows}, {"cosine": _list(_list(_or_null(number)))})
        ),
        "free": _or_null(_object({"sigmas": _list(number), "error": _rows}, {"diverged_at": _list(_or_null(whole))})),
        "video": _or_null(_object({}, {name: _or_null(_list(_or_null(number))) for name in VIDEO})),
    },
)
RESULT = _object(
    {
        "id": _plainly("16 hexadecimal digits", lambda v: isinstance(v, str) and bool(re.fullmatch("[0-9a-f]{16}", v))),
        "cell": CELL, "label": filled, "environment": _map(anything), "seconds": positive,
    },
    {
        "synthetic": _plainly("false or an object", lambda v: v is False or isinstance(v, dict)),
        "weights": _or_null(filled),
        "speed": _or_null(SPEED), "memory": _or_null(MEMORY), "plan": _or_null(_map(anything)), "events": _list(text),
        "pairs": _list(_object({"prompt": text, "seed": whole})), "drift": _or_null(DRIFT),
        "score": _or_null(_score),
        "frames": _or_null(_object({"file": filled}, {"index": anything, "worst": whole})),
    },
)  # fmt: skip


def _check_lengths(values: Mapping[str, Any]) -> None:
    """That what is kept for each pair, step, block or sample is there for each of them."""
    pairs = len(values.get("pairs", []))
    drift = {k: v for k, v in (values.get("drift") or {}).items() if v is not None}

    def same(key: str, found: Sequence[Any], wanted: int, of: str) -> None:
        if len(found) != wanted:
            raise _Wrong(f"drift.{key} has {len(found)} entries and has to have {wanted}, one for each {of}")

    for level in ("teacher", "free"):
        if level in drift:
            for name in ("error", "cosine", "diverged_at"):
                same(f"{level}.{name}", drift[level].get(name, range(pairs)), pairs, "pair")
            for i, row in enumerate(drift[level]["error"]):
                same(f"{level}.error[{i}]", row, len(drift[level]["sigmas"]), "sigma")
    for name in VIDEO:
        found = drift.get("video", {}).get(name)
        if found is not None:
            same(f"video.{name}", found, pairs, "pair")
    for name, found in ((values.get("score") or {}).get("pairs") or {}).items():
        if len(found) != pairs:
            raise _Wrong(f"score.pairs.{name} has {len(found)} entries and has to have {pairs}, one for each pair")
    blocks = drift.get("blocks")
    if blocks is not None:
        rows = {"blocks.error": blocks["error"]}
        rows |= {f"operators.{name}": found for name, found in drift.get("operators", {}).items()}
        for key, found in rows.items():
            same(key, found, len(blocks["names"]), "block")
            for i, row in enumerate(found):
                same(f"{key}[{i}]", row, len(blocks["samples"]), "sample")


def _not_finite(value: Any, key: str = "") -> str | None:
    """The key of the first number that is infinite or NaN."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, each in inside:
        found = _not_finite(each, f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}".lstrip("."))
        if found is not None:
            return found
    return None


def check(values: Any, where: Path | str) -> None:
    """Holds a result, in JSON's types, against the format.

    Raises:
        UsageError: what is wrong, with file and key.
    """
    try:
        if not isinstance(values, Mapping) or MARK not in values:
            raise _Wrong(f"the key {MARK} is missing: it is no result of `solostep bench`")
        if values[MARK] != VERSION:
            raise _Wrong(
                f"{MARK} is {values[MARK]!r}, and this version reads {VERSION}; use the solostep that wrote it"
            )
        bad = _not_finite(values)
        if bad is not None:
            raise _Wrong(f"{bad} is NaN or infinite; a measurement that went wrong is no result")
        RESULT(values, "")
        _check_lengths(values)
    except _Wrong as wrong:
        raise UsageError(f"{where}: {wrong}.") from None


# --- files --------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def read_json(path: Path) -> Any:
    """Raises UsageError for what cannot be read, is no JSON, or holds NaN or an infinity."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give another file.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON ({error}); give a result of `solostep bench`.") from None


def read_result(path: str | Path) -> Result:
    """One result.

    Raises:
        UsageError: it is no result, or damaged; the message names file and key.
    """
    path = Path(path)
    return Result.from_dict(read_json(path), path)


def result_files(places: Iterable[str | Path]) -> list[Path]:
    """The results among files and in folders and all below them, each once. A folder's other JSON files are passed
    over, a file is not.

    Raises:
        UsageError: a place is not there, or a folder without any result.
    """
    files: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            if not place.exists():
                raise UsageError(f"{place} is not there; give results of `solostep bench`, or the folder of them.")
            files.append(place)
            continue
        found = results_below(place)
        if not found:
            raise UsageError(f"{place} holds no result; `solostep bench -o {place}` makes some.")
        files += found
    return list(dict.fromkeys(files))


def results_below(place: Path) -> list[Path]:
    """The results in a folder and below it; none where there is none, or no folder."""
    return [path for path in _json_below(place) if _is_result(path)]


def _json_below(place: Path) -> Iterator[Path]:
    """The JSON files of a folder, then those of the folders below it, by name. Nothing whose name begins with a dot, no
    folder of :data:`ASIDE`, and no link to a folder, which might lead back."""
    for folder, names, files in os.walk(place):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in ASIDE)
        yield from (Path(folder, f) for f in sorted(files) if f.endswith(".json") and not f.startswith("."))


def _is_result(path: Path) -> bool:
    """Whether a file says that it is a result; a damaged one that says so in its text is."""
    if path.name.endswith(FAILED):
        return False
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with path.open(encoding="utf-8") as stream:
            return f'"{MARK}"' in stream.read(4096)
    return False


def read_results(places: Iterable[str | Path]) -> list[Result]:
    """All results of files and of folders and all below them; a measurement that is there in several copies, once.

    Raises:
        UsageError: as :func:`read_result` and :func:`result_files`; two files that hold one measurement are not equal.
    """
    places = list(map(Path, places))
    found: dict[tuple[str, str], Result] = {}
    for path in result_files(places):
        try:
            result = read_result(path)
        except UsageError as error:
            if path in places:  # asked for by name
                raise
            raise UsageError(
                f"{path} is no result that can be read; delete it or move it elsewhere. What is wrong: {error}"
            ) from None
        first = found.setdefault((result.id, environment_key(result.environment)), result)
        if first != result:
            raise UsageError(
                f"{first.path} and {path} hold the same measurement, {result.id}, with other numbers; delete one of "
                "them or move it elsewhere."
            )
    return list(found.values())


def failed_in(places: Iterable[str | Path], results: Sequence[Result] = ()) -> list[str]:
    """A line for each cell of these folders that failed, and that is not among the results: which, and why."""
    lines, there = [], [result.cell.as_dict() for result in results]
    folders = [place for place in map(Path, places) if place.is_dir()]
    for path in dict.fromkeys(p for place in folders for p in _json_below(place) if p.name.endswith(FAILED)):
        with contextlib.suppress(UsageError):
            told = read_json(path)
            if isinstance(told, dict) and {"label", "error"} <= set(told) and told.get("cell") not in there:
                lines.append(f"{told['label']} failed: {told['error']} ({path.name})")
    return lines


def write_json(path: Path, values: Any) -> None:
    """Writes to a temporary name first.

    Raises:
        OutputError: it could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            json.dump(values, stream, ensure_ascii=False, indent=1, allow_nan=False)
            stream.write("\n")
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); choose another -o.") from None


def free_place(path: Path, result: Result, overwrite: bool = False) -> Path:
    """Where a result goes: its own name, or where a file of another cell or environment has that, one with a number. To
    overwrite is to take the place of this very measurement, and of no other.

    Raises:
        UsageError: the measurement is there already, and is not to be overwritten.
    """
    numbered = [p for p in path.parent.glob(f"{escape(path.stem)}-*{path.suffix}") if _number_of(p, path) is not None]
    for place in (path, *sorted(numbered, key=lambda p: _number_of(p, path) or 0)):
        if same_measurement(place, result.id, result.environment):
            if overwrite:
                return place
            raise UsageError(f"{place} holds this measurement already; --overwrite makes it anew.")
    for n in range(1, 10_000):
        place = path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}")
        if not place.exists():
            return place
    raise UsageError(f"{path.parent} holds 9,999 files called {path.stem}; choose another -o.")


def _number_of(place: Path, path: Path) -> int | None:
    """The number that sets a file's name apart from another's."""
    found = re.fullmatch(r"-(\d+)", place.stem.removeprefix(path.stem))
    return int(found[1]) if found else None


def same_measurement(path: Path, identity: str, environment: Mapping[str, Any]) -> bool:
    """Whether a file is the result of this cell in this environment, and whole."""
    try:
        there = read_result(path)
    except UsageError:
        return False
    return there.id == identity and environment_key(there.environment) == environment_key(environment)


def write_result(path: str | Path, result: Result | Mapping[str, Any], overwrite: bool = False) -> Path:
    """Writes a result that holds what it has to, and says where.

    Raises:
        UsageError: a key is missing or wrong, a number is not finite, or the measurement is there already.
        OutputError: it could not be written.
    """
    values = result.as_dict() if isinstance(result, Result) else dict(result)
    made = Result.from_dict(values, Path(path))
    place = free_place(Path(path), made, overwrite)
    write_json(place, values)
    return place
