"""The released folder layout: finding it, checking it from its headers alone, and loading it strictly.

    model_index.json
    transformer/   config.json, diffusion_pytorch_model*.safetensors (+ index)
    vae/           vae_v2.safetensors (config.json is optional: the release has none)
    step_llm/      config.json, model*.safetensors (+ index), step1_chat_tokenizer.model
    hunyuan_clip/  clip_text_encoder/ (config.json, pytorch_model.bin), tokenizer/ (vocab.txt, ...)
    scheduler/     scheduler_config.json

All of it is checked from headers before anything is loaded; loading one network is in weights.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import PRESETS, Preset, TransformerConfig, VAEConfig
from .errors import CheckpointError, UsageError
from .hub import by_hand, resolve_model
from .weights import (
    Component,
    TensorInfo,
    build_on_meta,
    check_tensors,
    load,
    memory_bytes,
    read_bin,
    read_header,
    read_json,
    read_quantization,
    type_name,
)

__all__ = ["COMPONENTS", "Component", "ModelFolder", "TensorInfo", "build_on_meta", "check_tensors", "describe", "load"]
__all__ += ["memory_bytes", "network_root", "open_component", "open_model", "read_header", "tokenizer_files"]

log = logging.getLogger("solostep")
COMPONENTS = ("transformer", "vae", "step_llm", "hunyuan_clip")
EMBEDDINGS = {
    "step_llm": "tok_embeddings.word_embeddings.weight",
    "hunyuan_clip": "bert.embeddings.word_embeddings.weight",
}
"""The tensor with one row a word of each text encoder."""


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder: its four networks, and the preset that goes with it."""

    root: Path
    source: str
    preset: Preset
    components: Mapping[str, Component] = field(repr=False)
    note: str = ""
    """Something that every user of this model has to know, said with every video."""

    @property
    def is_image_to_video(self) -> bool:
        return bool(self.components["transformer"].config.get("use_additional_conditions", False))

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        return TransformerConfig.from_dict(self.components["transformer"].config)

    @cached_property
    def vae_config(self) -> VAEConfig:
        return VAEConfig.from_dict(self.components["vae"].config)


def _weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The shards named by the index, or the single file."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{index} has no weight_map of file names; download it again.")
        files = tuple(folder / name for name in sorted(set(names)))
        for file in files:
            if not file.exists():
                raise CheckpointError(
                    f"{file} is missing, though {index.name} names it; "
                    f"download it, for example with `{by_hand('', folder.parent)}`."
                )
        return files
    single = folder / f"{stem}.safetensors"
    if single.exists():
        return (single,)
    raise CheckpointError(
        f"{folder} holds neither {index.name} nor {single.name}; "
        f"download them, for example with `{by_hand('', folder.parent)}`."
    )


def _component(name: str, folder: Path, config: Mapping[str, Any], files: tuple[Path, ...]) -> Component:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for key, info in read_header(file).items():
            if key in tensors:
                raise CheckpointError(f"Tensor {key} stands both in {tensors[key].file} and in {file}; remove one.")
            tensors[key] = info
    return Component(name, folder, config, files, tensors)


def _vae(root: Path) -> Component:
    folder = root / "vae"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    file = folder / "vae_v2.safetensors"
    if not file.exists():
        other = " (vae.safetensors is version 1, another network)" if (folder / "vae.safetensors").exists() else ""
        raise CheckpointError(f"{file} is missing{other}; download it, for example with `{by_hand('', root)}`.")
    component = _component("vae", folder, config, (file,))
    # The released file keeps an older name for the decoder's last convolution.
    renamed = {
        re.sub(r"^decoder\.conv_out\.(weight|bias)$", r"decoder.conv_out.conv.\1", k): t
        for k, t in component.tensors.items()
    }
    return Component("vae", folder, config, (file,), renamed)


def _clip(root: Path) -> Component:
    folder = root / "hunyuan_clip" / "clip_text_encoder"
    config = read_json(folder / "config.json")
    single = folder / "model.safetensors"
    if single.exists():
        found = {info.stored_name: info for info in read_header(single).values()}
        files: tuple[Path, ...] = (single,)
    else:
        file = folder / "pytorch_model.bin"
        if not file.exists():
            raise CheckpointError(f"{file} is missing; download it, for example with `{by_hand('', root)}`.")
        found = {k: TensorInfo(file, k, tuple(t.shape), type_name(t)) for k, t in read_bin(file).items()}
        files = (file,)
    # Only the encoder is used: the pooler and whatever heads the file may hold beside it are passed over.
    used = {k: t for k, t in found.items() if k.startswith("bert.") and not k.startswith("bert.pooler.")}
    if not used:
        used = {f"bert.{k}": t for k, t in found.items() if k.startswith(("embeddings.", "encoder."))}
    # Older files store this index, which is no weight.
    used.pop("bert.embeddings.position_ids", None)
    kept = {t.stored_name for t in used.values()}
    return Component("hunyuan_clip", folder, config, files, used, tuple(sorted(set(found) - kept)))


