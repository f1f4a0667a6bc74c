"""How far raters agree: Krippendorff's alpha."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float

Metric = Literal["nominal", "interval"]


def krippendorff_alpha(
    counts: Float[np.ndarray, "units values"], values: Float[np.ndarray, " values"], metric: Metric = "nominal"
) -> float:
    """1 where all raters agree, 0 where they agree as by chance, less where they disagree more (Krippendorff 2011).

    Alpha is 1 - D_o / D_e: the mean difference of two ratings of one unit, over that of any two ratings. Units with
    fewer than two ratings say nothing.

    Args:
        counts: how many raters gave each value to each unit.
        values: what the columns stand for.
        metric: "nominal", where all different values are equally different; or "interval", by the difference's square.

    Returns:
        Alpha; not a number where no unit has two ratings, or all ratings are the same.
    """
    held = counts[counts.sum(1) > 1]
    rated = held.sum(1)
    apart = values[:, None] - values
    different = (apart != 0).astype(float) if metric == "nominal" else apart**2
    by_value = held.sum(0)
    # A value's distance to itself is 0, so that a rating is compared with itself at no cost.
    observed = (np.einsum("uv,vw,uw->u", held, different, held) / np.maximum(rated - 1, 1)).sum()
    expected = by_value @ different @ by_value / max(by_value.sum() - 1, 1)
    return float(1 - observed / expected) if expected > 0 else math.nan


def choice_agreement(counts: Float[np.ndarray, "units 3"]) -> float:
    """Krippendorff's alpha of choices: first, second or neither, a tie lying half-way.

    Which image of a pair is called the first is arbitrary, and may say which model drew it. So each unit counts both
    ways round: what is expected by chance depends on how common ties are, and on nothing else.

    Args:
        counts: of each pair of images, how many raters chose the first, the second, and neither.
    """
    both = np.concatenate([counts, counts[:, [1, 0, 2]]])
    return krippendorff_alpha(both, np.array([1.0, -1.0, 0.0]), "interval")
