"""The maximum mean discrepancy of two sets of features (Gretton et al. 2012): KID, CMMD, and a test that learns its
kernel; with p-values by permutation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import DTypeLike

from jaxdiff.evaluation.blocks import Block, Features, Others, blocks, check_sets

Kernel = Callable[[Block], Float[np.ndarray, "r c"]]
"""From a block of products to the kernel's values."""

SUBSETS, SUBSET_SIZE = 100, 1000
"""Those of the paper and of every library."""
MOST_PERMUTED = 2000
"""Pictures of each set in a test by permutations, which keeps all pairs' kernels: 128 MB."""


def polynomial(dimensions: int) -> Kernel:
    """(x.y / d + 1)^3, KID's (Binkowski et al. 2018, section 3.1)."""

    def kernel(block: Block) -> Float[np.ndarray, "r c"]:
        k = block.products / dimensions
        k += 1
        return k * k * k  # a power takes ten times as long

    return kernel


def gaussian(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    return lambda block: np.exp(block.squared_distances / (-2 * sigma**2))


def mmd2(x: Features, y: Others, kernel: Kernel, biased: bool = False, dtype: DTypeLike = np.float64) -> float:
    """The squared discrepancy of all pairs (Gretton et al. 2012, eq. 3 and 5), in blocks.

    Args:
        x: one set.
        y: the other one.
        kernel: of pairs.
        biased: counts each picture's pair with itself, so that the result is never below 0; without, it is 0 on
            average where the distributions are equal.
        dtype: of the products; sums are of float64.

    Raises:
        ValueError: as `check_sets` does.
    """
    check_sets(x, y)
    across = sum(_sum(kernel(block)) for block in blocks(x, y, dtype=dtype)) / (len(x) * len(y))
    return _within(x, kernel, biased, dtype) + _within(y, kernel, biased, dtype) - 2 * across


def _sum(k: Float[np.ndarray, "*shape"]) -> float:
    return float(k.sum(dtype=np.float64))


def _within(x: Features, kernel: Kernel, biased: bool, dtype: DTypeLike = np.float64) -> float:
    """The mean over a set's own pairs."""
    total = 0.0
    for block in blocks(x, dtype=dtype):
        k = kernel(block)
        if block.rows != block.columns:
            total += 2 * _sum(k)
        else:
            total += _sum(k) - (0 if biased else _sum(np.diagonal(k)))
    return total / (len(x) * (len(x) if biased else len(x) - 1))


def kid(x: Features, y: Others) -> float:
    """The kernel inception distance of all pictures, unbiased: no subsets, no chance."""
    return mmd2(x, y, polynomial(x.shape[1]))


class Subsets(NamedTuple):
    """KID as papers report it."""

    mean: float
    deviation: float
    """The standard deviation of the subsets, which falls as they grow, and not as they become more."""


def kid_by_subsets(x: Features, y: Others, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> Subsets:
    """The mean of KID over random subsets of both sets.

    Products are in the features' own type: of float32 they are off by a thousandth of what chance is.

    Raises:
        ValueError: where a set has fewer pictures than a subset.
    """
    check_sets(x, y)
    if not 2 <= size <= min(len(x), len(y)):
        raise ValueError(f"size is {size}; subsets of sets of {len(x)} and {len(y)} have from 2 to as many pictures "
                         "as the smaller one.")  # fmt: skip
    rng = np.random.default_rng(seed)
    parts = ((s[rng.choice(len(s), size, replace=False)] for s in (x, y)) for _ in range(subsets))
    kernel, dtype = polynomial(x.shape[1]), np.result_type(x, y)
    found = [mmd2(a, b, kernel, dtype=dtype) for a, b in parts]
    return Subsets(float(np.mean(found)), float(np.std(found)))


def cmmd(x: Features, y: Others) -> float:
    """1000 times the squared discrepancy of CLIP's embeddings, of unit length, with a Gaussian kernel of sigma 10.

    (Jayasumana et al. 2024, section 4; biased, as their code has it.)
    """
    x, y = (s / np.linalg.norm(s.astype(np.float64), axis=1, keepdims=True) for s in (x, y))
    return 1000 * mmd2(x, y, gaussian(10.0), biased=True)


class Discrepancy(NamedTuple):
    """A statistic, and how often chance has one as large."""

    statistic: float
    p: float
    error: float
    """The statistic's bootstrap standard error."""
    count: int
    """Pictures of each set that were looked at."""


class Pooled:
    """The kernel of all pairs of both sets together, from which the discrepancy of any labelling is two products."""

    def __init__(self, x: Features, y: Others, kernel: Kernel) -> None:
        self.count = len(x)
        both = np.concatenate([x, y])
        self.matrix = np.zeros((len(both), len(both)))
        for block in blocks(both):
            k = kernel(block)
            self.matrix[block.rows, block.columns] = k
            self.matrix[block.columns, block.rows] = k.T
        np.fill_diagonal(self.matrix, 0)

    def mmd2(self, first: Float64[np.ndarray, "n k"], second: Float64[np.ndarray, "n k"]) -> Float64[np.ndarray, " k"]:
        """Unbiased, of k pairs of weights: how often each picture is in the first set, and how often in the second."""
        to_first, to_second = self.matrix @ first, self.matrix @ second

        def mean(a: np.ndarray, to_b: np.ndarray, b: np.ndarray) -> np.ndarray:
            pairs = a.sum(0) * b.sum(0) - (a * b).sum(0)  # a picture is not compared with itself, however often drawn
            return (a * to_b).sum(0) / pairs

        within = mean(first, to_first, first) + mean(second, to_second, second)
        return within - 2 * mean(first, to_second, second)

    def own(self) -> tuple[Float64[np.ndarray, "n 1"], Float64[np.ndarray, "n 1"]]:
        """The weights of the sets as they are."""
        first = (np.arange(len(self.matrix)) < self.count).astype(np.float64)[:, None]
        return first, 1 - first


def permutation_test(
    x: Features, y: Others, kernel: Kernel, *, permutations: int = 1000, paired: bool = False, seed: int = 0
) -> Discrepancy:
    """Whether two sets come from one distribution: the unbiased discrepancy among those of permuted labels.

    The p-value, (1 + how many are as large) / (1 + permutations), is exact (Phipson & Smyth 2010).

    Args:
        x: one set; of larger sets `MOST_PERMUTED` pictures are drawn.
        y: the other one.
        kernel: of pairs, chosen without these pictures.
        permutations: how many.
        paired: picture i of both sets has one prompt: labels are only swapped within such pairs.
        seed: of what is drawn and permuted.

    Raises:
        ValueError: as `check_sets` does, or where paired sets have different lengths.
    """
    check_sets(x, y)
    rng = np.random.default_rng(seed)
    if paired:
        check_paired(x, y)
        chosen = rng.permutation(len(x))[:MOST_PERMUTED]
        x, y = x[chosen], y[chosen]
    else:
        x, y = (s[rng.permutation(len(s))[:MOST_PERMUTED]] for s in (x, y))
    pooled = Pooled(x, y, kernel)
    first, second = pooled.own()
    found = float(pooled.mmd2(first, second)[0])
    labels = shuffled(first[:, 0].astype(int), permutations, len(x) if paired else None, rng).astype(np.float64)
    by_chance = pooled.mmd2(labels, 1 - labels)
    p = (1 + np.sum(by_chance >= found)) / (1 + permutations)

    def drawn(own: np.ndarray, count: int) -> np.ndarray:
        weights = rng.multinomial(count, own[:, 0] / count, size=200).T
        return weights.astype(np.float64)

    again = pooled.mmd2(drawn(first, len(x)), drawn(second, len(y)))
    return Discrepancy(found, float(p), float(np.std(again)), min(len(x), len(y)))


def check_paired(x: np.ndarray, y: np.ndarray) -> None:
    """Refuses sets of different lengths."""
    if len(x) != len(y):
        raise ValueError(f"The sets have {len(x)} and {len(y)} images; where prompts are paired, each image has one.")


def shuffled(
    labels: Int[np.ndarray, " n"], times: int, pairs: int | None, rng: np.random.Generator
) -> Int[np.ndarray, "n {times}"]:
    """Labels, 0 and 1, in `times` random orders; with `pairs`, i and i + pairs only change places with each other."""
    if pairs is None:
        return np.stack([rng.permutation(labels) for _ in range(times)], axis=1)
    swap = rng.random((pairs, times)) < 0.5
    swap = np.concatenate([swap, swap])
    partner = np.concatenate([labels[pairs:], labels[:pairs]])
    return np.where(swap, partner[:, None], labels[:, None])


def median_distance(x: Features, y: Others) -> float:
    """The median distance of two different pictures of both sets together: the usual first guess of a sigma."""
    both = np.concatenate([x, y])
    squares = [b.squared_distances[np.triu_indices(len(b.row_squares), 1)] if b.rows == b.columns
               else b.squared_distances.ravel() for b in blocks(both)]  # fmt: skip
    return float(np.sqrt(np.median(np.concatenate(squares))))


def best_sigma(x: Features, y: Others) -> float:
    """Of the median distance times 1/8 to 8 the sigma whose test has the most power on pictures like these.

    It maximises the discrepancy over its standard deviation (Sutherland et al. 2017, eq. 4; Liu et al. 2020, eq. 5).
    """
    n = min(len(x), len(y))
    x, y = x[:n], y[:n]
    middle = median_distance(x, y) or 1.0
    ratios: dict[float, float] = {}
    for sigma in middle * 2.0 ** np.arange(-3, 4):
        k = Pooled(x, y, gaussian(sigma)).matrix
        h = k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]
        np.fill_diagonal(h, 0)
        rows = h.sum(1) / n
        variance = 4 * (np.square(rows).mean() - rows.mean() ** 2)
        ratios[float(sigma)] = h.sum() / (n * (n - 1)) / np.sqrt(max(variance, 0) + 1e-8)
    return max(ratios, key=ratios.__getitem__)


def mmd_test(x: Features, y: Others, *, permutations: int = 1000, paired: bool = False, seed: int = 0) -> Discrepancy:
    """`permutation_test` with a Gaussian kernel, whose sigma one half of the pictures chooses and the other is tested
    with.

    Raises:
        ValueError: as `check_sets` does; each set needs 4 pictures.
    """
    check_sets(x, y, 4)
    rng = np.random.default_rng(seed)
    if paired:
        check_paired(x, y)
        order = rng.permutation(len(x))[: 2 * MOST_PERMUTED]
        orders = order, order
    else:
        orders = tuple(rng.permutation(len(s))[: 2 * MOST_PERMUTED] for s in (x, y))
    (x1, x2), (y1, y2) = ((s[o[: len(o) // 2]], s[o[len(o) // 2 :]]) for s, o in zip((x, y), orders, strict=True))
    kernel = gaussian(best_sigma(x1, y1))
    return permutation_test(x2, y2, kernel, permutations=permutations, paired=paired, seed=seed + 1)
