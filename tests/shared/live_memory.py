"""Counts the bytes of tensors that are alive during a run, also of one on shapes alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from solostep.engine.models import vae


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the largest number of them, without inputs and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        made = [t for t in made if t.untyped_storage()._cdata not in self.sizes]
        if not made:
            return out
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in made:
            if t.untyped_storage()._cdata not in known:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def on_shapes_as_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the VAE on the meta device: frames in host memory do not count, and attention takes no memory beside its
    result. Norms make what theirs make on shapes alone, where torch takes half of a test's time to find that out."""

    def host(like: Tensor) -> Tensor:
        with _disable_current_modes():
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
        return torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)

    monkeypatch.setattr(vae, "_host_frames", host)
    monkeypatch.setattr(torch, "native_group_norm", norm)
    monkeypatch.setattr(vae, "has_wide_kernel", lambda *_: True)
    monkeypatch.setattr(vae, "frame_causal_attention", lambda q, k, v: torch.empty_like(q))
