"""How fast a card computes blocks, takes copies and decodes, measured once for each precision and kept.

One block of the released width with random weights at two lengths: what grows with the square of the length is
attention's, the rest the linears' with all passes between them. Some seconds, and 4 GB of the card's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.attention_check import median_ms
from ..kernels.cards import reason_of
from ..offload.planner import GUESS, Rates
from ..quant import foreign
from ..quant.formats import install, kinds_of, quantize
from ..quant.linear import assign
from ..quant.recipe import Recipe
from .apart import measured_apart
from .cached import share_in_memory
from .choices import attention_choice, choices_key, settle, told, use_right_products
from .config import CHUNK_FRAMES, CHUNK_LATENTS, CLIP_TOKENS, LLM_TOKENS, TransformerConfig, VAEConfig, cache_dir
from .files import one_at_a_time, replacing
from .machine import transfer_rates
from .models.fused import FusedBlocks
from .models.transformer import TransformerBlock, rope_table
from .models.vae import Decoder
from .plan import Rated
from .precision import OFFICIAL, Mode
from .runtime import free_memory, numerics, release_memory
from .weights import Component

log = logging.getLogger("solostep")
BLOCKS = ("attention", "linears", "bus", "disk")
"""Rates of blocks, as files name them."""
LENGTHS = (8, 24)
"""Latent frames of 32 x 32, 8,192 and 24,576 tokens."""
TEXT_TOKENS = LLM_TOKENS + CLIP_TOKENS
PIECE = 16 << 20
"""Bytes that are read at a time where a disk is timed."""
AT_A_STRETCH = 1000
"""Milliseconds that a block is timed: a card that has just begun has a higher clock than one that works."""


def random_weights(make: Callable[[], nn.Module], device: torch.device, seed: int = 0) -> Any:
    """Builds a network in bf16 right on the device, with weights of variance 1 / fan-in and norms of one."""
    with torch.device("meta"):
        module = make()
    module = module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))
        else:
            fan_in = parameter[0].numel() if "scale_shift" not in name else 16
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    return module


def quantized_block(block: TransformerBlock, recipe: Recipe | None, config: TransformerConfig) -> TransformerBlock:
    """A block with the same weights in another precision; all that is not quantized is shared."""
    if recipe is None:
        return block
    prefix = "transformer_blocks.0."
    with torch.device("meta"):
        made = TransformerBlock(config.inner_dim, config.attention_head_dim)
    weights = {prefix + n: m.weight for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    formats = recipe.resolve(weights)
    install(made, {name.removeprefix(prefix): kind for name, kind in formats.items()}, torch.bfloat16)
    state = {n: p for n, p in block.named_parameters() if prefix + n.removesuffix(".weight") not in formats}
    made.load_state_dict(state, strict=False, assign=True)
    for name, kind in formats.items():
        assign(made.get_submodule(name.removeprefix(prefix)), quantize(kind, weights[name]))
    use_right_products(made, next(block.parameters()).device)
    return made.eval().requires_grad_(False)


def rates_file(device: torch.device, mode: Mode, attention: str) -> Path:
    """Where the rates of a card are kept."""
    key = json.dumps([choices_key(device), mode.name, mode.described(), attention], sort_keys=True)
    return cache_dir() / "rates" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def values_of(rated: Rated) -> dict[str, float]:
    """Rates as files and other processes have them."""
    return {**vars(rated.blocks), "decode": rated.decode}


def _rated(values: Mapping[str, Any]) -> Rated:
    """The way back from :func:`values_of`."""
    return Rated(Rates(*(float(values[name]) for name in BLOCKS)), float(values["decode"]))


def known_rates(device: torch.device, mode: Mode, attention: str) -> Rated | None:
    """The kept rates of a card; None where none were measured."""
    try:
        found = _rated(json.loads(rates_file(device, mode, attention).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(0 < n < float("inf") for n in values_of(found).values()) else None


def measured_rates(device: torch.device, mode: Mode, attention: str) -> Rated | None:
    """The rates of a card, measured now if they are not known; None where that is not possible: other packages'
    formats, or too little free memory."""
    found = known_rates(device, mode, attention)
    if found is None:
        if mode.recipe is not None and any(foreign.is_foreign(kind) for _, kind in mode.recipe.rules):
            return None
        file = rates_file(device, mode, attention)
        if file in _UNMEASURED:
            return None
        with one_at_a_time(file):  # others would slow what is timed
            found = known_rates(device, mode, attention) or _measure_and_keep(device, mode, attention, file)
    return found


_UNMEASURED: set[Path] = set()
"""What this process could not measure, and need not try again for every plan."""


def _measure_and_keep(device: torch.device, mode: Mode, attention: str, file: Path) -> Rated | None:
    found = None
    try:
        with told("measuring for plans how fast this precision is"):
            found = _measured(device, mode.recipe, attention)
    except Exception as error:  # whatever a driver or a compiler raises: a plan without times is better than no run
        log.warning("This card's speed could not be measured (%s); plans are without times.", reason_of(error))
    if found is None:
        _UNMEASURED.add(file)
        release_memory(device)  # here, where no traceback holds what was made
        return None
    with contextlib.suppress(OSError):
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(values_of(found)) + "\n", encoding="utf-8")
    return found


def _measured(device: torch.device, recipe: Recipe | None, attention: str) -> Rated:
    """By a process of its own, else by this one."""
    # What the block needs to know is found out first, and said here.
    settle(device, () if recipe is None else kinds_of(kind for _, kind in recipe.rules))
    if attention != OFFICIAL:
        for frames in LENGTHS:
            attention_choice(device, attention, 1024 * frames)
    values = measured_apart(
        "rates", device, recipe=None if recipe is None else recipe.as_dict(), attention=attention
    )  # fmt: skip
    return measure(device, recipe, attention) if values is None else _rated(values)


def measure(device: torch.device, recipe: Recipe | None, attention: str) -> Rated:
    """Measures a card's rates; it has to have 4 GB free."""
    with numerics():
        seconds = [block_seconds(device, recipe, attention, frames) for frames in LENGTHS]
        short, long = (1024 * frames for frames in LENGTHS)
        dim = TransformerConfig().inner_dim
        square = (seconds[1] / long - seconds[0] / short) / (long - short)
        linear = seconds[0] / short - square * short
        decode = decode_rate(device)
        bus = transfer_rates(device, quick=True)["host_to_device_pinned"]
    release_memory(device)
    return Rated(Rates(4 * dim / max(square, 1e-18), 28 * dim**2 / max(linear, 1e-15), bus, GUESS[3]), decode)


