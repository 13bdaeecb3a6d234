"""Random weights for networks that tests build themselves."""

from __future__ import annotations

from typing import TypeVar

import torch

Network = TypeVar("Network", bound=torch.nn.Module)


def randomized(network: Network, seed: int = 0) -> Network:
    """The network, with the same weights at every call, of a size at which activations keep theirs."""
    generator: torch.Generator | None = None
    with torch.inference_mode():
        for p in network.parameters():
            generator = generator or torch.Generator(p.device).manual_seed(seed)
            scale = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator, device=p.device) * scale)
    return network.eval()
