"""The Frechet distance of two sets of features (FID; Heusel et al. 2017, eq. 6), and how far a number of it can be
trusted: its growth as pictures get fewer, its spread, and its floor.

All of it is in float64, on the host. The covariances' product is never given to a matrix square root: it is not
symmetric, and where there are fewer pictures than dimensions it is singular.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from jaxdiff.evaluation.blocks import Features, Others, check_sets, slices

SIZES = 15
"""Numbers of pictures between a fifth of all and all of them, through which the line for `frechet_infinity` goes."""
_SINGULAR = 1e-9  # of the largest pivot: below that a root has lost half of its digits


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features that come in parts; the sum of two is that of the joined parts.

    (Chan, Golub & LeVeque 1983, eq. 2.1: nothing large is taken from something large.)
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]
    """The sum of (x - mean) (x - mean)^T."""

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Of features that are there at once, a block of them in float64 at a time."""
        return cls.streamed(features[rows] for rows in slices(len(features)))

    @classmethod
    def streamed(cls, parts: Iterable[Float[np.ndarray, "_ d"]]) -> "Moments":
        """Of features as they come; no more than one part of them need be there.

        Raises:
            ValueError: where there are none.
        """
        total = None
        for part in parts:
            mean = part.mean(0, dtype=np.float64)
            centred = part - mean
            moments = cls(len(part), mean, centred.T @ centred)
            total = moments if total is None else total + moments
        if total is None:
            raise ValueError("There are no features; give at least one image.")
        return total

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(apart, apart * (self.count * other.count / count))
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """The unbiased one, over n - 1, as all libraries have it."""
        return self.scatter / (self.count - 1)


class Gaussian(NamedTuple):
    """The normal distribution that stands for a set: its mean, and a root R of its covariance R R^T."""

    count: int
    """Pictures that it was measured on."""
    mean: Float64[np.ndarray, " d"]
    root: Float64[np.ndarray, "d r"]

    @classmethod
    def of(cls, features: Features) -> "Gaussian":
        """Of features; where they are no more than dimensions, they themselves are the root, and all is exact."""
        if len(features) > features.shape[1]:
            return cls.of_moments(Moments.of(features))
        mean = features.mean(0, dtype=np.float64)
        return cls(len(features), mean, (features - mean).T / np.sqrt(len(features) - 1))

    @classmethod
    def of_moments(cls, moments: Moments) -> "Gaussian":
        """Of moments. Where the covariance is singular, directions whose variance is rounding are left out."""
        covariance = moments.covariance
        with suppress(np.linalg.LinAlgError):
            root = np.linalg.cholesky(covariance)  # a twentieth of the time
            pivots = np.square(np.diagonal(root))
            if pivots.min() > _SINGULAR * pivots.max():
                return cls(moments.count, moments.mean, root)
        variances, directions = np.linalg.eigh(covariance)
        held = variances > np.finfo(np.float64).eps * len(variances) * max(variances[-1], 0)
        return cls(moments.count, moments.mean, directions[:, held] * np.sqrt(variances[held]))

    @property
    def trace(self) -> float:
        """The sum of all variances."""
        return float(np.square(self.root).sum())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^1/2), the squared Wasserstein distance of two normal distributions.

    The eigenvalues of S_a S_b = R_a R_a^T R_b R_b^T are the squared singular values of R_a^T R_b.
    """
    shared = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum() if a.root.size and b.root.size else 0.0
    apart = float(np.square(a.mean - b.mean).sum())
    return max(apart + a.trace + b.trace - 2 * float(shared), 0.0)


def frechet(a: Features, b: Others) -> float:
    """`frechet_distance` of two sets of features.

    Raises:
        ValueError: as `check_sets` does.
    """
    check_sets(a, b)
    return frechet_distance(Gaussian.of(a), Gaussian.of(b))


class Line(NamedTuple):
    """Distances of n pictures against as many others, and the straight line in 1/n through them."""

    sizes: Int[np.ndarray, " k"]
    distances: Float64[np.ndarray, " k"]
    infinity: float
    """Where the line meets 1/n = 0: the distance that endless sets would have."""
    slope: float
    """What a distance of n pictures has too much, times n."""


def frechet_infinity(a: Features, b: Others, seed: int = 0, points: int = SIZES) -> Line:
    """Frechet distances at several numbers of pictures, and their limit (Chong & Forsyth 2020, section 3).

    Both sets are cut to each size, so that equal distributions have the limit 0: the paper cuts the generated set
    alone, and what a finite reference adds stays in. Bias falls as 1/n only where n is well above the dimensions.

    Args:
        a: one set.
        b: the other one.
        seed: of the order in which pictures are taken; smaller sizes are the beginnings of larger ones.
        points: numbers of pictures, from a fifth of the smaller set to all of it.

    Raises:
        ValueError: as `check_sets` does; each set needs 10 pictures.
    """
    check_sets(a, b, 10)
    rng = np.random.default_rng(seed)
    n = min(len(a), len(b))
    a, b = (x[rng.permutation(len(x))[:n]] for x in (a, b))
    sizes = np.unique(np.linspace(max(n // 5, 2), n, points).astype(int))
    both = zip(_nested(a, sizes), _nested(b, sizes), strict=True)
    distances = np.array([frechet_distance(*pair) for pair in both])
    slope, infinity = np.polyfit(1 / sizes, distances, 1)
    return Line(sizes, distances, float(infinity), float(slope))


def _nested(features: Features, sizes: Int[np.ndarray, " k"]) -> Iterator[Gaussian]:
    """Of the first n features for each size; what was added up for a smaller one is not added up again."""
    moments, done = None, 0
    for size in sizes:
        if size <= features.shape[1]:
            yield Gaussian.of(features[:size])
            continue
        part = Moments.of(features[done:size])
        moments, done = part if moments is None else moments + part, size
        yield Gaussian.of_moments(moments)


def standard_errors(
    statistics: Callable[[Features, Others], Sequence[float]],
    a: Features,
    b: Others,
    replicates: int = 40,
    seed: int = 0,
) -> list[float]:
    """The bootstrap's standard errors of statistics of two sets: pictures of each are drawn anew, with replacement.

    Of a distance that grows as pictures get fewer the bootstrap's mean is too large, since it draws some twice; its
    spread is right. So an interval is the statistic itself plus and minus 1.96 of these.

    Args:
        statistics: of the two sets.
        a: one set.
        b: the other one.
        replicates: how often.
        seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    found = [statistics(*(x[rng.integers(len(x), size=len(x))] for x in (a, b))) for _ in range(replicates)]
    return np.std(found, axis=0, ddof=1).tolist()


