"""One network's weights on disk: headers, strict checks, and loading them straight to their place.

Networks are built on the meta device; each tensor then goes from the file to its place on its device, so a model is
never held twice. Names, shapes and types are checked from the headers, before the first byte of data is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import StepLLMConfig, TransformerConfig, VAEConfig
from .errors import CheckpointError, UsageError, first_line
from .headers import (
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    TensorInfo,
    product,
    read_bin,
    read_header,
    read_json,
    torch_type,
    type_name,
)
from .quantization import (
    AGAIN,
    QUANTIZATION_FILE,
    Quantization,
    formats_of,
    install_stored,
    read_quantization,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..quant.recipe import Recipe
    from .placing import Homes, Placer

__all__ = [
    "FLOAT_TYPES",
    "QUANTIZED_TYPES",
    "Component",
    "Quantization",
    "TensorInfo",
    "build_on_meta",
    "check_tensors",
]
__all__ += ["largest_part_bytes", "load", "load_each", "memory_bytes"]
__all__ += ["read_bin", "read_header", "read_json", "read_quantization", "type_name"]


@dataclass(frozen=True)
class Component:
    """One network of a model folder, known from its configuration and file headers."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    ignored: tuple[str, ...] = ()
    quantization: Quantization | None = None
    """What is stored quantized, and how; None for a network of floats."""

    @cached_property
    def parameters(self) -> int:
        """The network's parameters, however they are stored."""
        if self.quantization is None:
            return sum(t.numbers for t in self.tensors.values())
        return sum(p.numel() for p in build_on_meta(replace(self, quantization=None)).parameters())

    @property
    def stored_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)

    @property
    def dtypes(self) -> list[str]:
        return sorted({t.dtype for t in self.tensors.values()})

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: configuration, formats, headers, sizes, and 16 samples of the data of each file."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True, default=str).encode())
        if self.quantization is not None:
            digest.update(self.quantization.identity().encode())
        for name in sorted(self.tensors):
            digest.update(f"{name}:{self.tensors[name].shape}:{self.tensors[name].dtype}".encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                for i in range(16):
                    stream.seek(size * i // 16)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]


def build_on_meta(component: Component) -> nn.Module:
    """The network of a component, with parameters that have shapes but no memory; quantized if it is stored so.

    Raises:
        CheckpointError: its configuration makes no network, or quantization.json names what is no linear of it.
    """
    import torch
    from accelerate import init_empty_weights

    from ..quant.recipe import BLOCKS
    from .models.clip import HunyuanClip
    from .models.step_llm import StepLLM
    from .models.transformer import StepVideoTransformer
    from .models.vae import VideoAutoencoder

    makers: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
        "transformer": lambda c: StepVideoTransformer(TransformerConfig.from_dict(c)),
        "vae": lambda c: VideoAutoencoder(VAEConfig.from_dict(c)),
        "step_llm": lambda c: StepLLM(StepLLMConfig.from_dict(c)),
        "hunyuan_clip": HunyuanClip,
    }
    # The blocks' networks hold no buffers, which have to be real; this way is the faster one for hundreds of linears.
    on_meta = torch.device("meta") if component.name in BLOCKS else init_empty_weights(include_buffers=False)
    try:
        with on_meta:
            module = makers[component.name](component.config).eval().requires_grad_(False)
    except CheckpointError:
        raise
    except Exception as error:  # values of a wrong type or that do not fit together fail anywhere in a constructor
        raise CheckpointError(
            f"{component.folder / 'config.json'} does not describe a {component.name} network ({first_line(error)}); "
            "download it again."
        ) from error
    if component.quantization is not None:
        install_stored(module, component.name, component.quantization, component.folder)
    return module


def check_tensors(component: Component, module: nn.Module, prefix: str = "") -> None:
    """Holds a component's tensors against a module's parameters: names, shapes and types, strictly.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown, of a wrong shape or of a wrong type.
    """
    expected = {prefix + name: (tuple(p.shape), kind) for name, p, kind in _parameters(module)}
    found = {k: t for k, t in component.tensors.items() if k.startswith(prefix)}
    _check_has_quantization(component, found)
    where = component.folder
    missing = sorted(set(expected) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor {missing[0]}{more} is missing; a file is incomplete or config.json is of another model: "
            "download them again."
        )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{found[unknown[0]].file}: tensor {unknown[0]}{more} is unknown to this network; "
            "the file or config.json is of another model: download them again."
        )
    for name, (shape, kind) in expected.items():
        info = found[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)} and has to have {list(shape)}; "
                "the file or config.json is of another model: download them again."
            )
        if kind is not None and info.dtype != kind:
            raise CheckpointError(
                f"{info.file}: tensor {name} is stored as {info.dtype} and {QUANTIZATION_FILE} asks for {kind}; "
                f"{AGAIN}."
            )
        if kind is None and info.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{info.file}: tensor {name} is stored as {info.dtype} and only {', '.join(FLOAT_TYPES)} can be read; "
                "download it again."
            )


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """Name, parameter, and the one type that it can be stored in; None where any float type will do."""
    from ..quant.linear import QuantizedLinear

    for path, part in module.named_modules():
        exact = isinstance(part, QuantizedLinear)
        for name, parameter in part.named_parameters(path, recurse=False):
            yield name, parameter, type_name(parameter) if exact and not name.endswith(".bias") else None


