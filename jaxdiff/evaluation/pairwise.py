"""What people's choices between two images say of the models that drew them.

Each answer compares two models: one is preferred, or neither. A sign test asks whether two models are chosen equally
often. Strengths of several are those of Bradley and Terry with ties as Davidson (1970) has them:

    P(i is chosen) : P(j is chosen) : P(neither) = exp(b_i) : exp(b_j) : nu exp((b_i + b_j) / 2)

Answers of one rater are alike, and so are those to one prompt. So the errors come from resampling whole raters and
whole prompts, as Cameron, Gelbach and Miller (2011) combine them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr, bdtrik, stdtrit

FIRST, SECOND, TIE = range(3)
LIMIT = 15.0
"""Strengths of more than this have no bound: e^15 answers would be needed to tell them from infinite ones."""
MOST_NEEDED = 20_000
"""Numbers of answers above this are not told apart."""
_CHUNK = 256  # resamples at a time; their tables are the largest arrays


@dataclass(frozen=True)
class Judgements:
    """Answers to one question: who said it, to which prompt, of which two models, and what."""

    models: int
    rater: Int[np.ndarray, " n"]
    """From 0; a number that no answer has counts as nobody."""
    prompt: Int[np.ndarray, " n"]
    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    """Models, from 0."""
    outcome: Int[np.ndarray, " n"]
    """FIRST, SECOND or TIE."""

    def __post_init__(self) -> None:
        if (self.first == self.second).any():
            raise ValueError("A model is compared with itself; give two different ones.")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two models (i, j), i < j, in the order of the tables."""
        return [(i, j) for i in range(self.models) for j in range(i + 1, self.models)]

    @property
    def cell(self) -> Int[np.ndarray, " n"]:
        """Of each answer, its place in a table [pairs, 3] laid flat; the lower number comes first."""
        number = np.zeros((self.models, self.models), int)
        for k, (i, j) in enumerate(self.pairs):
            number[i, j] = number[j, i] = k
        turned = np.where(self.outcome == TIE, TIE, np.where(self.outcome == FIRST, SECOND, FIRST))
        return 3 * number[self.first, self.second] + np.where(self.first < self.second, self.outcome, turned)

    def counts(self) -> Float[np.ndarray, "pairs 3"]:
        """How often the first was preferred, the second, and neither."""
        size = 3 * len(self.pairs)
        return np.bincount(self.cell, minlength=size).astype(float).reshape(-1, 3)

    def counts_by(self, group: Int[np.ndarray, " n"]) -> Float[np.ndarray, "groups pairs 3"]:
        """The counts of each rater or prompt that has any."""
        names, place = np.unique(group, return_inverse=True)
        tables = np.zeros((len(names), 3 * len(self.pairs)))
        np.add.at(tables, (place, self.cell), 1)
        return tables.reshape(len(names), -1, 3)


