"""Single FP8 files of a DiT as ComfyUI and the tools around it use them: e4m3 weights with one fp32 scale a matrix.

| layout | beside ``X.weight`` | said by |
|---|---|---|
| scaled_fp8 | ``X.scale_weight``, at times ``X.scale_input`` | a tensor ``scaled_fp8``; of 2 elements: bf16 products |
| comfy_quant | ``X.weight_scale``, at times ``X.input_scale`` | JSON in ``X.comfy_quant`` or in the file's metadata |
| plain | nothing | nothing: weights cast without a scale |

All three are read, with names as they are or behind ``model.diffusion_model.`` or ``diffusion_model.``. Written is
scaled_fp8: what ComfyUI and the loaders beside it knew before comfy_quant, and what newer ones turn into it on loading.
Its marker gets 2 elements, because without calibrated input scales ComfyUI would cast activations with no scale at all.

A scale of the matrix is a scale for each row with equal entries: the bytes of the weights stay as they are both ways.
Sources: comfy/ops.py, comfy/utils.py (convert_old_quants) and QUANTIZATION.md of ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .convert import ConversionError, Item, Spec, nbytes
from .formats import FORMATS
from .linear import QuantizedLinear, assign

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARKER = "scaled_fp8"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
READ = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
"""ComfyUI's names of the formats that are read."""
SCALES = ("scale_weight", "weight_scale")
PASSED_OVER = ("scale_input", "input_scale", "comfy_quant")
"""Calibrated scales of activations (here every token gets its own, when it comes), and what is read elsewhere."""
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Stored:
    """One tensor of the DiT in such a file. ``scale`` is fp32, ``[1]`` or ``[N]``, for FP8 only."""

    stored_name: str
    shape: tuple[int, ...]
    held_as: torch.dtype
    """The type in the file: bytes, at times, for FP8."""
    dtype: torch.dtype
    scale: Tensor | None = None
    full_precision: bool = True
    """Whether its products are computed in bf16, as far as the file says."""

    @property
    def is_fp8(self) -> bool:
        return self.dtype in (E4M3, E5M2)


@dataclass(frozen=True)
class ComfyFile:
    """A checked file: its layout, and its tensors by the network's names."""

    path: Path
    layout: str
    tensors: Mapping[str, Stored]


# --- reading ------------------------------------------------------------------------------------------------------