# --- the whole folder ---------------------------------------------------------------------------------------------


def network_root(root: Path, name: str) -> Path:
    """The model folder that holds a network: ``root``, or the one that ``root`` shares networks with.

    model_index.json may name another model folder, ``{"solostep": {"shared": "../t2v"}}``; networks that ``root`` lacks
    come from there, so that two models with the same text encoders and VAE need them once.
    """
    shared = _own_section(root).get("shared")
    if shared is None or (root / name).is_dir():
        return root
    return (root / str(shared)).resolve()


def open_component(root: Path, name: str) -> Component:
    """Reads configuration and headers of one network, and checks them against what the network needs.

    Raises:
        CheckpointError: a file is missing, cut short or damaged, or a tensor is missing, unknown or of a wrong shape.
    """
    root = network_root(root, name)
    if name == "vae":
        component = _vae(root)
    elif name == "hunyuan_clip":
        component = _clip(root)
    else:
        folder = root / name
        stem = "diffusion_pytorch_model" if name == "transformer" else "model"
        component = _component(name, folder, read_json(folder / "config.json"), _weight_files(folder, stem))
        component = replace(component, quantization=read_quantization(folder))
    check_tensors(component, build_on_meta(component))
    return component


def open_model(model: str | Path, preset: str | None = None) -> ModelFolder:
    """Finds a model and checks all of it from headers: names, shapes, types, lengths, tokenizers. Loads nothing.

    Args:
        model: a folder or a Hugging Face id.
        preset: t2v, turbo or ti2v, where the folder does not say which it is.

    Raises:
        UsageError: not a folder or id, or an unknown preset.
        CheckpointError: what is wrong with the folder, by file and tensor.
    """
    check_preset(preset)
    root, source = resolve_model(model)
    _check_folders(root, source)
    return _together(root, source, {name: open_component(root, name) for name in COMPONENTS}, preset)


