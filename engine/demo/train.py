"""Trains the demo model: `python -m solostep.engine.demo.train --out DIR`.

Four networks of Step-Video at a small size learn from clips that are drawn while they train (data.py). Stages, each of
which reads what the one before wrote into the model folder:

- vae: the video autoencoder, then its latent scale is folded into its weights (DIR/t2v/vae);
- t2v: both text encoders with their tokenizers, and the text-to-video DiT (the rest of DIR/t2v);
- ti2v: the image-to-video DiT, from the text-to-video one; VAE and text encoders stay (DIR/ti2v).

An interrupted stage goes on from its last checkpoint in DIR/state; a finished one trains on if it is given more minutes
than before. Losses and scores go to DIR/train_log.jsonl.
`--smoke` runs all of it at tiny sizes in under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.transformer import StepVideoTransformer, rope_table
from ..models.vae import VideoAutoencoder
from . import export
from .captions import TEMPLATES, Attributes, caption, combinations
from .data import UNIFORMS, Painter, attribute_table, draw_clips, motion_score, pick, psnr
from .evaluate import (
    SPEED_SCORES,
    UNCONDITIONAL,
    Player,
    held_out_prompts,
    image_score,
    load_network,
    prompt_score,
    reconstruct,
    test_attributes,
    vae_score,
)
from .loop import Log, Optimized, Run
from .nets import (
    SMOKE,
    TIME_SHIFT,
    Sizes,
    TextTable,
    as_thousandths,
    clip_states,
    context_of,
    count,
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
from .rules import accuracies, read_clips, summary

STAGES = ("vae", "t2v", "ti2v")
MINUTES = {"vae": 8.0, "t2v": 5.0, "ti2v": 3.5}
STEPS = 24
"""Default number of sampling steps of the demo."""
GUIDANCES = (1.5, 2.5, 4.0)
MOTION_SCORE = 11.0
KL = 1e-3


@dataclass(frozen=True)
class Job:
    """What all stages share."""

    out: Path
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    seed: int
    smoke: bool
    started: float
    minutes: float
    stop_after: float = float("inf")

    @property
    def t2v(self) -> Path:
        return self.out / "t2v"

    @property
    def max_steps(self) -> int:
        return 2 if self.smoke else 10**9

    @property
    def combinations(self) -> list[Attributes]:
        """What the DiTs are trained on."""
        return combinations(test=False)[:: 30 if self.smoke else 1]

    def batch(self, full: int) -> int:
        return 2 if self.smoke else full

    def log(self, stage: str) -> Log:
        return Log(self.out / "train_log.jsonl", stage)

    def run(self, stage: str, optimized: Optimized, **parts: object) -> bool:
        """Trains until this stage's minutes are over, those of earlier runs counted in; false if paused before."""
        state = self.out / "state"
        state.mkdir(parents=True, exist_ok=True)
        deadline = self.started + 60 * self.minutes
        made = Run(optimized, deadline=deadline, checkpoint=state / f"{stage}.pt", max_steps=self.max_steps, **parts)  # type: ignore[arg-type]
        made.stop_at = self.started + 60 * self.stop_after
        return made.train()


@torch.no_grad()
def put_ema(module: nn.Module, optimized: Optimized, prefix: str = "") -> None:
    """Copies the running mean of the weights into a module of the same names."""
    own = dict(module.named_parameters())
    for name, value in optimized.ema_state().items():
        if name.startswith(prefix):
            own[name.removeprefix(prefix)].copy_(value)


# --- the video autoencoder ----------------------------------------------------------------------------------------


