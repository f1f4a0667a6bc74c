r"""What brackets, colons and AND in a prompt mean: the grammar of AUTOMATIC1111's web UI.

    (word)                1.1 times the weight; brackets nest
    (word:1.3)            1.3 times
    [word]                the weight divided by 1.1
    [from:to:when]        `from` up to `when`, then `to`; `[to:when]` and `[from::when]` leave one of them out
    a cat AND a dog:0.7   prompts whose directions are added, with weights (Liu et al. 2022, "Compositional Visual
                          Generation with Composable Diffusion Models")
    a cat BREAK a dog     what follows begins a new chunk of the text encoder
    \( \) \[ \] \: \\ \AND \BREAK \__   the characters themselves

`when` is a share of the steps where it is below 1, or 1.0, and else a number of steps. Whatever is no sentence of this
grammar is text, with a warning. Time and memory grow with the text's length alone, however deep its brackets are.
"""

import math
import re
from itertools import groupby
from typing import Any, NamedTuple

MAX_WEIGHT = 100.0
"""No weight is larger than this, written or multiplied: features scaled by more come to nothing."""
MAX_PARTS = 16
"""AND joins no more prompts than this: each of them asks the network at every step."""

NEW_CHUNK = "\x1e"
"""Stands for BREAK in a text that has been parsed: the character that separates records."""

_SYNTAX = re.compile(r"(\\(?:[()\[\]:\\]|AND\b|BREAK\b|__)|[()\[\]:]|\bAND\b|\bBREAK\b)")
_ESCAPED = {rf"\{text}": text for text in ("(", ")", "[", "]", ":", "\\", "AND", "BREAK", "__")} | {"BREAK": NEW_CHUNK}
# What other tools' prompts have, and what to write here.
_OTHERS = {
    re.compile(
        r"<[a-z_]+:[^<>]*>", re.IGNORECASE
    ): "is taken as text: LoRAs are named in prompts with --lora-dir, or given by --lora",
    re.compile(r"\bembedding:\S+", re.IGNORECASE): "is taken as text: no textual inversion is called so",
    re.compile(r"\{[^{}]*\|[^{}]*\}"): "is taken as text: write __name__ for a choice, with a folder of wildcards",
    re.compile(r"\([^()]*:\s*\d+,\d+\s*\)"): "has no weight: write it with a decimal point, as in (cat:1.3)",
}
_OPENS, _CLOSES = {")": "(", "]": "["}, {"(": ")", "[": "]"}
_NUMBER = re.compile(r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)\s*", re.IGNORECASE)


class Piece(NamedTuple):
    """Text of one weight, there from step `start` on until before `stop`."""

    text: str
    weight: float
    start: int
    stop: int


class Part(NamedTuple):
    """One of the prompts that AND joins."""

    weight: float
    pieces: tuple[Piece, ...]

    def at(self, step: int) -> tuple[tuple[str, float], ...]:
        """The text at a step, as (text, weight); neighbours of the same weight are one."""
        now = (piece for piece in self.pieces if piece.start <= step < piece.stop)
        runs = groupby(now, key=lambda piece: piece.weight)
        return tuple(("".join(piece.text for piece in run), weight) for weight, run in runs)


def plain(text: str, steps: int) -> Part:
    """The text as it is, without any syntax."""
    return Part(1.0, (Piece(text, 1.0, 0, steps),) if text else ())


def parse(text: str, steps: int, *, compose: bool = True) -> tuple[list[Part], list[str]]:
    """A prompt's parts, at least one, and sentences of warning.

    Args:
        text: any.
        steps: how many steps the image is drawn in.
        compose: whether AND joins prompts; else it is text.
    """
    text = text.replace(NEW_CHUNK, " ")
    others = [(found, rule) for pattern, rule in _OTHERS.items() for found in pattern.findall(text)]
    warnings: dict[str, None] = {f"{_short(found)!r} {rule}.": None for found, rule in others}
    if not _SYNTAX.search(text):
        return [plain(text, steps)], list(warnings)
    items = _tree(_tokens(text), warnings)
    sides = _split(items, "AND") if compose else [items]
    parts = []
    for side in sides:
        weight = 1.0
        if len(sides) > 1 and _ends_in_number(side):
            try:
                weight, side = _weight(side[-1], "AND"), side[:-2]
            except ValueError as error:
                warnings[str(error)] = None
        pieces = _pieces(side, steps, warnings)
        if len(sides) == 1 or any(piece.text.strip() for piece in pieces):
            parts.append(Part(weight, pieces))
        else:
            warnings["AND joins an empty prompt, which is left out."] = None
    if len(parts) > MAX_PARTS:
        warnings[f"AND joins {len(parts)} prompts; the first {MAX_PARTS} are taken."] = None
    return parts[:MAX_PARTS] or [Part(1.0, ())], list(warnings)


def _tokens(text: str) -> list[str]:
    """Brackets, colons, AND, BREAK, escapes, and the text between them."""
    texts_and_syntax = _SYNTAX.split(text)
    # The end of "__AND" is no word of its own, but becomes one by itself where the underscores are escaped.
    texts_and_syntax[::2] = [rf"\{t}" if t in ("AND", "BREAK") else t for t in texts_and_syntax[::2]]
    return [token for token in texts_and_syntax if token]


