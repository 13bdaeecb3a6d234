"""Rates of cards that were measured, for plans where no such card is: `solostep plan --like h200`.

Each stands in benchmarks/results, with the commit it was measured at; a test holds them equal. What a block's linears
take, with all passes between them, is a block's time less attention's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..offload.planner import Rates
from .config import TransformerConfig
from .errors import UsageError
from .plan import Rated
from .precision import OFFICIAL

TOKENS = 75_888
"""Of 204 frames at 544x992."""


@dataclass(frozen=True)
class Card:
    """Seconds at :data:`TOKENS` tokens: ``blocks``, both guidance branches, by precision, with the attention that each
    was timed with; ``attention`` of one branch, its passes counted. ``decode``: of 17 frames of 544x992. Bytes a second
    of pinned copies to the card, and of the machine's disk."""

    name: str
    commits: tuple[str, str, str]
    """Of blocks, of attention, of decoding."""
    blocks: dict[str, tuple[str, float]]
    official: float
    attention: dict[str, float]
    decode: float
    bus: float
    disk: float

    def rated(self, precision: str, attention: str) -> Rated | None:
        """Its rates for a precision and a kind of attention; None where no such block was timed."""
        if attention == OFFICIAL and precision == "bf16":
            beside, block = OFFICIAL, self.official
        elif precision in self.blocks and attention in self.attention and attention != OFFICIAL:
            beside, block = self.blocks[precision]
        else:
            return None
        width = TransformerConfig().inner_dim
        linears = 28 * TOKENS * width**2 / (block / 2 - self.attention[beside])
        blocks = Rates(4 * TOKENS**2 * width / self.attention[attention], linears, self.bus, self.disk)
        source = f"those of an {self.name}, measured at commits {', '.join(dict.fromkeys(self.commits))}"
        return Rated(blocks, 17 * 544 * 992 / self.decode, source, "that machine's")


H200 = Card(
    "NVIDIA H200", ("7c75b14", "7c75b14", "098cb66"),
    blocks={"bf16": ("bf16", 0.627), "int8": ("int8", 0.4457), "fp8": ("int8", 0.4623)},
    official=0.798,
    attention={OFFICIAL: 0.25008, "bf16": 0.190075, "int8": 0.161479, "int8-fp8": 0.141512},
    decode=0.9076, bus=55.5e9, disk=2.06e9,
)  # fmt: skip
"""Blocks: block-h200.jsonl; attention: kernels-h200.md (the official one: torch's); decoding: vae-h200.jsonl; bus and
disk: the table of loading in benchmarks/README.md."""
CARDS = {"h200": H200}


def like(name: str) -> Card:
    """A card by its name.

    Raises:
        UsageError: none that was measured.
    """
    if name.lower() not in CARDS:
        raise UsageError(f"--like {name} is unknown; rates are stored of {', '.join(CARDS)}.")
    return CARDS[name.lower()]
