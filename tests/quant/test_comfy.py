"""ComfyUI's FP8 files: every layout is read right, what is written comes back bit for bit, and the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from solostep import StepVideoPipeline
from solostep.engine.checkpoint import describe, load, open_model
from solostep.engine.comfy import export_comfy, import_comfy
from solostep.engine.convert import quantize_model
from solostep.engine.errors import CheckpointError, UsageError
from solostep.engine.interfaces import cli
from solostep.quant.comfy import e5m2_to_e4m3, measure_cast, quantize_tensor, read_comfy
from solostep.quant.linear import QuantizedLinear

pytestmark = pytest.mark.usefixtures("fast")

T2V = Path(__file__).parents[1] / "golden" / "tiny-stepvideo-t2v"
COMMAND = typer.main.get_command(cli.app)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = "transformer_blocks.0.attn1.wqkv"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))


def original() -> Tensors:
    return {k: t for f in (T2V / "transformer").glob("*.safetensors") for k, t in load_file(f).items()}


def linears() -> list[str]:
    """The paths of the linears inside the blocks."""
    return [
        name.removesuffix(".weight")
        for name, t in original().items()
        if name.startswith("transformer_blocks.") and t.ndim == 2 and name.endswith(".weight")
    ]


def by_hand(
    path: Path, layout: str, prefix: str = "", full: bool = True, dtype: torch.dtype = E4M3,
    change: Callable[[Tensors], object] | None = None,
) -> Tensors:  # fmt: skip
    """Writes a file in a layout, from the tiny transformer; returns the weights that it stands for, fp32."""
    tensors: Tensors = {}
    meant: Tensors = {}
    layers = {}
    for name, t in original().items():
        module = name.removesuffix(".weight")
        if module not in linears():
            tensors[prefix + name] = meant[name] = t
            continue
        scale = t.float().abs().max() / torch.finfo(dtype).max
        q = (t.float() / scale).to(dtype)
        meant[name] = q.float() * scale
        tensors[prefix + name] = q
        conf = {"format": "float8_e4m3fn" if dtype == E4M3 else "float8_e5m2"}
        conf |= {"full_precision_matrix_mult": True} if full else {}
        if layout == "scaled_fp8":
            tensors[f"{prefix}{module}.scale_weight"] = scale
            tensors[f"{prefix}{module}.scale_input"] = torch.tensor([1.0])
        else:
            tensors[f"{prefix}{module}.weight_scale"] = scale.view(1)
            tensors[f"{prefix}{module}.input_scale"] = torch.tensor(0.5)
            layers[prefix + module] = conf
        if layout == "comfy_quant":
            text = json.dumps(conf).encode()
            tensors[f"{prefix}{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        if layout == "bytes":
            tensors[prefix + name] = q.view(torch.uint8)
    if layout == "scaled_fp8":
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2 if full else 0, dtype=dtype)
    if change is not None:
        change(tensors)
    told = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(tensors, path, told if layout in ("metadata", "bytes") else None)
    return meant


def weights(folder: Path) -> Tensors:
    """What the stored transformer of a folder stands for, fp32."""
    network = load(open_model(folder).components["transformer"], "cpu", torch.float32)
    found = dict(network.named_parameters())
    for path, part in network.named_modules():
        if isinstance(part, QuantizedLinear):
            found.pop(f"{path}.weight_scale")
            found[f"{path}.weight"] = part.dequantized()
    return found


def stored(folder: Path) -> Tensors:
    return {k: t for f in (folder / "transformer").glob("*.safetensors") for k, t in load_file(f).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("scaled_fp8", ""), ("scaled_fp8", "model.diffusion_model."), ("scaled_fp8", "diffusion_model."),
        ("comfy_quant", ""), ("comfy_quant", "model.diffusion_model."), ("metadata", ""), ("bytes", "diffusion_model."),
    ],
)  # fmt: skip
def test_every_layout_is_read(layout: str, prefix: str, tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    meant = by_hand(file, layout, prefix)
    record = import_comfy(file, T2V, out)
    assert record["layout"] == ("scaled_fp8" if layout == "scaled_fp8" else "comfy_quant")
    assert describe(out)["problems"] == []
    found, tensors = weights(out), load_file(file)
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor.float()), name
    for name, tensor in stored(out).items():
        if not name.endswith(".weight_scale"):
            assert same_bytes(tensor, tensors[prefix + name]), name
    quantization = open_model(out).components["transformer"].quantization
    assert quantization.precision == "fp8-weight" and set(quantization.modules.values()) == {"fp8-weight"}
    assert set(quantization.modules) == set(linears())
    assert quantization.source["file"] == "dit.safetensors" and list(quantization.source["files"]) == [file.name]


def test_the_file_says_how_its_products_are_computed(tmp_path: Path) -> None:
    file = tmp_path / "dit.safetensors"
    for layout in ("scaled_fp8", "comfy_quant"):
        by_hand(file, layout, full=False)
        for asked, expected in ((None, "fp8"), ("fp8-weight", "fp8-weight")):
            out = tmp_path / f"{layout}-{expected}"
            import_comfy(file, T2V, out, asked)
            quantization = open_model(out).components["transformer"].quantization
            assert quantization.precision == expected and quantization.modules[ONE] == expected
            # Text keys and values stay out of 8-bit products, as in the recipe of fp8.
            assert quantization.modules["transformer_blocks.0.attn2.wkv"] == "fp8-weight"


def test_a_plain_cast_is_read_and_what_it_lost_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything cast, norms and all, as such files are."""
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    cast = {name: t.float().clamp(-448, 448).to(E4M3) for name, t in original().items()}
    save_file(cast, file)
    assert import_comfy(file, T2V, out)["layout"] == "plain"
    found = weights(out)
    for name, tensor in cast.items():
        assert torch.equal(found[name], tensor.float()), name
    tensors = stored(out)
    assert tensors[f"{ONE}.weight"].dtype == E4M3 and torch.all(tensors[f"{ONE}.weight_scale"] == 1)
    assert tensors["proj_out.weight"].dtype == torch.bfloat16
    message = next(r.getMessage() for r in caplog.records if "cast to e4m3 without scales" in r.getMessage())
    matrices = torch.cat([t.float().flatten() for t in cast.values() if t.ndim == 2])
    zero, coarse = (matrices == 0).float().mean(), ((matrices != 0) & (matrices.abs() < 2**-6)).float().mean()
    assert f"of {matrices.numel():,} weights looked at, {zero:.2%} are zero, {coarse:.1%} lie below" in message


