"""The encoder in strips: the same moments, less memory, what the count says of it, and runs that lack memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from live_memory import Live, on_shapes_as_a_card
from random_weights import randomized
from torch import Tensor

from solostep.engine import decoding, golden, golden_cases
from solostep.engine.config import VAEConfig
from solostep.engine.models import vae
from solostep.engine.models.vae_bytes import encode_bytes, encode_workspace_bytes
from solostep.engine.runtime import numerics

GOLDEN = Path(__file__).parents[1] / "golden"
# Widths change at some levels and stay at others, as in the release.
CONFIG = VAEConfig(
    z_channels=4, num_res_blocks=1, encoder_ch=32, encoder_ch_mult=(1, 2, 2, 2), decoder_ch=32,
    decoder_ch_mult=(1, 2, 2, 2),
)  # fmt: skip
RELEASE = VAEConfig()
OOM = "CUDA out of memory (simulated)"
GB = 10**9


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def encoder() -> vae.Encoder:
    with torch.inference_mode():
        return randomized(vae.Encoder(CONFIG))


def frames(count: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, count, height, width, generator=torch.Generator().manual_seed(1))


def in_bf16(encoder: vae.Encoder) -> vae.Encoder:
    half = vae.Encoder(CONFIG).bfloat16()
    half.load_state_dict(encoder.state_dict())
    return half


# --- The same moments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "height", "width", "strips"),
    [
        (1, 48, 16, 2), (1, 80, 16, 7), (1, 16, 16, 99), (17, 48, 16, 5),
        *(pytest.param(*case, marks=pytest.mark.more) for case in (
            (1, 80, 48, 3), (1, 112, 48, 4), (17, 80, 48, 4), (17, 80, 32, 16), (1, 48, 16, 16),
        )),
    ],
)  # fmt: skip
def test_strips_change_nothing(encoder: vae.Encoder, count: int, height: int, width: int, strips: int) -> None:
    """Heights that the strips do not divide, odd rows in a strip, more strips than rows."""
    x = frames(count, height, width, batch=2 if count == 1 else 1)
    whole, found = encoder(x), encoder.in_strips(x, strips)
    assert found.shape == whole.shape and float(whole.abs().max()) > 0.1
    assert float((found - whole).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", [vae.Downsample2d, vae.Downsample3d])
def test_odd_heights_are_halved_in_strips(kind: Any) -> None:
    """Only the frame's true borders are zeros, and only the side that a whole frame pads."""
    layer = kind(8)
    for height in (6, 7, 9, 13):
        x = torch.randn(2, 8, 3, height, height + 1, generator=torch.Generator().manual_seed(height))
        whole = layer(x)
        for rows in (1, 2, 3, 5):
            found = layer(x, vae.Past(rows))
            assert found.shape == whole.shape and float((found - whole).abs().max()) <= 1e-5, (height, rows)


