"""Writes the demo model in the released folder layout, bf16, and its two tokenizers.

The image-to-video folder holds only what is its own; its ``model_index.json`` says with ``"shared": "../t2v"`` where
the VAE and the text encoders are.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .captions import chinese_words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_network(root: Path, name: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """One network: its ``config.json`` and its weights in bf16 under the released file name."""
    from safetensors.torch import save_file

    folder, stem = {
        "transformer": (root / "transformer", "diffusion_pytorch_model"),
        "vae": (root / "vae", "vae_v2"),
        "step_llm": (root / "step_llm", "model"),
        "hunyuan_clip": (root / "hunyuan_clip" / "clip_text_encoder", "model"),
    }[name]
    stored = {}
    for key, tensor in tensors.items():
        # The released VAE file keeps an older name for the decoder's last convolution.
        key = key.replace("decoder.conv_out.conv.", "decoder.conv_out.") if name == "vae" else key
        stored[key] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    write_json(folder / "config.json", config)
    save_file(stored, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def write_index(root: Path, preset: str, defaults: dict[str, Any], shared: str | None = None) -> None:
    """``model_index.json`` with the demo's own defaults, and the scheduler's configuration."""
    own: dict[str, Any] = {"preset": preset, "defaults": defaults}
    if shared is not None:
        own["shared"] = shared
    write_json(root / "model_index.json", {"_class_name": "StepVideoPipeline", "solostep": own})
    write_json(
        root / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchDiscreteScheduler", "num_train_timesteps": 1000, "reverse": False, "solver": "euler"},
    )


def defaults(size: int, guidance: float, steps: int, time_shift: float, **more: Any) -> dict[str, Any]:
    """The demo's generation settings; nothing is added to a prompt."""
    return {
        "name": "demo",
        "num_frames": 17,
        "max_frames": 17,
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "time_shift": time_shift,
        "positive": "",
        "negative": "",
        **more,
    }


def write_sentencepiece(root: Path, captions: Sequence[str]) -> int:
    """Trains Step-LLM's tokenizer on the captions; returns its size.

    Chinese words are kept whole, so that a piece never joins, say, a colour and a shape. Case is folded and full-width
    punctuation is brought to its ASCII form. What no caption holds falls back to bytes.
    """
    import sentencepiece

    path = root / "step_llm" / "step1_chat_tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        user_defined_symbols=chinese_words(),
        normalization_rule_name="nmt_nfkc_cf",
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size())


def write_wordpieces(root: Path, captions: Sequence[str]) -> int:
    """Writes Hunyuan-CLIP's vocabulary: the captions' English words and Chinese characters, and single letters and
    digits for other words; returns its size."""
    words = sorted({w.strip(",.:") for text in captions for w in text.split() if w.isascii()} - {""})
    chinese = sorted({c for text in captions for c in text if not c.isascii()})
    letters = string.ascii_lowercase + string.digits
    single = [c for c in letters if c not in words]
    vocabulary = [*SPECIAL, *words, *single, *("##" + c for c in letters), *",.:!?-", *chinese]
    folder = root / "hunyuan_clip" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    write_json(folder / "special_tokens_map.json", roles)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "tokenize_chinese_chars": True,
         "model_max_length": 77, **roles},
    )  # fmt: skip
    return len(vocabulary)


def folder_bytes(root: Path) -> int:
    return sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
