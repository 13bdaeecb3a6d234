"""The command line. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 2 wrong use (nothing was started), 1 failed (what was computed is kept; the message says where).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config import FPS, MODES
from ..errors import SolostepError, UsageError
from ..progress import ConsoleProgress
from .console import console, guarded, say
from .doctor import register as register_doctor
from .outputs import free_name, latents_beside, read_prompts, slug
from .plan import register as register_plan
from .plugins import Commands
from .quantize import register as register_quantize
from .sensitivity import register as register_sensitivity

if TYPE_CHECKING:
    from ..pipeline import PlanShown, StepVideoPipeline
    from ..plan import Plan
    from ..request import Request

app = typer.Typer(
    name="solostep",
    help="Step-Video, the 30-billion-parameter text-to-video model, on one graphics card.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Commands,
)
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help="A model folder, a Hugging Face id (stepfun-ai/stepvideo-t2v), or t2v, turbo, ti2v, demo. "
        "Default: the small embedded demo model (moving shapes), which also takes --image.",
    ),
]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File to write (a folder with --prompts). Default: a name from the prompt."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="What the transformer runs in. Default: what the folder is stored in, else bf16.\n\n\b\n"
        + "\n".join(f"{name}: {meaning}" for name, meaning in MODES.items())
        + "\ntorchao:NAME, bnb:NAME: of other packages",
    ),
]
TextPrecision = Annotated[
    str | None,
    typer.Option(help="What the text encoder Step-LLM runs in, likewise. Embeddings are kept on disk for each."),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="In place of --precision: a JSON file that says which linear gets which format, or auto:0.02, which "
        "measures the cheapest one with at most that error; measuring takes its time.",
    ),
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help="How blocks are computed: official, or by fused kernels with attention in bf16, int8 or int8-fp8 (the "
        "fastest). Default: official on a CPU and in fp32; on a card int8 with int8 and fp8 linears, else bf16.",
    ),
]
AttentionBackend = Annotated[
    str | None, typer.Option(help="What computes attention. Default: the fastest that is right here; see doctor.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: the first CUDA card, else the CPU.")]
Vram = Annotated[
    str | None,
    typer.Option(
        help="Memory of the card to stay in, such as 24GB or 24G (10^9 bytes each; GiB: 2^30): the rest of the model "
        "waits outside. Costs host memory, and time where a clip is short. Default: $SOLOSTEP_VRAM, else what is free. "
        "See `solostep plan`."
    ),
]
HostRam = Annotated[
    str | None,
    typer.Option(
        "--host-ram",
        help="Memory of the host to stay in, likewise; with little of it, blocks come from their files, at the disk's "
        "speed. On a CPU only together with --vram. Default: $SOLOSTEP_HOST_RAM, else what is free.",
    ),
]
PresetName = Annotated[
    str | None, typer.Option(help="Defaults to use: t2v, turbo or ti2v. Needed only if the model's name hides it.")
]
Codec = Annotated[str, typer.Option(help="h264, h265, av1, lossless (large), or png (a folder of pictures).")]
Quality = Annotated[
    float | None, typer.Option(min=0, max=100, help="0 to 100; higher is better and larger. Default: by codec.")
]
Fps = Annotated[float, typer.Option(min=1, max=240, help="Frames a second of the file; the model is made for 25.")]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Leave prompt, seed and settings out of the video file.")
]
Postprocess = Annotated[
    bool,
    typer.Option(
        "--official-postprocess", help="Crop to 540p and denoise over time, as the official program does. Loses detail."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record (JSON) on stdout instead of the path.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are already there.")]


@app.command()
@guarded
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows. English or Chinese.")] = None,
    model: Model = None,
    output: Output = None,
    image: Annotated[
        Path | None, typer.Option(help="First frame: makes it image-to-video (needs an image-to-video model).")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, a line or a JSON object each. Finished ones are passed over."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the video must not show.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a video. Default: drawn, and recorded.")] = None,
    frames: Annotated[int | None, typer.Option(help="Rounded down to a multiple of 17. Cost grows faster.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, rounded down to a multiple of 16.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, rounded down to a multiple of 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; time grows with them.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt. At 1 or less: half the time, looser.")
    ] = None,
    time_shift: Annotated[float | None, typer.Option(help="Spends more steps on the noisy end when higher.")] = None,
    motion_score: Annotated[float | None, typer.Option(help="Image-to-video: amount of motion, 2 to 20.")] = None,
    num_videos: Annotated[int, typer.Option(min=1, help="Videos of this prompt, seeds seed, seed + 1, ...")] = 1,
    raw_prompt: Annotated[
        bool, typer.Option("--raw-prompt", help="Leave out the official additions to prompt and negative prompt.")
    ] = False,
    precision: Precision = None,
    text_precision: TextPrecision = None,
    recipe: RecipeOption = None,
    attention: AttentionOption = None,
    attention_backend: AttentionBackend = None,
    device: Device = None,
    vram: Vram = None,
    host_ram: HostRam = None,
    preset: PresetName = None,
    codec: Codec = "h264",
    quality: Quality = None,
    fps: Fps = FPS,
    official_postprocess: Postprocess = False,
    no_metadata: NoMetadata = False,
    overwrite: Overwrite = False,
    keep_loaded: Annotated[
        bool, typer.Option("--keep-loaded", help="Many videos: keep networks in memory between them, if it is there.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do not keep prompt embeddings on disk.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a video from a prompt. Stopped at any moment, the same command goes on where it was."""
    if (prompt is None) == (prompts is None):
        raise UsageError("Give either a PROMPT or --prompts FILE.")
    asked = read_prompts(prompts) if prompts is not None else [{"prompt": prompt}]
    _check_writing(codec, quality)
    common = {
        "negative_prompt": negative, "image": None if image is None else str(image), "seed": seed,
        "num_frames": frames, "height": height, "width": width, "num_inference_steps": steps,
        "guidance_scale": guidance, "time_shift": time_shift, "motion_score": motion_score, "raw_prompt": raw_prompt,
    }  # fmt: skip
    wanted = _wanted(asked, common, num_videos)
    if output is not None and prompts is None:
        for values in wanted:
            _check_output(_numbered(output, values["behind"]), codec)
    from ..demo import demo_model
    from ..hub import DEMO
    from ..pipeline import StepVideoPipeline

    if model is None or model == DEMO:
        model = str(demo_model(image_to_video=any(values["settings"]["image"] is not None for values in wanted)))
    pipe = StepVideoPipeline.from_pretrained(
        model, precision, device, text_precision=text_precision, recipe=recipe, attention=attention,
        attention_backend=attention_backend, preset=preset, keep_loaded=keep_loaded, cache=not no_cache, vram=vram,
        host_ram=host_ram,
    )  # fmt: skip
    planned = _plan(pipe, wanted, output, prompts is not None, codec, overwrite)
    write = {
        "codec": codec, "quality": quality, "fps": fps, "official_postprocess": official_postprocess,
        "metadata": not no_metadata,
    }  # fmt: skip
    _run(pipe, planned, write, overwrite, as_json)


