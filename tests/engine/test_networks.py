"""Properties of the networks that no golden number shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_weights import randomized
from torch import Tensor

from solostep.engine.config import StepLLMConfig, TransformerConfig, VAEConfig
from solostep.engine.models import vae
from solostep.engine.models.step_llm import StepLLM, alibi_slopes, attention_bias
from solostep.engine.models.transformer import StepVideoTransformer, apply_rope, rope_table, text_lengths
from solostep.engine.sampling import to_uint8
from solostep.engine.scheduler import euler_step, make_sigmas

OFFICIAL = Path(__file__).parents[3] / "shared" / "official"


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def dit() -> StepVideoTransformer:
    with torch.inference_mode():
        config = TransformerConfig(
            num_attention_heads=1, in_channels=3, out_channels=3, num_layers=2, caption_channels=(10, 6)
        )
        return randomized(StepVideoTransformer(config))


def dit_inputs(rows: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(rows, 3, 3, 2, 5, generator=g),
        "llm": torch.randn(rows, 9, 10, generator=g),
        "clip": torch.randn(rows, 4, 6, generator=g),
        "timestep": torch.full((rows,), 0.3),
    }


def run_dit(model: StepVideoTransformer, x: dict[str, Tensor], lengths: list[int]) -> Tensor:
    return model(x["latents"], x["timestep"], model.embed_text(x["llm"], x["clip"], lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_batch(dit: StepVideoTransformer, dtype: torch.dtype) -> None:
    model = StepVideoTransformer(dit.config).to(dtype)
    model.load_state_dict(dit.state_dict())
    x = {k: v.to(dtype) for k, v in dit_inputs(3).items()}
    lengths = [13, 7, 10]
    together = run_dit(model, x, lengths)
    for i in range(3):
        assert torch.equal(run_dit(model, {k: v[i : i + 1] for k, v in x.items()}, lengths[i : i + 1])[0], together[i])
    turned = run_dit(model, {k: v.flip(0) for k, v in x.items()}, lengths[::-1])
    assert torch.equal(turned.flip(0), together)


def test_text_behind_the_length_is_not_seen(dit: StepVideoTransformer) -> None:
    x = dit_inputs(1)
    before = run_dit(dit, x, [8])  # 4 CLIP tokens and 4 of Step-LLM
    x["llm"][:, 4:] += 1
    assert torch.equal(run_dit(dit, x, [8]), before)
    x["llm"][:, 3] += 1
    assert not torch.equal(run_dit(dit, x, [8]), before)


def test_text_lengths_are_exact_or_official() -> None:
    """In bf16 the official count of a long prompt is rounded to a multiple of 2; ours is exact unless asked."""
    mask = (torch.arange(397) < torch.tensor([[277], [299], [256], [79]])).float()
    assert text_lengths(mask) == [277, 299, 256, 79]
    assert text_lengths(mask.bfloat16()) == [277, 299, 256, 79]
    assert text_lengths(mask, official_rounding=True) == [276, 300, 256, 79]
    assert text_lengths(mask, official_rounding=True, dtype=torch.float32) == [277, 299, 256, 79]


def test_rope_turns_pairs_and_keeps_lengths() -> None:
    tokens = torch.randn(1, 2 * 3 * 5, 2, 128)
    out = apply_rope(tokens, rope_table((2, 3, 5), torch.float32))
    assert torch.equal(out[:, 0], tokens[:, 0])  # position 0, 0, 0
    parts_in, parts_out = tokens.split((64, 32, 32), -1), out.split((64, 32, 32), -1)
    for a, b in zip(parts_in, parts_out, strict=True):
        half = a.shape[-1] // 2
        before, after = a[..., :half] ** 2 + a[..., half:] ** 2, b[..., :half] ** 2 + b[..., half:] ** 2
        assert torch.allclose(before, after, atol=1e-5)
    # A token in the first row and column is turned in its frame part alone.
    assert torch.equal(parts_out[1][:, 15], parts_in[1][:, 15])
    assert not torch.equal(parts_out[0][:, 15], parts_in[0][:, 15])


def test_image_to_video_needs_its_condition() -> None:
    config = TransformerConfig(
        num_attention_heads=1, in_channels=3, out_channels=3, num_layers=1, caption_channels=(10, 6),
        use_additional_conditions=True,
    )  # fmt: skip
    model = randomized(StepVideoTransformer(config))
    x = dit_inputs(1)
    context = model.embed_text(x["llm"], x["clip"], [13])
    with pytest.raises(ValueError, match="condition_latents"):
        model(x["latents"], x["timestep"], context)
    slow, fast = (model(x["latents"], x["timestep"], context, x["latents"], score) for score in (2.0, 20.0))
    assert not torch.equal(slow, fast)


def test_patches_of_two_give_back_the_size() -> None:
    config = TransformerConfig(
        num_attention_heads=1, in_channels=3, out_channels=4, num_layers=1, patch_size=2, caption_channels=(10, 6)
    )
    model = randomized(StepVideoTransformer(config))
    text = model.embed_text(torch.randn(1, 9, 10), torch.randn(1, 4, 6), [13])
    assert model(torch.randn(1, 3, 3, 4, 6), torch.zeros(1), text).shape == (1, 3, 4, 4, 6)


# --- Step-LLM -----------------------------------------------------------------------------------------------------


def test_slopes_of_heads_that_are_no_power_of_two() -> None:
    slopes = alibi_slopes(48)
    assert len(slopes) == 48
    assert slopes[31] == 2.0**-8
    assert slopes[0] == 2.0**-0.25
    assert slopes[32:34] == [2.0 ** (-4 / 32), 2.0 ** (-12 / 32)]
    assert alibi_slopes(8) == [2.0**-k for k in range(1, 9)]


def test_bias_is_causal_and_grows_with_the_root_of_the_distance() -> None:
    bias = attention_bias(4, 6, torch.float32)
    assert bool(torch.isinf(bias[:, 2, 3:]).all())
    assert bias[1, 5, 1] == pytest.approx(-alibi_slopes(4)[1] * 2)
    assert bool((bias.diagonal(dim1=1, dim2=2) == 0).all())


def test_padding_does_not_reach_the_tokens_before_it() -> None:
    config = StepLLMConfig(
        hidden_size=32, num_layers=2, num_attention_heads=4, num_attention_groups=2, ffn_hidden_size=64,
        padded_vocab_size=50,
    )  # fmt: skip
    model = randomized(StepLLM(config))
    ids = torch.randint(0, 50, (1, 12))
    other = ids.clone()
    other[:, 8:] = 2
    assert torch.equal(model(ids)[:, :8], model(other)[:, :8])
    moved = ids.roll(1, dims=1)
    assert not torch.allclose(model(ids)[:, 5], model(moved)[:, 6])  # the order of tokens matters


# --- VAE ----------------------------------------------------------------------------------------------------------

SMALL = VAEConfig(
    z_channels=2, num_res_blocks=1, encoder_ch=32, encoder_ch_mult=(1, 1, 1, 1), decoder_ch=32,
    decoder_ch_mult=(1, 1, 1, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def small_vae() -> vae.VideoAutoencoder:
    with torch.inference_mode():
        return randomized(vae.VideoAutoencoder(SMALL))


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 1), (17, 3), (18, 4), (34, 6), pytest.param(51, 9, marks=pytest.mark.more)]
)
def test_vae_sizes(small_vae: vae.VideoAutoencoder, frames: int, latents: int) -> None:
    mean, logvar = small_vae.encode(torch.randn(1, frames, 3, 16, 32))
    assert mean.shape == logvar.shape == (1, latents, 2, 1, 2)
    assert small_vae.decode(mean).shape == (1, frames, 3, 16, 32)


def test_frames_leave_as_they_are_final(small_vae: vae.VideoAutoencoder) -> None:
    latents = torch.randn(1, 9, 2, 1, 1)
    parts = list(vae.decode_chunks(small_vae.decoder, latents))
    assert [p.shape[1] for p in parts] == [16, 1, 16, 1, 16, 1]
    assert torch.equal(torch.cat(parts, dim=1), small_vae.decode(latents))


def test_borders_are_blended_one_after_the_other() -> None:
    a, c = torch.tensor([1.0]), torch.tensor([0.0])
    vae.blend_border(a, c)
    assert c.item() == pytest.approx(0.4)
    assert a.item() == pytest.approx(0.6 + 0.4 * 0.4)


@pytest.fixture(scope="module")
def in_one(small_vae: vae.VideoAutoencoder) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Latents and a video, and what they are decoded and encoded to."""
    with torch.inference_mode():
        latents, video = torch.randn(1, 3, 2, 2, 3), torch.randn(1, 17, 3, 32, 48)
        return (latents, video), (small_vae.decode(latents), small_vae.encode(video)[0])


