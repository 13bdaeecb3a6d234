"""The demo model's data, rules and training parts; the trained checkpoint itself has tests of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from solostep.engine.checkpoint import load, open_component, open_model
from solostep.engine.config import Preset
from solostep.engine.demo import train
from solostep.engine.demo.captions import (
    KINDS,
    MOTIONS,
    TEMPLATES,
    caption,
    combinations,
    held_out,
    held_out_pair,
    held_out_prompts,
    held_out_triple,
    possible,
)
from solostep.engine.demo.data import UNIFORMS, Painter, draw_clips, motion_score, pick, psnr, to_frames
from solostep.engine.demo.evaluate import load_network
from solostep.engine.demo.loop import Log, Optimized, Run, learning_rate
from solostep.engine.demo.nets import (
    SMOKE,
    Sizes,
    TextTable,
    as_thousandths,
    clip_states,
    context_of,
    fold_latent_scale,
    image_to_video_from,
    llm_bias,
    llm_states,
    make_text_encoders,
    make_transformer,
    make_vae,
    training_levels,
    velocity,
)
from solostep.engine.demo.rules import NO_MOTION, accuracies, read_clip, read_clips, wilson
from solostep.engine.models.transformer import rope_table

RED_CIRCLE = (0, 0, 3, 1)
ENGLISH, CHINESE = "a red circle moving right on a blue background", "一个红色的圆形在蓝色背景上向右移动"


# ---------------------------------------------------------------- captions and clips


def test_captions():
    assert caption(RED_CIRCLE, 0) == ENGLISH and caption(RED_CIRCLE, 6) == CHINESE
    assert caption((3, 1, 0, 5), 0) == "an orange star rotating on a black background"
    assert all(len({caption(a, t) for t in range(TEMPLATES)}) == TEMPLATES for a in combinations(test=False)[::100])


def test_training_and_test_sets_are_disjoint():
    trained, tested = set(combinations(test=False)), set(combinations(test=True))
    assert not trained & tested and RED_CIRCLE in trained
    assert all(possible(a) for a in trained | tested)
    # What is held out as a pair or triple is in no training clip, and every other pair and triple is in some.
    pairs, triples = {(a[0], a[1]) for a in trained}, {a[1:] for a in trained}
    assert not any(held_out_pair(*p) for p in pairs) and not any(held_out_triple(*t) for t in triples)
    assert {(a[0], a[1]) for a in tested if not held_out_pair(a[0], a[1])} <= pairs
    assert {a[1:] for a in tested if not held_out_triple(*a[1:])} <= triples


def test_held_out_prompts():
    prompts = held_out_prompts(128)
    assert prompts == held_out_prompts(128) and prompts != held_out_prompts(128, seed=1)
    assert all(held_out(p.attributes) for p in prompts)
    assert {p.language for p in prompts} == {"en", "zh"} and {p.why for p in prompts} == {"pair", "triple"}
    assert {p.attributes[0] for p in prompts} == set(range(len(KINDS)))
    assert {p.attributes[3] for p in prompts} == set(range(len(MOTIONS)))
    texts = {caption(a, t) for a in combinations(test=False) for t in range(TEMPLATES)}
    assert not texts & {p.text for p in prompts}


def test_clips_repeat_and_stay_in_the_frame():
    attributes = combinations(test=False)[::97]
    first, u = draw_clips(attributes, seed=3)
    again, _ = draw_clips(attributes, seed=3)
    other, _ = draw_clips(attributes, seed=4)
    assert torch.equal(first.video, again.video) and not torch.equal(first.video, other.video)
    assert first.video.shape == (len(attributes), 17, 3, 96, 96) and first.video.abs().max() <= 1
    border = torch.ones(96, 96, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert float(first.cover[..., border].max()) < 0.6
    assert motion_score(u).min() >= 2 and motion_score(u).max() <= 20


def test_speed_follows_the_motion_score():
    table = torch.tensor([RED_CIRCLE] * 3)
    u = torch.full((3, UNIFORMS), 0.5)
    u[:, 0] = torch.tensor([0.0, 0.5, 1.0])
    readings = read_clips(to_frames(Painter()(table, u).video))
    meant = [(0.10 + 0.24 * s) * 96 / 16 for s in (0.0, 0.5, 1.0)]
    assert [r.speed for r in readings] == pytest.approx(meant, rel=0.03)


def test_pick_covers_the_table():
    table = torch.arange(7)[:, None]
    assert pick(table, torch.tensor([0.0, 0.5, 0.999999, 1.0])).flatten().tolist() == [0, 3, 6, 6]


# ---------------------------------------------------------------- rules


def test_rules_are_right_on_drawn_clips():
    attributes = combinations(test=True)[::20] + combinations(test=False)[::70]
    clips, _ = draw_clips(attributes, seed=0)
    table = accuracies(read_clips(to_frames(clips.video)), attributes)
    assert all(row["accuracy"] >= 0.99 for row in table.values()), table


def test_rules_say_when_nothing_moves_and_when_it_is_another_clip():
    clips, _ = draw_clips([RED_CIRCLE], seed=0)
    still = to_frames(clips.video)[0, :1].repeat(17, 1, 1, 1)
    assert read_clip(still).attributes == (*RED_CIRCLE[:3], NO_MOTION)
    backwards = to_frames(clips.video)[0].flip(0)
    assert MOTIONS[read_clip(backwards).attributes[3]] == "left"
    noise = torch.randint(0, 256, (17, 96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    read_clip(noise)  # any frames at all can be read


def test_wilson():
    # Values of the closed form: 5 of 10 and 0 of 10.
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=2e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_psnr():
    a = torch.zeros(1, 2, 3, 4, 4)
    assert float(psnr(a, a + 0.2)) == pytest.approx(20.0, abs=1e-3)


# ---------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, int]]:
    root = tmp_path_factory.mktemp("tokenizers")
    captions = train.all_captions(combinations(test=False))[::7]
    return root, (train.export.write_sentencepiece(root, captions), train.export.write_wordpieces(root, captions))


def test_captions_are_known_words(tokenizers):
    """No caption falls back to bytes or unknown words, and Chinese words stay apart."""
    import sentencepiece

    from solostep.engine.text import ClipTokenizer

    root, _ = tokenizers
    llm = sentencepiece.SentencePieceProcessor(model_file=str(root / "step_llm" / "step1_chat_tokenizer.model"))
    clip = ClipTokenizer(root / "hunyuan_clip" / "tokenizer").tokenizer
    texts = [p.text for p in held_out_prompts(64)] + [ENGLISH, CHINESE]
    for text in texts:
        assert not any(piece.startswith("<0x") for piece in llm.encode(text, out_type=str))
        words = clip.convert_ids_to_tokens(clip(text)["input_ids"])
        assert "[UNK]" not in words and not any(word.startswith("##") for word in words)
    pieces = llm.encode(CHINESE, out_type=str)
    assert {"红色", "圆形", "蓝色", "背景", "向右", "移动"} <= set(pieces)
    assert llm.encode("A RED Circle") == llm.encode("a red circle")


@pytest.mark.parametrize("image_to_video", [False, True])
def test_batched_forward_equals_the_model(tokenizers, image_to_video: bool):
    """Text encoders and DiT on a batch of texts of different lengths, against one call of each module per text."""
    root, words = tokenizers
    torch.manual_seed(0)
    llm, clip = make_text_encoders(SMOKE, *words)
    model = make_transformer(SMOKE, image_to_video)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    table = TextTable.of([ENGLISH, CHINESE, ""], root, "cpu")
    assert (table.llm.shape[1] + 77) % 8 == 0 and table.lengths.tolist()[-1] == 2
    latents, condition = torch.randn(2, 3, 3, SMOKE.z_channels, 2, 2).unbind(0)
    timestep, scores = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2.0, 7.0, 20.0])
    with torch.no_grad():
        bias = llm_bias(llm, table.llm.shape[1], "cpu")
        states, pictures = llm_states(llm, table.llm, bias), clip_states(clip, table.clip, table.clip_mask)
        torch.testing.assert_close(pictures, clip(table.clip, table.clip_mask), atol=1e-5, rtol=1e-5)
        rope = rope_table((3, 2, 2), torch.float32)
        extra = (condition, scores) if image_to_video else (None, None)
        found = velocity(
            model, latents, as_thousandths(timestep, torch.float32), context_of(model, states, pictures),
            table.visible(), rope, *extra,
        )  # fmt: skip
        for i in range(3):
            padded = torch.cat([table.llm[i], torch.full((320 - table.llm.shape[1],), 2)])
            long = llm(padded[None])
            context = model.embed_text(long, pictures[i : i + 1], [77 + int(table.lengths[i])])
            more = (condition[i : i + 1], float(scores[i])) if image_to_video else ()
            alone = model(latents[i : i + 1], timestep[i : i + 1], context, *more)
            torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_image_to_video_starts_as_the_text_to_video_model(tokenizers):
    torch.manual_seed(0)
    model = make_transformer(SMOKE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = image_to_video_from(model, SMOKE)
    latents, context = torch.randn(1, 3, SMOKE.z_channels, 2, 2), [torch.randn(1, 5, 128)]
    with torch.no_grad():
        expected = model(latents, torch.tensor([0.3]), context)
        found = made(latents, torch.tensor([0.3]), context, torch.randn_like(latents), 9.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_latent_scale_folds_exactly():
    """In fp64: scaled latents, the same reconstruction, and log variances that move with the scale."""
    torch.manual_seed(0)
    vae = make_vae(SMOKE).double()
    video = (torch.rand(1, 17, 3, 16, 32) * 2 - 1).double()
    scale = torch.tensor([0.5, 1.7, 0.9, 3.0], dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        back = vae.decode(mean)
        fold_latent_scale(vae, scale)
        scaled, shifted = vae.encode(video)
        wide = scale.view(1, 1, -1, 1, 1)
        torch.testing.assert_close(scaled, mean * wide, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(shifted, logvar + 2 * wide.log(), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(vae.decode(scaled), back, atol=1e-10, rtol=1e-9)


def test_noise_levels_and_schedule():
    sigma = training_levels(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    assert 0 <= sigma.min() and sigma.max() <= 1 and float(sigma.mean()) < 0.45  # shifted towards noise, 0
    assert learning_rate(0.5, 1000) == 1 and learning_rate(0.8, 1000) == pytest.approx(0.5)
    assert learning_rate(1.0, 1000) == 0.02 and learning_rate(0.0, 0) == 0.01


def test_training_goes_on_from_its_checkpoint(tmp_path: Path):
    """A stage that was stopped has its weights, moments and time back; steps then follow a lower learning rate."""
    torch.manual_seed(0)

    def make(seconds: float) -> Run:
        layer = torch.nn.Linear(4, 1)
        optimized = Optimized(layer, torch.float32, rate=0.1, ema=0.9)
        data = torch.randn(8, 4)
        loss = lambda: ((layer(data) - data.sum(1, keepdim=True)).square().mean(), {})  # noqa: E731
        return Run(
            optimized, lambda: None, loss, Log(tmp_path / "log.jsonl", "test"), time.monotonic() + seconds,
            tmp_path / "state.pt", max_steps=50, warmup=1,
        )  # fmt: skip

    first = make(60.0)
    first.train()
    first._save(30.0)
    again = make(60.0)
    again.max_steps = 50  # nothing is left to do: the counter goes on at 50
    again.train()
    assert again.optimized.steps == 50 and 29 < 60 - (again.deadline - time.monotonic()) < 35
    assert all(torch.equal(a, b) for a, b in zip(first.optimized.state(), again.optimized.state(), strict=True))
    assert torch.equal(again.optimized.params[0], again.optimized.masters[0])


def test_a_broken_loss_goes_back(tmp_path: Path):
    """After a loss that is not a number, weights are those of the last good state."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    calls = [0]

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        calls[0] += 1
        value = layer(torch.ones(2, 4)).square().mean()
        return value * (float("nan") if calls[0] > 5 else 1.0), {}

    optimized = Optimized(layer, torch.float32, rate=0.1, ema=0.9)
    run = Run(optimized, lambda: None, loss, Log(tmp_path / "log.jsonl", "test"), time.monotonic() + 60, tmp_path / "s")
    run.max_steps = 9
    run.train()
    assert all(torch.isfinite(t).all() for t in [*optimized.masters, *optimized.ema, *optimized.params])