def _check_writing(codec: str, quality: float | None) -> None:
    from ..video import CODECS

    if codec not in CODECS:
        raise UsageError(f"--codec {codec} is unknown; choose one of {', '.join(CODECS)}.")
    if quality is not None and codec in ("lossless", "png"):
        raise UsageError(f"--quality does not go with --codec {codec}, which loses nothing.")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Puts the line of a file of prompts in front of what is wrong with it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None


def _wanted(asked: list[dict[str, Any]], common: dict[str, Any], num_videos: int) -> list[dict[str, Any]]:
    """One entry a video, with everything checked that can be told before a model is found, or downloaded."""
    from ..request import check_asked

    wanted = []
    for number, line in enumerate(asked, 1):
        settings = common | {k: v for k, v in line.items() if k not in ("output", "where")}
        for n in range(num_videos):
            mine = dict(settings)
            if n and isinstance(mine["seed"], int):
                mine["seed"] += n
            where = line.get("where", "")
            with _named(where):
                check_asked(**mine)
            behind = f"-{n + 1}" if num_videos > 1 else ""
            wanted.append(
                {"settings": mine, "output": line.get("output"), "number": number, "behind": behind, "where": where}
            )
    return wanted


def _numbered(path: Path, behind: str) -> Path:
    return path.with_name(path.stem + behind + path.suffix) if behind and path.name else path


def _check_output(path: Path, codec: str, size: tuple[int, int] | None = None) -> None:
    from ..video import check_output

    if path.is_dir() and codec != "png":
        raise UsageError(f"--output {path} is a folder; give the name of a file.")
    check_output(path, codec, size)


