"""The Python interface on the tiny checkpoints: what a video depends on, and what it must not depend on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from separate import run_separately

import solostep.engine.stages as stages_module
from solostep import StepVideoPipeline
from solostep.engine import memory, streaming, text
from solostep.engine.config import PRESETS, GenerationSettings, Preset
from solostep.engine.errors import CheckpointError, UsageError
from solostep.engine.image import load_image
from solostep.engine.request import Video
from solostep.engine.sampling import initial_noise
from solostep.engine.video import read_frames, read_metadata

pytestmark = pytest.mark.usefixtures("fast")

GOLDEN = Path(__file__).parents[1] / "golden"
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
SMALL: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 3, "progress": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipe() -> StepVideoPipeline:
    return StepVideoPipeline.from_pretrained(T2V, device="cpu")


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:70]
    return np.stack([x * 3, y * 5, x + y], axis=-1).astype(np.uint8)


def latents_of(pipe: StepVideoPipeline, prompt: str = "a red panda", **changes: Any) -> torch.Tensor:
    return pipe(prompt, **({"seed": 7, **SMALL, "output_type": "latent"} | changes))


# --- what a video depends on --------------------------------------------------------------------------------------


def test_same_seed_same_bits(pipe: StepVideoPipeline) -> None:
    first, second = (pipe("a red panda", seed=7, **SMALL) for _ in range(2))
    assert np.array_equal(first.frames, second.frames)
    assert torch.equal(first.latents, second.latents)
    assert first.frames.shape == (17, 32, 48, 3)
    assert first.frames.dtype == np.uint8
    assert first.frames.std() > 5
    fresh = StepVideoPipeline.from_pretrained(T2V, device="cpu", cache=False)
    assert np.array_equal(fresh("a red panda", seed=7, **SMALL).frames, first.frames)


def test_every_input_matters(pipe: StepVideoPipeline) -> None:
    base = latents_of(pipe)
    changes: list[dict[str, Any]] = [
        {"prompt": "a blue bird"}, {"seed": 8}, {"negative_prompt": "fog"}, {"guidance_scale": 4.0},
        {"time_shift": 5.0}, {"num_inference_steps": 4}, {"raw_prompt": True},
    ]  # fmt: skip
    results = [base] + [latents_of(pipe, **change) for change in changes]
    for i, a in enumerate(results):
        assert bool(torch.isfinite(a).all())
        for b in results[:i]:
            assert not torch.equal(a, b)
    fp32 = latents_of(StepVideoPipeline.from_pretrained(T2V, precision="fp32", device="cpu"))
    difference = float((fp32 - base).norm() / base.norm())
    assert 0 < difference < 0.2


def test_order_in_a_batch_changes_nothing(pipe: StepVideoPipeline) -> None:
    """The n-th video has seed + n, so a and b are asked for with the seeds that make them alike."""
    small = SMALL | {"output_type": "latent"}
    alone = pipe("b", seed=5, **small)
    assert torch.equal(pipe(["a", "b"], seed=4, **small)[1], alone)
    assert torch.equal(pipe(["b", "a"], seed=5, **small)[0], alone)
    assert torch.equal(pipe("b", seed=3, num_videos_per_prompt=3, **small)[2], alone)


def test_without_guidance_there_is_one_branch(pipe: StepVideoPipeline) -> None:
    one = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(one, latents_of(pipe, guidance_scale=1.0, negative_prompt="fog"))
    assert torch.equal(one, latents_of(pipe, guidance_scale=0.5))


def test_noise_is_the_same_in_every_precision() -> None:
    settings = GenerationSettings(num_frames=17, height=32, width=48)
    noise, _ = initial_noise(settings, 4, seed=1)
    assert noise.shape == (1, 3, 4, 2, 3)
    assert torch.equal(noise, noise.bfloat16().float())
    assert not torch.equal(noise, initial_noise(settings, 4, seed=2)[0])


def test_given_noise(pipe: StepVideoPipeline) -> None:
    channels = pipe.model.transformer_config.in_channels
    noise, _ = initial_noise(GenerationSettings(num_frames=17, height=32, width=48), channels, seed=7)
    assert torch.equal(latents_of(pipe, latents=noise, seed=99), latents_of(pipe))
    with pytest.raises(UsageError, match=r"have to have \[1, 3, 2, 2, 3\]"):
        latents_of(pipe, latents=noise[:, :2])


def test_image_to_video(picture: np.ndarray, tmp_path: Path) -> None:
    from PIL import Image

    pipe = StepVideoPipeline.from_pretrained(TI2V, device="cpu")
    Image.fromarray(picture).save(tmp_path / "first.png")
    base = latents_of(pipe, image=tmp_path / "first.png")
    assert torch.equal(base, latents_of(pipe, image=picture))
    assert torch.equal(base, latents_of(pipe, image=Image.fromarray(picture)))
    assert not torch.equal(base, latents_of(pipe, image=picture[::-1].copy()))
    assert not torch.equal(base, latents_of(pipe, image=picture, motion_score=12.0))
    with pytest.raises(UsageError, match="--image"):
        latents_of(pipe)
    with pytest.raises(UsageError, match="text-to-video"):
        latents_of(StepVideoPipeline.from_pretrained(T2V, device="cpu"), image=picture)


def test_transparent_and_turned_images(tmp_path: Path) -> None:
    from PIL import Image

    clear = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    assert float(load_image(clear).min()) == 1.0  # laid on white
    turned = Image.new("RGB", (8, 6))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 8, 6)


# --- what the user is told ----------------------------------------------------------------------------------------


def test_rounding_is_official_and_said() -> None:
    settings = GenerationSettings(num_frames=100, height=545, width=1000)
    assert (settings.num_frames, settings.height, settings.width) == (85, 544, 992)
    assert (settings.latent_frames, settings.latent_height, settings.latent_width) == (15, 34, 62)
    assert len(settings.notes) == 3
    assert GenerationSettings(num_frames=16).num_frames == GenerationSettings(num_frames=16).latent_frames == 1
    assert GenerationSettings().notes == ()


def test_warnings() -> None:
    assert "trained" in GenerationSettings(num_frames=221).notes[0]
    assert "2 to 20" in GenerationSettings(motion_score=21, image_to_video=True).notes[0]
    assert GenerationSettings(motion_score=21).notes == ()
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    with pytest.warns(UserWarning, match="rounded down to 17"):
        latents_of(pipe, num_frames=20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_frames": 0}, {"height": 15}, {"width": -16}, {"num_inference_steps": 0}, {"time_shift": 0.0},
        {"guidance_scale": float("nan")}, {"motion_score": -1}, {"num_frames": 17.5}, {"height": True},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        GenerationSettings(**wrong)


@pytest.mark.parametrize(
    ("prompt", "wrong", "said"),
    [
        ("a", {"seed": "7"}, "seed"), ("a", {"seed": 1.5}, "seed"), (None, {}, "prompt is empty"),
        (7, {}, "prompt has to be text"), (["a", 7], {}, "prompt has to be text"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_call(pipe: StepVideoPipeline, prompt: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pipe(prompt, **SMALL, **wrong)


def test_a_plan_takes_what_a_call_takes_but_the_prompt(pipe: StepVideoPipeline) -> None:
    # Not the budget: what memory is free differs from call to call.
    asked, plain = pipe.plan(num_frames=17, seed=1, raw_prompt=True), pipe.plan(num_frames=17)
    assert asked.stages == plain.stages and asked.blocks == plain.blocks
    with pytest.raises(UsageError, match="leave prompt out"):
        pipe.plan(prompt="a cat")


def test_a_pipeline_and_a_video_are_shown_in_a_line(pipe: StepVideoPipeline) -> None:
    video = Video(np.zeros((17, 32, 48, 3), np.uint8), {"seed": 7}, torch.zeros(1))
    assert repr(video) == "<Video: 17 frames of 32x48, seed 7>"
    assert repr(pipe) == f"<StepVideoPipeline: {T2V}, bf16, cpu>"


def test_presets_and_their_texts(pipe: StepVideoPipeline) -> None:
    request = pipe.request("a cat")
    assert request.prompt == "a cat" + PRESETS["t2v"].positive
    assert request.negative == PRESETS["t2v"].negative
    assert request.settings.num_inference_steps == 50
    assert pipe.request("a cat", "fog").negative == "fog" + PRESETS["t2v"].negative
    raw = pipe.request("a cat", raw_prompt=True)
    assert (raw.prompt, raw.negative) == ("a cat", "")
    turbo = StepVideoPipeline.from_pretrained(T2V, device="cpu", preset="turbo").request("a cat").settings
    assert (turbo.num_inference_steps, turbo.guidance_scale, turbo.time_shift) == (15, 5.0, 17.0)
    assert pipe.request("a cat").settings.notes == ()
    (note,) = pipe.request("a cat", motion_score=15).settings.notes
    assert "motion_score has no effect" in note
    conditioned = StepVideoPipeline.from_pretrained(TI2V, device="cpu").model.preset
    assert (conditioned.name, conditioned.num_frames) == ("ti2v", 102)
    with pytest.raises(CheckpointError, match="speed"):
        Preset().updated({"speed": 3}, "model_index.json")


def test_record_repeats_the_video(pipe: StepVideoPipeline, tmp_path: Path) -> None:
    video = pipe("a red panda", negative_prompt="fog", **SMALL)
    record = json.loads(json.dumps(video.record))
    settings = {k: record["settings"][k] for k in ("num_frames", "height", "width", "num_inference_steps")}
    again = pipe(record["prompt"], record["negative_prompt"], seed=record["seed"], progress=False, **settings)
    assert np.array_equal(again.frames, video.frames)
    stages = {s["stage"]: s for s in record["stages"]}
    assert set(stages) == {"text", "load transformer", "denoise", "load vae", "decode and write"}
    assert all(s["seconds"] >= 0 for s in stages.values())
    if sys.platform == "linux":
        assert all(s["host_peak_bytes"] > 1e7 for s in stages.values())
    assert Path(record["latents_file"]).exists()
    path = video.save(tmp_path / "film.mp4", codec="lossless")
    assert np.array_equal(read_frames(path), video.frames)
    described = read_metadata(path)
    assert described is not None
    assert (described["prompt"], described["seed"]) == ("a red panda", record["seed"])
    assert str(T2V.parent) not in json.dumps(described)
    assert read_metadata(video.save(tmp_path / "bare.mp4", metadata=False)) is None


def test_output_types(pipe: StepVideoPipeline) -> None:
    video = pipe("a cat", seed=1, **SMALL)
    assert np.array_equal(pipe("a cat", seed=1, output_type="np", **SMALL), video.frames)
    assert torch.equal(pipe("a cat", seed=1, output_type="latent", **SMALL), video.latents)
    with pytest.raises(UsageError, match="output_type"):
        pipe("a cat", output_type="gif", **SMALL)


# --- steps, resuming ----------------------------------------------------------------------------------------------


def test_callback_sees_and_changes_steps(pipe: StepVideoPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(p: StepVideoPipeline, step: int, timestep: float, values: dict[str, torch.Tensor]) -> None:
        assert p is pipe
        assert values["latents"].dtype == torch.float32
        seen.append((step, timestep))

    base = latents_of(pipe, callback_on_step_end=watch)
    assert [s for s, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 0.0
    assert torch.equal(base, latents_of(pipe))
    halved = latents_of(pipe, callback_on_step_end=lambda p, i, t, v: {"latents": v["latents"] / 2} if i == 2 else None)
    assert torch.equal(halved, base / 2)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("seed", "step"),
    [(7, 0), (None, 1), (7, 2), *(pytest.param(*c, marks=pytest.mark.more) for c in ((None, 0), (7, 1), (None, 2)))],
)
def test_resumes_with_the_same_bits(pipe: StepVideoPipeline, step: int, seed: int | None) -> None:
    def stop(p: StepVideoPipeline, i: int, t: float, v: dict[str, torch.Tensor]) -> None:
        if i == step:
            raise Stop

    with pytest.raises(Stop):
        latents_of(pipe, seed=seed, callback_on_step_end=stop)
    done: list[int] = []
    small = SMALL | {"callback_on_step_end": lambda p, i, t, v: done.append(i)}
    video = StepVideoPipeline.from_pretrained(T2V, device="cpu")("a red panda", seed=seed, **small)
    assert done == list(range(step + 1, 3))
    assert video.record["resumed_from_step"] == step + 1
    assert torch.equal(video.latents, latents_of(pipe, seed=video.record["seed"]))


def test_finished_runs_are_not_resumed(pipe: StepVideoPipeline) -> None:
    latents_of(pipe)
    done: list[int] = []
    latents_of(pipe, callback_on_step_end=lambda p, i, t, v: done.append(i))
    assert done == [0, 1, 2]


def test_other_settings_do_not_resume(pipe: StepVideoPipeline, tmp_path: Path) -> None:
    def stop(p: StepVideoPipeline, i: int, t: float, v: dict[str, torch.Tensor]) -> None:
        raise Stop

    path = tmp_path / "mine.latents.safetensors"
    with pytest.raises(Stop):
        latents_of(pipe, latents_path=path, callback_on_step_end=stop)
    with pytest.raises(UsageError, match="differs in prompt"):
        latents_of(pipe, "another prompt", latents_path=path)
    with pytest.raises(UsageError, match="differs in seed"):
        latents_of(pipe, latents_path=path, seed=8)
    with pytest.raises(UsageError, match="differs in settings"):
        latents_of(pipe, latents_path=path, time_shift=2.0)
    latents_of(pipe, latents_path=path)


def test_a_failed_decode_keeps_the_latents(pipe: StepVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(stages_module, "decode_chunks", fail)
        pipe("a red panda", seed=7, **SMALL)
    done: list[int] = []
    video = pipe("a red panda", seed=7, **SMALL, callback_on_step_end=lambda p, i, t, v: done.append(i))
    assert done == []
    assert torch.equal(video.latents, latents_of(pipe))


def test_little_memory_decodes_frame_by_frame(pipe: StepVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same video, but for the last bit of rounding; and it is said."""
    whole = pipe("a red panda", seed=7, **SMALL)
    said: list[str] = []
    seen: list[Any] = []
    real = stages_module.decode_chunks

    def watch(decoder: Any, latents: torch.Tensor, frames: int | None, strips: int, **more: Any) -> Any:
        seen.append((frames, strips))
        return real(decoder, latents, frames, strips, **more)

    monkeypatch.setattr(stages_module, "decode_chunks", watch)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(stages_module.log, "warning", lambda text, *values: said.append(text % values))
    found = pipe("a red panda", seed=7, **SMALL)
    assert seen == [(1, 16)] and any("takes 0.0" in line for line in said)
    assert "frame by frame in 16 strips" in found.record["events"][0]
    assert np.abs(found.frames.astype(int) - whole.frames.astype(int)).max() <= 2


