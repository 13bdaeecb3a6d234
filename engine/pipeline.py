"""One generation, read top to bottom: texts -> noise -> denoise -> decode -> frames.

A network is loaded when its stage begins and freed when it is no longer needed, so the memory of a run is that of its
largest stage. Latents are on disk after every step (see latents.py): a run that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import latents as storage
from .checkpoint import ModelFolder, open_model
from .choices import attention_choice, settle
from .config import GenerationSettings, cache_dir
from .errors import UsageError
from .failures import latents_are_kept, nothing_left_of, readable_errors
from .hub import DEMO, image_model
from .latents import SavedLatents
from .memory import HOST_ALONE, Memory, read_budgets, report
from .plan import Plan
from .precision import (
    AUTO,
    OFFICIAL,
    Mode,
    Recipes,
    check_attention,
    check_precision,
    choose_attention,
    choose_mode,
    choose_recipe,
    measure_recipe,
    read_recipe_option,
)
from .progress import ConsoleProgress, Progress
from .request import (
    Collect,
    FrameSink,
    Job,
    Request,
    Video,
    check_asked,
    check_seed,
    filled_in,
    make_record,
    settings_dict,
    tensor_hash,
)
from .runtime import Stage, numerics, pick_device, pick_dtype, release_memory
from .sampling import initial_noise
from .stages import Stages
from .text import PromptEmbedding

log = logging.getLogger("solostep")

StepCallback = Callable[["StepVideoPipeline", int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""As in diffusers: ``(pipe, step, timestep, {"latents"})``, may return ``{"latents": changed}``."""


PlanShown = Callable[[Plan], None]
"""Gets the plan of a video before it is made."""
OpenSink = Callable[[int, Request, dict[str, Any]], contextlib.AbstractContextManager[FrameSink]]


