"""DiT weights that nobody trained, whose activations are distributed as those of trained networks are.

    python -m solostep.benchmarks.synthetic DIR --precision int8      # a model folder in the released layout

What a number format does to a network of normal random weights says little about a trained one: nothing stands out
there. These weights are drawn too, from a seed, but so that the activations have what trained transformers show:

- a hundredth of the residual stream's channels are 10 to 50 times the others, the same channels in every block and for
  every token (LLM.int8(), arXiv 2208.07339; SmoothQuant, 2211.10438), and a few more are larger still and mostly
  constant (massive activations: 2402.17762 in LLMs; 2510.11538 in DiTs, at all tokens, in fixed channels, modulated by
  the timestep);
- norms, modulation and gates differ widely by channel; rows and columns of weights have log-normal scales, and the
  weights themselves heavy tails;
- keys have a mean that is a large part of them (SageAttention, 2410.02367), gains of the QK-norm have a few large
  channels, slowly rotating ones; attention looks at a part of the tokens, those that are alike among them;
- hidden units of the feed-forward are mostly near zero, and some are large, as is what feeds its second linear;
- a block adds some tens of percent of the stream's norm, and the stream grows over the depth.

:data:`TARGETS` says these in numbers, a test holds them, and synthetic_table.py measures them beside normal random
weights and the trained demo model. They are still no trained weights: nothing depends on anything but by chance, and
results with them are marked (:func:`marker`).

Every tensor has a generator of its own, by seed and name, so block i can be drawn alone: 1.2 GB in bf16 at full width,
and 0.2 GB beside it while it is drawn. Vectors are drawn on the CPU and are the same everywhere. Matrices are drawn on
the device: the same bits for a seed on one kind of card, other ones (of the same distribution) on another, or a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from solostep.benchmarks.entry import exit_code
from solostep.benchmarks.whole_pipeline import MARKER, RELEASED, Sizes, make
from solostep.engine.config import TransformerConfig
from solostep.engine.errors import UsageError
from solostep.engine.models.transformer import StepVideoTransformer, TransformerBlock
from solostep.engine.precision import check_precision
from solostep.engine.runtime import pick_device

GENERATOR = "solostep synthetic DiT 1"
"""A name that changes with what is drawn."""

OUTLIERS, OUTLIER_SIZES = 0.01, (10.0, 50.0)
MASSIVE, MASSIVE_SIZE = 5e-4, 80.0
"""Shares of the stream's channels, and how many times the others they are. A narrow network has one massive channel,
which is smaller, so that their part of the energy is the same at every width."""
START = 0.5
"""Root mean square of an ordinary channel of the stream before the first block."""
ADDED = (0.15, 0.06, 0.22)
"""What self-attention, cross-attention and the feed-forward add to the stream, relative to it; together 0.27."""
GROWTH = math.sqrt(1 + sum(p * p for p in ADDED))
"""Of the stream by one block."""
LARGE_GAINS = (3, 2.5, 5.0)
"""Channels of the QK-norms with large gains, and the range of these."""
FEW = 4
"""Channels of a normed stream above this are outliers."""
TAIL = 0.35
"""Width of the log-normal factor of every weight."""
QK_GAIN = 1.5
"""Of the QK-norms' ordinary channels: with it the entropy of attention is 0.5 to 0.9 of a uniform one's."""
HIDDEN, HIDDEN_MEAN = 0.6, 0.2
"""Of the feed-forward's hidden layer after GELU: root mean square and mean."""
MODULATION = 0.9
"""Gain of the linear that makes the six modulation vectors from SiLU of the timestep's embedding."""

TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("stream", "outliers"): (0.004, 0.03),
    ("stream", "channels"): (15, 200),
    ("stream", "kurtosis"): (30, 2000),
    ("stream", "mean"): (0.2, 0.9),
    ("stream", "added"): (0.05, 0.7),
    ("stream", "finite"): (1, 1),
    ("attn1.wqkv", "channels"): (5, 80),
    ("attn1.wqkv", "kurtosis"): (6, 600),
    ("attention", "entropy"): (0.4, 0.9),
    ("attention", "key mean"): (0.2, 0.9),
    ("ff.net.0.proj", "channels"): (5, 80),
    ("ff.net.2", "kurtosis"): (15, 600),
    ("ff.net.2", "small"): (0.18, 0.6),
    ("ff.net.2", "channels"): (6, 80),
}
"""Ranges of the medians over blocks of what activation_statistics measures (normal random weights are outside most of
them, the demo within or near)."""