def test_two_processes_do_not_share_a_run(pipe: StepVideoPipeline, tmp_path: Path) -> None:
    path = tmp_path / "mine.latents.safetensors"
    other = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    refused: list[str] = []

    def intrude(p: StepVideoPipeline, i: int, t: float, v: dict[str, torch.Tensor]) -> None:
        code = (
            "import sys; from solostep import StepVideoPipeline, UsageError\n"
            f"pipe = StepVideoPipeline.from_pretrained({str(T2V)!r}, device='cpu')\n"
            "try:\n"
            f"    pipe('a red panda', seed=7, num_frames=17, height=32, width=48, num_inference_steps=3,"
            f" latents_path={str(path)!r}, progress=False)\n"
            "except UsageError as error: print(error)\n"
        )
        if i == 0:
            refused.append(run_separately(code, tmp_path, SOLOSTEP_CACHE=os.environ["SOLOSTEP_CACHE"]))

    latents_of(other, latents_path=path, callback_on_step_end=intrude)
    assert "Another process" in refused[0]


def test_finished_latents_in_the_cache_are_limited(pipe: StepVideoPipeline, cache: Path) -> None:
    from solostep.engine.request import prune

    for i in range(5):
        latents_of(pipe, seed=i, num_inference_steps=1)
    files = sorted((cache / "runs").glob("*"), key=lambda p: p.stat().st_mtime)
    assert len(files) == 5
    for age, file in enumerate(files):
        os.utime(file, (age, age))
    prune(cache / "runs", keep=2)
    assert sorted((cache / "runs").glob("*")) == sorted(files[-2:])


