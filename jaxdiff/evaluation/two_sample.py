"""An adversary: can a classifier tell two sets of images apart, and how sure is that?

Classifier two-sample tests (Lopez-Paz & Oquab 2017): where both sets come from one distribution, no classifier is right
more often than half of the time on images that it has not seen. All p-values are exact, by permuting labels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy import stats

from jaxdiff.evaluation.blocks import Features, Others, check_sets
from jaxdiff.evaluation.mmd import check_paired, shuffled
from jaxdiff.evaluation.neighbours import nearest_neighbour

LOGIT_VARIANCE = 4.0
"""Of the logistic regression's logits before it has seen an image: its prior, which is its regularisation."""
PERMUTATIONS = 2000


class Verdict(NamedTuple):
    """What a classifier found."""

    accuracy: float
    """The mean of both sets' shares that were told right; 1/2 is chance."""
    auc: float
    """How often an image of the second set has a larger logit than one of the first; NaN where there are no logits."""
    p: float
    """How often chance does as well."""
    tested: int
    """Images that it was asked about."""

    @property
    def power(self) -> float:
        """The chance to find a difference at 5 % where a classifier's true accuracy is 60 %, for so many images."""
        return power(0.6, self.tested)


def power(accuracy: float, tested: int, alpha: float = 0.05) -> float:
    """The chance that a true accuracy is found to be above 1/2, on `tested` images (Lopez-Paz & Oquab 2017, eq. 2).

    Raises:
        ValueError: for an accuracy that is not between 1/2 and 1.
    """
    gain = accuracy - 0.5
    if not 0 <= gain < 0.5:
        raise ValueError(f"accuracy is {accuracy}; it must be at least 0.5 and below 1.")
    found = (gain * np.sqrt(tested) - stats.norm.ppf(1 - alpha) / 2) / np.sqrt(0.25 - gain**2)
    return float(stats.norm.cdf(found))


def detectable(tested: int, wanted: float = 0.8, alpha: float = 0.05) -> float:
    """The least true accuracy that is found with a power of `wanted`, to a thousandth; 1 where there is none."""
    low, high = 0.5, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, tested, alpha) >= wanted else (middle, high)
    return round(high, 3)


def nearest_neighbour_test(
    first: Features, second: Others, *, paired: bool = False, permutations: int = PERMUTATIONS, seed: int = 0
) -> Verdict:
    """Each image is given the set of the nearest other one; nothing is trained, and none is kept for testing.

    Which image is nearest to which does not depend on labels, so that permuting them costs hardly anything.

    Args:
        first: features of one set; real images on one side make this a test of a model.
        second: of the other one.
        paired: image i of both has one prompt. An image is not compared with its partner, and labels are only swapped
            within pairs.
        permutations: how many, for the p-value.
        seed: of the permutations.

    Raises:
        ValueError: as `check_sets` does.
    """
    check_sets(first, second, 2)
    both, labels, pairs = _pooled(first, second, paired)
    partners = None if pairs is None else (np.arange(len(both)) + pairs) % len(both)
    nearest = nearest_neighbour(both, partners)
    rng = np.random.default_rng(seed)
    orders = np.concatenate([labels[:, None], shuffled(labels, permutations, pairs, rng)], axis=1)
    right = orders == orders[nearest]
    found = (right & (orders == 0)).sum(0) / (2 * len(first)) + (right & (orders == 1)).sum(0) / (2 * len(second))
    return Verdict(float(found[0]), float("nan"), _p(found), len(both))


def logistic_test(
    first: Features, second: Others, *, paired: bool = False, permutations: int = PERMUTATIONS, seed: int = 0
) -> Verdict:
    """A logistic regression on features: it learns from one half of the images and is tested on the other.

    Args:
        first: as in `nearest_neighbour_test`.
        second: of the other one.
        paired: as there; both images of a prompt are in the same half.
        permutations: how many, for the p-value of the AUC.
        seed: of the halves and the permutations.

    Raises:
        ValueError: as `check_sets` does; each set needs 4 images.
    """
    check_sets(first, second, 4)
    both, labels, pairs = _pooled(first, second, paired)
    return held_out_test(lambda train: _logistic(both[train], labels[train])(both), labels, pairs, permutations, seed)


