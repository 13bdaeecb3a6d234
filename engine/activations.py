"""Real activations of a network whose blocks are on the device one at a time, for measuring formats.

Several samples go through each block while it is there: prompts, both guidance branches and a few times along their own
trajectories for the DiT, texts for Step-LLM. Memory: one block (1.2 GB of the 30B DiT in bf16) and a residual stream
for each sample (78 MB for 17 frames at 544x992).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.recipe import BLOCKS
from .checkpoint import Component, ModelFolder, tokenizer_files
from .config import CHUNK_FRAMES, CLIP_TOKENS, GenerationSettings, cache_dir
from .errors import UsageError
from .models.step_llm import attention_bias
from .placing import Placer, read_infos
from .request import SETTINGS, check_asked, tensor_hash
from .runtime import free_memory, release_memory
from .sampling import first_frame_condition, initial_noise
from .scheduler import euler_step, make_sigmas
from .text import LLMTokenizer, PromptEmbedding, encode_prompts, run_clip
from .weights import build_on_meta, load, memory_bytes

PREFIXES = {network: pattern.removesuffix(".*") for network, pattern in BLOCKS.items()}
"""Where the blocks of a network are."""
STEPS = 10
TIMES = 4
SEED = 0
PROMPTS = (
    "A panda in a straw hat rides a bicycle along a rainy street at night, neon signs reflected in the puddles",
    "清晨的海边，一位老人牵着狗慢慢走过沙滩，海浪轻轻拍打礁石，镜头缓缓向前推进",
    "A young woman in a red raincoat laughs and turns in a wheat field, her hair blown across her face, close-up",
    "高空航拍，镜头沿着雪山之间蜿蜒的河谷飞行，云影从山坡上缓缓移过",
    "Two kittens chase a ball of wool down a wooden staircase in warm afternoon light, the camera follows them",
    "厨师在铁锅里翻炒蔬菜，火焰窜起，蒸汽升腾，手持镜头拍摄特写",
    "A glass of cold milk is poured over black coffee in slow motion, swirls spreading on a plain grey background",
    "一群孩子在胡同里放风筝，风筝越飞越高，镜头从地面仰拍并慢慢向左摇",
    "A steam train crosses a stone bridge in autumn, smoke drifting over orange woods, wide shot from a fixed camera",
    "水墨画风格，一只白鹤从荷塘中展翅飞起，荷叶轻轻摇晃，水面泛起涟漪",
    "An astronaut walks slowly through a greenhouse on Mars, dust storms behind the panes, the camera circles around",
    "夜晚的广场上，一位舞者在喷泉前旋转跳跃，水珠在灯光下闪烁，慢动作",
)
"""Of our own wording: people, animals, things and landscapes, still and moving cameras, English and Chinese in turn."""
STUDIED = 2
"""So many of them are what activations are taken from where none are given."""
DEMO_PROMPTS = ("a red circle moving right on a blue background", "一个绿色的三角形在粉色背景上变大")

Progress = Callable[[str, int, int], None]


def nearest_step(settings: GenerationSettings, sigma: float) -> int:
    """The step that the model is called for with the noise level nearest to ``sigma``: 0 noise ... 1 video."""
    sigmas = make_sigmas(settings.num_inference_steps, settings.time_shift)[:-1]
    return int((sigmas - sigma).abs().argmin())


def spread_steps(settings: GenerationSettings, times: int) -> list[int]:
    """So many steps, spread evenly, the first (pure noise) and the last among them; one alone is where noise and video
    are nearest to half and half, at a time shift of 13 the 47th of 50 (sigma 0.47)."""
    if times == 1:
        return [nearest_step(settings, 0.5)]
    return [round(i * (settings.num_inference_steps - 1) / (times - 1)) for i in range(times)]


@dataclass(frozen=True)
class Conditions:
    """What is run to get real activations.

    ``steps`` make the trajectory of each prompt, ``times`` of them are looked at, spread evenly over the steps (see
    :func:`spread_steps`), or those that ``at`` names. ``image`` is the first frame for an image-to-video model.
    """

    prompts: tuple[str, ...]
    settings: GenerationSettings
    times: int = TIMES
    seed: int = SEED
    image: Tensor | None = None
    at: tuple[int, ...] | None = None

    @property
    def looked_at(self) -> list[int]:
        """Steps whose latents are kept, in order."""
        return spread_steps(self.settings, self.times) if self.at is None else list(self.at)

    def identity(self) -> dict[str, Any]:
        """In JSON's types: everything beside the model that the activations depend on."""
        return {
            "prompts": list(self.prompts), "settings": self.settings.identity(), "times": self.times,
            "seed": self.seed, "image": tensor_hash(self.image),
        } | ({} if self.at is None else {"at": list(self.at)})  # fmt: skip


