"""How images get the size that a network wants, by rules that have names: another rule is another measure.

Parmar et al. 2022 found that the same images have a FID apart by several points through two libraries' resizing alone.
"""

from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8

Rule = Literal["clean", "legacy-torch", "legacy-tf"]
"""clean: bicubic, with antialiasing, in floating point, clipped to 0 to 255 and not rounded, as clean-fid and Pillow do
it. legacy-torch: bilinear without antialiasing, pixels' centres kept, as pytorch-fid does it. legacy-tf: bilinear
without antialiasing, corners kept and so half a pixel off, as TensorFlow 1 and torch-fidelity do it."""


def resize(images: UInt8[np.ndarray, "n h w 3"], size: int, rule: Rule = "clean") -> Float32[np.ndarray, "n s s 3"]:
    """Images as floats in 0 to 255 of size x size pixels, whatever their aspect was."""
    down, across = (resize_matrix(n, size, rule).astype(np.float32) for n in images.shape[1:3])
    x = down @ images.transpose(0, 3, 1, 2).astype(np.float32) @ across.T
    return np.ascontiguousarray(np.clip(x, 0, 255, out=x).transpose(0, 2, 3, 1))


@cache
def resize_matrix(n: int, size: int, rule: Rule) -> Float64[np.ndarray, "size n"]:
    """The weights of n pixels for each of `size` new ones, along one side."""
    ratio = n / size
    if rule == "clean":
        wide = max(ratio, 1.0)  # the kernel grows with what is left out
        t = np.abs((np.arange(n) + 0.5) - (np.arange(size)[:, None] + 0.5) * ratio) / wide
        # Keys 1981, eq. 15: a = -1/2
        weights = np.where(t < 1, (1.5 * t - 2.5) * t**2 + 1, np.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0))
        return weights / weights.sum(1, keepdims=True)
    places = np.arange(size) * ratio if rule == "legacy-tf" else (np.arange(size) + 0.5) * ratio - 0.5
    places = places.clip(0, n - 1)
    low = np.floor(places).astype(int)
    weights = np.zeros((size, n))
    rows = np.arange(size)
    np.add.at(weights, (rows, low), 1 - (places - low))
    np.add.at(weights, (rows, np.minimum(low + 1, n - 1)), places - low)
    return weights
