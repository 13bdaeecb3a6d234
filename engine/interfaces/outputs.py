"""Which file a video goes to, and which requests a file of prompts holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError

PROMPT_KEYS = (
    "prompt", "negative_prompt", "image", "motion_score", "num_frames", "height", "width", "num_inference_steps",
    "guidance_scale", "time_shift", "seed", "raw_prompt", "output",
)  # fmt: skip
"""What a JSON object in a file of prompts may hold."""


def slug(prompt: str, length: int = 48) -> str:
    """A file name from a prompt: its words, in any script."""
    words = re.sub(r"[^\w]+", "-", prompt, flags=re.UNICODE).strip("-_").lower()
    while len(words.encode()) > 3 * length or len(words) > length:
        words = words[:-1]
    return words.strip("-_") or "video"


def latents_beside(output: Path) -> Path:
    """``cat.mp4`` -> ``cat.latents.safetensors``."""
    from ..latents import SUFFIX

    return output.with_name((output.stem if output.suffix else output.name) + SUFFIX)


def free_name(folder: Path, stem: str, suffix: str, usable: Callable[[Path], bool]) -> Path:
    """``stem.suffix``, or with -2, -3, ... behind it: the first that is neither there nor taken by another run."""
    for n in range(1, 10_000):
        path = folder / (f"{stem}{suffix}" if n == 1 else f"{stem}-{n}{suffix}")
        if not path.exists() and usable(path):
            return path
    raise UsageError(f"{folder} holds 9,999 files called {stem}; choose another -o.")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Requests from a file: a prompt a line, or a JSON object a line (keys: :data:`PROMPT_KEYS`).

    Each also gets ``where``, the file and line to name when something is wrong with it. Empty lines are passed over.
    An image path is taken relative to the file's folder.

    Raises:
        UsageError: the file is missing, not UTF-8, empty, or a line is wrong; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read ({error.strerror}); give another file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--prompts {path} is not UTF-8 text; save it as UTF-8.") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request: dict[str, Any] = {"prompt": line.strip()}
        if line.lstrip().startswith("{"):
            request = _json_line(path, number, line)
        if request.get("image") is not None:
            request["image"] = str(path.parent / request["image"])
        requests.append(request | {"where": f"--prompts {path}, line {number}: "})
    if not requests:
        raise UsageError(f"--prompts {path} holds no prompt; write one a line.")
    return requests


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--prompts {path}, line {number} begins with {{ but is not JSON ({error}); correct it."
        ) from None
    unknown = sorted(set(request) - set(PROMPT_KEYS))
    if unknown:
        raise UsageError(
            f"--prompts {path}, line {number}: unknown key {unknown[0]!r}; known are {', '.join(PROMPT_KEYS)}."
        )
    if not isinstance(request.get("prompt"), str):
        raise UsageError(f"--prompts {path}, line {number}: the key prompt is missing or is not text; add it.")
    kinds: dict[str, tuple[type, str]] = {
        "output": (str, "the name of a file"),
        "image": (str, "the name of a file"),
        "raw_prompt": (bool, "true or false"),
    }
    for key, (kind, meant) in kinds.items():
        value = request.get(key)
        if value is not None and (not isinstance(value, kind) or value == ""):
            raise UsageError(f"--prompts {path}, line {number}: {key} has to be {meant}, not {value!r}.")
    return request
