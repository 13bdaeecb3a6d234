"""What goes into the pipeline and what comes out: a request, a job on its way, a video and its record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import latents as storage
from .checkpoint import ModelFolder
from .config import FPS, GenerationSettings, Preset
from .errors import UsageError
from .image import load_image
from .latents import SavedLatents
from .runtime import Stage

if TYPE_CHECKING:
    import numpy as np

    from .plan import Plan

log = logging.getLogger("solostep")

SETTINGS = (
    "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift", "motion_score",
)  # fmt: skip
"""What a preset fills in where it is not given."""


def check_seed(seed: Any) -> None:
    """Refuses what is no seed; None has one drawn.

    Raises:
        UsageError: not a whole number, or out of range.
    """
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise UsageError(f"seed (--seed) has to be a whole number from 0 to 2^63 - 1, not {seed!r}.")


def check_asked(
    prompt: Any,
    negative_prompt: Any = None,
    image: Any = None,
    seed: Any = None,
    raw_prompt: bool = False,
    **settings: Any,
) -> Tensor | None:
    """Checks all of a request that can be told without a model, and gives its image, read.

    Raises:
        UsageError: an empty prompt, a wrong value, an unreadable image.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise UsageError(f"The prompt has to be text, not {prompt!r}.")
    if prompt is None or (not prompt.strip() and not raw_prompt):
        raise UsageError("The prompt is empty; say what the video shows.")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise UsageError(f"negative_prompt (--negative) has to be text, not {negative_prompt!r}.")
    for name, text in (("The prompt", prompt), ("negative_prompt (--negative)", negative_prompt or "")):
        try:
            text.encode()
        except UnicodeEncodeError:  # half a character, or bytes of another encoding from a terminal
            raise UsageError(f"{name} holds something that is not UTF-8 text; write it anew.") from None
    check_seed(seed)
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        if unknown[0] in ("vram", "host_ram"):
            raise UsageError(
                f'{unknown[0]} is no setting of a clip but of the pipeline: set pipe.{unknown[0]} = "12GB".'
            )
        raise UsageError(f"Unknown setting {unknown[0]!r}; known are {', '.join(SETTINGS)}.")
    GenerationSettings(**{name: value for name, value in settings.items() if value is not None})
    return None if image is None else load_image(image)


def filled_in(preset: Preset, given: Mapping[str, Any], image_to_video: bool) -> GenerationSettings:
    """Settings of a clip; what is not given, or None, comes from the preset."""
    values = {n: given[n] if given.get(n) is not None else getattr(preset, n) for n in SETTINGS}
    notes = ()
    if given.get("motion_score") is not None and not image_to_video:
        notes = ("motion_score has no effect: it is of image-to-video models.",)
    return GenerationSettings(**values, max_frames=preset.max_frames, image_to_video=image_to_video, notes=notes)