def drawn_image(height: int, width: int) -> Tensor:
    """A plain first frame ``[3, H, W]`` in [-1, 1]: a red disc on blue, darker towards the bottom."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-width / height, width / height, width)
    disc = ((x**2 + y**2).sqrt() < 0.4).float()
    ground = torch.stack([0 * x - 0.8 + 0 * y, 0 * x - 0.6 - 0.2 * y, 0 * x + 0.6 - 0.3 * y])
    red = torch.tensor([0.8, -0.7, -0.7])[:, None, None]
    return disc * red + (1 - disc) * ground


def conditions_for(
    model: ModelFolder,
    prompts: Sequence[str] | None = None,
    image: Tensor | None = None,
    times: int = TIMES,
    at: Callable[[GenerationSettings], Sequence[int]] | None = None,
    **settings: Any,
) -> Conditions:
    """The defaults of a model with what is given in their place: two prompts, 17 frames at the preset's size.

    ``at`` gives the steps that are looked at, of the whole settings, in place of ``times`` spread ones.

    Raises:
        UsageError: an empty prompt, a wrong setting, or an image for a text-to-video model.
    """
    preset = model.preset
    if not isinstance(times, int) or times < 1:
        raise UsageError(f"--times has to be a whole number above 0, not {times!r}.")
    given = {k: v for k, v in settings.items() if v is not None}
    chosen = (
        tuple(dict.fromkeys(prompts))
        if prompts is not None
        else DEMO_PROMPTS
        if preset.name == "demo"
        else PROMPTS[:STUDIED]
    )
    for prompt in chosen:
        check_asked(prompt, **given)
    if image is not None and not model.is_image_to_video:
        raise UsageError(f"--image needs an image-to-video model, and {model.source} is text-to-video; leave it out.")
    short = {
        "num_frames": min(CHUNK_FRAMES, preset.num_frames),
        "num_inference_steps": min(STEPS, preset.num_inference_steps),
    }
    values = {name: getattr(preset, name) for name in SETTINGS} | short | given
    made = GenerationSettings(**values, max_frames=preset.max_frames, image_to_video=model.is_image_to_video)
    if at is None and times > made.num_inference_steps:
        raise UsageError(
            f"--times {times} is more than the {made.num_inference_steps} steps of the trajectory; give more --steps."
        )
    if image is None and model.is_image_to_video:
        image = drawn_image(made.height, made.width)
    steps = None if at is None else tuple(at(made))
    return Conditions(chosen, made, times if steps is None else len(steps), image=image, at=steps)


# --- weights ------------------------------------------------------------------------------------------------------


def load_shell(component: Component, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network without its blocks, which stay on the meta device.

    Raises:
        CheckpointError: as :func:`solostep.engine.weights.load`.
    """
    module = build_on_meta(component)
    behind = PREFIXES[component.name] + "."
    wanted = {name: info for name, info in component.tensors.items() if not name.startswith(behind)}
    placer = Placer(module, device, dtype, {})
    for file in sorted({info.file for info in wanted.values()}):
        names = sorted((n for n, info in wanted.items() if info.file == file), key=lambda n: wanted[n].offset)
        tensors = read_infos([wanted[name] for name in names], device)
        for name in names:
            placer.place(name, wanted[name], next(tensors))
        next(tensors, None)
        placer.check()
    return module


