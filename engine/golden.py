"""Runs golden cases, recorded from the official code, against this installation.

A case is one .safetensors file whose metadata names a ``component`` and its constructor arguments; it holds
``weights.*``, ``inputs.*`` and ``outputs.*`` (fp32) or ``outputs.bf16.*``. Nothing is known about a case but what its
file says, so folders with other widths, depths, head counts and seeds work too. End-to-end cases
(``e2e_*``) name a checkpoint folder beside them, and ``tokenizer_cases_*.json`` hold texts with their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import ModelFolder, load, open_model, tokenizer_files
from .config import CLIP_TOKENS, GenerationSettings, StepLLMConfig, TransformerConfig, VAEConfig
from .errors import CheckpointError, SolostepError, UsageError
from .golden_cases import Case, Result, compare, component_limit, e2e_limit, read_case
from .image import fit_image
from .models.clip import HunyuanClip
from .models.step_llm import StepLLM
from .models.transformer import (
    CrossAttention,
    FeedForward,
    RMSNorm,
    SelfAttention,
    StepVideoTransformer,
    TransformerBlock,
    apply_rope,
    rope_angles,
    rope_table,
    text_lengths,
)
from .models.vae import Decoder, Encoder, decode_chunks, encode_video, sample_posterior
from .runtime import numerics, pick_device
from .sampling import GuidedVelocity, first_frame_condition, to_uint8
from .scheduler import euler_step, make_sigmas
from .text import ClipTokenizer, LLMTokenizer, PromptEmbedding, run_clip, run_step_llm

# --- running components -------------------------------------------------------------------------------------------

Outputs = Iterator[tuple[str, Tensor]]
Runner = Callable[[Case, torch.dtype, torch.device], Outputs]


def _floats(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs on the device; floating ones in the run's type, as the official run had them."""
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in case.inputs.items()}


