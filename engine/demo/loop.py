"""The training loop of the demo model: a budget in minutes, mixed precision, CUDA graphs, resumable.

- Time is the schedule: the learning rate is a function of the share of the budget that has passed, so a slower machine
  makes fewer steps of the same recipe.
- Weights, their running mean and the optimizer are fp32; the module computes with a rounded copy.
- On CUDA a whole step, optimizer included, is one graph replay. If the capture fails, steps run one kernel at a time.
- All randomness enters through buffers that are filled before each step, so a graph holds no generator.
- A loss that is not finite takes the run back to the last good state, with half the learning rate.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[], tuple[Tensor, dict[str, Tensor]]]


class Log:
    """Losses and scores as JSON lines, in a file and on the screen."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: str, **values: Any) -> None:
        short = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        line = {"stage": self.stage, "event": event, "seconds": round(time.monotonic() - self.start, 1), **short}
        text = json.dumps(line, ensure_ascii=False)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")


def learning_rate(fraction: float, step: int, warmup: int = 100, flat: float = 0.6) -> float:
    """Share of the top rate: a warm-up by steps, then flat, then a line down to 2 % from ``flat`` of the time on."""
    fall = min(1.0, max(0.0, (1 - fraction) / (1 - flat)))
    return min(1.0, (step + 1) / warmup) * max(0.02, fall)


class Optimized:
    """A module with fp32 masters of its weights, their running mean (EMA) and AdamW, stepped without host reads."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, rate: float, ema: float, clip: float = 1.0) -> None:
        self.module = module
        self.params: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.params]
        self.ema = [m.clone() for m in self.masters]
        module.to(dtype)
        device = self.params[0].device
        self.on_cuda = device.type == "cuda"
        self.rate, self.clip, self.decay = rate, clip, ema
        self.rate_now = torch.tensor(rate, device=device)
        self.ema_now = torch.tensor(1.0, device=device)
        self.steps = 0
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": 0.01},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        # A rate in a tensor can change between the replays of a graph; on the CPU it is set as a number.
        options: dict[str, Any] = {"fused": True, "capturable": True} if self.on_cuda else {}
        self.adam = torch.optim.AdamW(groups, lr=self.rate_now if self.on_cuda else rate, betas=(0.9, 0.99), **options)
        if self.on_cuda:
            for group in self.adam.param_groups:
                group["lr"] = self.rate_now  # this very tensor, not a copy of it

    def before(self, share: float) -> None:
        """Sets this step's learning rate and EMA weight."""
        self.rate_now.fill_(self.rate * share)
        self.ema_now.fill_(max(1 - self.decay, 1 / (self.steps + 1)))
        if not self.on_cuda:
            for group in self.adam.param_groups:
                group["lr"] = self.rate * share
        self.steps += 1

    def step(self, loss: Tensor) -> Tensor:
        """One update; returns the norm of the gradient before clipping."""
        grads = torch.autograd.grad(loss, self.params)
        into = [m.grad for m in self.masters if m.grad is not None]
        torch._foreach_copy_(into, list(grads))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(into)))
        torch._foreach_mul_(into, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
            change = torch._foreach_sub(self.masters, self.ema)
            torch._foreach_mul_(change, self.ema_now)
            torch._foreach_add_(self.ema, change)
        return norm

    def state(self) -> list[Tensor]:
        """All tensors that a resumed run needs, in a fixed order."""
        moments = [self.adam.state[m][k] for m in self.masters for k in ("step", "exp_avg", "exp_avg_sq")]
        return [*self.masters, *self.ema, *moments]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]) -> None:
        for tensor, value in zip(self.state(), saved, strict=True):
            tensor.copy_(value)
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)

    def ema_state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.ema, strict=True))


def graphed(step: Callable[[], None], device: torch.device, log: Log) -> Callable[[], None]:
    """The step as a CUDA graph; as it is elsewhere, or if it cannot be captured."""
    if device.type != "cuda":
        step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        log("graph", captured=True)
        return graph.replay
    except Exception as error:  # whatever the reason, the slower way gives the same result
        torch.cuda.synchronize()
        log("graph", captured=False, error=f"{type(error).__name__}: {str(error)[:300]}")
        return step


