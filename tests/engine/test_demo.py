"""The embedded demo model through the pipeline: a prompt is what the frames show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solostep import StepVideoPipeline
from solostep.engine.checkpoint import open_model
from solostep.engine.demo import demo_model
from solostep.engine.demo.captions import held_out_prompts
from solostep.engine.demo.data import draw_clips
from solostep.engine.demo.rules import read_clips

# A third of the default steps: as right, and the tests take a third of the time.
QUICK: dict[str, Any] = {"num_inference_steps": 8, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipe() -> StepVideoPipeline:
    """Loaded once for all tests."""
    return StepVideoPipeline.from_pretrained(device="cpu", keep_loaded=True)


def test_a_red_circle_moving_right_on_blue_in_both_languages(pipe: StepVideoPipeline) -> None:
    english = "a red circle moving right on a blue background"
    for prompt in (english, "一个红色的圆形在蓝色背景上向右移动"):
        frames = pipe(prompt, seed=1, output_type="np", **QUICK).astype(float)
        assert frames.shape == (17, 96, 96, 3)
        red, green, blue = frames[..., 0], frames[..., 1], frames[..., 2]
        shape = (red > 150) & (green < 100) & (blue < 100)
        border = frames[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=(0, 1))
        assert border[2] > border[0] + 60 and border[2] > border[1] + 60
        centres = [np.argwhere(s).mean(axis=0) for s in shape]
        assert centres[-1][1] > centres[0][1] + 5  # to the right
        assert abs(centres[-1][0] - centres[0][0]) < 3  # and neither up nor down
        # A circle fills pi / 4 of its bounding box, and the box is a square.
        rows, columns = np.where(shape[8])
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.85 < height / width < 1.18
        assert 0.72 < shape[8].sum() / (height * width) < 0.86


@pytest.mark.more
def test_held_out_prompts_are_followed(pipe: StepVideoPipeline) -> None:
    """Combinations that training never showed; measured over hundreds, spot-checked here."""
    prompts = held_out_prompts(4)
    videos = [torch.from_numpy(pipe(p.text, seed=3, output_type="np", **QUICK)) for p in prompts]
    for reading, prompt in zip(read_clips(videos), prompts, strict=True):
        assert reading.attributes == prompt.attributes, prompt.text


def test_seeds_and_prompts_make_the_video(pipe: StepVideoPipeline) -> None:
    """As latents: decoding takes most of a video's time, and other tests look at frames."""
    star, ring = "a green star moving up on a black background", "a yellow ring rotating on a white background"
    first, again, reseeded, other = (
        pipe(prompt, seed=seed, output_type="latent", **QUICK)
        for prompt, seed in ((star, 1), (star, 1), (star, 2), (ring, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, reseeded)
    assert float((first - other).norm()) > 0.5 * float(first.norm())


def test_image_to_video_keeps_its_first_frame_and_follows_the_motion_score() -> None:
    pipe = StepVideoPipeline.from_pretrained(demo_model(image_to_video=True), device="cpu", keep_loaded=True)
    prompt = next(p for p in held_out_prompts(64) if p.attributes[3] < 4)  # moves in one of the four directions
    batch, _ = draw_clips([prompt.attributes], 5, "cpu", 96)
    image = batch.video[0, 0]
    speeds = []
    for score in (3.0, 18.0):
        frames = torch.from_numpy(pipe(prompt.text, image=image, motion_score=score, seed=2, output_type="np", **QUICK))
        first = frames[0].permute(2, 0, 1).float() / 127.5 - 1
        assert float((first - image).square().mean()) < 4 * 10**-2.6  # 26 dB
        speeds.append(read_clips([frames])[0].speed)
    assert speeds[1] > 1.5 * speeds[0]


def test_sizes_and_layout() -> None:
    def size(root: Path) -> int:
        return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())

    text, image = demo_model(), demo_model(image_to_video=True)
    assert size(text) <= 24_000_000
    assert size(text) + size(image) <= 40_000_000
    assert max(f.stat().st_size for root in (text, image) for f in root.rglob("*") if f.is_file()) <= 16_000_000
    t2v, ti2v = open_model(text), open_model(image)
    assert not t2v.is_image_to_video
    assert ti2v.is_image_to_video
    assert t2v.transformer_config.num_layers >= 6
    assert t2v.transformer_config.num_attention_heads >= 2
    for name in ("vae", "step_llm", "hunyuan_clip"):
        assert ti2v.components[name].folder == t2v.components[name].folder
