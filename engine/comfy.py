"""ComfyUI's single FP8 files: a DiT from such a file into a model folder, and from a model folder into such a file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..quant import comfy
from ..quant import convert as streaming
from ..quant.convert import Item
from ..quant.recipe import Recipe, default_recipe
from ..quant.writing import FileWriter
from .assemble import check_place, check_space
from .checkpoint import ModelFolder, network_root, open_model
from .conversion import STEMS, Network, Progress, readable_errors, write_model
from .errors import CheckpointError, UsageError
from .headers import TensorInfo, read_header, torch_type
from .placing import read_infos
from .quantization import linears
from .runtime import pick_device
from .weights import Component, build_on_meta

log = logging.getLogger("solostep")

EIGHT_BITS = ("int8", "int8-plain", "int8-weight", "fp8", "fp8-weight")
"""What a transformer may be stored in to be exported."""


# --- in -----------------------------------------------------------------------------------------------------------


def import_comfy(
    file: str | Path,
    base: str | Path | ModelFolder,
    out: str | Path,
    precision: str | None = None,
    link: bool = False,
    progress: Progress | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Writes a model folder with the DiT of a ComfyUI file and everything else of ``base``.

    The bytes of e4m3 weights stay as they are. e5m2 becomes e4m3 with a power of two as scale of each row: the same
    numbers, but for those below 2^-15 of their row's largest. FP8 outside the blocks becomes bf16. A stopped import
    goes on when it is called again.

    Args:
        precision: fp8 or fp8-weight; by default what the file asks for, which for a plain cast is fp8-weight.
        link: refer to the other networks where they are, instead of copying them.

    Returns:
        A record as of :func:`solostep.engine.convert.quantize_model`, with ``layout``.

    Raises:
        UsageError: a wrong option, or a folder that is something else; nothing was begun.
        CheckpointError: the file is damaged, or not of a transformer like that of ``base``; the tensor is named.
        OutputError: the folder cannot be written, or its disk is full; finished shards are kept.
    """
    if precision not in (None, "fp8", "fp8-weight"):
        raise UsageError(f"--precision {precision} is not what FP8 files hold; choose fp8 or fp8-weight.")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"{file}: there is no such file; give a ComfyUI file of FP8 weights (.safetensors).")
    folder = base if isinstance(base, ModelFolder) else open_model(base)
    place = Path(out).expanduser().resolve()
    check_place(place, folder)
    header = read_header(path)
    with readable_errors(place):
        found, network = _plan_import(path, header, folder.components["transformer"], precision, shard_bytes)
        if found.layout == "plain":
            kind = "e5m2" if any(t.dtype == comfy.E5M2 for t in found.tensors.values()) else "e4m3"
            log.warning(comfy.measure_cast(found).sentence(path, kind))
    record = write_model(folder, place, [network], torch.device("cpu"), link, progress)
    return record | {"layout": found.layout}


def _plan_import(
    path: Path, header: dict[str, TensorInfo], own: Component, precision: str | None, shard_bytes: int | None
) -> tuple[comfy.ComfyFile, Network]:
    plain = replace(own, quantization=None)
    module = build_on_meta(plain)
    found = comfy.read_comfy(path, {name: tuple(p.shape) for name, p in module.named_parameters()})
    inside = set(linears(module, "transformer"))
    formats: dict[str, str] = {}
    for name, one in found.tensors.items():
        linear = name.removesuffix(".weight")
        if one.is_fp8 and linear in inside and name != linear:
            wanted = precision or ("fp8-weight" if one.full_precision else "fp8")
            formats[linear] = default_recipe(wanted, "transformer").format_of(linear)
    if not formats:
        raise CheckpointError(f"{path} holds no FP8 weights inside the transformer's blocks; give an FP8 file.")
    name_of = {one.stored_name: name for name, one in found.tensors.items()}
    infos = tuple(sorted(header.values(), key=lambda info: info.offset))
    items = [
        comfy.imported(name, found.tensors[name], path, formats.get(name.removesuffix(".weight")))
        for name in (name_of[info.stored_name] for info in infos if info.stored_name in name_of)
    ]
    chosen = "fp8" if "fp8" in formats.values() else "fp8-weight"
    shards = streaming.plan_shards(items, STEMS["transformer"], shard_bytes or streaming.SHARD)
    fingerprint = Component("transformer", path.parent, own.config, (path,), header).fingerprint
    ordered = {linear: formats[linear] for linear in linears(module, "transformer") if linear in formats}
    return found, Network(
        "transformer", tuple(shards), {path: infos}, chosen, _recipe_of(ordered, chosen, sorted(inside)), ordered,
        fingerprint, {"file": path.name, "layout": found.layout},
    )  # fmt: skip


def _recipe_of(formats: dict[str, str], precision: str, paths: list[str]) -> Recipe:
    """The recipe of a precision if it gives these formats, else one rule a linear."""
    usual = default_recipe(precision, "transformer")
    return usual if usual.resolve(paths) == formats else Recipe(precision, tuple(formats.items()))


# --- out ----------------------------------------------------------------------------------------------------------


