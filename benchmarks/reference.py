"""Runs put on disk step by step, and the reference runs that drift is measured against.

The reference of a prompt and a seed is the run of the official numerics: bf16, blocks in the official order of
operations and roundings. It is made once and found again by the hash of everything that its bits depend on: weights,
texts, settings, seed, code of the official numerics, device and torch. A recording is a folder:

    latents/00000.safetensors ... 00050   fp32 [1, f, c, h, w]; 0 is the noise, n what step n gave
    frames.npy                            uint8 [F, H, W, 3], once it was decoded
    identity.json                         what it was made from; written last

One that is interrupted stays where it was made, beside its latents, and goes on after its last step.

Disk: 1 GB of latents and 0.33 GB of frames for 204 frames at 544x992 and 50 steps. Host memory: one step's latents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from solostep.benchmarks.reference_code import official_code
from solostep.engine.config import GenerationSettings
from solostep.engine.errors import OutputError, SolostepError, UsageError
from solostep.engine.files import replacing
from solostep.engine.latents import SUFFIX, SavedLatents, read_latents
from solostep.engine.machine import installed
from solostep.engine.pipeline import OpenSink, StepCallback, StepVideoPipeline
from solostep.engine.progress import Progress
from solostep.engine.request import Request, settings_dict, tensor_hash
from solostep.engine.sampling import initial_noise

log = logging.getLogger("solostep")
FORMAT = 2
FOLDER = "references"
PART = ".part"
"""Behind the name of a reference that is being made, after a dot before it."""
RUN = f"run{SUFFIX}"
"""What an interrupted run goes on from, in the folder of what it is made for."""
PACKAGES = ("transformers", "sentencepiece", "triton")
"""Beside torch, what the numbers of a run may come from."""


# --- recordings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A run on disk: the latents before and after each step, and perhaps the frames."""

    folder: Path
    steps: int

    def latents(self, step: int) -> Tensor:
        """What ``step`` steps gave, fp32 ``[1, f, c, h, w]``; step 0 is the noise."""
        return load_file(_latents_file(self.folder, step))["latents"]

    @property
    def is_decoded(self) -> bool:
        return (self.folder / "frames.npy").exists()

    @property
    def frames(self) -> np.ndarray:
        """uint8 ``[F, H, W, 3]``, mapped from the file."""
        return np.load(self.folder / "frames.npy", mmap_mode="r", allow_pickle=False)

    @classmethod
    def opened(cls, folder: Path, identity: Mapping[str, Any], steps: int) -> Recording | None:
        """The recording in a folder; None if there is none, or it is not whole."""
        found = cls(folder, steps)
        if not folder.exists():
            return None
        try:
            if json.loads((folder / "identity.json").read_text(encoding="utf-8")) != identity:
                raise ValueError("it was made from something else")
            for step in (0, steps):
                found.latents(step)
            missing = [n for n in range(steps) if not _latents_file(folder, n).exists()]
            if missing or (found.is_decoded and found.frames.ndim != 4):
                raise ValueError("a part is missing")
        except Exception as error:  # of safetensors, numpy, JSON, the file system
            log.warning("The reference in %s cannot be used (%s); it is made again.", folder, error)
            return None
        return found


def _latents_file(folder: Path, step: int) -> Path:
    return folder / "latents" / f"{step:05d}.safetensors"