# Two models -----------------------------------------------------------------------------------------------------------


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of as uneven a split, were both equally likely: exact; ties are left out by the caller."""
    n = wins + losses
    return 1.0 if wins == losses else min(1.0, 2 * float(bdtr(min(wins, losses), n, 0.5)))


def power(n: Int[np.ndarray, " k"], share: float, level: float = 0.05) -> Float[np.ndarray, " k"]:
    """The probability that the sign test of n answers finds a model that is preferred in this share of them.

    Args:
        n: answers without ties, at least 1.
        share: from 0 to 1.
        level: of the test, two-sided.
    """
    most = np.floor(np.nan_to_num(bdtrik(level / 2, n, 0.5), nan=-1))  # losses at which it still rejects
    most += _below(most + 1, n) <= level / 2  # the inverse is rounded
    most -= _below(most, n) > level / 2
    return _below(most, n, share) + _below(most, n, 1 - share)


def _below(k: Float[np.ndarray, " k"], n: Int[np.ndarray, " k"], share: float = 0.5) -> Float[np.ndarray, " k"]:
    """P(X <= k) of the binomial distribution; 0 below k = 0."""
    return np.where(k < 0, 0.0, bdtr(np.maximum(k, 0), n, share))


def answers_needed(share: float, target: float = 0.8, level: float = 0.05) -> int | None:
    """The number of answers without ties from which on the sign test has at least this power.

    The exact power is a saw-tooth in n; from this number on it does not fall below the target again.

    Returns:
        The number; None where it is above `MOST_NEEDED`, as it is where the share is nearly 1/2.
    """
    effect = abs(share - 0.5)
    # By the normal approximation (1.96 + 0.84)^2 / 4 = 1.96 answers are needed over the effect's square.
    guess = 1.96 / max(effect, 1e-9) ** 2
    if guess > MOST_NEEDED:
        return None
    n = np.arange(1, int(1.3 * guess) + 60)
    short = np.flatnonzero(power(n, share, level) < target)
    return int(n[short[-1]]) + 1


# Several models -------------------------------------------------------------------------------------------------------


class Strengths(NamedTuple):
    """What Bradley-Terry models with ties are."""

    b: Float[np.ndarray, "*batch models"]
    """Strengths whose mean is 0, in logits."""
    log_nu: Float[np.ndarray, "*batch"]
    """How common ties are; -inf where there are none."""
    bounded: Bool[np.ndarray, "*batch"]
    """Whether there is a likeliest b; there is none for a model that never loses."""


def davidson(counts: Float[np.ndarray, "*batch pairs 3"], models: int, steps: int = 100) -> Strengths:
    """The likeliest strengths, by Newton's method; of many tables at once.

    Two models without ties, or with, are log(wins / losses) apart.

    Args:
        counts: for each two models (i, j), i < j, how often i was preferred, j, and neither; any weights >= 0.
        models: how many there are.
        steps: at most; each moves no strength by more than 1.
    """
    pairs = [(i, j) for i in range(models) for j in range(i + 1, models)]
    design = np.zeros((len(pairs), 3, models + 1))  # of each outcome's logit in b and log nu
    for k, (i, j) in enumerate(pairs):
        design[k, FIRST, i] = design[k, SECOND, j] = design[k, TIE, models] = 1
        design[k, TIE, [i, j]] = 0.5
    batch = counts.shape[:-2]
    flat = counts.reshape(-1, *counts.shape[-2:])
    asked = flat.sum(-1, keepdims=True)
    ties = flat[..., TIE].sum(-1) > 0
    x = np.zeros((len(flat), models + 1))
    # The likelihood is the same for b + c: the mean is held at 0. Without ties nu is held, and takes no part. The last
    # term alters no fixed point, and makes singular matrices of unbounded strengths solvable.
    held = np.zeros((models + 1, models + 1))
    held[:models, :models] = 1
    ridge = held + 1e-10 * np.eye(models + 1)
    for _ in range(steps):
        logits = np.einsum("pok,nk->npo", design, x)
        logits[..., TIE] = np.where(ties[:, None], logits[..., TIE], -np.inf)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        gradient = np.einsum("npo,pok->nk", flat - asked * p, design)
        mean = np.einsum("npo,pok->npk", p, design)
        second = np.einsum("npo,pok,pol->nkl", asked * p, design, design, optimize=True)
        hessian = second - np.einsum("npk,npl->nkl", asked * mean, mean) + ridge
        hessian[:, models, models] += ~ties
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        largest = np.abs(step).max(-1, keepdims=True)
        x = x + step / np.maximum(largest, 1)
        if (largest[:, 0] < 1e-10).all() or (np.abs(x).max(-1)[largest[:, 0] >= 1e-10] > 2 * LIMIT).all():
            break
    b = x[:, :models] - x[:, :models].mean(-1, keepdims=True)
    bounded = _bounded(flat, models) & (np.abs(x).max(-1) <= LIMIT)
    log_nu = np.where(ties, x[:, models], -np.inf)
    return Strengths(b.reshape(*batch, models), log_nu.reshape(batch), bounded.reshape(batch))


def _bounded(flat: Float[np.ndarray, "n pairs 3"], models: int) -> Bool[np.ndarray, " n"]:
    """Whether there are likeliest strengths, of each table.

    There are none where strengths can move without end so that no answer gets less likely. If ties get no commoner,
    they can unless each model has won against or tied with each other that it was compared with, itself or by way of
    others. If ties get commoner by t, whoever wins must rise above whoever loses by 2 t or more, and models that tie
    may part by 2 t at most: this is possible unless round some circle of models there are more wins than ties.
    """
    won = np.zeros((len(flat), models, models), bool)
    tied = np.zeros_like(won)
    for k, (i, j) in enumerate(zip(*np.triu_indices(models, 1), strict=True)):
        won[:, i, j], won[:, j, i] = flat[:, k, FIRST] > 0, flat[:, k, SECOND] > 0
        tied[:, i, j] = tied[:, j, i] = flat[:, k, TIE] > 0
    reach = won | tied
    far = np.where(won, -1.0, np.where(tied, 1.0, np.inf))
    for k in range(models):
        reach |= reach[:, :, k, None] & reach[:, None, k, :]
        far = np.minimum(far, far[:, :, k, None] + far[:, None, k, :])
    circles = (np.diagonal(far, axis1=1, axis2=2) < 0).any(-1)
    return (reach == reach.swapaxes(1, 2)).all((1, 2)) & (circles | ~tied.any((1, 2)))


def groups(counts: Float[np.ndarray, "pairs 3"], models: int) -> list[list[int]]:
    """Models that were compared with each other, directly or by others; strengths of two groups say nothing."""
    linked = np.eye(models, dtype=bool)
    linked[np.triu_indices(models, 1)] = counts.sum(-1) > 0
    linked |= linked.T
    reach = linked
    for _ in range(models):
        reach = reach @ linked
    return [list(group) for group in sorted({tuple(map(int, np.flatnonzero(row))) for row in reach})]


class Errors(NamedTuple):
    """Standard errors of strengths and of their differences, by resampling."""

    b: Float[np.ndarray, " models"]
    difference: Float[np.ndarray, " pairs"]
    design: Float[np.ndarray, " pairs"]
    """The difference's variance over what it were, were all answers independent; at least 1."""
    freedom: int
    """Degrees of freedom: one less than there are raters or prompts, whichever are fewer."""

    @property
    def factor(self) -> float:
        """So many standard errors are half of a 95 % interval, by Student's distribution."""
        return float(stdtrit(self.freedom, 0.975))


