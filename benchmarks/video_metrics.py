"""How far one video is from another, in the measures that video people know, and in two of our own for time.

    psnr     dB      of RGB: 10 log10(255**2 / mean squared difference over the pixels and R, G, B) of every frame; of
                     the video the mean over the frames that differ, infinite where none does (`demo_score.drift`)
    psnr_video dB    of the mean squared difference of all frames together, equal ones among them: what ffmpeg calls the
                     average PSNR. The frame that is furthest off weighs most; infinite where no frame differs
    ssim     <= 1    of R, G and B each, and the mean: ffmpeg's, of 8x8 windows every 4 pixels, all pixels alike in
                     weight; windows that do not fit at the right and lower edge are left out
    vmaf     0..100  model vmaf_v0.6.1 on BT.709 yuv420p, the mean over frames
    xpsnr    dB      on BT.709 yuv420p (Helmrich et al. 2020): of each plane -20 log10 of the mean over frames of
                     10**(-dB / 20), then the lowest of the three planes, as in ffmpeg's summary
    lpips    >= 0    version 0.1 on AlexNet (Zhang et al. 2018), the mean over frames
    flicker  levels  f(a) - f(b), where f is the mean over frames and pixels of |y[t-1] - 2 y[t] + y[t+1]|, y the BT.709
                     luma of the stored values, 0..255: over 0 where the video flickers more than its reference
    motion   >= 0    |d a - d b| / |d b|, where d is the difference of successive frames, all R, G, B values, and |.|
                     the root of the sum of squares: 0 for the same motion, 1 for none, about 1.4 for unrelated ones

One more is made only when it is asked for: `ssim_gaussian`, the SSIM of Wang et al. (2004), with Gaussian windows
(11x11, sigma 1.5) at every pixel where one fits, the mean over R, G and B. It does not compare with ffmpeg's: with
noise of PSNR 32.5 dB it was 0.05 lower.

SSIM, VMAF and XPSNR come from one run of the ffmpeg that imageio-ffmpeg brings. SSIM is taken on gbrp, a mere
reordering of the given bytes, without the subsampling of chroma; VMAF and XPSNR know only YUV, so they get what
`solostep.engine.video` would encode, before compression.

VMAF was trained on 1080 lines seen from three times their height. On small frames it is not what an observer would say:
the demo model's training clips of 96x96 have 98.5 to 99.3 against themselves (a first frame, taken to stand still, has
97.4), 94.8 to 99.9 with noise of 47 dB and 89 to 96 with noise of 32.6 dB. So a little noise may raise it, and it
compares only among videos of one size.

Cost: 51 frames of 544x992 take 10 s on two busy cores, half of it VMAF (no LPIPS); memory: two frames, and 170 MB in
ffmpeg. Error: ffmpeg gives its numbers, in single precision, with six decimals. Measured against scikit-image 0.26 and
torchmetrics 1.9: PSNR agrees to 3e-6 dB; ssim_gaussian to 3e-15 (torchmetrics' without the edge it pads).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from solostep.engine.errors import SolostepError, UsageError, first_line
from solostep.engine.video import TO_YUV, find_ffmpeg

METRICS = ("psnr", "psnr_video", "ssim", "vmaf", "xpsnr", "lpips", "flicker", "motion")
ON_REQUEST = ("ssim_gaussian",)
_FILTERS = {"ssim": "ssim", "vmaf": "libvmaf", "xpsnr": "xpsnr"}
# Under these sides there is no 8x8 window, AlexNet pools to nothing, and libvmaf dies of a segmentation fault (below
# 17 pixels; the rest is for other builds).
_SMALLEST = {"ssim": 8, "vmaf": 32, "lpips": 32, "ssim_gaussian": 11}
_SHORTEST = {"motion": 2, "flicker": 3}
_WHOLE = ("psnr_video", "flicker", "motion")
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
_GAUSSIAN = np.exp(-(np.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))
_ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def compare(a: Any, b: Any, fps: float = 25.0, metrics: Iterable[str] | None = None) -> dict[str, float | None]:
    """The distance of video `a` from its reference `b`, by each of `metrics` (default: METRICS; also: ON_REQUEST).

    a, b: uint8 RGB [F, H, W, 3], numpy or torch. fps: frames per second, of which XPSNR takes note. None stands for
    what is not to be had: `available` says why here, and frames that are too small or too few have none of some
    (`available(b.shape)`); motion is None where only the reference stands still. Identical videos have both PSNR and
    XPSNR infinite, SSIM 1, LPIPS, flicker and motion 0; VMAF as it comes (97 to 100).

    Raises:
        UsageError: no videos of equal shape, an fps that is none, or an unknown metric.
        SolostepError: ffmpeg does not start (reinstall imageio-ffmpeg) or fails.
    """
    a, b, names, missing = _checked(a, b, fps, metrics)
    found = _series(a, b, fps, [name for name in names if name not in missing])
    return {name: None if name in missing else _SUMMARIES.get(name, _mean)(found[name]) for name in names}


def per_frame(a: Any, b: Any, fps: float = 25.0, metrics: Iterable[str] | None = None) -> dict[str, list[float] | None]:
    """As `compare`, but a value for each of the F frames: for the worst frame or a plot. No psnr_video, flicker and
    motion, which are not of a frame. XPSNR is that of the worst plane."""
    a, b, names, missing = _checked(a, b, fps, [n for n in METRICS if n not in _WHOLE] if metrics is None else metrics)
    whole = [name for name in names if name in _WHOLE]
    if whole:
        raise UsageError(f"A single frame has no {' and no '.join(whole)}; use compare.")
    found = _series(a, b, fps, [name for name in names if name not in missing])
    return {name: None if name in missing else found[name].reshape(len(a), -1).min(1).tolist() for name in names}


def available(shape: Sequence[int] | None = None) -> dict[str, bool | str]:
    """True or the reason why not, for each metric: on this machine, and for videos of `shape` [F, H, W, 3]."""
    return {name: _reason(name, shape) or True for name in (*METRICS, *ON_REQUEST)}


def _reason(name: str, shape: Sequence[int] | None) -> str | None:
    if shape is not None and shape[0] < _SHORTEST.get(name, 1):
        return f"it needs {_SHORTEST[name]} frames"
    if shape is not None and min(shape[1:3]) < _SMALLEST.get(name, 1):
        return f"it needs frames of at least {_SMALLEST[name]} pixels a side"
    if name == "lpips":
        return _lpips_missing()
    if name in _FILTERS:
        try:
            exe = find_ffmpeg()
        except SolostepError as error:
            return str(error)
        if _FILTERS[name] not in _filters(exe):
            return f"{Path(exe).name} has no filter {_FILTERS[name]}; update imageio-ffmpeg"
    return None


@lru_cache(maxsize=4)
def _filters(exe: str) -> frozenset[str]:
    done = subprocess.run([exe, "-hide_banner", "-filters"], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return frozenset(re.findall(r"^ \S+ +(\S+) +\S+->", done.stdout.decode(errors="replace"), re.MULTILINE))


def _checked(
    a: Any, b: Any, fps: float, metrics: Iterable[str] | None
) -> tuple[np.ndarray, np.ndarray, list[str], set[str]]:
    """Both videos as arrays, the metrics asked for in the order above, and those of them that cannot be had."""
    asked = set(METRICS if metrics is None else [metrics] if isinstance(metrics, str) else metrics)
    known = (*METRICS, *ON_REQUEST)
    if not asked <= set(known):
        unknown = ", ".join(sorted(asked - set(known)))
        raise UsageError(f"There is no metric {unknown}; choose from {', '.join(known)}.")
    if not 0 < fps <= 1000:
        raise UsageError(f"The fps must be over 0 and at most 1000, not {fps}.")
    a, b = _array(a, "video"), _array(b, "reference")
    if a.shape != b.shape:
        raise UsageError(f"The video is {list(a.shape)} and its reference {list(b.shape)}; they must be of one shape.")
    names = [name for name in known if name in asked]
    if asked & set(_FILTERS):
        find_ffmpeg()
    return a, b, names, {name for name in names if _reason(name, a.shape)}


def _array(video: Any, what: str) -> np.ndarray:
    if hasattr(video, "detach"):
        video = video.detach().cpu().numpy()
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8:
        kind = getattr(video, "dtype", type(video).__name__)
        raise UsageError(f"The {what} must be a uint8 array or tensor, not {kind}.")
    if video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
        raise UsageError(f"The {what} must be of shape [frames, height, width, 3], not {list(video.shape)}.")
    return video


def _series(a: np.ndarray, b: np.ndarray, fps: float, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What each metric is of: [F], for XPSNR [F, 3 planes], for flicker and motion one number."""
    found = _ffmpeg_series(a, b, fps, [name for name in names if name in _FILTERS])
    ours = {
        "psnr": _psnr, "psnr_video": _psnr_video, "lpips": _lpips, "flicker": _flicker, "motion": _motion,
        "ssim_gaussian": _gaussian_ssim,
    }  # fmt: skip
    found.update({name: np.asarray(measure(a, b)) for name, measure in ours.items() if name in names})
    for name, values in found.items():
        if np.isnan(values).any() and name != "motion":
            raise SolostepError(f"The {name} of these videos came out as NaN; leave it out of the metrics.")
    return found