class Recorder:
    """Writes a recording while the run goes on: its :meth:`step` after each step, and frames as a sink.

    ``step_seconds`` and ``frame_seconds`` is the time that writing took, for a run that is timed meanwhile.
    """

    def __init__(self, folder: Path, settings: GenerationSettings) -> None:
        self.folder, self.settings = folder, settings
        self.step_seconds = self.frame_seconds = 0.0
        self._frames: FrameFile | None = None
        with _writing(folder):
            (folder / "latents").mkdir(parents=True, exist_ok=True)
            (folder / "frames.npy").unlink(missing_ok=True)  # not whole, or it would have become a recording

    @property
    def run(self) -> Path:
        """Where the run that is recorded keeps its latents."""
        return self.folder / RUN

    def resumed(self) -> int:
        """How many steps of an interrupted run are recorded; what does not fit together is removed, and it is 0."""
        saved = kept_latents(self.run)
        if saved is None or not all(_latents_file(self.folder, n).exists() for n in range(saved.step)):
            self.clear()
            return 0
        self.step(saved.step, saved.latents)  # the run may have been cut between its own file and this one
        return saved.step

    def clear(self) -> None:
        """Removes what an interrupted run has recorded, and what it would go on from."""
        with _writing(self.folder):
            shutil.rmtree(self.folder / "latents")
            (self.folder / "latents").mkdir()
            for left in self.folder.glob(f"*{SUFFIX}*"):
                left.unlink()

    def step(self, step: int, latents: Tensor) -> None:
        """Latents after ``step`` steps."""
        start = time.perf_counter()
        with _writing(self.folder), replacing(_latents_file(self.folder, step)) as temporary:
            save_file({"latents": latents.detach().cpu().float().contiguous()}, temporary)
        self.step_seconds += time.perf_counter() - start

    def write(self, frames: np.ndarray) -> None:
        start = time.perf_counter()
        if self._frames is None:
            self._frames = FrameFile(self.folder / "frames.npy", self.settings)
        self._frames.write(frames)
        self.frame_seconds += time.perf_counter() - start

    def finished(self, identity: Mapping[str, Any] | None = None) -> Recording:
        """Closes the files; ``identity`` makes it one that can be found again."""
        with _writing(self.folder):
            if self._frames is not None:
                self._frames.close()
                self._frames = None
            for left in self.folder.glob(f"*{SUFFIX}*"):
                left.unlink()
            if identity is not None:
                (self.folder / "identity.json").write_text(json.dumps(identity, ensure_ascii=False), encoding="utf-8")
        return Recording(self.folder, self.settings.num_inference_steps)


class FrameFile:
    """A sink that writes frames to a .npy file as they come; whole when it is closed."""

    def __init__(self, path: Path, settings: GenerationSettings) -> None:
        self.path, self.written = path, 0
        shape = (settings.num_frames, settings.height, settings.width, 3)
        with _writing(path):
            self._frames: Any = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)

    def write(self, frames: np.ndarray) -> None:
        with _writing(self.path):
            self._frames[self.written : self.written + len(frames)] = frames
        self.written += len(frames)

    def close(self) -> None:
        """Raises SolostepError if frames are missing."""
        with _writing(self.path):
            self._frames.flush()
        wanted, self._frames = len(self._frames), None
        if self.written != wanted:
            raise SolostepError(f"{self.path} was to hold {wanted} frames, and {self.written} were made.")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except TimeoutError:  # of a lock
        raise
    except OSError as error:
        raise OutputError(
            f"{error.filename or folder} could not be written ({error.strerror}); free space there or give another "
            "--work."
        ) from error


# --- runs ---------------------------------------------------------------------------------------------------------


def kept_latents(path: Path) -> SavedLatents | None:
    """What an interrupted run left; None if that is nothing, or damaged."""
    try:
        saved = read_latents(path)
    except UsageError:
        return None
    return saved if saved.step else None