def _tree(tokens: list[str], warnings: dict[str, None]) -> list[Any]:
    """Tokens, and (bracket, items) for each pair of brackets; a bracket without its partner stays a token."""
    opened: list[tuple[str, list[Any]]] = [("", [])]
    waiting = {"(": 0, "[": 0}
    alone: list[str] = []

    def dissolve(depth: int) -> None:
        """Turns the brackets above `depth` into text: each item moves once, into what is closed next, or the end."""
        for bracket, items in opened[depth + 1 :]:
            opened[depth][1].extend((bracket, *items))
            waiting[bracket] -= 1
            alone.append(bracket)
        del opened[depth + 1 :]

    for token in tokens:
        if token in waiting:
            waiting[token] += 1
            opened.append((token, []))
        elif token not in _OPENS:
            opened[-1][1].append(token)
        elif not waiting[_OPENS[token]]:
            alone.append(token)
            opened[-1][1].append(token)
        else:
            depth = len(opened) - 1
            while opened[depth][0] != _OPENS[token]:
                depth -= 1
            dissolve(depth)
            waiting[opened[depth][0]] -= 1
            group = opened.pop()
            opened[-1][1].append(group)
    dissolve(0)
    for bracket in sorted(set(alone)):
        n, what = alone.count(bracket), "closed" if bracket in waiting else "opened"
        times = f" ({n} of them)" if n > 1 else ""
        warnings[f"The bracket {bracket!r} is never {what}{times}; it is taken as text."] = None
    return opened[0][1]


def _pieces(items: list[Any], steps: int, warnings: dict[str, None]) -> tuple[Piece, ...]:
    """The texts among the items, in their order, each with the weight and the steps that its brackets give it."""
    pieces: list[Piece] = []
    # A stack, since recursion would end at a thousand brackets: what is left of each run of items.
    stack = [(iter(items), 1.0, 0, steps)]
    while stack:
        left, weight, start, stop = stack[-1]
        if (item := next(left, None)) is None:
            stack.pop()
        elif isinstance(item, tuple):
            stack.extend(
                (iter(inside), _limited(weight * factor, warnings), max(start, first), min(stop, last))
                for inside, factor, first, last in reversed(_meaning(item[0], item[1], steps, warnings))
            )
        elif start < stop:
            if item == "AND":
                warnings["AND joins whole prompts alone; inside brackets or a negative prompt it is text."] = None
            pieces.append(Piece(_ESCAPED.get(item, item), weight, start, stop))
    return tuple(pieces)


def _meaning(
    bracket: str, items: list[Any], steps: int, warnings: dict[str, None]
) -> list[tuple[list[Any], float, int, int]]:
    """A pair of brackets as runs of items, each with its factor and the steps between which it is there."""
    try:
        if bracket == "(":
            if _ends_in_number(items):
                return [(items[:-2], _weight(items[-1], "(...)"), 0, steps)]
            return [(items, 1.1, 0, steps)]
        sides = _split(items, ":")
        if not _ends_in_number(items) or len(sides) > 3:
            if any(isinstance(item, str) and "|" in item for item in items):
                warnings["[a|b] does not alternate here, it weighs less; write a schedule, such as [a:b:0.5]."] = None
            return [(items, 1 / 1.1, 0, steps)]
        when = _step(items[-1], steps, warnings)
        before = [(sides[0], 1.0, 0, when)] if len(sides) == 3 else []
        return [*before, (sides[-2], 1.0, when, steps)]
    except ValueError as error:
        warnings[str(error)] = None
        return [([bracket, *items, _CLOSES[bracket]], 1.0, 0, steps)]


def _ends_in_number(items: list[Any]) -> bool:
    """Whether a colon and a number come last."""
    return len(items) > 1 and items[-2] == ":" and isinstance(items[-1], str) and bool(_NUMBER.fullmatch(items[-1]))


def _weight(number: str, where: str) -> float:
    if not abs(weight := float(number)) <= MAX_WEIGHT:
        raise ValueError(f"The weight {_short(number)} of {where} does not lie from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; "
                         "it is taken as text.")  # fmt: skip
    return weight


def _limited(weight: float, warnings: dict[str, None]) -> float:
    if abs(weight) <= MAX_WEIGHT:
        return weight
    warnings[f"Weights multiply to more than {MAX_WEIGHT:g}, which is used."] = None
    return math.copysign(MAX_WEIGHT, weight)


def _step(number: str, steps: int, warnings: dict[str, None]) -> int:
    """The step before which a schedule's `from` ends."""
    when = float(number)
    if not (0 <= when < math.inf):
        raise ValueError(f"The schedule's {_short(number)} is no share or number of steps; it is taken as text.")
    if when < 1 or (when == 1 and "." in number):
        return math.floor(when * steps + 1e-6)  # 0.29 of 100 is 29
    if when >= steps:
        warnings[f"A schedule changes at step {when:g}, and there are {steps}; write a share, such as 0.5."] = None
    return int(min(when, steps))


def _short(number: str) -> str:
    number = number.strip()
    return number if len(number) < 20 else f"{number[:16]}..."


def _split(items: list[Any], at: str) -> list[list[Any]]:
    """The runs of items between those that are `at`."""
    sides: list[list[Any]] = [[]]
    for item in items:
        if item == at:
            sides.append([])
        else:
            sides[-1].append(item)
    return sides
