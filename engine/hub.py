"""Finding a model: a folder as it is, or a Hugging Face id that is downloaded."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from .demo import demo_model
from .errors import CheckpointError, UsageError, first_line

HUB_IDS = {
    "t2v": "stepfun-ai/stepvideo-t2v",
    "turbo": "stepfun-ai/stepvideo-t2v-turbo",
    "ti2v": "stepfun-ai/stepvideo-ti2v",
}
DEMO = "demo"
"""The name of the embedded demo model."""
HUB_FILES = [
    "model_index.json",
    "scheduler/*",
    "transformer/*",
    "vae/vae_v2.safetensors",
    "vae/config.json",
    "step_llm/*",
    "hunyuan_clip/*",
]
"""What is needed of a release: not the version-1 VAE, not the closed library."""


def by_hand(model: str, folder: Path | str = "DIR") -> str:
    """How to download a model without this program; what is no id is taken for the release that it looks like."""
    known = HUB_IDS.get(model, model)
    if not _is_id(known):
        known = HUB_IDS[
            _looks_like(f"{Path(model).name} {Path(folder).name}", Path(folder) / "transformer" / "config.json")
        ]
    patterns = " ".join(f"--include '{p}'" for p in HUB_FILES)
    return f"hf download {known} --local-dir {folder} {patterns}"


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def _looks_like(name: str, config: Path) -> str:
    """t2v, turbo or ti2v, from the name of a folder and what its transformer takes."""
    with contextlib.suppress(OSError, ValueError):
        if re.search(r'"use_additional_conditions"\s*:\s*true', config.read_text(encoding="utf-8")):
            return "ti2v"
    return next((known for known in ("turbo", "ti2v") if known in name.lower()), "t2v")


def resolve_model(model: str | Path) -> tuple[Path, str]:
    """The embedded ``demo`` (a folder of that name is ``./demo``), a folder, as it is, or a Hugging Face id
    (``stepfun-ai/stepvideo-t2v``, or t2v, turbo, ti2v), downloaded.

    Returns:
        The folder, and the name to remember it by.

    Raises:
        UsageError: neither a folder nor an id.
        CheckpointError: the download failed; the message holds the command to do it by hand.
    """
    path = Path(model).expanduser()
    if str(model) == DEMO and (isinstance(model, str) or not path.is_dir()):
        path = demo_model()
    if str(model) and path.is_dir():
        return path.resolve(), str(path.resolve())
    if path.is_file():
        raise UsageError(f"{model} is a file; --model takes the folder of a whole model (see `solostep info --help`).")
    name = HUB_IDS.get(str(model), str(model))
    if not _is_id(name):
        raise UsageError(
            f"{model or repr(model)} is neither a folder nor a Hugging Face id such as {HUB_IDS['t2v']}, "
            f"nor one of {', '.join(HUB_IDS)}, {DEMO}; check --model for a typo."
        )
    return _download(name), name


def image_model(root: Path) -> str:
    """The image-to-video model to choose in place of a text-to-video one: of the demo model its sister."""
    return str(demo_model(image_to_video=True)) if root == demo_model().resolve() else HUB_IDS["ti2v"]


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub raises a dozen unrelated types for 'no network', 'no such repository', ...
        raise CheckpointError(
            f"{repo_id} is not a folder here and could not be downloaded ({first_line(error)}); "
            f"download it by hand with `{by_hand(repo_id)}` and give --model DIR."
        ) from error
