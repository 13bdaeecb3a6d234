"""The decoder in strips: the same frames, less memory, and what the count says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_memory import Live, on_shapes_as_a_card
from random_weights import randomized
from torch import Tensor

from solostep.engine.config import VAEConfig
from solostep.engine.models import vae, vae_bytes

# Widths change between the widest levels, as in the release.
CONFIG = VAEConfig(
    z_channels=4, num_res_blocks=1, encoder_ch=32, encoder_ch_mult=(1, 1, 2, 2), decoder_ch=32,
    decoder_ch_mult=(1, 2, 2, 2),
)  # fmt: skip
OOM = "CUDA out of memory (simulated)"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def decoder() -> vae.Decoder:
    with torch.inference_mode():
        return randomized(vae.Decoder(CONFIG))


def latents(frames: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(1, frames, CONFIG.z_channels, height, width, generator=torch.Generator().manual_seed(seed))


def decoded(decoder: vae.Decoder, z: Tensor, *settings: Any, **more: Any) -> Tensor:
    return torch.cat(list(vae.decode_chunks(decoder, z, *settings, **more)), dim=1)


# --- The same frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent_frames", "height", "width", "frames", "strips"),
    [
        (1, 3, 2, 4, 5), (3, 1, 2, 1, 1), (2, 3, 1, 1, 7), (2, 2, 1, 3, 3), (4, 1, 1, 4, 9), (4, 2, 1, None, 4),
        (2, 1, 1, 100, 16), (2, 1, 1, 1, 99),
        *(pytest.param(*case, marks=pytest.mark.more) for case in (
            (1, 3, 2, 1, 2), (3, 3, 2, 1, 1), (3, 3, 2, 1, 4), (3, 5, 3, 1, 7), (3, 5, 2, 2, 16), (4, 3, 2, 4, 9),
            (3, 2, 3, 3, 3), (6, 3, 2, None, 4), (3, 3, 2, 100, 16), (3, 1, 2, 1, 16), (3, 3, 2, 1, 99),
        )),
    ],
)  # fmt: skip
def test_strips_change_nothing(
    decoder: vae.Decoder, latent_frames: int, height: int, width: int, frames: int | None, strips: int
) -> None:
    """Heights that the strips do not divide, a last strip of one row, more strips than rows."""
    z = latents(latent_frames, height, width)
    whole, found = decoded(decoder, z), decoded(decoder, z, frames, strips)
    assert found.shape == whole.shape
    assert float((found - whole).abs().max()) <= 1e-4


@pytest.fixture(scope="module")
def in_bf16(decoder: vae.Decoder) -> tuple[vae.Decoder, Tensor, Tensor]:
    """The decoder, two chunks of latents, and their frames when nothing is divided."""
    half = vae.Decoder(CONFIG).bfloat16()
    half.load_state_dict(decoder.state_dict())
    z = latents(4, 2, 1).bfloat16()
    with torch.inference_mode():
        return half, z, decoded(half, z).float()


@pytest.mark.parametrize(
    ("frames", "strips"),
    [(1, 1), (4, 5), *(pytest.param(*c, marks=pytest.mark.more) for c in ((1, 5), (2, 7), (4, 16)))],
)
def test_strips_in_bf16(in_bf16: tuple[vae.Decoder, Tensor, Tensor], frames: int, strips: int) -> None:
    half, z, whole = in_bf16
    found = decoded(half, z, frames, strips).float()
    noise = (found - whole).square().mean()
    assert float(10 * torch.log10(4 / noise.clamp(min=1e-20))) >= 60  # frames are in [-1, 1]: the range is 2


def test_several_videos_at_once(decoder: vae.Decoder) -> None:
    z = torch.cat([latents(2, 2, 1), latents(2, 2, 1, seed=2)])
    assert float((decoded(decoder, z, 2, 5) - decoded(decoder, z)).abs().max()) <= 1e-4


def test_the_past_of_one_chunk_is_not_that_of_the_next(decoder: vae.Decoder) -> None:
    host = vae.HostFrames(torch.device("cpu"))
    z = latents(3, 2, 1).transpose(1, 2)
    first, second = (torch.cat(list(decoder.slices(z, 1, 4, host)), dim=2) for _ in range(2))
    assert torch.equal(first, second)
    held = sum(t.nbytes for t in host.kept.values())
    assert (
        held
        == vae_bytes.host_bytes(CONFIG, 32, 16, 4, itemsize=4)
        > vae_bytes.host_bytes(CONFIG, 32, 16, 2, itemsize=4)
    )
    assert vae_bytes.host_bytes(CONFIG, 32, 16, 1) == 0
    host.close()
    assert not host.kept


def test_what_strips_cannot_do(decoder: vae.Decoder) -> None:
    z = latents(3, 3, 2).transpose(1, 2)
    for frames, strips in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            next(decoder.slices(z, frames, strips))
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(ValueError, match="inference_mode"):
        next(decoder.slices(z, 1, 2))


# --- Too little memory --------------------------------------------------------------------------------------------


@pytest.fixture
def failing(decoder: vae.Decoder) -> Iterator[Callable[[list[int]], list[int]]]:
    """Lets calls of the last norm fail, counted from 0 on. Each call sees one piece of a chunk, or a strip's frame."""
    handles: list[Any] = []

    def start(at: list[int]) -> list[int]:
        calls: list[int] = []

        def hook(*_: Any) -> None:
            calls.append(len(calls))
            if calls[-1] in at:
                raise torch.OutOfMemoryError(OOM)

        handles.append(decoder.up[0].block[-1].register_forward_pre_hook(hook))
        return calls

    yield start
    for handle in handles:
        handle.remove()