# --- the video from its frames ------------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _mean_of_different(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.inf


def _worst_plane(planes: np.ndarray) -> float:
    errors = (10.0 ** (-planes / 20)).mean(0)
    return min(-20 * math.log10(error) if error else math.inf for error in errors)


def _unless_nan(value: np.ndarray) -> float | None:
    return None if math.isnan(value) else float(value)


_SUMMARIES: dict[str, Callable[[np.ndarray], float | None]] = {
    "psnr": _mean_of_different,
    "xpsnr": _worst_plane,
    "motion": _unless_nan,
}


# --- through ffmpeg -----------------------------------------------------------------------------------------------


def _ffmpeg_series(a: np.ndarray, b: np.ndarray, fps: float, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    with tempfile.TemporaryDirectory(prefix="solostep-metrics-") as folder:
        _run_ffmpeg(_command(a.shape, fps, names), a, b, Path(folder))
        found = {name: _read(name, Path(folder)) for name in names}
    for name, values in found.items():
        if len(values) != len(a):
            raise SolostepError(f"ffmpeg's {name} has {len(values)} frames of {len(a)}; update imageio-ffmpeg.")
    return found


def _command(shape: Sequence[int], fps: float, names: Sequence[str]) -> list[str]:
    """One input of frames that hold `a` over `b`, cut apart again: frames of one stream cannot get out of step."""
    _, height, width, _ = shape
    rate = str(Fraction(fps).limit_denominator(100_000))
    graph = ["[0:v]split[x][y]", f"[x]crop={width}:{height}:0:0[a]", f"[y]crop={width}:{height}:0:{height}[b]"]
    graph += [f"[{video}]split={len(names)}" + "".join(f"[{video}_{name}]" for name in names) for video in "ab"]
    outputs = []
    for name in names:
        form = "format=gbrp" if name == "ssim" else TO_YUV
        graph += [f"[{video}_{name}]{form}[{video}_{name}_in]" for video in "ab"]
        measure = f"{_FILTERS[name]},metadata=mode=print:file={name}.txt"
        if name == "vmaf":
            measure = f"libvmaf=log_fmt=json:log_path=vmaf.json:n_threads={min(os.cpu_count() or 1, 8)}"
        graph.append(f"[a_{name}_in][b_{name}_in]{measure}[{name}]")
        outputs += ["-map", f"[{name}]", "-fps_mode", "passthrough", "-f", "null", "-"]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", rate, "-i", "-"]
    start = [find_ffmpeg(), "-hide_banner", "-nostats", "-v", "error"]
    return [*start, *source, "-filter_complex", ";".join(graph), *outputs]


def _run_ffmpeg(command: list[str], a: np.ndarray, b: np.ndarray, folder: Path) -> None:
    """Runs in `folder`, because a path in a filter graph would have to be quoted twice."""
    with open(folder / "messages", "w+b") as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages, cwd=folder
        )
        try:
            assert process.stdin is not None
            with suppress(OSError), process.stdin as pipe:  # a broken pipe: ffmpeg is gone, and its exit code says it
                for frames in zip(a, b, strict=True):
                    for frame in frames:
                        pipe.write(np.ascontiguousarray(frame).data)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip().splitlines()
    if code != 0:
        # The first message names the cause, the last ones only that it ended.
        reason = (
            "says '" + re.sub(r"^\[[^]]* @ [^]]*\] *", "", said[0]) + "'" if said else f"ended with exit code {code}"
        )
        raise SolostepError(f"ffmpeg could not compare the videos: it {reason}; update imageio-ffmpeg.")