def _check_has_quantization(component: Component, found: Mapping[str, TensorInfo]) -> None:
    """Quantized tensors without the file that says how to read them."""
    from ..quant.recipe import BLOCKS

    if component.quantization is not None or component.name not in BLOCKS:
        return
    for name, info in found.items():
        if info.dtype in QUANTIZED_TYPES:
            raise CheckpointError(
                f"{component.folder / QUANTIZATION_FILE} is missing, and without it tensor {name} in {info.file.name}, "
                f"stored as {info.dtype}, cannot be read; copy it from where the folder came from, or {AGAIN}."
            )


def memory_bytes(component: Component, dtype: torch.dtype, recipe: Recipe | None = None) -> int:
    """What the weights take on a device: as they are stored, or quantized by ``recipe``; the rest in ``dtype``.

    Raises:
        UsageError: the recipe fits no linear of the network.
    """
    module = build_on_meta(component)
    formats = {} if recipe is None else formats_of(recipe, module, component.name)
    return int(_placed_bytes(module, dtype, formats))


def largest_part_bytes(
    component: Component, dtype: torch.dtype, parts: Sequence[str], recipe: Recipe | None = None
) -> int:
    """What a device needs, at most, for the weights of parts that :func:`load_each` brings and that run one by one: the
    largest part, tensors that arrive, and what quantizing a weight, or expanding it for a product, takes.

    Raises:
        UsageError: the recipe fits no linear of the network.
    """
    from torch import nn

    from ..quant.foreign import is_foreign
    from ..quant.linear import QuantizedLinear

    whole = build_on_meta(component)
    formats = {} if recipe is None else formats_of(recipe, whole, component.name)
    placed, arriving, scratch = 0.0, 0, 0
    for part in parts:
        module, own = whole.get_submodule(part), _within(formats, part)
        placed = max(placed, _placed_bytes(module, dtype, own))
        for name, _, kind in _parameters(module):
            info = component.tensors[f"{part}.{name}"]
            stored = torch_type(info.dtype)
            # Of the next tensor the first bytes are there, and with them all of its memory; so is what becomes another.
            changes = kind is None and stored != dtype or name.removesuffix(".weight") in own
            arriving = max(arriving, (1 + changes) * info.numbers * stored.itemsize)
        for path, linear in module.named_modules():
            if isinstance(linear, QuantizedLinear) or (path in own and isinstance(linear, nn.Linear)):
                numbers = linear.in_features * linear.out_features
                # Some rows, six times in fp32 (see row_chunks); other packages take all rows at once.
                rows = numbers if is_foreign(own.get(path, "")) else min(numbers, 1 << 24)
                scratch = max(scratch, 6 * 4 * rows + numbers * dtype.itemsize)
    return int(placed) + arriving + scratch


def _placed_bytes(module: nn.Module, dtype: torch.dtype, formats: Mapping[str, str]) -> float:
    """What a module's weights take where they are used."""
    from ..quant.foreign import is_foreign
    from ..quant.formats import FORMATS, stored

    total = 0.0
    for name, parameter, kind in _parameters(module):
        path, _, leaf = name.rpartition(".")
        form = formats.get(path, "") if leaf == "weight" else ""
        if form in FORMATS:
            tensors = stored(form, parameter.shape[1], parameter.shape[0])
            total += sum(product(shape) * t.itemsize for shape, t in tensors.values())
        elif is_foreign(form):  # with their scales, about
            total += parameter.numel() * (4.5 if "4" in form else 8) / 8
        else:
            total += parameter.numel() * (dtype if kind is None else parameter.dtype).itemsize
    return total


def _within(formats: Mapping[str, str], part: str) -> dict[str, str]:
    """Formats of the linears inside a part, by their paths in it."""
    prefix = f"{part}." if part else ""
    return {path.removeprefix(prefix): name for path, name in formats.items() if path.startswith(prefix)}


