"""The networks of the demo model in training form: sizes, batched forwards, the latent scale, a batched sampler.

The modules are the engine's own. Two of them run the rows of a batch one after the other on purpose (a video never
depends on its batch); training wants all rows at once, so the forwards here call the same submodules on whole batches.
tests/engine/test_demo_train.py holds them equal to the modules' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import CHUNK_LATENTS, CLIP_TOKENS, StepLLMConfig, TransformerConfig, VAEConfig
from ..models.clip import HunyuanClip
from ..models.step_llm import StepLLM, attention_bias
from ..models.transformer import RopeTable, StepVideoTransformer, TransformerBlock, rope_table
from ..models.vae import VideoAutoencoder
from ..scheduler import make_sigmas
from ..text import ClipTokenizer, LLMTokenizer
from .data import SIZE

TIME_SHIFT = 3.0
"""Shift of the noise levels, in training and by default in sampling; latents of 108 tokens need little."""


@dataclass(frozen=True)
class Sizes:
    """Configurations of all networks, as they stand in the ``config.json`` files."""

    size: int = SIZE
    z_channels: int = 8
    dit_heads: int = 2
    dit_layers: int = 6
    text_width: int = 128
    text_layers: int = 2
    vae: dict[str, Any] = field(
        # Both ends 64 wide: a group of the norms is then two channels. With 32 it is one channel, whose norm removes
        # the level of a flat colour. The decoder's lowest level is 32 wide because conv_unpatchify holds 6,912 z times
        # its width weights.
        default_factory=lambda: {
            "version": 2,
            "num_res_blocks": 0,
            "encoder": {"ch": 64, "ch_mult": [1, 1, 1, 1], "down_sampling_layer": [1, 2]},
            "decoder": {"ch": 32, "ch_mult": [2, 2, 2, 1], "temporal_up_layers": [2, 3]},
        }
    )

    @property
    def vae_config(self) -> dict[str, Any]:
        return self.vae | {"z_channels": self.z_channels}

    def transformer_config(self, image_to_video: bool = False) -> dict[str, Any]:
        return {
            "num_attention_heads": self.dit_heads,
            "attention_head_dim": 128,
            "in_channels": self.z_channels,
            "out_channels": self.z_channels,
            "num_layers": self.dit_layers,
            "patch_size": 1,
            "norm_type": "ada_norm_single",
            "norm_eps": 1e-6,
            "use_additional_conditions": image_to_video,
            "caption_channels": [self.text_width, self.text_width],
        }

    def step_llm_config(self, vocabulary: int) -> dict[str, Any]:
        return {
            "hidden_size": self.text_width,
            "num_layers": self.text_layers,
            "num_attention_heads": 4,
            "num_attention_groups": 2,
            "ffn_hidden_size": 2 * self.text_width,
            "layernorm_epsilon": 1e-5,
            "padded_vocab_size": -(-vocabulary // 64) * 64,
        }

    def clip_config(self, vocabulary: int) -> dict[str, Any]:
        return {
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": self.text_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * self.text_width,
            "hidden_act": "gelu",
            "max_position_embeddings": CLIP_TOKENS,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        }

    @property
    def fhw(self) -> tuple[int, int, int]:
        return CHUNK_LATENTS, self.size // 16, self.size // 16


SMOKE = Sizes(
    size=32,
    z_channels=4,
    dit_heads=1,
    dit_layers=1,
    text_width=32,
    text_layers=1,
    vae={
        "version": 2,
        "num_res_blocks": 1,
        "encoder": {"ch": 32, "ch_mult": [1, 1, 1, 1], "down_sampling_layer": [1, 2]},
        "decoder": {"ch": 32, "ch_mult": [1, 1, 1, 1], "temporal_up_layers": [2, 3]},
    },
)
"""Sizes that train a few steps in seconds on a CPU; the result is a complete model that makes noise."""


def make_vae(sizes: Sizes) -> VideoAutoencoder:
    return VideoAutoencoder(VAEConfig.from_dict(sizes.vae_config))


def make_text_encoders(sizes: Sizes, llm_words: int, clip_words: int) -> tuple[StepLLM, HunyuanClip]:
    llm = StepLLM(StepLLMConfig.from_dict(sizes.step_llm_config(llm_words)))
    # The default of 1 is large beside what a layer adds at first.
    nn.init.normal_(llm.tok_embeddings.word_embeddings.weight, std=0.3)
    return llm, HunyuanClip(sizes.clip_config(clip_words)).eval()


def make_transformer(sizes: Sizes, image_to_video: bool = False) -> StepVideoTransformer:
    """A DiT that starts as zero: gates, cross-attention and head give nothing at first (adaLN-Zero, Peebles 2022)."""
    model = StepVideoTransformer(TransformerConfig.from_dict(sizes.transformer_config(image_to_video)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    blocks = cast("list[TransformerBlock]", model.transformer_blocks)
    for linear in (model.adaln_single.linear, model.proj_out, *(b.attn2.wo for b in blocks)):
        nn.init.zeros_(linear.weight)
    return model


def image_to_video_from(model: StepVideoTransformer, sizes: Sizes) -> StepVideoTransformer:
    """An image-to-video DiT that computes what ``model`` does, whatever its condition and motion score."""
    made = make_transformer(sizes, image_to_video=True)
    state = dict(model.state_dict())
    weight = state["pos_embed.proj.weight"]
    state["pos_embed.proj.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    made.load_state_dict(state, strict=False)
    embedder = made.adaln_single.emb.motion_score_embedder
    nn.init.zeros_(embedder.linear_2.weight)
    return made


# --- texts --------------------------------------------------------------------------------------------------------


@dataclass
class TextTable:
    """Token ids of many texts: ``llm [N, L]``, ``lengths [N]``, ``clip`` and ``clip_mask [N, 77]``.

    L is the longest text's length, not 320: Step-LLM is causal and padding stands at the end, so positions beyond a
    text's end change nothing that the DiT sees.
    """

    llm: Tensor
    lengths: Tensor
    clip: Tensor
    clip_mask: Tensor

    @classmethod
    def of(cls, texts: Sequence[str], root: Path, device: torch.device | str, length: int = 0) -> TextTable:
        """Tokenizes texts with the tokenizers of a model folder; ``length`` is a lower bound of L."""
        llm = LLMTokenizer(root / "step_llm" / "step1_chat_tokenizer.model")
        clip = ClipTokenizer(root / "hunyuan_clip" / "tokenizer")
        counts = [llm(text)[1] for text in texts]
        # 77 + L a multiple of 8 suits the masked attention kernels.
        width = -(-(CLIP_TOKENS + max([*counts, length])) // 8) * 8 - CLIP_TOKENS
        pieces = [clip(text) for text in texts]
        table = ([llm(text, width)[0] for text in texts], counts, [p[0] for p in pieces], [p[1] for p in pieces])
        return cls(*(torch.tensor(column, device=device) for column in table))

    def rows(self, index: Tensor) -> TextTable:
        return TextTable(self.llm[index], self.lengths[index], self.clip[index], self.clip_mask[index])

    def visible(self) -> Tensor:
        """What the DiT may look at, ``[N, 1, 77 + L]``: all CLIP positions, the LLM's up to a text's end."""
        position = torch.arange(self.llm.shape[1], device=self.llm.device)
        llm = position < self.lengths[:, None]
        clip = torch.ones_like(self.clip, dtype=torch.bool)
        return torch.cat([clip, llm], dim=1)[:, None]


def llm_states(llm: StepLLM, ids: Tensor, bias: Tensor) -> Tensor:
    """Step-LLM on a whole batch; ``bias`` is its ``attention_bias`` of this length."""
    x = llm.tok_embeddings.word_embeddings(ids)
    for layer in llm.transformer.layers:
        x = layer(x, bias)
    return x


def llm_bias(llm: StepLLM, length: int, device: torch.device | str) -> Tensor:
    weight = llm.tok_embeddings.word_embeddings.weight
    return attention_bias(llm.config.num_attention_heads, length, weight.dtype, device)


def clip_states(clip: HunyuanClip, ids: Tensor, mask: Tensor) -> Tensor:
    """The BERT encoder from its submodules: no dropout, and no look at the mask's values on the host."""
    parts = clip.bert.embeddings
    positions = torch.arange(ids.shape[1], device=ids.device)
    x = parts.word_embeddings(ids) + parts.token_type_embeddings.weight[0] + parts.position_embeddings(positions)
    x = parts.LayerNorm(x)
    heads = clip.bert.config.num_attention_heads
    seen = mask.bool()[:, None, None]
    for layer in clip.bert.encoder.layer:
        inner = layer.attention.self
        q, k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (inner.query, inner.key, inner.value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = layer.attention.output.LayerNorm(x + layer.attention.output.dense(out))
        x = layer.output.LayerNorm(x + layer.output.dense(F.gelu(layer.intermediate.dense(x))))
    return x


def encode_texts(llm: StepLLM, clip: HunyuanClip, table: TextTable, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of both encoders, ``[N, L, c]`` and ``[N, 77, c]``."""
    return llm_states(llm, table.llm, bias), clip_states(clip, table.clip, table.clip_mask)


# --- the DiT ------------------------------------------------------------------------------------------------------


def context_of(model: StepVideoTransformer, llm: Tensor, clip: Tensor) -> Tensor:
    """What cross-attention reads, ``[B, 77 + L, d]``: CLIP first."""
    return torch.cat([model.clip_projection(clip), model.caption_projection(llm)], dim=1)


def velocity(
    model: StepVideoTransformer,
    latents: Tensor,
    thousandths: Tensor,
    context: Tensor,
    visible: Tensor,
    rope: RopeTable,
    condition: Tensor | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """The DiT on a whole batch, ``[B, f, c, h, w]``; ``thousandths [B]`` is the timestep times 1000, fp32.

    Unlike the module's forward, each row may have its own motion score ``[B]``.
    """
    adaln = model.adaln_single
    embedding = adaln.emb.timestep_embedder(thousandths)
    if score is not None:
        embedding = embedding + adaln.emb.motion_score_embedder(score)
    modulation = adaln.linear(F.silu(embedding))
    x = model.embed_latents(latents, condition)
    for block in model.transformer_blocks:
        x = block(x, context, modulation, rope, visible)
    return model.head(x, embedding, (latents.shape[1], latents.shape[3], latents.shape[4]))


def as_thousandths(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """A timestep times 1000 as the model computes it in its own type (see AdaLayerNormSingle)."""
    return (timestep.to(dtype) * 1000).float()


def training_levels(u: Tensor) -> Tensor:
    """Noise levels sigma ``[B]`` for training, stratified over the batch, shifted like the sampler's."""
    t = (torch.arange(u.shape[0], device=u.device) + u) / u.shape[0]
    return 1 - TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)


@torch.no_grad()
def sample(
    model: StepVideoTransformer,
    llm: Tensor,
    clip: Tensor,
    visible: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    shift: float = TIME_SHIFT,
    condition: Tensor | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Latents of a batch, by Euler steps with guidance. The last row of the texts is the unconditional one."""
    rows, (device, dtype) = noise.shape[0], (noise.device, model.dtype)
    context = context_of(model, llm.to(dtype), clip.to(dtype))
    index = torch.cat([torch.arange(rows), torch.full((rows,), rows)]).to(device)
    context, visible = context[index], visible[index]
    condition = None if condition is None else condition.to(dtype).repeat(2, 1, 1, 1, 1)
    score = None if score is None else score.to(dtype).repeat(2)
    rope = rope_table((noise.shape[1], *noise.shape[3:]), dtype, device)
    sigmas = make_sigmas(steps, shift)
    latents = noise.float()
    for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = as_thousandths(torch.full((2 * rows,), sigma, device=device), dtype)
        both = velocity(model, latents.to(dtype).repeat(2, 1, 1, 1, 1), t, context, visible, rope, condition, score)
        text, uncond = both.chunk(2)
        latents = latents + (after - sigma) * (uncond + guidance * (text - uncond)).float()
    return latents


# --- the latent scale ---------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_latent_scale(vae: VideoAutoencoder, scale: Tensor) -> None:
    """Multiplies each latent channel by ``scale [z]`` inside the weights, exactly: encode gives scaled latents and
    decode takes them, and the reconstruction is the same.

    The two shortcuts around the convolutions at the latent are linear, so their change fits into the centre of the
    last time tap (the present frame). A shift of the mean would not fit: padding is zero, not shifted.
    """
    z = scale.numel()
    conv = vae.encoder.conv_out.conv
    group = conv.in_channels // conv.out_channels
    scale = scale.to(conv.weight)
    assert conv.bias is not None
    conv.weight[:z] *= scale.view(-1, 1, 1, 1, 1)
    conv.bias[:z] *= scale
    conv.bias[z:] += 2 * scale.log()
    for channel in range(z):
        conv.weight[channel, channel * group : (channel + 1) * group, -1, 1, 1] += (scale[channel] - 1) / group
    conv = vae.decoder.conv_in.conv
    repeat = conv.out_channels // z
    conv.weight /= scale.view(1, -1, 1, 1, 1)
    for channel in range(z):
        conv.weight[channel * repeat : (channel + 1) * repeat, channel, -1, 1, 1] += 1 / scale[channel] - 1


def count(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters())
