"""What a study's answers say, as a record for JSON and as tables for people."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdiff.evaluation.agreement import choice_agreement
from jaxdiff.evaluation.pairwise import (
    FIRST,
    SECOND,
    TIE,
    Judgements,
    answers_needed,
    bootstrap_errors,
    davidson,
    groups,
    sign_test,
)
from jaxdiff.tools.judge.answers import QUESTIONS, Answer, Key, Rater

ASKED = {"fits": "Which fits the text better?", "drawn": "Which is better drawn?"}
POINTS = 400 / math.log(10)
MOST_RESAMPLES = 100_000
"""Of the scale that chess players know: 400 points more are ten to one."""


def checks(rater: Rater, key: Key) -> tuple[int, int]:
    """How many pairs of an image and noise a rater saw, and how many were right: the image, for both questions."""
    seen = [answer for answer in rater.answers if key.is_check(answer.pair)]
    right = sum(
        all((name := answer.chosen(q)) is not None and key.model_of[name] is not None for q in range(len(QUESTIONS)))
        for answer in seen
    )
    return len(seen), right


def rater_record(rater: Rater, key: Key, least: float) -> dict[str, Any]:
    """How much a rater did, and how well.

    Args:
        rater: the answers.
        key: of the study.
        least: the share of checks that must be right, or the rater is left out.
    """
    seen, right = checks(rater, key)
    repeats = [two for two in rater.repeats() if not key.is_check(two[0].pair)]
    same = {
        name: sum(first.chosen(q) == again.chosen(q) for first, again in repeats) for q, name in enumerate(QUESTIONS)
    }
    return {
        "answers": len(rater.answers),
        "checks": seen,
        "checks_right": right,
        "left_out": right < least * seen,
        "repeats": len(repeats),
        "same_again": same,
        "median_seconds": float(np.median([answer.seconds for answer in rater.answers])),
    }


def judgements(raters: Sequence[Rater], key: Key, question: int) -> tuple[Judgements, Int[np.ndarray, " n"]]:
    """The answers to one question when a pair was seen first, without checks; and of each its pair."""
    rows, pairs = [], []
    for r, rater in enumerate(sorted(raters, key=lambda rater: rater.name)):
        for answer in sorted(rater.firsts(), key=lambda answer: answer.pair):
            if not key.is_check(answer.pair):
                rows.append((r, key.lines[answer.pair], *_outcome(answer, key, question)))
                pairs.append(answer.pair)
    columns = np.array(rows, int).reshape(-1, 5).T
    return Judgements(len(key.models), *columns), np.array(pairs, int)


def _outcome(answer: Answer, key: Key, question: int) -> tuple[int, int, int]:
    """The two models, the lower number first, and which of them is preferred."""
    image_of = {m: name for name in key.pairs[answer.pair] if (m := key.model_of[name]) is not None}
    (i, first), (j, second) = sorted(image_of.items())
    return i, j, {None: TIE, first: FIRST, second: SECOND}[answer.chosen(question)]


def question_record(
    raters: Sequence[Rater], key: Key, question: int, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What the answers to one question say: of every two models, of all of them, and of the raters."""
    given, pairs = judgements(raters, key, question)
    models = key.models
    counts = given.counts()
    by_prompt = given.counts_by(given.prompt)
    strengths = davidson(counts, len(models))
    errors = bootstrap_errors(given, resamples, seed)
    notes = []
    parts = groups(counts, len(models))
    bounded = len(parts) == 1 and bool(strengths.bounded)
    if len(parts) > 1:
        told = " | ".join(", ".join(models[m] for m in part) for part in parts)
        notes.append(f"The models fall into groups that were never compared, {told}: there are no common strengths.")
    elif not bounded:
        notes.append("The strengths have no bound, since some model never lost, or never won: more answers are needed.")
    elif errors is None:
        notes.append("With one rater and one prompt there are no intervals.")
    else:
        for name, group in (("rater", given.rater), ("prompt", given.prompt)):
            if len(np.unique(group)) == 1:
                notes.append(f"There is one {name} only: the intervals say nothing of others.")

    def interval(middle: float, error: float) -> list[float]:
        half = errors.factor * error if errors else math.nan
        return [middle - half, middle + half]

    rows = []
    for k, (i, j) in enumerate(given.pairs):
        wins, losses, ties = (int(n) for n in counts[k])
        votes = by_prompt[:, k, FIRST] - by_prompt[:, k, SECOND]
        row: dict[str, Any] = {
            "models": [models[i], models[j]],
            "wins": wins,
            "losses": losses,
            "ties": ties,
            "p": sign_test(wins, losses),
            "p_prompts": sign_test(int((votes > 0).sum()), int((votes < 0).sum())),
            "difference": None,
            "interval": None,
            "still_needed": _still_needed(wins, losses, ties, errors.design[k] if errors and bounded else 1.0),
        }
        if bounded:
            row["difference"] = float(strengths.b[i] - strengths.b[j])
            row["interval"] = interval(row["difference"], float(errors.difference[k])) if errors else None
        rows.append(row)
    ranked = sorted(range(len(models)), key=lambda m: (-strengths.b[m], models[m])) if bounded else []
    of_pair = np.zeros((len(key.pairs), 3))
    np.add.at(of_pair, (pairs, given.outcome), 1)
    alpha = choice_agreement(of_pair)
    return {
        "question": ASKED[QUESTIONS[question]],
        "answers": len(pairs),
        "pairs": rows,
        "strengths": {
            models[m]: {
                "strength": float(strengths.b[m]),
                "interval": interval(float(strengths.b[m]), float(errors.b[m])) if errors else None,
                "points": 1000 + POINTS * float(strengths.b[m]),
            }
            for m in ranked
        },
        "nu": float(np.exp(strengths.log_nu)) if bounded else None,
        "alpha": alpha if math.isfinite(alpha) else None,
        "notes": notes,
    }


