"""Made-up results for the tests of the report: the keys that a cell writes, plausible shapes and magnitudes, and no
measurement of anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CARD = "Testcard 9000"
MODES: dict[str, dict[str, Any]] = {
    # precision, attention, seconds a step and GPU memory beside the reference's, teacher-forced error
    "reference": {"role": "reference", "precision": "bf16", "attention": "official", "time": 1.0, "memory": 1.0},
    "floor-backend": {
        "role": "floor-backend",
        "precision": "bf16",
        "attention": "official",
        "time": 0.8,
        "memory": 0.95,
        "error": 0.011,
    },
    "floor-order": {
        "role": "floor-order",
        "precision": "bf16",
        "attention": "official",
        "time": 1.1,
        "memory": 1.0,
        "error": 0.0125,
    },
    "other-seed": {"role": "other-seed", "precision": "bf16", "attention": "official", "error": 1.15},
    "bf16 · bf16 attention": {"precision": "bf16", "attention": "bf16", "time": 0.81, "memory": 0.95, "error": 0.0112},
    "int8 · int8 attention": {"precision": "int8", "attention": "int8", "time": 0.60, "memory": 0.55, "error": 0.0122},
    "int8 · int8-fp8 attention": {
        "precision": "int8",
        "attention": "int8-fp8",
        "time": 0.51,
        "memory": 0.56,
        "error": 0.0162,
    },
    "fp8 · int8 attention": {"precision": "fp8", "attention": "int8", "time": 0.62, "memory": 0.55, "error": 0.038},
    "fp8 · int8-fp8 attention": {
        "precision": "fp8",
        "attention": "int8-fp8",
        "time": 0.53,
        "memory": 0.56,
        "error": 0.0395,
    },
    "int8-weight · bf16 attention": {
        "precision": "int8-weight",
        "attention": "bf16",
        "time": 0.86,
        "memory": 0.53,
        "error": 0.0145,
    },
    "nf4 · bf16 attention": {"precision": "nf4", "attention": "bf16", "time": 0.92, "memory": 0.34, "error": 0.086},
    "int4-weight · bf16 attention": {
        "precision": "int4-weight",
        "attention": "bf16",
        "time": 0.93,
        "memory": 0.33,
        "error": 0.091,
    },
}


def environment(card: str | None = CARD, **more: Any) -> dict[str, Any]:
    return {
        "card": card,
        "cards_memory_bytes": [80 * 10**9],
        "driver": "580.00",
        "cuda": "13.0",
        "clocks": {"sm_mhz": 1980, "mem_mhz": 2619, "power_limit_w": 700},
        "cpu": "Test CPU",
        "cores": 16,
        "host_memory_bytes": 128 * 10**9,
        "os": "Linux 6.1",
        "python": "3.12.3",
        "torch": "2.13.0",
        "triton": "3.6.0",
        "versions": {"numpy": "2.4.6"},
        "commit": "abc1234",
        "command": 'solostep bench <made up> & "test data"',
        "date": "2026-01-02T03:04:05Z",
        **more,
    }


LEVELS = ("speed", "blocks", "teacher", "free", "video", "score")


ASPECTS = ("kind", "colour", "background", "motion")
HARD = 0.1
"""How much the errors of prompts differ, of all modes alike (of their logarithms)."""


def pair_list(n: int, seeds: int = 1) -> list[dict[str, Any]]:
    """``n`` prompts with each seed, the seeds of a prompt one after the other."""
    named = [f"test prompt {i} with <b>marks</b> & signs" for i in range(n)]
    return [{"prompt": prompt, "seed": seed + 1} for prompt in named for seed in range(seeds)]


def make_result(
    name: str,
    seed: int = 0,
    pairs: int = 8,
    steps: int = 12,
    blocks: int = 8,
    step: float = 2.0,
    memory: float = 60e9,
    levels: tuple[str, ...] = LEVELS,
    env: dict[str, Any] | None = None,
    synthetic: Any = False,
    seeds: int = 1,
    hard: float = HARD,
    lost: tuple[int, ...] = (),
    **cell: Any,
) -> dict[str, Any]:
    """One result in JSON's types, ``pairs`` prompts with each of the seeds. hard: see HARD; lost: pairs whose motion is
    not the one that was asked for. ``cell`` replaces keys of the cell."""
    mode = dict(MODES[name])
    rng = np.random.default_rng([seed, *name.encode()])
    seeds = max(seeds, 2) if mode.get("role") == "other-seed" else seeds
    the_pairs = pair_list(pairs, seeds)
    full_cell = {
        "model": "demo",
        "precision": mode["precision"],
        "text_precision": None,
        "attention": mode["attention"],
        "attention_backend": None,
        "recipe": None,
        "vram": None,
        "host_ram": None,
        "num_frames": 17,
        "height": 96,
        "width": 96,
        "num_inference_steps": steps,
        "guidance_scale": 1.5,
        "time_shift": 3.0,
        "prompts": list(dict.fromkeys(p["prompt"] for p in the_pairs)),
        "seeds": list(dict.fromkeys(p["seed"] for p in the_pairs)),
        "role": mode.get("role", "mode"),
        "levels": list(levels),
        **cell,
    }
    label = name if not full_cell["vram"] else f"{name} · {full_cell['vram']}"
    drift = _drift(mode, rng, pairs, steps, blocks, levels, seeds, hard) if "error" in mode else None
    result: dict[str, Any] = {
        "solostep_bench": 1,
        "id": f"{abs(hash_of(name, seed, full_cell)):016x}",
        "cell": full_cell,
        "label": label,
        "synthetic": synthetic,
        "environment": env or environment(),
        "seconds": 321.0,
        "plan": _plan(full_cell["vram"]) if full_cell["vram"] else None,
        "events": ["Decoding 4 frames at a time, for want of memory."] if full_cell["vram"] else [],
        "pairs": the_pairs,
        "drift": drift or None,
        "frames": None,
        "speed": None,
        "memory": None,
        "score": None,
    }
    if "speed" in levels and "time" in mode:
        result["speed"] = _speed(step * mode["time"], rng, steps, full_cell["num_frames"])
        result["memory"] = _memory(memory * mode["memory"], full_cell["vram"])
        result["memory"]["stages"] = _stages(result)
    if "score" in levels and mode.get("role") != "other-seed":
        result["score"] = score(len(the_pairs), lost)
    return result


def score(pairs: int, lost: tuple[int, ...] = ()) -> dict[str, Any]:
    """Every video right, but for the motion of ``lost``."""
    right = {name: [not (name in ("motion", "all") and i in lost) for i in range(pairs)] for name in (*ASPECTS, "all")}
    return {name: [sum(hits), pairs] for name, hits in right.items()} | {"pairs": right}


def hash_of(*parts: Any) -> int:
    """The same in every process, unlike hash()."""
    import hashlib

    return int(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16], 16)


def _speed(step: float, rng: np.random.Generator, steps: int, frames: int) -> dict[str, Any]:
    times = [round(float(step * (1 + 0.004 * rng.standard_normal())), 5) for _ in range(steps - 1)]
    middle = float(np.median(times))
    return {
        "step_seconds": times,
        "first_step_seconds": round(step * 1.3, 4),
        "stages": {"text": 1.2, "load transformer": 4.5, "denoise": round(sum(times), 3), "decode and write": 6.1},
        "video_seconds": round(11.8 + sum(times), 3),
        "frames_written": frames,
        "written": "mp4",
        "clocks": None,
        "ran": dict.fromkeys(("precision", "text_precision", "attention", "device")),
        "end_to_end": {
            "50": {"seconds": round(11.8 + 50 * middle, 3), "extrapolated": True},
            "15": {"seconds": round(11.8 + 15 * middle, 3), "extrapolated": True},
        },
    }


def _memory(peak: float, vram: str | None) -> dict[str, Any]:
    if vram:
        peak = min(peak, float(vram.removesuffix("GB")) * 0.95e9)
    driver, host = int(peak + 0.6e9), int(22e9 - peak / 8)
    return {"gpu_peak_bytes": int(peak), "driver_peak_bytes": driver, "host_peak_bytes": host, "stages": []}


def _plan(vram: str) -> dict[str, Any]:
    budget = int(float(vram.removesuffix("GB")) * 1e9)
    stages = [
        {"name": "text", "device": budget // 3, "host": 2 * 10**9, "disk": 9 * 10**9, "seconds": 1.5},
        {"name": "denoise", "device": budget - 10**9, "host": 20 * 10**9, "disk": 0, "seconds": 31.5},
    ]
    return {
        "budget_bytes": budget, "resident_blocks": 20, "streamed_blocks": 28, "blocks_from_disk": 3, "slots": 2,
        "head_groups": 4, "keep_text": False, "park": True, "chunk": 4096, "decode_frames": 4, "decode_strips": 1,
        "step_seconds": 2.6, "seconds": 33.0, "device_bytes": budget - 10**9, "host_bytes": 20 * 10**9,
        "stages": stages,
    }  # fmt: skip


def _stages(result: dict[str, Any]) -> list[dict[str, Any]]:
    planned = {stage["name"]: stage for stage in (result["plan"] or {}).get("stages", [])}
    return [
        {
            "stage": name, "seconds": seconds, "gpu_peak_bytes": result["memory"]["gpu_peak_bytes"] - n * 10**9,
            "gpu_reserved_peak_bytes": result["memory"]["gpu_peak_bytes"], "host_peak_bytes": 12 * 10**9,
            "planned_gpu_bytes": planned.get(name, {}).get("device"),
            "planned_seconds": planned.get(name, {}).get("seconds"),
        }
        for n, (name, seconds) in enumerate(result["speed"]["stages"].items())
    ]  # fmt: skip


def _drift(
    mode: dict[str, Any], rng: np.random.Generator, prompts: int, steps: int, blocks: int, levels: tuple[str, ...],
    seeds: int, hard: float,
) -> dict[str, Any]:  # fmt: skip
    e, other, pairs = mode["error"], mode.get("role") == "other-seed", prompts * seeds
    every = np.random.default_rng(7).standard_normal((prompts, 1))  # of all modes: the same prompts are hard
    own = np.exp(hard * every).repeat(seeds, 0)
    drift: dict[str, Any] = dict.fromkeys(("blocks", "operators", "teacher", "free", "video"))
    sigmas = [round(i / steps, 5) for i in range(steps + 1)]
    if "teacher" in levels and not other:
        shape = e * (0.7 + 0.6 * np.linspace(0, 1, steps) ** 2)
        error = (own * shape * _noise(rng, pairs, steps)).round(6)
        drift["teacher"] = {
            "sigmas": sigmas[:-1], "error": error.tolist(), "cosine": (1 - error**2 / 2).round(9).tolist(),
        }  # fmt: skip
    if "free" in levels:
        grown = 4 * e * (np.linspace(0.02, 1, steps) ** 1.5) if not other else np.linspace(1.41, e, steps)
        error = own * grown * _noise(rng, pairs, steps)
        drift["free"] = {
            "sigmas": sigmas[1:],
            "error": error.round(6).tolist(),
            "diverged_at": [next((i for i, value in enumerate(row) if value > 0.3), None) for row in error],
            "diverged_limit": 0.3,
        }
    if "blocks" in levels and not other:
        samples = [
            {"pair": p * seeds, "step": s, "branch": b}
            for p in range(min(prompts, 8))
            for s in ((0, steps // 2, steps - 1) if steps >= 6 else (0, steps - 1))
            for b in ("text", "unconditional")
        ]
        shape = e * (1 + 0.8 * np.sin(np.linspace(0.5, 4, blocks)) + np.linspace(0, 0.6, blocks))[:, None]
        drift["blocks"] = {
            "names": [str(i) for i in range(blocks)],
            "samples": samples,
            "error": (shape * _noise(rng, blocks, len(samples))).round(6).tolist(),
        }
        drift["operators"] = {
            operator: (k * shape * _noise(rng, blocks, len(samples))).round(6).tolist()
            for operator, k in (("attn1.wqkv", 0.6), ("attn1.attention", 0.9), ("ff.net.2", 1.1))
        }
    if "video" in levels:
        errors = [e * float(o) for o in own[:, 0] * _noise(rng, pairs, 1)[:, 0]]
        psnr = [-20 * math.log10(4 * error) + 14 for error in errors]
        drift["video"] = {
            "psnr": psnr,
            "psnr_video": [p - 0.4 for p in psnr],
            "ssim": [1 - min(0.9, error * 0.6) for error in errors],
            "vmaf": [max(1.0, 100 - 120 * error) for error in errors],
            "xpsnr": [p + 1.2 for p in psnr],
            "lpips": None if other else [0.3 * error for error in errors],
            "flicker": [(-1) ** i * error for i, error in enumerate(errors)],
            "motion": [2 * error for error in errors],
        }
    if not other:
        drift["attention_backend"] = None if mode["attention"] == "official" else "torch"
    return drift if any(drift[level] for level in ("blocks", "teacher", "free", "video")) else {}


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.exp(0.08 * rng.standard_normal((rows, columns)))


def write_results(folder: Path, results: list[dict[str, Any]]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        path = folder / f"{result['id']}.json"
        path.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        paths.append(path)
    return paths


def demo_set(folder: Path, frames: bool = True, names: tuple[str, ...] = tuple(MODES), **more: Any) -> list[Path]:
    """A whole set of the demo's shape, with pictures: a moving disc, and the same with noise by the mode's error."""
    results = [make_result(name, **more) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in zip(names, results, strict=True):
        if frames and name != "other-seed":
            result["frames"] = {"file": f"{result['id']}.frames.npz", "index": [0, 5, 11, 16]}
            clip, index = disc(17, 96, MODES[name].get("error", 0.0)), [0, 5, 11, 16]
            arrays = {"index": np.array(index), "frames": clip[index], "clip": clip}
            if name != "reference":
                arrays |= {"reference_frames": disc(17, 96, 0.0)[index], "reference_clip": disc(17, 96, 0.0)}
                ends = [row[-1] for row in result["drift"]["free"]["error"]] if "free" in result["drift"] else [0.0]
                worst = ends.index(max(ends))
                result["frames"]["worst"], arrays["worst"] = worst, np.array(worst)
                if worst:
                    arrays["worst_frames"] = disc(17, 96, 1.3 * MODES[name]["error"])[::-1][index]
                    arrays["worst_reference_frames"] = disc(17, 96, 0.0)[::-1][index]
            np.savez_compressed(folder / result["frames"]["file"], **arrays)
    return write_results(folder, results)


def disc(frames: int, size: int, error: float) -> np.ndarray:
    """A red disc that moves over a blue ground; with an error, it is displaced and noisy."""
    y, x = np.mgrid[:size, :size]
    rng = np.random.default_rng(1)
    video = np.empty((frames, size, size, 3), np.float64)
    video[:] = (30, 60, 160)
    for i in range(frames):
        centre = size * (0.2 + 0.6 * i / frames + 0.3 * error)
        video[i][(x - centre) ** 2 + (y - size / 2) ** 2 < (size / 6) ** 2] = (210, 40, 40)
    video += 120 * error * rng.standard_normal(video.shape)
    return video.clip(0, 255).astype(np.uint8)


def full_size_set(folder: Path, budgets: bool = True) -> list[Path]:
    """Speed and teacher-forced error at the full size, on weights that nobody trained, and memory budgets."""
    size = {
        "model": "stepvideo-t2v",
        "num_frames": 204,
        "height": 544,
        "width": 992,
        "steps": 3,
        "synthetic": {"generator": "test data", "seed": 0},
        "blocks": 48,
        "pairs": 2,
        "step": 38.0,
    }
    names = (
        "reference",
        "floor-backend",
        "bf16 · bf16 attention",
        "int8 · int8 attention",
        "int8 · int8-fp8 attention",
        "fp8 · int8 attention",
        "nf4 · bf16 attention",
    )
    results = [make_result(name, levels=("speed", "blocks", "teacher"), **size) for name in names]
    if budgets:
        for frames in (51, 102, 204):
            for vram in ("8GB", "12GB", "24GB", "48GB"):
                own = size | {
                    "num_frames": frames,
                    "step": 38.0 * (frames / 204) ** 1.6 * (1.3 if vram == "8GB" else 1.0),
                }
                for name in ("int8 · int8-fp8 attention", "fp8 · int8 attention"):
                    results.append(make_result(name, levels=("speed",), vram=vram, **own))
    return write_results(folder, results)
