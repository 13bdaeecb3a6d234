"""The pieces of one denoising run: noise, the first-frame condition, the guided velocity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..offload.planner import Savings
from ..offload.streamer import BlockStreamer
from .config import GenerationSettings
from .image import fit_image
from .models.fused import FusedBlocks, Parking
from .models.transformer import StepVideoTransformer
from .models.vae import encode_video, sample_posterior
from .text import PromptEmbedding

GRAPH_TOKENS = 4096
"""Up to so many tokens, starting the kernels of a block takes about as long as running them."""


def initial_noise(settings: GenerationSettings, channels: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Noise ``[1, f, c, h, w]``, fp32 on the CPU, and the generator that goes on from it.

    Drawn on the CPU, so that a seed means the same noise on every device. Quirk: rounded to bf16 whatever the
    precision, as the official pipeline draws it, so that all precision modes start alike.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, settings.latent_frames, channels, settings.latent_height, settings.latent_width)
    return torch.randn(shape, generator=generator).bfloat16().float(), generator


def first_frame_condition(
    encoder: nn.Module, image: Tensor, settings: GenerationSettings, eps: Tensor | torch.Generator, strips: int = 1,
    on_retry: Callable[[str], None] | None = None,
) -> Tensor:  # fmt: skip
    """Condition latents ``[1, f, c, h, w]`` in the encoder's type: the encoded image as frame 0, zeros after it.

    The image ``[3, H, W]`` is coded as a video of one frame and sampled from the posterior. The official code draws
    ``eps`` unseeded; here it comes from the run's generator, so that a seed repeats the whole video. ``strips`` and
    ``on_retry`` are those of :func:`encode_video`.
    """
    weight = next(encoder.parameters())
    frame = fit_image(image, settings.height, settings.width)[None, None]
    mean, logvar = encode_video(encoder, frame.to(weight.device, weight.dtype), strips, on_retry)
    if isinstance(eps, torch.Generator):
        eps = torch.randn(mean.shape, generator=eps)
    condition = mean.new_zeros(1, settings.latent_frames, *mean.shape[2:])
    condition[:, :1] = sample_posterior(mean, logvar, eps.to(mean))
    return condition


class _Recorded:
    """A function of tensors as a CUDA graph, with places for its arguments. Its result lasts until the next call."""

    def __init__(self, function: Callable[..., Tensor], *arguments: Tensor) -> None:
        self.places = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.places[0].device)
        # "global", the default, is broken off by what other threads ask of the card meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = function(*self.places)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for place, argument in zip(self.places, arguments, strict=True):
            place.copy_(argument)
        self.graph.replay()
        return self.result


class GuidedVelocity:
    """The DiT with everything that stays the same over the steps: texts, condition, guidance.

    ``embeddings`` holds the prompt, and behind it the negative prompt if ``guidance_scale`` is above 1. ``attention``
    is official, or a mode of the fused blocks, which ``backend`` computes. ``blocks`` is where the blocks come from: a
    BlockStreamer, or by default the transformer's own list.

    On a card, fused blocks of a short clip compute faster than the host can start their kernels. Where all blocks stay
    on the card, the second step is then recorded as a CUDA graph, which the following ones repeat: the same kernels,
    the same bits. ``graph`` says whether; by default that depends on the length. Nothing is recorded where rows are
    parked. ``savings`` is what fused blocks do to take less memory.

    Raises:
        ValueError: savings for official attention, or impossible ones.
    """

    def __init__(
        self,
        transformer: StepVideoTransformer,
        embeddings: Sequence[PromptEmbedding],
        settings: GenerationSettings,
        condition: Tensor | None = None,
        attention: str = "official",
        backend: str | None = None,
        blocks: Iterable[nn.Module] | None = None,
        graph: bool | None = None,
        savings: Savings | None = None,
    ) -> None:
        savings = Savings() if savings is None else savings
        if attention == "official" and savings != Savings():
            raise ValueError("only fused blocks save memory, and the attention is official")
        heads = transformer.config.num_attention_heads
        if savings.head_groups < 1 or heads % savings.head_groups:
            raise ValueError(f"head_groups has to divide the {heads} heads, and {savings.head_groups} does not")
        self.transformer = transformer
        self.settings = settings
        self.rows = len(embeddings)
        parameter = transformer.proj_out.weight
        self.device, self.dtype = parameter.device, parameter.dtype
        self.context = [
            transformer.embed_text(
                e.llm[None].to(self.device, self.dtype), e.clip[None].to(self.device, self.dtype), [e.length]
            )[0]
            for e in embeddings
        ]
        self.blocks = blocks
        if isinstance(blocks, BlockStreamer):
            blocks.short = False  # whatever was kept was of another text
        self.fused: FusedBlocks | None = None
        if attention != "official":
            self.fused = FusedBlocks(
                self.context, attention, backend, savings.chunk, savings.head_groups, savings.keep_text,
                len(transformer.transformer_blocks),
            )  # fmt: skip
        self.parking = Parking() if savings.park and self.rows > 1 else None
        tokens = settings.latent_frames * settings.latent_height * settings.latent_width
        wanted = tokens <= GRAPH_TOKENS if graph is None else graph
        self._steps = 0
        self._graph: _Recorded | None = None
        recordable = self.fused is not None and self.parking is None and blocks is None
        self._records = wanted and recordable and self.device.type == "cuda"
        # Both branches see the first frame. Quirk: the condition is rounded to the model's type.
        self.condition = (
            None if condition is None else condition.to(self.device, self.dtype).repeat_interleave(self.rows, 0)
        )

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity ``[1, f, c, h, w]`` in the model's type, of fp32 ``latents`` at noise level ``sigma``."""
        latents, sigma = latents.to(self.device), sigma.to(self.device)
        self._steps += 1
        if (
            not self._records or self._steps == 1
        ):  # the first step compiles kernels and keeps the text's keys and values
            return self._velocity(latents, sigma)
        if self._graph is None:
            self._graph = _Recorded(self._velocity, latents, sigma)
        return self._graph(latents, sigma)

    def _velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        # The latents stay fp32 between steps; each call of the model gets a rounded copy.
        rounded = latents.to(self.dtype).repeat_interleave(self.rows, 0)
        timestep = sigma.expand(self.rows)
        score = self.settings.motion_score if self.condition is not None else None
        velocity = self.transformer(
            rounded, timestep, self.context, self.condition, score, self.blocks, self.fused, self.parking
        )
        if self.fused is not None and self.fused.keep_text and isinstance(self.blocks, BlockStreamer):
            self.blocks.short = True  # the text's keys and values are kept: what made them need not come again
        if self.rows == 1:
            return velocity
        text, uncond = velocity.split(1)
        # Quirk: guidance is computed in the model's type, not in fp32.
        return uncond + self.settings.guidance_scale * (text - uncond)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames ``[n, 3, H, W]`` in [-1, 1] -> uint8 ``[n, H, W, 3]``; truncated, not rounded, as the official code."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
