"""Images that are there twice: equal pixels by a digest, images that look alike by a perceptual hash.

The hash is 64 bits: the signs of the 48 lowest frequencies of the luma's cosine transform against their median (Zauner
2010, "pHash"), and 16 bits of the mean chroma, without which drawings that differ in colour alone would be equal.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, UInt64
from PIL import Image

_SIDE, _LOW = 32, 7
_BITS = 64


def _cosines() -> Float[np.ndarray, "low side"]:
    """Rows of the DCT-II; the scale of each does not change a sign, and hardly the median."""
    k, x = np.arange(_LOW)[:, None], np.arange(_SIDE)
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))


_DCT = _cosines()
# Chroma is 128 without colour. The further a mean is from that, the more of its bits are set.
_CHROMA = 128 + np.array([-48, -32, -16, -6, 6, 16, 32, 48])


def pixel_digest(image: Image.Image) -> str:
    """Equal for images of the same pixels, however they were compressed: 32 hexadecimal digits of SHA-256."""
    head = f"{image.mode} {image.width} {image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:32]


def look(image: Image.Image) -> int:
    """The perceptual hash of an RGB or RGBA image; what is transparent counts as grey."""
    if image.mode == "RGBA":
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2)
        ground = Image.new("RGB", small.size, (128, 128, 128))
        ground.paste(small.convert("RGB"), mask=small.getchannel("A"))
        image = ground
    pixels = np.asarray(image.convert("YCbCr").resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2), np.float64)
    waves = (_DCT @ pixels[..., 0] @ _DCT.T).ravel()[1:]
    chroma = pixels[..., 1:].mean((0, 1))
    bits = np.concatenate([waves > np.median(waves), (chroma[:, None] > _CHROMA).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def bands(value: int, distance: int) -> list[tuple[int, int]]:
    """`distance` + 1 pieces of a hash, each with its number.

    Two hashes of at most this Hamming distance are equal in one of them: so few bits cannot spoil all the pieces.
    """
    edges = [_BITS * i // (distance + 1) for i in range(distance + 2)]
    return [(i, value >> low & (1 << (high - low)) - 1) for i, (low, high) in enumerate(pairwise(edges))]


def first_alike(hashes: Sequence[int], distance: int) -> list[int]:
    """For each hash the position of the first one within the Hamming distance: its own, where no earlier one is."""
    values: UInt64[np.ndarray, " n"] = np.array(hashes, np.uint64)
    different, first = np.unique(values, return_index=True)
    order = np.argsort(first)
    different, first = different[order], first[order]  # each hash once, in the order of its first place
    nearest = {}
    for i, value in enumerate(different):
        near: Bool[np.ndarray, " i"] = np.bitwise_count(different[: i + 1] ^ value) <= distance
        nearest[int(value)] = int(first[near.argmax()])
    return [nearest[int(value)] for value in values]
