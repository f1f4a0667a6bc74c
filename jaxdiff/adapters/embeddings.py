"""Learned words (Gal et al. 2023, textual inversion): rows of their own in a text encoder's table of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class WithRows:
    """A table with rows put in place or behind it: an array that is made whenever it is asked for.

    NumPy takes it for an array, and till then it takes no memory.
    """

    table: Any
    """The array [tokens d] as it was read."""
    numbers: Int[np.ndarray, " n"]
    """Which rows they become."""
    rows: Float[np.ndarray, "n d"]

    dtype = np.dtype(np.float32)
    ndim = 2

    @property
    def parts(self) -> Iterator[Any]:
        """The arrays that it is made of, which may be mapped from files."""
        yield self.table
        yield self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return max(self.table.shape[0], int(self.numbers.max()) + 1), self.table.shape[1]

    @property
    def size(self) -> int:
        """As of an array."""
        return self.shape[0] * self.shape[1]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The whole table: float32, or cast from there.

        Raises:
            ValueError: where it is not wanted as a copy.
        """
        if copy is False:
            raise ValueError("A table with further rows is made anew for everyone who asks.")
        whole = np.zeros(self.shape, dtype or np.float32)
        with np.errstate(over="ignore"):
            whole[: self.table.shape[0]] = self.table
            whole[self.numbers] = self.rows
        return whole