def export_comfy(
    model: str | Path | ModelFolder,
    out: str | Path,
    prefix: str = "",
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the DiT of a model as one file in ComfyUI's scaled_fp8 layout: e4m3 inside the blocks, the rest as it is.

    A transformer of floats gets one scale for each matrix. One that is stored in fp8 or fp8-weight with equal scales,
    as an import leaves it, keeps its bytes; other 8-bit weights are rounded a second time, which is said.

    Args:
        prefix: put before every name, such as ``model.diffusion_model.``.

    Returns:
        A record: ``output``, ``bytes``, ``linears``, ``rounded_twice``, ``seconds``.

    Raises:
        UsageError: a wrong option, a file that is there already, or a transformer in 4 bits; nothing was begun.
        CheckpointError: the model is incomplete or damaged.
        OutputError: the file cannot be written; nothing is left of it.
    """
    start = time.perf_counter()
    chosen = pick_device(device)
    path = Path(out).expanduser().resolve()
    folder = model if isinstance(model, ModelFolder) else open_model(model)
    _check_file(path, folder, overwrite)
    component = folder.components["transformer"]
    with readable_errors(path):
        items, twice = _plan_export(component, prefix)
        outputs = {name: spec for item in items.values() for name, spec in item.outputs.items()}
        name, tensor = comfy.marker(prefix)
        outputs[name] = (tuple(tensor.shape), tensor.dtype)
        if twice:
            log.warning(
                f"{twice} linears of {component.folder} are stored with a scale for each row and are rounded a second "
                "time; a file exported from the original model is closer to it."
            )
        size = sum(streaming.nbytes(spec) for spec in outputs.values())
        check_space(path.parent, size + (16 << 20))
        path.parent.mkdir(parents=True, exist_ok=True)
        total = sum(item.nbytes for item in items.values())
        about = {"format": "pt", "solostep.version": __version__, "solostep.source": component.fingerprint}
        with FileWriter(path, outputs, about) as writer:
            writer.put({name: tensor})
            streaming.stream(
                _items_of(component, items, chosen), writer.take,
                None if progress is None else lambda done: progress("export transformer", done, total),
            )  # fmt: skip
    count = sum(spec[1] == comfy.E4M3 for spec in outputs.values()) - 1
    return {
        "output": str(path), "bytes": path.stat().st_size, "linears": count, "rounded_twice": twice,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def _check_file(path: Path, model: ModelFolder, overwrite: bool) -> None:
    if path.suffix != ".safetensors" or path.is_dir():
        raise UsageError(f"-o {path} has to be the name of a file that ends in .safetensors.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is already there; add --overwrite or choose another -o.")
    for root in (model.root, network_root(model.root, "transformer")):
        if root in path.parents:
            raise UsageError(f"-o {path} is inside the model {root}, which is never written to; choose another place.")


def _plan_export(component: Component, prefix: str) -> tuple[dict[str, Item], int]:
    """What becomes of each stored tensor, by its name, without those that go into another; and how many round twice."""
    stored = component.quantization
    module = build_on_meta(component)
    if stored is None:
        formats = dict.fromkeys(linears(module, "transformer"), "")
    else:
        formats = dict(stored.modules)
        other = sorted(set(formats.values()) - set(EIGHT_BITS))
        if other:
            raise UsageError(
                f"{component.folder} is stored in {other[0]}, which is too coarse for FP8; give the original model."
            )
    scales = dict(_scales(component, formats)) if stored is not None else {}
    items, twice = {}, 0
    for name, info in component.tensors.items():
        path, _, leaf = name.rpartition(".")
        spec = (info.shape, torch_type(info.dtype))
        if path not in formats:
            items[name] = Item(name, info.file, streaming.nbytes(spec), {f"{prefix}{name}": spec})
        elif leaf == "weight" and stored is None:
            items[name] = comfy.exported(name, info.file, spec, prefix)
        elif leaf == "weight":
            form, scale = formats[path], scales[path]
            items[name] = comfy.exported_stored(name, info.file, spec, prefix, form, scale, info.shape[1])
            twice += not comfy.shares_scale(form, scale)
        elif leaf == "bias":
            items[name] = Item(name, info.file, streaming.nbytes(spec), {f"{prefix}{name}": spec})
    return items, twice


def _scales(component: Component, formats: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The row scales of a stored network (20 MB at its real size), by linear."""
    for file in component.files:
        infos = [
            info
            for name, info in component.tensors.items()
            if info.file == file and name.endswith(".weight_scale") and name.removesuffix(".weight_scale") in formats
        ]
        for info, tensor in zip(infos, read_infos(infos, torch.device("cpu")), strict=True):
            yield info.stored_name.removesuffix(".weight_scale"), tensor


def _items_of(component: Component, items: dict[str, Item], device: torch.device) -> Iterator[tuple[Item, Tensor]]:
    for file in component.files:
        infos = [info for name, info in component.tensors.items() if info.file == file and name in items]
        infos.sort(key=lambda info: info.offset)
        tensors = read_infos(infos, device)
        for info in infos:
            yield items[info.stored_name], next(tensors)
        next(tensors, None)
