"""What a demo clip shows, in words: the vocabulary, the caption templates and the held-out rule.

A clip is one shape of one colour on one background with one motion, written as four indices
``(kind, colour, background, motion)``. Held out of all training: eight pairs (kind, colour), each kind once or twice,
and one in eight of the triples (colour, background, motion). So a held-out prompt asks for a pairing that was never
shown, while each of its words was shown with most others.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
BACKGROUNDS = ("black", "white", "gray", "blue", "green", "pink")
MOTIONS = ("left", "right", "up", "down", "bounce", "rotate", "grow", "shrink")
DIRECTIONS = MOTIONS[:4]
ROUND = ("circle", "ring")
"""Shapes that look the same at every angle; a clip never rotates them."""

Attributes = tuple[int, int, int, int]

_ZH = {
    "kind": ("圆形", "正方形", "三角形", "星形", "圆环", "十字形"),
    "colour": ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "白色"),
    "background": ("黑色", "白色", "灰色", "蓝色", "绿色", "粉色"),
    "motion": ("向左移动", "向右移动", "向上移动", "向下移动", "上下弹跳", "旋转", "变大", "缩小"),
}
_GERUND = (
    "moving left", "moving right", "moving up", "moving down", "bouncing", "rotating", "growing", "shrinking",
)  # fmt: skip
_VERB = ("moves left", "moves right", "moves up", "moves down", "bounces", "rotates", "grows", "shrinks")
ENGLISH = (
    "a {colour} {kind} {gerund} on a {background} background",
    "a {colour} {kind} {verb} on a {background} background",
    "on a {background} background, a {colour} {kind} is {gerund}",
    "{colour} {kind} {gerund}, {background} background",
    "a video of a {colour} {kind} {gerund} in front of a {background} background",
    "the {kind} is {colour}, the background is {background}, and it is {gerund}.",
)
CHINESE = (
    "一个{colour}的{kind}在{background}背景上{motion}",
    "{background}背景上，一个{colour}的{kind}正在{motion}。",
    "{colour}{kind}{motion}，{background}背景",
    "在{background}的背景前，一个{colour}{kind}{motion}",
    "{background}背景，{colour}的{kind}{motion}",
    "视频：一个{colour}{kind}在{background}背景上{motion}",
)
TEMPLATES = len(ENGLISH) + len(CHINESE)


def chinese_words() -> list[str]:
    """Words that the Step-LLM tokenizer keeps whole, so that a caption is read as the same parts everywhere."""
    words = {w for group in _ZH.values() for w in group} - set(_ZH["motion"])
    words |= {"向左", "向右", "向上", "向下", "移动", "上下", "弹跳", "旋转", "变大", "缩小"}
    return sorted(words | {"背景", "一个", "的", "在", "上", "正在", "前", "视频", ",", ":", "。"})


def caption(attributes: Attributes, template: int) -> str:
    """The caption of a clip; templates 0 ... 5 are English, 6 ... 11 Chinese."""
    kind, colour, background, motion = attributes
    if template >= len(ENGLISH):
        names = {"kind": kind, "colour": colour, "background": background, "motion": motion}
        return CHINESE[template - len(ENGLISH)].format(**{k: _ZH[k][i] for k, i in names.items()})
    text = ENGLISH[template].format(
        colour=COLOURS[colour], kind=KINDS[kind], background=BACKGROUNDS[background],
        gerund=_GERUND[motion], verb=_VERB[motion],
    )  # fmt: skip
    return text.replace("a orange", "an orange")


def possible(attributes: Attributes) -> bool:
    """Whether such a clip shows anything: the colours differ and a rotation is visible."""
    kind, colour, background, motion = attributes
    turns_unseen = MOTIONS[motion] == "rotate" and KINDS[kind] in ROUND
    return COLOURS[colour] != BACKGROUNDS[background] and not turns_unseen


def held_out_pair(kind: int, colour: int) -> bool:
    return kind == (colour + 2) % len(KINDS)


def held_out_triple(colour: int, background: int, motion: int) -> bool:
    return (3 * colour + 5 * background + motion) % 8 == 2


def held_out(attributes: Attributes) -> bool:
    """Whether a clip belongs to the test set."""
    kind, colour, background, motion = attributes
    return held_out_pair(kind, colour) or held_out_triple(colour, background, motion)


def combinations(test: bool) -> list[Attributes]:
    """All possible clips of the training set, or of the test set."""
    kinds, colours, backgrounds, motions = (range(len(n)) for n in (KINDS, COLOURS, BACKGROUNDS, MOTIONS))
    every = itertools.product(kinds, colours, backgrounds, motions)
    return [a for a in every if possible(a) and held_out(a) == test]


@functools.cache
def asked_by_captions() -> dict[str, Attributes]:
    """What each caption there is asks for, of the training set as of the test set."""
    every = [a for test in (True, False) for a in combinations(test)]
    return {caption(attributes, template): attributes for attributes in every for template in range(TEMPLATES)}


@dataclass(frozen=True)
class Prompt:
    """A caption and what a video of it has to show."""

    text: str
    attributes: Attributes
    language: str

    @property
    def why(self) -> str:
        """Which of the two held-out rules applies (the pair's if both do)."""
        return "pair" if held_out_pair(self.attributes[0], self.attributes[1]) else "triple"


def held_out_prompts(n: int = 128, seed: int = 0) -> list[Prompt]:
    """``n`` prompts of unseen combinations, English and Chinese in turn, half of them for each held-out rule."""
    draw = random.Random(seed)
    pairs = [a for a in combinations(test=True) if held_out_pair(a[0], a[1])]
    triples = [a for a in combinations(test=True) if not held_out_pair(a[0], a[1])]
    draw.shuffle(pairs)
    draw.shuffle(triples)
    prompts = []
    for i in range(n):
        pool = pairs if i // 2 % 2 == 0 else triples
        attributes = pool[(i // 4 * 2 + i % 2) % len(pool)]
        chinese = i % 2 == 1
        template = draw.randrange(len(CHINESE) if chinese else len(ENGLISH)) + len(ENGLISH) * chinese
        prompts.append(Prompt(caption(attributes, template), attributes, "zh" if chinese else "en"))
    return prompts