def test_losses_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    weight = torch.full((64, 100), 1.0)
    weight[:16] = 0.0
    weight[16:24] = -(2.0**-8)
    weight[24:26] = 448.0
    weight[26] = 2.0**-6  # the smallest normal number
    for dtype, largest, coarse in ((E4M3, 448.0, 8), (E5M2, 57344.0, 0)):
        save_file({"x.weight": torch.where(weight == 448, largest, weight).to(dtype)}, file)
        for limit in (1 << 20, 6400, 800):  # all, all, and one row in eight
            loss = measure_cast(read_comfy(file, {"x.weight": (64, 100)}), limit)
            assert loss.seen == (800 if limit == 800 else 6400)
            if limit > 800:
                assert (loss.zero, loss.coarse, loss.clipped) == (16 / 64, coarse / 64, 2 / 64)
    assert loss.zero == 2 / 8


@pytest.mark.parametrize("layout", ["plain", "scaled_fp8", "comfy_quant"])
def test_e5m2_becomes_e4m3_with_the_same_numbers(layout: str, tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    if layout == "plain":
        meant = {name: t.to(E5M2) for name, t in original().items()}
        save_file(meant, file)
    else:
        meant = by_hand(file, layout, dtype=E5M2)
    import_comfy(file, T2V, out)
    found = weights(out)
    for name, tensor in meant.items():
        if layout == "plain" or name.removesuffix(".weight") not in linears():
            assert torch.equal(found[name], tensor.float()), name
        else:  # the last bit of the scale, and numbers far below their row's largest
            least = found[name].abs().amax(1, keepdim=True) * 2.0**-17
            assert bool(((found[name] - tensor).abs() <= least + 3e-7 * tensor.abs()).all()), name


def test_e5m2_over_the_whole_range() -> None:
    """Exact down to 2^-15 of a row's largest; rows of zeros, of one number, and of the extremes."""
    numbers = torch.arange(256, dtype=torch.uint8).view(E5M2).float()
    numbers = numbers[torch.isfinite(numbers)]
    for row in (numbers[numbers.abs() < 4], numbers, torch.zeros(8), torch.full((8,), 2.0**-16)):
        weight = torch.stack([row, -row]).to(E5M2)
        q, scale = e5m2_to_e4m3(weight)
        back = q.float() * scale[:, None]
        exact = weight.float().abs() >= weight.float().abs().amax(1, keepdim=True) * 2.0**-15
        assert torch.equal(back[exact], weight.float()[exact])
        assert bool(torch.isfinite(back).all())
    small = numbers[numbers.abs() < 4][None].to(E5M2)
    q, scale = e5m2_to_e4m3(small)
    assert torch.equal(q.float() * scale[:, None], small.float())


def test_fp8_outside_the_blocks_becomes_bf16(tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"

    def more(tensors: Tensors) -> None:
        for name in ("caption_projection.linear_1", "pos_embed.proj"):
            q, scale = quantize_tensor(tensors[f"{name}.weight"])
            tensors |= {f"{name}.weight": q, f"{name}.scale_weight": scale}
        tensors["proj_out.bias"] = tensors["proj_out.bias"].to(E4M3)  # nothing but a matrix needs a scale

    by_hand(file, "scaled_fp8", change=more)
    import_comfy(file, T2V, out)
    tensors, source = stored(out), load_file(file)
    for name in ("caption_projection.linear_1", "pos_embed.proj"):
        meant = source[f"{name}.weight"].float() * source[f"{name}.scale_weight"]
        assert torch.equal(tensors[f"{name}.weight"], meant.bfloat16())
    assert torch.equal(tensors["proj_out.bias"], source["proj_out.bias"].bfloat16())


def test_a_scale_for_each_row_is_read_too(tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    rows = torch.rand(original()[f"{ONE}.weight"].shape[0], 1)
    by_hand(file, "scaled_fp8", change=lambda t: t.update({f"{ONE}.scale_weight": rows}))
    import_comfy(file, T2V, out)
    assert torch.equal(weights(out)[f"{ONE}.weight"], load_file(file)[f"{ONE}.weight"].float() * rows)


def test_a_model_that_was_imported_makes_a_video(tmp_path: Path) -> None:
    by_hand(tmp_path / "dit.safetensors", "scaled_fp8", full=False)
    import_comfy(tmp_path / "dit.safetensors", T2V, tmp_path / "out", link=True)
    pipe = StepVideoPipeline.from_pretrained(tmp_path / "out", device="cpu")
    video = pipe("a cat", num_frames=17, height=32, width=32, num_inference_steps=1, guidance_scale=1, seed=1)
    assert pipe.precision == "fp8" and video.frames.shape == (17, 32, 32, 3)


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("scaled_fp8", drop(f"{ONE}.weight"), rf"tensor {ONE}.weight is missing"),
        ("scaled_fp8", drop("proj_out.bias"), "tensor proj_out.bias is missing"),
        ("scaled_fp8", put("vae.x", torch.ones(1)), "tensor vae.x is unknown"),
        ("scaled_fp8", put(f"{ONE}.weight", torch.ones(2, 2).to(E4M3)), rf"{ONE}.weight has shape \[2, 2\]"),
        ("scaled_fp8", drop(f"{ONE}.scale_weight"), rf"tensor {ONE}.weight is FP8 and has no scale"),
        ("comfy_quant", drop(f"{ONE}.weight_scale"), rf"tensor {ONE}.weight is FP8 and has no scale"),
        ("scaled_fp8", put(f"{ONE}.scale_weight", torch.ones(3, 2)), "has 6 scales; only one, or one for each row"),
        ("scaled_fp8", put(f"{ONE}.scale_weight", torch.tensor(-1.0)), "a scale that is negative or no number"),
        ("scaled_fp8", put(f"{ONE}.scale_weight", torch.tensor(torch.nan)), "a scale that is negative or no number"),
        ("scaled_fp8", put(f"{ONE}.weight_scale", torch.tensor(1.0)), "has two scales"),
        ("scaled_fp8", put("nothing.scale_weight", torch.tensor(1.0)), "scale or a format of nothing"),
        ("scaled_fp8", put("proj_out.scale_weight", torch.tensor(2.0)), "has a scale, which has no meaning"),
        ("scaled_fp8", put(f"{ONE}.weight", torch.ones(384, 128, dtype=torch.int8)), "stored as I8; it cannot be read"),
        ("comfy_quant", put(f"{ONE}.comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)),
         "ComfyUI's format 'nvfp4', and only float8_e4m3fn and float8_e5m2"),
        ("comfy_quant", put(f"{ONE}.comfy_quant", torch.tensor(list(b"{"), dtype=torch.uint8)), "metadata is damaged"),
        ("comfy_quant", put(f"{ONE}.weight", torch.ones(384, 128)), "as F32, though the file says float8_e4m3fn"),
        ("scaled_fp8", put(f"{ONE}.weight", torch.full((384, 128), torch.nan).to(E4M3)), "holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_is_refused(layout: str, change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "dit.safetensors"
    by_hand(file, layout, change=change)
    with pytest.raises(CheckpointError, match=message):
        import_comfy(file, T2V, tmp_path / "out")


def test_a_scale_of_one_beside_a_float_means_nothing(tmp_path: Path) -> None:
    file = tmp_path / "dit.safetensors"
    by_hand(file, "scaled_fp8", change=put("proj_out.scale_weight", torch.tensor(1.0)))
    import_comfy(file, T2V, tmp_path / "out")
    assert torch.equal(stored(tmp_path / "out")["proj_out.weight"], original()["proj_out.weight"])


def test_files_that_are_no_fp8(tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    save_file(original(), file)
    with pytest.raises(CheckpointError, match="holds no FP8 weights"):
        import_comfy(file, T2V, out)
    save_file(original() | {"proj_out.weight": original()["proj_out.weight"].to(E4M3)}, file)
    with pytest.raises(CheckpointError, match="no FP8 weights inside the transformer's blocks"):
        import_comfy(file, T2V, out)
    file.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        import_comfy(file, T2V, out)
    with pytest.raises(UsageError, match="there is no such file"):
        import_comfy(tmp_path / "nothing", T2V, out)
    with pytest.raises(UsageError, match="--precision int8 is not what FP8 files hold"):
        import_comfy(file, T2V, out, "int8")
    assert not out.exists()


def test_an_import_goes_on_and_ends(tmp_path: Path) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    by_hand(file, "scaled_fp8")

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("quantize") and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_comfy(file, T2V, out, progress=stop, shard_bytes=150_000)
    record = import_comfy(file, T2V, out, shard_bytes=150_000)
    assert record["networks"]["transformer"]["kept_shards"] > 0
    assert import_comfy(file, T2V, out, shard_bytes=150_000)["already_finished"]
    other = tmp_path / "other.safetensors"
    by_hand(other, "comfy_quant")
    with pytest.raises(UsageError, match="is another conversion"):
        import_comfy(other, T2V, out)


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_is_written(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "dit.safetensors"
    record = export_comfy(T2V, file, prefix)
    tensors, source = load_file(file), original()
    assert record["linears"] == len(linears()) and record["bytes"] == file.stat().st_size
    expected = {prefix + n for n in source} | {f"{prefix}{m}.scale_weight" for m in linears()}
    assert set(tensors) == expected | {f"{prefix}scaled_fp8"}
    marker = tensors.pop(f"{prefix}scaled_fp8")
    assert marker.dtype == E4M3 and marker.shape == (2,)
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        written = tensors[prefix + name]
        if module not in linears():
            assert written.dtype == tensor.dtype and same_bytes(written, tensor)
            continue
        scale = tensors[f"{prefix}{module}.scale_weight"]
        assert written.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == ()
        assert written.float().abs().max() == 448
        error = (written.float() * scale - tensor.float()).norm() / tensor.float().norm()
        assert error < 0.03
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_there_and_back(tmp_path: Path) -> None:
    """Our file in, and out again: the same bytes of weights, the same scales, the same file."""
    first, second, folder = tmp_path / "1.safetensors", tmp_path / "2.safetensors", tmp_path / "folder"
    export_comfy(T2V, first)
    import_comfy(first, T2V, folder)
    record = export_comfy(folder, second)
    assert record["rounded_twice"] == 0
    a, b, inside = load_file(first), load_file(second), stored(folder)
    assert a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a)
    for name in linears():
        assert same_bytes(a[f"{name}.weight"], inside[f"{name}.weight"])
        assert torch.equal(a[f"{name}.scale_weight"].expand(len(inside[f"{name}.weight_scale"])),
                           inside[f"{name}.weight_scale"])  # fmt: skip
    # What it stands for is what the file says, in whatever layer it sits.
    for name, tensor in weights(folder).items():
        scale = a.get(f"{name.removesuffix('.weight')}.scale_weight", torch.tensor(1.0))
        assert torch.equal(tensor, a[name].float() * scale)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rows_with_scales_of_their_own_are_rounded_again(
    precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize_model(T2V, tmp_path / "folder", precision)
    record = export_comfy(tmp_path / "folder", tmp_path / "x.safetensors")
    assert record["rounded_twice"] == len(linears())
    assert "rounded a second time" in caplog.text
    tensors = load_file(tmp_path / "x.safetensors")
    for name in linears():
        meant = original()[f"{name}.weight"].float()
        made = tensors[f"{name}.weight"].float() * tensors[f"{name}.scale_weight"]
        assert (made - meant).norm() / meant.norm() < 0.045


def test_zeros_and_tiny_numbers_are_scaled() -> None:
    for weight in (torch.zeros(3, 4), torch.full((3, 4), 1e-42), torch.full((3, 4), 3e38), torch.eye(4) * 1e-30):
        q, scale = quantize_tensor(weight)
        assert bool(torch.isfinite(q.float()).all()) and 0 < scale < torch.inf
        torch.testing.assert_close(q.float() * scale, weight, rtol=1e-6, atol=1e-38)


def test_exports_that_are_refused(tmp_path: Path) -> None:
    model = Path(shutil.copytree(T2V, tmp_path / "model"))
    (tmp_path / "there.safetensors").write_text("mine")
    for place, message in (
        (tmp_path / "x.gguf", "ends in .safetensors"),
        (tmp_path / "there.safetensors", "is already there; add --overwrite"),
        (model / "transformer" / "x.safetensors", "is inside the model"),
    ):
        with pytest.raises(UsageError, match=message):
            export_comfy(model, place)
    quantize_model(model, tmp_path / "nf4", "nf4", link=True)
    with pytest.raises(UsageError, match="is stored in nf4, which is too coarse"):
        export_comfy(tmp_path / "nf4", tmp_path / "x.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"


# --- the commands -------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    try:
        COMMAND.main([str(a) for a in arguments], prog_name="solostep", standalone_mode=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "dit.safetensors", tmp_path / "out"
    assert command("export-comfy", T2V, "-o", file, "--prefix", "diffusion_model.", "--device", "cpu") == 0
    assert capsys.readouterr().out.splitlines() == [str(file)]
    assert command("export-comfy", T2V, "-o", file) == 2
    assert command("import-comfy", file, "--base", T2V, "-o", out, "--link", "--json") == 0
    assert json.loads(capsys.readouterr().out)["networks"]["transformer"]["precision"] == "fp8-weight"
    save_file({name: t.to(E4M3) for name, t in original().items()}, file)
    assert command("import-comfy", file, "-b", T2V, "-o", tmp_path / "plain") == 0
    assert "note: " in (said := capsys.readouterr().err) and "cast to e4m3 without scales" in said
    assert command("import-comfy", file, "-b", T2V, "-o", tmp_path / "x", "--precision", "nf4") == 2
