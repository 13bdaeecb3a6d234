"""Measuring what formats do: on the model's own activations, block by block, and recipes that meet a budget."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from solostep import StepVideoPipeline
from solostep.engine import activations, checkpoint, study
from solostep.engine.activations import Conditions, LLMSamples, TransformerSamples, conditions_for, encode
from solostep.engine.checkpoint import ModelFolder, build_on_meta, load, open_model
from solostep.engine.errors import UsageError
from solostep.engine.interfaces import cli
from solostep.engine.quantization import Quantization
from solostep.engine.runtime import numerics
from solostep.engine.sensitivity import auto_recipe, choose_recipe
from solostep.engine.study import FLOOR, Study
from solostep.engine.text import encode_prompts
from solostep.quant.recipe import Recipe, default_recipe
from solostep.quant.sensitivity import CANDIDATES

GOLDEN = Path(__file__).parents[1] / "golden"
T2V, TI2V = GOLDEN / "tiny-stepvideo-t2v", GOLDEN / "tiny-stepvideo-ti2v"
CPU, BF16 = torch.device("cpu"), torch.bfloat16
SMALL: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 3}
SMALL_OPTIONS = ["--frames", "17", "--height", "32", "--width", "48", "--steps", "3", "--times", "2"]
COMMAND = typer.main.get_command(cli.app)
PROMPT = "a red panda"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLOSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Without what takes most of the time of so small networks: threads that wait for each other, garbage collections
    that go through all imported modules, and making the same meta networks and embeddings again and again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    open_model(T2V)  # imports what is imported on first use
    gc.collect()
    gc.freeze()
    built: dict[str, torch.nn.Module] = {}
    encoded: dict[Any, Any] = {}

    def build_once(component: checkpoint.Component) -> torch.nn.Module:
        key = component.name + json.dumps(dict(component.config), sort_keys=True)
        if key not in built:
            built[key] = build_on_meta(component)
        return built[key]

    def encode_once(model: ModelFolder, texts: list[str], device: Any, dtype: Any, *_: Any) -> Any:
        key = (model.root.name, *texts, dtype)
        if key not in encoded:
            encoded[key] = encode_prompts(model, texts, device, dtype, None)
        return encoded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "build_on_meta", build_once)
        patch.setattr(activations, "encode_prompts", encode_once)
        yield
    torch.set_num_threads(before)


def small(model: ModelFolder, **changes: Any) -> Conditions:
    return conditions_for(model, [PROMPT], times=2, **(SMALL | changes))


def nothing(*_: Any) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def t2v() -> ModelFolder:
    return open_model(T2V)


@pytest.fixture
def tiny(t2v: ModelFolder) -> Study:
    return Study(t2v, conditions=small(t2v), device=CPU)


def whole_forward(samples: TransformerSamples, recipe: Recipe | None = None) -> torch.Tensor:
    """The samples through the network as the pipeline loads and calls it."""
    network: Any = load(samples.blocks.component, CPU, samples.dtype, recipe=recipe)
    rows = len(samples.latents)
    condition = None if samples.condition is None else samples.condition.repeat_interleave(rows, 0)
    with numerics():
        return network(torch.cat(samples.latents), torch.stack(samples.sigmas), samples.contexts, condition,
                       samples.settings.motion_score)  # fmt: skip


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [T2V, TI2V], ids=["t2v", "ti2v"])
def test_streamed_blocks_are_the_whole_network_bit_for_bit(root: Path) -> None:
    model = open_model(root)
    own = Study(model, conditions=small(model), device=CPU)
    with numerics():
        samples = own.samples
        assert isinstance(samples, TransformerSamples)
        streamed = torch.cat(samples.run(samples.blocks.each(), range(len(samples.labels))))
        recipe = default_recipe("int8", "transformer")
        mixed = torch.cat(own._run_mixes([{}, own.mix_of(recipe)], range(len(samples.labels)))[1])
    assert torch.equal(streamed, whole_forward(samples))
    assert torch.equal(mixed, whole_forward(samples, recipe))
    assert not torch.equal(mixed, streamed)


def test_trajectory_is_that_of_the_pipeline(t2v: ModelFolder) -> None:
    """Latents at the first and the last of three steps, as a generation with the same seed has them."""
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, sigma: float, state: dict[str, torch.Tensor]) -> None:
        seen.append(state["latents"].clone())

    pipe = StepVideoPipeline.from_pretrained(T2V, device="cpu")
    pipe(PROMPT, seed=0, callback_on_step_end=keep, output_type="latent", progress=False, **SMALL)
    with numerics():
        samples = TransformerSamples(t2v, small(t2v), CPU, BF16, nothing)
    assert [(x["time"], x["branch"]) for x in samples.labels] == [
        (0, "text"), (0, "unconditional"), (1, "text"), (1, "unconditional")
    ]  # fmt: skip
    assert torch.equal(samples.latents[2], seen[1].bfloat16()) and torch.equal(samples.latents[2], samples.latents[3])
    assert not torch.equal(samples.latents[0], samples.latents[2])


def test_step_llm_is_streamed_without_its_padding(t2v: ModelFolder) -> None:
    with numerics():
        samples = LLMSamples(t2v, [PROMPT, "一只猫"], CPU, torch.float32)
        streamed = samples.run(samples.blocks.each(), [0, 1])
        whole: Any = load(t2v.components["step_llm"], CPU, torch.float32)
        tokenizer = activations.LLMTokenizer(activations.tokenizer_files(t2v.root)[0])
        for text, out in zip([PROMPT, "一只猫"], streamed, strict=True):
            ids, length = tokenizer(text)
            assert torch.equal(out, whole(torch.tensor([ids[:length]])))
            assert torch.allclose(out, whole(torch.tensor([ids]))[:, :length], atol=1e-4)


def test_texts_are_encoded_where_step_llm_does_not_fit(t2v: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with numerics():
        usual = encode_prompts(t2v, [PROMPT], CPU, torch.float32, None)[PROMPT]
        monkeypatch.setattr(activations, "free_memory", lambda device: 0)
        found = encode(t2v, [PROMPT], CPU, torch.float32, nothing)[PROMPT]
    assert found.length == usual.length and torch.equal(found.clip, usual.clip)
    assert torch.allclose(found.llm, usual.llm[: found.length - 77], atol=1e-4)


def test_blocks_are_loaded_anew_where_they_do_not_fit_together(
    t2v: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "free_memory", lambda device: 0)
    blocks = activations.Blocks(t2v.components["transformer"], CPU, BF16)
    assert blocks.count == 2 and blocks.block(0) is not blocks.block(0)
    monkeypatch.setattr(activations, "free_memory", lambda device: 10**12)
    blocks = activations.Blocks(t2v.components["transformer"], CPU, BF16)
    assert blocks.block(0) is blocks.block(0)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_unquantized_recipe_has_no_error_at_all(tiny: Study) -> None:
    nothing_quantized, explicit = tiny.end_to_end([{}, {path: "bf16" for path in tiny.paths}])
    assert nothing_quantized.error == nothing_quantized.worst == nothing_quantized.guided == 0.0
    assert explicit.error == 0.0
    assert [error for _, error in nothing_quantized.by_time] == [0.0, 0.0]


def test_errors_are_those_of_their_definition(tiny: Study) -> None:
    """Against the same numbers computed the plain way: the linear's own output, and the velocity."""
    table = tiny.table(["int8", "nf4"])
    ends = tiny.end_to_end([tiny.mix_of(default_recipe(n, "transformer")) for n in ("int8", "nf4")])
    assert len(table.linears) == 14 and table.formats == ["int8", "nf4", "bf16"]
    samples = tiny.samples
    assert isinstance(samples, TransformerSamples)
    reference = whole_forward(samples).double().split(1)
    for name, end in zip(("int8", "nf4"), ends, strict=True):
        out = whole_forward(samples, default_recipe(name, "transformer")).double().split(1)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(out, reference, strict=True)]
        assert end.error == pytest.approx(sum(errors) / 4, rel=1e-4) and end.worst == pytest.approx(max(errors), 1e-4)
        scale = samples.settings.guidance_scale
        pairs = [(o[1] + scale * (o[0] - o[1]), r[1] + scale * (r[0] - r[1]))
                 for o, r in ((out[:2], reference[:2]), (out[2:], reference[2:]))]  # fmt: skip
        guided = sum(float((a - b).norm() / b.norm()) for a, b in pairs) / 2
        assert end.guided == pytest.approx(guided, rel=0.05)  # guidance itself is computed in bf16
    inputs = inputs_of(samples, "transformer_blocks.0.attn1.wqkv")
    weight: Any = samples.blocks.block(0).get_submodule("attn1.wqkv").weight
    squares = []
    for x in inputs:
        exact = x.double() @ weight.double().T
        squares.append(float(((x @ weight.T).double() - exact).norm() / exact.norm()) ** 2)
    measured = table.linears[0].errors["bf16"].output
    assert measured == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-3)
    for linear in table.linears:
        assert linear.errors["bf16"].output < linear.errors["int8"].output < linear.errors["nf4"].output
        assert linear.errors["int8"].update < linear.errors["nf4"].update


