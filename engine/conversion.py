"""How a model folder in another format is written: planned from headers, streamed, gone on with when it was stopped.

    DIR/transformer/diffusion_pytorch_model-00001-of-00015.safetensors ...  written shard by shard
    DIR/transformer/quantization.json                                       written last: it marks a finished network
    DIR/conversion.json                                                     while it is under way, and no longer

A conversion that was stopped keeps the shards that are finished: they are known by an identity of source, formats and
layout, which conversion.json and every shard hold. Two conversions are never mixed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..quant import convert as streaming
from ..quant.convert import ConversionError, Item, Shard, index, is_finished, plan_shards
from ..quant.recipe import Recipe
from ..quant.writing import ShardWriter
from .assemble import Rest, check_space, copy_files, plan_rest, write_json
from .checkpoint import ModelFolder, open_model
from .config import cache_dir
from .digests import Digests
from .errors import CheckpointError, OutputError, UsageError
from .headers import TensorInfo, read_json, torch_type
from .latents import lock
from .placing import read_infos
from .quantization import QUANTIZATION_FILE, VERSION, formats_of, read_quantization
from .weights import Component, build_on_meta

CONVERTER = 1
"""Part of a conversion's identity: raised when the same source and formats give other files."""
STATE = "conversion.json"
STEMS = {"transformer": "diffusion_pytorch_model", "step_llm": "model"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Network:
    """One network that is written anew: from which files, into which shards, in which formats."""

    name: str
    shards: tuple[Shard, ...]
    contents: Mapping[Path, tuple[TensorInfo, ...]]
    """Everything in the source files, in its order there: also what no item comes from is hashed."""
    precision: str
    recipe: Recipe
    formats: Mapping[str, str]
    fingerprint: str
    """Identity of the source."""
    described: Mapping[str, Any] = field(default_factory=dict)
    """More about the source, for people."""

    @property
    def identity(self) -> str:
        """Of everything that the written files depend on."""
        layout = [(shard.name, *((n, *shape, str(kind)) for n, (shape, kind) in shard.outputs.items()))
                  for shard in self.shards]  # fmt: skip
        text = json.dumps([CONVERTER, self.name, self.fingerprint, sorted(self.formats.items()), layout])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.contents)


def plan_network(component: Component, recipe: Recipe, precision: str, shard_bytes: int | None = None) -> Network:
    """What a recipe makes of a network, from its headers alone.

    Raises:
        UsageError: the recipe fits none of its linears.
    """
    formats = formats_of(recipe, build_on_meta(component), component.name)
    contents: dict[Path, list[TensorInfo]] = {file: [] for file in component.files}
    for info in component.tensors.values():
        contents[info.file].append(info)
    for infos in contents.values():
        infos.sort(key=lambda info: info.offset)
    items = [_item(info, formats) for infos in contents.values() for info in infos]
    if shard_bytes is None:  # two shards are in memory at once: no more than two of the source
        shard_bytes = min(streaming.SHARD, max(file.stat().st_size for file in contents))
    return Network(
        component.name, tuple(plan_shards(items, STEMS[component.name], shard_bytes)),
        {file: tuple(infos) for file, infos in contents.items()}, precision, recipe, formats, component.fingerprint,
    )  # fmt: skip


def converted_bytes(component: Component, recipe: Recipe) -> int:
    """The bytes of a network's tensors after a conversion, from its configuration, names and shapes alone."""
    formats = formats_of(recipe, build_on_meta(component), component.name)
    return sum(_item(info, formats).output_bytes for info in component.tensors.values())


def _item(info: TensorInfo, formats: Mapping[str, str]) -> Item:
    path, _, leaf = info.stored_name.rpartition(".")
    spec = (info.shape, torch_type(info.dtype))
    if path in formats and leaf == "weight":
        return streaming.quantized(path, info.file, spec, formats[path])
    return streaming.kept(info.stored_name, info.file, spec)


# --- what is there already ----------------------------------------------------------------------------------------


