"""What a run takes, told before it begins: memory, disk and time of each stage within a budget.

A plan is arithmetic on sizes (offload/planner.py, and the VAE's own count); it needs a model's headers or just its
name, no weights and no card. Times come from rates measured on the card (rates.py), and are left out without them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..offload.planner import (
    BlockPlan,
    BudgetError,
    Clip,
    Network,
    Rates,
    activation_bytes,
    all_savings,
    plan_blocks,
    step_seconds,
)
from ..quant import foreign
from ..quant.formats import install
from ..quant.linear import QuantizedLinear
from .checkpoint import open_model
from .config import CLIP_TOKENS, LLM_TOKENS, PRESETS, GenerationSettings, TransformerConfig, VAEConfig
from .errors import SolostepError, UsageError
from .headers import TensorInfo, torch_type
from .hub import HUB_IDS
from .models.vae import decode_bytes
from .precision import Mode, check_attention, check_precision, choose_attention, choose_mode
from .quantization import formats_of
from .request import filled_in
from .text import llm_bytes
from .weights import Component, build_on_meta

CONTEXT = 850 << 20
"""Of a card's memory, what a process takes outside of torch's allocator: the driver's context and loaded kernels. On
an H200 0.65 GB at first and 0.81 GB after all kinds of kernels had run."""
PROGRAM = 1_700 << 20
"""Of host memory, what a process takes on a card before it holds any weights: libraries, the driver's part, buffers.
On the machine of an H200 1.6 to 1.7 GB."""
CLIP_BYTES = 1_410_000_000
"""Hunyuan-CLIP, BERT-large in fp32."""
PLACES = {
    (None, 1): 1.0, (4, 1): 1.05, (8, 8): 3.1, (8, 16): 3.15, (4, 8): 3.15, (4, 16): 3.2, (2, 8): 3.35, (2, 16): 3.45,
    (1, 16): 5.1,
}  # fmt: skip
"""Ways to decode, from the fastest to the smallest: frames of the widest levels at a time (None: a whole chunk) and
strips of each; and how many times as long they take, timed on an H200 (a whole chunk of 17 frames at 544x992: 0.89 s),
but for (8, 16) and (2, 16), which lie between their neighbours."""
STRIPS_ON_HOST = 8600
"""Bytes of host memory a pixel of a frame, at most, that decoding in strips keeps: 4.6 GB at 544x992."""
FRAME_BYTES = 3800
"""A pixel, of the encoder's tensors at their peak, counted at 544x992: 950 numbers, in fp32 also where weights are
bf16 (models/vae.py, _rounds_once)."""
Decoding = tuple[int | None, int]
WHOLE: Decoding = (None, 1)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(value: str | int | float, option: str) -> int:
    """Bytes of ``24GB``, ``24GiB``, ``500 MB`` or a number of bytes.

    Raises:
        UsageError: no size, or one that cannot be meant.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?B)\s*", value.upper())
        count = float(found[1]) * UNITS[found[2]] if found and found[2] in UNITS else 0.0
    else:
        count = float(value)
    if not 10**6 <= count < 1e15:  # 24 for 24 GB
        raise UsageError(f"{option} {value} is no size; write it with its unit, as in 24GB.")
    return int(count)


@dataclass(frozen=True)
class Rated:
    """Rates of a card for one precision and kind of attention, as measured: those of blocks, and what decoding makes of
    frames, in pixels a second."""

    blocks: Rates
    decode: float


