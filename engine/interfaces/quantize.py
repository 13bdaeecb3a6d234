"""The commands that write models: quantized folders, and ComfyUI's FP8 files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..progress import ConsoleProgress
from ..units import size
from .console import console, guarded, say

Model = Annotated[str, typer.Argument(help="A model folder, a Hugging Face id, or t2v, turbo, ti2v. Never written to.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="The new model folder.")]
Device = Annotated[
    str | None, typer.Option(help="Where weights are quantized: cpu, cuda, cuda:1. Default: the first CUDA card.")
]
Link = Annotated[
    bool,
    typer.Option("--link", help="Refer to the networks that stay as they are where they lie, instead of copying them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record (JSON) on stdout instead of the path.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(quantize)
    app.command(name="import-comfy")(import_comfy)
    app.command(name="export-comfy")(export_comfy)


@guarded
def quantize(
    model: Model,
    output: Folder,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the transformer: int8, fp8, int8-weight, fp8-weight, nf4, int4-weight; bf16 leaves it as it is. "
            "Default: int8."
        ),
    ] = None,
    text_precision: Annotated[
        str | None, typer.Option(help="Of the text encoder Step-LLM, likewise. Default: it is left as it is.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="In place of --precision: a JSON file that says which linear gets which format, or auto:0.02, which "
            "measures the cheapest one with at most that error."
        ),
    ] = None,
    device: Device = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized copy of a model, to be used like the original. Stopped, the same command goes on.

    Tensors are streamed: host memory stays under two of the source's files plus 2 GB, whatever the model's size.
    """
    from ..convert import quantize_model

    with ConsoleProgress(console) as progress:
        record = quantize_model(model, output, precision, text_precision, recipe, device, link, progress)
    _tell(record, as_json)


@guarded
def import_comfy(
    file: Annotated[Path, typer.Argument(help="One .safetensors file of a Step-Video DiT in FP8.")],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The model that configuration, text encoders and VAE are taken from.")
    ],
    output: Folder,
    precision: Annotated[
        str | None,
        typer.Option(help="fp8 or fp8-weight (products in bf16). Default: what the file asks for, else fp8-weight."),
    ] = None,
    link: Link = False,
    as_json: AsJson = False,
) -> None:
    """Make a model folder from a ComfyUI file of FP8 weights, whose bytes are kept."""
    from ..comfy import import_comfy as work

    with ConsoleProgress(console) as progress:
        record = work(file, base, output, precision, link, progress)
    _tell(record, as_json)


@guarded
def export_comfy(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    prefix: Annotated[str, typer.Option(help="Put before every name, such as model.diffusion_model.")] = "",
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the DiT as one FP8 file in ComfyUI's scaled_fp8 layout (e4m3, one scale for each matrix)."""
    from ..comfy import export_comfy as work

    with ConsoleProgress(console) as progress:
        record = work(model, output, prefix, device, overwrite, progress)
    _tell(record, as_json)


def _tell(record: dict[str, Any], as_json: bool) -> None:
    if record.get("already_finished"):
        say(console, "note", f"{record['output']} is already finished; there is nothing to do.")
    for name, network in record.get("networks", {}).items():
        sizes = f"{size(network['source_bytes'])} became {size(network['bytes'])}"
        say(console, "note", f"{name} in {network['precision']}: {sizes}.")
    if record.get("unlinked"):
        say(
            console, "note",
            f"{', '.join(record['unlinked'])}: copied, not linked; a model can refer to one other folder only.",
        )  # fmt: skip
    print(json.dumps(record, ensure_ascii=False) if as_json else record["output"], flush=True)