_KEYS = {
    "ssim": r"lavfi\.ssim\.All",
    "xpsnr": r"lavfi\.xpsnr\.xpsnr\.[yuv]",
}


def _read(name: str, folder: Path) -> np.ndarray:
    """[F], for XPSNR [F, 3 planes]."""
    if name == "vmaf":
        frames = json.loads((folder / "vmaf.json").read_text(encoding="utf-8"))["frames"]
        return np.array([frame["metrics"]["vmaf"] for frame in frames], np.float64)
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    values = np.array(re.findall(rf"^{_KEYS[name]}=(\S+)$", text, re.MULTILINE), np.float64)
    return values.reshape(-1, 3) if name == "xpsnr" else values


# --- PSNR, and SSIM as published --------------------------------------------------------------------------------------


def _squared(a: np.ndarray, b: np.ndarray) -> list[int]:
    """The sum of squared differences of each frame: of whole numbers, hence exact."""
    return [int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in zip(a, b, strict=True)]


def _decibels(error: int, size: int) -> float:
    return 10 * math.log10(255**2 * size / error) if error else math.inf


def _psnr(a: np.ndarray, b: np.ndarray) -> list[float]:
    """In dB, infinite for equal frames."""
    return [_decibels(error, a[0].size) for error in _squared(a, b)]