def read_comfy(path: Path, expected: Mapping[str, tuple[int, ...]]) -> ComfyFile:
    """Reads what a file holds, but for the weights, and holds it against a network: names, shapes, types and scales.

    Args:
        expected: shapes of the network's parameters, by name.

    Raises:
        ConversionError: what is missing, unknown or not read; tensor and file are named.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        prefix = max(PREFIXES, key=lambda p: sum(p + name in names for name in expected))
        conf = _configurations(path, file, names, prefix)
        marker = next((name for name in (prefix + MARKER, MARKER) if name in names), None)
        everywhere = marker is not None and list(file.get_slice(marker).get_shape()) == [2]
        scales: dict[str, Tensor] = {}
        found: dict[str, str] = {}
        for name in sorted(names - {marker}):
            short = name.removeprefix(prefix)
            module, _, leaf = short.rpartition(".")
            if leaf in SCALES:
                if module in scales:
                    raise ConversionError(f"{path}: {module} has two scales, {' and '.join(SCALES)}; remove one.")
                scales[module] = file.get_tensor(name)
            elif leaf not in PASSED_OVER:
                found[short] = name
        _check_names(path, found, expected)
        layout = "comfy_quant" if conf else "scaled_fp8" if scales or marker else "plain"
        tensors = {}
        for name, stored_name in found.items():
            path_of, _, leaf = name.rpartition(".")
            own, scale = (table.pop(path_of, None) if leaf == "weight" else None for table in (conf, scales))
            part = file.get_slice(stored_name)
            shape = tuple(part.get_shape())
            if shape != tuple(expected[name]):
                raise ConversionError(
                    f"{path}: tensor {stored_name} has shape {list(shape)} and has to have {list(expected[name])}; "
                    "the file is of another model."
                )
            held, dtype = _types(path, stored_name, part.get_dtype(), own)
            full = layout == "plain" or everywhere or bool((own or {}).get("full_precision_matrix_mult", False))
            one = Stored(stored_name, shape, held, dtype, full_precision=full)
            tensors[name] = replace(one, scale=_scale(path, one, scale, layout))
    for module in sorted(scales.keys() | conf.keys()):
        raise ConversionError(f"{path} holds a scale or a format of {module}, which this network lacks.")
    if not any(t.is_fp8 for t in tensors.values()):
        raise ConversionError(f"{path} holds no FP8 weights; only ComfyUI's FP8 files are imported.")
    return ComfyFile(path, layout, tensors)


def _configurations(path: Path, file: Any, names: set[str], prefix: str) -> dict[str, dict[str, Any]]:
    """What a comfy_quant file says of each layer, in its metadata or in tensors of JSON text; by module path."""
    texts = {n.removesuffix(".comfy_quant"): n for n in names if n.endswith(".comfy_quant")}
    try:
        told = json.loads((file.metadata() or {}).get("_quantization_metadata", "{}")).get("layers", {})
        layers = dict(told) | {m: json.loads(bytes(file.get_tensor(n).tolist())) for m, n in texts.items()}
        found = {m.removeprefix(prefix): dict(conf) for m, conf in layers.items()}
    except (ValueError, TypeError, AttributeError):
        raise ConversionError(f"{path}: its quantization metadata is damaged; download it again.") from None
    for module, conf in found.items():
        if conf.get("format") not in READ:
            raise ConversionError(
                f"{path}: layer {module} is in ComfyUI's format {conf.get('format')!r}, and only "
                f"{' and '.join(READ)} are read."
            )
    return found


def _check_names(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for names, what in ((missing, "is missing"), (unknown, "is unknown to this network")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConversionError(f"{path}: tensor {names[0]}{more} {what}; the file is of another model or not whole.")


def _types(path: Path, name: str, kind: str, conf: Mapping[str, Any] | None) -> tuple[torch.dtype, torch.dtype]:
    """The type that a tensor is held in, and the one that its bytes mean."""
    meant = None if conf is None else READ[conf["format"]]
    if kind in FP8 and meant in (None, FP8[kind]):
        return FP8[kind], FP8[kind]
    if kind == "U8" and meant is not None:
        return torch.uint8, meant
    if kind in FLOATS and meant is None:
        return FLOATS[kind], FLOATS[kind]
    said = "" if conf is None else f", though the file says {conf['format']}"
    raise ConversionError(f"{path}: tensor {name} is stored as {kind}{said}; it cannot be read.")


def _scale(path: Path, one: Stored, scale: Tensor | None, layout: str) -> Tensor | None:
    """The scale of a tensor as fp32 ``[1]`` or ``[N]``; one for what has none and needs none."""
    where = f"{path}: tensor {one.stored_name}"
    if scale is None:
        if one.is_fp8 and layout != "plain" and len(one.shape) == 2 and one.stored_name.endswith(".weight"):
            raise ConversionError(f"{where} is FP8 and has no scale, as others in the file have; it is not whole.")
        return torch.ones(1) if one.is_fp8 else None
    scale = scale.float().flatten()
    if len(scale) != 1 and scale.shape != one.shape[:1]:
        raise ConversionError(f"{where} has {len(scale):,} scales; only one, or one for each row, can be read.")
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ConversionError(f"{where} has a scale that is negative or no number; download it again.")
    if one.is_fp8:
        return scale
    if bool((scale != 1).any()):  # a scale of 1 beside a float is in some files, and means nothing
        raise ConversionError(f"{where} is stored as {one.dtype} and has a scale, which has no meaning here.")
    return None


# --- what becomes of a tensor -------------------------------------------------------------------------------------


def imported(name: str, one: Stored, origin: Path, form: str | None) -> Item:
    """A tensor in our layout: FP8 of a linear that has a format stays FP8, other FP8 becomes bf16, floats stay."""
    spec = (one.shape, one.held_as)
    if not one.is_fp8:
        return Item(one.stored_name, origin, nbytes(spec), {name: spec})
    scale = one.scale
    assert scale is not None
    if form is None:

        def widen(tensor: Tensor) -> dict[str, Tensor]:
            rows = scale.view(-1, *[1] * (len(one.shape) - 1)) if len(scale) > 1 else scale
            return {name: (tensor.view(one.dtype).float() * rows).view(one.shape).bfloat16()}

        return Item(one.stored_name, origin, nbytes(spec), {name: (one.shape, torch.bfloat16)}, widen)

    def make(tensor: Tensor) -> dict[str, Tensor]:
        tensor = tensor.view(one.dtype)
        rows = scale.expand(one.shape[0])
        if one.dtype == E5M2:
            tensor, own = e5m2_to_e4m3(tensor)
            rows = rows * own
        return {name: tensor, f"{name}_scale": rows.contiguous()}

    outputs: dict[str, Spec] = {name: (one.shape, E4M3), f"{name}_scale": (one.shape[:1], torch.float32)}
    return Item(one.stored_name, origin, nbytes(spec), outputs, make)


def e5m2_to_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e5m2 ``[N, K]`` as e4m3 with a power of two for each row: the same numbers down to 2^-15 of a row's largest.

    e4m3 has one bit of mantissa more and half the exponents. The largest number of a row goes to 256 ... 448; those
    below 2^-15 of it are rounded, by less than 2^-17 of it. In a plain cast, rows below 4 are all exact.
    """
    wide = weight.float()
    amax = wide.abs().amax(1)
    exponent = torch.frexp(amax).exponent - 9  # amax = m 2^e with m in [0.5, 1): amax 2^(9 - e) is in [256, 512)
    scale = torch.where(amax == 0, 1.0, torch.ldexp(torch.ones_like(amax), exponent))
    return (wide / scale[:, None]).to(E4M3), scale


