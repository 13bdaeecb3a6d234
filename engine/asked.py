"""A model, by its folder or just its name, and a clip: what is planned without loading or making anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .cards import like as card_like
from .checkpoint import open_model
from .config import PRESETS, GenerationSettings
from .failures import readable_errors
from .hub import HUB_IDS
from .plan import CONTEXT, MOST, PROGRAM, Limits, Plan, Rated, check_host, make_plan, smallest
from .precision import Mode, check_attention, check_precision, choose_attention, choose_mode
from .request import filled_in
from .runtime import host_room
from .sizes import Sizes, released, sizes_of
from .weights import Component


@dataclass(frozen=True)
class Asked:
    """A model, a clip and precisions, ready to be planned for one budget after the other."""

    sizes: Sizes
    settings: GenerationSettings
    mode: Mode
    text_mode: Mode
    attention: str
    rated: Rated | None
    room: int | None = None
    """Host memory that a run here finds beside the program; None: the plan is for another machine."""
    on_card: bool = True
    """Whether it is for a card's memory, and not for a CPU's in its place, where the program is not counted."""

    @property
    def itemsize(self) -> int:
        """Bytes of a value that is not quantized."""
        return 4 if self.mode.dtype == torch.float32 else 2

    def plan(self, vram: int, host: int | None = None) -> Plan:
        """For a card of which the process may take ``vram`` bytes, torch's and the driver's together; ``host`` is
        likewise for all of the process, by default what is free here, or on another machine any. On a CPU both are for
        what a run takes beside the program, and without ``host`` together what is free.

        Raises:
            UsageError: ``host`` is less than the program itself takes.
            SolostepError: nothing fits.
        """
        limits = self._limits(vram, host)
        return make_plan(self.sizes, self.settings, self.attention, limits, self.rated, self.itemsize)

    def _limits(self, vram: int, host: int | None = None) -> Limits:
        if not self.on_card:
            both = self.room if host is None else None
            return Limits(vram, self.room if host is None else host, context=0, program=0, both=both)
        check_host(host)
        return Limits(vram - CONTEXT, self.room if host is None else host - PROGRAM)

    def smallest(self) -> int:
        """The least ``vram`` that a plan exists for, in steps of 100 MB; of 10 MB below 1 GB."""
        limits = self._limits(MOST)
        found = smallest(self.sizes, self.settings, self.attention, self.itemsize, limits) + limits.context
        step = 10**8 if found > 10**9 else 10**7
        return -(-found // step) * step


def ask(
    model: str, precision: str | None = None, text_precision: str | None = None, attention: str | None = None,
    device: torch.device | None = None, *, converted: bool = False, like: str | None = None, **values: object,
) -> Asked:  # fmt: skip
    """What a model, by its folder or just its name, takes for a clip; ``values`` are those of GenerationSettings.

    On a card, ``device``, its rates are measured where they are not known, and host memory is what is free there; for
    a CPU there are no rates.

    Args:
        converted: plan as if the model were stored in these precisions (`solostep quantize`).
        like: with the stored rates of a card of this name in place of those of ``device``.

    Raises:
        UsageError, CheckpointError: no model, a wrong value, or a folder that is damaged.
    """
    check_precision(precision)
    check_precision(text_precision, "--text-precision")
    check_attention(attention, precision)
    known = None if like is None else card_like(like)
    if model in HUB_IDS or model in HUB_IDS.values():
        components: Mapping[str, Component] = released(model)
        preset = PRESETS[next(short for short, full in HUB_IDS.items() if model in (short, full))]
        conditioned = preset.name == "ti2v"
    else:
        folder = open_model(model)
        components, preset, conditioned = folder.components, folder.preset, folder.is_image_to_video
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    mode = choose_mode(components["transformer"], precision, "bf16", "--precision", dtype)
    text_mode = choose_mode(
        components["step_llm"], text_precision, "fp32" if precision == "fp32" else "bf16", "--text-precision", dtype
    )
    settings = filled_in(preset, values, conditioned)
    # Without a card here, the plan is for one elsewhere.
    kind = choose_attention(attention, mode, device or torch.device("cuda"))
    rated, on_card = None, device is None or device.type == "cuda"
    room = None if device is None else host_room()
    if known is not None:
        rated = known.rated(mode.name, kind)
    elif device is not None and on_card:
        from .rates import measured_rates, with_disk

        with readable_errors(device):
            rated = with_disk(measured_rates(device, mode, kind), components)
        if rated is not None and converted:  # other files, which are not there yet
            rated = replace(rated, kept={})
    return Asked(
        sizes_of(components, mode, text_mode, converted), settings, mode, text_mode, kind, rated, room, on_card
    )
