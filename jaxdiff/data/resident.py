"""A source that is read once, into arrays that devices can hold; batches then are numbers of their rows.

What sample `index` of a run is stays the function of (seed, index) that it is where every record is read again: the
draws of backgrounds, mirror images and captions are the same, and so is each number of a batch.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS, Caption
from jaxdiff.data.images import Augmentation, Cut, decode, has_ground, prepared
from jaxdiff.data.record import BadRecord, Record, Source, check_numbers

MIDDLE = Augmentation(colour=0, share=0.5, x=0.5, y=0.5, mirror=1.0)
"""The whole image, as it is."""


class Resident:
    """All records of `source`, read once, in threads. A `Source` whose records have captions alone."""

    arrays: dict[str, np.ndarray]
    """What records are rows of: `image` uint8 [n, h, w, 3], each on every background that it may be drawn on, or
    `moments` [n, h, w, 2c]; `numbers` [n, 6], if they are wanted; and `context` [m, t, d], and perhaps `pooled` [m, p],
    where captions were encoded. To be taken by `take_arrays`."""

    def __init__(self, source: Source, config: DataConfig, numbers: bool = False) -> None:
        """Reads; with `numbers` the `Cut` of each image, too, which is the same mirrored, as the middle is taken.

        Raises:
            ValueError: where a record is not so many rows: images of several shapes, or cropped at random.
        """
        if config.aspects or (config.crop != 1 and config.source != "latents"):
            what = f"crop is {config.crop}" if config.crop != 1 else f"aspects are {', '.join(config.aspects)}"
            raise ValueError(f"DataConfig.resident keeps whole images of one shape, and DataConfig.{what}: set crop to "
                             "1 and leave aspects out, or leave out resident.")  # fmt: skip
        self._source, self._flip = source, config.flip
        self._captions: list[Caption | BadRecord] = []
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "moments", "numbers", "context", "pooled")}
        firsts = []

        def read(index: int) -> tuple[Caption, dict[str, list[np.ndarray]]] | BadRecord:
            try:
                record = source.record(index)
                found = {"context": list(record.contexts), "pooled": list(record.pooled)}
                if record.moments is not None:
                    check_numbers(record, numbers)
                    found |= {"moments": [record.moments], "numbers": [np.array(record.numbers, np.float32)]}
                else:
                    images, cut = _on_every_ground(record, config)
                    found |= {"image": images, "numbers": [np.array(cut, np.float32)] * len(images)}
                return record.caption, found if numbers else found | {"numbers": []}
            except BadRecord as error:
                return error

        with ThreadPoolExecutor() as pool:
            records = pool.map(read, range(len(source)))
            for found in tqdm(records, "Reading data", len(source), unit=" records", delay=2):
                firsts.append([len(arrays) for arrays in rows.values()])
                if isinstance(found, BadRecord):
                    self._captions.append(found)
                else:
                    self._captions.append(found[0])
                    for name, arrays in found[1].items():
                        rows[name] += arrays
        ends = np.array([*firsts, [len(arrays) for arrays in rows.values()]])
        self._firsts = dict(zip(rows, ends[:-1].T, strict=True))
        self._counts = dict(zip(rows, np.diff(ends, axis=0).T, strict=True))
        self.arrays = {name: np.stack(arrays) for name, arrays in rows.items() if arrays}

    def take_arrays(self) -> dict[str, np.ndarray]:
        """The arrays; they are forgotten here, so that they need not lie in memory twice."""
        arrays, self.arrays = self.arrays, {}
        return arrays

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> Record:
        """The record's caption."""
        caption = self._captions[index]
        if isinstance(caption, BadRecord):
            raise caption
        return Record(caption)

    def name(self, index: int) -> str:
        """As the source has it."""
        return self._source.name(index)

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """As the source has them."""
        return self._source.sizes()

    def draw(self, index: int, rng: np.random.Generator) -> tuple[dict[str, Any], Caption | None]:
        """The rows that a record gives by the draws that reading it would take, and its caption.

        Rows are `row`, with images `mirrored`, and where captions were encoded `context_row` in a caption's place.

        Raises:
            BadRecord: where reading it raised one.
        """
        caption = self.record(index).caption
        if n := int(self._counts["context"][index]):
            context = self._firsts["context"][index] + rng.integers(n)
            return {"row": np.int32(self._firsts["moments"][index]), "context_row": np.int32(context)}, None
        if self._counts["moments"][index]:
            return {"row": np.int32(self._firsts["moments"][index])}, caption
        drawn, row = Augmentation.draw(rng), self._firsts["image"][index]
        if self._counts["image"][index] > 1:
            row, caption = row + drawn.colour, replace(caption, colour=drawn.background)
        return {"row": np.int32(row), "mirrored": np.bool_(self._flip and drawn.mirrored)}, caption


def _on_every_ground(record: Record, config: DataConfig) -> tuple[list[np.ndarray], Cut]:
    image = decode(record.image)
    grounds = range(len(COLOURS)) if has_ground(image, record.caption) else [0]
    made = [prepared(image, record.caption, MIDDLE._replace(colour=i), config, config.shapes[0]) for i in grounds]
    return [image for image, _, _ in made], made[0][2]
