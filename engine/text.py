"""Prompts -> embeddings of both text encoders, kept on disk so that a prompt is encoded once.

An encoder is loaded only if a prompt needs it, used for all prompts at once, and freed. Prompts go through one at a
time, so an embedding never depends on what else was encoded with it. Of Step-LLM, 39 GB in bf16, one layer is in memory
at a time: all prompts go through it before the next one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..offload.reader import default_ring
from ..quant.foreign import quiet
from .checkpoint import EMBEDDINGS, ModelFolder, load, tokenizer_files
from .config import CLIP_TOKENS, LLM_TOKENS, StepLLMConfig
from .errors import CheckpointError
from .files import replacing
from .headers import torch_type
from .models.step_llm import run_layers, work_bytes
from .precision import Mode, choose_mode
from .runtime import release_memory, require_memory
from .weights import Component, largest_part_bytes, load_each

if TYPE_CHECKING:
    from ..quant.recipe import Recipe

log = logging.getLogger("solostep")
BOS, EOS = 1, 2
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class PromptEmbedding:
    """What the DiT sees of a prompt: ``llm [320, c1]``, ``clip [77, c2]`` and how many tokens of both count."""

    llm: Tensor
    clip: Tensor
    length: int


class LLMTokenizer:
    """sentencepiece ids of a prompt: BOS in front, EOS at the end, padded with EOS to 320.

    A prompt is plain text: control symbols in it are not parsed as such.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise CheckpointError(f"The tokenizer {path} is not a sentencepiece model; download it again.") from None

    def count(self, text: str) -> int:
        """Tokens of a text without its two ends, not cut."""
        return len(self.model.encode(text))

    def __call__(self, text: str, max_length: int = LLM_TOKENS) -> tuple[list[int], int]:
        """Ids padded to ``max_length``, and how many of them are not padding."""
        ids = [BOS, *self.model.encode(text)[: max_length - 2], EOS]
        return ids + [EOS] * (max_length - len(ids)), len(ids)


class ClipTokenizer:
    """BERT wordpieces of a prompt, cut and padded to 77."""

    def __init__(self, folder: Path) -> None:
        with quiet():
            from transformers import BertTokenizer

        try:
            self.tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises many types for a damaged folder
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); download it again."
            ) from None

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and mask, 77 each."""
        out = self.tokenizer(text, padding="max_length", truncation=True, max_length=CLIP_TOKENS)
        return list(out["input_ids"]), list(out["attention_mask"])


def _cache_key(text: str, model: ModelFolder, dtype: torch.dtype, mode: Mode, device: torch.device) -> str:
    digest = hashlib.sha256()
    tokenizers = [hashlib.sha256(f.read_bytes()).hexdigest() for f in tokenizer_files(model.root)]
    encoders = [model.components[name].fingerprint for name in ("step_llm", "hunyuan_clip")]
    how = [str(dtype), mode.name, str(mode.dtype), mode.described()]
    # The device's type counts: kernels differ in the last bits, and a run has to repeat bit for bit.
    digest.update(json.dumps([2, text, tokenizers, encoders, how, device.type]).encode())
    return digest.hexdigest()


def _read_cached(path: Path) -> PromptEmbedding | None:
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            llm, clip = file.get_tensor("llm").clone(), file.get_tensor("clip").clone()
            return PromptEmbedding(llm, clip, int(file.metadata()["length"]))
    except Exception as error:  # a damaged cache entry is no reason to stop: it can be made again
        log.warning("The cached prompt embedding %s cannot be read (%s); it is made again.", path, error)
        return None


def _write_cached(path: Path, embedding: PromptEmbedding) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"llm": embedding.llm.contiguous(), "clip": embedding.clip.contiguous()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"length": str(embedding.length)})
    except Exception as error:  # safetensors wraps a full disk in its own type
        log.warning("The prompt embedding could not be cached at %s (%s); going on without.", path, error)


def encode_prompts(
    model: ModelFolder,
    texts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
    mode: Mode | None = None,
) -> dict[str, PromptEmbedding]:
    """Embeddings of ``texts``, by text, on the CPU; from ``cache`` where they are already there.

    Step-LLM runs in ``mode``, by default in ``dtype`` as it is stored. Hunyuan-CLIP always runs in fp32, as in the
    release, and its output is cast to ``dtype``.
    """
    mode = mode or choose_mode(model.components["step_llm"], None, _NAMES[dtype], "", dtype)
    texts = list(dict.fromkeys(texts))
    paths = {t: cache / f"{_cache_key(t, model, dtype, mode, device)}.safetensors" for t in texts} if cache else {}
    found = {t: e for t, path in paths.items() if (e := _read_cached(path)) is not None}
    todo = [t for t in texts if t not in found]
    if todo:
        llm = run_step_llm(model, todo, device, mode.dtype, progress, mode.on_load)
        clip = run_clip(model, todo, device)
        for text in todo:
            states, length = llm[text]
            # All 77 CLIP positions count, padding too: the official pipeline sets their mask to ones.
            found[text] = PromptEmbedding(states, clip[text].to(dtype), CLIP_TOKENS + length)
            if paths:
                _write_cached(paths[text], found[text])
    return {t: found[t] for t in texts}


def run_step_llm(
    model: ModelFolder,
    texts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
) -> dict[str, tuple[Tensor, int]]:
    """Runs each text through Step-LLM, layer by layer: hidden states ``[320, c]`` and the number of tokens.

    ``device`` holds one layer at a time, the first bytes of the next, and the states of all texts; the CPU the table of
    embeddings, until the texts' rows are taken from it. The values are those of the whole network, bit by bit.
    ``recipe`` quantizes each layer as it is loaded; one that is stored quantized stays so.

    Raises:
        CheckpointError, UsageError: see :func:`solostep.engine.weights.load`.
        SolostepError: the device's memory is too small for a layer.
    """
    tokenizer = LLMTokenizer(tokenizer_files(model.root)[0])
    for text in texts:
        if (count := tokenizer.count(text)) > LLM_TOKENS - 2:
            log.warning(
                "The prompt %r... has %d tokens and Step-LLM reads %d: its end is cut off (additions included).",
                text[:40], count, LLM_TOKENS - 2,
            )  # fmt: skip
    component = model.components["step_llm"]
    require_memory(llm_bytes(component, dtype, len(texts), device, recipe), device, "The text encoder Step-LLM")
    ids, lengths = zip(*map(tokenizer, texts), strict=True)
    total = sum(info.numbers for info in component.tensors.values())
    table = component.tensors[EMBEDDINGS["step_llm"]].numbers

    def told(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    rows = _embedded(component, ids, device, dtype, told)
    layers = load_each(component, device, dtype, _layers(component), recipe, lambda done, of: told(table + done, of))
    run_layers(StepLLMConfig.from_dict(component.config), layers, rows)
    found = {text: (row[0].cpu(), length) for text, row, length in zip(texts, rows, lengths, strict=True)}
    del rows
    release_memory(device)
    return found


def _layers(component: Component) -> list[str]:
    """Step-LLM's layers by their paths."""
    return [f"transformer.layers.{i}" for i in range(StepLLMConfig.from_dict(component.config).num_layers)]


