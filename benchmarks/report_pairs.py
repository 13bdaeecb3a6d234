"""What a result keeps for each pair of prompt and seed, and two results beside one another, pair by pair.

Two modes make the same videos from the same noise. How hard a prompt is moves the errors of both alike, often more than
the modes differ; it cancels where each pair is divided by itself. Cost: an interval a call, milliseconds. Error: none
is added; intervals are those of :mod:`solostep.benchmarks.statistics`, over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from solostep.benchmarks.report_measures import DRIFT
from solostep.benchmarks.statistics import Interval, median_interval

Pair = tuple[str, int]
"""Prompt and seed."""
Samples = dict[Pair, list[float]]
"""The values of each pair: a teacher-forced error for each step, one for each block and sample, else a single one."""


# --- what a result holds ------------------------------------------------------------------------------------------


def names_of(pairs: Sequence[Mapping[str, Any]], count: int) -> list[Pair]:
    """The pairs of ``count`` entries; those that have no name are told apart by their place."""
    named = [(str(pair["prompt"]), int(pair["seed"])) for pair in pairs[:count]]
    return named + [(f"pair {i}", 0) for i in range(len(named), count)]


def samples_of(drift: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Samples]:
    """The values of every measure that was taken, by measure and pair."""
    found = {}
    for name in DRIFT:
        by_index = _READ[name](drift) if name in _READ else _video(drift, name)
        names = names_of(pairs, max(by_index, default=-1) + 1)
        found[name] = {names[i]: values for i, values in by_index.items() if values}
    return {name: samples for name, samples in found.items() if samples}


def _teacher(drift: Mapping[str, Any]) -> dict[int, list[float]]:
    return {i: [float(e) for e in row] for i, row in enumerate((drift.get("teacher") or {}).get("error") or [])}


def _free(drift: Mapping[str, Any]) -> dict[int, list[float]]:
    error = (drift.get("free") or {}).get("error") or []
    return {i: [float(row[-1])] for i, row in enumerate(error) if row}


def _blocks(drift: Mapping[str, Any]) -> dict[int, list[float]]:
    blocks, found = drift.get("blocks") or {}, dict[int, list[float]]()
    labels = blocks.get("samples") or []
    for errors in blocks.get("error") or []:
        for error, label in zip(errors, labels, strict=False):
            found.setdefault(label["pair"], []).append(float(error))
    return found


def _video(drift: Mapping[str, Any], name: str) -> dict[int, list[float]]:
    """A measure of the videos. A null is an infinite PSNR, or a measure that this machine could not take: which of the
    two, PSNR tells, which every machine can take. Flicker is a difference with a sign, and its size is what counts."""
    video = drift.get("video") or {}
    identical = [v is None for v in video.get("psnr") or []]
    found = {}
    for i, value in enumerate(video.get(name) or []):
        if value is not None:
            found[i] = [abs(float(value)) if name == "flicker" else float(value)]
        elif name in ("psnr", "psnr_video", "xpsnr") and i < len(identical) and identical[i]:
            found[i] = [math.inf]
    return found


_READ: dict[str, Callable[[Mapping[str, Any]], dict[int, list[float]]]] = {
    "teacher": _teacher, "free": _free, "blocks": _blocks,
}  # fmt: skip


def summarized(samples: Samples) -> Interval:
    """The median of all values, with its interval over prompts."""
    values = [(value, prompt) for (prompt, _), own in samples.items() for value in own]
    return median_interval([v for v, _ in values], clusters=[p for _, p in values])


def by_step(samples: Samples) -> list[Interval]:
    """One interval a step, over the prompts."""
    prompts = [prompt for prompt, _ in samples]
    return [median_interval(step, clusters=prompts) for step in zip(*samples.values(), strict=True)]


# --- one beside another -------------------------------------------------------------------------------------------


def over(name: str, own: float, base: float) -> float:
    """How many times one error is the other: of decibels, the ratio of the root mean square differences. Two that are
    0, or two infinite PSNRs, are equal."""
    if own == base:
        return 1.0
    if DRIFT[name].unit == "dB":
        return 10.0 ** ((base - own) / 20)
    return own / base if base else math.inf


def more(own: float, base: float) -> float:
    """By how much one value is above the other; two infinite ones are equal."""
    return 0.0 if own == base else own - base


def beside(own: Samples, base: Samples, each: Callable[[float, float], float]) -> dict[Pair, list[float]]:
    """``each`` of the values of every pair that both have."""
    found = {}
    for pair in own:
        if pair in base:
            a, b = own[pair], base[pair]
            if len(a) != len(b):  # other steps or samples: what they have in common is their middle
                a, b = [_middle(a)], [_middle(b)]
            found[pair] = [each(x, y) for x, y in zip(a, b, strict=True)]
    return found


def paired(own: Samples, base: Samples, each: Callable[[float, float], float]) -> Interval | None:
    """The median over pairs of ``each``, of a pair's several values their median; None: they have no pair in common."""
    found = {pair: [_middle(values)] for pair, values in beside(own, base, each).items()}
    return summarized(found) if found else None


def times(name: str, own: Samples, base: Samples) -> Interval | None:
    """How many times the error of ``base`` that of ``own`` is, pair by pair; None: they have no pair in common."""
    return paired(own, base, lambda a, b: over(name, a, b))


def steps_above(own: Samples, base: Samples) -> tuple[int, int] | None:
    """At how many steps the interval of the ratio lies above 1, and of how many; None: there are no intervals."""
    found = beside(own, base, lambda a, b: over("teacher", a, b))
    if not found or len({len(row) for row in found.values()}) > 1:
        return None
    steps = by_step(found)
    if any(step.low is None for step in steps):
        return None
    return sum(step.low is not None and step.low > 1 for step in steps), len(steps)


def _middle(values: Sequence[float]) -> float:
    return median_interval(values).median


# --- prompts ------------------------------------------------------------------------------------------------------


def followed_by(score: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> dict[Pair, dict[str, bool]]:
    """Which aspects the video of each pair shows; empty where a result does not keep that."""
    found: dict[Pair, dict[str, bool]] = {}
    for aspect, hits in (score.get("pairs") or {}).items():
        for pair, hit in zip(names_of(pairs, len(hits)), hits, strict=True):
            found.setdefault(pair, {})[aspect] = bool(hit)
    return found


def lost(
    own: Mapping[Pair, Mapping[str, bool]], base: Mapping[Pair, Mapping[str, bool]]
) -> dict[Pair, list[str]] | None:
    """Pairs whose video shows all that was asked for in ``base`` and not in ``own``, and the aspects that it lacks.
    None: it is not known of a common pair."""
    common = [pair for pair in own if pair in base]
    if not common:
        return None
    return {p: [a for a, hit in own[p].items() if not hit and a != "all"] for p in common
            if all(base[p].values()) and not all(own[p].values())}  # fmt: skip