@pytest.mark.parametrize("once", [False, True])
def test_strips_in_bf16(encoder: vae.Encoder, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where layers are rounded once, as on CUDA. The input of strips stays as it was."""
    if once:
        monkeypatch.setattr(vae, "_rounds_once", lambda m, x: hasattr(m, "round_once") and x.dtype == torch.bfloat16)
    half, x = in_bf16(encoder), frames(1, 48, 32).bfloat16()
    kept = x.clone()
    whole = half(x).float()
    for strips in (3, 16):
        noise = (half.in_strips(x, strips).float() - whole).square().mean()
        span = float(whole.max() - whole.min())
        assert float(10 * torch.log10(span**2 / noise.clamp(min=1e-20))) >= 60
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strips_are_the_official_encoder(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the limits of whole frames, against numbers recorded from the official code."""
    monkeypatch.setattr(golden, "encode_video", partial(vae.encode_video, strips=4))
    monkeypatch.setattr(vae.Encoder, "forward", None)  # nothing is encoded whole
    with numerics():
        results = golden.run_case(
            golden_cases.read_case(GOLDEN / "vae_v2_encoder.safetensors"), dtype, torch.device("cpu")
        )
    assert results and all(r.passed for r in results)


def test_cards_take_moments_of_the_encoder_in_fp32(encoder: vae.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to bf16, as the decoder's, they would move the log variance."""
    real = torch.batch_norm_update_stats
    # On CUDA, statistics of bf16 are fp32.
    monkeypatch.setattr(torch, "batch_norm_update_stats", lambda x, *more: real(x.float(), *more))
    norm, x = in_bf16(encoder).down[0].block[0].norm1, frames(11, 16, 16).reshape(1, 33, 1, 16, 16)[:, :32].bfloat16()
    assert {moment.dtype for moment in norm._moments(x)} == {torch.bfloat16}
    monkeypatch.setattr(vae, "_rounds_once", lambda m, x: hasattr(m, "round_once"))
    for found, want in zip(norm._moments(x), norm._native_moments(x.float()), strict=True):
        assert found.dtype == torch.float32 and float((found - want).abs().max()) <= 1e-5


def test_what_strips_cannot_do(encoder: vae.Encoder) -> None:
    x = frames(1, 16, 16)
    with pytest.raises(ValueError, match="at least 1"):
        encoder.in_strips(x, 0)
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(ValueError, match="inference_mode"):
        encoder.in_strips(x, 2)


# --- Too little memory --------------------------------------------------------------------------------------------


class Failing(torch.nn.Module):
    """Takes each latent frame from a chunk, and fails in the calls ``at``; keeps the strips of all."""

    def __init__(self, at: list[int]) -> None:
        super().__init__()
        self.at, self.taken = at, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        return self.in_strips(x, 1)

    def in_strips(self, x: Tensor, strips: int) -> Tensor:
        self.taken.append(strips)
        if len(self.taken) - 1 in self.at:
            raise torch.OutOfMemoryError(OOM)
        return x[:, :2, ::8, ::16, ::16]


@pytest.mark.parametrize(
    ("at", "taken", "said"),
    [
        ([], [1, 1, 1, 1], []), ([0], [1, 4, 4, 4, 4], ["in 4 strips"]), ([3], [1, 1, 1, 1, 4], ["in 4 strips"]),
        ([1, 2], [1, 1, 4, 16, 16, 16], ["in 4 strips", "in 16 strips"]),
    ],
)  # fmt: skip
def test_chunks_are_encoded_again_in_strips(at: list[int], taken: list[int], said: list[str]) -> None:
    """And those after them stay with that; each is there once, in order."""
    video, told = frames(3 * 17 + 1, 16, 16).transpose(1, 2), list[str]()
    failing = Failing(at)
    mean, logvar = vae.encode_video(failing, video, on_retry=told.append)
    assert (failing.taken, told) == (taken, said)
    kept = [17 * chunk + frame for chunk in range(3) for frame in (0, 8, 16)] + [51]
    assert torch.equal(mean, video[:, kept, :1, ::16, ::16]) and torch.equal(logvar, video[:, kept, 1:2, ::16, ::16])


def test_nothing_left_to_try(encoder: vae.Encoder) -> None:
    """In 16 strips too; while gradients are recorded, at once; and other errors are none of memory."""
    video, told = frames(1, 16, 16).transpose(1, 2), list[str]()
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        vae.encode_video(Failing([0, 1, 2]), video, on_retry=told.append)
    assert told == ["in 4 strips", "in 16 strips"]
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(torch.OutOfMemoryError, match="simulated"):
        vae.encode_video(Failing([0]), video, on_retry=told.append)
    with pytest.raises(RuntimeError, match="channels"):
        vae.encode_video(encoder, video[:, :, :2], on_retry=told.append)
    assert len(told) == 2


def test_a_failed_attempt_frees_its_tensors(encoder: vae.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real encoder, which fails behind its levels, where much is alive."""
    alive: list[int] = []
    real, video = vae.MiddleBlock.forward, frames(1, 16, 16).transpose(1, 2)

    def forward(self: vae.MiddleBlock, x: Tensor) -> Tensor:
        monkeypatch.setattr(vae.MiddleBlock, "forward", real)
        alive.append(live.now)
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(vae.MiddleBlock, "forward", forward)
    with Live() as live:
        vae.encode_video(encoder, video, on_retry=lambda _: alive.append(live.now))
    assert alive[0] > 0 == alive[1]


# --- The count ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "height", "width", "dtype"),
    [
        (RELEASE, 544, 992, torch.bfloat16), (RELEASE, 544, 992, torch.float32), (CONFIG, 400, 304, torch.bfloat16),
        pytest.param(RELEASE, 64, 64, torch.bfloat16, marks=pytest.mark.more),
        pytest.param(RELEASE, 256, 272, torch.float32, marks=pytest.mark.more),
        pytest.param(CONFIG, 48, 64, torch.float32, marks=pytest.mark.more),
        pytest.param(replace(RELEASE, encoder_ch_mult=(4, 2, 2, 16)), 256, 272, torch.bfloat16, marks=pytest.mark.more),
        pytest.param(replace(RELEASE, encoder_ch_mult=(16, 8, 2, 8)), 256, 272, torch.float32, marks=pytest.mark.more),
        pytest.param(replace(RELEASE, num_res_blocks=0, encoder_ch=512), 256, 272, torch.float32,
                     marks=pytest.mark.more),
    ],
)  # fmt: skip
def test_the_count_is_what_it_takes(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bf16 is computed in fp32, as on CUDA. Never less than what is alive."""
    on_shapes_as_a_card(monkeypatch)
    monkeypatch.setattr(vae, "_rounds_once", lambda m, x: x.dtype == torch.bfloat16)
    with torch.device("meta"):
        network, x = vae.Encoder(config).to(dtype), torch.empty(1, 3, 1, height, width, dtype=dtype)
    for strips in vae.ENCODING:
        with Live() as live:
            network.in_strips(x, strips)
        beside = encode_workspace_bytes(config, height, width, strips, dtype.itemsize)
        counted = encode_bytes(config, height, width, strips, dtype.itemsize) - beside
        assert live.peak <= counted <= 1.1 * live.peak, strips


def test_the_release_encodes_in_half_a_gb() -> None:
    """At 544x992 in bf16, workspace counted; and the fewest strips that fit are taken."""
    needed = [encode_bytes(RELEASE, 544, 992, strips) for strips in vae.ENCODING]
    assert needed[0] > 3e9 > 1.1e9 > needed[1] > 1e9 > 0.55e9 > needed[2]
    for room, n in ((24 * GB, 0), (needed[0], 0), (needed[0] - 1, 1), (needed[1] - 1, 2), (0, 2)):
        assert decoding.choose_encoding(RELEASE, 544, 992, room, 2) == (vae.ENCODING[n], needed[n])
    with pytest.raises(ValueError, match="0 strips"):
        encode_bytes(RELEASE, 544, 992, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_count_on_a_card(dtype: torch.dtype) -> None:
    """The allocator's peak, and the same moments in strips."""
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        network = randomized(vae.Encoder(RELEASE).to(dtype))
    video = torch.rand(1, 1, 3, 544, 992, generator=generator, device="cuda").to(dtype) * 2 - 1
    means = []
    for strips in vae.ENCODING:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() - video.nbytes
        torch.cuda.reset_peak_memory_stats()
        means.append(vae.encode_video(network, video, strips)[0].float())
        peak = torch.cuda.max_memory_allocated() - before
        assert 0.5 * encode_bytes(RELEASE, 544, 992, strips, dtype.itemsize) < peak
        assert peak <= encode_bytes(RELEASE, 544, 992, strips, dtype.itemsize)
    for found in means[1:]:
        assert float((found - means[0]).norm() / means[0].norm()) <= (1e-5 if dtype == torch.bfloat16 else 1e-3)