def llm_bytes(
    component: Component, dtype: torch.dtype, texts: int, device: torch.device, recipe: Recipe | None = None
) -> int:
    """What :func:`run_step_llm` takes on ``device`` at most: a layer, what arrives of the next, and all texts' states.

    Raises:
        UsageError: the recipe fits no linear of the network.
    """
    config, table = StepLLMConfig.from_dict(component.config), component.tensors[EMBEDDINGS["step_llm"]]
    states = texts * LLM_TOKENS * config.hidden_size * dtype.itemsize
    layers = largest_part_bytes(component, dtype, _layers(component), recipe) + work_bytes(config, LLM_TOKENS)
    if device.type == "cpu":  # the table is there too, before the layers, and what is read ahead of a layer's use
        ring = default_ring(device)
        layers = max(layers + ring.buffers * ring.size, table.numbers * torch_type(table.dtype).itemsize)
    return states + layers


def _embedded(
    component: Component, ids: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype,
    progress: Callable[[int, int], None],
) -> list[Tensor]:  # fmt: skip
    """The embeddings ``[1, S, c]`` of each text's ids, on ``device``. Their table stays on the CPU, as it is stored."""
    stored = torch_type(component.tensors[EMBEDDINGS["step_llm"]].dtype)
    table: Any = load(component, "cpu", stored, part="tok_embeddings", progress=progress)
    return [table.word_embeddings(torch.tensor([row])).to(device, dtype) for row in ids]


def run_clip(model: ModelFolder, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Loads Hunyuan-CLIP in fp32, runs each text and frees it: hidden states ``[77, c]``."""
    tokenizer = ClipTokenizer(tokenizer_files(model.root)[1].parent)
    network: Any = load(model.components["hunyuan_clip"], device, torch.float32)
    found = {}
    for text in texts:
        ids, mask = (torch.tensor([values], device=device) for values in tokenizer(text))
        found[text] = network(ids, mask)[0].cpu()
    del network
    release_memory(device)
    return found
