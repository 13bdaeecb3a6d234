"""A DiT of the released structure that is small: for tests of its blocks and of where they lie."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from solostep.engine.config import TransformerConfig
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.quant.formats import install, quantize
from solostep.quant.linear import assign
from solostep.quant.recipe import default_recipe


def small_dit(
    precision: str | None = None, dtype: torch.dtype = torch.bfloat16, heads: int = 1, layers: int = 2
) -> StepVideoTransformer:  # fmt: skip
    """With the same random weights at every call, quantized by the default recipe of a precision. Made once, and
    copied; random numbers go on as after making it."""
    model, state = _made(precision, dtype, heads, layers)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _made(
    precision: str | None, dtype: torch.dtype, heads: int, layers: int
) -> tuple[StepVideoTransformer, Tensor]:  # fmt: skip
    config = TransformerConfig.from_dict(
        {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "caption_channels": [64, 32],
         "in_channels": 4, "out_channels": 4}
    )  # fmt: skip
    torch.manual_seed(0)
    model = StepVideoTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.data += 1
    model = model.to(dtype)
    if precision:
        weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        chosen = default_recipe(precision, "transformer").resolve(weights)
        stored = {n: quantize(f, weights[n].data) for n, f in chosen.items()}
        install(model, chosen, dtype)
        for name, tensors in stored.items():
            assign(model.get_submodule(name), tensors)
    return model.requires_grad_(False), torch.get_rng_state()
