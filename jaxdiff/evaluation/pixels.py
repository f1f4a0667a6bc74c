"""Measures of pixels: PSNR and SSIM of an image and its copy, and how much there is at which fineness."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Of RGB, ITU-R BT.601."""
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Images = UInt8[np.ndarray, "n h w 3"]


def psnr(a: Images, b: Images) -> Float64[np.ndarray, " n"]:
    """10 log10(255^2 / mean squared difference) of each pair, in dB; infinite for equal ones."""
    _check_pairs(a, b)
    error = np.array([np.square(x.astype(np.float64) - y).mean() for x, y in zip(a, b, strict=True)])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: Images, b: Images) -> Float64[np.ndarray, " n"]:
    """The mean structural similarity of each pair, at most 1 (Wang et al. 2004, eq. 13).

    Of each channel by itself, in a Gaussian window of 11 pixels and sigma 1.5, where the whole window lies inside.

    Raises:
        ValueError: for sides below 11 pixels, or images of different shapes.
    """
    _check_pairs(a, b)
    height, width = a.shape[1:3]
    if min(height, width) < _WINDOW:
        raise ValueError(f"The images are {width}x{height}; SSIM needs {_WINDOW} pixels along each side.")
    down, across = _windows(height), _windows(width)

    def local(x: np.ndarray) -> np.ndarray:
        """Weighted means in every window, [c h w]."""
        return down @ x @ across.T

    def one(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (v.astype(np.float64).transpose(2, 0, 1) for v in (x, y))
        mean_x, mean_y = local(x), local(y)
        var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
        covariance = local(x * y) - mean_x * mean_y
        alike = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
        return float((alike / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean())

    return np.array([one(x, y) for x, y in zip(a, b, strict=True)])


def _windows(n: int) -> Float64[np.ndarray, "m {n}"]:
    """A row of weights for each place of the window."""
    weights = np.exp(-np.square(np.arange(_WINDOW) - _WINDOW // 2) / (2 * _SIGMA**2))
    rows = np.zeros((n - _WINDOW + 1, n))
    for i, row in enumerate(rows):
        row[i : i + _WINDOW] = weights / weights.sum()
    return rows


class Spectrum(NamedTuple):
    """The mean power of a set's luminance (0 to 1) at each radial frequency."""

    frequencies: Float64[np.ndarray, " k"]
    """In cycles a pixel, up to 1/2."""
    power: Float64[np.ndarray, " k"]
    """The mean squared amplitude of a wave, such that white noise has its variance at every frequency."""

    @property
    def top_octave(self) -> float:
        """The mean power from 1/4 to 1/2 cycles a pixel: what blur takes away first."""
        return float(self.power[self.frequencies >= 0.25].mean())


class SpectrumSum:
    """Adds up the power of images of one size as they come.

    Each is taken without its mean, under a Hann window, so that its edges count as nothing.
    """

    def __init__(self, height: int, width: int) -> None:
        """Is for images of this size.

        Raises:
            ValueError: for sides below 8 pixels.
        """
        if min(height, width) < 8:
            raise ValueError(f"The images are {width}x{height}; a spectrum needs 8 pixels along each side.")
        self.size, self.count = (height, width), 0
        window = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width)))
        self._window = window / np.sqrt(np.square(window).mean())
        self._power = np.zeros((height, width // 2 + 1))

    def add(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """One more."""
        grey = image @ (LUMINANCE / 255)
        self._power += np.square(np.abs(np.fft.rfft2((grey - grey.mean()) * self._window)))
        self.count += 1

    def result(self) -> Spectrum:
        """The mean over all images so far, by radial frequency."""
        height, width = self.size
        short = min(height, width)
        radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        bins = np.rint(radius * short).astype(int).ravel()
        # A column of half a spectrum stands for two, but for the first and, where there is one, the last.
        twice = np.full(self._power.shape, 2.0)
        twice[:, 0] = 1
        if width % 2 == 0:
            twice[:, -1] = 1
        power = self._power / (max(self.count, 1) * height * width)
        sums, counts = (np.bincount(bins, x.ravel())[1 : short // 2 + 1] for x in (power * twice, twice))
        return Spectrum(np.arange(1, short // 2 + 1) / short, sums / counts)


def radial_spectrum(images: Images) -> Spectrum:
    """`SpectrumSum` of images that are there at once."""
    total = SpectrumSum(*images.shape[1:3])
    for image in images:
        total.add(image)
    return total.result()


def _check_pairs(a: Images, b: Images) -> None:
    if a.shape != b.shape:
        raise ValueError(f"The images have the shapes {list(a.shape)} and {list(b.shape)}; each needs its copy.")