def load(
    component: Component,
    device: torch.device | str,
    dtype: torch.dtype,
    part: str = "",
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
    homes: Homes | None = None,
) -> nn.Module:
    """Builds a network and fills it, tensor by tensor, each straight from its file to its place.

    What is stored quantized is taken as it is. With ``recipe``, each weight of a float network is quantized when it
    arrives on the device, from the type that it is stored in, and its float values are freed at once.

    Args:
        dtype: of the weights that are not quantized, and of what the network computes in.
        part: load only this submodule (``decoder`` of the VAE, say).
        progress: called with (numbers placed, numbers in all).
        homes: which parameters do not stay on the device. It is called once, with what is loaded as it will be but on
            the meta device (quantized linears in their places, every parameter in its type), and gives host tensors by
            parameters' names, of their shapes and types: values go there when they are ready, and the parameter is
            that tensor. With None in place of a tensor a parameter is read and checked, and stays on the meta device.

    Raises:
        UsageError: a recipe that fits no linear, or for a network that is stored quantized.
        CheckpointError: a tensor with NaN or infinity, a file that changed or ends early, or any mismatch.
        SolostepError: a format of another package refuses a layer, or would have to leave the device.
        ValueError: a home of no parameter, or of another shape or type.
    """
    for placer in _filled(component, device, dtype, [part], recipe, progress, homes):
        module = placer.module  # the loop goes on to the end: there the reader looks at the files once more
    return module


def load_each(
    component: Component,
    device: torch.device | str,
    dtype: torch.dtype,
    parts: Sequence[str],
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[nn.Module]:
    """Submodules of a network (``transformer.layers.0``), one after the other, each filled as :func:`load` fills it.

    A part gives its weights back when the next one is asked for, so one is in memory at a time, and what is read ahead
    of the next. Fastest where the parts' order is that of the files.

    Args:
        parts: paths of submodules, none inside another.
        progress: called with (numbers placed, numbers in all parts).

    Raises:
        UsageError, CheckpointError, SolostepError: as :func:`load`; for what is in a part, before it is given.
    """
    with contextlib.closing(_filled(component, device, dtype, parts, recipe, progress)) as filled:
        for placer in filled:
            try:
                yield placer.module
            finally:
                placer.drop()


def _right_products(whole: nn.Module, formats: Mapping[str, str], device: torch.device) -> Mapping[str, Sequence[str]]:
    """What may multiply in 8 bits on a card; what is wrong there is not used from now on. On a new card it is examined
    first, while the memory is free."""
    if device.type != "cuda":
        return {}
    from ..quant.formats import kinds_of
    from ..quant.linear import product_kinds
    from .choices import settle

    return settle(device, product_kinds(whole) | kinds_of(formats.values())).products


def _filled(
    component: Component,
    device: torch.device | str,
    dtype: torch.dtype,
    parts: Sequence[str],
    recipe: Recipe | None,
    progress: Callable[[int, int], None] | None,
    homes: Homes | None = None,
) -> Generator[Placer, None, None]:
    """A placer for each part, when all of it is checked and in its place; one stream of reading for all of them."""
    import torch

    from ..quant.linear import use_products
    from .placing import Placer, read_infos

    device = torch.device(device)
    whole = build_on_meta(component)
    wanted: list[tuple[str, dict[str, TensorInfo]]] = []
    for part in parts:
        module, prefix = whole.get_submodule(part), f"{part}." if part else ""
        check_tensors(component, module, prefix)
        found = {name: component.tensors[prefix + name] for name, _, _ in _parameters(module)}
        wanted.append((part, dict(sorted(found.items(), key=lambda item: (item[1].file, item[1].offset)))))
    formats = {} if recipe is None else formats_of(recipe, whole, component.name)
    if formats and component.quantization is not None:
        raise UsageError(
            f"{component.folder} is stored in {component.quantization.precision} and cannot be quantized again; "
            "take the original model."
        )
    products = _right_products(whole, formats, device)
    infos = [info for _, found in wanted for info in found.values()]
    total, done = sum(info.numbers for info in infos), 0
    # Closed here, whatever fails: then no copy is under way any more.
    with contextlib.closing(read_infos(infos, device)) as tensors:
        for part, found in wanted:
            placer = Placer(whole.get_submodule(part), device, dtype, _within(formats, part), homes)
            use_products(placer.module, products)
            names = list(found)
            for i, name in enumerate(names):
                # Not zip(), which would hold a tensor until the next one is there.
                placer.place(name, found[name], next(tensors))
                done += found[name].numbers
                if progress is not None:
                    progress(done, total)
                if i + 1 == len(names) or found[names[i + 1]].file != found[name].file:
                    placer.check()
            placer.finish()
            yield placer
        next(tensors, None)  # the reader's last look at the files
