"""Every metric against a second implementation in plain numpy (test_metrics_independent.py has others'); identical
videos; frames too small or too few; and what is said when something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from solostep.benchmarks import video_metrics
from solostep.benchmarks.demo_score import drift, frame_psnr
from solostep.benchmarks.video_metrics import METRICS, available, compare, per_frame
from solostep.engine.demo.evaluate import Made
from solostep.engine.errors import SolostepError, UsageError

FFMPEG = ("ssim", "vmaf", "xpsnr")
needs_ffmpeg = pytest.mark.skipif(
    importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs the ffmpeg of imageio-ffmpeg"
)
has_xpsnr = available()["xpsnr"] is True
needs_xpsnr = pytest.mark.skipif(not has_xpsnr, reason="needs an ffmpeg with the filter xpsnr (7.1 or later)")
ROUNDING = 5e-6  # ffmpeg writes its numbers, in single precision, with six decimals


def clip(frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    """Waves that drift, in three colours."""
    y, x, c = np.mgrid[:height, :width, :3]
    waves = [127 + 90 * np.sin((x + 2 * t) / 7 + c) * np.cos((y - t) / 9 + 2 * c) for t in range(frames)]
    return np.stack(waves).astype(np.uint8)


def noisy(video: np.ndarray, strength: float = 6.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, strength, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


# --- second implementations ---------------------------------------------------------------------------------------


def plain_psnr(x: np.ndarray, y: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - y) ** 2))


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The mean over the 8x8 windows every 4 pixels and over the colours."""
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for top in range(0, x.shape[0] - 7, 4):
        for left in range(0, x.shape[1] - 7, 4):
            for colour in range(3):
                u, v = (f[top : top + 8, left : left + 8, colour].astype(float).ravel() for f in (x, y))
                (uu, uv), (_, vv) = np.cov(u, v)
                similar = (2 * u.mean() * v.mean() + c1) / (u.mean() ** 2 + v.mean() ** 2 + c1)
                values.append(similar * (2 * uv + c2) / (uu + vv + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(48, 64), (33, 47), (9, 8)])
@needs_ffmpeg
def test_psnr_and_ssim_are_those_of_plain_numpy(size: tuple[int, int]) -> None:
    b = clip(3, *size)
    a = noisy(b)
    a[1, :4] = 255 - a[1, :4]
    found = per_frame(a, b, metrics=("psnr", "ssim"))
    assert found["psnr"] == pytest.approx([plain_psnr(x, y) for x, y in zip(a, b, strict=True)], abs=ROUNDING)
    assert found["ssim"] == pytest.approx([plain_ssim(x, y) for x, y in zip(a, b, strict=True)], abs=ROUNDING)
    assert compare(a, b, metrics=["ssim"])["ssim"] == pytest.approx(np.mean(found["ssim"] or 0), abs=1e-9)


def test_gaussian_ssim_is_that_of_plain_numpy() -> None:
    b = clip(2, 15, 12)
    a = noisy(b)
    d = np.arange(-5, 6) ** 2
    weights = np.exp(-(d[:, None] + d) / 4.5)
    weights /= weights.sum()
    c1, c2, expected = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        values = []
        for top, left, colour in np.ndindex(5, 2, 3):
            u, v = (f[top : top + 11, left : left + 11, colour] for f in (x, y))
            mu, mv = (weights * u).sum(), (weights * v).sum()
            uu, vv = (weights * (u - mu) ** 2).sum(), (weights * (v - mv) ** 2).sum()
            uv = (weights * (u - mu) * (v - mv)).sum()
            values.append((2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2)))
        expected.append(float(np.mean(values)))
    assert per_frame(a, b, metrics="ssim_gaussian")["ssim_gaussian"] == pytest.approx(expected, abs=1e-12)
    assert compare(a, b, metrics="ssim_gaussian") == {"ssim_gaussian": pytest.approx(np.mean(expected), abs=1e-12)}
    assert compare(b, b, metrics="ssim_gaussian") == {"ssim_gaussian": 1.0}


def test_psnr_is_that_of_demo_score() -> None:
    b = clip(4)
    a = noisy(b)
    a[2] = b[2]  # an equal frame is left out
    x, y = torch.from_numpy(a)[None], torch.from_numpy(b)[None]
    assert per_frame(a, b, metrics="psnr")["psnr"] == pytest.approx(frame_psnr(x, y)[0].tolist(), abs=ROUNDING)
    latents = torch.ones(1, 1)
    expected = drift(Made(x, latents), Made(y, latents))["psnr"]
    assert compare(a, b, metrics="psnr")["psnr"] == pytest.approx(expected, abs=ROUNDING)


