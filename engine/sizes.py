"""What the networks of a model take, on a card and on disk, counted from configurations and headers: no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..offload.planner import Network
from ..quant import foreign
from ..quant.formats import install
from ..quant.linear import QuantizedLinear
from .checkpoint import EMBEDDINGS
from .config import TransformerConfig, VAEConfig
from .errors import UsageError
from .headers import TensorInfo, torch_type, type_name
from .hub import HUB_IDS
from .precision import Mode
from .quantization import Quantization, formats_of
from .text import llm_bytes
from .weights import Component, build_on_meta

CLIP_BYTES = 1_410_000_000
"""Hunyuan-CLIP, BERT-large in fp32."""


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
    table: int
    """Its table of embeddings, which is in host memory until the texts' rows are taken from it."""
    on_disk: Mapping[str, int]
    """What is read for each stage: the text encoders, the transformer, the VAE's two halves."""
    streams: bool
    """Whether blocks can leave the card: those of other packages cannot."""
    from_files: bool
    """Whether they are stored as they are used."""
    rounded: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the transformer that are rounded to each format while it is loaded."""
    quantized: bool = False
    """Whether any weights of its blocks are, by this package or another."""
    on_load: bool = False
    """Whether weights are quantized while the transformer is loaded, by this package or another."""

    @property
    def could_be_converted(self) -> bool:
        """Whether blocks would come from files if the model was converted first (`solostep quantize`)."""
        return self.streams and self.on_load and not self.from_files


@functools.cache
def released(name: str) -> Mapping[str, Component]:
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


def sizes_of(
    components: Mapping[str, Component], mode: Mode, text_mode: Mode, converted: bool = False
) -> Sizes:  # fmt: skip
    """Counted from configurations, on the meta device; ``converted`` is as if the model were stored in the precisions
    that it runs in (`solostep quantize`)."""
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
    if converted and text_mode.on_load is not None:
        text = llm_bytes(as_stored(llm, text_mode), text_mode.dtype, 2, torch.device("cuda"))
    else:
        text = llm_bytes(llm, text_mode.dtype, 2, torch.device("cuda"), text_mode.on_load)
    clip = CLIP_BYTES
    if "hunyuan_clip" in components:
        clip = sum(info.numbers for info in components["hunyuan_clip"].tensors.values()) * 4
    streams = not any(foreign.is_foreign(kind) for kind in kinds.values())
    text_on_disk = text_mode.memory_bytes(llm) if converted and text_mode.on_load else stored_bytes(llm)
    clip_on_disk = stored_bytes(components["hunyuan_clip"]) if "hunyuan_clip" in components else CLIP_BYTES
    converted = converted and streams and mode.on_load is not None
    disk = {
        "text": text_on_disk + clip_on_disk,
        "transformer": mode.memory_bytes(transformer) if converted else stored_bytes(transformer),
        "encoder": stored_bytes(components["vae"], "encoder."), "decoder": stored_bytes(components["vae"], "decoder."),
    }  # fmt: skip
    if not streams:  # their layers are made from loaded ones: here they are still in 16 bits
        whole = mode.memory_bytes(transformer)
        network = replace(network, block=max(1, (whole - network.rest) // len(blocks)))
    return Sizes(
        network, config, VAEConfig.from_dict(components["vae"].config), nbytes(vae.decoder, vae_dtype),
        nbytes(vae.encoder, vae_dtype), max(text, clip), stored_bytes(llm, EMBEDDINGS["step_llm"]), disk,
        streams=streams,
        from_files=converted or (mode.on_load is None and _as_used(transformer, dit, mode.dtype)),
        rounded={} if converted else _numbers(dit, kinds), quantized=bool(layers or kinds),
        on_load=not converted and mode.on_load is not None,
    )  # fmt: skip


def _numbers(network: nn.Module, kinds: Mapping[str, str]) -> dict[str, int]:
    """Of the linears at these paths, by format."""
    numbers: dict[str, int] = {}
    for path, kind in kinds.items():
        layer: Any = network.get_submodule(path)
        numbers[kind] = numbers.get(kind, 0) + layer.in_features * layer.out_features
    return numbers


def as_stored(component: Component, mode: Mode) -> Component:
    """A network as `solostep quantize` stores it in a mode: its quantized linears, and their tensors, without files."""
    assert mode.on_load is not None
    formats = formats_of(mode.on_load, build_on_meta(component), component.name)
    made = replace(component, quantization=Quantization(mode.name, mode.on_load, formats, {}))
    file, tensors = component.folder / "as-stored.safetensors", {}
    for name, parameter in build_on_meta(made).named_parameters():
        kept = component.tensors.get(name)
        quantized = kept is None or name.removesuffix(".weight") in formats
        tensors[name] = TensorInfo(file, name, tuple(parameter.shape), type_name(parameter)) if quantized else kept
    return replace(made, tensors=tensors)


def stored_bytes(component: Component, prefix: str = "") -> int:
    """Bytes of the tensors in its files whose names begin with ``prefix``."""
    tensors = component.tensors.items()
    return sum(info.numbers * torch_type(info.dtype).itemsize for name, info in tensors if name.startswith(prefix))


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
