"""How fast, and in how much memory, a model is quantized: full-width blocks on the disk of this machine.

    python -m solostep.benchmarks.convert_speed                      # 8 blocks, int8 and fp8
    python -m solostep.benchmarks.convert_speed --precision int8 fp8 int8-weight fp8-weight --repeats 2
    python -m solostep.benchmarks.convert_speed --manifest           # bytes of the 29.3 B transformer, by arithmetic

Writes random bf16 weights in several files, measures what the disk reads and writes one file at a time (read cold: the
files are put out of the page cache first), then converts cold and from the page cache. A rate is bytes of the source by
seconds, everything included: opening, hashing, writing, and flushing to disk; only what a process does once (imports,
kernels compiled on first use) is timed apart. ``disk_alone_seconds`` is what the disk takes to read the source and then
write and flush the output: where both lie on one disk, no conversion is faster. Host memory is the peak of what no file
backs, above what the process had before; device memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from solostep.benchmarks.full_width import anonymous_bytes, commit
from solostep.engine.checkpoint import open_model
from solostep.engine.config import TransformerConfig
from solostep.engine.conversion import converted_bytes
from solostep.engine.convert import quantize_model
from solostep.engine.demo import demo_model
from solostep.engine.headers import TensorInfo
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.rates import random_weights
from solostep.engine.runtime import pick_device
from solostep.engine.weights import Component
from solostep.quant.formats import quantize
from solostep.quant.recipe import default_recipe, precisions

CHUNK = 16 << 20
SHAPES = [(rows * 6144, columns * 6144) for rows, columns in ((3, 1), (2, 1), (1, 1), (4, 1), (1, 4))]
"""The matrices of a block."""
MANIFESTS = Path(__file__).parents[1] / "tests" / "golden" / "manifests"


def manifest_bytes(precision: str, manifest: str = "dit_t2v") -> int:
    """Bytes of the released transformer's tensors in a precision, from the manifest of its names and shapes."""
    told = json.loads((MANIFESTS / f"{manifest}.json").read_text(encoding="utf-8"))
    tensors = {
        name: TensorInfo(Path(f"{manifest}.safetensors"), name, tuple(shape), "BF16")
        for name, shape in told["state_dict"].items()
    }
    component = Component("transformer", Path(manifest), told["config"], (), tensors)
    return converted_bytes(component, default_recipe(precision, "transformer"))


def write_model(root: Path, layers: int, files: int, device: torch.device) -> list[Path]:
    """A model of some full-width blocks; everything beside its transformer is the embedded demo model's."""
    demo = json.loads((demo_model() / "transformer" / "config.json").read_text(encoding="utf-8"))
    config = TransformerConfig.from_dict(
        {**demo, "num_attention_heads": TransformerConfig().num_attention_heads, "num_layers": layers}
    )
    folder = root / "transformer"
    folder.mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"solostep": {"shared": str(demo_model()), "preset": "t2v"}}))
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    state = random_weights(lambda: StepVideoTransformer(config), device).state_dict()
    names, paths, weight_map = sorted(state), [], {}
    for i in range(files):
        path = folder / f"diffusion_pytorch_model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = names[i * len(names) // files : (i + 1) * len(names) // files]
        save_file({name: state[name].cpu() for name in mine}, path)
        weight_map |= {name: path.name for name in mine}
        paths.append(path)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def forget(paths: Sequence[Path]) -> None:
    """Puts files out of the page cache."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(paths: Sequence[Path]) -> float:
    """Bytes a second of reading files one after the other."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - start)


def write_rate(folder: Path, size: int) -> float:
    """Bytes a second of writing one file and flushing it to disk."""
    path, data = folder / "written", os.urandom(CHUNK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(size // CHUNK):
            stream.write(data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return size // CHUNK * CHUNK / seconds


def hash_rate() -> float:
    data = memoryview(bytearray(os.urandom(CHUNK)) * 32)
    start = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    return len(data) / (time.perf_counter() - start)


@contextlib.contextmanager
def host_peak(into: dict[str, Any]) -> Iterator[None]:
    """The peak of this process's memory that no file backs, above what it is now."""
    before, peak, ended = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        into["host_peak_gb"] = round((peak[0] - before) / 1e9, 2)


def convert(root: Path, out: Path, precision: str, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with host_peak(result):
        start = time.perf_counter()
        record = quantize_model(root, out, precision, device=device, link=True)
        result["seconds"] = round(time.perf_counter() - start, 2)
    if device.type == "cuda":
        result["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    network = record["networks"]["transformer"]
    result |= {"gb_per_second": round(network["source_bytes"] / 1e9 / result["seconds"], 3),
               "output_gb": round(network["bytes"] / 1e9, 2), "shards": network["shards"]}  # fmt: skip
    shutil.rmtree(out)
    return result


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root, out = Path(name) / "model", Path(name) / "out"
        paths = write_model(root, args.layers, args.files, device)
        size = sum(path.stat().st_size for path in paths)
        disk = {"write_gb_per_second": round(write_rate(Path(name), min(size, 4 << 30)) / 1e9, 3)}
        forget(paths)
        disk["read_gb_per_second"] = round(read_rate(paths) / 1e9, 3)
        disk["read_cached_gb_per_second"] = round(read_rate(paths) / 1e9, 3)
        disk["sha256_gb_per_second"] = round(hash_rate() / 1e9, 3)
        about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                 "torch": torch.__version__, "cores": os.cpu_count(), "commit": commit()}  # fmt: skip
        print(json.dumps({"source_gb": round(size / 1e9, 2), "files": len(paths),
                          "largest_file_gb": round(max(p.stat().st_size for p in paths) / 1e9, 2), **disk, **about}),
              flush=True)  # fmt: skip
        start = time.perf_counter()
        open_model(root)
        print(json.dumps({"first_opening_seconds": round(time.perf_counter() - start, 2)}), flush=True)
        for precision in args.precision:
            start = time.perf_counter()  # what is compiled on first use on a machine is compiled here
            for rows, columns in SHAPES:
                quantize(precision, torch.ones(rows, columns, dtype=torch.bfloat16, device=device))
            print(json.dumps({"precision": precision, "first_use_seconds": round(time.perf_counter() - start, 2)}))
            for source in ("cold", "cached") * args.repeats:
                forget(paths)
                if source == "cached":
                    read_rate(paths)
                result = convert(root, out, precision, device)
                result["of_disk_read"] = round(result["gb_per_second"] / disk["read_gb_per_second"], 2)
                alone = size / 1e9 / disk["read_gb_per_second"] + result["output_gb"] / disk["write_gb_per_second"]
                result["disk_alone_seconds"] = round(alone, 2)
                print(json.dumps({"precision": precision, "source": source, **result}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="full-width blocks, 1.21 GB each in bf16")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["int8", "fp8"], choices=precisions())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to be measured; default: the system's")
    parser.add_argument("--device")
    parser.add_argument("--manifest", action="store_true", help="print sizes of the released transformer and end")
    args = parser.parse_args()
    if args.manifest:
        for precision in ["bf16", *precisions()]:
            print(f"{precision:12} {manifest_bytes(precision) / 1e9:6.2f} GB")
        return
    run(args)


if __name__ == "__main__":
    main()
