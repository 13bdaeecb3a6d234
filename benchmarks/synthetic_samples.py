"""Inputs for DiT weights that nobody trained: latents and texts that are drawn too, and samples made of them.

Latents are noise mixed with a smooth random field, in the proportion of the noise level, and not points of a
trajectory: what such a model predicts leads nowhere. The same seed gives the same inputs on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solostep.benchmarks.synthetic import Drawn, DrawnBlocks, draw_block, draw_shell
from solostep.engine.activations import TransformerSamples, spread_steps
from solostep.engine.config import CLIP_TOKENS, LLM_TOKENS, GenerationSettings, TransformerConfig
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.sampling import initial_noise
from solostep.engine.scheduler import make_sigmas


def smooth_video(settings: GenerationSettings, channels: int, seed: int) -> Tensor:
    """A latent ``[1, f, c, h, w]`` of unit variance that has what those of videos have: neighbours are alike in space
    and more so in time, channels hang together, and have means. Four random fields from coarse to fine, each a quarter
    stronger than the next finer one, mixed across channels. fp32, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    f, h, w = settings.latent_frames, settings.latent_height, settings.latent_width
    total = torch.zeros(1, channels, f, h, w)
    for octave in range(4):
        coarse = [max(1, -(-n * 2**octave // 12)) for n in (f // 2, h, w)]
        field = torch.randn(1, channels, *coarse, generator=generator)
        total += 1.25**-octave * nn.functional.interpolate(field, (f, h, w), mode="trilinear", align_corners=False)
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    mixed = torch.einsum("dc,bcfhw->bfdhw", mix + torch.eye(channels), total)
    mixed -= mixed.mean((1, 3, 4), keepdim=True)
    mixed /= mixed.std().clamp_min(1e-6)
    return (mixed + 0.4 * torch.randn(1, 1, channels, 1, 1, generator=generator)) / 1.16**0.5


def noisy_video(settings: GenerationSettings, channels: int, sigma: float, seed: int) -> Tensor:
    """sigma video + (1 - sigma) noise, ``[1, f, c, h, w]`` in fp32: where flow matching is on its way at ``sigma``."""
    noise, _ = initial_noise(settings, channels, seed)
    return sigma * smooth_video(settings, channels, seed) + (1 - sigma) * noise


def draw_text(drawn: Drawn, name: str, tokens: int) -> tuple[Tensor, Tensor, int]:
    """Outputs of the two text encoders ``[1, 320, c1]`` and ``[1, 77, c2]``, and how many tokens are seen. Texts have
    a part in common, as prompt and negative prompt do; each token is half its own."""
    made = []
    for encoder, length, width in zip(("llm", "clip"), (LLM_TOKENS, CLIP_TOKENS), drawn.config.caption_channels,
                                      strict=True):  # fmt: skip
        size = drawn.spread(f"text {encoder} sizes", width, 0.5)
        common = drawn.normal(f"text {encoder} common", 1, 1, width)
        own = drawn.normal(f"text {encoder} {name}", 1, 1, width)
        token = drawn.normal(f"text {encoder} {name} tokens", 1, length, width)
        made.append((0.6 * common + 0.4 * own + 0.7 * token) * size)
    return made[0], made[1], CLIP_TOKENS + min(tokens, LLM_TOKENS)


class SyntheticSamples(TransformerSamples):
    """Samples of a drawn DiT: prompts x times x guidance branches, as engine.activations makes them of a real one.

    The latents are no trajectory's: they are noise mixed with a smooth field (:func:`noisy_video`).

    Args:
        times: noise levels, spread over the steps as engine.activations spreads them.
        at: the steps themselves, in place of ``times``.
    """

    def __init__(
        self, config: TransformerConfig, settings: GenerationSettings, seed: int, device: torch.device,
        prompts: int = 1, times: int = 4, make: Callable[[Drawn, int], nn.Module] = draw_block,
        shell: Callable[[Drawn], StepVideoTransformer] = draw_shell, at: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        drawn = Drawn(config, seed, device)
        self.device, self.settings, self.condition = device, settings, None
        self.shell: Any = shell(drawn)
        self.dtype = self.shell.dtype
        self.blocks: Any = DrawnBlocks(drawn, make)
        sigmas = make_sigmas(settings.num_inference_steps, settings.time_shift)
        looked_at = spread_steps(settings, times) if at is None else list(at)
        branches = [("text", 180), ("unconditional", 60)][: 1 + settings.use_guidance]
        self.labels, rows = [], []
        for p in range(prompts):
            contexts = [self._context(drawn, f"{branch} {p if branch == 'text' else ''}", n) for branch, n in branches]
            for t, step in enumerate(looked_at):
                latents = noisy_video(settings, config.in_channels, float(sigmas[step]), seed + p).to(device)
                for context, (branch, _) in zip(contexts, branches, strict=True):
                    rows.append((latents, sigmas[step].to(device), context))
                    self.labels.append(
                        {"prompt": p, "time": t, "step": step, "sigma": float(sigmas[step]), "branch": branch}
                    )
        self._set(rows)
        tokens = self.latents[0][0, :, 0].numel() // config.patch_size**2
        self.stream_bytes = tokens * config.inner_dim * self.dtype.itemsize

    def _context(self, drawn: Drawn, name: str, tokens: int) -> Tensor:
        llm, clip, length = draw_text(drawn, name, tokens)
        return self.shell.embed_text(llm.to(self.device, self.dtype), clip.to(self.device, self.dtype), [length])[0]