def _psnr_video(a: np.ndarray, b: np.ndarray) -> float:
    return _decibels(sum(_squared(a, b)), a.size)


def _smooth(x: np.ndarray) -> np.ndarray:
    """The Gaussian mean [H - 10, W - 10, 3] of the windows that fit into [H, W, 3]."""
    weights, zero = _GAUSSIAN / _GAUSSIAN.sum(), np.zeros(())
    rows = sum((w * x[i : len(x) - 10 + i] for i, w in enumerate(weights)), start=zero)
    return sum((w * rows[:, i : x.shape[1] - 10 + i] for i, w in enumerate(weights)), start=zero)


def _gaussian_ssim(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Equation 13 of Wang et al. (2004) with their K1 = 0.01, K2 = 0.03 and windows."""
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for frames in zip(a, b, strict=True):
        x, y = (frame.astype(np.float64) for frame in frames)
        mx, my = _smooth(x), _smooth(y)
        vx, vy, xy = _smooth(x * x) - mx * mx, _smooth(y * y) - my * my, _smooth(x * y) - mx * my
        similar = (2 * mx * my + c1) / (mx * mx + my * my + c1) * (2 * xy + c2) / (vx + vy + c2)
        found.append(float(similar.mean()))
    return found


# --- over time ----------------------------------------------------------------------------------------------------


def _flicker(a: np.ndarray, b: np.ndarray) -> float:
    return _bending(a) - _bending(b)


def _bending(video: np.ndarray) -> float:
    """The mean of |y[t-1] - 2 y[t] + y[t+1]|; that of a change at an even pace is zero."""
    total, lumas = 0.0, [video[t] @ _LUMA for t in range(2)]
    for frame in video[2:]:
        lumas.append(frame @ _LUMA)
        total += float(np.abs(lumas[0] - 2 * lumas[1] + lumas[2]).mean(dtype=np.float64))
        lumas.pop(0)
    return total / (len(video) - 2)


def _motion(a: np.ndarray, b: np.ndarray) -> float:
    """|d a - d b| / |d b|; NaN where `b` stands still and `a` moves. The sums are of whole numbers, hence exact."""
    apart = moved = 0
    for t in range(1, len(b)):
        steps = [video[t].astype(np.int32) - video[t - 1] for video in (a, b)]
        apart += int(np.square(steps[0] - steps[1]).sum(dtype=np.int64))
        moved += int(np.square(steps[1]).sum(dtype=np.int64))
    if not moved:
        return math.nan if apart else 0.0
    return math.sqrt(apart / moved)


# --- LPIPS --------------------------------------------------------------------------------------------------------


def _lpips_missing() -> str | None:
    """Why LPIPS is not to be had. Its package would fetch AlexNet at the first use; nothing here uses the network."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    try:
        import lpips  # noqa: F401
        import torch
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision for another torch
        return f"the package lpips cannot be imported ({first_line(error)})"
    weights = Path(torch.hub.get_dir(), "checkpoints", _ALEXNET.rsplit("/", 1)[1])
    return None if weights.is_file() else f"{weights} is missing; download it from {_ALEXNET}"


@lru_cache(maxsize=1)
def _lpips_network() -> Any:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it loads AlexNet by a keyword that torchvision calls deprecated
        return lpips.LPIPS(net="alex", version="0.1", verbose=False).eval()


def _lpips(a: np.ndarray, b: np.ndarray) -> list[float]:
    import torch

    def prepared(frame: np.ndarray) -> Any:
        return torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 127.5 - 1

    network = _lpips_network()
    with torch.inference_mode():
        return [float(network(prepared(x), prepared(y))) for x, y in zip(a, b, strict=True)]