def block_seconds(device: torch.device, recipe: Recipe | None, attention: str, frames: int) -> float:
    """Of one block and one branch at 32 x 32 x ``frames`` tokens."""
    config = TransformerConfig()
    dim, fhw = config.inner_dim, (frames, 32, 32)
    tokens = frames * 1024
    block = random_weights(lambda: TransformerBlock(dim, config.attention_head_dim), device)
    mine = quantized_block(block, recipe, config)
    del block
    rope = rope_table(fhw, torch.bfloat16, device)
    x, text, modulation = (
        torch.randn(1, *shape, device=device, dtype=torch.bfloat16)
        for shape in ((tokens, dim), (TEXT_TOKENS, dim), (6 * dim,))
    )
    modulation /= 4
    if attention == OFFICIAL:
        return median_ms(lambda: mine(x, text, modulation, rope), device, AT_A_STRETCH) / 1e3
    fused = FusedBlocks([text], attention, attention_choice(device, attention, tokens))

    def run() -> None:
        fused(0, 0, mine, x, modulation, rope)
        x.clamp_(-64, 64)  # it is added to over and over

    return median_ms(run, device, AT_A_STRETCH) / 1e3


def decode_rate(device: torch.device) -> float:
    """Pixels a second of the VAE's decoder; of the usual size where there is room: a quarter of it takes 0.22 of
    the time, on an H200."""
    config = VAEConfig()
    decoder = random_weights(lambda: Decoder(config), device)
    sizes = ((544, 992), 26e9), ((272, 496), 8e9), ((96, 160), 0)
    height, width = next(size for size, room in sizes if free_memory(device) > room)
    z = torch.randn(1, config.z_channels, CHUNK_LATENTS, height // 16, width // 16, device=device, dtype=torch.bfloat16)
    ms = median_ms(lambda: decoder(z), device, 500)
    return CHUNK_FRAMES * height * width / ms * 1e3


def with_disk(rated: Rated | None, components: Mapping[str, Component]) -> Rated | None:
    """A card's rates with that of the disk that a model's files are on, if it can be told, and what of the files is in
    memory already."""
    rate = None if rated is None else folder_rate(components["transformer"].files)
    if rated is None or rate is None:
        return rated

    def share(*parts: str) -> float:
        return share_in_memory([file for part in parts if part in components for file in components[part].files])

    kept = {"text": share("step_llm", "hunyuan_clip"), "transformer": share("transformer"), "decoder": share("vae")}
    kept["encoder"] = kept["decoder"]  # in the same files
    return replace(rated, blocks=replace(rated.blocks, disk=rate), disk="measured", kept=kept)


def folder_rate(files: Sequence[Path]) -> float | None:
    """Bytes a second of reading from the folder that files are in: measured once, in a second at most, and kept. None
    where that is not possible."""
    if not files:
        return None
    folder = files[0].parent.resolve()
    try:
        key = json.dumps([str(folder), files[0].stat().st_dev])
    except OSError:  # who reads the file will say so
        return None
    kept = cache_dir() / "rates" / f"disk-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        rate = float(json.loads(kept.read_text(encoding="utf-8"))["bytes_per_second"])
        if 0 < rate < float("inf"):
            return rate
    with one_at_a_time(kept):
        found = None
        with contextlib.suppress(OSError):
            found = disk_rate(files)
        if found is not None:
            with contextlib.suppress(OSError), replacing(kept) as temporary:
                values = {"folder": str(folder), "bytes_per_second": found}
                temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return found


def disk_rate(files: Sequence[Path], most: int = 512 << 20, seconds: float = 1.0) -> float | None:
    """Bytes a second of reading the largest of some files past the page cache, for so many bytes or seconds; None where
    that cannot be done, or it is too small to tell."""
    largest = [f for f in sorted(files, key=lambda f: f.stat().st_size)[-1:] if f.stat().st_size >= PIECE]
    found = read_rate(largest, most=most, seconds=seconds)
    if found is None and largest and hasattr(os, "posix_fadvise"):  # a file system without direct reads
        with contextlib.suppress(OSError), largest[0].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, most, os.POSIX_FADV_DONTNEED)
            found = read_rate(largest, direct=False, most=most, seconds=seconds)
    return found


def read_rate(
    files: Sequence[Path], direct: bool = True, most: int | None = None, seconds: float = float("inf")
) -> float | None:
    """Bytes a second of reading files one after the other in pieces of 16 MiB, ``most`` of each and no longer than
    ``seconds``; ``direct`` is past the page cache. None where that cannot be done, or there is nothing to read."""
    buffer, count, start = mmap.mmap(-1, PIECE), 0, time.perf_counter()
    for file in files:
        try:
            handle = os.open(file, os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0))
        except OSError:  # a file system without direct reads
            return None
        try:
            got, of_file = PIECE, 0
            # A direct read after a short one would begin in the middle of a sector.
            while got == PIECE and (most is None or of_file + PIECE <= most):
                got = os.readv(handle, [buffer])
                of_file += got
                if time.perf_counter() - start > seconds:
                    break
        except OSError:
            return None
        finally:
            os.close(handle)
        count += of_file
    return count / (time.perf_counter() - start) if count else None
