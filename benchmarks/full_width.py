"""Times the networks at their real width on random weights: one DiT block, one VAE chunk, whole DiT steps.

    python -m solostep.benchmarks.full_width block vae
    python -m solostep.benchmarks.full_width step --steps 2 --precision int8 --attention int8 --resident 4
    python -m solostep.benchmarks.full_width load --layers 8 --precision int8

Weights and activations are random normal numbers of realistic size, never zeros (a GPU is faster on zeros). A time is
the median of the repeats, taken with device events after a warm-up; memory is the allocator's peak beside what was
there before. Nothing is left out of a time: both guidance branches go through, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solostep.engine.checkpoint import load, open_component
from solostep.engine.config import GenerationSettings, TransformerConfig, VAEConfig
from solostep.engine.models.fused import FusedBlocks
from solostep.engine.models.transformer import StepVideoTransformer, TransformerBlock, rope_table
from solostep.engine.models.vae import Decoder, Encoder, HostFrames
from solostep.engine.models.vae_bytes import decode_bytes, encode_bytes
from solostep.engine.quantization import linears
from solostep.engine.rates import TEXT_TOKENS, quantized_block, random_weights, read_rate
from solostep.engine.runtime import Stage, measured, numerics, pick_device
from solostep.engine.sampling import GuidedVelocity
from solostep.engine.scheduler import euler_step, make_sigmas
from solostep.engine.streaming import LAST
from solostep.engine.text import PromptEmbedding
from solostep.kernels.cards import one_line
from solostep.offload.streamer import BlockStreamer, spread
from solostep.quant.convert import Spec
from solostep.quant.formats import quantize, stored
from solostep.quant.recipe import Recipe, default_recipe
from solostep.quant.writing import FileWriter

Weights = Callable[[Callable[[], nn.Module], torch.device], nn.Module]
"""Builds a network, in bf16 and right on a device, with weights."""


def recipe_of(precision: str, network: str = "transformer") -> Recipe | None:
    """The default recipe of a precision; None for bf16."""
    return None if precision == "bf16" else default_recipe(precision, network)


def timed(run: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds of each repeat, their median, and peak memory above what was allocated before."""
    for _ in range(warm_up):
        run()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1e3)
    peak = torch.cuda.max_memory_allocated(device)
    return {
        "seconds": round(statistics.median(seconds), 4),
        "all_seconds": [round(s, 6) for s in seconds],
        "peak_above_gib": round((peak - before) / 2**30, 2),
        "peak_gib": round(peak / 2**30, 2),
    }


VARIANTS = ("bf16/bf16", "fp8/bf16", "int8/int8", "fp8/int8", "int8/int8-fp8", "fp8/int8-fp8")
"""Of the linears and of attention, in the fused block."""


