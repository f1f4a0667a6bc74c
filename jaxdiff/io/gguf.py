"""Tensors from GGUF files, of which most hold weights in blocks of a few bits: `stable-diffusion.cpp`, ComfyUI-GGUF.

A block is a run of 32 or 256 numbers with a scale, or several; its bytes stay in the mapped file, and a tensor becomes
numbers when it is asked for. The formats are those of ggml (`ggml-quants.c`), bit for bit in float32.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt8

from jaxdiff.io.mapped import map_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the data, where `general.alignment` does not say otherwise
# So that a small file cannot take much memory or time.
_MOST_TENSORS, _MOST_VALUES, _MOST_TEXT, _MOST_ITEMS, _MOST_DIMS = 20_000, 10_000, 2**20, 2**22, 8
_SHAPE = "comfy.gguf.orig_shape."
"""What the key of a tensor's true shape begins with, where its rows were made multiples of a block."""

Bytes = UInt8[np.ndarray, "n bytes"]
Numbers = Float32[np.ndarray, "n size"]


class _Damaged(Exception):
    """What is wrong with a file, in the words that follow "is damaged: "."""


class _Refused(Exception):
    """What a file has that is not read, as a sentence's end."""


# Blocks ---------------------------------------------------------------------------------------------------------------


def _halves(block: np.ndarray) -> np.ndarray:
    """float16 numbers, widened."""
    return np.ascontiguousarray(block).view(np.float16).astype(np.float32)