def test_sizes_of_the_demo_fit():
    """bf16 bytes of the full size: each file under 16 MB, text-to-video under 24 MB, both under 40 MB."""
    from solostep.engine.demo.nets import count

    sizes = Sizes()
    llm, clip = make_text_encoders(sizes, 512, 512)
    first, second = (2 * count(make_transformer(sizes, flag)) for flag in (False, True))
    shared = 2 * (count(llm) + count(clip)) + 0.3e6  # tokenizers and configurations
    vae = 7.64e6  # checked against the written file when it is trained
    assert max(first, second) < 16e6 and first + shared + vae < 24e6 and first + second + shared + vae < 40e6


# ---------------------------------------------------------------- the whole of it


@pytest.mark.more  # 15 s; its parts are tested above
def test_smoke_makes_a_whole_model(tmp_path: Path):
    """All three stages; the folders are the released layout, load strictly and keep their scale."""
    train.main(["--out", str(tmp_path), "--smoke", "--device", "cpu"])
    folder = open_model(tmp_path / "t2v")
    assert not folder.is_image_to_video
    index = json.loads((tmp_path / "t2v" / "model_index.json").read_text(encoding="utf-8"))
    assert folder.preset == Preset(**index["solostep"]["defaults"])
    for component in folder.components.values():
        assert component.dtypes == ["BF16"]
        load(component, "cpu", torch.float32)
    names = {f.relative_to(tmp_path / "t2v").as_posix() for f in (tmp_path / "t2v").rglob("*") if f.is_file()}
    assert {"transformer/diffusion_pytorch_model.safetensors", "vae/vae_v2.safetensors", "vae/config.json",
            "step_llm/model.safetensors", "step_llm/step1_chat_tokenizer.model", "model_index.json",
            "hunyuan_clip/clip_text_encoder/model.safetensors", "hunyuan_clip/tokenizer/vocab.txt",
            "scheduler/scheduler_config.json"} <= names  # fmt: skip

    second = open_component(tmp_path / "ti2v", "transformer")
    assert second.config["use_additional_conditions"] is True
    assert sorted(p.name for p in (tmp_path / "ti2v").iterdir()) == ["model_index.json", "scheduler", "transformer"]
    load_network(tmp_path / "ti2v", "vae", torch.device("cpu"), torch.float32)
    assert open_model(tmp_path / "ti2v").is_image_to_video

    events = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {e["stage"] for e in events} == {"vae", "t2v", "ti2v"}
    assert [e["std_after"] for e in events if e["event"] == "latent scale"] == [pytest.approx([1.0] * 4, abs=1e-3)]