class StepVideoPipeline:
    """Step-Video on one device.

    >>> pipe = StepVideoPipeline.from_pretrained("stepfun-ai/stepvideo-t2v")
    >>> pipe("a cat on a skateboard", seed=1).save("cat.mp4")
    """

    def __init__(
        self, model: ModelFolder, precision: str | None = None, device: str | torch.device | None = None,
        keep_loaded: bool = False, cache: bool = True, *, text_precision: str | None = None, recipe: Recipes = None,
        attention: str | None = None, attention_backend: str | None = None, vram: str | int | None = None,
        host_ram: str | int | None = None,
    ) -> None:  # fmt: skip
        check_precision(precision)
        check_precision(text_precision, "--text-precision")
        check_attention(attention, precision)
        asked = read_recipe_option(recipe, precision)
        self.model = model
        self.dtype = pick_dtype("fp32" if precision == "fp32" else "bf16")
        transformer, llm = (model.components[name] for name in ("transformer", "step_llm"))
        self.budget = asked if isinstance(asked, float) else None
        self._mode = (
            choose_mode(transformer, precision, "bf16", "--precision", self.dtype)
            if asked is None
            else choose_recipe(transformer, asked)
        )
        default = "fp32" if precision == "fp32" else "bf16"
        self.text_mode = choose_mode(llm, text_precision, default, "--text-precision", self.dtype)
        budgets = read_budgets(vram, host_ram)
        self.device = pick_device(device)
        self._attention, self.attention_backend = attention, attention_backend
        me = weakref.proxy(self)  # a pipeline that nobody holds is gone at once, and its networks with it
        self.memory = Memory(
            model, self.device, self.dtype, *budgets, keep_loaded, lambda: (me.mode, me.text_mode, me.attention)
        )
        self._stages = Stages(model, self.device, self.dtype, self.memory)
        self.cache = cache_dir() / "embeddings" if cache else None
        self._report: list[dict[str, Any]] = []
        self._noted = False

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, precision: str | None = None, device: str | torch.device | None = None,
        *, text_precision: str | None = None, recipe: Recipes = None, attention: str | None = None,
        attention_backend: str | None = None, preset: str | None = None, keep_loaded: bool = False, cache: bool = True,
        vram: str | int | None = None, host_ram: str | int | None = None,
    ) -> StepVideoPipeline:  # fmt: skip
        """Finds and checks a model; its weights are loaded stage by stage, when a video is made.

        Args:
            model: a folder in the released layout, a Hugging Face id, or None (or "demo") for the small embedded demo
                model.
            precision: of the transformer: bf16 (the official numerics), fp32, or a format that its weights are
                quantized to while they are loaded: int8, fp8, int8-weight, fp8-weight, nf4, int4-weight, or for
                comparison one of another package (torchao:int8, bnb:nf4). By default what the folder is stored in,
                else bf16.
            text_precision: of Step-LLM, likewise; by default what it is stored in, else fp32 beside fp32 and bf16.
                Hunyuan-CLIP always runs in fp32 and the VAE in bf16, or both in fp32.
            recipe: in place of ``precision``: which linears get which format, as a Recipe, the path of a JSON file, or
                ``auto:BUDGET``, which measures the cheapest recipe with at most that error before the first video.
            attention: how blocks are computed: official (its order of operations and roundings), or by fused kernels
                with attention in bf16, in int8 (q k^T; P V in bf16) or int8-fp8 (P V in e4m3). By default official on a
                CPU and in fp32; on a card int8 where the linears multiply in 8 bits, else bf16.
            attention_backend: what computes it; by default what `solostep doctor` found right and fastest here.
            device: cpu, cuda, cuda:1; by default the first CUDA card, else the CPU.
            preset: t2v, turbo or ti2v, where the folder does not say which it is.
            keep_loaded: keep networks between videos, if the memory is there for all of them at once.
            cache: keep prompt embeddings on disk (in ``$SOLOSTEP_CACHE`` or ``~/.cache/solostep``).
            vram: memory of the card to stay in, such as "24GB" or a number of bytes; the rest of the model waits in
                host memory, or in its files, and comes when it is needed. By default ``$SOLOSTEP_VRAM``, else what is
                free. With 8-bit products no budget changes a bit of the latents.
            host_ram: memory of the host to stay in, likewise; by default ``$SOLOSTEP_HOST_RAM``, else what is free. On
                a CPU it counts together with ``vram`` only.

        Raises:
            UsageError: unknown precision, recipe or device, one that the folder is not stored in, not a model, or no
                size.
            CheckpointError: the model folder is incomplete or damaged; the message names the file or tensor.
        """
        check_precision(precision)
        check_precision(text_precision, "--text-precision")
        check_attention(attention, precision)
        asked = read_recipe_option(recipe, precision)
        read_budgets(vram, host_ram)
        pick_device(device)
        return cls(
            open_model(DEMO if model is None else model, preset), precision, device, keep_loaded, cache,
            text_precision=text_precision, recipe=recipe if isinstance(asked, float) else asked, attention=attention,
            attention_backend=attention_backend, vram=vram, host_ram=host_ram,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<StepVideoPipeline: {self.model.source}, {self.precision}, {self.device}>"

    # --- its precision --------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """How the transformer runs. With ``recipe="auto:BUDGET"`` the first use measures it, which takes its time."""
        return self._decided(None)

    @property
    def precision(self) -> str:
        """The name of the transformer's precision or recipe."""
        return f"{AUTO}{self.budget:g}" if self._mode is None else self._mode.name

    @property
    def text_precision(self) -> str:
        """The name of Step-LLM's precision."""
        return self.text_mode.name

    @property
    def attention(self) -> str:
        """How the transformer's blocks are computed; see :meth:`from_pretrained`."""
        return choose_attention(self._attention, self.mode, self.device)

    def _decided(self, progress: Progress | None) -> Mode:
        if self._mode is None:
            assert self.budget is not None
            with readable_errors(self.device):
                self._mode = measure_recipe(self.model, self.budget, self.device, progress)
            release_memory(self.device)
        return self._mode

    def _modes(self) -> dict[str, Any]:
        """For identities, records and metadata: two modes never share latents."""
        return {
            "precision": self.mode.name,
            "text_precision": self.text_precision,
            "recipe": self.mode.described(),
            "attention": self.attention,
        }

    # --- its memory -----------------------------------------------------------------------------------------------

    def plan(self, **settings: Any) -> Plan:
        """What a clip takes, stage by stage, before it is made; ``settings`` are those of :class:`GenerationSettings`.

        It is for :attr:`vram` and :attr:`host_ram` as they are set. The table that it prints as is of all of the card
        that the process takes; figures of the plan itself are of torch's part, without ``plan.context`` bytes.

        Raises:
            UsageError: a wrong value.
            SolostepError: nothing fits; it says the least that would do.
        """
        self._note_budgets()
        if "prompt" in settings:
            raise UsageError("A plan counts the longest prompt; leave prompt out, and give settings of the clip alone.")
        check_asked("any", **settings)
        made = filled_in(self.model.preset, settings, self.model.is_image_to_video)
        made.warn()
        with self.memory.capped(), readable_errors(self.device):
            return self.memory.plan(made, rated=True, moves=True)

    @property
    def vram(self) -> int | None:
        """Bytes of the card to stay in; None: what is free. Holds from the next video on."""
        return self.memory.vram

    @vram.setter
    def vram(self, size: str | int | None) -> None:
        self.memory.vram = size

    @property
    def host_ram(self) -> int | None:
        """Bytes of host memory to stay in; None: what is free. Holds from the next video on."""
        return self.memory.host_ram

    @host_ram.setter
    def host_ram(self, size: str | int | None) -> None:
        self.memory.host_ram = size

    def _note_budgets(self) -> None:
        """Says once that a budget is given that holds nothing back."""
        if self.host_ram is not None and not self.memory.is_planned and not self._noted:
            self._noted = True
            log.warning(HOST_ALONE)

    @property
    def keep_loaded(self) -> bool:
        """Whether networks are kept between videos."""
        return self.memory.keep_loaded

    @property
    def _networks(self) -> dict[str, Any]:
        return self.memory.networks

    def memory_report(self) -> list[dict[str, Any]]:
        """Of the last video: what each stage was to take at most, by the plan, and what it took: bytes of the card, of
        host memory (of the whole process; the program's own part is planned with on a card only) and from files (from
        the system's cache too), and seconds. On a CPU without a budget, what is planned is what a run takes that
        holds nothing back, beside the program and what else it holds; its "bytes of the card" are of host memory.

        Bytes of the card are torch's, planned ones too: the driver's context and kernels, ``planned_context_bytes``,
        come on top of each stage, and the table of :meth:`plan` counts them in."""
        return list(self._report)

    # --- asking for a video ---------------------------------------------------------------------------------------

    def request(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        image: Any = None,
        *,
        seed: int | None = None,
        latents: Tensor | None = None,
        latents_path: str | Path | None = None,
        raw_prompt: bool = False,
        **settings: Any,
    ) -> Request:
        """Checks one request and fills in the preset; ``settings`` are those of :class:`GenerationSettings`.

        Raises:
            UsageError: an empty prompt, a wrong value, an image the model cannot take or lacks, a wrong noise shape.
        """
        preset = self.model.preset
        first_frame = check_asked(prompt, negative_prompt, image, seed, raw_prompt, **settings)
        if image is None and self.model.is_image_to_video:
            raise UsageError(
                f"{self.model.source} is an image-to-video model; give it a first frame with --image FILE."
            )
        if image is not None and not self.model.is_image_to_video:
            raise UsageError(
                f"--image needs an image-to-video model, and {self.model.source} is text-to-video; "
                f"leave --image out or choose --model {image_model(self.model.root)}."
            )
        made = filled_in(preset, settings, self.model.is_image_to_video)
        if latents is not None:
            channels = self.model.transformer_config.in_channels
            shape = [1, made.latent_frames, channels, made.latent_height, made.latent_width]
            if list(latents.shape) != shape:
                raise UsageError(f"latents have shape {list(latents.shape)} and have to have {shape} for this clip.")
        negative = negative_prompt or ""
        return Request(
            # Plain concatenation, as the official pipeline does it.
            prompt=prompt if raw_prompt else prompt + preset.positive,
            negative=negative if raw_prompt else negative + preset.negative,
            settings=made,
            seed=seed,
            image=first_frame,
            noise=latents,
            latents_path=None if latents_path is None else Path(latents_path),
            asked={"prompt": prompt, "negative_prompt": negative_prompt, "raw_prompt": raw_prompt},
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        image: Any = None,
        motion_score: float | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        time_shift: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "video",
        *,
        raw_prompt: bool = False,
        latents_path: str | Path | None = None,
        progress: Progress | bool = True,
    ) -> Any:
        """Makes a video (a list of them for several prompts or ``num_videos_per_prompt`` above 1).

        What is None comes from the model's preset. The n-th video of a call has seed ``seed + n``; without a seed one
        is drawn and recorded. An interrupted call goes on where it was when it is made again with the same arguments:
        latents are kept after every step, at ``latents_path`` or in the cache folder.

        Args:
            image: first frame for image-to-video: a file, a Pillow image, uint8 [H, W, 3], float [3, H, W].
            latents: initial noise [1, f, c, h, w], in place of the seed's.
            output_type: "video" (a :class:`Video`), "np" (its frames, uint8 [F, H, W, 3]), or "latent"
                (fp32 [1, f, c, h, w], not decoded).
            raw_prompt: leave out the official additions to prompt and negative prompt.
            progress: True shows it on stderr; a function gets (stage, done, total).

        Raises:
            UsageError, CheckpointError, OutputError, SolostepError: each says what to do.
        """
        if output_type not in ("video", "np", "latent"):
            raise UsageError(f"output_type {output_type!r} is unknown; choose video, np or latent.")
        if not isinstance(num_videos_per_prompt, int) or num_videos_per_prompt < 1:
            raise UsageError(f"num_videos_per_prompt has to be a whole number above 0, not {num_videos_per_prompt!r}.")
        check_seed(seed)  # before the n-th video's is counted from it
        prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
        count = len(prompts) * num_videos_per_prompt
        if not prompts:
            raise UsageError("The list of prompts is empty.")
        if count > 1 and latents_path is not None:
            raise UsageError("latents_path is the file of one video; leave it out for several.")
        requests = []
        for n in range(count):
            request = self.request(
                prompts[n // num_videos_per_prompt], negative_prompt, image,
                seed=None if seed is None else seed + n, latents=latents, latents_path=latents_path,
                raw_prompt=raw_prompt, motion_score=motion_score, num_frames=num_frames, height=height, width=width,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, time_shift=time_shift,
            )  # fmt: skip
            requests.append(request)
        requests[0].settings.warn()
        if self.model.note:
            log.warning(self.model.note)
        sinks = [Collect() for _ in requests]
        open_sink = None if output_type == "latent" else lambda i, request, record: contextlib.nullcontext(sinks[i])
        results: list[Any] = []
        with ConsoleProgress() if progress is True else contextlib.nullcontext(progress or None) as shown:
            for i, (record, final) in enumerate(
                self.generate(requests, open_sink, callback_on_step_end, shown, to_file=False)
            ):
                results.append(final if output_type == "latent" else self._video(sinks[i], record, final, output_type))
        return results[0] if count == 1 and isinstance(prompt, str) else results

    @staticmethod
    def _video(sink: Collect, record: dict[str, Any], final: Tensor, output_type: str) -> Any:
        import numpy as np

        frames = np.concatenate(sink.parts)
        sink.parts.clear()
        return frames if output_type == "np" else Video(frames, record, final)

    # --- making it ------------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        open_sink: OpenSink | None,
        callback: StepCallback | None = None,
        progress: Progress | None = None,
        planned: PlanShown | None = None,
        to_file: bool = True,
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Makes videos one after the other and gives each one's record and final latents when it is done.

        All texts are encoded first, in one pass of the encoders. Frames go to ``open_sink(i, request, record)`` while
        they are decoded; None leaves out the decoding. ``planned`` gets the plan of each video before anything is
        loaded, where memory is planned; on a new card its speed is measured for that. ``to_file``: a video file is
        written meanwhile, whose time plans count.
        """
        say = progress or (lambda stage, done, total: None)
        work = self._generate(requests, open_sink, callback, say, planned, to_file)
        try:
            while True:
                with self.memory.capped():  # only while work is done, however long the caller takes
                    made = next(work, None)
                if made is None:
                    return
                yield made
        finally:
            work.close()

    def _generate(
        self, requests: Sequence[Request], open_sink: OpenSink | None, callback: StepCallback | None, say: Progress,
        planned: PlanShown | None, to_file: bool,
    ) -> Generator[tuple[dict[str, Any], Tensor], None, None]:  # fmt: skip
        self._note_budgets()
        with contextlib.ExitStack() as locks:
            self._decided(say)
            with readable_errors(self.device):
                jobs = [self._open(request, i, locks, to_file) for i, request in enumerate(requests)]
            yield from self._all(jobs, open_sink, callback, say, planned)

    def _all(
        self, jobs: list[Job], open_sink: OpenSink | None, callback: StepCallback | None, say: Progress,
        planned: PlanShown | None,
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:  # fmt: skip
        shared: list[Stage] = []
        embeddings: dict[str, PromptEmbedding] = {}
        waiting = [job for job in jobs if not job.done]
        for job in jobs:
            if job.resumed_from:
                said = "All steps are done already:" if job.done else "Going on from step"
                log.warning(f"{said} %d of %d in %s.", job.resumed_from, job.saved.steps, job.path)
        if self.memory.placed is None:  # the largest network: refuse now, not after the texts
            for job in waiting:
                with readable_errors(self.device):
                    plan = self.memory.refuse_early(job.left, planned is not None, job.request.texts, job.to_file)
                if planned is not None and plan is not None:
                    planned(plan)
        begun = waiting[0] if waiting and waiting[0].resumed_from is None else None
        if begun is not None:
            # Shows now, not after the first step, whether the latents can be kept; and keeps a seed that was drawn.
            storage.save_latents(begun.path, begun.saved)
        with nothing_left_of(begun):
            with readable_errors(self.device), numerics():
                texts = [t for job in waiting for t in job.request.texts]
                if waiting:
                    settle(self.device, self.mode.product_kinds | self.text_mode.product_kinds)
                if texts:
                    embeddings = self._stages.embed(texts, self.text_mode, self.cache, waiting, shared, say)
            try:
                yield from self._each(jobs, embeddings, shared, open_sink, callback, say)
            finally:  # also when the caller stops early
                self.memory.free("transformer")
                self.memory.free("vae")

    def _each(
        self,
        jobs: list[Job],
        embeddings: dict[str, PromptEmbedding],
        shared: list[Stage],
        open_sink: OpenSink | None,
        callback: StepCallback | None,
        say: Progress,
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for i, job in enumerate(jobs):
            with readable_errors(self.device, job), numerics():
                job.stages += [Stage(**vars(s)) for s in shared]
                if not job.done:
                    self._make_latents(job, [embeddings[t] for t in job.request.texts], callback, say)
                last = not any(not other.done for other in jobs[i + 1 :])
                alone = open_sink is not None and self.memory.decodes_better_alone(job.request.settings)
                if last or alone:
                    self.memory.free("transformer", always=alone and self.memory.is_planned)
                if open_sink is not None:
                    with latents_are_kept(job):
                        sink = open_sink(i, job.request, self._record(job))
                        self._stages.decode(job, sink, say, self.dtype)
                job.delivered()
                record = self._record(job)
                self._report = report(job, self.memory.expected(job))
            yield record, job.saved.latents

    def is_finished(self, request: Request) -> bool:
        """Whether the file at ``latents_path`` already holds the final latents of exactly this request."""
        if request.latents_path is None or not request.latents_path.exists():
            return False
        saved = storage.find_resumable(request.latents_path, self._identity(request), request.seed)
        return saved is not None and saved.finished

    def decode(
        self, saved: SavedLatents, open_sink: OpenSink, progress: Progress | None = None, precision: str | None = None
    ) -> dict[str, Any]:
        """Makes the video of saved latents, also of unfinished ones (which look noisy). Returns the record.

        ``precision`` is that of the VAE, bf16 or fp32; by default the one it has in this pipeline. That of the other
        networks does not matter.
        """
        self._note_budgets()
        dtype = self.dtype if precision is None else pick_dtype(precision)
        settings = GenerationSettings(**saved.info["settings"])
        channels = self.model.vae_config.z_channels
        if saved.latents.shape[2] != channels:
            raise UsageError(
                f"The latents have {saved.latents.shape[2]} channels and the VAE of {self.model.source} has "
                f"{channels}; give the --model that they were made with."
            )
        asked = {k: saved.info.get(k) for k in ("prompt", "negative_prompt", "raw_prompt")}
        request = Request(asked["prompt"] or "", "", settings, saved.seed, asked=asked)
        job = Job(request, Path(), saved, resumed_from=saved.step)
        try:
            with self.memory.capped(), readable_errors(self.device), numerics():
                sink = open_sink(0, request, self._record(job))
                self._stages.decode(job, sink, progress or (lambda *_: None), dtype)
        finally:
            self.memory.free("vae")
            self._report = report(job, self.memory.expected(job))
        return self._record(job)

    def _open(self, request: Request, index: int, locks: contextlib.ExitStack, to_file: bool) -> Job:
        """Finds what an earlier, interrupted run left, or begins anew."""
        identity = self._identity(request)
        managed = request.latents_path is None
        if request.latents_path is None:
            key = json.dumps([identity, request.seed, index if request.seed is None else 0], sort_keys=True)
            path = cache_dir() / "runs" / (hashlib.sha256(key.encode()).hexdigest()[:16] + storage.SUFFIX)
        else:
            path = request.latents_path
        storage.lock(path, cache_dir() / "locks", locks)
        saved = storage.find_resumable(path, identity, request.seed)
        resumed_from = saved.step if saved is not None else None
        if saved is None:
            seed = request.seed if request.seed is not None else secrets.randbelow(2**31)
            noise, _ = initial_noise(request.settings, self.model.transformer_config.in_channels, seed)
            saved = SavedLatents(
                latents=noise if request.noise is None else request.noise.detach().cpu().float(),
                step=0,
                steps=request.settings.num_inference_steps,
                seed=seed,
                seed_given=request.seed is not None,
                identity=identity,
                info={**request.asked, "texts": request.texts, "model": self.model.source, **self._modes(),
                      "preset": self.model.preset.name, "settings": settings_dict(request.settings)},
            )  # fmt: skip
        return Job(request, path, saved, resumed_from, managed, to_file)

    def _identity(self, request: Request) -> dict[str, Any]:
        """Everything but the seed that the final latents depend on, in JSON's types."""
        components = self.model.components
        networks = ["transformer", "step_llm", "hunyuan_clip"] + ["vae"] * (request.image is not None)
        return {
            "model": [components[name].fingerprint for name in networks],
            "prompt": request.prompt,
            "negative_prompt": request.negative if request.settings.use_guidance else None,
            "settings": request.settings.identity(),
            **self._modes(),
            "text_recipe": self.text_mode.described(),
            "image": tensor_hash(request.image),
            "noise": tensor_hash(request.noise),
        }

    def _make_latents(
        self, job: Job, embeddings: list[PromptEmbedding], callback: StepCallback | None, say: Progress
    ) -> None:
        def ended(step: int, sigma: float, latents: Tensor) -> Tensor | None:
            assert callback is not None
            return (callback(self, step, sigma, {"latents": latents}) or {}).get("latents")

        self._stages.first_frame(job, say)
        backend = self._attention_backend(job.request.settings)  # measures, on a new card: before the card is full
        if self.device.type == "cuda":
            job.saved.info["kernels"] = settle(self.device, self.mode.product_kinds).as_dict()
        self._stages.denoise(job, embeddings, self.attention, backend, ended if callback else None, say)

    def _attention_backend(self, settings: GenerationSettings) -> str | None:
        """The kernels for this length; on a new card they are measured first, which takes some seconds."""
        if self.attention == OFFICIAL:
            return None
        tokens = settings.latent_frames * settings.latent_height * settings.latent_width
        return attention_choice(self.device, self.attention, tokens, self.attention_backend)

    def _record(self, job: Job) -> dict[str, Any]:
        modes = job.saved.info if "precision" in job.saved.info else self._modes()
        return make_record(job, self.model, modes, self.device)
