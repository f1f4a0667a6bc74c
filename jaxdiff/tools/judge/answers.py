"""A study's key and what raters handed in, checked: whoever sends a file may have put anything into it."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxdiff.config import load_json

QUESTIONS = ("fits", "drawn")
Choice = Literal["left", "right", "tie"]
MAX_BYTES = 10_000_000
MAX_NAME = 100
"""Characters of a rater's name."""


@dataclass(frozen=True)
class Key:
    """Which model drew which image."""

    study: str
    """SHA-256 of the page's manifest."""
    models: tuple[str, ...]
    model_of: Mapping[str, int | None]
    """By the image's name; None for noise."""
    pairs: tuple[frozenset[str], ...]
    lines: tuple[int, ...]
    """Of each pair, the line of its prompt."""

    def is_check(self, pair: int) -> bool:
        """Whether one of the two is noise."""
        return any(self.model_of[name] is None for name in self.pairs[pair])


@dataclass(frozen=True)
class Answer:
    """What a rater said of a pair."""

    pair: int
    left: str
    right: str
    choices: tuple[Choice, ...]
    """For each of `QUESTIONS`."""
    seconds: float

    def chosen(self, question: int) -> str | None:
        """The image's name; None for a tie."""
        return {"left": self.left, "right": self.right, "tie": None}[self.choices[question]]


@dataclass(frozen=True)
class Rater:
    """A rater's answers, in the order in which they were given."""

    name: str
    answers: tuple[Answer, ...]

    def firsts(self) -> list[Answer]:
        """Of each pair, the answer when it was seen first."""
        return list({answer.pair: answer for answer in reversed(self.answers)}.values())[::-1]

    def repeats(self) -> list[tuple[Answer, Answer]]:
        """Of each pair that was seen twice, both answers."""
        first = {answer.pair: answer for answer in self.firsts()}
        return [(first[answer.pair], answer) for answer in self.answers if answer is not first[answer.pair]]


def _told(value: Any) -> str:
    """A value in a message: short, not nested deeply, and without what a terminal would obey."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_key(path: Path) -> Key:
    """The key that `judge make` wrote.

    Raises:
        ValueError: where it is none.
    """
    values = load_json(path)
    try:
        models, images, pairs = values["models"], values["images"], values["pairs"]
        key = Key(
            values["study"],
            tuple(models),
            {name: image["model"] for name, image in images.items()},
            tuple(frozenset(pair["images"]) for pair in pairs),
            tuple(pair["line"] for pair in pairs),
        )
        numbers = (*range(len(models)), None)
        sound = (
            isinstance(key.study, str)
            and all(isinstance(name, str) for name in models)
            and len(set(models)) == len(models) > 1
            and all(type(m) in (int, type(None)) and m in numbers for m in key.model_of.values())
            and all(type(line) is int and 0 <= line < 2**31 for line in key.lines)
            and all(len({key.model_of[name] for name in pair}) == len(pair) == 2 for pair in key.pairs)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is no key of a study, or is damaged; give the key.json that `judge make` wrote.")
    return key


def read_answers(path: Path, key: Key) -> Rater:
    """What the page gave a rater to hand in.

    Raises:
        ValueError: for the first thing in it that the page would not have written.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the answers that raters handed in.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}; it is no file of answers.")
    values = load_json(path)
    if set(values) != {"study", "rater", "answers"}:
        raise ValueError(f"{path} has the fields {_told(sorted(values))}; answers have study, rater and answers.")
    name, answers = values["rater"], values["answers"]
    if values["study"] != key.study:
        raise ValueError(f"{path} answers another study, {_told(values['study'])}; the key is of {key.study[:12]}...")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise ValueError(f"{path}: the rater is {_told(name)}; it must be a name of at most {MAX_NAME} characters.")
    if not isinstance(answers, list):
        raise ValueError(f"{path}: answers is {_told(answers)}; it must be a list.")
    seen: dict[int, list[Answer]] = {}
    made = []
    for number, given in enumerate(answers, 1):
        try:
            answer = _answer(given, key)
            before = seen.setdefault(answer.pair, [])
            if len(before) == 2:
                raise ValueError(f"pair {answer.pair} is judged a third time.")
            if before and before[0].left != answer.right:
                raise ValueError(f"pair {answer.pair} is judged again with the same sides; they must be swapped.")
        except ValueError as error:
            raise ValueError(f"{path}, answer {number}: {error}") from None
        before.append(answer)
        made.append(answer)
    if not made:
        raise ValueError(f"{path} has no answer.")
    shown = "".join(letter if letter.isprintable() else "?" for letter in name.strip())  # a terminal obeys some letters
    return Rater(shown, tuple(made))


def _answer(given: Any, key: Key) -> Answer:
    if not isinstance(given, dict) or set(given) != {"pair", "left", "right", "seconds", *QUESTIONS}:
        raise ValueError(f"it is {_told(given)}; it must have pair, left, right, fits, drawn and seconds.")
    pair, seconds = given["pair"], given["seconds"]
    if type(pair) is not int or not 0 <= pair < len(key.pairs):
        raise ValueError(f"pair is {_told(pair)}; it must be from 0 to {len(key.pairs) - 1}.")
    sides = given["left"], given["right"]
    if not all(isinstance(side, str) for side in sides) or frozenset(sides) != key.pairs[pair]:
        raise ValueError(f"left and right are {_told(sides)}; pair {pair} has {' and '.join(sorted(key.pairs[pair]))}.")
    for question in QUESTIONS:
        if not isinstance(given[question], str) or given[question] not in get_args(Choice):
            raise ValueError(f"{question} is {_told(given[question])}; it must be left, right or tie.")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {_told(seconds)}; it must be a number from 0 on.")
    return Answer(pair, *sides, tuple(given[question] for question in QUESTIONS), float(min(seconds, 1e6)))


def one_each(raters: Sequence[tuple[Path, Rater]]) -> tuple[list[Rater], list[str]]:
    """Raters by their names, each once, and what was left out for that.

    Who hands in twice, early and at the end, has all answers of the first file at the beginning of the second, which
    counts.

    Raises:
        ValueError: where two files of one name say different things.
    """
    kept: dict[str, tuple[Path, Rater]] = {}
    left_out = []
    for path, rater in sorted(raters, key=lambda one: (one[1].name, -len(one[1].answers), str(one[0]))):
        longest_path, longest = kept.setdefault(rater.name, (path, rater))
        if longest_path is path:
            continue
        if longest.answers[: len(rater.answers)] != rater.answers:
            raise ValueError(f"{longest_path} and {path} are both by {_told(rater.name)} and say different things; "
                             "give one of them another name, or leave it out.")  # fmt: skip
        left_out.append(f"{path} is left out: {longest_path} has all its answers.")
    return [rater for _, rater in kept.values()], left_out
