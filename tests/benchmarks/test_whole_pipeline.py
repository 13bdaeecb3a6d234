"""What a line of a whole run says of its latents."""

from __future__ import annotations

import hashlib

import torch

from solostep.benchmarks.whole_pipeline import digests


def test_latents_are_told_apart_by_their_bytes() -> None:
    """The sum of magnitudes, which older lines have alone, is the same of other signs and of another order."""
    latents = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    same, negative, turned = (digests(x) for x in (latents.clone(), -latents, latents.transpose(3, 4)))
    told = digests(latents)
    assert told == same and told["latents_sha256"] == hashlib.sha256(latents.numpy().tobytes()).hexdigest()
    assert told["latents"] == negative["latents"] == float(latents.double().abs().sum())
    assert len({one["latents_sha256"] for one in (told, negative, turned)}) == 3