# ---------------------------------------------------------------- drawing


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(f"{GENERATOR}/{seed}/{name}".encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(number)


class Drawn:
    """Draws the tensors of a DiT by their official names.

    Args:
        config: the network's sizes.
        seed: of everything.
        device: where matrices are drawn; the tensors end there, in bf16.
    """

    def __init__(self, config: TransformerConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.dim, self.head_dim = config.inner_dim, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.size, self.sign, self.shared = self._channels()
        normed = self.size / self.size.square().mean().sqrt()
        self.normed = normed / normed.median()
        """The stream's profile after a LayerNorm, ordinary channels about 1."""

    def _channels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each channel of the stream: its size against ordinary ones, the sign of its mean, and the part of it that
        is this mean."""
        d = self.dim
        order = torch.randperm(d, generator=_generator(self.seed, "stream channels", torch.device("cpu")))
        massive, outliers = max(1, round(MASSIVE * d)), max(2, round(OUTLIERS * d))
        size = self.spread("stream sizes", d, 0.3)
        low, high = OUTLIER_SIZES
        size[order[:outliers]] = low * (high / low) ** self.uniform("outlier sizes", outliers)
        size[order[outliers : outliers + massive]] = MASSIVE_SIZE * min(1.0, MASSIVE * d / massive) ** 0.5
        shared = torch.full((d,), 0.2)
        shared[order[:outliers]] = 0.4 + 0.4 * self.uniform("outlier means", outliers)
        shared[order[outliers : outliers + massive]] = 0.95
        sign = self.uniform("stream signs", d).sub(0.5).sign()
        return size, sign, shared

    # --- vectors, on the CPU in fp32 -------------------------------------------------------------------------------

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=_generator(self.seed, name, torch.device("cpu")))

    def uniform(self, name: str, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=_generator(self.seed, name, torch.device("cpu")))

    def spread(self, name: str, n: int, width: float) -> Tensor:
        """Log-normal numbers of mean square 1."""
        return (width * self.normal(name, n) - width**2).exp()

    # --- matrices, on the device ------------------------------------------------------------------------------------

    def matrix(
        self, name: str, rows: Tensor, columns: Tensor, blind: Tensor | None = None,
        plus: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """``[N, K]`` of variance ``rows^2 columns^2``: a normal number times a log-normal one, of kurtosis
        3 exp(4 TAIL^2), 4.9. The rows do not see the direction ``blind [K]``; to them comes the outer
        product ``plus`` of ``[N]`` and ``[K]``, small against the rounding of a weight and large when summed."""
        out = torch.empty(len(rows), len(columns), dtype=torch.bfloat16, device=self.device)
        generator = _generator(self.seed, name, self.device)
        rows, columns = rows.to(self.device), columns.to(self.device)
        left, right = (None, None) if plus is None else (part.to(self.device) for part in plus)
        step = max(1, (1 << 24) // len(columns))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            made = self._noise(generator, len(rows[part]), len(columns)).mul_(columns).mul_(rows[part, None])
            if blind is not None:
                made = self._without(made, blind)
            out[part] = made if left is None else made.addr_(left[part], right)
        return out

    def _noise(self, generator: torch.Generator, n: int, k: int) -> Tensor:
        noise, scale = (torch.randn(n, k, generator=generator, device=self.device) for _ in range(2))
        return noise.mul_(scale.mul_(TAIL).sub_(TAIL**2).exp_())

    def _without(self, made: Tensor, direction: Tensor) -> Tensor:
        """Rows without their part along a direction. In fp32 and not as a matrix product, whose type a user may set."""
        direction = direction.to(self.device) / direction.norm()
        return made.addcmul_((made * direction).sum(1, keepdim=True), direction, value=-1)

    def reading(self, name: str, profile: Tensor) -> Tensor:
        """Scales of a matrix's columns that make outputs of mean square 1 from inputs of a profile: a spread, and
        outliers are read less, by the square root of their size, as they would else be all that is read."""
        columns = self.spread(name, len(profile), 0.2) / profile.clamp_min(1).sqrt()
        return columns / (columns * profile).square().sum().sqrt()

    # --- tensors by name --------------------------------------------------------------------------------------------

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor of this official name, in bf16 on the device.

        Raises:
            ValueError: the network is called something else, or the shape is not the one expected.
        """
        index, found = -1, name
        if name.startswith("transformer_blocks."):
            _, number, found = name.split(".", 2)
            index = int(number)
        made = (self._of_block(index, found, name) if index >= 0 else self._of_shell(found, shape)).to(
            self.device, torch.bfloat16
        )
        if list(made.shape) != list(shape):
            raise ValueError(f"{name} is drawn as {list(made.shape)}, and the network wants {list(shape)}")
        return made

    def _of_block(self, i: int, part: str, name: str) -> Tensor:
        d = self.dim
        if part in ("norm1.weight", "norm2.weight"):
            return self._gain(name)
        if part == "norm1.bias":
            return 0.1 * self.normal(name, d)
        if part == "norm2.bias":
            return self._offset(i)
        if part.endswith(("q_norm.weight", "k_norm.weight")):
            return self._head_gain(i, name)
        if part == "scale_shift_table":
            return self._table(name)
        if part == "attn1.wqkv.weight":
            return self._qkv(i, name)
        if part in ("attn1.wo.weight", "attn2.wo.weight"):
            return self._back(i, name, d, 0.55 if part.startswith("attn1") else 0.7, ADDED[part.startswith("attn2")])
        if part == "attn2.wq.weight":
            return self.matrix(name, self._rows(name, d), self.reading(name + " columns", self.size))
        if part == "attn2.wkv.weight":
            return self.matrix(name, self._rows(name, 2 * d), self.reading(name + " columns", torch.ones(d)))
        if part == "ff.net.0.proj.weight":
            return self._up(i, name)
        if part == "ff.net.2.weight":
            return self._down(i, name)
        raise ValueError(f"{name} is no tensor of the DiT's blocks")

    def _rows(self, name: str, n: int, width: float = 0.3) -> Tensor:
        return self.spread(name + " rows", n, width)

    def _gain(self, name: str) -> Tensor:
        """Outliers of the stream go on through the norm a little smaller; 0.3 % of the channels get a large gain."""
        gain = self.spread(name, self.dim, 0.2) / self.normed.clamp_min(1) ** 0.2
        return torch.where(self._few(name), gain * 6, gain) / self._rms()

    def _few(self, name: str) -> Tensor:
        """0.3 % of the channels, none of which is an outlier of the stream already."""
        return (self.uniform(name + " large", self.dim) < 0.003) & (self.normed < FEW)

    def _rms(self) -> float:
        """Root mean square of a normed stream's ordinary channel: outliers take most of the norm."""
        return float((self.size / self.size.square().mean().sqrt()).median())

    def _profile(self) -> Tensor:
        """Sizes of the channels behind norm and modulation."""
        return self.normed.clamp_min(1) ** 0.8

    def _common(self) -> Tensor:
        """The direction behind a norm that all tokens share in every block."""
        return self._profile() * self.shared * self.sign

    def _offset(self, i: int) -> Tensor:
        """What the second norm adds to every token: hidden units look at it to stay below zero."""
        return 0.3 * self.uniform(f"offset {i}", self.dim).sub(0.5).sign() * (self.normed < FEW)

    def _head_gain(self, i: int, name: str) -> Tensor:
        gain = QK_GAIN * self.spread(name, self.head_dim, 0.25)
        count, low, high = LARGE_GAINS
        slow = [c for start, width in ((0, 32), (64, 16), (96, 16)) for c in range(start + width // 2, start + width)]
        # Queries and keys of a block have large gains in the same channels.
        order = torch.randperm(len(slow), generator=_generator(self.seed, f"large gains {i}", torch.device("cpu")))
        chosen = torch.tensor(slow)[order[:count]]
        gain[chosen] = low + (high - low) * self.uniform(name + " large", count)
        return gain

    def _table(self, name: str) -> Tensor:
        """Shift, scale and gate, twice."""
        d, rows = self.dim, self.normal(name, 6, self.dim)
        shift, scale = 0.15 * rows[[0, 3]], 0.25 * rows[[1, 4]]
        scale = torch.where(torch.stack([self._few(f"{name} {n}") for n in range(2)]), 3.0, scale)
        gate = torch.stack([self.spread(f"{name} gate {n}", d, 0.4) for n in range(2)])
        return torch.stack([shift[0], scale[0], gate[0], shift[1], scale[1], gate[1]])

    def _qkv(self, i: int, name: str) -> Tensor:
        """q and k of a head read partly the same, so that tokens that are alike attend to each other."""
        d, hd = self.dim, self.head_dim
        columns = self.reading(name + " columns", self._profile()).to(self.device)
        rows = self._rows(name, 3 * d).view(self.heads, 3, hd)
        rows[:, 2] *= self.spread(name + " heads", self.heads, 0.3)[:, None]
        rows = rows.to(self.device)
        alike = (0.6 * self.uniform(name + " alike", self.heads)).tolist()
        out = torch.empty(self.heads, 3, hd, d, dtype=torch.bfloat16, device=self.device)
        generator = _generator(self.seed, name, self.device)
        for head, part in enumerate(alike):
            both, q, k, v = (self._noise(generator, hd, d) for _ in range(4))
            made = torch.stack([q.mul_((1 - part) ** 0.5).add_(both, alpha=part**0.5),
                                k.mul_((1 - part) ** 0.5).add_(both, alpha=part**0.5), v])  # fmt: skip
            made[2] = self._without(made[2].mul_(columns), self._common()).div_(columns)
            out[head] = made.mul_(columns).mul_(rows[head, ..., None])
        return out.view(3 * d, d)

    def _planned(self, i: int) -> Tensor:
        """The stream's channels that block i is to find."""
        return START * GROWTH**i * self.size

    def _back(self, i: int, name: str, width: int, rms: float, part: float, **more: Any) -> Tensor:
        """A linear whose output is added to the stream; ``rms`` is that of its input, by experience."""
        jitter = math.exp(0.25 * float(self.normal(name + " jitter", 1)))
        rows = self._planned(i) * part * jitter * self._rows(name, self.dim, 0.2)
        columns = self.spread(name + " columns", width, 0.2) / (rms * width**0.5)
        return self.matrix(name, rows, columns, **more)

    def _up_rows(self, name: str) -> Tensor:
        """Sizes of the hidden units, a hundredth of them large."""
        rows = self._rows(name, 4 * self.dim, 0.35)
        return torch.where(self.uniform(name + " large", 4 * self.dim) < 0.01, 3 * rows, rows)

    def _up(self, i: int, name: str) -> Tensor:
        d = self.dim
        rows = self._up_rows(name)
        offset = self._offset(i)
        below = 1.15 + 0.4 * self.normal(name + " below", 4 * d)
        columns = self.reading(name + " columns", self._profile())
        return self.matrix(name, rows, columns, self._common(), (-rows * below, offset / offset.square().sum()))

    def _down(self, i: int, name: str) -> Tensor:
        d = self.dim
        # Their means would be the same for all tokens, block after block, until nothing else is left.
        means = self._up_rows(f"transformer_blocks.{i}.ff.net.0.proj.weight")
        # Hidden units are positive on the whole, so a small common part of a row's weights adds to the channel's mean:
        # as much as keeps it growing with the stream.
        mean = self._planned(i) * (GROWTH - 1) * self.sign * self.shared / (4 * d * HIDDEN_MEAN)
        return self._back(i, name, 4 * d, HIDDEN, ADDED[2], blind=means, plus=(mean, torch.ones(4 * d)))

    def _of_shell(self, name: str, shape: Sequence[int]) -> Tensor:
        d = self.dim
        n, k = shape[0], math.prod(shape[1:])
        if name == "pos_embed.proj.weight":
            rows = START * self.size * (1 - self.shared.square()).sqrt()
            return self.matrix(name, rows, torch.full((k,), k**-0.5)).view(*shape)
        if name == "pos_embed.proj.bias":
            return START * self.size * self.shared * self.sign
        if name == "scale_shift_table":
            return 0.1 * self.normal(name, 2, d)
        if name == "proj_out.weight":
            columns = self._rms() ** -1 * self.spread(name + " columns", d, 0.2) / self.normed.clamp_min(1)
            return self.matrix(name, self._rows(name, n, 0.1), columns / d**0.5, self.normed * self.shared * self.sign)
        if name == "adaln_single.linear.weight":
            return self.matrix(name, torch.full((n,), MODULATION), self.spread(name, k, 0.2) / k**0.5)
        if name.startswith(("adaln_single.emb.", "caption_projection.", "clip_projection.")):
            if name.endswith("bias"):
                return 0.05 * self.normal(name, n)
            gain = {"linear_1": 1.0, "linear_2": 1.6}.get(name.split(".")[-2], 1.0)
            if "embedder" in name:
                gain *= 1.4 if "linear_1" in name else 0.3
            return self.matrix(name, gain * self._rows(name, n), self.spread(name, k, 0.2) / k**0.5)
        if name.endswith(".bias"):
            return 0.02 * self.normal(name, n)
        raise ValueError(f"{name} is no tensor of the DiT")


# ---------------------------------------------------------------- networks


def fill(module: nn.Module, drawn: Drawn, prefix: str = "", only: Callable[[str], bool] = lambda name: True) -> None:
    """Puts drawn tensors in the place of a module's parameters, whose names follow ``prefix``."""
    for name, parameter in list(module.named_parameters()):
        if only(name):
            owner, _, leaf = name.rpartition(".")
            tensor = drawn.tensor(prefix + name, parameter.shape)
            module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    module.eval().requires_grad_(False)


def draw_network(make: Callable[[], nn.Module], device: torch.device, seed: int = 0) -> nn.Module:
    """The whole DiT, as full_width.write_network() takes its weights from; random_weights() is its like."""
    with torch.device("meta"):
        module = make()
    fill(module, Drawn(cast(StepVideoTransformer, module).config, seed, device))
    return module


def draw_block(drawn: Drawn, i: int) -> TransformerBlock:
    """Block ``i`` of the DiT alone."""
    with torch.device("meta"):
        block = TransformerBlock(drawn.dim, drawn.head_dim)
    fill(block, drawn, f"transformer_blocks.{i}.")
    return block


def draw_shell(drawn: Drawn) -> StepVideoTransformer:
    """The DiT without its blocks, which stay on the meta device."""
    with torch.device("meta"):
        module = StepVideoTransformer(drawn.config)
    fill(module, drawn, only=lambda name: not name.startswith("transformer_blocks."))
    return module


class DrawnBlocks:
    """The blocks of a drawn DiT, one at a time; used as engine.activations.Blocks."""

    def __init__(self, drawn: Drawn, make: Callable[[Drawn, int], nn.Module] = draw_block) -> None:
        self.drawn, self.make, self.count = drawn, make, drawn.config.num_layers

    def block(self, i: int) -> nn.Module:
        return self.make(self.drawn, i)

    def each(self, wrap: Callable[[int, nn.Module], nn.Module] = lambda i, block: block) -> Iterator[nn.Module]:
        for i in range(self.count):
            yield wrap(i, self.block(i))


# ---------------------------------------------------------------- model folders


def marked(seed: int, image_to_video: bool = False) -> dict[str, Any]:
    """What results with these weights carry in their ``synthetic``. A model that takes a first frame is another one
    than that of the same seed for texts alone."""
    return {"generator": GENERATOR, "seed": seed} | ({"image_to_video": True} if image_to_video else {})


def marker(folder: Path) -> dict[str, Any] | bool:
    """What a model folder says of weights that were drawn; False where it says nothing.

    Raises:
        UsageError: the marker is damaged.
    """
    file = folder / MARKER
    if not file.exists():
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}); make the folder again.") from None
    if not isinstance(values, dict) or not {"generator", "seed"} <= set(values):
        raise UsageError(f"{file} does not say generator and seed; make the folder again.")
    return values


def write(
    folder: Path, precision: str, text_precision: str, seed: int, device: torch.device, sizes: Sizes = RELEASED
) -> None:
    """A model folder in the released layout whose DiT is drawn; text encoders and VAE are normal random numbers.

    Raises:
        UsageError: the folder is there already.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; give a new folder.")
    part = folder.with_name(f".{folder.name}.part")  # half of a model would be taken for one
    if part.exists():
        shutil.rmtree(part)
    make(part, precision, text_precision, device, lambda build, where: draw_network(build, where, seed), sizes)
    said = marked(seed, sizes.transformer.use_additional_conditions)
    (part / MARKER).write_text(json.dumps(said) + "\n", encoding="utf-8")
    part.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bf16", help="of the DiT")
    parser.add_argument("--text-precision", default="int8", help="of Step-LLM")
    parser.add_argument(
        "--image-to-video", action="store_true", help="the DiT that takes a first frame, too: 80 MB more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    args = parser.parse_args()

    def run() -> None:
        check_precision(args.precision)
        check_precision(args.text_precision, "--text-precision")
        config = replace(RELEASED.transformer, use_additional_conditions=args.image_to_video)
        sizes = replace(RELEASED, transformer=config)
        write(args.folder, args.precision, args.text_precision, args.seed, pick_device(args.device), sizes)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