class Blocks:
    """The blocks of a network, loaded one at a time; kept where they all take less than half of the free memory."""

    def __init__(self, component: Component, device: torch.device, dtype: torch.dtype) -> None:
        self.component, self.device, self.dtype = component, device, dtype
        self.prefix = PREFIXES[component.name]
        self.count = len(build_on_meta(component).get_submodule(self.prefix))  # type: ignore[arg-type]
        self.stay = 2 * component.parameters * dtype.itemsize < free_memory(device)
        self.kept: dict[int, nn.Module] = {}

    def block(self, i: int) -> nn.Module:
        if i in self.kept:
            return self.kept[i]
        block = load(self.component, self.device, self.dtype, part=f"{self.prefix}.{i}")
        if self.stay:
            self.kept[i] = block
        return block

    def each(self, wrap: Callable[[int, nn.Module], nn.Module] = lambda i, block: block) -> Iterator[nn.Module]:
        """Every block in order, as ``wrap(index, block)``; it may be gone when the next one comes."""
        for i in range(self.count):
            yield wrap(i, self.block(i))


# --- samples ------------------------------------------------------------------------------------------------------


class Samples:
    """Inputs of a network. A row is one sample; ``labels`` says of each its prompt, time, sigma and branch."""

    labels: list[dict[str, Any]]
    blocks: Blocks
    stream_bytes: int
    """Of the residual stream of the longest row."""

    def run(self, blocks: Iterable[nn.Module], rows: Sequence[int]) -> list[Tensor]:
        """Outputs ``[1, ...]`` of rows, which go through each block in the order given."""
        raise NotImplementedError