def vae_loss(
    moments: Tensor, decoded: Tensor, batch_video: Tensor, weight: Tensor, squared: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted L1 with its gradients, or near the end (``squared`` to 1) squared error, and KL per latent element."""
    mean, logvar = moments.float().chunk(2, dim=1)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = decoded.float() - batch_video
    absolute = (weight * error.abs()).mean()
    slope = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    square = (weight * error.square()).mean()
    loss = (1 - squared) * (absolute + 0.5 * slope) + squared * 5 * square + KL * kl
    return loss, {"l1": error.abs().mean(), "mse": error.square().mean(), "kl": kl}


def channels_last(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network on inputs in channels-last order, which cuDNN's convolutions do not have to turn around."""
    return lambda x: network(x.contiguous(memory_format=torch.channels_last_3d))


def train_vae(job: Job) -> None:
    log = job.log("vae")
    torch.backends.cudnn.benchmark = True
    device, sizes = job.device, job.sizes
    vae = make_vae(sizes).to(device)
    optimized = Optimized(vae, job.dtype, rate=2e-3, ema=0.998)
    encode, decode = channels_last(vae.encoder), channels_last(vae.decoder)
    painter = Painter(device, sizes.size)
    table = attribute_table(False, device)
    batch = job.batch(8)
    u = torch.empty(batch, UNIFORMS + 1, device=device)
    eps = torch.empty(batch, sizes.z_channels, *sizes.fhw, device=device)
    squared = torch.zeros((), device=device)
    shown = make_vae(sizes).to(device, job.dtype).requires_grad_(False)
    clips, _ = draw_clips(test_attributes(8 if job.smoke else 64), 1, device, sizes.size)

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        drawn = painter(pick(table, u[:, -1]), u[:, :-1])
        video = drawn.video.transpose(1, 2)
        moments = encode(video.to(job.dtype))
        mean, logvar = moments.float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * eps
        weight = (1 + 2 * drawn.cover + 2 * drawn.edge).transpose(1, 2)
        return vae_loss(moments, decode(latents.to(job.dtype)), video, weight, squared)

    def fill() -> None:
        u.uniform_()
        eps.normal_()

    def report(share: float) -> None:
        put_ema(shown, optimized)
        torch.backends.cudnn.benchmark = False  # no search for shapes that are seen once a minute
        log("held out", share=share, psnr=float(psnr(reconstruct(shown, clips.video), clips.video).mean()))
        torch.backends.cudnn.benchmark = True

    finished = job.run(
        "vae", optimized, fill=fill, loss=loss, log=log, report=report,
        on_share=lambda share: squared.fill_(min(1.0, max(0.0, (share - 0.85) / 0.1))),
    )  # fmt: skip
    torch.backends.cudnn.benchmark = False
    if not finished:
        return
    final = make_vae(sizes).to(device)
    put_ema(final, optimized)
    finish_vae(job, final, log)


def finish_vae(job: Job, vae: VideoAutoencoder, log: Log) -> None:
    """Folds the latent scale, writes the VAE and scores what was written."""
    before = latent_std(vae, job)
    fold_latent_scale(vae, 1 / before)
    after = latent_std(vae, job)
    log("latent scale", std_before=_rounded(before), std_after=_rounded(after))
    export.write_network(job.t2v, "vae", job.sizes.vae_config, dict(vae.named_parameters()))
    written = load_network(job.t2v, "vae", job.device, job.dtype)
    score = vae_score(written, 4 if job.smoke else 192, 2, job.sizes.size)
    log(
        "score", **{k: v for k, v in score.items() if k.startswith("psnr")}, parameters=count(vae),
        clips=summary(score["rules_on_clips"]), reconstructions=summary(score["rules_on_reconstructions"]),
    )  # fmt: skip


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


@torch.no_grad()
def latent_std(vae: VideoAutoencoder, job: Job) -> Tensor:
    """Standard deviation of posterior samples by channel, over training clips."""
    pool = combinations(test=False)
    n = 4 if job.smoke else 256
    clips, _ = draw_clips([pool[i * 7919 % len(pool)] for i in range(n)], 3, job.device, job.sizes.size)
    moments = [vae.encode(part) for part in clips.video.split(16)]
    mean, logvar = (torch.cat(m).transpose(1, 2).transpose(0, 1).flatten(1) for m in zip(*moments, strict=True))
    return (mean.var(dim=1) + logvar.exp().mean(dim=1)).sqrt()


# --- latents and texts --------------------------------------------------------------------------------------------


@dataclass
class Latents:
    """Encoded training clips: posterior ``[N, f, z, h, w]``, row of the attribute table and uniform numbers of each."""

    mean: Tensor
    std: Tensor
    which: Tensor
    u: Tensor


@torch.no_grad()
def encode_clips(job: Job, n: int, seed: int) -> Latents:
    """Draws and encodes training clips, every combination about equally often."""
    encoder = load_network(job.t2v, "vae", job.device, job.dtype).encoder
    for module in encoder.modules():
        module.round_once = False  # 50,000 clips: here the speed of plain bf16 counts more than its last bit
    encode = channels_last(encoder)
    painter, table = Painter(job.device, job.sizes.size), torch.tensor(job.combinations, device=job.device)
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(n) % table.shape[0]
    u = torch.rand(n, UNIFORMS, generator=generator)
    means, stds = [], []
    for rows, some in zip(which.split(64), u.split(64), strict=True):
        drawn = painter(table[rows.to(job.device)], some.to(job.device))
        mean, logvar = encode(drawn.video.to(job.dtype).transpose(1, 2)).transpose(1, 2).float().chunk(2, dim=2)
        means.append(mean)
        stds.append((0.5 * logvar.clamp(-30, 20)).exp())
    return Latents(torch.cat(means), torch.cat(stds), which.to(job.device), u.to(job.device))


def all_captions(pool: Sequence[Attributes]) -> list[str]:
    """Every caption of some combinations, TEMPLATES in a row for each, and the empty text behind them."""
    return [*(caption(a, t) for a in pool for t in range(TEMPLATES)), UNCONDITIONAL]


class Denoising:
    """Rectified flow on encoded clips: buffers of random numbers, and the loss that reads them."""

    def __init__(
        self, job: Job, model: StepVideoTransformer, llm: nn.Module, clip: nn.Module, latents: Latents, batch: int
    ) -> None:
        self.job, self.model, self.llm, self.clip, self.latents = job, model, llm, clip, latents
        device = job.device
        self.texts = TextTable.of(all_captions(job.combinations), job.t2v, device)
        shape = (batch, *latents.mean.shape[1:])
        self.uniform = torch.empty(5, batch, device=device)
        self.normal = torch.empty(3, *shape, device=device)
        self.rope = rope_table((shape[1], shape[3], shape[4]), job.dtype, device)
        self.bias = llm_bias(self.llm, self.texts.llm.shape[1], device).to(job.dtype)  # type: ignore[arg-type]
        self.conditioned = model.config.use_additional_conditions

    def fill(self) -> None:
        self.uniform.uniform_()
        self.normal.normal_()

    def context(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        table = self.texts.rows(rows)
        llm = llm_states(self.llm, table.llm, self.bias)  # type: ignore[arg-type]
        clip = clip_states(self.clip, table.clip, table.clip_mask)  # type: ignore[arg-type]
        return context_of(self.model, llm, clip), table.visible()

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        dtype, data = self.job.dtype, self.latents
        which, template, dropped, level, rounded = self.uniform.unbind(0)
        eps, noise, eps_image = self.normal.unbind(0)
        index = (which * data.mean.shape[0]).long().clamp(max=data.mean.shape[0] - 1)
        mean, std = data.mean[index], data.std[index]
        clean = mean + std * eps
        rows = data.which[index] * TEMPLATES + (template * TEMPLATES).long().clamp(max=TEMPLATES - 1)
        rows = rows + (dropped < 0.12).long() * (self.texts.llm.shape[0] - 1 - rows)
        context, visible = self.context(rows)
        sigma = training_levels(level)
        # bf16 inference rounds the timestep before it multiplies; half of the rows learn that, half the exact value.
        t = torch.where(rounded < 0.5, as_thousandths(sigma, torch.bfloat16), sigma * 1000)
        at = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - at) * noise + at * clean
        condition, score = None, None
        if self.conditioned:
            first = mean[:, :1] + std[:, :1] * eps_image[:, :1]
            condition = F.pad(first, (0, 0, 0, 0, 0, 0, 0, mean.shape[1] - 1)).to(dtype)
            score = motion_score(data.u[index]).to(dtype)
        found = velocity(self.model, noisy.to(dtype), t, context, visible, self.rope, condition, score)
        error = (found.float() - (clean - noise)).square().flatten(1).mean(dim=1)
        late = (sigma > 0.5).float()
        return error.mean(), {"mse_late": (error * late).sum() / late.sum().clamp(min=1)}


# --- text-to-video ------------------------------------------------------------------------------------------------


def train_t2v(job: Job) -> None:
    log = job.log("t2v")
    captions = all_captions(job.combinations)
    words = export.write_sentencepiece(job.t2v, captions), export.write_wordpieces(job.t2v, captions)
    latents = encode_clips(job, 16 if job.smoke else 49_152, job.seed)
    log("data", clips=latents.mean.shape[0], captions=len(captions), std=float(latents.mean.std()), vocabularies=words)
    llm, clip = make_text_encoders(job.sizes, *words)
    nets = nn.ModuleDict({"transformer": make_transformer(job.sizes), "llm": llm, "clip": clip}).to(job.device)
    optimized = Optimized(nets, job.dtype, rate=1e-3, ema=0.999)
    task = Denoising(job, nets["transformer"], llm, clip, latents, job.batch(256))  # type: ignore[arg-type]
    if not job.run("t2v", optimized, fill=task.fill, loss=task.loss, log=log, warmup=200):
        return

    put_ema(nets.float(), optimized)
    named = {
        "transformer": (nets["transformer"], job.sizes.transformer_config()),
        "step_llm": (llm, job.sizes.step_llm_config(words[0])),
        "hunyuan_clip": (clip, job.sizes.clip_config(words[1])),
    }
    for name, (network, config) in named.items():
        export.write_network(job.t2v, name, config, dict(network.named_parameters()))
    finish_t2v(job, log)


def finish_t2v(job: Job, log: Log) -> None:
    """Chooses the default guidance on prompts of TRAINED combinations, then scores the held-out prompts with it."""
    player = Player.load(job.t2v, job.device, job.dtype)
    n, steps = (4, 2) if job.smoke else (192, STEPS)
    pool = combinations(test=False)
    trained = [pool[i * 613 % len(pool)] for i in range(min(n, 96))]
    texts = [caption(a, i % TEMPLATES) for i, a in enumerate(trained)]
    best, guidance = -1.0, GUIDANCES[0]
    for value in GUIDANCES[: 1 if job.smoke else None]:
        videos = player.videos(texts, 1, steps, value, job.sizes.size)
        rights = accuracies(read_clips(videos), trained)
        log("trained prompts", guidance=value, scores=summary(rights))
        if rights["all"]["accuracy"] > best:
            best, guidance = rights["all"]["accuracy"], value
    export.write_index(job.t2v, "t2v", export.defaults(job.sizes.size, guidance, STEPS, TIME_SHIFT))
    prompts = held_out_prompts(n)
    for value, number in ((guidance, steps),) if job.smoke else ((guidance, steps), (guidance, 12), (4.0, 50)):
        table, made = prompt_score(player, prompts, 0, number, value, job.sizes.size)
        for group, row in table.items():
            log("held-out prompts", guidance=value, steps=number, group=group, scores=summary(row))
        if number == steps:
            _picture(job.out / "t2v.png", made.videos[:16])
    log("size", megabytes=export.folder_bytes(job.t2v) / 1e6)


def _picture(path: Path, videos: Tensor) -> None:
    """Frames 0, 4, 8, 12 and 16 of videos, one video a row, two columns."""
    from PIL import Image

    rows = [torch.cat([video[i] for i in (0, 4, 8, 12, 16)], dim=1) for video in videos]
    half = -(-len(rows) // 2)
    rows += [torch.zeros_like(rows[0])] * (2 * half - len(rows))
    Image.fromarray(torch.cat([torch.cat(rows[:half]), torch.cat(rows[half:])], dim=1).cpu().numpy()).save(path)


# --- image-to-video -----------------------------------------------------------------------------------------------


def train_ti2v(job: Job) -> None:
    log = job.log("ti2v")
    latents = encode_clips(job, 16 if job.smoke else 49_152, job.seed + 1)
    log("data", clips=latents.mean.shape[0])
    base = load_network(job.t2v, "transformer", torch.device("cpu"), torch.float32)
    model = image_to_video_from(base, job.sizes).to(job.device)
    llm, clip = (load_network(job.t2v, name, job.device, job.dtype) for name in ("step_llm", "hunyuan_clip"))
    optimized = Optimized(model, job.dtype, rate=6e-4, ema=0.999)
    task = Denoising(job, model, llm, clip, latents, job.batch(256))
    if not job.run("ti2v", optimized, fill=task.fill, loss=task.loss, log=log, warmup=200):
        return

    put_ema(model.float(), optimized)
    root = job.out / "ti2v"
    export.write_network(root, "transformer", job.sizes.transformer_config(True), dict(model.named_parameters()))
    values = export.defaults(job.sizes.size, 1.5, STEPS, TIME_SHIFT, motion_score=MOTION_SCORE)
    export.write_index(root, "ti2v", values, shared="../t2v")
    player = Player.load(root, job.device, job.dtype)
    n, steps = (4, 2) if job.smoke else (128, STEPS)
    for guidance in (1.5,) if job.smoke else (1.5, 1.0, 2.5):
        speeds = SPEED_SCORES if guidance == 1.5 else ()
        score, _ = image_score(player, n, 0, steps, guidance, job.sizes.size, speeds)
        log(
            "score", guidance=guidance, steps=steps, scores=summary(score["rules"]["all"]), speed=score["speed"],
            **{k: v for k, v in score.items() if k.startswith("frame0")},
        )  # fmt: skip
    log("size", megabytes=export.folder_bytes(root) / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m solostep.engine.demo.train", description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models, the log and the checkpoints")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--minutes", type=float, help="wall clock of each stage (default: 8, 5 and 3.5)")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="pause a stage after these minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and a few steps")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    # Its kernels for masked attention come and go with the library's version; the others are enough here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        torch.manual_seed(args.seed)
        job = Job(
            out=args.out,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            sizes=SMOKE if args.smoke else Sizes(),
            seed=args.seed,
            smoke=args.smoke,
            started=time.monotonic(),
            minutes=args.minutes or MINUTES[stage],
            stop_after=args.stop_after,
        )
        {"vae": train_vae, "t2v": train_t2v, "ti2v": train_ti2v}[stage](job)


if __name__ == "__main__":
    main()
