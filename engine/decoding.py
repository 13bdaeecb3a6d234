"""The ways to decode a clip: in whole chunks, or in fewer frames and strips of them, for less memory. And those to
encode a first frame: whole, or in strips.

Which of those that fit is taken is by what they took on a card; see models/vae.py for what they do.
"""

from __future__ import annotations

import math

from .config import GenerationSettings, VAEConfig
from .models.vae import ENCODING
from .models.vae_bytes import decode_bytes, encode_bytes, host_bytes
from .models.vae_bytes_cpu import Processor, decode_bytes_on_cpu
from .precision import OFFICIAL

Decoding = tuple[int | None, int]
WHOLE: Decoding = (None, 1)
PLACES = {
    (None, 1): 1.0, (4, 1): 0.92, (2, 1): 1.0, (1, 1): 1.15, (8, 8): 0.94, (8, 16): 0.96, (4, 4): 0.97, (4, 8): 0.99,
    (4, 16): 1.02, (2, 4): 1.1, (2, 8): 1.16, (2, 16): 1.49, (1, 16): 1.92,
}  # fmt: skip
"""Ways to decode: frames of the widest levels at a time (None: a whole chunk, as the official code does) and strips of
each; and how many times as long they take, timed on an H200 (a whole chunk of 17 frames at 544x992: 0.91 s). See
by_speed() for which of those that fit is taken."""
UNTIMED = ((2, 2),)
"""For a host with little memory, which strips need (4.4 to 4.6 GB at 544x992 for those above, 2.2 GB for 2 of them):
taken where no other fits. How long it takes was not measured."""
BEGINNING = 0.9
"""Seconds before the first frames, whatever the clip: what runs to an mp4 of 51 to 204 frames took on an H200 beside a
part that grows with the clip (benchmarks/results/h200)."""
BEGINNING_IN_STRIPS = 1.6
"""The same in strips, whose buffers in host memory are made meanwhile."""
WRITING = 1.0e-8
"""Seconds a pixel that a video file adds to decoding: the part of those runs that grows with the clip, less what
decoding alone takes by its rate; 1.1 s of 204 frames at 544x992."""


def choose_decoding(
    config: VAEConfig, height: int, width: int, room: int, itemsize: int, host: int | None = None, fast: bool = True,
    cpu: Processor | None = None,
) -> tuple[Decoding, int]:  # fmt: skip
    """The fastest way to decode in so many bytes beside the weights, and of host memory (None: any), or else the
    smallest that the host has memory for; and what it takes on the card, or of memory on a ``cpu``. If not ``fast``,
    whole chunks are first."""
    every = (*PLACES, *UNTIMED)
    places = [p for p in every if host is None or host_bytes(config, height, width, p[1], itemsize) <= host]

    def needs(place: Decoding) -> int:
        if cpu is not None:
            return decode_bytes_on_cpu(config, height, width, *place, itemsize, cpu)
        return decode_bytes(config, height, width, *place, itemsize)

    counted = [(place, needs(place)) for place in places]
    fitting = [(place, needed) for place, needed in counted if needed <= room]
    if not fitting:
        return min(counted, key=lambda one: one[1])
    if not fast:
        return fitting[0]
    # min() takes the first of equals: ways that were not timed keep their order.
    return min(fitting, key=lambda one: (PLACES[one[0]], one[1]) if one[0] in PLACES else (math.inf, 0))


def choose_encoding(config: VAEConfig, height: int, width: int, room: int, itemsize: int) -> tuple[int, int]:
    """The fewest strips that a first frame is encoded in within so many bytes beside the weights, or else the most; and
    what it takes so. Whole is best: it keeps every bit, and strips save nothing but memory."""
    counted = [(strips, encode_bytes(config, height, width, strips, itemsize)) for strips in ENCODING]
    return next((one for one in counted if one[1] <= room), counted[-1])


def by_speed(on_card: bool, attention: str) -> bool:
    """Whether the fastest way to decode is taken before whole chunks: not on a CPU, where none was timed, nor for
    official numbers, as pieces are rounded otherwise in bf16 (76 dB from whole chunks, on an H200)."""
    return on_card and attention != OFFICIAL


def first_choice(fast: bool) -> Decoding:
    """How is decoded where there is memory enough."""
    return min(PLACES, key=lambda place: PLACES[place]) if fast else WHOLE


def decode_seconds(
    rate: float | None, way: Decoding, settings: GenerationSettings, file: bool = True
) -> float | None:  # fmt: skip
    """Seconds of decoding at so many pixels a second in whole chunks, and of writing a video ``file`` meanwhile; None
    where one of these was not timed."""
    if rate is None or way not in PLACES:
        return None
    pixels = settings.num_frames * settings.height * settings.width
    begins = BEGINNING if way[1] == 1 else BEGINNING_IN_STRIPS
    return begins + pixels * (PLACES[way] / rate + (WRITING if file else 0.0))


def slower(one: Decoding, other: Decoding) -> bool:
    """Whether a way to decode takes more than a tenth longer than another, or nobody knows."""
    return one != other and (one not in PLACES or other not in PLACES or PLACES[one] > 1.1 * PLACES[other])


def how_decoded(frames: int | None, strips: int) -> str:
    """In words."""
    if frames is None:
        return "chunk by chunk"
    some = "frame by frame" if frames == 1 else f"{frames} frames at a time"
    return some + (f" in {strips} strips" if strips > 1 else "")