def inputs_of(samples: TransformerSamples, path: str) -> list[torch.Tensor]:
    network: Any = load(samples.blocks.component, CPU, samples.dtype)
    found: list[torch.Tensor] = []
    network.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with numerics():
        network(torch.cat(samples.latents), torch.stack(samples.sigmas), samples.contexts)
    return found


def test_effects_of_linears_add_up_in_squares(t2v: ModelFolder) -> None:
    """In fp32, where no rounding is in the way: all linears of the last block, and each on its own."""
    own = Study(t2v, conditions=small(t2v), device=CPU, dtype=torch.float32)
    paths = [p for p in own.paths if p.startswith("transformer_blocks.1.")]
    *single, together = own.end_to_end([*({p: "nf4"} for p in paths), dict.fromkeys(paths, "nf4")])
    assert together.error == pytest.approx(sum(e.error**2 for e in single) ** 0.5, rel=0.25)


def test_measuring_leaves_the_blocks_as_they_were(tiny: Study) -> None:
    tiny.table(["int8", "fp8-weight"])
    tiny.end_to_end([tiny.mix_of(default_recipe("fp8", "transformer")), FLOOR])
    before: Any = load(tiny.component, CPU, BF16)
    for i in range(2):
        kept, fresh = tiny.samples.blocks.block(i), before.transformer_blocks[i]
        assert [type(m) for m in kept.modules()] == [type(m) for m in fresh.modules()]
        for (name, a), (_, b) in zip(kept.named_parameters(), fresh.named_parameters(), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype, name


def test_formats_are_measured_once_and_kept(tiny: Study, t2v: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.table(["int8"])
    both = tiny.table(["int8", "fp8"])
    assert both.linears[3].errors["int8"] == first.linears[3].errors["int8"]
    ends = tiny.end_to_end([tiny.mix_of(default_recipe("fp8", "transformer"))])

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(study, "make_samples", refuse)
    again = Study(t2v, conditions=small(t2v), device=CPU)
    assert again.table(["fp8", "int8"]) == both
    assert again.end_to_end([again.mix_of(default_recipe("fp8", "transformer"))]) == ends
    assert set(CANDIDATES) - set(both.formats) == {"int8-plain", "int8-weight"}
    with pytest.raises(AssertionError, match="measured again"):
        again.table(CANDIDATES)
    with pytest.raises(AssertionError, match="measured again"):  # other conditions
        Study(t2v, conditions=small(t2v, width=32), device=CPU).table(["int8"])


def test_a_damaged_cache_is_made_again(
    tiny: Study, t2v: ModelFolder, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tiny.table(["int8"])
    (file,) = (cache / "sensitivity").glob("*.json")
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    again = Study(t2v, conditions=small(t2v), device=CPU)
    assert "cannot be read" in caplog.text and file.name in caplog.text
    assert again.table(["int8"]) == table


# --- a planted outlier, and budgets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with outlier channels in the self-attention of block 1: made larger in its adaLN table, and
    smaller in the weight behind it."""
    root = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(T2V, root)
    for file in (root / "transformer").glob("*.safetensors"):
        state = load_file(file)
        if (name := "transformer_blocks.1.scale_shift_table") in state:
            state[name][1, :3] += 200
        if (name := "transformer_blocks.1.attn1.wqkv.weight") in state:
            state[name][:, :3] /= 200
        save_file(state, file)
    return root


def test_planted_outliers_are_found_and_stay_bf16(planted: Path) -> None:
    model = open_model(planted)
    sensitive = "transformer_blocks.1.attn1.wqkv"
    own = Study(model, conditions=small(model), device=CPU)
    table = own.table(["int8-plain"])
    ranked = table.ranked("int8-plain")
    assert ranked[0].path == sensitive
    assert ranked[0].errors["int8-plain"].update > 4 * ranked[1].errors["int8-plain"].update
    clean = Study(open_model(T2V), conditions=small(model), device=CPU).table(["int8-plain"])
    assert clean.ranked("int8-plain")[0].path != sensitive
    everything = own.end_to_end([dict.fromkeys(own.paths, "int8-plain")])[0].error
    budget = everything / 2
    recipe = choose_recipe(own, budget, ["int8-plain"])
    mix = own.mix_of(recipe)
    assert sensitive not in mix and len(mix) > 6
    assert own.end_to_end([mix])[0].error <= budget


def test_auto_recipe_meets_its_budget(
    t2v: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says what it chose."""
    own = Study(t2v, conditions=small(t2v), device=CPU)
    cheapest = own.end_to_end([dict.fromkeys(own.paths, "fp8")])[0].error
    last = 0
    for budget in (0.7 * cheapest, 0.9 * cheapest, 10.0):
        recipe = auto_recipe(t2v, budget, CPU, conditions=small(t2v), candidates=["fp8"])
        assert recipe.name == f"auto:{budget:g}"
        mix = own.mix_of(recipe)
        assert Study(t2v, conditions=small(t2v), device=CPU).end_to_end([mix])[0].error <= budget
        assert len(mix) >= last
        last = len(mix)
        with monkeypatch.context() as patch:  # from the cache, and the same
            patch.setattr(study, "make_samples", None)
            assert auto_recipe(t2v, budget, CPU, conditions=small(t2v), candidates=["fp8"]) == recipe
    assert recipe.rules == (("transformer_blocks.*", "fp8"),)
    said = caplog.records[-1].getMessage()
    assert said.startswith(f"auto:10: fp8 for {len(mix)} of {len(own.paths)} linears; the velocity is off by ")
    assert float(said.split(" by ")[1].split()[0]) == pytest.approx(100 * cheapest, rel=0.05)


def test_a_budget_that_nothing_meets(tiny: Study, caplog: pytest.LogCaptureFixture) -> None:
    recipe = choose_recipe(tiny, 1e-6, ["int8"])
    assert recipe == Recipe("auto:1e-06") and tiny.mix_of(recipe) == {}
    least = min(tiny.end_to_end([{p: "int8"} for p in tiny.paths]), key=lambda e: e.error).error
    (said,) = [r.getMessage() for r in caplog.records if "all stay bf16" in r.getMessage()]
    reached = float(said.split("reached is ")[1].split(",")[0])
    assert reached >= 0.99 * least > 1e-6


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), True, "0.02", None])
def test_budgets_that_are_none(t2v: ModelFolder, budget: Any) -> None:
    with pytest.raises(UsageError, match="a number above 0"):
        auto_recipe(t2v, budget, CPU)


