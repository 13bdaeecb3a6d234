"""Measurements of what number formats do to a network on real activations, made once and kept.

The error that counts is that of the velocity: for each sample (a prompt, a time along its trajectory, a guidance
branch) the relative L2 error against the unquantized network, |v - v_bf16| / |v_bf16|, in fp32; a recipe's error is the
mean over the samples. It is measured by sending all samples through the network block by block, so a card needs room
for one block. Results are kept in the cache folder, by model and conditions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.formats import UNQUANTIZED, check_format
from ..quant.recipe import Recipe
from ..quant.sensitivity import Errors, Linear, Table
from .activations import PREFIXES, Conditions, Samples, TransformerSamples, conditions_for, make_samples
from .checkpoint import ModelFolder
from .config import cache_dir
from .errors import SolostepError, UsageError
from .files import replacing
from .probe import InType, Mixed, Probe, relative_square
from .quantization import formats_of, linears
from .request import describe_device, versions
from .runtime import free_memory, numerics, release_memory
from .weights import build_on_meta

log = logging.getLogger("solostep")

Progress = Callable[[str, int, int], None]
Mix = Mapping[str, str]
"""The format of every quantized linear, by path."""
FLOOR = "floor"
"""In the place of a mix: all blocks in fp32 against bf16 (or bf16 against fp32)."""


@dataclass(frozen=True)
class EndToEnd:
    """Relative errors of the network's output.

    Attributes:
        error: mean over the samples; this is what a budget is held against.
        worst: of the worst sample.
        by_time: mean at each sampled noise level; empty for a network without.
        guided: mean error of the guided velocity, in which the branches' errors are amplified; None without guidance.
    """

    error: float
    worst: float
    by_time: tuple[tuple[float, float], ...] = ()
    guided: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EndToEnd:
        by_time = tuple((float(sigma), float(error)) for sigma, error in values["by_time"])
        return cls(float(values["error"]), float(values["worst"]), by_time, values["guided"])


def check_measurable(model: ModelFolder, network: str) -> None:
    """Raises UsageError for a network that is stored quantized: what was lost in it cannot be measured."""
    stored = model.components[network].quantization
    if stored is not None:
        raise UsageError(
            f"{model.components[network].folder} is stored in {stored.precision}, and the errors of formats are "
            "measured against the original weights; give the original model."
        )


class Study:
    """Measurements of one network under the same conditions; each is made once and kept in the cache folder.

    Args:
        cache: keep results in ``cache_dir()/sensitivity``, and take what is there.

    Raises:
        UsageError: the network is stored quantized.
    """

    def __init__(
        self,
        model: ModelFolder,
        network: str = "transformer",
        conditions: Conditions | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        progress: Progress | None = None,
        cache: bool = True,
    ) -> None:
        check_measurable(model, network)
        self.model, self.network = model, network
        self.conditions = conditions or conditions_for(model)
        self.device, self.dtype = torch.device(device), dtype
        self.say: Progress = progress or (lambda stage, done, total: None)
        self.component = model.components[network]
        self.paths = linears(build_on_meta(self.component), network)
        self.prefix = PREFIXES[network]
        key = json.dumps(self.identity(), sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.file = cache_dir() / "sensitivity" / f"{name}.json" if cache else None
        self._table: Table | None = None
        self._ends: dict[str, EndToEnd] = {}
        self._samples: Samples | None = None
        self._references: list[Tensor] | None = None
        self._read()

    def identity(self) -> dict[str, Any]:
        """In JSON's types: everything that the results depend on."""
        names = ["transformer", "step_llm", "hunyuan_clip"] + ["vae"] * (self.conditions.image is not None)
        used = names if self.network == "transformer" else [self.network]
        own = versions()
        return {
            "code": _code(), "network": self.network, "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprints": {n: self.model.components[n].fingerprint for n in used},
            "additions": [self.model.preset.positive, self.model.preset.negative],
            "device": self.device.type, "solostep": own["solostep"], "torch": own["torch"],
            **self.conditions.identity(),
        }  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """How much is run: prompts, times, guidance branches, and tokens of a sample of the DiT."""
        c = self.conditions
        if self.network != "transformer":
            return {"texts": len(c.prompts) + c.settings.use_guidance}
        cells = c.settings.latent_frames * c.settings.latent_height * c.settings.latent_width
        tokens = cells // self.model.transformer_config.patch_size**2
        return {"prompts": len(c.prompts), "times": c.times, "branches": 1 + c.settings.use_guidance, "tokens": tokens}

    # --- results --------------------------------------------------------------------------------------------------

    def table(self, formats: Sequence[str]) -> Table:
        """Errors of every linear in each format, and in bf16; what is missing is measured.

        Raises:
            UsageError: an unknown format.
        """
        for name in formats:
            checked_format(name)
        known = self._table.formats if self._table else []
        missing = [n for n in dict.fromkeys([*formats, UNQUANTIZED]) if n not in known]
        if missing or self._table is None:
            with self._working():
                measured = self._measure(missing)
            self._table = measured if self._table is None else self._table.merged(measured)
            self._write()
        return self._table

    def mix_of(self, recipe: Recipe) -> dict[str, str]:
        """The format of every linear that a recipe quantizes.

        Raises:
            UsageError: it fits no linear of the network.
        """
        return formats_of(recipe, build_on_meta(self.component), self.network)

    def end_to_end(self, mixes: Sequence[Mix | str]) -> list[EndToEnd]:
        """Errors of the network's output in each mix (or :data:`FLOOR`); what is missing is measured."""
        keys = [_key(mix) for mix in mixes]
        todo = {key: mix for key, mix in zip(keys, mixes, strict=True) if key not in self._ends}
        if todo:
            with self._working():
                for some in self._passes(todo):
                    self._ends |= some
                    self._write()
        return [self._ends[key] for key in keys]

    # --- measuring ------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> Samples:
        if self._samples is None:
            self._samples = make_samples(self.model, self.network, self.conditions, self.device, self.dtype, self.say)
        return self._samples

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """The numerics of a run; memory that ran out becomes one sentence that says what to do."""
        try:
            with numerics():
                yield
        except torch.OutOfMemoryError as error:
            raise SolostepError(
                f"{describe_device(self.device)} ran out of memory while errors were measured; give a smaller or "
                "shorter clip (--height, --width, --frames) or fewer --formats to `solostep sensitivity`."
            ) from error

    def close(self) -> None:
        """Frees what the samples and blocks hold on the device."""
        self._samples = self._references = None
        release_memory(self.device)

    def _own(self, block: int) -> list[str]:
        """Linears of a block, by their path in it."""
        prefix = f"{self.prefix}.{block}."
        return [p.removeprefix(prefix) for p in self.paths if p.startswith(prefix)]

    def _looked_at(self) -> list[int]:
        """Samples on which single linears are measured: a half of many, with every prompt, time and branch in it."""
        labels = self.samples.labels
        half = [i for i, x in enumerate(labels) if (x["prompt"] + x["time"] + (x["branch"] != "text")) % 2 == 0]
        return list(range(len(labels))) if len(labels) <= 8 else half

    def _measure(self, formats: Sequence[str]) -> Table:
        samples, looked_at = self.samples, self._looked_at()
        blocks, rows = samples.blocks, range(len(samples.labels))
        total, done = blocks.count * len(rows), 0
        probes: dict[int, Probe] = {}
        results: dict[str, Linear] = {}
        floors: dict[int, float] = {}
        what = f"errors of {len(formats)} formats"

        def count() -> None:
            nonlocal done
            done += 1
            self.say(what, done, total)

        def finish(i: int) -> None:
            probe = probes.pop(i)
            results.update(self._results(i, probe))
            floors[i] = probe.floor
            probe.release()

        def wrap(i: int, block: Any) -> Probe:
            if i:
                finish(i - 1)
            probes[i] = Probe(block, f"{self.prefix}.{i}", self._own(i), formats, looked_at, count)
            return probes[i]

        self.say(what, 0, total)
        self._references = samples.run(blocks.each(wrap), rows)
        finish(blocks.count - 1)
        return Table(self.network, tuple(results[path] for path in self.paths), floors)

    def _results(self, block: int, probe: Probe) -> dict[str, Linear]:
        measured = probe.results()
        found = {}
        for name in self._own(block):
            path = f"{self.prefix}.{block}.{name}"
            weight: Any = probe.block.get_submodule(name).weight
            errors = {form: Errors(*measured[name, form]) for form in probe.formats}
            tokens = probe.tokens[name] / probe.measured
            found[path] = Linear(path, weight.shape[1], weight.shape[0], tokens, errors)
        return found

    def _passes(self, mixes: Mapping[str, Mix | str]) -> Any:
        """Several mixes at once as memory allows, since a block may have to come from disk for each pass."""
        samples = self.samples
        rows = list(range(len(samples.labels)))
        if self._references is None:
            self._references = samples.run(samples.blocks.each(), rows)
        if FLOOR in mixes:
            yield {FLOOR: self._floor(rows)}
        todo = [(key, mix) for key, mix in mixes.items() if not isinstance(mix, str)]
        weights = self.component.parameters * self.dtype.itemsize // samples.blocks.count
        each = 2 * len(rows) * samples.stream_bytes + weights
        together = max(1, min(8, free_memory(self.device) // 3 // each))
        for start in range(0, len(todo), together):
            some = todo[start : start + together]
            outputs = self._run_mixes([mix for _, mix in some], rows)
            yield {key: self._compared(out, rows) for (key, _), out in zip(some, outputs, strict=True)}

    def _run_mixes(self, mixes: Sequence[Mix], rows: Sequence[int]) -> list[list[Tensor]]:
        samples = self.samples
        what = f"{len(mixes)} recipes through all blocks" if len(mixes) > 1 else "a recipe through all blocks"

        def wrap(i: int, block: Any) -> Mixed:
            self.say(what, i, samples.blocks.count)
            prefix = f"{self.prefix}.{i}"
            own = [{n: mix[p] for n in self._own(i) if (p := f"{prefix}.{n}") in mix} for mix in mixes]
            return Mixed(block, prefix, own, len(rows))

        outputs = samples.run(samples.blocks.each(wrap), [*rows] * len(mixes))
        self.say(what, samples.blocks.count, samples.blocks.count)
        return [outputs[i : i + len(rows)] for i in range(0, len(outputs), len(rows))]

    def _floor(self, rows: Sequence[int]) -> EndToEnd:
        """All blocks and the residual stream in the other type."""
        blocks = self.samples.blocks
        other = torch.float32 if self.dtype == torch.bfloat16 else torch.bfloat16

        def wrap(i: int, block: Any) -> InType:
            self.say("bf16 against fp32", i, blocks.count)
            return InType(block, other, self.dtype if i == blocks.count - 1 else None)

        outputs = self.samples.run(blocks.each(wrap), rows)
        self.say("bf16 against fp32", blocks.count, blocks.count)
        return self._compared(outputs, rows)

    def _compared(self, outputs: Sequence[Tensor], rows: Sequence[int]) -> EndToEnd:
        assert self._references is not None
        labels = [self.samples.labels[i] for i in rows]
        references = [self._references[i] for i in rows]
        errors = [float(relative_square(a, b).sqrt()) for a, b in zip(outputs, references, strict=True)]
        levels = sorted({x["sigma"] for x in labels if x["sigma"] is not None})
        by_time = tuple((s, _mean([e for e, x in zip(errors, labels, strict=True) if x["sigma"] == s])) for s in levels)
        guided = None
        if isinstance(self.samples, TransformerSamples) and "unconditional" in {x["branch"] for x in labels}:
            pairs = [
                relative_square(self.samples.guided(outputs[i : i + 2]), self.samples.guided(references[i : i + 2]))
                for i in range(0, len(rows), 2)
            ]
            guided = _mean([float(p.sqrt()) for p in pairs])
        return EndToEnd(_mean(errors), max(errors), by_time, guided)

    # --- cache ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if self.file is None or not self.file.exists():
            return
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
            table = None if values["table"] is None else Table.from_dict(values["table"])
            if table is not None and [x.path for x in table.linears] != self.paths:
                raise ValueError("other linears")
            self._ends = {key: EndToEnd.from_dict(e) for key, e in values["end_to_end"].items()}
            self._table = table
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # A damaged entry is no reason to stop: it can be made again.
            log.warning("The measured errors in %s cannot be read (%s); they are measured again.", self.file, error)

    def _write(self) -> None:
        if self.file is None:
            return
        values = {
            "conditions": self.identity(),
            "table": None if self._table is None else self._table.as_dict(),
            "end_to_end": {key: asdict(e) for key, e in self._ends.items()},
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            log.warning("Measured errors could not be kept at %s (%s); going on without.", self.file, error)


def _code() -> str:
    """Identity of the code that results depend on: other kernels are other errors."""
    from ..kernels import quantize, scaled_mm
    from ..quant import four_bit, linear
    from . import activations, probe

    digest = hashlib.sha256()
    for module in (quantize, scaled_mm, four_bit, linear, activations, probe):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def checked_format(name: str) -> None:
    """Raises UsageError for what is no format."""
    try:
        check_format(name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _key(mix: Mix | str) -> str:
    if isinstance(mix, str):
        return mix
    used = sorted((path, form) for path, form in mix.items() if form != UNQUANTIZED)
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
