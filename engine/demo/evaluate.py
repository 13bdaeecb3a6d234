"""Makes demo videos in batches straight through the networks, and scores them by the rules of rules.py.

For use inside training and for large counts on a GPU; `benchmarks/demo_score.py` can also go through the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoint import load, network_root, open_component
from ..models.clip import HunyuanClip
from ..models.step_llm import StepLLM
from ..models.transformer import StepVideoTransformer
from ..models.vae import VideoAutoencoder, encode_video, sample_posterior
from ..precision import Mode
from .captions import Attributes, Prompt, combinations, held_out_prompts
from .data import draw_clips, motion_score, psnr, to_frames
from .nets import TIME_SHIFT, TextTable, encode_texts, llm_bias, sample
from .rules import Reading, accuracies, read_clips

BATCH = 64
UNCONDITIONAL = ""


def load_network(root: Path, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of a model folder, loaded."""
    return load(open_component(root, name), device, dtype)


@dataclass(frozen=True)
class Made:
    """Videos, uint8 ``[n, 17, size, size, 3]``, and their final latents ``[n, 3, c, h, w]``, fp32."""

    videos: Tensor
    latents: Tensor


@dataclass
class Player:
    """The networks of one demo model, loaded, and what they make."""

    transformer: StepVideoTransformer
    vae: VideoAutoencoder
    llm: StepLLM
    clip: HunyuanClip
    texts: Path
    """Folder that holds the tokenizers."""

    @classmethod
    def load(
        cls,
        root: Path,
        device: torch.device,
        dtype: torch.dtype,
        mode: Mode | None = None,
        text_mode: Mode | None = None,
    ) -> Player:
        """All networks in ``dtype``, but for the transformer's ``mode`` and Step-LLM's ``text_mode``."""
        vae = load_network(root, "vae", device, dtype)
        clip = load_network(root, "hunyuan_clip", device, torch.float32)  # fp32 in every precision, as in the pipeline
        transformer, llm = (
            load(open_component(root, name), device, m.dtype if m else dtype, recipe=m.on_load if m else None)
            for name, m in (("transformer", mode), ("step_llm", text_mode))
        )
        texts = network_root(root, "step_llm")
        return cls(cast(StepVideoTransformer, transformer), vae, cast(StepLLM, llm), clip, texts)

    @torch.inference_mode()
    def make(
        self,
        prompts: Sequence[str],
        seed: int,
        steps: int,
        guidance: float,
        size: int,
        shift: float = TIME_SHIFT,
        images: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> Made:
        """Videos of the prompts, on the networks' device (so is their reading).

        ``images [n, 3, size, size]`` in [-1, 1] and ``scores [n]`` are for an image-to-video model.
        """
        device = self.transformer.proj_out.weight.device
        generator = torch.Generator().manual_seed(seed)
        channels = self.transformer.config.in_channels
        parts = []
        for start in range(0, len(prompts), BATCH):
            chosen = slice(start, start + BATCH)
            some = list(prompts[chosen])
            table = TextTable.of([*some, UNCONDITIONAL], self.texts, device)
            bias = llm_bias(self.llm, table.llm.shape[1], device)
            llm, clip = encode_texts(self.llm, self.clip, table, bias)
            noise = torch.randn(len(some), 3, channels, size // 16, size // 16, generator=generator).to(device)
            condition = None
            if images is not None:
                condition = self._condition(images[chosen].to(device), noise, generator)
            score = None if scores is None else scores[chosen].to(device)
            latents = sample(
                self.transformer, llm, clip, table.visible(), noise, steps, guidance, shift, condition, score
            )
            parts.append((to_frames(self.vae.decode(latents.to(self.vae.dtype))), latents))
        videos, finals = (torch.cat(part) for part in zip(*parts, strict=True))
        return Made(videos, finals)

    def videos(self, *arguments: Any, **options: Any) -> Tensor:
        """The videos alone that :meth:`make` makes."""
        return self.make(*arguments, **options).videos

    def _condition(self, images: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        mean, logvar = encode_video(self.vae.encoder, images[:, None].to(self.vae.dtype))
        eps = torch.randn(mean.shape, generator=generator).to(mean)
        condition = torch.zeros_like(noise, dtype=mean.dtype)
        condition[:, :1] = sample_posterior(mean, logvar, eps)
        return condition


@torch.inference_mode()
def reconstruct(vae: VideoAutoencoder, videos: Tensor) -> Tensor:
    """Clips ``[n, F, 3, H, W]`` through the VAE and back, by the mean of the posterior."""
    parts = []
    for part in videos.split(16):
        mean, _ = vae.encode(part.to(vae.dtype))
        parts.append(vae.decode(mean).float())
    return torch.cat(parts)


def vae_score(vae: VideoAutoencoder, n: int, seed: int, size: int) -> dict[str, Any]:
    """PSNR and rule accuracies of reconstructions of held-out clips, and the accuracies on the clips themselves."""
    device = next(vae.parameters()).device
    attributes = test_attributes(n)
    batch, _ = draw_clips(attributes, seed, device, size)
    back = reconstruct(vae, batch.video)
    db = psnr(back, batch.video)
    frames = [float(psnr(back[:, i], batch.video[:, i]).mean()) for i in (0, batch.video.shape[1] - 1)]
    return {
        "psnr": float(db.mean()),
        "psnr_lowest": float(db.min()),
        "psnr_first_frame": frames[0],
        "psnr_last_frame": frames[1],
        "rules_on_clips": accuracies(read_clips(to_frames(batch.video)), attributes),
        "rules_on_reconstructions": accuracies(read_clips(to_frames(back)), attributes),
    }


def test_attributes(n: int) -> list[Attributes]:
    """``n`` held-out combinations, evenly spread over all of them."""
    pool = combinations(test=True)
    return [pool[i * len(pool) // n % len(pool)] for i in range(n)] if n <= len(pool) else (pool * n)[:n]


def prompt_score(
    player: Player, prompts: Sequence[Prompt], seed: int, steps: int, guidance: float, size: int
) -> tuple[dict[str, Any], Made]:
    """Accuracies over prompts, text-to-video; and the videos."""
    made = player.make([p.text for p in prompts], seed, steps, guidance, size)
    return grouped(read_clips(made.videos), prompts), made


def grouped(readings: Sequence[Reading], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Accuracies over all prompts, by language and by held-out rule."""
    table: dict[str, Any] = {"all": accuracies(readings, [p.attributes for p in prompts])}
    for name in ("language", "why"):
        for value in sorted({getattr(p, name) for p in prompts}):
            chosen = [i for i, p in enumerate(prompts) if getattr(p, name) == value]
            table[f"{name}={value}"] = accuracies(
                [readings[i] for i in chosen], [prompts[i].attributes for i in chosen]
            )
    return table


SPEED_SCORES = (2.0, 6.0, 11.0, 16.0, 20.0)


def image_score(
    player: Player,
    n: int,
    seed: int,
    steps: int,
    guidance: float,
    size: int,
    speed_scores: Sequence[float] = SPEED_SCORES,
) -> tuple[dict[str, Any], Made]:
    """Image-to-video: frame 0 against the given image, beside the VAE's own reconstruction, and speed by motion score.

    Images are first frames of held-out clips with their captions. For the speed, every clip that moves in one of four
    directions (at most 40) is made with each of ``speed_scores``. Also returns the videos with their own scores.
    """
    prompts = held_out_prompts(n, seed)
    attributes = [p.attributes for p in prompts]
    batch, u = draw_clips(attributes, seed, "cpu", size)
    images, texts = batch.video[:, 0], [p.text for p in prompts]
    device = player.transformer.proj_out.weight.device
    all_made = player.make(texts, seed, steps, guidance, size, images=images, scores=motion_score(u))
    videos = all_made.videos
    back = reconstruct(player.vae, images[:, None].to(device)).cpu()[:, 0]
    made = videos[:, 0].permute(0, 3, 1, 2).float().cpu() / 127.5 - 1
    frame, own = psnr(made, images), psnr(back, images)
    moving = [i for i, a in enumerate(attributes) if a[3] < 4][:40]
    speeds = {}
    for score in speed_scores if moving else ():
        some = player.videos(
            [texts[i] for i in moving], seed, steps, guidance, size,
            images=images[moving], scores=torch.full((len(moving),), score),
        )  # fmt: skip
        # What such a clip would do if it were drawn: (0.10 + 0.24 s) of the side in 16 steps.
        meant = (0.10 + 0.24 * (score - 2) / 18) * size / 16
        found = [r.speed for r in read_clips(some)]
        speeds[str(score)] = {"pixels_per_frame": sum(found) / max(len(found), 1), "drawn": meant, "n": len(found)}
    return {
        "rules": grouped(read_clips(videos), prompts),
        "frame0_psnr": float(frame.mean()),
        "frame0_psnr_vae": float(own.mean()),
        "frame0_loss_db": float((own - frame).mean()),
        "speed": speeds,
    }, all_made