def exported(name: str, origin: Path, spec: Spec, prefix: str) -> Item:
    """The float weight of a linear, with one scale for the matrix."""
    module = f"{prefix}{name.removesuffix('.weight')}"
    outputs: dict[str, Spec] = {f"{prefix}{name}": (spec[0], E4M3), f"{module}.scale_weight": ((), torch.float32)}

    def make(weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(outputs, quantize_tensor(weight), strict=True))

    return Item(name, origin, nbytes(spec), outputs, make)


def exported_stored(name: str, origin: Path, spec: Spec, prefix: str, form: str, scale: Tensor, columns: int) -> Item:
    """The same from a linear that is stored in 8 bits: bytes as they are if its rows share one scale.

    Args:
        scale: fp32 ``[N]``; ``columns``: K.
    """
    item = exported(name, origin, spec, prefix)
    if shares_scale(form, scale):
        same = scale[0].clone()
        return replace(item, make=lambda weight: dict(zip(item.outputs, (weight, same), strict=True)))

    def make(weight: Tensor) -> dict[str, Tensor]:
        linear: QuantizedLinear = FORMATS[form].kind(columns, len(scale), False, torch.bfloat16)
        assign(linear, {"weight": weight, "weight_scale": scale.to(weight.device)})
        return dict(zip(item.outputs, quantize_tensor(linear.dequantized()), strict=True))

    return replace(item, make=make)


def shares_scale(form: str, scale: Tensor) -> bool:
    """Whether a stored linear is e4m3 with one scale for all its rows."""
    return form in ("fp8", "fp8-weight") and bool((scale == scale[0]).all())


def quantize_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[N, K]`` and one fp32 scale ``[]``: the largest number goes to 448. Computed in fp32."""
    weight = weight.float()
    amax = weight.abs().amax()
    scale = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny))
    return (weight / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def marker(prefix: str) -> tuple[str, Tensor]:
    """The tensor that marks the layout that is written."""
    return f"{prefix}{MARKER}", torch.zeros(2, dtype=E4M3)


# --- what a plain cast lost ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CastLoss:
    """What casting without a scale did, on a sample of the weights of a file; shares of ``seen`` weights."""

    seen: int
    zero: float
    coarse: float
    """Below the normal range, where fewer bits of mantissa are left."""
    clipped: float
    """At the largest number of the type."""

    def sentence(self, path: Path, kind: str) -> str:
        return (
            f"{path} is cast to {kind} without scales: of {self.seen:,} weights looked at, {self.zero:.2%} are zero, "
            f"{self.coarse:.1%} lie below the type's normal range and lost bits, {self.clipped:.2%} are cut off at its "
            "largest number. A file with scales, or the original model, is closer."
        )


def measure_cast(file: ComfyFile, per_tensor: int = 1 << 20) -> CastLoss:
    """Looks at up to ``per_tensor`` weights of each FP8 matrix, in 8 runs of rows spread over it."""
    from safetensors import safe_open

    counts = torch.zeros(256, dtype=torch.int64)
    smallest, largest = {E4M3: (8, 0x7E), E5M2: (4, 0x7B)}[next(t.dtype for t in file.tensors.values() if t.is_fp8)]
    with safe_open(str(file.path), framework="pt") as opened:
        for one in file.tensors.values():
            if not one.is_fp8 or len(one.shape) != 2:
                continue
            rows, columns = one.shape
            part = opened.get_slice(one.stored_name)
            run = max(1, per_tensor // (8 * max(columns, 1)))
            starts = [i * rows // 8 for i in range(8)] if 8 * run < rows else range(0, rows, run)
            for start in starts:
                codes = part[start : min(start + run, rows)].contiguous().view(torch.uint8)
                counts += torch.bincount(codes.flatten().int(), minlength=256)
    magnitudes = counts[:128] + counts[128:]  # without the sign
    seen = max(int(counts.sum()), 1)
    parts = (magnitudes[0], magnitudes[1:smallest].sum(), magnitudes[largest])
    return CastLoss(seen, *(float(part) / seen for part in parts))