def test_what_cannot_be_measured(t2v: ModelFolder) -> None:
    with pytest.raises(UsageError, match="for comparison only"):
        auto_recipe(t2v, 0.1, CPU, candidates=["torchao:int8"])
    with pytest.raises(UsageError, match="'int9' is unknown"):
        auto_recipe(t2v, 0.1, CPU, candidates=["int9"])
    stored = Quantization("int8", default_recipe("int8", "transformer"), {"x": "int8"}, {})
    component = dataclasses.replace(t2v.components["transformer"], quantization=stored)
    model = dataclasses.replace(t2v, components={**t2v.components, "transformer": component})
    with pytest.raises(UsageError, match="stored in int8.*give the original model"):
        auto_recipe(model, 0.1, CPU)
    with pytest.raises(UsageError, match="--times 4 is more than the 2 steps"):
        conditions_for(t2v, num_inference_steps=2)
    with pytest.raises(UsageError, match="text-to-video; leave it out"):
        conditions_for(t2v, image=torch.zeros(3, 8, 8))
    with pytest.raises(UsageError, match="fits no linear"):
        Study(t2v, conditions=small(t2v), device=CPU).mix_of(default_recipe("int8", "step_llm"))


def test_defaults_of_the_released_models(t2v: ModelFolder) -> None:
    chosen = conditions_for(t2v)
    assert (chosen.settings.num_frames, chosen.settings.height, chosen.settings.width) == (17, 544, 992)
    assert chosen.settings.guidance_scale == 9 and len(chosen.prompts) == 2 and chosen.looked_at == [0, 3, 6, 9]
    assert chosen.image is None
    picture = conditions_for(open_model(TI2V)).image
    assert picture is not None and picture.shape == (3, 544, 992) and -1 <= picture.min() < picture.max() <= 1


