"""A tiny complete model with seeded random weights, in the released folder layout, built on first use.

It shows that the whole chain runs, with no download and in seconds; its videos are noise.
"""

from __future__ import annotations

import json
import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

from ..config import cache_dir

VERSION = 1
"""Part of the folder's name: raise it when anything below changes."""

SENTENCES = (
    "a red circle moving right on a blue background",
    "a green square moving up on a white background",
    "a yellow star rotates slowly, the camera pans left",
    "一个红色的圆形在蓝色背景上向右移动",
    "一个绿色的正方形在白色背景上向上移动",
    "超高清、画面稳定、流畅动作、逼真的细节",
    "画面暗、低分辨率、模糊、低质量",
)
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "patch_size": 1,
    "norm_eps": 1e-6,
    "use_additional_conditions": False,
    "caption_channels": [64, 32],
}
VAE = {
    "version": 2,
    "z_channels": 4,
    "num_res_blocks": 1,
    "encoder": {"ch": 32, "ch_mult": [1, 1, 1, 1], "down_sampling_layer": [1, 2]},
    "decoder": {"ch": 32, "ch_mult": [1, 1, 1, 1], "temporal_up_layers": [2, 3]},
}
STEP_LLM = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "ffn_hidden_size": 256,
    "layernorm_epsilon": 1e-5,
    "padded_vocab_size": 512,
}
CLIP = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
SETTINGS = {
    "num_frames": 34,
    "height": 128,
    "width": 192,
    "num_inference_steps": 8,
    "guidance_scale": 3.0,
    "time_shift": 3.0,
    "max_frames": 204,
}
NOTE = "The embedded demo model has random weights: this video is noise. Give --model for a real one."


def noise_model() -> Path:
    """The folder of the noise model, built in the cache folder if it is not there yet."""
    folder = cache_dir() / f"demo-noise-{VERSION}"
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
    try:
        build(temporary)
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "model_index.json").exists():  # else another process was faster, which is as good
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def build(root: Path, seed: int = 0) -> None:
    """Writes all files of the model into ``root``."""
    (root / "hunyuan_clip").mkdir(parents=True)
    vocabulary = _wordpieces(root / "hunyuan_clip" / "tokenizer")
    clip = CLIP | {"vocab_size": vocabulary}
    _write_network("transformer", TRANSFORMER, root / "transformer", "diffusion_pytorch_model", seed)
    _write_network("vae", VAE, root / "vae", "vae_v2", seed + 1)
    _write_network("step_llm", STEP_LLM, root / "step_llm", "model", seed + 2)
    _write_network("hunyuan_clip", clip, root / "hunyuan_clip" / "clip_text_encoder", "model", seed + 3)
    _sentencepiece(root / "step_llm" / "step1_chat_tokenizer.model")
    _write_json(root / "scheduler" / "scheduler_config.json", {"reverse": False, "solver": "euler"})
    index = {"_class_name": "StepVideoPipeline", "solostep": {"preset": "t2v", "defaults": SETTINGS, "note": NOTE}}
    _write_json(root / "model_index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_network(name: str, config: dict[str, Any], folder: Path, stem: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    from ..checkpoint import Component, build_on_meta

    _write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, parameter in build_on_meta(Component(name, folder, config, (), {})).named_parameters():
        if parameter.ndim < 2:
            value = torch.full(parameter.shape, float(key.endswith("weight")))
        else:
            fan_in = parameter[0].numel() if "scale_shift" not in key else 16
            value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        stored = key.replace("decoder.conv_out.conv.", "decoder.conv_out.") if name == "vae" else key
        tensors[stored] = value.bfloat16()
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _sentencepiece(path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()  # a prefix on disk would become part of the model's bytes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 8),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _wordpieces(folder: Path) -> int:
    """A BERT vocabulary of single characters; returns its size."""
    letters = string.ascii_lowercase + string.digits
    chinese = sorted({c for s in SENTENCES for c in s if ord(c) > 127})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), ",", ".", *chinese]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
                                                   "tokenize_chinese_chars": True, "model_max_length": 77})  # fmt: skip
    return len(words)