@dataclass(frozen=True)
class StageForecast:
    """What a stage takes at its peak, and in all: bytes on the card (as torch counts them) and in host memory, bytes
    read from disk, seconds (None: not known)."""

    name: str
    device: int
    host: int
    disk: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """How a clip is made within a budget."""

    budget: int
    """Bytes that torch may take on the card."""
    blocks: BlockPlan
    network: Network
    decode: Decoding
    """Latent frames that are decoded at a time (None: a whole chunk) and strips of a frame."""
    stages: tuple[StageForecast, ...]
    step_seconds: float | None

    @property
    def device(self) -> int:
        """The peak of all stages on the card."""
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        """The peak of all stages in host memory, beside the program itself."""
        return max(stage.host for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """All of it."""
        parts = [stage.seconds for stage in self.stages]
        return None if any(s is None for s in parts) else sum(s for s in parts if s is not None)

    def stage(self, name: str) -> StageForecast:
        """A stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "budget_bytes": self.budget,
            "resident_blocks": self.blocks.resident,
            "streamed_blocks": self.network.blocks - self.blocks.resident,
            "blocks_from_disk": self.blocks.disk,
            "slots": self.blocks.slots,
            **asdict(self.blocks.savings),
            "decode_frames": self.decode[0],
            "decode_strips": self.decode[1],
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "device_bytes": self.device,
            "host_bytes": self.host,
            "stages": [asdict(stage) for stage in self.stages],
        }


# --- sizes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What the networks of a model take in the precisions they run in."""

    network: Network
    config: TransformerConfig
    vae_config: VAEConfig
    vae: int
    encoder: int
    text: int
    """At the peak of Step-LLM, a layer of it."""
    on_disk: Mapping[str, int]
    streams: bool
    """Whether blocks can leave the card: those of other packages cannot."""
    from_files: bool
    """Whether they are stored as they are used."""


def released(name: str) -> dict[str, Component]:
    """The networks of a released model by its name (t2v, turbo, ti2v), without its files.

    Raises:
        UsageError: another name.
    """
    known = {**{short: short for short in HUB_IDS}, **{full: short for short, full in HUB_IDS.items()}}
    if name not in known:
        raise UsageError(f"{name} is neither a model folder nor one of {', '.join(HUB_IDS)}.")
    conditioned = {"use_additional_conditions": True} if known[name] == "ti2v" else {}
    configs: dict[str, dict[str, Any]] = {"transformer": conditioned, "vae": {}, "step_llm": {}}
    found = {}
    for part, config in configs.items():
        bare = Component(part, Path(name) / part, config, (), {})
        tensors = {
            n: TensorInfo(bare.folder / "of-the-release.safetensors", n, tuple(p.shape), "BF16")
            for n, p in build_on_meta(bare).named_parameters()
        }
        found[part] = replace(bare, tensors=tensors)
    return found


def sizes_of(components: Mapping[str, Component], mode: Mode, text_mode: Mode) -> Sizes:
    """Counted from configurations, on the meta device."""
    transformer, llm = components["transformer"], components["step_llm"]
    dit: Any = build_on_meta(transformer)
    kinds = {} if mode.on_load is None else formats_of(mode.on_load, dit, transformer.name)
    install(dit, kinds, mode.dtype)
    config = TransformerConfig.from_dict(transformer.config)
    blocks = [nbytes(block, mode.dtype) for block in dit.transformer_blocks]
    layers = [layer for layer in dit.transformer_blocks.modules() if isinstance(layer, QuantizedLinear)]
    # Of weights in 8 or 4 bits alone, one at a time is there in 16.
    alone = [layer.in_features * layer.out_features for layer in layers if layer.activation is None]
    expanded = max(alone, default=0) * mode.dtype.itemsize
    qkv = [block.attn1.wqkv for block in dit.transformer_blocks]
    eight = all(isinstance(layer, QuantizedLinear) and layer.activation is not None for layer in qkv)
    text_keys = nbytes(dit.transformer_blocks[0].attn2.wkv, mode.dtype)
    rest = nbytes(dit, mode.dtype) - sum(blocks) + expanded
    heads = config.num_attention_heads
    network = Network(len(blocks), max(blocks), rest, text_keys, heads, 1.0 if eight else 2.0)
    vae = build_on_meta(components["vae"])
    vae_dtype = torch.float32 if mode.dtype == torch.float32 else torch.bfloat16
    text = llm_bytes(llm, text_mode.dtype, 2, torch.device("cuda"), text_mode.on_load)
    clip = CLIP_BYTES
    if "hunyuan_clip" in components:
        clip = sum(info.numbers for info in components["hunyuan_clip"].tensors.values()) * 4
    disk = {name: c.stored_bytes or 2 * c.parameters for name, c in components.items()}
    streams = not any(foreign.is_foreign(kind) for kind in kinds.values())
    if not streams:  # their layers are made from loaded ones: here they are still in 16 bits
        whole = mode.memory_bytes(transformer)
        network = replace(network, block=max(1, (whole - network.rest) // len(blocks)))
    return Sizes(
        network, config, VAEConfig.from_dict(components["vae"].config), nbytes(vae.decoder, vae_dtype),
        nbytes(vae.encoder, vae_dtype), max(text, clip), disk,
        streams=streams,
        from_files=mode.on_load is None and _as_used(transformer, dit, mode.dtype),
    )  # fmt: skip


def _as_used(component: Component, network: Any, dtype: torch.dtype) -> bool:
    """Whether the blocks' tensors are stored in the very types that they are used in."""
    for path, part in network.transformer_blocks.named_modules():
        exact = isinstance(part, QuantizedLinear)
        for name, parameter in part.named_parameters(recurse=False):
            kind = parameter.dtype if exact and name != "bias" else dtype
            info = component.tensors[".".join(filter(None, ("transformer_blocks", path, name)))]
            if info.file.suffix != ".safetensors" or torch_type(info.dtype) != kind:
                return False
    return True


def nbytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a network on the meta device, where what is not quantized is in ``dtype``."""
    total = 0
    for part in module.modules():
        exact = isinstance(part, QuantizedLinear)
        for name, parameter in part.named_parameters(recurse=False):
            kind = parameter.dtype if exact and name != "bias" else dtype
            total += parameter.numel() * kind.itemsize
    return total


# --- plans --------------------------------------------------------------------------------------------------------


def make_plan(
    sizes: Sizes, settings: GenerationSettings, attention: str, budget: int, host: int | None = None,
    rated: Rated | None = None, itemsize: int = 2, given: bool = True,
) -> Plan:  # fmt: skip
    """The fastest way to make a clip within so many bytes of the card's memory, and of the host's (None: any).

    ``given`` is whether a user set the budget: it decides what an error advises.

    Raises:
        SolostepError: nothing fits; it names the stage and the least that would do.
    """
    tokens = settings.latent_frames * settings.latent_height * settings.latent_width // sizes.config.patch_size**2
    rows = 2 if settings.use_guidance else 1
    clip = Clip(tokens, sizes.config.inner_dim, rows, LLM_TOKENS + CLIP_TOKENS, itemsize)
    network, rates = sizes.network, Rates() if rated is None else rated.blocks
    try:
        if sizes.streams:
            blocks = plan_blocks(network, clip, budget, attention, host=host, rates=rates, from_files=sizes.from_files)
        else:
            blocks = _all_there(network, clip, budget, attention)
    except BudgetError as error:
        if error.host:
            raise SolostepError(
                f"{error.least / 1e9:.3g} GB of host memory are needed at this budget, and there are "
                f"{error.budget / 1e9:.3g} beside the program itself; give --vram or --host-ram more, or convert the "
                "model first (`solostep quantize`), so that its blocks can come from files."
            ) from None
        raise _too_little("The transformer", budget, error.least, settings, given) from None
    decode, needed = choose_decoding(
        sizes.vae_config, settings.height, settings.width, budget - sizes.vae, itemsize
    )  # fmt: skip
    seconds = None if rated is None else step_seconds(network, clip, blocks, rates)
    known, disk = rated is not None, sizes.on_disk
    step_disk = blocks.disk * network.block
    text = disk["step_llm"] + disk.get("hunyuan_clip", CLIP_BYTES)
    pixels = settings.num_frames * settings.height * settings.width
    steps = settings.num_inference_steps
    stages = [
        StageForecast("text", sizes.text, 0, text, text / rates.disk if known else None),
        StageForecast(
            "load transformer", network.rest + (blocks.resident + blocks.slots) * network.block, blocks.host,
            disk["transformer"], disk["transformer"] / rates.disk if known else None,
        ),
        StageForecast(
            "denoise", blocks.device, blocks.host, step_disk * steps, None if seconds is None else seconds * steps
        ),
        StageForecast(
            "decode and write", sizes.vae + needed, settings.height * settings.width * STRIPS_ON_HOST * (decode[1] > 1),
            disk["vae"],
            PLACES[decode] * pixels / rated.decode if rated is not None else None
        ),
    ]  # fmt: skip
    if settings.image_to_video:
        first = first_frame_bytes(sizes, settings)
        stages.insert(1, StageForecast("first frame", first, 0, disk["vae"],
                                       disk["vae"] / rates.disk if known else None))  # fmt: skip
    for stage in stages:
        if stage.device > budget:
            raise _too_little(f"The stage {stage.name!r}", budget, stage.device, settings, given)
    return Plan(budget, blocks, network, decode, tuple(stages), seconds)


def as_placed(plan: Plan, placed: BlockPlan) -> Plan:
    """The plan for a clip whose blocks already are where an earlier plan put them; only its savings are new."""
    more = (placed.resident + placed.slots - plan.blocks.resident - plan.blocks.slots) * plan.network.block
    blocks = replace(placed, savings=plan.blocks.savings, device=plan.blocks.device + more)
    stages = [
        replace(s, device=s.device + more, host=blocks.host) if s.name in ("load transformer", "denoise") else s
        for s in plan.stages
    ]
    return replace(plan, blocks=blocks, stages=tuple(stages))


def _all_there(network: Network, clip: Clip, budget: int, attention: str) -> BlockPlan:
    """For blocks that cannot stream, and whose products cannot be made for some heads alone."""
    for savings in (s for s in all_savings(network, clip, attention) if s.head_groups == 1):
        device = network.rest + network.blocks * network.block + activation_bytes(network, clip, attention, savings)
        if device <= budget:
            return BlockPlan(network.blocks, 0, device, 0, 0, savings)
    raise BudgetError(budget, device)


def first_frame_bytes(sizes: Sizes, settings: GenerationSettings) -> int:
    """What encoding one frame takes, weights included: 0.22 and 2.05 GB at 544x992."""
    return sizes.encoder + FRAME_BYTES * settings.height * settings.width


def choose_decoding(config: VAEConfig, height: int, width: int, room: int, itemsize: int) -> tuple[Decoding, int]:
    """The fastest way to decode in so many bytes beside the weights, or the smallest; and what it takes."""
    for place in PLACES:
        needed = decode_bytes(config, height, width, *place, itemsize)
        if needed <= room:
            break
    return place, needed


def how_decoded(frames: int | None, strips: int) -> str:
    """In words."""
    if frames is None:
        return "chunk by chunk"
    some = "frame by frame" if frames == 1 else f"{frames} frames at a time"
    return some + (f" in {strips} strips" if strips > 1 else "")


def _too_little(what: str, budget: int, least: int, settings: GenerationSettings, given: bool) -> SolostepError:
    more = "give --vram more" if given else "close other programs"
    return SolostepError(
        f"{what} takes {least / 1e9:.3g} GB at least for {settings.num_frames} frames of {settings.height}x"
        f"{settings.width}, and the budget leaves {budget / 1e9:.3g} GB; {more}, or make a smaller or "
        "shorter clip (--height, --width, --frames)."
    )


def smallest(sizes: Sizes, settings: GenerationSettings, attention: str) -> int:
    """The least budget, in steps of 100 MB, that a plan exists for."""
    low, high = 0, 4000
    while low < high:
        middle = (low + high) // 2
        try:
            make_plan(sizes, settings, attention, middle * 10**8)
            high = middle
        except SolostepError:
            low = middle + 1
    return low * 10**8


# --- for a model by name or folder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A model, a clip and precisions, ready to be planned for one budget after the other."""

    sizes: Sizes
    settings: GenerationSettings
    mode: Mode
    text_mode: Mode
    attention: str
    rated: Rated | None

    def plan(self, vram: int, host: int | None = None) -> Plan:
        """For a card of which the process may take ``vram`` bytes, torch's and the driver's together; ``host`` is
        likewise for all of the process.

        Raises:
            SolostepError: nothing fits.
        """
        itemsize = 4 if self.mode.dtype == torch.float32 else 2
        host = None if host is None else max(0, host - PROGRAM)
        return make_plan(self.sizes, self.settings, self.attention, vram - CONTEXT, host, self.rated, itemsize)

    def smallest(self) -> int:
        """The least ``vram`` that a plan exists for, in steps of 100 MB."""
        return smallest(self.sizes, self.settings, self.attention) + -(-CONTEXT // 10**8) * 10**8


def ask(
    model: str, precision: str | None = None, text_precision: str | None = None, attention: str | None = None,
    device: torch.device | None = None, **values: Any,
) -> Asked:  # fmt: skip
    """What a model, by its folder or just its name, takes for a clip; ``values`` are those of GenerationSettings.

    On a card, ``device``, its rates are measured where they are not known.

    Raises:
        UsageError, CheckpointError: no model, a wrong value, or a folder that is damaged.
    """
    check_precision(precision)
    check_precision(text_precision, "--text-precision")
    check_attention(attention, precision)
    if model in HUB_IDS or model in HUB_IDS.values():
        components: Mapping[str, Component] = released(model)
        preset = PRESETS[next(short for short, full in HUB_IDS.items() if model in (short, full))]
        conditioned = preset.name == "ti2v"
    else:
        folder = open_model(model)
        components, preset, conditioned = folder.components, folder.preset, folder.is_image_to_video
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    mode = choose_mode(components["transformer"], precision, "bf16", "--precision", dtype)
    text_mode = choose_mode(
        components["step_llm"], text_precision, "fp32" if precision == "fp32" else "bf16", "--text-precision", dtype
    )
    settings = filled_in(preset, values, conditioned)
    # Without a card here, the plan is for one elsewhere.
    kind = choose_attention(attention, mode, device or torch.device("cuda"))
    rated = None
    if device is not None and device.type == "cuda":
        from .rates import disk_rate, measured_rates

        rated = measured_rates(device, mode, kind)
        disk = disk_rate(components["transformer"].files)
        if disk is not None and rated is not None:
            rated = replace(rated, blocks=replace(rated.blocks, disk=disk))
    return Asked(sizes_of(components, mode, text_mode), settings, mode, text_mode, kind, rated)
