"""Measures one cell of the benchmark in one process: a mode's speed and memory, and its drift from the reference.

    python -m solostep.benchmarks.cell SPEC.json OUT.json --work DIR

The cell says the model, the mode, the clip, prompts x seeds, a role and the levels that are wanted. Everything goes
through the pipeline that a user calls. What it costs, beside the references (one run a pair, kept in DIR and found
again by every other mode): ``speed`` the run of the first pair, with cold text encoders and loading in it; ``free``,
``video`` and ``score`` a run for each other pair; ``teacher`` a run for each pair, not decoded; ``blocks`` half a step
for each sample. Disk: a reference for each pair, see reference.py. One that is stopped goes on where it was, see
cell_state.py: in the step of the run that it was at.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solostep.benchmarks import cell_state, drift, floors
from solostep.benchmarks.cell_card import Card
from solostep.benchmarks.cell_frames import put_together, write_frames
from solostep.benchmarks.cell_spec import WRITING, Cell, read_spec
from solostep.benchmarks.cell_speed import driver_before, timed_run
from solostep.benchmarks.cell_state import INTERRUPTED, State, ends_with, plain, terminated_like_interrupted
from solostep.benchmarks.cell_video import Compared, by_metric
from solostep.benchmarks.matrix import code_identity
from solostep.benchmarks.reference import Recorder, Recording, References, device_kind, record_run
from solostep.benchmarks.reference_code import official_code
from solostep.engine.activations import drawn_image
from solostep.engine.checkpoint import open_model
from solostep.engine.config import cache_dir
from solostep.engine.demo.captions import Attributes, asked_by_captions
from solostep.engine.demo.rules import ASPECTS, Reading, read_clips
from solostep.engine.errors import OutputError, SolostepError, UsageError
from solostep.engine.failures import readable_errors
from solostep.engine.files import replacing
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.precision import OFFICIAL
from solostep.engine.progress import Progress
from solostep.engine.request import Request, filled_in
from solostep.engine.runtime import numerics, pick_device
from solostep.engine.text import encode_prompts
from solostep.quant.four_bit import expanded_by_torch

Say = Callable[[str, int, int], None]
FREE = {"made as": "a free run"}
"""Identity of a recording in the state of a cell: all that it depends on is that of the state."""


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(spec: dict[str, Any], work: Path, say: Say, keep: bool = False) -> dict[str, Any]:
    """Measures a cell and gives the measured keys of a result; what is not asked for is None.

    Args:
        spec: ``{"cell": {...}}``, and perhaps ``"id"``, by which the file of frames is named; ``"frames_dir"``, where
            it goes (by default ``work``); ``"write"``, how the timed video is written: mp4, or only counted;
            ``"rates"``, whether a card's rates are measured first, so that plans hold seconds (by default they are);
            ``"state"``, the name under which the cell keeps what it has done.
        work: where references and prompt embeddings are kept.
        say: gets (what, done, total).
        keep: leave what it has done there, for a caller who removes it when the result has its place.

    Raises:
        UsageError: a wrong specification, before anything is run; another process measures this cell.
        SolostepError: it cannot be measured here; the message says why.
    """
    before = driver_before()
    cell = Cell.read(spec)
    if spec.get("write", WRITING[0]) not in WRITING:
        raise UsageError(f"write has to be one of {', '.join(WRITING)}, not {spec['write']!r}.")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work} cannot be written ({error.strerror}); give another --work.") from error
    measurement = Measurement(cell, work, say)
    with cell_state.opened(work, state_name(spec), measurement.identity(spec)) as state:
        if state.began_anew:
            measurement.notes.append(
                f"It began anew: what an earlier process had done of it was of other {' and '.join(state.began_anew)}."
            )
        result = plain(measurement.run(spec, before, state))
        if not keep:
            cell_state.remove(work, state_name(spec))
    return result


def state_name(spec: Mapping[str, Any]) -> str:
    """Under which a cell keeps what it has done."""
    return spec.get("state") or _hash_of(spec["cell"])


def _hash_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Measurement:
    """The run of one cell. Networks stay loaded between the videos of a mode."""

    state: State

    def __init__(self, cell: Cell, work: Path, say: Say) -> None:
        self.cell, self.work, self.say = cell, work, say
        self.folder = open_model(cell.model)
        self._check_stored()
        preset, given = self.folder.preset, {k: v for k, v in cell.settings.items() if v is not None}
        self.settings = filled_in(preset, given, self.folder.is_image_to_video)
        self.notes: list[str] = []
        self.change: floors.Change | None = None
        self.floor_attention: str | None = None
        self.official = self._official()
        self.pipe = self.official if cell.role in ("reference", "other-seed") else self._mode()
        if "attention_backend" in cell.options:
            self.pipe._attention_backend(self.settings)  # says now if it is not to be had
        self.requests = [self._request(**pair) for pair in cell.pairs]
        self.references = References(work, self.official)
        self.asked = self._attributes() if cell.wants("score") else []
        self.compared = Compared(self.settings, self.notes) if cell.wants("video") else None

    def identity(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What another process has to have in common with this one, to go on with what it has done."""
        return {
            "code": code_identity(), "write": spec.get("write", WRITING[0]),
            "cell": {k: v for k, v in spec["cell"].items() if k != "model"},  # where it lies does not matter
            "weights": {name: c.fingerprint for name, c in sorted(self.folder.components.items())},
            "recipe": self.pipe.mode.described() if self.cell.options.get("recipe") else None,
            "device": device_kind(self.pipe.device),
        }  # fmt: skip

    def _check_stored(self) -> None:
        """Raises UsageError for drift, or a role, of a model that is stored quantized."""
        stored, cell = self.folder.components["transformer"].quantization, self.cell
        if stored is None:
            return
        if cell.role != "mode":
            raise UsageError(f"{cell.model} is stored in {stored.precision}; the role {cell.role} needs bf16 weights.")
        if cell.levels != ("speed",):
            raise UsageError(
                f"{cell.model} is stored in {stored.precision}, and drift is measured against the original weights; "
                "give the original model with the precision, or the level speed alone."
            )

    # --- what is run ----------------------------------------------------------------------------------------------

    def _mode(self) -> StepVideoPipeline:
        options = dict(self.cell.options)
        stored = self.folder.components["transformer"].quantization
        if "recipe" in options or (stored is not None and options.get("precision") == stored.precision):
            options.pop("precision", None)  # it is the name of the recipe
        if self.cell.role not in ("floor-backend", "floor-order"):
            return StepVideoPipeline(self.folder, cache=False, **options)
        device, config = pick_device(options.get("device")), self.folder.transformer_config
        asked = options.get("attention_backend")
        self.change, self.floor_attention, words = floors.change_of(
            self.cell.role, asked, self.settings, config, device
        )  # fmt: skip
        self.notes += [words] if words else []
        return floors.ChangedPipeline(self.folder, cache=False, change=self.change, **floors.floor_options(options))

    def _official(self) -> StepVideoPipeline:
        """The pipeline of the reference; of a folder that is stored quantized, only what its settings are asked of."""
        stored = self.folder.components["transformer"].quantization is not None
        kept = {k: v for k, v in self.cell.options.items() if k in ("device", "vram", "host_ram")}
        return StepVideoPipeline(
            self.folder, None if stored else "bf16", attention=OFFICIAL, cache=False, **kept
        )  # fmt: skip

    @cached_property
    def _image(self) -> Tensor | None:
        """The first frame that an image-to-video model is given."""
        made = self.settings
        return drawn_image(made.height, made.width) if self.folder.is_image_to_video else None

    def _request(self, prompt: str, seed: int) -> Request:
        return self.pipe.request(prompt, image=self._image, seed=seed, **self.cell.settings)

    def _progress(self, what: str) -> Progress:
        return lambda stage, done, total: self.say(f"{what}: {stage}", done, total)

    @property
    def _embeddings(self) -> Path:
        """Those of prompts, by the code that makes them."""
        return self.work / "embeddings" / official_code()

    @contextlib.contextmanager
    def _kept(self, pipe: StepVideoPipeline) -> Iterator[StepVideoPipeline]:
        """Keeps a pipeline's networks, and the embeddings of prompts, over several videos."""
        pipe.memory.keep_loaded, pipe.cache = True, self._embeddings
        try:
            yield pipe
        finally:
            pipe.memory.keep_loaded = False
            for name in ("transformer", "vae"):
                pipe.memory.free(name)

    def run(self, spec: Mapping[str, Any], before: list[Card] | None, state: State) -> dict[str, Any]:
        cell, self.state = self.cell, state
        result: dict[str, Any] = {
            "speed": None, "memory": None, "plan": None, "events": [], "pairs": cell.pairs, "drift": None,
            "score": None, "frames": None,
        }  # fmt: skip
        if cell.wants("speed"):
            result |= self._speed(before, spec.get("write", WRITING[0]) == "mp4", bool(spec.get("rates", True)))
        if cell.levels != ("speed",):
            references = self._make_references()
            if cell.role == "reference":
                result["score"], result["frames"] = self._of_references(references, self._frames_file(spec))
            elif cell.role == "other-seed":
                result["drift"] = self._among(references)
            else:
                result["drift"], result["score"], shown = self._drift(references)
                result["frames"] = self._shown(shown or [], self._frames_file(spec))
        modes = (self.pipe.mode, self.pipe.text_mode)
        formats = [name for mode in modes if mode.recipe is not None for _, name in mode.recipe.rules]
        slow = expanded_by_torch(formats, self.pipe.device)
        result["events"] = [*result["events"], *self.notes, *([slow] if slow else [])]
        return result

    def _speed(self, before: list[Card] | None, film: bool, rates: bool) -> dict[str, Any]:
        """The first pair as a user's one video: texts encoded, networks loaded and freed again. It is recorded where
        that spares drift a second run of it."""
        request, cell, name = self.requests[0], self.cell, "speed"
        there = self.state.there(name)
        if there is not None:
            return there

        def timed(recorder: Recorder | None) -> dict[str, Any]:
            place, progress = self.state.place(name), self._progress(name)
            made = timed_run(self.pipe, request, place, recorder, before, film, progress, rates)
            if film and not made.film:
                self.notes.append("There is no ffmpeg here: frames were counted, and times hold no writing of a video.")
            return self.state.put(name, made.result())

        if cell.role == "reference" and cell.levels != ("speed",) and self.references.find(request) is None:
            with self.references.making(request) as recorder:
                if recorder is not None:
                    return timed(recorder)
        if cell.role in ("reference", "other-seed") or not cell.wants("free", "video", "score"):
            return timed(None)
        recorder = Recorder(self.state.place("free-0"), request.settings)
        found = timed(recorder)
        recorder.finished(FREE)
        return found

    def _make_references(self) -> list[Recording]:
        found = [self.references.find(request) for request in self.requests]
        missing = [i for i, reference in enumerate(found) if reference is None]
        with self._kept(self.official) as pipe:
            self._encode(pipe, [self.requests[i] for i in missing])
            for n, i in enumerate(missing):
                with self.references.making(self.requests[i]) as recorder:
                    progress = self._progress(f"reference {n + 1} of {len(missing)}")
                    if recorder is not None:
                        record_run(pipe, self.requests[i], recorder, False, progress)
                found[i] = self.references.find(self.requests[i])
            if self.cell.wants("video", "score"):
                for request, reference in zip(self.requests, found, strict=True):
                    if reference is not None and not reference.is_decoded:
                        self.references.decode(request, reference, self._progress("references"))
        made = [reference for reference in found if reference is not None]
        if len(made) != len(found):
            raise SolostepError(f"A reference in {self.references.folder} was removed meanwhile; start again.")
        return made

    @staticmethod
    def _encode(pipe: StepVideoPipeline, requests: Sequence[Request]) -> None:
        """Puts the embeddings of all texts into the cache, so that the encoders are loaded once and not for each."""
        texts = list(dict.fromkeys(text for request in requests for text in request.texts))
        if texts:
            with pipe.memory.capped(), readable_errors(pipe.device), numerics():
                encode_prompts(pipe.model, texts, pipe.device, pipe.dtype, pipe.cache, None, pipe.text_mode)

    # --- drift ----------------------------------------------------------------------------------------------------

    def _drift(self, references: Sequence[Recording]) -> tuple[dict[str, Any], Any, list[dict[str, Any]] | None]:
        cell = self.cell
        found: dict[str, Any] = dict.fromkeys(("blocks", "operators", "teacher", "free", "video"))
        score = shown = None
        with self._kept(self.pipe) as pipe:
            self._encode(pipe, self.requests)
            if cell.wants("free", "video", "score"):
                rows = self._each("free", self._free, references)
                found |= self._levels(rows)
                score, shown = counted([mark for row in rows for mark in row["marks"]]), rows
            if cell.wants("teacher"):
                found["teacher"] = self._teacher(references)
        if cell.wants("blocks"):
            blocks = self.state.once("blocks", lambda: self._blocks(references))
            self.notes += blocks.pop("notes")
            found |= blocks
        # Which kernels were the fastest here is no part of a cell, and yet decides the last bits.
        found["attention_backend"] = self.floor_attention or self.pipe._attention_backend(self.settings)
        return found, score, shown

    def _each(
        self, level: str, make: Callable[[int, Recording], dict[str, Any]], references: Sequence[Recording]
    ) -> list[dict[str, Any]]:
        """What ``make`` measures of each pair; of each once, however often this is begun."""
        return [self.state.once(f"{level}-{i}", partial(make, i, each)) for i, each in enumerate(references)]

    def _free(self, i: int, reference: Recording) -> dict[str, Any]:
        """The free run of a pair, held against its reference; some of its frames are kept."""
        seen, request = self.cell.wants("video", "score"), self.requests[i]
        place = self.state.place(f"free-{i}")
        made = Recording.opened(place, FREE, reference.steps) if (place / "identity.json").exists() else None
        if made is None or (seen and not made.is_decoded):
            recorder = Recorder(place, request.settings)
            record_run(self.pipe, request, recorder, seen, self._progress(f"free run {i + 1} of {len(self.requests)}"))
            made = recorder.finished(FREE)
        row: dict[str, Any] = {"error": drift.free_errors(made, reference), "video": None, "marks": [], "shown": None}
        if seen:
            if self.compared is not None:
                row["video"] = self.compared(made.frames, reference.frames)
            if self.cell.wants("score"):
                row["marks"] = [reading.right(self.asked[i]) for reading in _read(made.frames)]
            frames, base = np.array(made.frames), np.array(reference.frames)
            row["shown"] = write_frames(self.state.folder / f"shown-{i}.npz", frames, base, clip=not i)
        return row

    def _levels(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The levels free and video, of the rows of all pairs."""
        errors = [row["error"] for row in rows]
        free = {
            "sigmas": drift.sigmas_of(self.requests[0])[1:], "error": errors,
            "diverged_at": [drift.diverged_at(e) for e in errors], "diverged_limit": drift.DIVERGED,
        }  # fmt: skip
        return {"free": free, "video": by_metric([row["video"] for row in rows if row["video"] is not None])}

    def _teacher(self, references: Sequence[Recording]) -> dict[str, Any]:
        rows = self._each("teacher", self._forced, references)
        sigmas = drift.sigmas_of(self.requests[0])[:-1]
        return {"sigmas": sigmas, "error": [row["error"] for row in rows], "cosine": [row["cosine"] for row in rows]}

    def _forced(self, i: int, reference: Recording) -> dict[str, Any]:
        progress = self._progress(f"teacher-forced run {i + 1} of {len(self.requests)}")
        place = self.state.place(f"teacher-{i}")
        error, cosine = drift.teacher_forced(self.pipe, self.requests[i], reference, place, progress)
        return {"error": error, "cosine": cosine}

    def _blocks(self, references: Sequence[Recording]) -> dict[str, Any]:
        count = drift.block_pairs(self.folder.components["transformer"].parameters)
        pairs = [i * len(self.cell.seeds) for i in range(min(count, len(self.cell.prompts)))]
        samples = drift.samples_of(self.requests, references, pairs)
        backend = self.pipe._attention_backend(self.requests[0].settings)
        self.official.cache = self._embeddings
        study = drift.BlockDrift(self.official, self.pipe, backend, self.change, self._progress("blocks"))
        found = study.measure(samples, self.requests)
        off = drift.reproduction(samples, found.pop("velocities"), self.requests, references)
        if off > 1e-3:
            raise SolostepError(
                f"The official blocks make steps that are {off:.2g} from those of the references, so these are not "
                f"theirs; remove {self.references.folder} and start again."
            )
        notes = []
        if off > 1e-6:  # the step itself, in fp32, may round otherwise on another device
            notes.append(f"The blocks' inputs were made again; the reference's steps differ from them by {off:.2g}.")
        operators = found.pop("operators") or None
        labels = [{"pair": s.pair, "step": s.step, "branch": s.branch} for s in samples]
        return {"blocks": found | {"samples": labels}, "operators": operators, "notes": notes}

    def _among(self, references: Sequence[Recording]) -> dict[str, Any]:
        """Distances among the references of one prompt: of each seed from the next one's, in a ring."""
        seeds = len(self.cell.seeds)

        def apart(i: int, reference: Recording) -> dict[str, Any]:
            made = references[i - i % seeds + (i + 1) % seeds]
            errors = [drift.relative(made.latents(n), reference.latents(n)) for n in range(1, reference.steps + 1)]
            video = None if self.compared is None else self.compared(made.frames, reference.frames)
            return {"error": errors, "video": video}

        rows = self._each("apart", apart, references)
        return {"blocks": None, "operators": None, "teacher": None} | self._levels(rows)

    def _frames_file(self, spec: Mapping[str, Any]) -> Path:
        return Path(spec.get("frames_dir") or self.work) / f"{spec.get('id') or _hash_of(spec['cell'])}.frames.npz"

    def _shown(self, rows: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any] | None:
        """Puts the frames of the first pair, and of the one that ends furthest off, where they belong."""
        files = [self.state.folder / row["shown"]["file"] for row in rows if row["shown"]]
        if not files:
            return None
        worst = max(range(len(rows)), key=lambda i: rows[i]["error"][-1]) if len(rows) > 1 else None
        return put_together(path, files[0], worst, None if worst is None else files[worst])

    def _of_references(self, references: Sequence[Recording], path: Path) -> tuple[Any, dict[str, Any] | None]:
        """Score and shown frames of the references themselves."""
        readings = [r for reference in references for r in _read(reference.frames)] if self.asked else []
        first = references[0]
        shown = write_frames(path, np.array(first.frames), None) if first.is_decoded else None
        return score_of(readings, self.asked), shown

    def _attributes(self) -> list[Attributes]:
        """What each prompt asks for.

        Raises:
            UsageError: the model or a prompt is not the demo's.
        """
        if self.folder.preset.name != "demo":
            raise UsageError(f"The level score reads the demo model's videos, not those of {self.cell.model}.")
        known = asked_by_captions()
        for prompt in self.cell.prompts:
            if prompt not in known:
                raise UsageError(
                    f"The level score knows what a caption of the demo asks for, and {prompt!r} is none; take prompts "
                    "of solostep.engine.demo.captions.held_out_prompts(), or leave score out."
                )
        return [known[pair["prompt"]] for pair in self.cell.pairs]


def score_of(readings: Sequence[Reading], asked: Sequence[Attributes]) -> dict[str, Any] | None:
    """:func:`counted` of what was read off videos."""
    return counted([r.right(a) for r, a in zip(readings, asked, strict=True)])


def counted(marks: Sequence[Mapping[str, bool]]) -> dict[str, Any] | None:
    """Right videos and all of them, by aspect; ``all`` is right in every aspect. ``pairs``: which pairs' are right.
    None where there is no video."""
    right = {name: [m[name] for m in marks] for name in ASPECTS} | {"all": [all(m.values()) for m in marks]}
    return {name: [sum(found), len(found)] for name, found in right.items()} | {"pairs": right} if marks else None


def _read(frames: np.ndarray) -> list[Reading]:
    return read_clips([torch.from_numpy(np.array(frames))])


# --- the command line ---------------------------------------------------------------------------------------------


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes JSON to a temporary name, and renames it: what is there is whole.

    Raises:
        OutputError: it could not be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            json.dump(result, stream, ensure_ascii=False, allow_nan=False)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); give another place.") from error