AT: list[tuple[int, list[int]]] = [(1, [0, 1]), (3, [3]), (4, [1, 24]), (4, [0, 12, 20]), (7, [2])]


@pytest.mark.parametrize(
    ("frames", "latent_frames", "at"),
    [
        (None, *AT[0]), (None, *AT[3]), (2, *AT[1]), (1, *AT[2]),
        *(pytest.param(None, *AT[i], marks=pytest.mark.more) for i in (1, 2, 4)),
        *(pytest.param(f, *case, marks=pytest.mark.more) for f, kept in ((2, 1), (1, 2)) for i, case in enumerate(AT)
          if i != kept),
    ],
)  # fmt: skip
def test_a_chunk_begins_again_with_less(
    decoder: vae.Decoder,
    failing: Callable[[list[int]], list[int]],
    at: list[int],
    latent_frames: int,
    frames: int | None,
) -> None:
    """Every frame leaves once, in order, whatever had left before."""
    z = latents(latent_frames, 1, 1)
    whole = decoded(decoder, z)
    calls = failing(at if frames is None else at[:2])  # from frame by frame on there are two settings left
    said: list[str] = []
    found = decoded(decoder, z, frames, on_retry=said.append)
    assert found.shape == whole.shape
    assert float((found - whole).abs().max()) <= 1e-4
    ladder = ["frame by frame", "frame by frame in 4 strips", "frame by frame in 16 strips"]
    happened = sum(call in calls for call in (at if frames is None else at[:2]))
    assert said == ladder[frames == 1 :][:happened]


def test_later_chunks_stay_small(decoder: vae.Decoder, failing: Callable[[list[int]], list[int]]) -> None:
    said: list[str] = []
    calls = failing([1])
    pieces = list(vae.decode_chunks(decoder, latents(9, 1, 1), on_retry=said.append))
    assert said == ["frame by frame"]
    assert [p.shape[1] for p in pieces] == [16] + [1] * 35
    assert len(calls) == 1 + 1 + 20 + 20


def test_nothing_left_to_try(decoder: vae.Decoder, failing: Callable[[list[int]], list[int]]) -> None:
    said: list[str] = []
    failing(list(range(100)))
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        decoded(decoder, latents(3, 1, 1), on_retry=said.append)
    assert len(said) == 3


def test_room_is_made_when_nothing_smaller_is_left(
    decoder: vae.Decoder, failing: Callable[[list[int]], list[int]]
) -> None:
    """Frames that had left do not come again, and what there is to free is asked for once."""
    z = latents(3, 1, 1)
    whole = decoded(decoder, z)
    said: list[str] = []
    room = iter([True, False])
    failing([0, 1, 2, 20])
    found = decoded(decoder, z, on_retry=said.append, make_room=lambda: next(room))
    assert len(said) == 3 and next(room) is False
    assert found.shape == whole.shape and float((found - whole).abs().max()) <= 1e-4
    failing(list(range(100)))
    room = iter([True, False])
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        decoded(decoder, z, make_room=lambda: next(room))


