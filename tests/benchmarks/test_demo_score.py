"""The drift between precisions: identical runs read zero, and what is reported is what was made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from solostep.benchmarks import demo_score
from solostep.benchmarks.demo_score import Study, apart, drift, frame_psnr, markdown, report, run
from solostep.engine.checkpoint import open_model
from solostep.engine.demo import demo_model
from solostep.engine.demo.evaluate import Made
from solostep.engine.errors import SolostepError, UsageError
from solostep.engine.models.vae import VideoAutoencoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some(seed: int = 0) -> Made:
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (3, 5, 8, 8, 3), generator=g, dtype=torch.uint8)
    return Made(frames, torch.randn(3, 3, 4, 2, 2, generator=g))


def study(image_to_video: bool = False, **changes: Any) -> Study:
    """One prompt, one step."""
    folder = open_model(demo_model(image_to_video))
    folder = replace(folder, preset=replace(folder.preset, num_inference_steps=1))
    return Study(
        **({"folder": folder, "device": CPU, "n": 1, "seed": 3, "direct": True, "say": lambda s: None} | changes)
    )


def test_identical_videos_do_not_drift() -> None:
    a = some()
    same = {"latents": 0.0, "latents_largest": 0.0, "psnr": math.inf, "psnr_worst": math.inf}
    assert drift(a, Made(a.videos.clone(), a.latents.clone())) == same


def test_drift_is_what_it_says() -> None:
    a = some()
    videos, latents = a.videos.clone(), a.latents.clone()
    videos[1, 2] = torch.where(videos[1, 2] > 100, videos[1, 2] - 10, videos[1, 2] + 10)  # 10 everywhere: 28.13 dB
    videos[2, 4, 0, 0, 0] ^= 255
    latents[1] *= 1.3
    assert frame_psnr(videos, a.videos)[1, 2] == pytest.approx(20 * math.log10(25.5))
    assert int(frame_psnr(videos, a.videos).isinf().sum()) == 13
    found = drift(Made(videos, latents), a)
    assert found["latents"] == pytest.approx(0.1, rel=1e-6) and found["latents_largest"] == pytest.approx(0.3, rel=1e-6)
    value = abs(int(videos[2, 4, 0, 0, 0]) - int(a.videos[2, 4, 0, 0, 0]))
    both = 20 * math.log10(25.5), 10 * math.log10(255**2 * 192 / value**2)  # of the 15 frames the two that differ
    assert found["psnr_worst"] == pytest.approx(min(both)) and found["psnr"] == pytest.approx(sum(both) / 2)


def test_intervals_that_do_not_overlap_are_named() -> None:
    def table(low: float, high: float) -> dict[str, Any]:
        same = {"accuracy": 0.9, "low": 0.8, "high": 0.95}
        return {"text_to_video": {"all": {"kind": same}, "language=zh": {"kind": same | {"low": low, "high": high}}}}

    assert apart(table(0.8, 0.95), table(0.95, 0.99)) == []
    assert apart(table(0.8, 0.94), table(0.95, 0.99)) == ["kind (language=zh)"]
    assert apart(table(0.95, 0.99), table(0.8, 0.94)) == ["kind (language=zh)"]


@pytest.mark.parametrize("image_to_video", [False, pytest.param(True, marks=pytest.mark.more)])
def test_the_same_precision_twice_is_the_same_video(image_to_video: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reads zero for identical runs, and not for others; text precision counts."""

    def decode(self: VideoAutoencoder, latents: torch.Tensor) -> torch.Tensor:  # in place of seconds of convolutions
        colours = latents[:, :, :3].float().tanh().repeat_interleave(6, 1)[:, :17]
        return colours.repeat_interleave(16, 3).repeat_interleave(16, 4)

    monkeypatch.setattr(VideoAutoencoder, "decode", decode)
    one = study(image_to_video)
    (scored, base), (_, again) = one.score("bf16"), one.score("bf16")
    assert drift(again, base)["psnr"] == math.inf and drift(again, base)["latents_largest"] == 0
    assert set(demo_score.rules(scored)["all"]) >= {"kind", "colour", "background", "motion", "all"}
    for changed in (one.score("int8")[1], one.score("bf16", "nf4")[1], replace(one, seed=4).score("bf16")[1]):
        assert 1e-4 < drift(changed, base)["latents"] < 2


def test_bf16_comes_first_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def score(self: Study, precision: str, text: str | None = None) -> tuple[dict[str, Any], Made]:
        asked.append((precision, text))
        if precision == "fp8":
            raise SolostepError("blocks.0: no fp8 here; choose another --precision.")
        accuracy = {"accuracy": 1.0, "low": 0.2, "high": 1.0, "n": 1}
        aspects = ("kind", "colour", "background", "motion", "direction", "all")
        tables = {"all": dict.fromkeys(aspects, accuracy)}
        named = {"precision": precision, "text_precision": text, "seconds": 1.0}
        return named | {"text_to_video": tables}, some(0 if precision in ("bf16", "fp32") else 1)

    accuracies = {k: {"accuracy": 1.0, "low": 0.2, "high": 1.0, "n": 1} for k in demo_score.ASPECTS}
    vae = {"psnr": 30.0, "psnr_lowest": 20.0, "rules_on_clips": accuracies, "rules_on_reconstructions": accuracies}
    monkeypatch.setattr(Study, "score", score)
    monkeypatch.setattr(Study, "vae", lambda self: vae)
    one = study()
    result = run(one, ["int8", "bf16", "fp8", "fp32"], None, "the command")
    assert asked == [("bf16", None), ("int8", None), ("fp8", None), ("fp32", None)]
    assert "drift" not in result["runs"]["bf16"] and result["runs"]["int8"]["drift"]["psnr"] < 20
    assert result["runs"]["fp32"]["drift"]["psnr"] == math.inf and list(result["missing"]) == ["fp8"]
    page, screen = markdown(result), report(result)
    assert "| `bf16` | 1 of 1 [0.20, 1.00] |" in page and "the command" in page
    assert "| `fp32` |" in page and "| yes | 0.000 (0.000) | inf (inf) dB |" in page
    assert "- Not on this device: fp8: blocks.0: no fp8 here" in page and "no fp8 here" in screen
    assert "fp32 against bf16: accuracies overlap: yes; latents 0.000 (0.000)" in screen
    stored = json.loads(json.dumps(demo_score._plain(result), allow_nan=False))
    assert stored["runs"]["fp32"]["drift"]["psnr"] is None
    asked.clear()
    run(one, [None], None, "")
    assert asked == [("bf16", None)]
    asked.clear()
    run(one, ["bf16"], "nf4", "")
    assert asked == [("bf16", None), ("bf16", "nf4")]
    with pytest.raises(UsageError, match="--text-precision int9 is unknown"):
        run(one, ["int8"], "int9", "")


def test_wrong_options_end_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "vae", lambda self: pytest.fail("work was begun"))
    for arguments, words in {
        ("--precision", "int9"): "--precision int9 is unknown",
        ("--device", "tpu"): "--device tpu",
        ("--model", str(tmp_path)): str(tmp_path),
    }.items():
        with pytest.raises(SystemExit, match=words):
            demo_score.main(arguments)
