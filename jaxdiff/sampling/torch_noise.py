"""The numbers that PyTorch draws on the CPU, without PyTorch: its seeds then give its starting noise and its steps'."""

import math

import numpy as np
from jaxtyping import Float32

BLOCK = 16  # torch turns uniform numbers into normal ones by so many at a time


class TorchGenerator:
    """`torch.Generator().manual_seed(seed)` on the CPU, as far as float32 `torch.randn` goes.

    The Mersenne Twister (Matsumoto & Nishimura 1998) and Box & Muller's transform (1958). Integers are torch's, normal
    numbers differ in their last bit where its vectorised logarithm and sine do.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        # The seeding of the original article, which torch has too; NumPy's own `seed` argument is hashed first.
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
        """The next unit normal array, as `torch.randn(shape, generator=...)`."""
        size = math.prod(shape)
        if size < BLOCK:
            return np.array([self._one() for _ in range(size)], np.float32).reshape(shape)
        uniform = self._uniform(size)
        normal = np.empty(size, np.float32)
        whole = size - size % BLOCK
        normal[:whole] = _box_muller(uniform[:whole])
        if size > whole:  # the last block lies over the one before, with fresh numbers
            normal[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return normal.reshape(shape)

    def _uniform(self, size: int) -> Float32[np.ndarray, " n"]:
        """In [0, 1), from the low 24 bits of each draw."""
        return (self._bits.random_raw(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        """A single number, in double precision; they come in pairs, and the second waits, also for a later call."""
        if self._spare is not None:
            one, self._spare = self._spare, None
            return one
        high_1, low_1, high_2, low_2 = self._bits.random_raw(4).tolist()
        u_1, u_2 = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in ((high_1, low_1), (high_2, low_2)))
        radius, angle = math.sqrt(-2 * math.log1p(-u_2)), 2 * math.pi * u_1
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def torch_latents(
    seed: int, shape: tuple[int, int, int], count: int, before: tuple[int, ...] | None = None
) -> Float32[np.ndarray, "n h w c"]:
    """What a diffusers pipeline with `generator=torch.Generator().manual_seed(seed)` draws for one image, in turn.

    Args:
        seed: torch's.
        shape: height, width and channels; torch draws channels first.
        count: how many; the first is the starting noise, and each random step takes the next.
        before: the shape of what is drawn before them; see `torch_before`.
    """
    generator, (h, w, c) = TorchGenerator(seed), shape
    if before is not None:
        generator.randn((before[-1], *before[:-1]))
    return np.stack([generator.randn((c, h, w)).transpose(1, 2, 0) for _ in range(count)])


def torch_before(seed: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "*hw c"]:
    """What such a pipeline draws first, where it noises the image that it reads; torch draws channels first."""
    return np.moveaxis(TorchGenerator(seed).randn((shape[-1], *shape[:-1])), 0, -1)


def _box_muller(uniform: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Of each block of 16, the first half makes radii and the second angles; cosines come first, then sines."""
    first, second = uniform.reshape(-1, 2, BLOCK // 2).transpose(1, 0, 2)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