def _rms_norm(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    norm = case.fill(RMSNorm(case.config["dim"], case.config.get("eps", 1e-6)), dtype, device)
    yield "out", norm(case.inputs["x"].to(device, dtype))


def _rope3d(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    fhw = tuple(case.config["fhw"])
    yield "out", apply_rope(case.inputs["tokens"].to(device, dtype), rope_table(fhw, dtype, device))
    for width in {int(k.split("_")[1]) for k in case.outputs if k.startswith("cos_")}:
        cos, sin = rope_angles(max(fhw), width, dtype)
        yield f"cos_{width}", cos
        yield f"sin_{width}", sin


def _kv_mask(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    lengths = text_lengths(case.inputs["encoder_attention_mask"], official_rounding=True, dtype=dtype)
    yield "kv_seqlens", torch.tensor(lengths)
    yield "context_len", torch.tensor([max(lengths)])


def _feed_forward(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    yield "out", case.fill(FeedForward(case.config["dim"]), dtype, device)(case.inputs["x"].to(device, dtype))


def _self_attention(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    module = case.fill(SelfAttention(case.config["hidden_dim"], case.config["head_dim"]), dtype, device)
    yield "out", module(case.inputs["x"].to(device, dtype), rope_table(tuple(case.config["fhw"]), dtype, device))


def _cross_attention(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    module = case.fill(CrossAttention(case.config["hidden_dim"], case.config["head_dim"]), dtype, device)
    x = _floats(case, dtype, device)
    yield "out", module(x["x"], x["encoder_hidden_states"], x.get("attn_mask"))


def _transformer_block(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    module = case.fill(TransformerBlock(case.config["dim"], case.config["attention_head_dim"]), dtype, device)
    x = _floats(case, dtype, device)
    rope = rope_table(tuple(case.config["fhw"]), dtype, device)
    yield "out", module(x["q"], x["kv"], x["timestep"], rope, x.get("attn_mask"))


def _dit(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    model = case.fill(StepVideoTransformer(TransformerConfig.from_dict(case.config)), dtype, device)
    x = _floats(case, dtype, device)
    score = float(case.inputs["motion_score"]) if "motion_score" in case.inputs else None
    condition = x.get("condition_hidden_states")
    lengths = text_lengths(x["encoder_attention_mask"])
    context = model.embed_text(x["encoder_hidden_states"], x["encoder_hidden_states_2"], lengths)
    yield "context", torch.cat(model.embed_text(x["encoder_hidden_states"], x["encoder_hidden_states_2"],
                                                [max(lengths)] * len(lengths)))  # fmt: skip
    modulation, embedding = model.adaln_single(x["timestep"], score)
    yield "adaln_6dim", modulation
    yield "embedded_timestep", embedding
    tokens = model.embed_latents(x["hidden_states"], condition)
    yield "patch_embed", tokens.unflatten(1, (x["hidden_states"].shape[1], -1)).flatten(0, 1)
    seen: list[Tensor] = []

    def watched() -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            rows: list[Tensor] = []
            handle = block.register_forward_hook(lambda module, args, out, rows=rows: rows.append(out))
            yield block
            handle.remove()
            seen.append(torch.cat(rows))

    out = model(x["hidden_states"], x["timestep"], context, condition, score, blocks=watched())
    yield from ((f"block_{i}", block) for i, block in enumerate(seen))
    yield "x", out


def _step_llm(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    module = case.fill(StepLLM(StepLLMConfig.from_dict(case.config)), dtype, device)
    yield "y", module(case.inputs["input_ids"].to(device))


def _hunyuan_clip(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    clip = HunyuanClip(case.config)
    weights = {k: v for k, v in case.weights.items() if not k.removeprefix("bert.").startswith("pooler.")}
    bare = Case(**(vars(case) | {"weights": weights}))
    bare.fill(clip.bert, dtype, device, prefix="bert.")
    clip = clip.eval().to(device, dtype)
    ids, mask = case.inputs["input_ids"].to(device), case.inputs["attention_mask"].to(device)
    yield "last_hidden_state", clip(ids, mask)
    yield "last_hidden_state_no_mask", clip(ids)


def _vae_decoder(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    shared = {k: case.config[k] for k in ("z_channels", "num_res_blocks", "out_channels") if k in case.config}
    # The half that a case does not hold gets widths that fit any number of latent channels.
    spare = {"ch": 4 * case.config["z_channels"] * 32, "ch_mult": [1, 1, 1, 1]}
    decoder = Decoder(VAEConfig.from_dict({**shared, "encoder": spare, "decoder": case.config}))
    decoder = case.fill(decoder, dtype, device, prefix="decoder.")
    for name, latents in case.inputs.items():
        latents = latents.to(device, dtype)
        yield f"video_from_{name}", torch.cat(list(decode_chunks(decoder, latents)), dim=1)
        chunks = [decoder(part.transpose(1, 2)).transpose(1, 2) for part in latents.split(3, dim=1)]
        if len(chunks) > 1:
            yield f"{name}_border_frames_16_17_before_mix", torch.cat([chunks[0][:, -1:], chunks[1][:, :1]], dim=1)


def _vae_encoder(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    shared = {k: case.config[k] for k in ("z_channels", "num_res_blocks", "in_channels") if k in case.config}
    spare = {"ch": 4 * case.config["z_channels"] * 32, "ch_mult": [1, 1, 1, 1]}
    encoder = Encoder(VAEConfig.from_dict({**shared, "decoder": spare, "encoder": case.config}))
    encoder = case.fill(encoder, dtype, device, prefix="encoder.")
    for name in ("image", "video"):
        if name in case.inputs:
            mean, logvar = encode_video(encoder, case.inputs[name].to(device, dtype))
            yield f"{name}_mean", mean
            yield f"{name}_logvar", logvar
            if f"{name}_eps" in case.inputs:
                eps = case.inputs[f"{name}_eps"].to(mean)
                yield f"{name}_sample_with_eps", sample_posterior(mean, logvar, eps)


def _scheduler(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    for reverse in (False, True):
        for steps, shift in case.config["schedules"]:
            sigmas = make_sigmas(int(steps), shift, reverse=reverse)
            name = f"steps{int(steps)}_shift{shift:g}_reverse{int(reverse)}"
            yield f"sigmas.{name}", sigmas
            yield f"timesteps.{name}", sigmas[:-1]
        steps, shift = case.config["trace"]
        sigmas = make_sigmas(int(steps), shift, reverse=reverse).to(device)
        sample, outputs = (case.inputs[k].to(device) for k in ("sample", "model_outputs"))
        trace, x = [], sample
        for i in range(int(steps)):
            x = euler_step(x, outputs[i], sigmas[i], sigmas[i + 1])
            trace.append(x)
        yield f"trace_reverse{int(reverse)}", torch.stack(trace)


def _image_preprocess(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    yield "out", fit_image(case.inputs["image"], *case.config["target_hw"])[None, None]


RUNNERS: dict[str, Runner] = {
    "rms_norm": _rms_norm,
    "rope3d": _rope3d,
    "kv_mask": _kv_mask,
    "feed_forward": _feed_forward,
    "self_attention": _self_attention,
    "cross_attention": _cross_attention,
    "transformer_block": _transformer_block,
    "dit_t2v": _dit,
    "dit_ti2v": _dit,
    "step_llm": _step_llm,
    "hunyuan_clip": _hunyuan_clip,
    "vae_v2_decoder": _vae_decoder,
    "vae_v2_encoder": _vae_encoder,
    "scheduler": _scheduler,
    "image_preprocess": _image_preprocess,
}
FP32_ONLY = ("scheduler", "image_preprocess")


# --- end to end ---------------------------------------------------------------------------------------------------


def _checkpoint_of(case: Case) -> Path:
    """The checkpoint folder that an end-to-end case ran on: named in its metadata or notes, else the one that fits."""
    folders = sorted(p.parent for p in case.folder.glob("*/model_index.json"))
    named = {
        case.metadata.get("checkpoint", "").rstrip("/"),
        *re.findall(r"([\w.-]+)/", case.metadata.get("notes", "")),
    }
    fitting = [f for f in folders if f.name in named]
    if not fitting:
        conditioned = case.component.endswith("ti2v")
        channels = case.inputs["latents"].shape[2]
        for folder in folders:
            config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
            if bool(config.get("use_additional_conditions")) == conditioned and config["in_channels"] == channels:
                fitting.append(folder)
    if len(fitting) != 1:
        raise CheckpointError(
            f"{case.name}: {len(fitting)} checkpoint folders in {case.folder} fit it; put the one it was run on there."
        )
    return fitting[0]


def _e2e(case: Case, dtype: torch.dtype, device: torch.device) -> Outputs:
    """The pipeline's own stages, with the noise and posterior sample of the case."""
    model = open_model(_checkpoint_of(case))
    run = case.config
    prompt = run.get("prompt", case.metadata.get("prompt", ""))
    texts = [prompt + run.get("pos_magic", ""), run.get("neg_magic", "")]
    lengths, llm, clip = yield from _e2e_text(model, texts, dtype, device)
    settings = GenerationSettings(
        **{k: run[k] for k in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "time_shift")},
        motion_score=run.get("motion_score", 5.0),
        image_to_video=model.is_image_to_video,
    )
    condition = None
    if model.is_image_to_video:
        condition = yield from _e2e_condition(case, model, settings, dtype, device)
    embeddings = [PromptEmbedding(x, y, n) for x, y, n in zip(llm, clip, lengths, strict=True)]
    transformer: Any = load(model.components["transformer"], device, dtype)
    velocity = GuidedVelocity(transformer, embeddings, settings, condition)
    sigmas = make_sigmas(settings.num_inference_steps, settings.time_shift)
    yield "sigmas", sigmas
    yield "timesteps", sigmas[:-1]
    latents = case.inputs["latents"].to(device).float()
    for i in range(settings.num_inference_steps):
        step = velocity(latents, sigmas[i])
        latents = euler_step(latents, step, sigmas[i], sigmas[i + 1])
        yield f"noise_pred_cfg_step{i + 1}", step
        yield f"latents_step{i + 1}", latents
    vae: Any = load(model.components["vae"], device, dtype, part="decoder")
    video = torch.cat(list(decode_chunks(vae, latents.to(dtype))), dim=1)
    yield "video", video
    yield "video_uint8_fhwc", to_uint8(video[0])


def _e2e_text(
    model: ModelFolder, texts: list[str], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    llm_tokenizer = LLMTokenizer(tokenizer_files(model.root)[0])
    clip_tokenizer = ClipTokenizer(tokenizer_files(model.root)[1].parent)
    ids = [llm_tokenizer(t) for t in texts]
    pieces = [clip_tokenizer(t) for t in texts]
    lengths = [CLIP_TOKENS + n for _, n in ids]
    yield "llm_input_ids", torch.tensor([i for i, _ in ids])
    yield "clip_input_ids", torch.tensor([i for i, _ in pieces])
    yield "clip_attention_mask", torch.tensor([m for _, m in pieces])
    width = CLIP_TOKENS + len(ids[0][0])
    yield "attention_mask", (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    llm_states = run_step_llm(model, texts, device, dtype)
    clip_states = run_clip(model, texts, device)
    llm = [llm_states[t][0] for t in texts]
    clip = [clip_states[t].to(dtype) for t in texts]
    yield "llm_embeds", torch.stack(llm)
    yield "clip_embeds", torch.stack(clip)
    return lengths, llm, clip


def _e2e_condition(
    case: Case, model: ModelFolder, settings: GenerationSettings, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    encoder = load(model.components["vae"], device, dtype, part="encoder")
    image, eps = case.inputs["first_image"], case.inputs["vae_eps"]
    frame = fit_image(image, settings.height, settings.width)[None, None].to(device, dtype)
    mean, logvar = encode_video(encoder, frame)
    yield "first_frame_mean", mean
    yield "first_frame_logvar", logvar
    condition = first_frame_condition(encoder, image, settings, eps)
    yield "first_frame_latent", condition[:, :1]
    yield "condition_hidden_states", condition.repeat_interleave(2, 0)
    return condition


def _tokenizers(path: Path) -> Iterator[Result]:
    """Every text of a tokenizer_cases_*.json must give its ids."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    root = path.parent / cases["checkpoint"]
    llm, clip = LLMTokenizer(tokenizer_files(root)[0]), ClipTokenizer(tokenizer_files(root)[1].parent)
    for i, case in enumerate(cases["cases"]):
        ids, length = llm(case["llm_text"] if "llm_text" in case else case["text"], case["llm_padded_len"])
        pieces, mask = clip(case["text"])
        good_llm = ids[:length] == case["llm_ids"] and len(ids) == case["llm_padded_len"]
        good_clip = pieces[: sum(mask)] == case["clip_ids"] and len(pieces) == case["clip_padded_len"]
        for tensor, good in (("llm_ids", good_llm), ("clip_ids", good_clip)):
            off = 0.0 if good else float("inf")
            yield Result(path.stem, f"{tensor}[{i}]", "-", off, off, "equal", good)


# --- the whole folder ---------------------------------------------------------------------------------------------


def run_case(case: Case, dtype: str, device: torch.device) -> list[Result]:
    """Runs one case in one type and compares every output that the case holds.

    Raises:
        SolostepError: the component is unknown, or an output of the case is not made.
    """
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    e2e = case.component.startswith("e2e_")
    if not e2e and case.component not in RUNNERS:
        raise SolostepError(f"the component {case.component!r} is unknown; known are {', '.join(RUNNERS)}, e2e_*.")
    golden = case.outputs if e2e or dtype == "fp32" else case.bf16_outputs
    results, made = [], set()
    for name, ours in (_e2e if e2e else RUNNERS[case.component])(case, torch_dtype, device):
        expected = golden.get(name)
        if expected is None or (e2e and dtype == "bf16" and name == "video_uint8_fhwc"):
            made.add(name)
            continue
        limit = e2e_limit(case, name, dtype) if e2e else component_limit(case, name, dtype)
        results.append(compare(case.name, name, dtype, ours, expected, limit))
        made.add(name)
    if case.component == "scheduler":
        results += _bf16_step(case, golden, dtype, device, made)
    missed = sorted(set(golden) - made)
    if missed:
        raise SolostepError(f"the output {missed[0]!r} is not one that the component {case.component} makes.")
    return results


def _bf16_step(
    case: Case, golden: Mapping[str, Tensor], dtype: str, device: torch.device, made: set[str]
) -> list[Result]:
    """The first step of a bf16 sample: computed in fp32, and fp32 from then on."""
    name = "step_from_bf16_sample"
    if name not in golden:
        return []
    made.add(name)
    steps, shift = case.config["trace"]
    sigmas = make_sigmas(int(steps), shift).to(device)
    sample, output = (case.inputs[k].to(device).bfloat16() for k in ("sample", "model_outputs"))
    ours = euler_step(sample, output[0], sigmas[0], sigmas[1])
    return [compare(case.name, name, dtype, ours, golden[name], component_limit(case, name, dtype))]


def verify_folder(
    folder: Path, device: str | torch.device | None = None, dtypes: tuple[str, ...] = ("fp32", "bf16")
) -> list[Result]:
    """Runs every golden case of a folder.

    Raises:
        UsageError: no such folder, or no golden case in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    files = sorted(folder.glob("*.safetensors"))
    tokenizers = sorted(folder.glob("tokenizer_cases*.json"))
    if not files and not tokenizers:
        raise UsageError(f"{folder} holds no golden cases (.safetensors files with a component in their metadata).")
    chosen = pick_device(device)
    results: list[Result] = []
    with numerics():
        for path in tokenizers:
            results += _attempt(path.stem, "-", lambda path=path: list(_tokenizers(path)))
        for path in files:
            results += _run_file(path, chosen, dtypes)
    return results


def _run_file(path: Path, device: torch.device, dtypes: tuple[str, ...]) -> list[Result]:
    try:
        case = read_case(path)
    except SolostepError as error:
        return [_failed(path.stem, "-", error)]
    results = []
    for dtype in dtypes:
        runs = case.component.startswith("e2e_") or bool(case.bf16_outputs)
        if dtype == "bf16" and (case.component in FP32_ONLY or not runs):
            continue  # this case holds nothing to compare a bf16 run with
        results += _attempt(case.name, dtype, lambda dtype=dtype: run_case(case, dtype, device))
    return results


def _attempt(name: str, dtype: str, run: Callable[[], list[Result]]) -> list[Result]:
    """A case that cannot be run is a failed case, and does not hide the ones after it."""
    try:
        return run()
    except Exception as error:
        return [_failed(name, dtype, error)]


def _failed(name: str, dtype: str, error: Exception) -> Result:
    message = str(error) if isinstance(error, SolostepError) else f"{type(error).__name__}: {error}"
    return Result(name, "-", dtype, float("inf"), float("inf"), "runs", False, message)
