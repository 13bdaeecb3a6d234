"""Makes a full-size model of random weights, and runs the whole pipeline on it within budgets of memory.

    python -m solostep.benchmarks.whole_pipeline make DIR --precision fp8 --text-precision int8
    python -m solostep.benchmarks.whole_pipeline run DIR --vram 48GB --vram 24GB --steps 2 -o results.jsonl
    python -m solostep.benchmarks.whole_pipeline run BF16-DIR --precision fp8 --text-precision int8 --vram 24GB

A model in bf16 serves all precisions: others are made of it while it is loaded.
Each budget is a hard cap (torch's allocations beyond it fail). A line holds, for each stage, what the plan said and
what it took: torch's peak, seconds, the host's peak; the card's own peak as its driver counts it, sampled every 20 ms,
less what was taken before this process began; each step's seconds; and of the latents the sum of magnitudes and the
SHA-256 of their bytes, which tells whether two runs made the same numbers. The weights are random: the video is noise,
the work is the real one. Tokenizers are small ones, of the tests; prompts are cut or padded to the same 320 and 77
tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from solostep.benchmarks.cell_card import Card, cards, taken
from solostep.benchmarks.full_width import Weights, recipe_of, record, write_network
from solostep.engine.config import StepLLMConfig, TransformerConfig, VAEConfig
from solostep.engine.models.clip import HunyuanClip
from solostep.engine.models.step_llm import StepLLM
from solostep.engine.models.transformer import StepVideoTransformer
from solostep.engine.models.vae import VideoAutoencoder
from solostep.engine.pipeline import StepVideoPipeline
from solostep.engine.rates import random_weights
from solostep.engine.runtime import pick_device
from solostep.engine.units import parse_size

MARKER = "synthetic.json"
"""In a model folder: its weights were drawn, not trained; by which generator and seed."""
TOKENIZERS = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tiny-stepvideo-t2v"
CLIP = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "vocab_size": 47020, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "model_type": "bert", "pad_token_id": 0,
}  # fmt: skip
PROMPT = "a red panda walks over a bridge in the morning fog"


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of the networks of a model folder, by default the released ones."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    step_llm: StepLLMConfig = field(default_factory=StepLLMConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    clip: Mapping[str, Any] = field(default_factory=lambda: CLIP)


RELEASED = Sizes()


def make(
    root: Path, precision: str, text_precision: str, device: torch.device, weights: Weights = random_weights,
    sizes: Sizes = RELEASED,
) -> None:  # fmt: skip
    """A model folder in the released layout. ``weights`` are those of the DiT, by default random like all others."""
    root.mkdir(parents=True)
    (root / MARKER).write_text(json.dumps({"generator": "normal, variance 1 / fan-in", "seed": 0}) + "\n")
    for part in ("model_index.json", "scheduler", "hunyuan_clip/tokenizer", "step_llm/step1_chat_tokenizer.model"):
        target = root / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (TOKENIZERS / part).is_dir() else shutil.copy)(TOKENIZERS / part, target)
    config, llm = sizes.transformer, sizes.step_llm
    networks: dict[str, tuple[Any, Callable[[], nn.Module], str]] = {
        "transformer": (config, lambda: StepVideoTransformer(config), precision),
        "step_llm": (llm, lambda: StepLLM(llm), text_precision),
    }
    for name, (described, build, kind) in networks.items():
        drawn = weights if name == "transformer" else random_weights
        write_network(root / name, asdict(described), build, recipe_of(kind, name), device, shards=6, weights=drawn)
    (root / "vae").mkdir()
    if sizes.vae != VAEConfig():  # the release has no such file
        (root / "vae" / "config.json").write_text(json.dumps(asdict(sizes.vae)))
    vae = random_weights(lambda: VideoAutoencoder(sizes.vae), device)
    save_file({name: p.cpu() for name, p in vae.named_parameters()}, root / "vae" / "vae_v2.safetensors")
    folder = root / "hunyuan_clip" / "clip_text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(sizes.clip)))
    # As transformers initializes it, from a seed: a folder made anew is the same model, and runs of it go on.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        clip = HunyuanClip(dict(sizes.clip))
    save_file(
        {name: p.detach().cpu().contiguous() for name, p in clip.named_parameters()}, folder / "model.safetensors"
    )


# --- the runs -----------------------------------------------------------------------------------------------------


class Frames:
    """A sink that counts."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, frames: Any) -> None:
        self.count += len(frames)