def held_out_test(
    train: Callable[[Int[np.ndarray, " t"]], Float64[np.ndarray, " n"]],
    labels: Int[np.ndarray, " n"],
    pairs: int | None,
    permutations: int,
    seed: int,
) -> Verdict:
    """The test of any classifier.

    Args:
        train: gets the places of the images to learn from, and returns logits of all images.
        labels: 0 and 1, of each image.
        pairs: images i and i + pairs have one prompt; None where there are no such pairs.
        permutations: of the tested images' labels.
        seed: of the halves and the permutations.
    """
    rng = np.random.default_rng(seed)
    if pairs is None:
        halves = [np.array_split(rng.permutation(np.flatnonzero(labels == label)), 2) for label in (0, 1)]
        learnt, tested = (np.concatenate(part) for part in zip(*halves, strict=True))
    else:
        one, other = np.array_split(rng.permutation(pairs), 2)
        learnt, tested = (np.concatenate([part, part + pairs]) for part in (one, other))
    logits, own = train(learnt)[tested], labels[tested]
    accuracy = float(np.mean([((logits > 0) == label)[own == label].mean() for label in (0, 1)]))
    ranks = stats.rankdata(logits)
    counts = np.bincount(own)
    orders = shuffled(own, permutations, None if pairs is None else len(tested) // 2, rng)
    sums = np.concatenate([[ranks @ own], ranks @ orders])
    auc = (sums[0] - counts[1] * (counts[1] + 1) / 2) / (counts[0] * counts[1])
    return Verdict(accuracy, float(auc), _p(sums), len(tested))


def control(
    test: Callable[[Features, Others, int], float], real: Features, splits: int = 200, seed: int = 0
) -> tuple[Float64[np.ndarray, " {splits}"], float]:
    """A test's p-values where there is nothing to find: real images against real ones, in random halves.

    Args:
        test: gets two sets and a seed, and returns a p-value.
        real: features of real images.
        splits: how many halves.
        seed: of the halves.

    Returns:
        The p-values, which should be uniform, and the p-value of a Kolmogorov-Smirnov test of that.
    """
    rng = np.random.default_rng(seed)
    found = []
    for i in range(splits):
        order = rng.permutation(len(real))
        found.append(test(real[order[: len(real) // 2]], real[order[len(real) // 2 :]], i))
    return np.array(found), float(stats.kstest(found, "uniform").pvalue)


def _pooled(
    first: Features, second: Others, paired: bool
) -> tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " k"], int | None]:
    """Both sets together, which is which, and how many pairs of prompts there are."""
    if paired:
        check_paired(first, second)
    labels = np.repeat([0, 1], [len(first), len(second)])
    return np.concatenate([first, second]), labels, len(first) if paired else None


def _p(found: Float64[np.ndarray, " k"]) -> float:
    """Of the first of the numbers among all of them, which are as likely where there is nothing to find."""
    return float(np.mean(found >= found[0] - 1e-12))


def _logistic(x: Float[np.ndarray, "t d"], labels: Int[np.ndarray, " t"]) -> Callable[[np.ndarray], np.ndarray]:
    """The most likely logistic regression under a normal prior of its weights, by Newton's method.

    Features are standardised first. The prior's width is such that logits have `LOGIT_VARIANCE` before.
    """
    x = x.astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > 1e-9 * np.abs(mean) + 1e-12, 1 / np.maximum(deviation, 1e-300), 0)
    # In the coordinates of the singular vectors there are no more dimensions than images.
    u, s, v = np.linalg.svd((x - mean) * scale, full_matrices=False)
    held = s > 1e-10 * max(s[0], 1e-300)
    z = np.column_stack([u[:, held] * s[held], np.ones(len(x))])
    ridge = np.full(z.shape[1], max(np.count_nonzero(scale), 1) / LOGIT_VARIANCE)
    ridge[-1] = 1e-6
    w = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        gradient = z.T @ (p - labels) + ridge * w
        step = np.linalg.solve((z.T * np.maximum(p * (1 - p), 1e-12)) @ z + np.diag(ridge), gradient)
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    weights, bias = scale * (v[held].T @ w[:-1]), w[-1]
    return lambda x: (x - mean) @ weights + bias