def _check_folders(root: Path, source: str) -> None:
    """What can be missing as a whole."""
    if (root / "conversion.json").exists():
        raise CheckpointError(
            f"{root} is a conversion that is not finished; run the command that began it again, and it goes on."
        )
    if not (root / "transformer").is_dir() and not (root / "model_index.json").exists():
        if inside := sorted(str(index.parent) for index in root.glob("*/model_index.json")):
            raise CheckpointError(f"{root} is not a Step-Video model but holds some; give one: {', '.join(inside)}.")
        raise CheckpointError(
            f"{root} is not a Step-Video model: it has no model_index.json and no transformer folder; "
            f"download one with `{by_hand('t2v')}`."
        )
    missing = [name for name in COMPONENTS if not (network_root(root, name) / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{network_root(root, missing[0])} has no folder {missing[0]}; "
            f"download it, for example with `{by_hand(source, root)}`."
        )
    for file in tokenizer_files(root):
        if not file.exists():
            raise CheckpointError(
                f"The tokenizer file {file} is missing; download it, for example with `{by_hand(source, root)}`."
            )


def _together(root: Path, source: str, components: Mapping[str, Component], preset: str | None) -> ModelFolder:
    """Four checked networks as one model, if they belong together."""
    section = _own_section(root)
    chosen = _preset(root, source, components["transformer"], section, preset)
    folder = ModelFolder(root, source, chosen, components, str(section.get("note", "")))
    _check_widths(folder)
    _check_tokenizers(folder)
    return folder


def tokenizer_files(root: Path) -> tuple[Path, Path]:
    """The sentencepiece model of Step-LLM and the word list of Hunyuan-CLIP."""
    llm, clip = network_root(root, "step_llm"), network_root(root, "hunyuan_clip")
    return llm / "step_llm" / "step1_chat_tokenizer.model", clip / "hunyuan_clip" / "tokenizer" / "vocab.txt"


def _own_section(root: Path) -> Mapping[str, Any]:
    """The optional ``solostep`` section of model_index.json: preset, defaults, note, shared."""
    path = root / "model_index.json"
    section = read_json(path).get("solostep", {}) if path.exists() else {}
    if not isinstance(section, dict) or not isinstance(section.get("defaults", {}), dict):
        raise CheckpointError(f"{path}: its solostep section and the defaults in it have to be JSON objects.")
    return section


def check_preset(name: str | None) -> None:
    """Raises UsageError for an unknown preset."""
    if name is not None and name not in PRESETS:
        raise UsageError(f"--preset {name} is unknown; choose one of {', '.join(PRESETS)}.")


def _preset(root: Path, source: str, transformer: Component, own: Mapping[str, Any], name: str | None) -> Preset:
    """Which of the three released models this is.

    Image-to-video shows in transformer/config.json. Turbo has the same network as text-to-video: it is known by the
    name of its repository or folder, or by a ``solostep`` section of model_index.json, which may also hold settings.
    """
    if name is None:
        index = read_json(root / "model_index.json") if (root / "model_index.json").exists() else {}
        # Not the folders above it, but for the hub's cache, whose folders are named by hashes below models--NAME.
        names = [Path(source).name, *(part for part in root.parts if part.startswith("models--"))]
        names += [index.get("_name_or_path", ""), transformer.config.get("_name_or_path", "")]
        name = "turbo" if any("turbo" in str(n).lower() for n in names) else "t2v"
        name = "ti2v" if transformer.config.get("use_additional_conditions") else own.get("preset", name)
        if not isinstance(name, str) or name not in PRESETS:
            raise CheckpointError(
                f"{root / 'model_index.json'}: unknown preset {name!r} in its solostep section; "
                f"make it one of {', '.join(PRESETS)}."
            )
    elif own.get("defaults"):
        kept = ", ".join(own["defaults"])
        log.warning("--preset %s: model_index.json of this model has defaults of its own, which stay: %s", name, kept)
    return PRESETS[name].updated(own.get("defaults", {}), str(root / "model_index.json"))


def _check_widths(folder: ModelFolder) -> None:
    """The networks of one folder have to fit together."""
    transformer = folder.transformer_config
    widths = (
        folder.components["step_llm"].config.get("hidden_size"),
        folder.components["hunyuan_clip"].config.get("hidden_size"),
    )
    if widths != transformer.caption_channels:
        raise CheckpointError(
            f"{folder.root}: the text encoders are {widths[0]} and {widths[1]} wide, but transformer/config.json "
            f"expects caption_channels {list(transformer.caption_channels)}; the folders are of different models."
        )
    if folder.vae_config.z_channels != transformer.in_channels:
        raise CheckpointError(
            f"{folder.root}: the VAE has {folder.vae_config.z_channels} latent channels and the transformer "
            f"{transformer.in_channels}; the folders are of different models."
        )


def _check_tokenizers(folder: ModelFolder) -> None:
    """Both tokenizers can be read and fit their network; else a prompt fails late, or silently becomes other words."""
    from sentencepiece import SentencePieceProcessor

    words, vocabulary = tokenizer_files(folder.root)
    try:
        count = SentencePieceProcessor(model_file=str(words)).get_piece_size()
    except (OSError, RuntimeError):
        raise CheckpointError(f"The tokenizer {words} is not a sentencepiece model; download it again.") from None
    rows = [folder.components[name].tensors[embedding].shape[0] for name, embedding in EMBEDDINGS.items()]
    try:
        known = [word.strip() for word in vocabulary.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, ValueError):
        raise CheckpointError(f"The word list {vocabulary} is not UTF-8 text; download it again.") from None
    lost = [mark for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if mark not in known]
    if lost:
        raise CheckpointError(f"The word list {vocabulary} is damaged, it lacks {lost[0]}; download it again.")
    for file, there, rows_there in zip((words, vocabulary), (count, len(known)), rows, strict=True):
        if there > rows_there:
            raise CheckpointError(
                f"{file} holds {there} words and its network knows {rows_there}: it is of another model; "
                "download it again."
            )


def _describe_quantization(component: Component) -> dict[str, Any] | None:
    stored = component.quantization
    if stored is None:
        return None
    return {"precision": stored.precision, "recipe": stored.recipe.name, "linears": stored.counts}


def describe(model: str | Path) -> dict[str, Any]:
    """What a model folder holds, and every problem found: for `solostep info`. Raises only if there is no folder."""
    root, source = resolve_model(model)
    components, problems, whole = [], [], {}
    for name in COMPONENTS:
        entry: dict[str, Any] = {"name": name, "problem": None}
        try:
            c = whole[name] = open_component(root, name)
            entry |= {"parameters": c.parameters, "stored_bytes": c.stored_bytes, "dtypes": c.dtypes,
                      "files": len(c.files), "fingerprint": c.fingerprint, "ignored": list(c.ignored),
                      "quantization": _describe_quantization(c)}  # fmt: skip
        except CheckpointError as error:
            entry["problem"] = str(error)
            if str(error) not in problems:
                problems.append(str(error))
        components.append(entry)
    found = {"root": str(root), "source": source, "preset": None, "note": "", "components": components}
    try:
        _check_folders(root, source)
        if len(whole) == len(COMPONENTS):
            folder = _together(root, source, whole, None)
            found |= {"preset": asdict(folder.preset), "note": folder.note}
    except CheckpointError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return found | {"problems": problems}