class Floor(NamedTuple):
    """A distance beside that of real pictures from other real ones, at the same numbers."""

    count: int
    """Pictures on each side."""
    distance: float
    """Of what is judged from one half of the real pictures."""
    floor: float
    """Of the other half of the real pictures from that half: what no model can be expected to be below."""


def above_floor(judged: Features, real: Others, seed: int = 0) -> Floor:
    """The Frechet distance and its floor, of the same number of pictures on all sides.

    Raises:
        ValueError: as `check_sets` does; there must be 4 real pictures.
    """
    check_sets(judged, real, 4)
    rng = np.random.default_rng(seed)
    n = min(len(judged), len(real) // 2)
    judged, real = (x[rng.permutation(len(x))] for x in (judged, real))
    one, other, mine = (Gaussian.of(x) for x in (real[:n], real[n : 2 * n], judged[:n]))
    return Floor(n, frechet_distance(mine, one), frechet_distance(other, one))


def principal(reference: Features, dimensions: int) -> Callable[[Others], Float64[np.ndarray, "m k"]]:
    """The projection of features on the reference's first principal components, about its mean.

    With few pictures a Frechet distance of all dimensions is mostly its floor; of 64 it is not.

    Raises:
        ValueError: where the dimensions are not below the features' own, and the number of pictures.
    """
    most = min(len(reference), reference.shape[1])
    if not 1 <= dimensions < most:
        raise ValueError(f"dimensions is {dimensions}; of {len(reference)} pictures' features of "
                         f"{reference.shape[1]} dimensions it must be from 1 to {most - 1}.")  # fmt: skip
    moments = Moments.of(reference)
    directions = np.linalg.eigh(moments.covariance)[1][:, : -dimensions - 1 : -1]
    return lambda features: (features - moments.mean) @ directions
