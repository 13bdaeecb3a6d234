"""Frozen configurations: the networks, the presets of the released models, one generation, the environment.

Every check stands in a ``__post_init__``, so an object that exists is valid. Sources of the numbers: the released
``config.json`` files, the model cards and the launch scripts of Step-Video-T2V, T2V-Turbo and TI2V.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError, UsageError

SPATIAL_COMPRESSION = 16
"""Pixels of height and width behind one latent cell."""
CHUNK_FRAMES = 17
"""Frames that the VAE codes together ..."""
CHUNK_LATENTS = 3
"""... into this many latent frames."""
FPS = 25.0
LLM_TOKENS = 320
CLIP_TOKENS = 77
PRECISIONS = ("bf16", "fp32")
"""Types that networks compute in."""
MODES = {
    "bf16": "the official numerics",
    "fp32": "twice the memory and several times slower",
    "int8": "half the memory; int8 products, inputs rotated",
    "fp8": "half the memory; e4m3 products, fast from sm_89 on",
    "int8-weight": "half the memory; products in bf16",
    "fp8-weight": "half the memory; products in bf16",
    "nf4": "0.28 of the memory; 4-bit weights, coarse",
    "int4-weight": "0.27 of the memory; 4-bit weights, coarse",
}
"""What a network can run in, and what that means against bf16. A test holds the names equal to those of quant/."""

_Config = TypeVar("_Config", bound="_FromDict")


class _FromDict:
    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Takes the keys that it knows from a ``config.json`` and ignores the rest (training-only settings)."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def _positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{owner}: {name} has to be a whole number above 0, not {value!r}.")


@dataclass(frozen=True)
class TransformerConfig(_FromDict):
    """The DiT, ``transformer/config.json``. Defaults are the released 30B model."""

    num_attention_heads: int = 48
    attention_head_dim: int = 128
    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 48
    patch_size: int = 1
    norm_eps: float = 1e-6
    use_additional_conditions: bool = False
    caption_channels: tuple[int, int] = (6144, 1024)

    def __post_init__(self) -> None:
        _positive(
            "transformer/config.json",
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            num_layers=self.num_layers,
            patch_size=self.patch_size,
        )
        if self.attention_head_dim != 128:
            raise CheckpointError(
                "transformer/config.json: attention_head_dim has to be 128, because the rotary embedding splits a head "
                f"into 64 + 32 + 32 channels, not {self.attention_head_dim}."
            )
        channels = self.caption_channels
        if not isinstance(channels, tuple) or len(channels) != 2:
            raise CheckpointError(
                f"transformer/config.json: caption_channels has to be [Step-LLM width, CLIP width], not {channels!r}."
            )

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VAEConfig(_FromDict):
    """The Video-VAE, version 2. The release has no ``vae/config.json``; these defaults are its constructor calls."""

    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 64
    num_res_blocks: int = 2
    version: int = 2
    encoder_ch: int = 32
    encoder_ch_mult: tuple[int, ...] = (4, 8, 16, 16)
    down_sampling_layer: tuple[int, ...] = (1, 2)
    decoder_ch: int = 128
    decoder_ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    temporal_up_layers: tuple[int, ...] = (2, 3)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Reads the nested form ``{"z_channels", ..., "encoder": {"ch", ...}, "decoder": {"ch", ...}}``."""
        flat = {k: v for k, v in values.items() if k not in ("encoder", "decoder")}
        encoder, decoder = values.get("encoder", {}), values.get("decoder", {})
        names = {"ch": "encoder_ch", "ch_mult": "encoder_ch_mult", "down_sampling_layer": "down_sampling_layer"}
        flat |= {names[k]: v for k, v in encoder.items() if k in names}
        names = {"ch": "decoder_ch", "ch_mult": "decoder_ch_mult", "temporal_up_layers": "temporal_up_layers"}
        flat |= {names[k]: v for k, v in decoder.items() if k in names}
        return super().from_dict(flat)

    def __post_init__(self) -> None:
        if self.version != 2:
            raise CheckpointError(
                f"vae/config.json: only version 2 of the VAE (vae_v2.safetensors) is supported, not {self.version}."
            )
        _positive(
            "vae/config.json",
            z_channels=self.z_channels,
            num_res_blocks=self.num_res_blocks + 1,  # the encoder may have none; the decoder has one more
            encoder_ch=self.encoder_ch,
            decoder_ch=self.decoder_ch,
        )
        for name in ("encoder_ch_mult", "decoder_ch_mult"):
            if len(getattr(self, name)) != 4:
                raise CheckpointError(f"vae/config.json: {name} has to hold 4 levels, not {getattr(self, name)!r}.")
        wide, narrow = 8 * self.decoder_ch * self.decoder_ch_mult[-1], 32 * self.z_channels
        if wide % narrow:
            raise CheckpointError(
                f"vae/config.json: 8 x the decoder's widest level ({wide}) has to be a multiple of "
                f"32 x z_channels ({narrow}), because the shortcut repeats channels."
            )
        wide = 8 * self.encoder_ch * self.encoder_ch_mult[-1]
        if wide % narrow:
            raise CheckpointError(
                f"vae/config.json: 8 x the encoder's last level ({wide}) has to be a multiple of "
                f"32 x z_channels ({narrow}), because the shortcut averages groups of channels."
            )