def _plan(
    pipe: StepVideoPipeline,
    wanted: list[dict[str, Any]],
    output: Path | None,
    in_folder: bool,
    codec: str,
    overwrite: bool,
) -> list[tuple[Request, Path, bool]]:
    """Every request with its output file, and whether it is already there; all checks before any work."""
    requests = []
    for values in wanted:
        with _named(values["where"]):
            requests.append(pipe.request(**values["settings"]))
    folder, made = Path("."), False
    if in_folder:
        folder = output or Path("videos")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output {folder} is a file; with --prompts it is the folder for the videos.")
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {folder} cannot be made ({error.strerror}); choose another folder.") from None
    try:
        return _placed(pipe, wanted, requests, output, folder if in_folder else None, codec, overwrite)
    except SolostepError:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _placed(
    pipe: StepVideoPipeline,
    wanted: list[dict[str, Any]],
    requests: list[Request],
    output: Path | None,
    folder: Path | None,
    codec: str,
    overwrite: bool,
) -> list[tuple[Request, Path, bool]]:
    suffix = {"png": ""}.get(codec, ".mp4")
    planned = []
    for values, request in zip(wanted, requests, strict=True):
        stem, behind = slug(values["settings"]["prompt"]), values["behind"]
        if folder is not None and values["output"] is not None:
            path = _numbered(folder / values["output"], behind)
        elif folder is not None:
            path = folder / f"{values['number']:04d}-{stem}{behind}{suffix}"
        elif output is not None:
            path = _numbered(output, behind)
        else:
            path = _default_path(pipe, request, stem + behind, suffix)
        with _named(values["where"]):
            planned.append(_place(pipe, request, path, codec, overwrite))
    doubled = [p for _, p, _ in planned if sum(p == other for _, other, _ in planned) > 1]
    if doubled:
        raise UsageError(f"{doubled[0]} is the output of more than one prompt; give each its own.")
    return planned


def _with_path(request: Request, path: Path) -> Request:
    from dataclasses import replace

    return replace(request, latents_path=latents_beside(path))


def _default_path(pipe: StepVideoPipeline, request: Request, stem: str, suffix: str) -> Path:
    """A new name from the prompt, or the one of an unfinished run of the same request."""
    from ..latents import holds_finished

    def usable(path: Path) -> bool:
        try:
            return pipe.is_finished(_with_path(request, path)) or not holds_finished(latents_beside(path))
        except UsageError:  # the latents beside it belong to another, unfinished run
            return False

    return free_name(Path("."), stem, suffix, usable)


def _place(
    pipe: StepVideoPipeline, request: Request, path: Path, codec: str, overwrite: bool
) -> tuple[Request, Path, bool]:
    from ..latents import holds_finished

    _check_output(path, codec, (request.settings.width, request.settings.height))
    request = _with_path(request, path)
    finished = pipe.is_finished(request)
    if path.exists() and not overwrite:
        if not finished:
            raise UsageError(
                f"{path} is already there and of another generation; add --overwrite or choose another -o."
            )
        return request, path, True
    latents = latents_beside(path)
    if not finished and not overwrite and holds_finished(latents):
        raise UsageError(
            f"{latents} holds the finished latents of another generation; make its video with "
            f"`solostep decode {latents}`, add --overwrite, or choose another -o."
        )
    return request, path, False


def _run(
    pipe: StepVideoPipeline,
    planned: list[tuple[Request, Path, bool]],
    write: dict[str, Any],
    overwrite: bool,
    as_json: bool,
) -> None:
    from ..request import video_metadata
    from ..video import VideoWriter

    for note in dict.fromkeys(note for request, _, _ in planned for note in request.settings.notes):
        say(console, "note", note)
    if pipe.model.note:
        say(console, "note", pipe.model.note)
    for _, path, there in planned:
        if there:
            say(console, "note", f"{path} is already finished; --overwrite makes it anew.")
            _print_result(path, None, as_json)
    todo = [(request, path) for request, path, there in planned if not there]

    def writer(i: int, metadata: dict[str, Any]) -> VideoWriter:
        request, path = todo[i]
        return VideoWriter(
            path, request.settings.width, request.settings.height, fps=write["fps"], codec=write["codec"],
            quality=write["quality"], metadata=metadata if write["metadata"] else None,
            official_postprocess=write["official_postprocess"],
        )  # fmt: skip

    def open_sink(i: int, request: Request, record: dict[str, Any]) -> VideoWriter:
        return writer(i, video_metadata(record))

    for i, (request, _) in enumerate(todo):  # what a writer refuses is refused before the work, too long prompts too
        writer(i, {**request.asked, "room for settings and versions": " " * 2000})
    if not todo:
        return
    for request, _ in todo:
        if overwrite and request.latents_path is not None and pipe.is_finished(request):
            request.latents_path.unlink()  # else it would only be decoded anew
    with ConsoleProgress(console) as progress:
        shown = None if as_json else _show_plan(pipe)
        results = pipe.generate([request for request, _ in todo], open_sink, progress=progress, planned=shown)
        for i, (_, path) in enumerate(todo):
            if len(todo) > 1:
                progress.label = f"[{i + 1}/{len(todo)}] "
            record, _ = next(results)
            _print_result(path, record | {"output": str(path)}, as_json)