def bench_block(
    settings: GenerationSettings, device: torch.device, repeats: int, variants: Sequence[str] = VARIANTS
) -> Iterator[dict[str, Any]]:
    """One block of the 30B DiT, both guidance branches: the official order of operations in plain torch (both branches
    in one batch, as the official code has them, and one after the other), then fused.

    A result for each variant, as soon as it is known, the first of them the plain one. A ratio is the official block's
    seconds by those of a variant, which were taken in turns; an error is that of one branch against the plain block's,
    relative. A variant that cannot be had, or fails, says why, and the others go on.
    """
    config = TransformerConfig()
    dim = config.inner_dim
    block = random_weights(lambda: TransformerBlock(dim, config.attention_head_dim), device)
    fhw = (settings.latent_frames, settings.latent_height, settings.latent_width)
    tokens = fhw[0] * fhw[1] * fhw[2]
    rope = rope_table(fhw, torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(0)
    batch = torch.randn(2, tokens, dim, device=device, dtype=torch.bfloat16, generator=generator)
    context = torch.randn(2, TEXT_TOKENS, dim, device=device, dtype=torch.bfloat16, generator=generator)
    modulation = torch.randn(1, 6 * dim, device=device, dtype=torch.bfloat16, generator=generator) / 4
    rows, texts = list(batch.split(1)), list(context.split(1))

    def official() -> None:
        block(batch, context, modulation, rope)

    def plain() -> None:
        for row, text in zip(rows, texts, strict=True):
            block(row, text, modulation, rope)

    def fused(variant: str) -> tuple[Callable[[], None], float]:
        """A variant's run, and its error."""
        precision, mode = variant.split("/")
        mine, blocks = quantized_block(block, recipe_of(precision), config), FusedBlocks(texts, mode)
        want = block(rows[0], texts[0], modulation, rope)
        found = blocks(0, 0, mine, rows[0].clone(), modulation, rope)
        error = float((found.float() - want.float()).norm() / (want.float() - rows[0].float()).norm())

        def run() -> None:
            for i, row in enumerate(rows):  # in place: the stream grows a little from run to run
                blocks(0, i, mine, row, modulation, rope)

        return run, error

    # Attention; qkv 3, wo, q, o, feed-forward 8, each 2 S d^2.
    flop = 2 * (4 * tokens**2 * dim + 28 * tokens * dim**2)
    for variant in ("plain", *variants):
        result: dict[str, Any] = {"variant": variant, "tokens": tokens}
        run: Callable[[], None] | None = plain
        try:
            if variant != "plain":
                run, off = fused(variant)
                result["error"] = {variant: float(f"{off:.2e}")}
            result |= _in_turns({"official": official, variant: run}, device, repeats, flop, batch, generator)
        except Exception as error:  # whatever a compiler, a driver or a check raises is the finding
            result["failed"] = one_line(error)
        run = None  # and with it the variant's weights
        torch.cuda.empty_cache()
        yield result


def _in_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, flop: float, batch: torch.Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Times of the official block and of a variant, by name; ``batch`` is drawn anew after each run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            result = timed(run, device, 1)
            seconds[name] += result["all_seconds"]
            memory[name] = result["peak_above_gib"]
            batch.normal_(generator=generator)
            torch.cuda.empty_cache()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio": {name: round(medians["official"] / value, 3) for name, value in medians.items()},
        "tflops": {name: round(flop / value / 1e12) for name, value in medians.items()},
        "peak_above_gib": memory,
    }


TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""In which the VAE runs."""


def bench_vae(
    settings: GenerationSettings, device: torch.device, repeats: int, at_once: int | None = None, strips: int = 1,
    precision: str = "bf16",
) -> dict[str, Any]:  # fmt: skip
    """One chunk of 17 frames through the full-width decoder: whole, or by ``at_once`` frames and ``strips``. In strips
    the first chunk pins host memory for all (``first_seconds``). ``peak_above_gib`` is beside the weights and the
    latents; the error against the whole chunk is relative L2, PSNR over the range of its values, and the largest
    difference of any."""
    config, dtype = VAEConfig(), TYPES[precision]
    network = random_weights(lambda: Decoder(config), device).to(dtype)
    shape = (1, config.z_channels, 3, settings.latent_height, settings.latent_width)
    x = torch.randn(shape, device=device, dtype=dtype)
    held = torch.cuda.memory_allocated(device)
    out = _finite(network(x))
    about: dict[str, Any] = {"output": list(out.shape), "dtype": precision}
    if at_once is None:
        return _beside(timed(lambda: network(x), device, repeats), held) | about
    error, most, frame, start = 0.0, 0.0, 0, time.perf_counter()
    host = HostFrames(device) if strips > 1 else None
    for piece in network.slices(x, at_once, strips, host):
        difference = piece.float() - out[:, :, frame : frame + piece.shape[2]].float()
        error, frame = error + float(difference.square().sum()), frame + piece.shape[2]
        most = max(most, float(difference.abs().max()))
    size = dtype.itemsize
    about |= {
        "at_once": at_once,
        "strips": strips,
        "counted_gib": round(decode_bytes(config, settings.height, settings.width, at_once, strips, size) / 2**30, 2),
        "first_seconds": round(time.perf_counter() - start, 2),
        "error": float(f"{(error / float(out.float().square().sum())) ** 0.5:.2e}"),
        "max_abs": float(f"{most:.2e}"),
        "psnr_db": _psnr(error, out),
    }
    del out, difference

    def run() -> None:
        for _ in network.slices(x, at_once, strips, host):
            pass

    result = _beside(timed(run, device, repeats), held) | about
    if host is not None:
        host.close()
    return result


def bench_encode(
    settings: GenerationSettings, device: torch.device, repeats: int, strips: int = 1, precision: str = "bf16"
) -> dict[str, Any]:  # fmt: skip
    """A first frame through the full-width encoder, whole or in strips; errors against the whole one, as above."""
    config, dtype = VAEConfig(), TYPES[precision]
    network = random_weights(lambda: Encoder(config), device).to(dtype)
    x = torch.randn((1, 3, 1, settings.height, settings.width), device=device, dtype=dtype)
    held = torch.cuda.memory_allocated(device)
    whole = _finite(network(x)).float()
    difference = network.in_strips(x, strips).float() - whole
    about = {
        "output": list(whole.shape),
        "dtype": precision,
        "strips": strips,
        "counted_gib": round(encode_bytes(config, settings.height, settings.width, strips, dtype.itemsize) / 2**30, 2),
        "error": float(f"{float(difference.norm() / whole.norm()):.2e}"),
        "max_abs": float(f"{float(difference.abs().max()):.2e}"),
        "psnr_db": _psnr(float(difference.square().sum()), whole),
    }
    del whole, difference
    return _beside(timed(lambda: network.in_strips(x, strips), device, repeats), held) | about


def _psnr(error: float, whole: Tensor) -> float | str:
    """Of a sum of squared differences, over the range of what they are from."""
    low, high = (float(v) for v in torch.aminmax(whole))
    return round(10 * math.log10((high - low) ** 2 * whole.numel() / error), 1) if error else "exact"


def _finite(out: Tensor) -> Tensor:
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("the VAE gave numbers that are not finite")
    return out


def _beside(timing: dict[str, Any], held: int) -> dict[str, Any]:
    """With the peak above what was ``held`` before the first run: what a first run keeps for later ones counts."""
    return timing | {"peak_above_gib": round(timing["peak_gib"] - held / 2**30, 2)}


def wide_model(device: torch.device, precision: str, layers: int, host: Collection[int]) -> StepVideoTransformer:
    """The DiT with random weights, its blocks in a precision; those of ``host`` end in host memory."""
    config = TransformerConfig(num_layers=1)
    model: StepVideoTransformer = random_weights(lambda: StepVideoTransformer(config), device)
    blocks = []
    for i in range(layers):
        made = random_weights(lambda: TransformerBlock(config.inner_dim, config.attention_head_dim), device, i)
        blocks.append(quantized_block(made, recipe_of(precision), config).to("cpu" if i in host else device))
        del made
    model.transformer_blocks = nn.ModuleList(blocks)
    return model


def bench_step(
    settings: GenerationSettings, device: torch.device, steps: int, precision: str = "bf16",
    attention: str = "official", resident: int | None = None, slots: int = 2, layers: int = 48,
    graph: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Whole denoising steps of the DiT: model, guidance and Euler step. With ``resident`` only so many blocks stay on
    the card, and the others are streamed; the first step, which fills the slots, is one of those timed."""
    config = TransformerConfig()
    host = set() if resident is None else set(spread(layers, layers - resident))
    model = wide_model(device, precision, layers, host)
    start = time.perf_counter()
    streamer = BlockStreamer(
        model.transformer_blocks, device, resident=resident, slots=slots, last=LAST
    ) if resident is not None else None  # fmt: skip
    prepared = time.perf_counter() - start
    gc.collect()
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    llm, clip = (torch.randn(n, c).bfloat16() for n, c in zip((320, 77), config.caption_channels, strict=True))
    texts = [PromptEmbedding(llm, clip, TEXT_TOKENS)] * 2
    velocity = GuidedVelocity(model, texts, settings, attention=attention, blocks=streamer, graph=graph)
    shape = (1, settings.latent_frames, config.in_channels, settings.latent_height, settings.latent_width)
    latents = torch.randn(shape, device=device)
    sigmas = make_sigmas(50, settings.time_shift)
    states = [latents]

    def run() -> None:
        i = len(states) - 1
        states.append(euler_step(states[-1], velocity(states[-1], sigmas[i]), sigmas[i], sigmas[i + 1]))

    result = timed(run, device, steps, warm_up=0)
    if not bool(torch.isfinite(states[-1]).all()):
        raise RuntimeError("the latents are not finite")
    about = {"precision": precision, "attention": attention, "layers": layers, "weights_gib": round(weights / 2**30, 2)}
    if streamer is not None:
        about |= {
            "resident": resident, "slots": slots, "prepare_seconds": round(prepared, 2),
            "host_gib": round(streamer.host_bytes / 2**30, 2),
        }  # fmt: skip
        streamer.close()
    return result | about | {"host_peak_gib": round(anonymous_bytes() / 2**30, 2)}