@dataclass(frozen=True)
class StepLLMConfig(_FromDict):
    """Step-LLM, ``step_llm/config.json``. Defaults are the released text encoder."""

    hidden_size: int = 6144
    num_layers: int = 48
    num_attention_heads: int = 48
    num_attention_groups: int = 8
    ffn_hidden_size: int = 16896
    layernorm_epsilon: float = 1e-5
    padded_vocab_size: int = 65536

    def __post_init__(self) -> None:
        _positive("step_llm/config.json", **{f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"})
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError("step_llm/config.json: hidden_size has to be a multiple of num_attention_heads.")
        if self.num_attention_heads % self.num_attention_groups:
            raise CheckpointError(
                "step_llm/config.json: num_attention_heads has to be a multiple of num_attention_groups."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """The inner width, rounded up to a multiple of 256 as the official constructor does."""
        return -(-self.ffn_hidden_size // 256) * 256


T2V_POSITIVE = (
    "超高清、HDR 视频、环境光、杜比全景声、画面稳定、流畅动作、逼真的细节、专业级构图、"
    "超现实主义、自然、生动、超细节、清晰。"
)
T2V_NEGATIVE = "画面暗、低分辨率、不良手、文本、缺少手指、多余的手指、裁剪、低质量、颗粒状、签名、水印、用户名、模糊。"
TI2V_POSITIVE = (
    "画面中的主体动作表现生动自然、画面流畅、生动细节、光线统一柔和、超真实动态捕捉、大师级运镜、整体不变形、"
    "超高清、画面稳定、逼真的细节、专业级构图、超细节、清晰。"
)
TI2V_NEGATIVE = (
    "动画、模糊、变形、毁容、低质量、拼贴、粒状、标志、抽象、插图、计算机生成、扭曲、动作不流畅、"
    "面部有褶皱、表情僵硬、畸形手指"
)


@dataclass(frozen=True)
class Preset:
    """Default settings of one released model, and the text that the official pipeline adds to every prompt."""

    name: str = "t2v"
    num_frames: int = 204
    height: int = 544
    width: int = 992
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    time_shift: float = 13.0
    motion_score: float = 5.0
    positive: str = T2V_POSITIVE
    negative: str = T2V_NEGATIVE
    max_frames: int = 204
    """Most frames seen in training; more are made, with a warning."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "num_inference_steps", "max_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"Preset {self.name}: {name} has to be a whole number above 0, not {value!r}.")
        for name in ("guidance_scale", "time_shift", "motion_score"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise CheckpointError(f"Preset {self.name}: {name} has to be a number, not {value!r}.")
        for name in ("name", "positive", "negative"):
            if not isinstance(getattr(self, name), str):
                raise CheckpointError(f"Preset {self.name}: {name} has to be text, not {getattr(self, name)!r}.")

    def updated(self, values: Mapping[str, Any], origin: str) -> Preset:
        """This preset with ``values`` in place of its own; an unknown name is an error that names ``origin``."""
        known = {f.name for f in fields(self)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(f"{origin}: unknown preset setting {unknown[0]!r}; known are {', '.join(known)}.")
        try:
            return Preset(**({f.name: getattr(self, f.name) for f in fields(self)} | dict(values)))
        except CheckpointError as error:
            raise CheckpointError(f"{origin}: {error}") from None


PRESETS: dict[str, Preset] = {
    "t2v": Preset(),
    "turbo": Preset(name="turbo", num_inference_steps=15, guidance_scale=5.0, time_shift=17.0),
    "ti2v": Preset(name="ti2v", num_frames=102, max_frames=102, positive=TI2V_POSITIVE, negative=TI2V_NEGATIVE),
}


def _number(name: str, value: Any, kind: type, lowest: float, strict: bool = False) -> None:
    good = isinstance(value, (int,) if kind is int else (int, float)) and not isinstance(value, bool)
    if not good or value != value or abs(value) == float("inf") or value < lowest or (strict and value == lowest):
        what = "a whole number" if kind is int else "a number"
        bound = f"above {lowest:g}" if strict else f"of at least {lowest:g}"
        raise UsageError(f"{name} has to be {what} {bound}, not {value!r}.")


@dataclass(frozen=True)
class GenerationSettings:
    """What one video is made from, sizes already rounded to what the model can make.

    Rounding is the official one: ``num_frames`` down to a multiple of 17 (at least 1), ``height`` and ``width`` down
    to multiples of 16. ``notes`` says in words what was rounded and which values are outside their meant range.

    Raises:
        UsageError: a value that no video can be made from.
    """

    num_frames: int = 204
    height: int = 544
    width: int = 992
    num_inference_steps: int = 50
    guidance_scale: float = 9.0
    time_shift: float = 13.0
    motion_score: float = 5.0
    max_frames: int = 204
    image_to_video: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _number("num_frames (--frames)", self.num_frames, int, 1)
        _number("height (--height)", self.height, int, SPATIAL_COMPRESSION)
        _number("width (--width)", self.width, int, SPATIAL_COMPRESSION)
        _number("num_inference_steps (--steps)", self.num_inference_steps, int, 1)
        _number("guidance_scale (--guidance)", self.guidance_scale, float, 0)
        _number("time_shift (--time-shift)", self.time_shift, float, 0, strict=True)
        _number("motion_score (--motion-score)", self.motion_score, float, 0)
        notes = list(self.notes)
        asked = (self.num_frames, self.height, self.width)
        # As the official pipeline: a clip shorter than one chunk becomes a single frame.
        made = (
            max(self.num_frames // CHUNK_FRAMES * CHUNK_FRAMES, 1),
            self.height // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION,
            self.width // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION,
        )
        for name, rule, value, rounded in zip(
            ("num_frames", "height", "width"), ("17 (or 1)", "16", "16"), asked, made, strict=True
        ):
            if value != rounded:
                notes.append(f"{name} {value} rounded down to {rounded}: the model makes multiples of {rule}.")
            object.__setattr__(self, name, rounded)
        if self.num_frames > self.max_frames:
            notes.append(f"{self.num_frames} frames are more than the {self.max_frames} this model was trained for.")
        if self.image_to_video and not 2 <= self.motion_score <= 20:
            notes.append(f"motion_score {self.motion_score:g} is outside 2 to 20, the range it is meant for.")
        object.__setattr__(self, "notes", tuple(notes))

    def warn(self) -> None:
        """Gives each note as a Python warning, for callers without a screen of their own."""
        for note in self.notes:
            warnings.warn(note, UserWarning, stacklevel=3)

    @property
    def latent_frames(self) -> int:
        return max(self.num_frames // CHUNK_FRAMES * CHUNK_LATENTS, 1)

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_COMPRESSION

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_COMPRESSION

    @property
    def use_guidance(self) -> bool:
        """Classifier-free guidance runs two branches; at a scale of 1 or less the unconditional one is not needed."""
        return self.guidance_scale > 1

    def identity(self) -> dict[str, float]:
        """The numbers that the result depends on."""
        names = ["num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift"]
        return {n: getattr(self, n) for n in names + ["motion_score"] * self.image_to_video}


VRAM, HOST_RAM = "SOLOSTEP_VRAM", "SOLOSTEP_HOST_RAM"
"""Environment variables with default budgets."""


def from_environment(variable: str, absent: str | None = None) -> str | None:
    """What an environment variable says; None where it says nothing, ``absent`` where it is not there."""
    return os.environ.get(variable, absent) or None


def allocator_is_configured() -> bool:
    """Whether the environment says how torch takes a card's memory."""
    return any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))


def cache_dir() -> Path:
    """Where embeddings and unfinished runs are kept: ``$SOLOSTEP_CACHE``, else ``~/.cache/solostep``."""
    given = os.environ.get("SOLOSTEP_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solostep"