def _show_plan(pipe: StepVideoPipeline) -> PlanShown:
    """Says in a line what a run is going to take; plans that are alike once."""
    from ..forecast import plan_line

    said: set[str] = set()

    def show(plan: Plan) -> None:
        line = plan_line(plan, pipe.vram is not None)
        if line not in said:
            said.add(line)
            say(console, "plan", line)

    return show


def _print_result(path: Path, record: dict[str, Any] | None, as_json: bool) -> None:
    if not as_json:
        print(path, flush=True)
        return
    if record is None:
        from ..video import read_metadata

        record = {"output": str(path), "already_finished": True, **(read_metadata(path) or {})}
    print(json.dumps(record, ensure_ascii=False), flush=True)


@app.command()
@guarded
def decode(
    latents: Annotated[Path, typer.Argument(help="A file of latents, finished or not (unfinished ones look noisy).")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in generate. Default: the model that made the latents.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: beside the latents.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the VAE: bf16 or fp32. Default: fp32 after a run in fp32, else bf16."),
    ] = None,
    device: Device = None,
    vram: Vram = None,
    host_ram: HostRam = None,
    codec: Codec = "h264",
    quality: Quality = None,
    fps: Fps = FPS,
    official_postprocess: Postprocess = False,
    no_metadata: NoMetadata = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make the video of saved latents, with no denoising."""
    from ..latents import SUFFIX, read_latents
    from ..pipeline import StepVideoPipeline
    from ..request import video_metadata
    from ..runtime import pick_dtype
    from ..video import VideoWriter

    saved = read_latents(latents)
    if not {"settings", "model", "precision"} <= set(saved.info):
        raise UsageError(f"{latents} lacks the settings that it was made with; give a file that solostep wrote.")
    _check_writing(codec, quality)
    precision = precision or ("fp32" if saved.info["precision"] == "fp32" else "bf16")
    pick_dtype(precision)
    if output is None:
        output = latents.with_name(latents.name.removesuffix(SUFFIX) + ("" if codec == "png" else ".mp4"))
    settings = saved.info["settings"]
    _check_output(output, codec, (settings["width"], settings["height"]))
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is already there; add --overwrite or choose another -o.")
    pipe = StepVideoPipeline.from_pretrained(model or saved.info["model"], None, device, vram=vram, host_ram=host_ram)
    if not saved.finished:
        say(console, "note", f"{latents} is from step {saved.step} of {saved.steps}: the video will look noisy.")

    def open_sink(i: int, request: Request, record: dict[str, Any]) -> VideoWriter:
        return VideoWriter(
            output, settings["width"], settings["height"], fps=fps, codec=codec, quality=quality,
            metadata=None if no_metadata else video_metadata(record), official_postprocess=official_postprocess,
        )  # fmt: skip

    with ConsoleProgress(console) as progress:
        record = pipe.decode(saved, open_sink, progress, precision)
    _print_result(output, record | {"output": str(output)}, as_json)


@app.command()
@guarded
def info(
    model: Annotated[str | None, typer.Argument(help="A model folder or Hugging Face id. Default: the demo.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model folder holds: networks, sizes, types, and what is missing or damaged (then exit code 1)."""
    from ..checkpoint import describe

    if model is None:
        from ..demo import demo_model

        model = str(demo_model())
    found = describe(model)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        from .tables import info_table

        info_table(Console(emoji=False), found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
@guarded
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of golden cases (.safetensors with 'component' metadata).")],
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or all.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Run golden cases from the official code against this installation. Exit code 1 if any is over its limit."""
    from ..golden import verify_folder

    if dtype not in ("fp32", "bf16", "all"):
        raise UsageError(f"--dtype {dtype} is unknown; choose fp32, bf16 or all.")
    results = verify_folder(folder, device, ("fp32", "bf16") if dtype == "all" else (dtype,))
    if as_json:
        print(json.dumps([r.as_dict() for r in results], ensure_ascii=False, indent=2))
    else:
        from .tables import verify_table

        verify_table(Console(emoji=False), results)
    if any(not r.passed for r in results):
        raise typer.Exit(1)


register_quantize(app)
register_sensitivity(app)
register_doctor(app)
register_plan(app)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("solostep"))
        raise typer.Exit


def main() -> None:
    """Entry point of ``solostep`` and ``python -m solostep``."""
    app(prog_name="solostep", args=sys.argv[1:])