class FrameSink(Protocol):
    """Where decoded frames go while they are decoded."""

    def write(self, frames: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Request:
    """One video to make. Built by :meth:`StepVideoPipeline.request`, which fills in the preset."""

    prompt: str
    negative: str
    settings: GenerationSettings
    seed: int | None = None
    image: Tensor | None = None
    noise: Tensor | None = None
    latents_path: Path | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The prompt, and the negative prompt where guidance needs it."""
        return [self.prompt, self.negative] if self.settings.use_guidance else [self.prompt]


@dataclass
class Video:
    """A finished video: ``frames`` uint8 ``[F, H, W, 3]``, its latents and the record of how it was made."""

    frames: np.ndarray
    record: dict[str, Any]
    latents: Tensor
    fps: float = FPS

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        return f"<Video: {count} frames of {height}x{width}, seed {self.record.get('seed')}>"

    def save(
        self, path: str | Path, codec: str = "h264", quality: float | None = None, metadata: bool = True,
        official_postprocess: bool = False,
    ) -> Path:  # fmt: skip
        """Writes the video; see :class:`solostep.engine.video.VideoWriter`."""
        from .video import VideoWriter, check_output

        height, width = self.frames.shape[1:3]
        path = check_output(path, codec, (width, height))
        described = video_metadata(self.record) if metadata else None
        with VideoWriter(path, width, height, self.fps, codec, quality, described, official_postprocess) as writer:
            writer.write(self.frames)
        return path


class Collect:
    """A sink that keeps the frames."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def write(self, frames: np.ndarray) -> None:
        self.parts.append(frames)


@dataclass
class Job:
    """A request on its way."""

    request: Request
    path: Path
    saved: SavedLatents
    resumed_from: int | None = None
    managed: bool = False
    to_file: bool = True
    """Whether a video file is written while frames are decoded: plans count its time."""
    stages: list[Stage] = field(default_factory=list)
    condition: Tensor | None = None
    saved_at: Path | None = None
    save_failed: bool = False
    plan: Plan | None = None
    repeated: int | None = None
    """The step that was repeated as it was, as no plan takes less memory."""
    events: list[str] = field(default_factory=list)
    """What did not go as planned, for the record."""

    @property
    def left(self) -> GenerationSettings:
        """The settings with the steps that are left to make, of which there is one at least: what a plan is for."""
        return replace(self.request.settings, num_inference_steps=max(1, self.saved.steps - self.saved.step))

    def __post_init__(self) -> None:
        if self.saved.finished and self.path.name:
            self.saved_at = self.path

    @property
    def done(self) -> bool:
        return self.saved.finished

    def event(self, text: str, quiet: bool = False) -> None:
        """Something to say and to record."""
        self.events.append(text)
        if not quiet:
            log.warning(text)

    def delivered(self) -> None:
        """The caller has the video. Files in the cache folder are kept, but the same call begins anew."""
        if self.managed and self.saved_at == self.path:
            finished = self.path.with_name("finished-" + self.path.name)
            self.path.replace(finished)
            self.saved_at = finished
            prune(self.path.parent)


def prune(folder: Path, keep: int = 16) -> None:
    """Leaves the newest finished latents in the cache folder and removes older ones."""
    with contextlib.suppress(OSError):
        found = sorted(folder.glob("finished-*" + storage.SUFFIX), key=lambda p: p.stat().st_mtime)
        for old in found[:-keep]:
            old.unlink(missing_ok=True)


def settings_dict(settings: GenerationSettings) -> dict[str, Any]:
    return {k: v for k, v in vars(settings).items() if k != "notes"}


def tensor_hash(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    data = tensor.detach().cpu().float().contiguous()
    return hashlib.sha256(str(list(data.shape)).encode() + data.numpy().tobytes()).hexdigest()


def describe_device(device: torch.device) -> str:
    """The device by name, for records."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.processor() or platform.machine()})"


def versions() -> dict[str, str | None]:
    """Versions that a result may depend on."""
    import importlib.metadata as metadata

    found: dict[str, str | None] = {}
    for name in ("solostep", "torch", "transformers", "sentencepiece", "imageio-ffmpeg"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found.setdefault("solostep", None)
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda}


def video_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that goes into the video file: what repeats it, and nothing about the machine."""
    names = (
        "prompt",
        "negative_prompt",
        "raw_prompt",
        "seed",
        "settings",
        "precision",
        "text_precision",
        "attention",
        "preset",
    )
    # A hub id says which model it was; of a folder only its own name, not where it lies on somebody's disk.
    model = str(record["model"])
    model = Path(model).name if Path(model).is_absolute() else model
    described = {name: record[name] for name in (*names, "solostep")}
    return described | {"recipe": _short(record["recipe"]), "model": model, "torch": record["versions"]["torch"]}


def _short(recipe: Mapping[str, Any] | None, limit: int = 1000) -> Mapping[str, Any] | None:
    """A recipe as it is, or of one that names hundreds of linears what it can be known by: a file holds little."""
    text = json.dumps(recipe)
    if recipe is None or len(text) <= limit:
        return recipe
    return {"name": recipe["name"], "sha256": hashlib.sha256(text.encode()).hexdigest()}


def make_record(job: Job, model: ModelFolder, modes: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything needed to repeat a video, and what it took.

    ``modes`` holds ``precision``, ``text_precision``, ``recipe``, ``attention`` and its back end.
    """
    saved = job.saved
    return {
        "solostep": versions()["solostep"],
        "model": saved.info.get("model", model.source),
        "model_fingerprint": model.components["transformer"].fingerprint,
        "preset": saved.info.get("preset", model.preset.name),
        **{k: saved.info.get(k) for k in ("prompt", "negative_prompt", "raw_prompt", "texts")},
        "seed": saved.seed,
        "settings": saved.info["settings"],
        **{k: modes.get(k) for k in ("precision", "text_precision", "recipe", "attention", "attention_backend")},
        "kernels": saved.info.get("kernels"),
        "image_sha256": saved.identity.get("image"),
        "noise_sha256": saved.identity.get("noise"),
        "device": describe_device(device),
        "versions": versions(),
        "notes": [*job.request.settings.notes, *([model.note] if model.note else [])],
        "steps_done": saved.step,
        "resumed_from_step": job.resumed_from,
        "latents_file": None if job.saved_at is None else str(job.saved_at),
        "stages": [s.as_dict() for s in job.stages],
        "plan": None if job.plan is None else job.plan.as_dict(),
        "events": job.events,
    }