def test_psnr_of_the_whole_video_counts_equal_frames() -> None:
    b = clip(4)
    a = b.copy()
    a[1], a[3] = noisy(b[1:2], 3)[0], noisy(b[3:4], 20)[0]
    whole = 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    found = compare(a, b, metrics=["psnr", "psnr_video"])
    assert found["psnr_video"] == pytest.approx(whole, abs=1e-9)
    frames = [plain_psnr(a[i], b[i]) for i in (1, 3)]
    assert found["psnr"] == pytest.approx(np.mean(frames), abs=1e-9) and found["psnr"] > whole > min(frames)


def test_one_wrong_value_is_seen() -> None:
    b = clip(2, 64, 64)
    a = b.copy()
    a[1, 30, 30, 2] ^= 1
    found = compare(a, b, metrics=["psnr"])
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 * 64 * 64 * 3), abs=ROUNDING)


@needs_xpsnr
def test_xpsnr_of_small_grey_frames_is_the_psnr_of_luma() -> None:
    """Frames of under 45x45 have no blocks whose activity would be weighed. Greys of which BT.709 has whole lumas."""
    g = np.random.default_rng(3)
    grey = 85 * g.integers(0, 4, (3, 32, 32, 1)).repeat(3, -1)
    a, b = grey.astype(np.uint8), np.where(g.random(grey[..., :1].shape) < 0.1, 85, grey).astype(np.uint8)
    error = (((a[..., 0].astype(float) - b[..., 0]) * 219 / 255) ** 2).mean((1, 2))
    assert per_frame(a, b, metrics=["xpsnr"])["xpsnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=ROUNDING)
    expected = -20 * math.log10(np.sqrt(error).mean() / 255)
    assert compare(a, b, metrics=["xpsnr"])["xpsnr"] == pytest.approx(expected, abs=ROUNDING)


@needs_xpsnr
def test_xpsnr_is_that_of_the_worst_plane() -> None:
    b = np.full((2, 32, 32, 3), 85, np.uint8)
    a = b.copy()
    a[..., 2] = 255  # blue is a fourteenth of luma and half of Cb
    error = round(170 / 2 * 224 / 255)
    found = compare(a, b, metrics=["xpsnr"])["xpsnr"]
    assert found == pytest.approx(20 * math.log10(255 / error), abs=ROUNDING)


@needs_ffmpeg
def test_vmaf_falls_with_noise_and_depends_on_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    b = clip(3)
    scores = [compare(a, b, metrics=["vmaf"])["vmaf"] for a in (b, noisy(b, 4), noisy(b, 12), noisy(b, 40))]
    assert all(x is not None and 0 <= x <= 100 for x in scores)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4 and scores[0] > 97
    monkeypatch.setattr(video_metrics.os, "cpu_count", lambda: 1)
    assert compare(noisy(b, 12), b, metrics=["vmaf"])["vmaf"] == scores[2]


@needs_ffmpeg
def test_the_reference_is_the_second() -> None:
    b = clip(4)
    blurred = (b // 2 + np.roll(b, 3, axis=2) // 2).astype(np.uint8)
    there, back = compare(blurred, b), compare(b, blurred)
    assert there["psnr"] == back["psnr"] and there["ssim"] == back["ssim"]
    assert there["vmaf"] is not None and back["vmaf"] is not None and there["vmaf"] < back["vmaf"] - 5


# --- over time ----------------------------------------------------------------------------------------------------


def test_flicker_and_motion_are_what_they_say() -> None:
    b = clip(6)
    a = noisy(b)
    weights = np.array([0.2126, 0.7152, 0.0722])
    bent = [np.abs(np.diff(v.astype(float) @ weights, n=2, axis=0)).mean() for v in (a, b)]
    steps = [np.diff(v.astype(float), axis=0) for v in (a, b)]
    found = compare(a, b, metrics=("motion", "flicker"))
    assert list(found) == ["flicker", "motion"]
    assert found["flicker"] == pytest.approx(bent[0] - bent[1], rel=1e-5)
    assert found["motion"] == pytest.approx(np.linalg.norm(steps[0] - steps[1]) / np.linalg.norm(steps[1]), rel=1e-12)
    back = compare(b, a, metrics=["flicker"])
    assert found["flicker"] > 0 and back["flicker"] == -found["flicker"]


def test_flicker_sees_a_lamp_and_no_even_pace() -> None:
    b = np.full((6, 32, 32, 3), 100, np.uint8)
    t = np.arange(6, dtype=np.uint8)[:, None, None, None]
    lamp, dawn, cut = b + 5 * (t % 2), b + 7 * t, np.where(t < 3, b, b + 30)
    found = [compare(a, b, metrics=["flicker"])["flicker"] for a in (lamp, dawn, cut)]
    assert found == pytest.approx([10.0, 0.0, 15.0], abs=1e-4)  # the cut bends two of four times, by 30


def test_motion_of_still_and_unrelated_videos() -> None:
    b = clip(4)
    still = b[:1].repeat(4, axis=0)
    assert compare(still, b, metrics=["motion"])["motion"] == 1.0
    assert compare(still, still.copy(), metrics=["motion"])["motion"] == 0.0
    assert compare(b, still, metrics=["motion"])["motion"] is None
    g = np.random.default_rng(0)
    x, y = g.integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    assert compare(x, y, metrics=["motion"])["motion"] == pytest.approx(math.sqrt(2), abs=0.02)
    darker = b // 2 * 2
    assert compare(darker // 2, darker, metrics=["motion"])["motion"] == pytest.approx(0.5)


# --- identical, short, small --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 64, 96), (3, 33, 47)])
@needs_ffmpeg
def test_identical_videos(shape: tuple[int, int, int]) -> None:
    b = clip(*shape)
    found = compare(torch.from_numpy(b.copy()), b)
    assert tuple(found) == METRICS
    vmaf, lpips, xpsnr = found.pop("vmaf"), found.pop("lpips"), found.pop("xpsnr")
    assert found == {"psnr": math.inf, "psnr_video": math.inf, "ssim": 1.0, "flicker": 0.0, "motion": 0.0}
    assert xpsnr == (math.inf if has_xpsnr else None)
    assert vmaf is not None and 97 < vmaf <= 100 and lpips in (None, 0.0)


@needs_ffmpeg
def test_too_few_frames_and_too_small_ones() -> None:
    def missing(frames: int, height: int, width: int) -> set[str]:
        b = clip(frames, height, width)
        found = compare(noisy(b), b)
        names = {name for name, value in found.items() if value is None}
        reasons = available(b.shape)
        assert names == {name for name in METRICS if reasons[name] is not True}
        return names - {"lpips", "xpsnr"}

    assert missing(1, 64, 64) == {"flicker", "motion"} and missing(2, 33, 35) == {"flicker"}
    assert missing(3, 32, 32) == set() and missing(3, 31, 64) == missing(3, 64, 8) == {"vmaf"}
    assert missing(3, 7, 64) == missing(3, 1, 1) == {"ssim", "vmaf"}
    assert available((2, 7, 64, 3))["ssim"] == "it needs frames of at least 8 pixels a side"
    assert available((2, 7, 64, 3))["flicker"] == "it needs 3 frames"


@needs_ffmpeg
def test_views_and_tensors_give_the_same() -> None:
    b = clip(4, 40, 64)
    a = noisy(b)
    mirrored = compare(a[:, :, ::-1], b[:, :, ::-1], metrics=("psnr", "motion"))
    assert mirrored == compare(a, b, metrics=("psnr", "motion"))
    tensors = [torch.from_numpy(v).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for v in (a, b)]
    assert compare(*tensors, metrics=iter(("psnr", "vmaf"))) == compare(a, b, metrics=("vmaf", "psnr"))


@needs_ffmpeg
def test_per_frame_finds_the_worst() -> None:
    b = clip(4)
    a = b.copy()
    a[2] = noisy(b[2:3], 20)[0]
    found = per_frame(a, b)
    assert list(found) == [name for name in METRICS if name not in ("psnr_video", "flicker", "motion")]
    for name in (name for name in FFMPEG if name != "xpsnr" or has_xpsnr):
        values = found[name]
        assert values is not None and len(values) == 4 and (name == "vmaf" or np.argmin(values) == 2)
    assert found["psnr"][:2] == [math.inf, math.inf] and found["ssim"][3] == 1.0  # type: ignore[index]
    with pytest.raises(UsageError, match="no motion"):
        per_frame(a, b, metrics=["psnr", "motion"])
    with pytest.raises(UsageError, match="no psnr_video"):
        per_frame(a, b, metrics="psnr_video")


# --- what is refused, and what is missing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "options", "words"),
    [
        (clip(2, 48, 48), {}, "one shape"),
        (clip(3, 32, 32), {}, "one shape"),
        (clip(2, 32, 32).astype(np.float32), {}, "uint8 array or tensor, not float32"),
        (torch.zeros(2, 32, 32, 3), {}, "uint8 array or tensor, not float32"),
        ([[1, 2]], {}, "not list"),
        (clip(2, 32, 32)[0], {}, "frames, height, width, 3"),
        (clip(2, 32, 32)[:0], {}, "frames, height, width, 3"),
        (clip(2, 32, 32).transpose(0, 3, 1, 2), {}, "frames, height, width, 3"),
        (clip(2, 32, 32), {"fps": 0.0}, "fps"),
        (clip(2, 32, 32), {"fps": math.nan}, "fps"),
        (clip(2, 32, 32), {"metrics": ["psnr", "fid", "fvd"]}, "no metric fid, fvd; choose from psnr"),
    ],
)
def test_bad_input_is_refused(a: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare(a, clip(2, 32, 32), **options)


def test_without_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(get_ffmpeg_exe=none))
    b = clip(3, 32, 32)
    with pytest.raises(SolostepError, match="reinstall imageio-ffmpeg"):
        compare(b, b)
    assert compare(b, b, metrics=("psnr", "flicker", "motion")) == {"psnr": math.inf, "flicker": 0.0, "motion": 0.0}
    assert all("imageio-ffmpeg" in str(available()[name]) for name in FFMPEG)


@needs_ffmpeg
def test_an_ffmpeg_without_some_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(available()[name] is True for name in ("ssim", "vmaf"))  # all that imageio-ffmpeg brings have them
    monkeypatch.setattr(video_metrics, "_filters", lambda exe: frozenset({"ssim"}))
    b = clip(3, 32, 32)
    found = compare(noisy(b), b, metrics=FFMPEG)
    assert found["vmaf"] is None and found["xpsnr"] is None and found["ssim"] is not None
    assert "no filter libvmaf; update imageio-ffmpeg" in str(available()["vmaf"])
    reason = str(available()["xpsnr"])
    assert "no filter xpsnr" in reason and "/" not in reason  # a note of results: no folder of this machine


@needs_ffmpeg
def test_an_ffmpeg_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_metrics, "TO_YUV", "scale=nonsense=1")
    b = clip(40, 256, 256)  # more than a pipe holds
    with pytest.raises(SolostepError, match="could not compare the videos.*nonsense.*update imageio-ffmpeg"):
        compare(b, b, metrics=("ssim", "vmaf"))
    monkeypatch.undo()
    monkeypatch.setitem(video_metrics._KEYS, "ssim", r"lavfi\.ssim\.gone")
    with pytest.raises(SolostepError, match="ssim has 0 frames of 3"):
        compare(b[:3], b[:3], metrics=["ssim"])


LPIPS = """
import torch
class LPIPS:
    def __init__(self, net, version, verbose):
        assert (net, version, verbose) == ("alex", "0.1", False)
    def eval(self):
        return self
    def __call__(self, x, y):
        assert x.shape[:2] == (1, 3) and x.min() >= -1 and x.max() <= 1 and not torch.is_grad_enabled()
        return (x - y).abs().mean().reshape(1, 1, 1, 1)
"""


@needs_ffmpeg
def test_lpips_never_fetches_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package in its place that takes the mean difference, so that what goes in and comes out is known."""
    packages = {"torchvision": "raise RuntimeError('operator torchvision::nms does not exist')", "lpips": LPIPS}
    for name, text in packages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    video_metrics._lpips_network.cache_clear()
    b = clip(2, 32, 40)
    assert "nms does not exist" in str(available()["lpips"]) and compare(b, b)["lpips"] is None
    (tmp_path / "torchvision" / "__init__.py").write_text("", encoding="utf-8")
    importlib.invalidate_caches()
    reason = str(available()["lpips"])
    assert "alexnet-owt-7be5be79.pth is missing; download it from https://" in reason and compare(b, b)["lpips"] is None
    weights = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    a = b.copy()
    a[1] = 255 - a[1]
    difference = np.abs(a.astype(float) - b).mean() / 127.5
    try:
        assert available()["lpips"] is True
        assert compare(a, b, metrics=["lpips"])["lpips"] == pytest.approx(difference, rel=1e-6)
        assert per_frame(a, b, metrics=["lpips"])["lpips"] == pytest.approx([0, 2 * difference], rel=1e-6)
    finally:
        video_metrics._lpips_network.cache_clear()
        for name in packages:
            sys.modules.pop(name, None)


def test_no_lpips_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available()["lpips"] == "the package lpips is not installed"
    assert compare(clip(2, 32, 32), clip(2, 32, 32), metrics="lpips") == {"lpips": None}
