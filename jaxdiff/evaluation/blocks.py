"""All pairs of two sets of features, a block at a time: memory is that of a block, whatever the sets."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import DTypeLike

BLOCK = 2048
"""Features on each side of a block: 32 MB of products, and twice 32 MB of features of 2,048 dimensions."""

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]


class Block(NamedTuple):
    """Products of some features of one set with some of the other."""

    rows: slice
    columns: slice
    products: Float[np.ndarray, "r c"]
    """Inner products."""
    row_squares: Float[np.ndarray, " r"]
    column_squares: Float[np.ndarray, " c"]
    """The features' own squared lengths."""

    @property
    def squared_distances(self) -> Float[np.ndarray, "r c"]:
        """Squared Euclidean distances, none below 0."""
        d = self.products * -2
        d += self.row_squares[:, None]
        d += self.column_squares
        return np.maximum(d, 0, out=d)


def check_sets(a: np.ndarray, b: np.ndarray, least: int = 2) -> None:
    """Refuses two sets of features that cannot be compared.

    Raises:
        ValueError: where one is no table of finite numbers, has fewer than `least` rows, or the widths differ.
    """
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"The {name} set of features is {x.dtype} {list(x.shape)}; it must be floats [n, d].")
        if len(x) < least:
            raise ValueError(f"The {name} set has {len(x)} images; this measure needs at least {least}.")
        if not all(np.isfinite(x[rows]).all() for rows in slices(len(x))):
            raise ValueError(f"The {name} set of features has values that are not finite; look at its images.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"The features have {a.shape[1]} and {b.shape[1]} dimensions; take both from one network.")


def slices(n: int, size: int = BLOCK) -> Iterator[slice]:
    """0 to n in pieces of `size`."""
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def blocks(
    x: Features,
    y: Others | None = None,
    size: int = BLOCK,
    *,
    dtype: DTypeLike = np.float64,
    centre: Float[np.ndarray, " d"] | None = None,
) -> Iterator[Block]:
    """The products of every feature of `x` with every one of `y`.

    Args:
        x: the rows.
        y: the columns. Without it they are `x`, and a block below the diagonal is left out: it is the transpose of one
            that is given.
        size: features on each side of a block.
        dtype: of the products. float32 takes half of the time; what it rounds, features of float32 have rounded before.
        centre: is taken from all features, which changes no distance and makes float32's exact to more digits.
    """

    def taken(features: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray]:
        found = features[part].astype(dtype)
        if centre is not None:
            found -= centre.astype(dtype)
        return found, np.einsum("nd,nd->n", found, found)

    for rows in slices(len(x), size):
        left, left_squares = taken(x, rows)
        for columns in slices(len(x if y is None else y), size):
            if y is None and columns.start < rows.start:
                continue
            if y is None and columns == rows:
                right, right_squares = left, left_squares
            else:
                right, right_squares = taken(x if y is None else y, columns)
            yield Block(rows, columns, left @ right.T, left_squares, right_squares)
