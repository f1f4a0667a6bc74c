"""Precision, recall, density and coverage: do images lie where real ones do, and everywhere there?

A set's support is guessed as balls round its features, each reaching to the k-th nearest other feature of the set.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.evaluation.blocks import Features, Others, blocks, check_sets, slices

BALL, DENSITY_BALL = 3, 5
"""k of precision and recall (Kynkaanniemi et al. 2019), and of density and coverage (Naeem et al. 2020)."""


class Support(NamedTuple):
    """Shares of images; density may be above 1."""

    precision: float
    """Of judged images, those within a ball of the real ones: are they good?"""
    recall: float
    """Of real images, those within a ball of the judged ones: are all kinds there?"""
    density: float
    """Balls of real images that a judged one lies in, over k; unlike precision it minds no single outlier."""
    coverage: float
    """Of real images, those whose own ball has a judged one in it."""


def support(judged: Features, real: Others, ball: int = BALL, density_ball: int = DENSITY_BALL) -> Support:
    """All four. Swapped sets have precision and recall swapped.

    Distances are in the features' own type; which is nearer is left to chance where float32 cannot tell.

    Args:
        judged: features of the images that a model made.
        real: features of real ones.
        ball: the k of precision and recall.
        density_ball: that of density and coverage.

    Raises:
        ValueError: as `check_sets` does; each set must have more images than k.
    """
    if min(ball, density_ball) < 1:
        raise ValueError(f"The balls reach to neighbours {ball} and {density_ball}; they must be at least 1.")
    check_sets(judged, real, max(ball, density_ball) + 1)
    exact = {"dtype": np.result_type(judged, real), "centre": real.mean(0)}
    real_radii = radii(real, ball, density_ball, **exact)
    judged_radii = radii(judged, ball, **exact)[0]
    precise, recalled, covered = np.zeros(len(judged), bool), np.zeros(len(real), bool), np.zeros(len(real), bool)
    within = 0
    for block in blocks(real, judged, **exact):
        rows, columns, d = block.rows, block.columns, block.squared_distances
        precise[columns] |= (d <= real_radii[0][rows, None]).any(0)
        recalled[rows] |= (d <= judged_radii[columns]).any(1)
        inside = d <= real_radii[1][rows, None]
        covered[rows] |= inside.any(1)
        within += int(np.count_nonzero(inside))
    density = within / (density_ball * len(judged))
    return Support(float(precise.mean()), float(recalled.mean()), density, float(covered.mean()))


def radii(x: Features, *neighbours: int, **exact: Any) -> list[Float[np.ndarray, " n"]]:
    """For each k the squared distance of every feature to its k-th nearest other one; `exact` as `blocks` has it."""
    most = max(neighbours)
    nearest = np.full((len(x), most), np.inf, exact.get("dtype", np.float64))
    for block in blocks(x, **exact):
        d = block.squared_distances
        if block.rows == block.columns:
            np.fill_diagonal(d, np.inf)
        else:
            _keep(nearest, block.columns, d.T, most)
        _keep(nearest, block.rows, d, most)
    nearest.sort(axis=1)
    return [nearest[:, k - 1].copy() for k in neighbours]


def _keep(nearest: Float[np.ndarray, "n k"], rows: slice, d: Float[np.ndarray, "r c"], k: int) -> None:
    """Lets the smallest of what is there and what is new stay."""
    found = np.concatenate([nearest[rows], np.partition(d, k - 1, axis=1)[:, :k] if d.shape[1] > k else d], axis=1)
    nearest[rows] = np.partition(found, k - 1, axis=1)[:, :k]


def nearest_neighbour(x: Features, partners: np.ndarray | None = None) -> np.ndarray:
    """Of every feature the place of the nearest other one, and not of its partner where it has one."""
    best, place = np.full(len(x), np.inf), np.zeros(len(x), int)
    for rows in slices(len(x)):
        for block in blocks(x[rows], x):
            d, columns = block.squared_distances, block.columns
            for others in (np.arange(len(x)), partners):
                if others is not None:
                    mine = others[rows] - columns.start
                    inside = (mine >= 0) & (mine < d.shape[1])
                    d[inside, mine[inside]] = np.inf
            nearest = d.argmin(1)
            distance = d[np.arange(len(d)), nearest]
            closer = distance < best[rows]
            best[rows] = np.where(closer, distance, best[rows])
            place[rows] = np.where(closer, nearest + columns.start, place[rows])
    return place
