"""What the VAE takes while it works, counted from shapes alone: bytes on the device, and of host memory.

Each count walks the levels of a network as models/vae.py runs them, and sums what is alive at each moment that may be
the largest. Tests hold the counts against runs, tensor by tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import CHUNK_LATENTS, VAEConfig
from .vae import MAX_ELEMENTS, NORM_PARTS, RING, SCALE, strip_rows

FP32 = 4
"""Bytes of a number."""


class _InStrips:
    """A frame that the widest level takes in so many strips, and lower levels in fewer of the same rows."""

    height: int
    strips: int

    @property
    def rows(self) -> int:
        return strip_rows(self.height, self.strips)

    def divided(self, level: int) -> bool:
        return self.strips > 1 and self.rows < self.height >> level


@dataclass(frozen=True)
class DecoderCount(_InStrips):
    """Counts the bytes alive while one chunk is decoded, level by level, along the lines of ``Decoder``.

    Each moment that may be the largest is one sum. See :func:`decode_bytes`.
    """

    config: VAEConfig
    height: int
    width: int
    frames: int | None
    strips: int
    itemsize: int

    def tensor(self, level: int, channels: int, frames: int) -> int:
        """Bytes of frames at the resolution of a level."""
        return channels * frames * (self.height >> level) * (self.width >> level) * self.itemsize

    def strip(self, level: int, channels: int, frames: int, halo: int = 2) -> int:
        rows = min(self.rows, self.height >> level)
        return channels * frames * (rows + halo) * (self.width >> level) * self.itemsize

    def beside(self, level: int, wide: int, out: int, frames: int, rows: int | None = None, taps: int = 3) -> int:
        """What a convolution takes beside its tensors at its own moment, of so many ``frames`` that it makes and
        ``rows`` (None: whole frames), with ``taps`` of its kernel in time: on a card nothing, as
        :meth:`largest_convolution` is counted once."""
        return 0

    def walk(self) -> Iterator[tuple[int, int, int, int, list[tuple[int, int]]]]:
        """Of each level, lowest resolution first: its index, frames that come, frames at a time, channels that come,
        and the channels in and out of its blocks."""
        config = self.config
        widths = [config.decoder_ch * m for m in config.decoder_ch_mult]
        last, come = widths[-1], 2 * CHUNK_LATENTS - 1
        for level in reversed(range(len(widths))):
            doublings = sum(1 for i in config.temporal_up_layers if 0 < i <= level)
            now = come if self.frames is None else min(come, max(1, self.frames >> doublings))
            blocks = [(last if i == 0 else widths[level], widths[level]) for i in range(config.num_res_blocks + 1)]
            yield level, come, now, last, blocks
            come, last = now * (2 if level in config.temporal_up_layers else 1), widths[level]

    def past(self) -> int:
        """Frames that convolutions keep on the device."""
        if self.frames is None:
            return 0
        total = 0
        for level, _, _, _, blocks in self.walk():
            width = blocks[-1][1]
            if not self.divided(level):
                total += sum(self.tensor(level, i + o, 2) for i, o in blocks)
                total += self.tensor(0, width, 2) if level == 0 else 0
            if level in self.config.temporal_up_layers and level and not self.divided(level - 1):
                total += self.tensor(level - 1, 2 * width, 2)
        return total

    def peak(self) -> int:
        """The largest of the moments of all levels, with what waits at the levels before and what is kept."""
        past, waiting = self.past(), 0
        lowest = self.config.decoder_ch * self.config.decoder_ch_mult[-1]
        low = len(self.config.decoder_ch_mult) - 1
        # The middle: x, its norm, q, k, v and their rearranged copies, result and projection of the attention.
        peaks = [9 * self.tensor(low, lowest, 2 * CHUNK_LATENTS - 1)]
        for level, come, now, channels, blocks in self.walk():
            waiting += self.tensor(level, channels, come - now)
            if come > now:  # for a moment, the whole beside its parts
                peaks.append(waiting + self.tensor(level, channels, come + now) + past)
            moments = self._divided(level, now, blocks) if self.divided(level) else self._whole(level, now, blocks)
            # The first block reads the level's input itself; beside the others it stays, as an argument of the call.
            entry = self.tensor(level, channels, now)
            peaks += [waiting + past + moment + (0 if first else entry) for first, moment in moments]
            last = self._added(level, now, blocks) if self.divided(level) else self.tensor(level, blocks[-1][1], now)
            peaks += [waiting + past + entry + last + moment for moment in self._up(level, now, blocks[-1][1])]
        return max(peaks)

    def _added(self, level: int, n: int, blocks: list[tuple[int, int]]) -> int:
        """Beside the input of a level in strips, over which its blocks write: results that were too wide for that."""
        return max((self.tensor(level, out, n) for wide, out in blocks if out > wide), default=0)

    def _at_once(self, level: int, channels: int) -> int:
        """Frames of one call under :data:`MAX_ELEMENTS`."""
        return max(1, MAX_ELEMENTS * self.itemsize // self.tensor(level, channels, 1))

    def _norm(self, level: int, channels: int, frames: int) -> int:
        """What a norm takes beside input and output when it goes by groups: a part's result, and its copy."""
        return self.tensor(level, channels, 1 if frames == 1 else 2) // NORM_PARTS

    def _divided(self, level: int, n: int, blocks: list[tuple[int, int]]) -> Iterator[tuple[bool, int]]:
        """Of the blocks of a level: a moment's bytes, the level's input among them, in whose place they write."""
        added = 0
        entry = self.tensor(level, blocks[0][0], n)
        for i, (wide, out) in enumerate(blocks):
            added = self._added(level, n, blocks[: i + 1])
            x, h = entry + added, self.tensor(level, out, n)
            yield True, x + self._norm(level, wide, n)
            yield True, x + h + self._in_strips(level, wide, out, n)
            yield True, x + h + self._norm(level, out, n)
            yield True, x + h + self._in_strips(level, out, out, n)
        if level == 0:
            x = entry + added
            yield True, x + self._norm(0, out, n)
            made = self.config.out_channels
            x += self.tensor(0, made, n)
            yield True, x + self.strip(0, out, 2 + n) + self.beside(0, out, made, n, self.rows)

    def _in_strips(self, level: int, wide: int, out: int, n: int) -> int:
        """Input and output of a convolution's largest strip."""
        strips = self.strip(level, wide, 2 + n) + self.strip(level, out, n, 0)
        return strips + self.beside(level, wide, out, n, min(self.rows, self.height >> level))

    def _whole(self, level: int, n: int, blocks: list[tuple[int, int]]) -> Iterator[tuple[bool, int]]:
        """The same of a level that is not divided."""
        for i, (wide, out) in enumerate(blocks):
            x, h = self.tensor(level, wide, n), self.tensor(level, out, n)
            yield i == 0, x + self._whole_norm(level, wide, n)
            yield i == 0, 2 * x + self._convolution(level, wide, out, n)
            yield i == 0, x + h + self._whole_norm(level, out, n)
            yield i == 0, x + 2 * h + self._convolution(level, out, out, n)
        if level == 0:
            yield False, 2 * x + self._convolution(0, out, self.config.out_channels, n)

    def _whole_norm(self, level: int, channels: int, n: int) -> int:
        """Output, and the input's copy with frames in front; in slices of frames, the parts before they are joined."""
        return self.tensor(level, channels, 2 * n if n > 1 else 1)

    def _convolution(self, level: int, wide: int, out: int, n: int) -> int:
        """Output, and the input with two frames more; in slices of frames, the parts before they are joined."""
        sliced = n > self._at_once(level, max(wide, out))
        made = self.tensor(level, out, 2 * n if sliced else n)
        # Without past frames, zeros are put before the first slice only, and that is gone when the parts are joined.
        beside = self.beside(level, wide, out, min(n, self._at_once(level, max(wide, out))))
        return beside + (made if sliced and self.frames is None else made + self.tensor(level, wide, n + 2))

    def _up(self, level: int, n: int, width: int) -> Iterator[int]:
        """The change to the next resolution, beside what is changed."""
        if level == 0:
            return
        above = level - 1
        if level not in self.config.temporal_up_layers:
            big = self.tensor(above, width, n)
            # Doubled input and output; in slices of frames, the parts before they are joined.
            if self.divided(above):
                yield big + 2 * self.strip(above, width, 1) + self.beside(above, width, width, 1, self.rows, taps=1)
            else:
                yield 2 * big + self.beside(above, width, width, min(n, self._at_once(above, width)), taps=1)
            return
        big = self.tensor(above, width, 2 * n)
        if self.divided(above):
            yield 2 * big + max(self._in_strips(above, width, width, 2 * n), self._norm(above, width, 2 * n))
        else:
            yield big + self._convolution(above, width, width, 2 * n)
            yield 2 * big + self._convolution(above, width, width, 2 * n)
            yield 2 * big + self._whole_norm(above, width, 2 * n)
            yield 4 * big

    def largest_convolution(self) -> int:
        """Input and output of one call."""
        sizes = [0]

        def whole(level: int, wide: int, out: int, n: int) -> None:
            n = min(n, self._at_once(level, max(wide, out)))
            sizes.append(self.tensor(level, wide, n + 2) + self.tensor(level, out, n))

        def divided(level: int, wide: int, out: int, n: int) -> None:
            sizes.append(self.strip(level, wide, n + 2) + self.strip(level, out, n, 0))

        for level, _, now, _, blocks in self.walk():
            for wide, out in blocks:
                (divided if self.divided(level) else whole)(level, wide, out, now)
            if level:
                width = blocks[-1][1]
                n = 2 * now if level in self.config.temporal_up_layers else now
                (divided if self.divided(level - 1) else whole)(level - 1, width, width, n)
        return max(sizes)

    def host(self) -> int:
        """Past frames of what is divided, strip by strip, in host memory."""
        total = 0
        for level, _, _, _, blocks in self.walk():
            width = blocks[-1][1]
            if self.divided(level):
                total += sum(self.lines(level, i + o) for i, o in blocks)
                total += self.lines(0, width) if level == 0 else 0
            if level in self.config.temporal_up_layers and level and self.divided(level - 1):
                total += self.lines(level - 1, 2 * width)
        return total

    def lines(self, level: int, channels: int) -> int:
        """Two frames in strips, each with a row more on both sides."""
        height = self.height >> level
        rows = height + 2 * -(-height // self.rows)
        return channels * 2 * rows * (self.width >> level) * self.itemsize

    def ring(self) -> int:
        """Buffers between the device and the past frames in host memory."""
        largest = 0
        for level, _, _, _, blocks in self.walk():
            if self.divided(level):
                largest = max([largest, *(self.strip(level, max(block), 2) for block in blocks)])
            if level in self.config.temporal_up_layers and level and self.divided(level - 1):
                largest = max(largest, self.strip(level - 1, blocks[-1][1], 2))
        return 2 * RING * largest


@functools.lru_cache(maxsize=256)
def decode_bytes(
    config: VAEConfig, height: int, width: int, frames: int | None, strips: int = 1, itemsize: int = 2
) -> int:
    """Peak bytes on the device, beside the weights, while one chunk of 17 frames is decoded.

    Counted from shapes, tensor by tensor (tests hold it against a run), and :func:`workspace_bytes`. Arguments are
    those of ``decode_chunks``; ``height`` and ``width`` are pixels.
    """
    counted = _count(config, height, width, frames, strips, itemsize).peak()
    return counted + workspace_bytes(config, height, width, frames, strips, itemsize)


@functools.lru_cache(maxsize=256)
def host_bytes(config: VAEConfig, height: int, width: int, strips: int, itemsize: int = 2) -> int:
    """What decoding in strips keeps in host memory: the last two input frames of every convolution that is divided,
    however many frames are decoded at a time; at 544x992 4.4 GB in 8 strips, 4.6 in 16."""
    return _count(config, height, width, 1, strips, itemsize).host() if strips > 1 else 0


def workspace_bytes(
    config: VAEConfig, height: int, width: int, frames: int | None, strips: int = 1, itemsize: int = 2
) -> int:
    """The part of :func:`decode_bytes` that is no tensor of the decoder: buffers for copies to and from host memory,
    and as an allowance for a convolution's workspace its input and output once more, in the order cuDNN wants."""
    count = _count(config, height, width, frames, strips, itemsize)
    return count.largest_convolution() + count.ring()


def check_decoding(height: int, width: int, frames: int | None, strips: int) -> int | None:
    """Frames that are decoded at a time: of whole chunks in strips one.

    Raises:
        ValueError: there is no such frame, or no such way to decode it.
    """
    if min(height, width) < SCALE or strips < 1 or (frames is not None and frames < 1):
        raise ValueError(f"no frames of {height}x{width}, {frames} at a time in {strips} strips")
    return 1 if strips > 1 and frames is None else frames


def _count(config: VAEConfig, height: int, width: int, frames: int | None, strips: int, itemsize: int) -> DecoderCount:
    frames = check_decoding(height, width, frames, strips)
    return DecoderCount(config, height, width, frames, strips, itemsize)


# --- the encoder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EncoderCount(_InStrips):
    """Counts the bytes alive while one frame is encoded, along the lines of ``Encoder``. See :func:`encode_bytes`."""

    config: VAEConfig
    height: int
    width: int
    strips: int
    itemsize: int

    def numbers(self, level: int, channels: int) -> int:
        """Of a frame at the resolution of a level."""
        return channels * (self.height >> level) * (self.width >> level)

    def tensor(self, level: int, channels: int) -> int:
        return self.numbers(level, channels) * self.itemsize

    def walk(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Of each level, highest resolution first: its index, the channels that come, and those in and out of its
        blocks."""
        last = self.config.encoder_ch
        for level, factor in enumerate(self.config.encoder_ch_mult):
            width = self.config.encoder_ch * factor
            blocks = [(last if i == 0 else width, width) for i in range(self.config.num_res_blocks)]
            yield level, last, blocks
            last = width if blocks else last

    @property
    def low(self) -> int:
        """The lowest level."""
        return len(self.config.encoder_ch_mult) - 1

    @property
    def last(self) -> int:
        """Channels behind the levels."""
        config = self.config
        return config.encoder_ch * (config.encoder_ch_mult[-1] if config.num_res_blocks else 1)

    def call(self, level: int, wide: int, out: int, kernel: int = 3, stride: int = 1) -> tuple[int, int, int]:
        """Numbers that a convolution takes, with frames and rows of zeros, and makes, of a strip where the level is
        divided; and those of its weights."""
        high, across = self.height >> level, self.width >> level
        halo = stride - 1  # in whole frames, the convolution itself puts zeros on both sides
        if self.divided(level):
            high, halo = min(high, stride * -(-self.rows // stride)), kernel - 1
        taken = wide * kernel * (high + halo) * (across + stride - 1)
        return taken, out * -(-high // stride) * -(-across // stride), wide * out * kernel**3

    def convolution(self, taken: int, made: int, weights: int) -> int:
        """What a call needs: its input with zeros, and its output; where it is rounded once, copies in fp32 of these
        and of its weights, which are gone before the output is rounded."""
        if self.itemsize == FP32:
            return (taken + made) * FP32
        copied = taken * (self.itemsize + FP32) + (made + weights) * FP32
        return max(copied, taken * self.itemsize + made * (FP32 + self.itemsize))

    def norm(self, level: int, channels: int) -> int:
        """Beside its input: of whole frames the output, in fp32 copies of both where it is rounded once; by groups,
        which a card does without, a part's result and that of the one before."""
        if self.divided(level):
            return 2 * self.tensor(level, channels) // NORM_PARTS
        return self.numbers(level, channels) * (FP32 if self.itemsize == FP32 else 2 * FP32)

    def calls(self) -> Iterator[tuple[int, int, int]]:
        """All convolutions but the shortcuts, which take and make no more than those beside them."""
        config = self.config
        yield self.call(0, config.in_channels, config.encoder_ch)
        for level, come, blocks in self.walk():
            for wide, out in blocks:
                yield self.call(level, wide, out)
                yield self.call(level, out, out)
            if level < self.low:
                width = blocks[-1][1] if blocks else come
                yield self.call(level, width, width, stride=2)
        yield from self.calls_behind()

    def calls_behind(self) -> Iterator[tuple[int, int, int]]:
        """Those of the middle block, ``conv_patchify`` and ``conv_out``, of whole frames."""
        whole, z = replace(self, strips=1), self.config.z_channels
        yield whole.call(self.low, self.last, self.last)
        yield whole.call(self.low, self.last, 4 * z)
        yield whole.call(self.low + 1, 32 * z, 2 * z)

    def peak(self) -> int:
        """The largest of the moments of all parts, with the frame itself, which waits."""
        config = self.config
        first = self.tensor(0, config.encoder_ch) if self.divided(0) else 0
        peaks = [first + self.convolution(*self.call(0, config.in_channels, config.encoder_ch))]
        for level, come, blocks in self.walk():
            peaks += self._divided(level, come, blocks) if self.divided(level) else self._whole(level, come, blocks)
        return self.tensor(0, config.in_channels) + max([*peaks, *self._finish()])

    def _divided(self, level: int, come: int, blocks: list[tuple[int, int]]) -> Iterator[int]:
        """The moments of a level in strips, with its input, over which blocks write unless their results are wider."""
        held = entry = self.tensor(level, come)
        for wide, out in blocks:
            h = self.tensor(level, out)
            added = h if out > wide else 0
            yield held + self.norm(level, wide)
            yield held + h + self.convolution(*self.call(level, wide, out))
            if wide != out:
                yield held + added + h + self.convolution(*self.call(level, wide, out, kernel=1))
            yield held + added + h + self.norm(level, out)
            yield held + added + h + self.convolution(*self.call(level, out, out))
            held = entry + added if added else held
        if level < self.low:
            width = blocks[-1][1] if blocks else come
            yield held + self._down(level, width)

    def _whole(self, level: int, come: int, blocks: list[tuple[int, int]]) -> Iterator[int]:
        """The same of a level that is not divided. Its input stays, as an argument of the call."""
        entry = self.tensor(level, come)
        for i, (wide, out) in enumerate(blocks):
            yield (entry if i else 0) + self._block(level, wide, out)
        if level < self.low:
            width = blocks[-1][1] if blocks else come
            yield (entry if blocks else 0) + self.tensor(level, width) + self._down(level, width)

    def _block(self, level: int, wide: int, out: int) -> int:
        """A residual block of whole frames, its input among what it takes."""
        x, h = self.tensor(level, wide), self.tensor(level, out)
        return max(
            x + self.norm(level, wide),
            2 * x + self.convolution(*self.call(level, wide, out)),
            x + h + self.norm(level, out),
            x + 2 * h + self.convolution(*self.call(level, out, out)),
            x + h + self.convolution(*self.call(level, wide, out, kernel=1)),
        )

    def _down(self, level: int, width: int) -> int:
        """The change to the next resolution, beside what is changed."""
        taken, made, weights = self.call(level, width, width, stride=2)
        if level not in self.config.down_sampling_layer:  # of single frames, without any in front
            taken, weights = taken // 3, weights // 3
        if not self.divided(level):
            return self.convolution(taken, made, weights)
        # Zeros at the right take a copy of the strip.
        return self.tensor(level + 1, width) + max(2 * taken * self.itemsize, self.convolution(taken, made, weights))

    def _finish(self) -> Iterator[int]:
        """The moments behind the levels, with their result, which stays as an argument of the call."""
        whole, z = replace(self, strips=1), self.config.z_channels
        _, patchify, out = self.calls_behind()
        x, narrow = self.tensor(self.low, self.last), self.tensor(self.low, 4 * z)
        yield x + whole._block(self.low, self.last, self.last)
        # The middle's attention: x, its norm, q, k, v and their rearranged copies, result and projection.
        yield x + 9 * x + self.convolution(*whole.call(self.low, self.last, self.last, kernel=1))
        yield 3 * x + whole.norm(self.low, self.last)
        yield 2 * x + self.convolution(*patchify)
        # Space and time become channels, with a frame of zeros in front: a padded copy and a rearranged one.
        yield 2 * x + narrow + 2 * 2 * narrow
        yield 2 * x + 2 * narrow + 2 * 2 * x
        yield 2 * x + 2 * 2 * narrow + self.convolution(*out)

    def workspace(self) -> int:
        """Input, output and weights of the largest call once more, and a fiftieth of that."""
        return max(sum(call) for call in self.calls()) * FP32 * 51 // 50


@functools.lru_cache(maxsize=256)
def encode_bytes(config: VAEConfig, height: int, width: int, strips: int = 1, itemsize: int = 2) -> int:
    """Peak bytes on the device, beside the weights, while one frame is encoded in so many strips (``encode_video``).

    Counted from shapes: the frame, and of each layer the tensors at its largest moment, whole or of the largest strip.
    In 16 bits, convolutions and whole norms are counted with the fp32 copies that they take to be rounded once. An
    allowance for a convolution's workspace is added: its input, output and weights once more, and a fiftieth of
    that (at 544x992 an H200 took 2 MB of 3.1 GB more without). ``height`` and ``width`` are pixels.
    """
    count = _encoder_count(config, height, width, strips, itemsize)
    return count.peak() + count.workspace()


def encode_workspace_bytes(config: VAEConfig, height: int, width: int, strips: int = 1, itemsize: int = 2) -> int:
    """The part of :func:`encode_bytes` that is no tensor of the encoder."""
    return _encoder_count(config, height, width, strips, itemsize).workspace()


def _encoder_count(config: VAEConfig, height: int, width: int, strips: int, itemsize: int) -> _EncoderCount:
    if min(height, width) < SCALE or strips < 1:
        raise ValueError(f"no frame of {height}x{width} in {strips} strips")
    return _EncoderCount(config, height, width, strips, itemsize)