@contextlib.contextmanager
def driver_peak(device: torch.device, before: int) -> Iterator[dict[str, int]]:
    """The most of the card's memory that was taken meanwhile, beside what was before."""
    found, done = {"bytes": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            free, total = torch.cuda.mem_get_info(device)
            found["bytes"] = max(found["bytes"], total - free - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def digests(latents: torch.Tensor) -> dict[str, Any]:
    """The sum of magnitudes, which older lines have alone, and the SHA-256 of the bytes, of fp32 in C order."""
    held = latents.detach().cpu().float().contiguous()
    digest = hashlib.sha256(held.numpy().tobytes()).hexdigest()
    return {"latents": float(held.double().abs().sum()), "latents_sha256": digest}


def run(
    folder: Path, vram: str | None, before: list[Card], decode: bool, settings: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """One video within a budget; what each stage took beside its plan, and each step's seconds. ``options`` are those
    of :meth:`StepVideoPipeline.from_pretrained`."""
    pipe = StepVideoPipeline.from_pretrained(folder, vram=vram, **options)
    request = pipe.request(PROMPT, seed=1, **settings)
    pipe.plan(**settings)  # measures the card's rates, once, so that the run's plan holds seconds
    marks: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            torch.cuda.synchronize(pipe.device)
            marks.append(time.perf_counter())

    sink = Frames()
    start = time.perf_counter()
    mine = taken(pipe.device, before)
    with contextlib.nullcontext({"bytes": None}) if mine is None else driver_peak(pipe.device, mine) as driver:
        opened = (lambda *_: contextlib.nullcontext(sink)) if decode else None
        made = pipe.generate([request], opened, None, progress, to_file=False)
        told, latents = next(made)
        list(made)
    if not bool(torch.isfinite(latents).all()):
        raise RuntimeError("the latents are not finite")
    return {
        "vram": vram, "host_ram": options["host_ram"], "settings": told["settings"], "precision": told["precision"],
        "text_precision": told["text_precision"], "attention": told["attention"], "kernels": told["kernels"],
        "seconds": round(time.perf_counter() - start, 2),
        "step_seconds": [round(b - a, 3) for a, b in zip(marks, marks[1:], strict=False)],
        "driver_peak_bytes": driver["bytes"], "frames": sink.count, **digests(latents), "events": told["events"],
        "plan": {k: v for k, v in told["plan"].items() if k != "stages"}, "stages": pipe.memory_report(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--precision", default="fp8")
    making.add_argument("--text-precision", default="int8")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--vram", action="append", help="a budget; several are run one after the other")
    running.add_argument("--host-ram")
    running.add_argument("--precision", help="as of `solostep generate`: by default what the folder is stored in")
    running.add_argument("--text-precision", help="of Step-LLM, likewise")
    running.add_argument("--attention")
    running.add_argument("--frames", type=int, default=204)
    running.add_argument("--height", type=int, default=544)
    running.add_argument("--width", type=int, default=992)
    running.add_argument("--steps", type=int, default=2)
    running.add_argument("--latents-only", action="store_true", help="do not decode")
    running.add_argument("--cached-texts", action="store_true", help="encode texts only if they were not before")
    running.add_argument("-o", "--output", type=Path, help="append a JSON line for each budget")
    args = parser.parse_args()
    before = cards()
    device = pick_device("cuda")
    if args.command == "make":
        make(args.folder, args.precision, args.text_precision, device)
        return
    for vram in args.vram or []:
        parse_size(vram, "--vram")
    for vram in args.vram or [None]:
        line = run(
            args.folder, vram, before, not args.latents_only,
            {"num_frames": args.frames, "height": args.height, "width": args.width, "num_inference_steps": args.steps},
            host_ram=args.host_ram, cache=args.cached_texts, attention=args.attention, precision=args.precision,
            text_precision=args.text_precision,
        )  # fmt: skip
        record(line, device, args.output)


if __name__ == "__main__":
    main()
