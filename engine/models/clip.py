"""Hunyuan-CLIP's text tower: a BERT encoder, taken from transformers.

The released file ``pytorch_model.bin`` holds its tensors under the prefix ``bert.``; the pooler is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...quant.foreign import quiet
from ..errors import CheckpointError


class HunyuanClip(nn.Module):
    """Token ids and mask ``[B, 77]`` -> last hidden state ``[B, 77, hidden]`` of all positions, padding included."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        with quiet():  # transformers imports torchao, if it is here, which tells what does not fit this machine
            from transformers import BertConfig, BertModel

        known = {k: v for k, v in config.items() if k not in ("transformers_version", "torch_dtype", "architectures")}
        try:
            bert_config = BertConfig(**known)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"hunyuan_clip/clip_text_encoder/config.json is not a BERT config: {error}."
            ) from None
        self.bert = BertModel(bert_config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
