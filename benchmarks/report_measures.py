"""What a report's measures are called, in which unit, which direction is better, and what each of them is in plain
words. Tables, plots, the method section and the comparison of two sets of results all take it from here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from solostep.benchmarks.statistics import Interval

MISSING = "–"


@dataclass(frozen=True)
class Measure:
    """``unit``: "%" shows a ratio as per cent, "dB" and "" a number as it is. ``better``: "lower" or "higher"."""

    label: str
    unit: str
    better: str
    meaning: str


DRIFT: dict[str, Measure] = {
    "teacher": Measure(
        "teacher-forced error",
        "%",
        "lower",
        "One step at a time from the reference's own latents: the relative L2 distance (|a - b| / |b|, b the "
        "reference) of "
        "the guided velocity that the mode predicts. Errors do not add up over steps, so it tells modes apart best; "
        "the median is over steps and pairs. Of drawn weights some steps alone may have been measured, from drawn "
        "latents, as is said there.",
    ),
    "free": Measure(
        "latents at the end",
        "%",
        "lower",
        "The mode makes the whole video by itself from the same noise: relative L2 distance of the final latents. "
        "Small "
        "differences grow from step to step, as they do between any two programs.",
    ),
    "blocks": Measure(
        "error of a block",
        "%",
        "lower",
        "Each block gets the input that the reference recorded for it: relative L2 distance of what the block adds "
        "to that "
        "input.",
    ),
    "psnr": Measure(
        "PSNR",
        "dB",
        "higher",
        "Peak signal-to-noise ratio of the frames of the two videos: the mean over the frames that differ. Frames "
        "that are the same have an infinite one and are left out, so a video with few wrong frames scores as those "
        "do; infinite where all frames are the same.",
    ),
    "psnr_video": Measure(
        "PSNR of the whole video",
        "dB",
        "higher",
        "PSNR of the mean squared error of all frames together, equal frames among them; infinite where all are the "
        "same.",
    ),
    "ssim": Measure(
        "SSIM",
        "",
        "higher",
        "Structural similarity of the frames as ffmpeg takes it: in windows of 8x8 pixels, all alike, and not in the "
        "Gaussian ones of its authors; 1 is the same.",
    ),
    "vmaf": Measure(
        "VMAF",
        "",
        "higher",
        "Netflix's predictor of seen quality, with the reference's video as the original; 0 to 100.",
    ),
    "xpsnr": Measure("XPSNR", "dB", "higher", "PSNR weighted by what an eye sees in moving pictures."),
    "lpips": Measure(
        "LPIPS", "", "lower", "Distance of the frames in the features of a trained network; 0 is the same."
    ),
    "flicker": Measure(
        "flicker",
        "",
        "lower",
        "Brightness (luma, 0 to 255) that does not change at an even pace: the mean of |y[t-1] - 2 y[t] + y[t+1]| over "
        "frames and pixels. Here how far it is from the reference's, without the sign, so flickering less counts like "
        "flickering more; 0 is as much as the reference.",
    ),
    "motion": Measure(
        "motion",
        "",
        "lower",
        "Relative L2 distance of the changes from frame to frame to those of the reference: 0 is the same motion, 1 is "
        "what a video that stands still has, about 1.4 what unrelated motion has.",
    ),
}
VIDEO = ("psnr", "psnr_video", "ssim", "vmaf", "xpsnr", "lpips", "flicker", "motion")

OTHER: dict[str, str] = {
    "mode": "The precision of the transformer's matrix products, then that of its attention. int8, fp8: 8 bits on both "
    "sides of a product. int8-weight, fp8-weight, int4-weight, nf4: weights are stored so, and products are in bf16. "
    "Attention: bf16, int8 (q k in int8, P V in bf16), int8-fp8 (P V in FP8), or official, which is the official order "
    "of operations.",
    "sigma": "The noise level of a step: 0 is noise, 1 is the video.",
    "seconds a step": "One denoising step with both guidance branches (up to a scale of 1 there is one, which the "
    "title says); the median of the steps that were timed, the first apart.",
    "50 steps, 15 steps": "A whole video from prompt to file with as many steps (15: Turbo). Marked † where it is "
    "calculated: the stages as measured, and the denoising steps times their median.",
    "GPU peak": "What torch's allocator held at most, and, under it, what the driver reported for the card at most, "
    "with the CUDA context and libraries. GB are 10^9 bytes.",
    "host peak": "What the process held of the machine's memory at most.",
    "prompt following": "The demo model's videos are measured pixel by pixel for the kind, colour, background and "
    "motion that the prompt asked for; intervals (95 %) are Wilson's over prompts, of which each counts once, by the "
    "share of its videos that follow it. A prompt is lost where the reference's video follows it in every aspect and "
    "the mode's, from the same noise, does not.",
    "noise floor": "The same bf16 numbers computed in another way that is just as right: another attention back end, "
    "or another order of summation. Its distance to the reference is what rounding alone does.",
    "another seed": "How far apart the reference's own videos of one prompt are with different seeds.",
    "verdict": "A mode is indistinguishable from the floor where its interval overlaps the floor's (or lies on the "
    "better side of it) in the teacher-forced error, the latents at the end and PSNR, as far as they were measured. "
    "Few prompts make wide intervals, which overlap easily: read it beside the next column.",
    "times the floor": "The mode's error (the teacher-forced one, where it was measured) over the larger floor's of "
    "the same prompt, noise and step, so that how hard a prompt is cancels: the median over pairs and its interval (of "
    "PSNR, the ratio of root mean square differences). Only where it holds 1, or lies under 1, can a mode not be told "
    "from rounding noise. A step counts as above the floor where the interval of its own ratio lies above 1; of a mode "
    "that is none the worse, at most one step in forty does so by chance.",
    "intervals": "95 % of the median, over prompts: videos of one prompt with several seeds count as one. Fewer than "
    "six prompts make no interval, and then none is shown.",
}


class Share(NamedTuple):
    """Videos that show what was asked for, all of them, and the prompts that they are of."""

    hits: int
    tries: int
    prompts: int

    @property
    def part(self) -> float:
        return self.hits / max(self.tries, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, over prompts: videos of one prompt are alike, so a prompt is one try, in part a hit."""
        from solostep.engine.demo.rules import wilson

        return wilson(self.part * self.prompts, self.prompts)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, and never an exponent where people read it."""
    if value is None:
        return MISSING
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, 9)}f}"
    return text


def seconds(value: float | None) -> str:
    """Seconds; minutes from two of them on, hours from ten."""
    if value is None:
        return MISSING
    if value >= 36000:
        return f"{number(value / 3600)} h"
    return f"{number(value / 60)} min" if value >= 120 else f"{number(value)} s"


def gigabytes(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def amount(name: str, value: float | None, unit: bool = True) -> str:
    """A drift measure's number as it is shown."""
    if value is None:
        return MISSING
    measure = DRIFT[name]
    if measure.unit == "%":
        return number(value * 100) + (" %" if unit else "")
    if measure.unit == "dB":
        return ("∞" if math.isinf(value) else f"{value:.1f}") + (" dB" if unit else "")
    if name == "vmaf":
        return f"{value:.1f}"
    return f"{value:.4f}" if abs(value) >= 1e-4 or value == 0 else number(value, 2)


def span(name: str, found: Interval | None) -> str:
    """The interval, without the median: ``[1.1, 1.3]``."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{amount(name, found.low, unit=False)}, {amount(name, found.high, unit=False)}]"


def cell_text(name: str, drift: Mapping[str, Interval]) -> str:
    """Median and interval in a line."""
    found = drift.get(name)
    return MISSING if found is None else f"{amount(name, found.median)} {span(name, found)}".rstrip()


def end_to_end(found: tuple[float, bool] | None, resumed: bool = False) -> str:
    """Seconds of a whole video; † where they are calculated, ‡ where it was made in several processes."""
    if found is None:
        return MISSING
    value, extrapolated = found
    return seconds(value) + ("\u202f†" if extrapolated else "\u202f‡" if resumed else "")


def share(score: Share) -> str:
    """``190 of 192 [0.96, 1.00]``, with the interval over prompts."""
    low, high = score.interval
    return f"{score.hits} of {score.tries} [{low:.2f}, {high:.2f}]"


def times_span(found: Interval | None) -> str:
    """The interval of a ratio: ``[1.4, 1.6]``."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"[{number(found.low)}, {number(found.high)}]"