def bench_load(device: torch.device, layers: int, precision: str, on_load: bool) -> dict[str, Any]:
    """Loads a DiT of some full-width blocks from its safetensors shards: from disk, then from page cache.

    Beside it stand the two rates that bound it, measured in the same run: the disk's, read in sequence by one thread
    (buffered or not, whichever is faster), and that of one large copy from pinned memory. Pinning the ring counts: the
    allocator's pinned memory is given back before each load.
    """
    recipe = recipe_of(precision)
    with tempfile.TemporaryDirectory() as folder:
        files = write_dit(Path(folder), layers, device, None if on_load else recipe)
        disk = max(cold_rate(files, direct=False), cold_rate(files, direct=True))
        bus = pinned_rate(device)
        stored = sum(file.stat().st_size for file in files)
        result: dict[str, Any] = {
            "precision": precision, "on_load": on_load, "layers": layers, "stored_gb": round(stored / 1e9, 2),
            "disk_gb_per_second": round(disk / 1e9, 2), "pinned_gb_per_second": round(bus / 1e9, 2),
        }  # fmt: skip
        for name, bound in (("cold", disk), ("cached", bus)):
            for file in files:
                (evict if name == "cold" else Path.read_bytes)(file)
            result[name] = timed_load(Path(folder), device, recipe if on_load else None)
            rate = stored / result[name]["seconds"]
            result[name] |= {"gb_per_second": round(rate / 1e9, 2), "of_the_bound": round(rate / bound, 3)}
    return result


def write_dit(root: Path, layers: int, device: torch.device, recipe: Recipe | None) -> list[Path]:
    """A transformer folder with random weights in three shards; quantized if there is a recipe."""
    config = TransformerConfig(num_layers=layers)
    return write_network(
        root / "transformer", asdict(config), lambda: StepVideoTransformer(config), recipe, device, shards=3
    )


