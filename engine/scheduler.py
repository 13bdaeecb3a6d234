"""Flow matching: shifted noise levels and the Euler step.

Sigma runs from 0 (noise) to 1 (video) and the model is called with sigma itself as its timestep; it multiplies by
1000 inside. Always computed in fp32, whatever the model's type. Source: stepvideo/diffusion/scheduler.py.
"""

from __future__ import annotations

import torch


def make_sigmas(num_inference_steps: int, time_shift: float, *, reverse: bool = False) -> torch.Tensor:
    """Noise levels ``[num_inference_steps + 1]``, fp32, on the CPU.

    ``s t / (1 + (s - 1) t)`` over t = 1 ... 0; the released configuration (``reverse=False``) turns them to run
    from 0 to 1. The first ``num_inference_steps`` values are the timesteps.
    """
    t = torch.linspace(1, 0, num_inference_steps + 1)
    sigmas = (time_shift * t) / (1 + (time_shift - 1) * t)
    return sigmas if reverse else 1 - sigmas


def euler_step(sample: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor):
    """``sample + velocity * (next_sigma - sigma)`` in fp32; the result stays fp32 from the first step on."""
    return sample.float() + velocity.float() * (next_sigma - sigma)