@dataclass
class Run:
    """One stage's loop.

    Args:
        fill: fills the random buffers, before every step.
        loss: gives the loss, and numbers to log, from those buffers.
        report: called with the share of time passed, about every minute.
        on_share: called before each step with the share of time passed, for schedules of the stage's own.
        stop_at: when to save and pause, on the same clock as ``deadline``; the next run goes on from there.
        deadline: when the stage is done, on ``time.monotonic``'s clock.
    """

    optimized: Optimized
    fill: Callable[[], None]
    loss: Loss
    log: Log
    deadline: float
    checkpoint: Path
    max_steps: int = 10**9
    stop_at: float = math.inf
    report: Callable[[float], None] = lambda share: None
    on_share: Callable[[float], None] = lambda share: None
    warmup: int = 100
    report_every: float = 60.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Any] | None = None

    def _step(self) -> None:
        loss, values = self.loss()
        values = {"loss": loss, **values, "grad_norm": self.optimized.step(loss)}
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=value.device)
            self.sums[name] += value.detach().float()

    def train(self) -> bool:
        """Trains; false if it was paused before the end."""
        device = self.optimized.params[0].device
        passed = self._read_checkpoint()
        # Warming up and capturing take a few steps on one batch; at a rate of zero they change no weight.
        self._next(0.0, 0.0)
        step = graphed(self._step, device, self.log)
        self._use_checkpoint()
        start = time.monotonic() - passed
        budget = max(self.deadline - start, 1e-3)
        last_log, last_report, last_save = time.monotonic(), time.monotonic(), time.monotonic()
        counted, rate = 0, 1.0
        self._clear()
        good = [t.clone() for t in self.optimized.state()]
        self.log("begin", resumed_at=passed, budget=budget, parameters=sum(m.numel() for m in self.optimized.masters))
        while True:
            share = (time.monotonic() - start) / budget
            if share >= 1 or self.optimized.steps >= self.max_steps or time.monotonic() >= self.stop_at:
                break
            self._next(share, rate)
            step()
            counted += 1
            if counted % 10 and device.type == "cuda":
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            if now - last_log > 10:
                means = self._means(counted)
                speed = counted / (now - last_log)
                self.log("train", step=self.optimized.steps, share=share, steps_per_second=speed, **means)
                self._clear()
                counted, last_log = 0, now
                if math.isfinite(means["loss"]):
                    good = [t.clone() for t in self.optimized.state()]
                else:
                    self.optimized.restore(good)
                    rate *= 0.5
                    self.log("restored", rate=rate)
            if now - last_report > self.report_every:
                self.report(share)
                last_report = time.monotonic()
            if now - last_save > 90:
                self._save(now - start)
                last_save = time.monotonic()
        if device.type == "cuda":
            torch.cuda.synchronize()
        means = self._means(max(counted, 1))
        if counted and not math.isfinite(means["loss"]):
            self.optimized.restore(good)
        paused = share < 1 and time.monotonic() >= self.stop_at
        self._save(time.monotonic() - start)
        self.log("paused" if paused else "end", step=self.optimized.steps, **means)
        return not paused

    def _next(self, share: float, rate: float) -> None:
        self.on_share(share)
        self.optimized.before(rate * learning_rate(share, self.optimized.steps, self.warmup))
        self.fill()

    def _means(self, counted: int) -> dict[str, float]:
        return {name: float(value) / counted for name, value in self.sums.items()}

    def _clear(self) -> None:
        for value in self.sums.values():
            value.zero_()

    def _save(self, passed: float) -> None:
        temporary = self.checkpoint.with_suffix(".part")
        state = {"passed": passed, "steps": self.optimized.steps, "tensors": self.optimized.state()}
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _read_checkpoint(self) -> float:
        """Reads what an interrupted run of this stage left; returns the seconds that it has trained."""
        if not self.checkpoint.exists():
            return 0.0
        self.saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.deadline -= float(self.saved["passed"])
        return float(self.saved["passed"])

    def _use_checkpoint(self) -> None:
        """Puts it in place, once the optimizer's own tensors exist."""
        if self.saved is not None:
            self.optimized.restore(self.saved["tensors"])
            self.optimized.steps = int(self.saved["steps"])
            self.saved = None