def write_network(
    folder: Path, config: dict[str, Any], build: Callable[[], nn.Module], recipe: Recipe | None, device: torch.device,
    shards: int, weights: Weights = random_weights,
) -> list[Path]:  # fmt: skip
    """The folder of a network, which is called as that is; quantized if there is a recipe. ``weights`` makes what
    ``build`` describes, by default of random numbers.

    The network is drawn on the device, and each shard is written from there by a thread of its own.
    """
    folder.mkdir(exist_ok=True)
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    (folder / "config.json").write_text(json.dumps(described))
    model = weights(build, device)
    modules = {} if recipe is None else recipe.resolve(linears(model, folder.name))
    if recipe is not None:
        values = {"solostep_quantization": 1, "precision": recipe.name, "recipe": recipe.as_dict(), "source": {}}
        (folder / "quantization.json").write_text(json.dumps(values | {"modules": modules}))
    stem = "diffusion_pytorch_model" if folder.name == "transformer" else "model"
    files = [folder / f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = even_parts(list(model.named_parameters()), shards)
    with ThreadPoolExecutor(shards) as pool:
        names = list(pool.map(write_shard, files, parts, [modules] * shards))
    weight_map = {name: file.name for file, known in zip(files, names, strict=True) for name in known}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    del model, parts
    gc.collect()
    torch.cuda.empty_cache()
    return files


def even_parts(named: list[tuple[str, nn.Parameter]], count: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Runs of parameters of about as many bytes each."""
    parts: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(count)]
    total, before = sum(p.nbytes for _, p in named), 0
    for name, parameter in named:
        parts[min(count - 1, before * count // total)].append((name, parameter))
        before += parameter.nbytes
    return parts


def write_shard(file: Path, part: list[tuple[str, nn.Parameter]], modules: Mapping[str, str]) -> list[str]:
    """A file of parameters, those of ``modules`` quantized, tensor by tensor through pinned memory; gives its names."""
    outputs: dict[str, Spec] = {}
    for name, parameter in part:
        path = name.removesuffix(".weight")
        if path in modules:
            made = stored(modules[path], parameter.shape[1], parameter.shape[0])
            outputs |= {f"{path}.{key}": spec for key, spec in made.items()}
        else:
            outputs[name] = (tuple(parameter.shape), parameter.dtype)
    with torch.inference_mode(), FileWriter(file, outputs, {}) as writer:
        for name, parameter in part:
            path = name.removesuffix(".weight")
            tensors = {name: parameter.data}
            if path in modules:
                tensors = {f"{path}.{key}": t for key, t in quantize(modules[path], parameter.data).items()}
            writer.put({key: in_host_memory(t) for key, t in tensors.items()})
            del tensors
    return list(outputs)


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a card copied at the speed of the bus, into pinned memory that the next ones use again."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def timed_load(root: Path, device: torch.device, recipe: Recipe | None) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
    component = open_component(root, "transformer")  # a pipeline checks headers long before it loads
    stages: list[Stage] = []
    anonymous = anonymous_bytes()
    with measured("load", device, stages):
        loaded = load(component, device, torch.bfloat16, recipe=recipe)
    grown = anonymous_bytes() - anonymous
    size = sum(p.nbytes for p in loaded.parameters())
    return {
        "seconds": round(stages[0].seconds, 3),
        "gpu_peak_over_model": round((stages[0].gpu_peak or 0) / size, 3),
        "host_growth_gb": round(grown / 1e9, 2),
    }


def evict(file: Path) -> None:
    """Puts a file on disk and takes it out of the page cache; of the host of a virtual machine nothing is known."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # only root may
        Path("/proc/sys/vm/drop_caches").write_text("1")


def cold_rate(files: list[Path], direct: bool) -> float:
    """Bytes a second of reading files that are not in memory; 0 where that cannot be done."""
    for file in files:
        evict(file)
    return read_rate(files, direct) or 0.0


def pinned_rate(device: torch.device, size: int = 256 << 20, repeats: int = 16) -> float:
    """Bytes a second of copies from pinned memory to the device."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    timing = timed(lambda: target.copy_(source, non_blocking=True), device, repeats)
    return size / min(timing["all_seconds"])


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (mapped files are page cache, which the system takes back at need)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def commit() -> str:
    """The commit that was measured, with a plus if the tree differs from it."""
    root = Path(__file__).resolve().parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def described(result: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A result with the card, versions and commit it is of."""
    return result | {
        "card": torch.cuda.get_device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda,
        "commit": commit(),
    }  # fmt: skip


def record(result: dict[str, Any], device: torch.device, output: Path | None) -> None:
    """Prints a described result as a JSON line; and appends it to a file."""
    line = json.dumps(described(result, device))
    print(line, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["block", "vae", "vae-encode", "step", "load"])
    parser.add_argument("--frames", type=int, default=204)
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=992)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--at-once", type=int, help="of `vae`: decode so many frames at a time, not a whole chunk")
    parser.add_argument(
        "--strips", type=int, default=1, help="with --at-once, and of `vae-encode`: divide frames into so many strips"
    )
    parser.add_argument("--variant", action="append", help="of `block`: linears/attention, such as int8/int8-fp8")
    parser.add_argument("--layers", type=int, help="blocks of the DiT: default 4 for `load`, 48 for `step`")
    parser.add_argument(
        "--precision",
        default="bf16",
        help="of `load` and `step`: bf16, int8, fp8 ...; of `vae` and `vae-encode`: bf16 or fp32",
    )
    parser.add_argument("--attention", default="official", help="of `step`: official, bf16, int8, int8-fp8")
    parser.add_argument("--resident", type=int, help="of `step`: stream all blocks but so many")
    parser.add_argument("--slots", type=int, default=2, help="of `step`: places on the card for streamed blocks")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, help="of `step`: record a CUDA graph; default: short clips"
    )
    parser.add_argument("--on-load", action="store_true", help="`load` reads bf16 files and quantizes them")
    parser.add_argument("-o", "--output", type=Path, help="append the result as a JSON line")
    args = parser.parse_args()
    if args.precision not in TYPES and {"vae", "vae-encode"} & set(args.what):
        parser.error(f"--precision {args.precision}: the VAE runs in {' or '.join(TYPES)}")
    device = pick_device("cuda")
    settings = GenerationSettings(num_frames=args.frames, height=args.height, width=args.width)
    clip = f"{settings.height}x{settings.width}x{settings.num_frames}"
    for what in args.what:
        with numerics():
            if what == "block":
                for result in bench_block(settings, device, args.repeats, args.variant or VARIANTS):
                    record({"what": what, "clip": clip, **result}, device, args.output)
                continue
            if what == "step":
                result = bench_step(
                    settings, device, args.steps, args.precision, args.attention, args.resident, args.slots,
                    args.layers or 48, args.graph,
                )  # fmt: skip
            elif what == "load":
                result = bench_load(device, args.layers or 4, args.precision, args.on_load)
            elif what == "vae":
                result = bench_vae(settings, device, args.repeats, args.at_once, args.strips, args.precision)
            else:
                result = bench_encode(settings, device, args.repeats, args.strips, args.precision)
        torch.cuda.empty_cache()
        record({"what": what, "clip": clip, **result}, device, args.output)


if __name__ == "__main__":
    main()
