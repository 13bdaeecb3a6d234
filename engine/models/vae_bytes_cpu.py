"""What decoding takes on a CPU, counted from shapes alone: bytes of memory beside the weights and the program.

The tensors are those of vae_bytes.py. Beside them a convolution takes there, where it computes in fp32 what is stored
in bf16, fp32 copies of its input and result; and for oneDNN both once more in blocks of channels. What is small for
oneDNN, torch computes by a matrix of all windows (im2col), 27 times the result's rows in size. Not counted are the code
and the buffers that libraries load when they first compute, 10 to 20 MB.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import CHUNK_LATENTS, VAEConfig
from ..runtime import slow_in_bf16
from .vae_bytes import FP32, DecoderCount, check_decoding

SMALL = 20480
"""Elements of the first four dimensions of an input in fp32 up to which torch does not give a convolution of one video
to oneDNN (``use_mkldnn`` in its Convolution.cpp)."""
BLOCK = 16
"""Channels that oneDNN keeps together at most: fewer are filled up with zeros."""


@dataclass(frozen=True)
class Processor:
    """How a CPU multiplies: by ``onednn`` or torch's own loops, and bf16 in fp32 (``wide``) where it lacks bf16."""

    onednn: bool = True
    wide: bool = True


@functools.cache
def this_processor() -> Processor:
    """That of this machine."""
    return Processor(torch.backends.mkldnn.is_available(), slow_in_bf16())


@dataclass(frozen=True)
class _Count(DecoderCount):
    processor: Processor

    @property
    def factor(self) -> int:
        """Bytes of a number that is multiplied."""
        return FP32 if self.processor.wide else self.itemsize

    def beside(self, level: int, wide: int, out: int, frames: int, rows: int | None = None, taps: int = 3) -> int:
        height, width = self.height >> level, self.width >> level
        read = height if rows is None else rows + 2
        before = frames + taps - 1
        # Frames of a 2-D convolution are a batch; alone they count by rows and columns.
        small = (wide * before * read if taps > 1 else wide * read * width) <= SMALL and (taps > 1 or frames == 1)
        made = frames * (height if rows is None else rows) * width
        turned = taps == 1 and frames > 1
        return self._call(wide * before * read * width, out, made, wide * taps * 9, small, turned)

    def _call(self, taken: int, out: int, made: int, window: int, small: bool, turned: bool) -> int:
        """Of an input of ``taken`` numbers: what comes on top of it and of ``out`` channels of ``made`` pixels, each of
        ``window`` numbers; a ``turned`` input, whose channels lie behind its frames, is copied first."""
        factor = self.factor
        result = out * made * factor
        copies = (taken * factor if factor != self.itemsize else 0) + (taken * factor if turned else 0)
        if self.processor.onednn and not (small and factor == FP32):
            blocked = -(-out // BLOCK) * BLOCK * made * factor
            beside = blocked + max(taken * factor, result)
        else:
            beside = result + window * made * factor
        return copies + beside - out * made * self.itemsize

    def _shortcut(self, level: int, wide: int, out: int, n: int) -> int:
        """The same of a convolution of single pixels, whose input has its channels behind its frames."""
        high = self.height >> level
        pixels = n * high * (self.width >> level)
        return self._call(wide * pixels, out, pixels, 0, wide * n * high <= SMALL, n > 1)

    def _in_strips(self, level: int, wide: int, out: int, n: int) -> int:
        strips = super()._in_strips(level, wide, out, n)
        if self.itemsize == FP32:
            return strips
        # A norm's scales are in fp32: what they are applied to is copied, and so is the result.
        normed = 2 * self.strip(level, wide, n) * FP32 // self.itemsize
        return max(strips, self.strip(level, wide, 2 + n) + normed)

    def _whole(self, level: int, n: int, blocks: list[tuple[int, int]]) -> Iterator[tuple[bool, int]]:
        yield from super()._whole(level, n, blocks)
        for i, (wide, out) in enumerate(blocks):
            if wide != out:
                kept = self.tensor(level, wide, n) + 2 * self.tensor(level, out, n)
                yield i == 0, kept + self._shortcut(level, wide, out, n)

    def peak(self) -> int:
        low, frames = len(self.config.decoder_ch_mult) - 1, 2 * CHUNK_LATENTS - 1
        width = self.config.decoder_ch * self.config.decoder_ch_mult[-1]
        middle = 9 * self.tensor(low, width, frames) + self._shortcut(low, width, width, frames)
        return max(super().peak(), middle)


@functools.lru_cache(maxsize=256)
def decode_bytes_on_cpu(
    config: VAEConfig, height: int, width: int, frames: int | None, strips: int, itemsize: int, processor: Processor
) -> int:
    """Peak bytes, beside the weights, while one chunk of 17 frames is decoded on a CPU.

    Past frames of strips (``host_bytes``) come on top. Arguments are those of ``decode_bytes``. Held to what a process
    took on a CPU that lacks bf16, with large tensors given back at once (``return_large_tensors``): the demo model took
    1 to 10 % more at 192x192 and 256x256, whole and in pieces, and 3 to 16 at 96x96, most of it for libraries that were
    used for the first time. Where bf16 is multiplied as such, it is not measured.
    """
    frames = check_decoding(height, width, frames, strips)
    return _Count(config, height, width, frames, strips, itemsize, processor).peak()