def _still_needed(wins: int, losses: int, ties: int, design: float) -> int | None:
    """Answers until the sign test has power 0.8, if shares stay as they are; None where the shares are (nearly) even.

    Ties count, though the test leaves them out; and so does how much less dependent answers say than independent ones.
    """
    decided = wins + losses
    if not decided or (n := answers_needed(wins / decided)) is None:
        return None
    have = decided + ties
    return max(0, math.ceil(n * max(design, 1.0) * have / decided) - have)


def study_record(
    raters: Sequence[Rater], key: Key, least: float = 0.75, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Everything that `judge count` prints.

    Raises:
        ValueError: where no rater, or no answer, is left.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"least is {least}; the share of checks that must be right is from 0 to 1.")
    if not 100 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples is {resamples}; it must be from 100 to {MOST_RESAMPLES}.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    raters = sorted(raters, key=lambda rater: rater.name)
    records = {rater.name: rater_record(rater, key, least) for rater in raters}
    kept = [rater for rater in raters if not records[rater.name]["left_out"]]
    if not kept:
        raise ValueError("No rater is left: all failed their attention checks.")
    firsts = [answer for rater in kept for answer in rater.firsts() if not key.is_check(answer.pair)]
    if not firsts:
        raise ValueError("There is no answer but to attention checks; more are needed.")
    sides = [side for answer in firsts for side in answer.choices if side != "tie"]
    return {
        "study": key.study,
        "models": list(key.models),
        "raters": records,
        "left": sides.count("left") / len(sides) if sides else None,
        "questions": {
            name: question_record(kept, key, q, resamples, seed) for q, name in enumerate(QUESTIONS)
        },
    }  # fmt: skip


# Tables ---------------------------------------------------------------------------------------------------------------


def as_text(record: dict[str, Any]) -> str:
    """The record for people."""
    raters = record["raters"]
    out = [name for name, one in raters.items() if one["left_out"]]
    lines = [f"{len(raters)} raters, {sum(one['answers'] for one in raters.values())} answers"]
    for name in out:
        one = raters[name]
        lines.append(f"left out: {name}, {one['checks_right']} of {one['checks']} attention checks right")
    kept = [one for name, one in raters.items() if name not in out]
    repeats = sum(one["repeats"] for one in kept)
    if repeats:
        same = " and ".join(f"{sum(one['same_again'][q] for one in kept) / repeats:.0%}" for q in QUESTIONS)
        lines.append(f"the same again, sides swapped: {same} of {repeats} (fits; drawn)")
    if record["left"] is not None:
        lines.append(f"the left image was chosen in {record['left']:.0%} of choices")
    for one in record["questions"].values():
        lines += ["", one["question"], *_question_lines(one)]
    return "\n".join(lines)


def _question_lines(one: dict[str, Any]) -> list[str]:
    width = max(8, *(len(name) for row in one["pairs"] for name in row["models"]))
    lines = []
    if one["strengths"]:
        lines.append(f"{'model':{width}}{'strength':>10}{'95 % interval':>20}{'points':>8}")
    for name, of in one["strengths"].items():
        lines.append(f"{name:{width}}{of['strength']:>10.3f}{_interval(of['interval']):>20}{of['points']:>8.0f}")
    counts = f"{'won':>6}{'lost':>6}{'ties':>6}{'p':>9}{'p (prompts)':>13}"
    lines.append(f"{'pair':{2 * width + 3}}{counts}{'difference':>12}{'95 % interval':>20}{'needed':>9}")
    for row in one["pairs"]:
        difference = "-" if row["difference"] is None else f"{row['difference']:.3f}"
        needed = "-" if row["still_needed"] is None else f"{row['still_needed']:,}"
        lines.append(
            f"{row['models'][0]:{width}} / {row['models'][1]:{width}}{row['wins']:>6}{row['losses']:>6}{row['ties']:>6}"
            f"{row['p']:>9.2g}{row['p_prompts']:>13.2g}{difference:>12}{_interval(row['interval']):>20}{needed:>9}"
        )
    alpha = "-" if one["alpha"] is None else f"{one['alpha']:.3f}"
    lines.append(f"Krippendorff's alpha {alpha}, {one['answers']} answers when a pair was seen first")
    return lines + [f"note: {note}" for note in one["notes"]]


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
