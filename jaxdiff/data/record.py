"""What a source gives for each position."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxdiff.data.bad import BadRecord
from jaxdiff.data.captions import Caption

__all__ = ["BadRecord", "Record", "Source", "check_numbers"]


@dataclass(frozen=True)
class Record:
    """An image as its file's bytes, or as the `moments` [h, w, 2c] that a VAE encoded; and what is known of it."""

    caption: Caption
    image: bytes = b""
    moments: np.ndarray | None = None
    numbers: tuple[int, ...] = ()
    """Of moments, what `jaxdiff.data.images.Cut` says of the image that was encoded."""
    contexts: tuple[np.ndarray, ...] = ()
    """What text encoders made of drawn captions, each [t, d]; where there are any, one is taken for the caption."""
    pooled: tuple[np.ndarray, ...] = ()
    """Beside contexts, the vectors [p] for these captions as a whole, of models that read such."""


def check_numbers(record: Record, wanted: bool) -> None:
    """Refuses cached latents that do not say of which image they are which part, where this is wanted.

    Raises:
        BadRecord: where they do not.
    """
    if wanted and not record.numbers:
        raise BadRecord("it does not say its image's size: cache the latents anew, as earlier versions wrote none")


@runtime_checkable
class Source(Protocol):
    """Records by position."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The record; raises `BadRecord` where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The record's name in messages; reads nothing."""
        ...

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every record, 0 where not known; pixels or latents, as only their ratio counts."""
        ...