# --- the command ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        COMMAND.main(["sensitivity", *map(str, args), "--device", "cpu"], prog_name="solostep")
    said = capsys.readouterr()
    assert int(ended.value.code or 0) == code, said.err
    return said.out, said.err


def test_command_writes_tables_and_a_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\n一只猫\n", encoding="utf-8")
    options = [T2V, "--formats", "int8,fp8", *SMALL_OPTIONS, "--prompts", prompts, "--recipe", "auto:0.5"]
    out, err = run(capsys, *options, "--recipe", "int8-weight", "-o", folder, "--top", 1)
    assert "14 linears in 2 blocks; 2 prompts, 2 times, 2 branches, 18 tokens" in out
    rows = {line.split()[0] for line in out.split("From end to end")[1].splitlines() if line.strip()}
    assert {"fp32", "int8", "fp8", "int8-weight", "auto:0.5"} <= rows
    assert sorted(p.name for p in folder.iterdir()) == [
        "auto-0.5.json", "sensitivity.csv", "sensitivity.json", "sensitivity.png"
    ]  # fmt: skip
    found = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    assert found["solostep_sensitivity"] == 1 and found["model"] == "tiny-stepvideo-t2v"
    assert [e["name"] for e in found["end_to_end"]] == ["fp32", "int8", "fp8", "auto:0.5", "int8-weight"]
    assert found["conditions"]["prompts"] == ["a cat", "一只猫"]
    with (folder / "sensitivity.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    measured = {"int8", "fp8", "bf16"}
    assert {line["format"] for line in lines} == measured and len(lines) == 14 * len(measured)
    updates = [float(line["update_error"]) for line in lines]
    assert updates == sorted(updates, reverse=True)
    picture = (folder / "sensitivity.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    # The recipe can be read again; and a second run takes everything from the cache.
    monkeypatch.setattr(study, "make_samples", None)
    out, _ = run(capsys, *options, "--recipe", folder / "auto-0.5.json", "--json", "--plot", tmp_path / "plot.svg")
    again = json.loads(out)
    assert again["end_to_end"][3] == found["end_to_end"][3]
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_command_measures_step_llm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, _ = run(capsys, T2V, "--network", "step_llm", "--formats", "int8,nf4", "-o", tmp_path / "llm.json")
    assert "relative error of the output" in out and "feed_forward.w2" in out
    found = json.loads((tmp_path / "llm.json").read_text(encoding="utf-8"))
    assert found["network"] == "step_llm" and found["samples"] == {"texts": 3}
    fp32, int8, nf4 = found["end_to_end"]
    assert 0 < int8["error"] < nf4["error"] and fp32["by_time"] == [] and int8["recipe"]["name"] == "int8"


BAD = {
    "format": (["--formats", "int8,int9"], "--formats: The format 'int9' is unknown"),
    "no format": (["--formats", ","], "names none"),
    "network": (["--network", "vae"], "choose transformer or step_llm"),
    "budget": (["--recipe", "auto:none"], "has to be a number above 0"),
    "negative budget": (["--recipe", "auto:-1"], "has to be a number above 0"),
    "recipe": (["--recipe", "nothing.json"], "nothing.json cannot be read"),
    "prompts": (["--prompts", "nothing.txt"], "--prompts nothing.txt cannot be read"),
    "empty prompts": (["--prompts", "empty.txt"], "holds no prompt"),
    "more than prompts": (["--prompts", "more.txt"], "line 1: only prompts are read here; leave seed out"),
    "precision": (["--precision", "fp8"], "--precision fp8 is unknown; choose one of bf16, fp32"),
    "image": (["--image", "nothing.png"], "there is no such file"),
    "times": (["--times", "9", "--steps", "3"], "--times 9 is more than the 3 steps"),
    "size": (["--height", "8"], "has to be a whole number of at least 16"),
    "output": (["-o", "taken.txt"], "has to end in .json or .csv, or be a folder"),
    "taken": (["-o", "taken.json"], "already there; add --overwrite"),
    "folder": (["-o", "no/where/x.json"], "does not exist"),
    "plot": (["--plot", "x.bmp"], "has to end in .png, .svg or .pdf"),
}


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD)
def test_bad_input_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty.txt", "\n"), ("more.txt", '{"prompt": "a", "seed": 1}\n'), ("taken.txt", ""),
                       ("taken.json", "")):  # fmt: skip
        Path(name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(study, "make_samples", None)
    _, err = run(capsys, T2V, *options, code=2)
    assert err.startswith("error: ") and words in err and len(err.strip().splitlines()) == 1