# --- what is loaded, and when --------------------------------------------------------------------------------------


def test_stages_free_what_they_no_longer_need(pipe: StepVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time do text encoders, DiT and VAE stand in memory together."""
    import gc
    import weakref

    alive: dict[str, weakref.ref[torch.nn.Module]] = {}
    together: list[set[str]] = []
    real, real_each = stages_module.load, text.load_each

    def watched(component: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        gc.collect()
        together.append({component.name} | {n for n, ref in alive.items() if ref() is not None})
        module = real(component, *args, **kwargs)
        alive[component.name] = weakref.ref(module)
        return module

    def watched_each(component: Any, *args: Any, **kwargs: Any) -> Iterator[torch.nn.Module]:
        for layer in real_each(component, *args, **kwargs):
            alive[component.name] = weakref.ref(layer)
            yield layer

    monkeypatch.setattr(text, "load_each", watched_each)
    for module in (stages_module, streaming, text):
        monkeypatch.setattr(module, "load", watched)
    pipe("a red panda", seed=7, **SMALL)
    assert together == [{"step_llm"}, {"hunyuan_clip"}, {"transformer"}, {"vae"}]
    gc.collect()
    assert all(ref() is None for ref in alive.values())


def test_many_videos_load_the_dit_once(pipe: StepVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = stages_module.load

    def watched(component: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        loaded.append(component.name)
        return real(component, *args, **kwargs)

    for module in (stages_module, streaming, text):
        monkeypatch.setattr(module, "load", watched)
    tiny = SMALL | {"height": 16, "width": 16, "num_inference_steps": 1}
    pipe(["a", "b", "c"], seed=1, **tiny)
    assert loaded.count("transformer") == loaded.count("step_llm") == 1
    assert not pipe._networks
    # Too little memory for the DiT beside the decoder: it leaves before each decoding, and comes back.
    loaded.clear()
    monkeypatch.setattr(memory, "free_memory", lambda device: 10)
    pipe(["a", "b"], seed=1, **tiny)
    assert loaded.count("transformer") == 2


def test_keep_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu", keep_loaded=True)
    base = latents_of(pipe)
    for module in (stages_module, streaming):
        monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("loaded again"))
    assert torch.equal(latents_of(pipe), base)


def test_embeddings_are_cached_by_prompt_encoder_and_precision(
    pipe: StepVideoPipeline, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = latents_of(pipe)
    count = len(list((cache / "embeddings").iterdir()))
    assert count == 2  # the prompt and the negative prompt
    monkeypatch.setattr(text, "load", lambda *a, **k: pytest.fail("an encoder was loaded"))
    assert torch.equal(latents_of(pipe), base)
    monkeypatch.undo()
    monkeypatch.setenv("SOLOSTEP_CACHE", str(cache))
    latents_of(StepVideoPipeline.from_pretrained(T2V, device="cpu", precision="fp32"))
    assert len(list((cache / "embeddings").iterdir())) == 2 * count
    latents_of(pipe, "another")
    assert len(list((cache / "embeddings").iterdir())) == 2 * count + 1


def test_damaged_cache_entries_are_made_again(pipe: StepVideoPipeline, cache: Path) -> None:
    base = latents_of(pipe)
    for path in (cache / "embeddings").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(latents_of(pipe), base)


def test_an_embedding_does_not_depend_on_its_company(pipe: StepVideoPipeline) -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():
        alone = text.encode_prompts(pipe.model, ["b"], cpu, torch.bfloat16, None)["b"]
        among = text.encode_prompts(pipe.model, ["a longer prompt", "b", "c"], cpu, torch.bfloat16, None)["b"]
    assert torch.equal(alone.llm, among.llm)
    assert torch.equal(alone.clip, among.clip)
    assert alone.length == among.length


def test_long_prompts_are_cut_and_said(pipe: StepVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    latents_of(pipe, "a red panda walks. " * 100, num_inference_steps=1)
    assert "its end is cut off" in caplog.text