def bootstrap_errors(judgements: Judgements, resamples: int = 1000, seed: int = 0) -> Errors | None:
    """Errors that hold for other raters and other prompts.

    The variance is that over raters, plus that over prompts, less that over answers, which both of them have in them
    (Cameron, Gelbach & Miller 2011); each is a bootstrap's. To resample raters and prompts at once would count the
    answers' own noise three times (Owen 2007). Standard errors are half of what lies between the 16th and the 84th
    percentile, on which single resamples without a bound have no influence.

    Args:
        judgements: the answers.
        resamples: of each kind.
        seed: of the resampling.

    Returns:
        None where there is only one rater and one prompt.
    """
    rng = np.random.default_rng(seed)
    counts = judgements.counts()
    pairs = np.array(judgements.pairs)

    def variance(tables: Sequence[Float[np.ndarray, "_ pairs 3"]]) -> Float[np.ndarray, " values"]:
        b = np.concatenate([davidson(table, judgements.models, steps=40).b for table in tables])
        values = np.concatenate([b, b[:, pairs[:, 0]] - b[:, pairs[:, 1]]], axis=1)
        low, high = np.quantile(values, (0.1587, 0.8413), axis=0)
        return ((high - low) / 2) ** 2

    def chunks() -> list[int]:
        return [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]

    def clusters(group: Int[np.ndarray, " n"]) -> Float[np.ndarray, " values"]:
        tables = judgements.counts_by(group)
        n = len(tables)
        drawn = (rng.multinomial(n, np.full(n, 1 / n), size) for size in chunks())
        return variance([np.tensordot(times.astype(float), tables, 1) for times in drawn]) * n / (n - 1)

    n = int(counts.sum())
    ways = [group for group in (judgements.rater, judgements.prompt) if len(np.unique(group)) > 1]
    if not ways:
        return None
    alone = variance([rng.multinomial(n, counts.ravel() / n, size).reshape(size, -1, 3).astype(float)
                      for size in chunks()])  # fmt: skip
    by_way = [clusters(group) for group in ways]
    # Where both ways agree that there is nothing but the answers' noise, the difference may be too small by chance.
    both = np.maximum(np.add.reduce(by_way) - (len(ways) - 1) * alone, np.maximum.reduce([*by_way, alone]))
    freedom = min(len(np.unique(group)) for group in ways) - 1
    m = judgements.models
    return Errors(np.sqrt(both[:m]), np.sqrt(both[m:]), both[m:] / np.maximum(alone[m:], 1e-12), freedom)