def _nibbles(block: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 2 * bytes]: all low halves, then all high ones."""
    return np.concatenate([block & 15, block >> 4], axis=-1)


def _crumbs(block: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 4, bytes]: two bits each, the lowest first."""
    return block[:, None] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _bits(block: np.ndarray) -> np.ndarray:
    """[n, bytes] to [n, 8, bytes]: one bit each, the lowest first."""
    return block[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _halves(b[:, 2:4])


def _fifth(b: np.ndarray) -> np.ndarray:
    """The fifth bits of 32 numbers from 4 bytes, in their places."""
    return np.unpackbits(b, axis=-1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).astype(np.float32) + _halves(b[:, 2:4])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(b: np.ndarray) -> np.ndarray:
    n, scales, q = len(b), b[:, :16], b[:, 16:80].reshape(-1, 32)
    d, least = _halves(b[:, 80:82]) * (scales & 15), _halves(b[:, 82:84]) * (scales >> 4)
    return (d[..., None] * _crumbs(q).reshape(n, 16, 16) - least[..., None]).reshape(n, 256)


def _q3_k(b: np.ndarray) -> np.ndarray:
    n, high, q, packed = len(b), b[:, :32], b[:, 32:96].reshape(-1, 32), b[:, 96:108]
    scales = _nibbles(packed[:, :8]) | _crumbs(packed[:, 8:]).reshape(n, 16) << 4
    d = _halves(b[:, 108:110]) * (scales.astype(np.float32) - 32)
    low = _crumbs(q).reshape(n, 16, 16).astype(np.float32)
    without = (1 - _bits(high)).reshape(n, 16, 16)  # a bit that is not set takes 4 away
    return (d[..., None] * (low - 4 * without.astype(np.float32))).reshape(n, 256)


def _scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of six bits, from 12 bytes."""
    d, m, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, rest & 15 | d >> 6 << 4], axis=-1)
    return scales, np.concatenate([m & 63, rest >> 4 | m >> 6 << 4], axis=-1)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _of_eight(b, _nibbles(b[:, 16:].reshape(-1, 32)))


def _q5_k(b: np.ndarray) -> np.ndarray:
    q, fifth = _nibbles(b[:, 48:].reshape(-1, 32)), _bits(b[:, 16:48]) << 4
    return _of_eight(b, q.reshape(-1, 32) | fifth.reshape(-1, 32))


def _of_eight(b: np.ndarray, q: np.ndarray) -> np.ndarray:
    """256 numbers of eight runs, each with a scale and a minimum."""
    scales, minima = _scales(b[:, 4:16])
    d, least = _halves(b[:, :2]) * scales, _halves(b[:, 2:4]) * minima
    return (d[..., None] * q.reshape(len(b), 8, 32) - least[..., None]).reshape(len(b), 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    n = len(b)
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(n, 256)
    high = _crumbs(b[:, 128:192].reshape(-1, 32)).reshape(n, 256) << 4
    d = _halves(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    q = (low | high).astype(np.float32) - 32
    return (d[..., None] * q.reshape(n, 16, 16)).reshape(n, 256)


class _Blocks(NamedTuple):
    """A format of blocks."""

    name: str
    size: int
    """Numbers of a block."""
    bytes: int
    numbers: Callable[[np.ndarray], np.ndarray]
    """[n, bytes] of uint8 to [n, size] of float32."""


_BLOCKS = {
    2: _Blocks("Q4_0", 32, 18, _q4_0),
    3: _Blocks("Q4_1", 32, 20, _q4_1),
    6: _Blocks("Q5_0", 32, 22, _q5_0),
    7: _Blocks("Q5_1", 32, 24, _q5_1),
    8: _Blocks("Q8_0", 32, 34, _q8_0),
    10: _Blocks("Q2_K", 256, 84, _q2_k),
    11: _Blocks("Q3_K", 256, 110, _q3_k),
    12: _Blocks("Q4_K", 256, 144, _q4_k),
    13: _Blocks("Q5_K", 256, 176, _q5_k),
    14: _Blocks("Q6_K", 256, 210, _q6_k),
}
_PLAIN = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    24: np.dtype(np.int8),
    25: np.dtype(np.int16),
    26: np.dtype(np.int32),
    27: np.dtype(np.int64),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}


def _itself(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor in blocks: an array that is made whenever it is asked for, so that it takes no memory till then.

    NumPy takes it for an array of float32. What is transposed or sliced is another one of its kind.
    """

    blocks: np.ndarray
    """Bytes, [n, bytes of a block], mapped."""
    kind: _Blocks = field(repr=False)
    whole: tuple[int, ...]
    """The shape of all its numbers."""
    view: Callable[[np.ndarray], np.ndarray] = field(default=_itself, repr=False)
    """What is made of these."""

    dtype = np.dtype(np.float32)

    @property
    def parts(self) -> Iterator[Any]:
        """The arrays that it is made of, which are mapped from files."""
        yield self.blocks

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return self.view(np.broadcast_to(np.float32(0), self.whole)).shape

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """As of an array."""
        return math.prod(self.shape)

    @property
    def T(self) -> "Quantised":
        """As of an array."""
        return self.transpose(tuple(range(self.ndim))[::-1])

    def transpose(self, axes: Any) -> "Quantised":
        """As of an array; the axes are in one sequence."""
        return self._then(lambda array: array.transpose(axes))

    def __getitem__(self, key: Any) -> "Quantised":
        """As of an array, for slices and numbers."""
        return self._then(lambda array: array[key])

    def __len__(self) -> int:
        """As of an array."""
        return self.shape[0]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The numbers: float32, or cast from there.

        Raises:
            ValueError: where it is not wanted as a copy.
        """
        if copy is False:
            raise ValueError("The numbers of blocks are made anew for everyone who asks.")
        with np.errstate(invalid="ignore", over="ignore"):  # of scales that are not finite, which is found out later
            numbers = self.kind.numbers(np.asarray(self.blocks))
        return self.view(numbers.reshape(self.whole)).astype(dtype or np.float32, copy=False)

    def _then(self, view: Callable[[np.ndarray], np.ndarray]) -> "Quantised":
        return Quantised(self.blocks, self.kind, self.whole, lambda array: view(self.view(array)))


HostArray = np.ndarray | Quantised
"""A tensor that was read from a file."""


# Files ----------------------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> tuple[dict[str, HostArray], dict[str, str]]:
    """The tensors of a GGUF file, mapped, and the texts of its header.

    Tensors in blocks are `Quantised`; all others are read-only views. Where the file says that a tensor had another
    shape, it has that.

    Raises:
        ValueError: when the file is missing, damaged, cut short, or has a kind of tensor that is not read.
    """
    try:
        data = map_file(path)
    except (OSError, ValueError) as error:  # the latter of an empty file
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is empty'}.") from error
    try:
        return _read(data)
    except _Damaged as damage:
        raise ValueError(f"{path} is damaged: {damage}. Download or save it again.") from None
    except _Refused as what:
        raise ValueError(f"{path} {what}") from None


@dataclass
class _Cursor:
    """Where a header is being read."""

    data: np.ndarray
    at: int = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _Damaged("it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        if (size := self.number("Q")) > _MOST_TEXT:
            raise _Damaged(f"a text in its header has {size} bytes")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise _Damaged("a text in its header is not UTF-8") from None


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def _value(cursor: _Cursor, kind: int) -> Any:
    """A number, a text, a list of numbers; None stands for other lists."""
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _TEXT:
        return cursor.text()
    if kind != _ARRAY:
        raise _Damaged(f"a value in its header is of kind {kind}")
    of, length = cursor.number("I"), cursor.number("Q")
    if length > _MOST_ITEMS:
        raise _Damaged(f"a list in its header has {length} items")
    if of in _NUMBERS:
        form = np.dtype(_NUMBERS[of]).newbyteorder("<")
        numbers = cursor.take(length * form.itemsize)
        return np.frombuffer(numbers, form).tolist() if length <= _MOST_DIMS else None
    if of != _TEXT:  # lists of lists are nobody's
        raise _Damaged(f"a list in its header is of kind {of}")
    for _ in range(length):
        cursor.text()
    return None


def _read(data: np.ndarray) -> tuple[dict[str, HostArray], dict[str, str]]:
    cursor = _Cursor(data)
    if cursor.take(4) != MAGIC:
        raise _Damaged("it does not begin as a GGUF file does")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise _Refused(f"is GGUF of version {version}; read are {' and '.join(map(str, _VERSIONS))}.")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    if tensors > _MOST_TENSORS or values > _MOST_VALUES:
        raise _Damaged(f"its header promises {tensors} tensors and {values} values")
    said: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text()
        said[key] = _value(cursor, cursor.number("I"))
    places = dict(_place(cursor) for _ in range(tensors))
    if len(places) < tensors:
        raise _Damaged("it names a tensor twice")
    alignment = said.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**16:
        raise _Damaged(f"its alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    found = {}
    for name, (kind, shape, offset) in places.items():
        found[name] = _tensor(data[min(start, len(data)) :], name, kind, shape, offset, said.get(_SHAPE + name))
    return found, {key: value for key, value in said.items() if isinstance(value, str)}


def _place(cursor: _Cursor) -> tuple[str, tuple[int, tuple[int, ...], int]]:
    """A tensor's name; its kind, shape in the usual order, and where its bytes begin in the data."""
    name, dims = cursor.text(), cursor.number("I")
    if dims > _MOST_DIMS:
        raise _Damaged(f"{name[:100]} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    return name, (cursor.number("I"), shape, cursor.number("Q"))


def _tensor(data: np.ndarray, name: str, kind: int, shape: tuple[int, ...], offset: int, true: Any) -> HostArray:
    name = name[:100]
    if kind not in _BLOCKS and kind not in _PLAIN:
        known = ", ".join(blocks.name for blocks in _BLOCKS.values())
        raise _Refused(f"stores {name} in a format of number {kind}; read are {known}, and numbers as they are.")
    block = _BLOCKS.get(kind)
    size, per_block = (block.size, block.bytes) if block else (1, _PLAIN[kind].itemsize)
    count = math.prod(shape)
    if shape and shape[-1] % size:
        raise _Damaged(f"{name} has rows of {shape[-1]} numbers, and blocks of {size}")
    end = offset + count // size * per_block
    if end > len(data):
        raise _Damaged(f"{name} would end {end - len(data)} bytes behind it")
    whole = shape if true is None else tuple(true) if isinstance(true, list) else ()
    if any(type(n) is not int or n < 0 for n in whole) or math.prod(whole) != count:
        raise _Damaged(f"{name} has {count} numbers, and is said to have the shape {str(true)[:60]}")
    found = np.asarray(data[offset:end])
    if block:
        return Quantised(found.reshape(-1, per_block), block, whole)
    return found.view(_PLAIN[kind]).reshape(whole)