@dataclass
class State:
    """What conversion.json holds: which conversion is under way, and the hashes of sources that were read whole."""

    path: Path
    identity: dict[str, str]
    hashes: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    """A recipe that was measured, by what was asked for: a second measurement could differ in a digit."""

    def save(self) -> None:
        values = {"solostep_conversion": CONVERTER, "identity": self.identity, "sha256": self.hashes}
        write_json(self.path, values | {"asked": self.asked})

    @classmethod
    def read(cls, out: Path) -> State | None:
        path = out / STATE
        if not path.exists():
            return None
        values = read_json(path)
        try:
            return cls(path, dict(values["identity"]), dict(values["sha256"]), dict(values["asked"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} is damaged; delete the folder and start again.") from None


def _is_of(out: Path, networks: Sequence[Network]) -> bool:
    """Whether ``out`` was finished as the conversion of exactly these networks."""
    if (out / STATE).exists():
        return False
    for network in networks:
        found = read_quantization(out / network.name)
        if found is None or found.source.get("fingerprint") != network.fingerprint:
            return False
        if dict(found.modules) != dict(network.formats):
            return False
    return True


def _is_whole(out: Path) -> bool:
    try:
        open_model(out)
    except CheckpointError:
        return False
    return True


def _open_state(out: Path, networks: Sequence[Network], rest: Rest, ours: bool) -> State:
    """The state of this conversion, new or from an earlier run of it.

    Raises:
        UsageError: the folder holds something else, or another conversion.
    """
    copied = sorted([str(copy.target.relative_to(out)), copy.size] for copy in rest.copies)
    identity = {network.name: network.identity for network in networks}
    identity["rest"] = hashlib.sha256(json.dumps([copied, str(rest.shared)]).encode()).hexdigest()[:32]
    state = State.read(out) if out.exists() else None
    if state is None:
        if out.exists() and any(out.iterdir()) and not ours:
            what = "is another conversion" if any(out.glob(f"*/{QUANTIZATION_FILE}")) else "is not empty"
            raise UsageError(f"-o {out} {what}; give the name of a new folder, or delete it.")
        return State(out / STATE, identity)
    changed = sorted(key for key in state.identity.keys() | identity if state.identity.get(key) != identity.get(key))
    if changed:
        what = {"rest": "what is copied or linked"}.get(changed[0], f"the {changed[0]}, its formats or its source")
        raise UsageError(
            f"-o {out} holds an unfinished conversion that differs in {what}; "
            "repeat its command to finish it, delete the folder, or give another one."
        )
    return state


# --- the conversion -----------------------------------------------------------------------------------------------


def write_model(
    model: ModelFolder,
    out: Path,
    networks: Sequence[Network],
    device: torch.device,
    link: bool = False,
    progress: Progress | None = None,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes ``networks`` and the rest of ``model`` to ``out``; goes on with what a stopped call of the same left.

    Args:
        asked: kept in conversion.json while it is under way.

    Returns:
        A record: ``output``, ``already_finished``, ``seconds``, ``unlinked``, and for each network its precision,
        bytes, shards and the source's bytes.

    Raises:
        UsageError: the folder is something else, or another process works on it; nothing was begun.
        CheckpointError: a source file is damaged or changed.
        OutputError: the folder cannot be written, or its disk is full; finished shards are kept.
    """
    start = time.perf_counter()
    say = progress or (lambda stage, done, total: None)
    rest = plan_rest(model, out, [network.name for network in networks], link)
    record: dict[str, Any] = {"output": str(out), "already_finished": True, "unlinked": list(rest.unlinked)}
    record["networks"] = {network.name: _described(network) for network in networks}
    ours = _is_of(out, networks)
    if ours and _is_whole(out):
        return record
    with contextlib.ExitStack() as held, readable_errors(out):
        lock(out, cache_dir() / "locks", held)
        state = _open_state(out, networks, rest, ours)
        state.asked |= asked or {}
        _remove_leftovers(out, networks)
        todo = {n.name: [s for s in n.shards if not is_finished(out / n.name, s, n.identity)] for n in networks}
        missing = sum(shard.nbytes for shards in todo.values() for shard in shards)
        missing += sum(copy.size for copy in rest.copies if not copy.is_done)
        check_space(out, missing + (16 << 20))  # headers and small files
        for network in networks:
            (out / network.name).mkdir(parents=True, exist_ok=True)
        state.save()
        copy_files(rest.copies, say)
        with Digests(state.hashes, state.save) as digests:
            for network in networks:
                _convert(network, todo[network.name], out, device, digests, say)
                record["networks"][network.name]["kept_shards"] = len(network.shards) - len(todo[network.name])
        _finish(model, out, networks, rest, state)
    return record | {"already_finished": False, "seconds": round(time.perf_counter() - start, 3)}


def _remove_leftovers(out: Path, networks: Sequence[Network]) -> None:
    """Deletes what a killed conversion was writing: gigabytes, which are needed now."""
    for part in out.rglob(".*.part"):
        part.unlink()
    for network in networks:
        for part in (out / network.name).glob(".tmp*"):  # safetensors' own temporary file, beside the one it is to be
            part.unlink()


def _described(network: Network) -> dict[str, Any]:
    return {
        "precision": network.precision, "shards": len(network.shards), "bytes": network.nbytes,
        "source_bytes": network.source_bytes,
    }  # fmt: skip


def _source(
    network: Network, pending: Mapping[str, Item], device: torch.device, digests: Digests
) -> Generator[tuple[Item, Tensor], None, None]:
    """The items that are still to be made, with their tensors on the device, file by file."""
    for file, infos in network.contents.items():
        follower = digests.follow(f"{network.name}/{file.name}", file)
        wanted = [info for info in infos if info.stored_name in pending]
        tensors = read_infos(wanted, device)
        for info in wanted:
            yield pending[info.stored_name], next(tensors)
            if follower is not None:
                follower.reached(info.offset + pending[info.stored_name].nbytes)
        next(tensors, None)  # the reader's last look at the file
        if follower is not None:
            follower.reached(math.inf)


def _convert(
    network: Network, todo: Sequence[Shard], out: Path, device: torch.device, digests: Digests, say: Progress
) -> None:
    """Makes the shards that are missing."""
    pending = {item.name: item for shard in todo for item in shard.items}
    total = sum(item.nbytes for item in pending.values())
    with ShardWriter(out / network.name, todo, network.identity) as writer:
        with contextlib.closing(_source(network, pending, device, digests)) as source:
            streaming.stream(source, writer.take, lambda done: say(f"quantize {network.name}", done, total))


def _finish(model: ModelFolder, out: Path, networks: Sequence[Network], rest: Rest, state: State) -> None:
    """The files that make a folder of shards a model, those that say so last."""
    for network in networks:
        write_json(out / network.name / f"{STEMS[network.name]}.safetensors.index.json", index(network.shards))
    write_json(out / "model_index.json", rest.index)
    for network in networks:
        write_json(out / network.name / QUANTIZATION_FILE, _manifest(model, network, state))
    state.path.unlink()
    open_model(out)


def _manifest(model: ModelFolder, network: Network, state: State) -> dict[str, Any]:
    name = Path(model.source).name if Path(model.source).is_absolute() else model.source
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": state.hashes[f"{network.name}/{file.name}"]}
        for file in network.contents
    }
    source = {"model": name, "fingerprint": network.fingerprint, **network.described, "files": files}
    return {
        "solostep_quantization": VERSION, "precision": network.precision, "recipe": network.recipe.as_dict(),
        "modules": dict(network.formats), "source": source,
        "versions": {"solostep": __version__, "torch": torch.__version__},
    }  # fmt: skip


@contextlib.contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    kept = "finished shards are kept, and the same command goes on from them"
    try:
        yield
    except ConversionError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"The disk of {out} is full: {kept} when there is room.") from error
        where = error.filename or out
        raise OutputError(f"{where} cannot be read or written ({error.strerror or error}): {kept}.") from error