def test_a_failed_attempt_frees_its_tensors(
    decoder: vae.Decoder, failing: Callable[[list[int]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the second attempt, nothing of the first is alive but what has left."""
    alive: list[int] = []
    failing([3])
    with Live() as live:
        for _ in vae.decode_chunks(decoder, latents(3, 1, 1), 2, on_retry=lambda _: alive.append(live.now)):
            if alive:  # the second attempt is another test's
                break
    assert alive and alive[0] <= 3 * 16 * 16 * 4 * 4  # frames of 3 channels, in fp32


# --- The count ----------------------------------------------------------------------------------------------------


@pytest.fixture
def like_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    on_shapes_as_a_card(monkeypatch)


def peak(config: VAEConfig, height: int, width: int, frames: int | None, strips: int, dtype: torch.dtype) -> int:
    """What a chunk takes, run on shapes alone."""
    with torch.device("meta"):
        decoder = vae.Decoder(config).to(dtype)
        z = torch.empty(1, config.z_channels, 3, height // 16, width // 16, dtype=dtype)
    with Live() as live:
        for _ in [decoder(z)] if frames is None else decoder.slices(z, frames, strips):
            pass
    return live.peak


RELEASE = VAEConfig()


@pytest.mark.usefixtures("like_a_card")
@pytest.mark.parametrize(
    ("config", "height", "width", "dtype", "settings"),
    [
        (RELEASE, 544, 992, torch.bfloat16, [(None, 1), (4, 1), (4, 8)]),
        (RELEASE, 256, 272, torch.float32, [(None, 1), (2, 1)]),
        (CONFIG, 400, 304, torch.bfloat16, [(None, 1), (1, 1)]),
        (CONFIG, 48, 64, torch.float32, [(None, 1), (8, 3)]),
        pytest.param(RELEASE, 544, 992, torch.bfloat16, [(1, 1), (2, 8)], marks=pytest.mark.more),
        pytest.param(RELEASE, 256, 272, torch.float32, [(1, 2), (2, 5)], marks=pytest.mark.more),
        pytest.param(CONFIG, 400, 304, torch.bfloat16, [(1, 3), (4, 16)], marks=pytest.mark.more),
        pytest.param(CONFIG, 48, 64, torch.float32, [(1, 1), (1, 4)], marks=pytest.mark.more),
    ],
)
def test_the_count_is_what_it_takes(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype, settings: list[tuple[int | None, int]]
) -> None:
    for frames, strips in settings:
        counted = vae_bytes.decode_bytes(config, height, width, frames, strips, dtype.itemsize)
        beside = vae_bytes.workspace_bytes(config, height, width, frames, strips, dtype.itemsize)
        found = peak(config, height, width, frames, strips, dtype)
        assert counted - beside == pytest.approx(found, rel=0.1), (frames, strips)


def test_the_release_decodes_in_3_gb() -> None:
    """At 544x992 in bf16, workspace and copies to and from the host counted."""
    assert vae_bytes.decode_bytes(VAEConfig(), 544, 992, 4, 8) < 3e9
    assert vae_bytes.decode_bytes(VAEConfig(), 544, 992, 2, 8) < 2e9
    assert vae_bytes.decode_bytes(VAEConfig(), 544, 992, 1, 16) < 1.5e9
    assert vae_bytes.decode_bytes(VAEConfig(), 544, 992, 1, 1) > 3e9
    with pytest.raises(ValueError, match="0 strips"):
        vae_bytes.decode_bytes(VAEConfig(), 544, 992, 1, 0)


def some_frames(dtype: torch.dtype) -> tuple[vae.GroupNorm, Tensor]:
    """Channels of all sizes, whose means are much larger than what is around them."""
    generator = torch.Generator().manual_seed(0)
    norm = vae.GroupNorm(128)
    with torch.inference_mode():
        for p in norm.parameters():
            p.copy_(torch.randn(128, generator=generator))
    sizes, means = torch.rand(128, generator=generator), 30 * torch.randn(128, generator=generator)
    x = torch.randn(2, 128, 3, 20, 31, generator=generator)
    return norm.to(dtype), (x * sizes[:, None, None, None] + means[:, None, None, None]).to(dtype)


@pytest.mark.parametrize("frames", [slice(None), slice(1, 3)])
def test_moments_for_cards_are_those_of_the_norm(frames: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole tensor, of a view of some frames, and in as many calls as a limit asks for."""
    norm, x = some_frames(torch.float32)
    want = norm._native_moments(x[:, :, frames])
    for limit in (vae.MAX_ELEMENTS, 20 * 31 * 100):
        monkeypatch.setattr(vae, "MAX_ELEMENTS", limit)
        mean, deviation = norm._moments(x[:, :, frames])
        assert float((mean - want[0]).abs().max()) <= 1e-5 * float(want[0].abs().max())
        assert float((deviation / want[1] - 1).abs().max()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("frames", [slice(None), slice(1, 3)])
def test_norms_on_a_card(frames: slice) -> None:
    """By moments of our own, as torch's kernel norms; what is rounded may be rounded to the neighbour."""
    norm, x = some_frames(torch.bfloat16)
    norm, x = norm.cuda(), x.cuda()[:, :, frames]
    mean, deviation = norm._moments(x)
    assert mean.dtype == deviation.dtype == torch.bfloat16
    for found, want in zip((mean, deviation), norm._native_moments(x), strict=True):
        assert float((found.float() / want.float() - 1).abs().max()) <= 2**-7
    want = torch.stack([F.group_norm(x[:, :, t], 32, norm.weight, norm.bias, norm.eps) for t in range(x.shape[2])], 2)
    scale, shift = norm.scales(x)
    with torch.no_grad():
        whole = norm(x)
    assert torch.equal(whole, norm.in_place(x.clone()))
    for found in (x * scale + shift, whole):
        assert float((found.float() - want.float()).norm() / want.float().norm()) <= 1e-2