@pytest.mark.parametrize("limit", [3_000, 20_000, pytest.param(100_000, marks=pytest.mark.more)])
def test_slices_of_frames_change_nothing(
    small_vae: vae.VideoAutoencoder, in_one: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch, limit: int,
) -> None:  # fmt: skip
    """Large tensors go through convolutions and norms a few frames at a time."""
    (latents, video), whole = in_one
    monkeypatch.setattr(vae, "MAX_ELEMENTS", limit)
    calls = 0
    plain = vae._gather

    def counted(parts: list[Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(parts)

    monkeypatch.setattr(vae, "_gather", counted)
    sliced = small_vae.decode(latents), small_vae.encode(video)[0]
    assert calls > 5
    for a, b in zip(whole, sliced, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_attention_in_slices_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 1, 50, 16).unbind(0)
    whole = vae.causal_attention(q, k, v)
    monkeypatch.setattr(vae, "QUERY_SLICE", 7)
    assert torch.allclose(vae.causal_attention(q, k, v), whole, atol=1e-6)
    changed = vae.causal_attention(q, k, torch.cat([v[:, :, :30], v[:, :, 30:] + 1], dim=2))
    assert torch.allclose(changed[:, :, :30], whole[:, :, :30], atol=1e-6)


def test_shuffles_are_inverse() -> None:
    x = torch.randn(1, 3, 5, 4, 6)
    assert torch.equal(vae.channels_to_space_time(vae.space_time_to_channels(x)), x)


def test_in_place_inference_equals_training(small_vae: vae.VideoAutoencoder) -> None:
    latents = torch.randn(1, 3, 2, 1, 2).clone()
    fast = small_vae.decode(latents)
    with torch.inference_mode(False), torch.enable_grad():
        trained = vae.VideoAutoencoder(SMALL)
        trained.load_state_dict(small_vae.state_dict())
        slow = trained.decode(latents.clone())
        slow.sum().backward()
    assert torch.allclose(fast, slow.detach(), atol=1e-6)
    assert all(p.grad is not None for p in trained.decoder.parameters())


# --- scheduler, pixels --------------------------------------------------------------------------------------------


def test_sigmas_run_from_noise_to_video() -> None:
    sigmas = make_sigmas(50, 13.0)
    assert sigmas[0] == 0
    assert sigmas[-1] == 1
    assert bool((sigmas.diff() > 0).all())


def test_euler_steps_of_a_constant_velocity_arrive() -> None:
    noise, video = torch.randn(2, 1, 3, 2, 2, 2).unbind(0)
    x, sigmas = noise, make_sigmas(7, 5.0)
    for i in range(7):
        x = euler_step(x.bfloat16() if i == 0 else x, video - noise.bfloat16().float(), sigmas[i], sigmas[i + 1])
        assert x.dtype == torch.float32
    assert torch.allclose(x, video, atol=1e-5)


def test_pixels_are_truncated() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    frames = values.view(6, 1, 1, 1).expand(6, 3, 1, 1)
    assert to_uint8(frames)[:, 0, 0, 0].tolist() == [0, 0, 127, 254, 255, 255]


# --- the released tokenizers, where they are at hand ---------------------------------------------------------------


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the released tokenizer files are not here")
def test_released_tokenizers_read_the_evaluation_prompts() -> None:
    from solostep.engine.text import ClipTokenizer, LLMTokenizer

    llm = LLMTokenizer(OFFICIAL / "stepvideo-t2v/step_llm/step1_chat_tokenizer.model")
    clip = ClipTokenizer(OFFICIAL / "stepvideo-t2v/hunyuan_clip/tokenizer")
    prompts = (OFFICIAL / "Step-Video-T2V-Eval.txt").read_text(encoding="utf-8").splitlines()
    assert llm.model.get_piece_size() == 65536
    for prompt in prompts[::8]:
        ids, length = llm(prompt)
        assert (ids[0], ids[length - 1], len(ids)) == (1, 2, 320)
        assert llm.model.decode(ids[1 : length - 1]) == prompt
        pieces, mask = clip(prompt)
        assert len(pieces) == len(mask) == 77
        assert pieces.count(100) == 0  # no [UNK]


def test_kept_rope_tables_serve_training_too() -> None:
    with torch.inference_mode():
        rope_table((1, 2, 9), torch.float32)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(1, 18, 1, 128, requires_grad=True)
        apply_rope(x, rope_table((1, 2, 9), torch.float32)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("latent_frames", "frames"),
    [
        (1, 2), (3, 1), (3, 7), (4, 3), (4, 100), (6, 2),
        *(pytest.param(*case, marks=pytest.mark.more) for case in (
            (1, 1), (1, 3), (1, 7), (1, 100), (3, 2), (3, 3), (3, 100), (4, 1), (4, 2), (4, 7), (6, 1), (6, 3), (6, 7),
            (6, 100),
        )),
    ],
)  # fmt: skip
def test_decoding_in_slices_is_decoding(frames: int, latent_frames: int, small_vae: vae.VideoAutoencoder) -> None:
    latents = torch.randn(2, latent_frames, small_vae.config.z_channels, 2, 1)
    with torch.inference_mode():
        want = torch.cat(list(vae.decode_chunks(small_vae.decoder, latents)), dim=1)
        pieces = list(vae.decode_chunks(small_vae.decoder, latents, frames))
    found = torch.cat(pieces, dim=1)
    assert found.shape == want.shape and float((found - want).abs().max()) < 1e-5
    if frames == 1 and latent_frames > 1:  # frames leave as they are ready
        assert max(piece.shape[1] for piece in pieces) == 1