class TransformerSamples(Samples):
    """Samples of the DiT: prompts x times x guidance branches, in this order."""

    def __init__(
        self,
        model: ModelFolder,
        conditions: Conditions,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.settings = conditions.settings
        negative = model.preset.negative
        texts = {p: [p + model.preset.positive] + [negative] * self.settings.use_guidance for p in conditions.prompts}
        everything = [t for branches in texts.values() for t in branches]
        embeddings = encode(model, everything, device, dtype, progress)
        self.condition = self._condition(model, conditions)
        component = model.components["transformer"]
        self.shell: Any = load_shell(component, device, dtype)
        self.blocks = Blocks(component, device, dtype)
        contexts = {
            t: self.shell.embed_text(e.llm[None].to(device, dtype), e.clip[None].to(device, dtype), [e.length])[0]
            for t, e in embeddings.items()
        }
        self.latents: list[Tensor] = []
        self.sigmas: list[Tensor] = []
        self.contexts: list[Tensor] = []
        self.labels = []
        self._walk(conditions, [[contexts[t] for t in branches] for branches in texts.values()], progress)
        tokens = self.latents[0][0, :, 0].numel() // self.shell.config.patch_size**2
        self.stream_bytes = tokens * self.shell.config.inner_dim * dtype.itemsize

    def _condition(self, model: ModelFolder, conditions: Conditions) -> Tensor | None:
        if conditions.image is None:
            return None
        encoder = load(model.components["vae"], self.device, self.dtype, part="encoder")
        _, generator = initial_noise(self.settings, model.transformer_config.in_channels, conditions.seed)
        condition = first_frame_condition(encoder, conditions.image, self.settings, generator)
        del encoder
        release_memory(self.device)
        return condition

    def _walk(self, conditions: Conditions, contexts: list[list[Tensor]], progress: Progress) -> None:
        """Makes the trajectories of all prompts side by side and keeps what is looked at."""
        settings, branches = self.settings, len(contexts[0])
        sigmas = make_sigmas(settings.num_inference_steps, settings.time_shift).to(self.device)
        channels = self.shell.config.in_channels
        now = [initial_noise(settings, channels, conditions.seed + i)[0].to(self.device) for i in range(len(contexts))]
        kept: dict[int, list[Tensor]] = {}
        looked_at = conditions.looked_at
        for step in range(looked_at[-1] + 1):
            progress("trajectory", step, max(looked_at[-1], 1))
            if step in looked_at:
                kept[step] = now
            if step == looked_at[-1]:
                break
            self._set([(x, sigmas[step], c) for x, own in zip(now, contexts, strict=True) for c in own])
            outputs = self.run(self.blocks.each(), range(len(self.latents)))
            velocities = [outputs[i : i + branches] for i in range(0, len(outputs), branches)]
            now = [
                euler_step(x, self.guided(v), sigmas[step], sigmas[step + 1])
                for x, v in zip(now, velocities, strict=True)
            ]
        rows = []
        for p, own in enumerate(contexts):
            for t, step in enumerate(looked_at):
                for context, branch in zip(own, ("text", "unconditional"), strict=False):
                    rows.append((kept[step][p], sigmas[step], context))
                    self.labels.append({"prompt": p, "time": t, "sigma": float(sigmas[step]), "branch": branch})
        self._set(rows)

    def _set(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.latents = [latents.to(self.dtype) for latents, _, _ in rows]
        self.sigmas = [sigma for _, sigma, _ in rows]
        self.contexts = [context for _, _, context in rows]

    def guided(self, branches: Sequence[Tensor]) -> Tensor:
        """One velocity from those of the branches, as the pipeline makes it."""
        if len(branches) == 1:
            return branches[0]
        text, uncond = branches
        return uncond + self.settings.guidance_scale * (text - uncond)

    def run(self, blocks: Iterable[nn.Module], rows: Sequence[int]) -> list[Tensor]:
        condition = None if self.condition is None else self.condition.repeat_interleave(len(rows), 0)
        score = None if condition is None else self.settings.motion_score
        out = self.shell(
            torch.cat([self.latents[i] for i in rows]),
            torch.stack([self.sigmas[i] for i in rows]),
            [self.contexts[i] for i in rows],
            condition,
            score,
            blocks,
        )
        return list(out.split(1))


class LLMSamples(Samples):
    """Samples of Step-LLM: texts. Padding is left out: it stands at the end and reaches no token before it."""

    def __init__(self, model: ModelFolder, texts: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        tokenizer = LLMTokenizer(tokenizer_files(model.root)[0])
        component = model.components["step_llm"]
        shell: Any = load_shell(component, device, dtype)
        self.blocks = Blocks(component, device, dtype)
        self.rows = []
        for ids, length in map(tokenizer, texts):
            self.rows.append(shell.tok_embeddings.word_embeddings(torch.tensor([ids[:length]], device=device)))
        self.labels = [{"prompt": i, "time": 0, "sigma": None, "branch": "text"} for i in range(len(texts))]
        self.stream_bytes = max(row.numel() * row.itemsize for row in self.rows)
        self.heads = shell.config.num_attention_heads

    def run(self, blocks: Iterable[nn.Module], rows: Sequence[int]) -> list[Tensor]:
        streams = [self.rows[i] for i in rows]
        dtype, device = streams[0].dtype, streams[0].device
        biases = {n: attention_bias(self.heads, n, dtype, device) for n in {s.shape[1] for s in streams}}
        for block in blocks:
            for i, stream in enumerate(streams):
                streams[i] = block(stream, biases[stream.shape[1]])
        return streams


def encode(
    model: ModelFolder, texts: Sequence[str], device: torch.device, dtype: torch.dtype, progress: Progress
) -> dict[str, PromptEmbedding]:
    """Embeddings by text. Where Step-LLM does not fit the device (39 GB in bf16), its layers come one at a time."""
    if memory_bytes(model.components["step_llm"], dtype) <= free_memory(device):
        return encode_prompts(
            model, texts, device, dtype, cache_dir() / "embeddings",
            lambda done, total: progress("text encoders", done, total),
        )  # fmt: skip
    texts = list(dict.fromkeys(texts))
    samples = LLMSamples(model, texts, device, dtype)
    count = samples.blocks.count

    def told(i: int, layer: nn.Module) -> nn.Module:
        progress("text encoders", i, count)
        return layer

    states = [out.cpu() for out in samples.run(samples.blocks.each(told), range(len(texts)))]
    progress("text encoders", count, count)
    del samples
    release_memory(device)
    clip = run_clip(model, texts, device)
    return {
        text: PromptEmbedding(llm[0], clip[text].to(dtype), CLIP_TOKENS + llm.shape[1])
        for text, llm in zip(texts, states, strict=True)
    }


def make_samples(
    model: ModelFolder,
    network: str,
    conditions: Conditions,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Samples:
    if network == "transformer":
        return TransformerSamples(model, conditions, device, dtype, progress)
    texts = [p + model.preset.positive for p in conditions.prompts]
    texts += [model.preset.negative] * conditions.settings.use_guidance
    return LLMSamples(model, texts, device, dtype)