def run_once(
    pipe: StepVideoPipeline, request: Request, path: Path, callback: StepCallback | None = None,
    open_sink: OpenSink | None = None, progress: Progress | None = None, resume: bool = False,
    to_file: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Makes one video, and gives its record; ``to_file`` says that the sink writes a video file.

    The pipeline goes on from what an interrupted run left, and so do two runs of one request with different callbacks:
    a measurement must not, so its latents lie at a ``path`` of its own. Without ``resume`` it begins anew and leaves
    nothing; with it, it goes on from them, and who has put the result in its place removes them.

    Raises:
        SolostepError: the latents are not finite: there is nothing to measure.
    """
    if not resume or kept_latents(path) is None:
        path.unlink(missing_ok=True)
    made = pipe.generate([replace(request, latents_path=path)], open_sink, callback, progress, to_file=to_file)
    try:
        told, latents = next(made)
        if not bool(torch.isfinite(latents).all()):
            path.unlink(missing_ok=True)
            raise SolostepError(
                "The latents of a run are not finite; leave this mode out, and report it with its card."
            )
        list(made)  # to the end: networks that are not kept are freed there
    finally:
        made.close()
        if not resume:
            path.unlink(missing_ok=True)
    return told


def noise_of(pipe: StepVideoPipeline, request: Request) -> Tensor:
    """What a run of a request begins with, fp32 ``[1, f, c, h, w]``."""
    if request.noise is not None:
        return request.noise
    assert request.seed is not None
    return initial_noise(request.settings, pipe.model.transformer_config.in_channels, request.seed)[0]


def recording(recorder: Recorder) -> StepCallback:
    """A callback that records the latents after each step."""

    def callback(pipe: StepVideoPipeline, step: int, sigma: float, state: dict[str, Tensor]) -> None:
        recorder.step(step + 1, state["latents"])

    return callback


def record_run(
    pipe: StepVideoPipeline, request: Request, recorder: Recorder, decode: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One free run into a recording, which goes on where it was interrupted; gives the record."""
    recorder.resumed()
    recorder.step(0, noise_of(pipe, request))
    sink: OpenSink | None = (lambda *_: contextlib.nullcontext(recorder)) if decode else None
    return run_once(pipe, request, recorder.run, recording(recorder), sink, progress, resume=True)


# --- references ---------------------------------------------------------------------------------------------------


def device_kind(device: torch.device) -> list[Any]:
    """What of a device decides which kernels run, and so the bits: the card; of a CPU, instructions and threads."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))]
    return ["cpu", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def identity_of(pipe: StepVideoPipeline, request: Request) -> dict[str, Any]:
    """Everything that the reference of a request depends on, in JSON's types."""
    return {
        "format": FORMAT, "code": official_code(), "torch": torch.__version__, "device": device_kind(pipe.device),
        "packages": {name: installed(name) for name in PACKAGES},
        "weights": {name: c.fingerprint for name, c in sorted(pipe.model.components.items())},
        "text_precision": pipe.text_precision, "texts": request.texts, "settings": request.settings.identity(),
        "seed": request.seed, "image": tensor_hash(request.image),
    }  # fmt: skip


class References:
    """The reference runs in a folder of work; ``pipe`` is the pipeline of the official numerics."""

    def __init__(self, work: Path, pipe: StepVideoPipeline) -> None:
        self.folder, self.pipe = work / FOLDER, pipe

    def find(self, request: Request) -> Recording | None:
        """The reference of a request, if it was made before."""
        identity = identity_of(self.pipe, request)
        return Recording.opened(self._place(identity), identity, request.settings.num_inference_steps)

    @contextlib.contextmanager
    def making(self, request: Request) -> Iterator[Recorder | None]:
        """A recorder of a run that becomes the reference of a request if nothing fails; if something does, the next one
        goes on with what there is. None if another process has made the reference while this one waited for it."""
        identity = identity_of(self.pipe, request)
        place = self._place(identity)
        folder = self.folder / f".{place.name}{PART}"
        sweep(self.folder, f".*{PART}", official_code())
        with held(folder):
            if self.find(request) is not None:
                yield None
                return
            recorder = Recorder(folder, request.settings)
            with _writing(folder):
                (folder / CODE).write_text(official_code(), encoding="utf-8")
            yield recorder
            recorder.finished(identity)
            with _writing(place):
                (folder / CODE).unlink()
                shutil.rmtree(place, ignore_errors=True)  # what could not be used
                folder.rename(place)

    def decode(self, request: Request, reference: Recording, progress: Progress | None = None) -> None:
        """Makes the frames of a reference that was not decoded, from its final latents, as the pipeline makes them."""
        settings, path = request.settings, reference.folder / ".frames.npy"
        info = {"settings": settings_dict(settings)}
        saved = SavedLatents(
            reference.latents(reference.steps), reference.steps, reference.steps, request.seed or 0, True, {}, info
        )
        with held(reference.folder):
            if reference.is_decoded:  # by another process, meanwhile
                return
            try:
                sink = FrameFile(path, settings)
                self.pipe.decode(saved, lambda *_: contextlib.nullcontext(sink), progress)
                sink.close()
                with _writing(path):
                    path.replace(reference.folder / "frames.npy")
            finally:
                path.unlink(missing_ok=True)

    def _place(self, identity: Mapping[str, Any]) -> Path:
        key = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:24]


# --- folders of work in progress --------------------------------------------------------------------------------

CODE = "code.txt"
"""In a folder of work in progress: the code that can go on with it."""


@contextlib.contextmanager
def held(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keeps other processes from work in progress, until this one is through or dead.

    Raises:
        Timeout: another process has it, and this one does not ``wait``.
    """
    from filelock import FileLock

    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name.lstrip('.')}.lock"))
        lock.acquire(timeout=-1 if wait else 0)
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path, pattern: str, code: str) -> None:
    """Removes work in progress of other code, with which nobody can go on, unless a process is at it."""
    from filelock import Timeout

    for left in folder.glob(pattern):
        with contextlib.suppress(OSError, Timeout):
            if left.is_dir() and (left / CODE).read_text(encoding="utf-8") != code:
                with held(left, wait=False):
                    shutil.rmtree(left)
