"""Drawn weights: the same bits for a seed, the statistics that are said, a folder that the pipeline opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from solostep.benchmarks import synthetic
from solostep.benchmarks.activation_statistics import distribution, record, summary
from solostep.benchmarks.synthetic import (
    GENERATOR,
    MARKER,
    TARGETS,
    Drawn,
    draw_block,
    draw_network,
    draw_shell,
    marker,
    write,
)
from solostep.benchmarks.synthetic_samples import SyntheticSamples, noisy_video
from solostep.benchmarks.synthetic_table import COLUMNS, normal_block, normal_shell, table
from solostep.benchmarks.whole_pipeline import RELEASED, TOKENIZERS, Sizes
from solostep.engine.checkpoint import open_model
from solostep.engine.config import GenerationSettings, StepLLMConfig, TransformerConfig, VAEConfig
from solostep.engine.errors import UsageError
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.runtime import numerics
from solostep.engine.weights import load

pytestmark = pytest.mark.usefixtures("fast")
CPU = torch.device("cpu")
NARROW = TransformerConfig(
    num_attention_heads=2, num_layers=3, in_channels=4, out_channels=4, caption_channels=(48, 32)
)
CLIP = GenerationSettings(num_frames=17, height=96, width=96, num_inference_steps=10)


def _same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    return mine.keys() == other.keys() and all(torch.equal(p, other[n]) for n, p in mine.items())


def test_a_seed_means_one_set_of_weights_whole_or_block_by_block() -> None:
    whole = draw_network(lambda: StepVideoTransformer(NARROW), CPU, seed=3)
    drawn = Drawn(NARROW, 3, CPU)
    assert _same(whole.transformer_blocks[1], draw_block(drawn, 1))
    assert not _same(whole.transformer_blocks[0], draw_block(drawn, 1))
    assert not torch.equal(draw_block(Drawn(NARROW, 4, CPU), 1).attn1.wo.weight, draw_block(drawn, 1).attn1.wo.weight)
    shell = draw_shell(drawn)
    assert torch.equal(shell.proj_out.weight, whole.proj_out.weight)
    assert all(p.is_meta for p in shell.transformer_blocks.parameters())
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}


def test_rows_of_a_matrix_do_not_see_the_direction_that_they_are_blind_to() -> None:
    drawn = Drawn(NARROW, 0, CPU)
    blind = torch.randn(512, generator=torch.Generator().manual_seed(1))
    seen = drawn.matrix("x", torch.ones(64), torch.full((512,), 512**-0.5)).float() @ (blind / blind.norm())
    unseen = drawn.matrix("x", torch.ones(64), torch.full((512,), 512**-0.5), blind).float() @ (blind / blind.norm())
    assert 0.02 < seen.std() < 0.08
    assert unseen.abs().max() < 1e-3


def test_what_is_measured_of_known_distributions() -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    plain = distribution(x)
    assert plain["kurtosis"] == pytest.approx(3, abs=0.1)
    assert plain["small"] == pytest.approx(0.0797, abs=0.005)
    assert plain["outliers"] == 0
    assert plain["mean"] < 0.01
    x[:, 5] = 30 + 0 * x[:, 5]
    far = distribution(x)
    assert far["outliers"] == pytest.approx(1 / 64)
    assert far["channels"] == pytest.approx(30 / 3.6, rel=0.1)
    assert far["mean"] == pytest.approx(900 / (900 + 63), abs=0.01)


def test_activations_are_as_the_targets_say_and_those_of_normal_weights_are_not() -> None:
    with numerics():
        found = summary(record(SyntheticSamples(NARROW, CLIP, 0, CPU, times=2), [0, 3]))
        normal = summary(record(SyntheticSamples(NARROW, CLIP, 0, CPU, 1, 2, normal_block, normal_shell), [0, 3]))
    outside = {k: found[k[0]][k[1]] for k, (low, high) in TARGETS.items() if not low <= found[k[0]][k[1]] <= high}
    assert outside == {}
    missed = [k for k, (low, high) in TARGETS.items() if not low <= normal[k[0]][k[1]] <= high]
    assert len(missed) >= 6
    text = table({"synthetic": found, "normal": normal})
    assert len(text.splitlines()) == len(COLUMNS) + 2


def test_latents_are_noise_at_first_and_smooth_at_last() -> None:
    early, late = (noisy_video(CLIP, 4, sigma, 7) for sigma in (0.0, 1.0))
    assert early.shape == late.shape == (1, 3, 4, 6, 6)
    assert torch.equal(late, noisy_video(CLIP, 4, 1.0, 7))

    def neighbours(x: torch.Tensor) -> float:
        x = x - x.mean((1, 3, 4), keepdim=True)
        return float((x[..., 1:] * x[..., :-1]).mean() / x.square().mean())

    assert abs(neighbours(early)) < 0.2
    assert neighbours(late) > 0.3


def test_a_folder_says_that_its_weights_were_drawn_and_holds_them(tmp_path: Path) -> None:
    clip = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 1024, "max_position_embeddings": 128, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "model_type": "bert", "pad_token_id": 0,
    }  # fmt: skip
    config = TransformerConfig(
        num_attention_heads=1, num_layers=2, in_channels=2, out_channels=2, caption_channels=(48, 32)
    )  # fmt: skip
    llm = StepLLMConfig(48, 1, 4, 2, 128, 1e-5, 1024)
    vae = VAEConfig.from_dict(json.loads((TOKENIZERS / "vae" / "config.json").read_text()))
    folder = tmp_path / "model"
    write(folder, "int8", "bf16", 5, CPU, Sizes(config, llm, vae, clip))
    assert marker(folder) == {"generator": GENERATOR, "seed": 5}
    model = open_model(folder)
    assert model.components["transformer"].quantization.precision == "int8"
    loaded = load(model.components["transformer"], CPU, torch.bfloat16)
    drawn = Drawn(config, 5, CPU)
    assert torch.equal(loaded.transformer_blocks[1].norm1.weight, draw_block(drawn, 1).norm1.weight)
    weight = draw_block(drawn, 1).attn1.wo.weight.float()
    error = (loaded.transformer_blocks[1].attn1.wo.dequantized() - weight).norm() / weight.norm()
    assert 0 < error < 0.02
    with pytest.raises(UsageError, match="there already"):
        write(folder, "int8", "bf16", 5, CPU)
    torch.rand(1)  # made anew, wherever that process is with its random numbers, it is the same model
    write(tmp_path / "again", "int8", "bf16", 5, CPU, Sizes(config, llm, vae, clip))
    again = {name: c.fingerprint for name, c in open_model(tmp_path / "again").components.items()}
    assert again == {name: c.fingerprint for name, c in model.components.items()}


def test_a_marker_tells_whether_a_first_frame_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "make", lambda folder, *_: folder.mkdir())
    for name, also in (("t2v", False), ("ti2v", True)):
        write(tmp_path / name, "bf16", "int8", 3, CPU, Sizes(TransformerConfig(use_additional_conditions=also)))
    assert marker(tmp_path / "t2v") == {"generator": GENERATOR, "seed": 3}
    assert marker(tmp_path / "ti2v") == {"generator": GENERATOR, "seed": 3, "image_to_video": True}


def test_image_to_video_is_the_same_network_and_a_first_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option asks for the released size with it; all that both have is drawn alike."""
    asked: list[Sizes] = []
    monkeypatch.setattr(synthetic, "write", lambda *arguments: asked.append(arguments[-1]))
    for options in ([], ["--image-to-video"]):
        monkeypatch.setattr("sys.argv", ["synthetic", "folder", "--device", "cpu", *options])
        assert synthetic.main() == 0
    assert asked[0] == RELEASED and asked[1].transformer == TransformerConfig(use_additional_conditions=True)
    small = TransformerConfig(
        num_attention_heads=1, num_layers=1, in_channels=2, out_channels=2, caption_channels=(48, 32)
    )  # fmt: skip
    plain, more = (
        dict(draw_shell(Drawn(replace(small, use_additional_conditions=also), 5, CPU)).named_parameters())
        for also in (False, True)
    )
    added = {name for name in more if name not in plain}
    assert added and all("motion_score_embedder" in name for name in added) and plain.keys() <= more.keys()
    wider = {name for name in plain if plain[name].shape != more[name].shape}  # it takes the first frame's latents, too
    assert wider == {"pos_embed.proj.weight"} and more[wider.pop()].isfinite().all()
    same = [name for name in plain if plain[name].shape == more[name].shape and not plain[name].is_meta]
    assert all(torch.equal(more[name], plain[name]) for name in same)
    assert all(bool(more[name].isfinite().all()) for name in added)


def test_the_marker_of_a_folder(tmp_path: Path) -> None:
    assert marker(tmp_path) is False
    (tmp_path / MARKER).write_text(json.dumps({"seed": 1}))
    with pytest.raises(UsageError, match="generator"):
        marker(tmp_path)