class Lines:
    """Progress as lines on stderr: where a stage begins and ends, and at most one every two seconds between."""

    def __init__(self) -> None:
        self.last, self.stage = -math.inf, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.stage or done == total or now - self.last >= 2:
            self.last, self.stage = now, what
            print(f"{what} {done}/{total}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="cell", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", type=Path, help='a JSON file with the key "cell"')
    parser.add_argument("output", type=Path, help="where the measured keys go; frames beside it")
    parser.add_argument("--work", type=Path, help="where references are kept (default: in the cache folder)")
    parser.add_argument("--parent", type=int, help="the process that started this one, and with which it ends")
    args = parser.parse_args(arguments)
    if args.parent is not None:
        ends_with(args.parent)
    work = args.work or cache_dir() / "bench"
    try:
        spec = read_spec(args.spec)
        if args.output.exists():
            raise UsageError(f"{args.output} is there already; move it, or give another name.")
        if not args.output.parent.is_dir():
            raise UsageError(f"{args.output.parent} is no folder; make it first.")
        spec = {"frames_dir": str(args.output.parent)} | spec
        with terminated_like_interrupted():
            write_result(args.output, measure(spec, work, Lines(), keep=True))
        if "state" not in spec:  # else it is of who named it
            cell_state.remove(work, state_name(spec))
    except SolostepError as error:
        print(str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more
            print(f"Stopped; what is done is kept in {work}, and the same command goes on with it.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
