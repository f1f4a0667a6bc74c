"""A network's weights in files, whole or in shards: safetensors, read and written, and PyTorch's pickles, read.

Tensors are views of the mapped file: nothing is read before it is used, and no code in a file is ever run.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxdiff.config import load_json
from jaxdiff.io.convert import leaves, torch_axes, torch_name
from jaxdiff.io.gguf import MAGIC, HostArray, open_gguf
from jaxdiff.io.mapped import map_file, release
from jaxdiff.io.torch_files import open_torch
from jaxdiff.types import Params

FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
_FLOATS = FLOATS | {  # that are read, and widened where they are placed
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES = _FLOATS | {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}
logger = logging.getLogger(__name__)
_MAX_HEADER = 100_000_000  # safetensors' own limit
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_SHOWN = 10  # names in an error sentence


class Stored(NamedTuple):
    """An array as it is to be stored."""

    array: np.ndarray
    """A view will do: it is made contiguous, and of its type, when its turn comes."""
    dtype: np.dtype
    checked: bool = True
    """Whether a value that is not finite is an error."""


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, as read-only views of the mapped file.

    Raises:
        ValueError: when the file is missing, damaged, cut short or of another kind, naming it and what to do.
    """
    header, start, size = _read_header(path)
    header.pop("__metadata__", None)
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    promised = spans[-1][1] if spans else 0
    if promised > size - start:
        raise ValueError(f"{path} is cut short: its header promises {start + promised} bytes, it has {size}. "
                         "Download or save it again.")  # fmt: skip
    ends = [0, *(end for _, end, _ in spans)]
    if promised < size - start or any(begin != end for (begin, _, _), end in zip(spans, ends, strict=False)):
        raise ValueError(f"{path} is damaged: its tensors do not fill it end to end. Download or save it again.")

    data = map_file(path)[start:] if promised else np.zeros(0, np.uint8)
    return {
        name: np.asarray(data[begin:end]).view(_DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
        for begin, end, name in spans
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors: texts by name.

    Raises:
        ValueError: as `open_safetensors` does for a damaged header.
    """
    metadata = _read_header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is damaged: the __metadata__ of its header are not texts. Save it again.")
    return metadata


def open_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """As `open_model`, with arrays of what is in blocks."""
    tensors, texts = open_model(path)
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}, texts


def open_model(path: Path) -> tuple[Mapping[str, HostArray], dict[str, str] | None]:
    """The tensors of a file of safetensors, GGUF or torch.save, told by how it begins, and the texts of the former two.

    Raises:
        ValueError: as `open_safetensors`, `open_gguf` and `open_torch` do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if head.startswith(MAGIC):
        return open_gguf(path)
    # The size of a safetensors header may begin as a pickle does; JSON follows it.
    if head.startswith(b"PK\x03\x04") or (head[:2] in _PICKLES and head[8:] != b"{"):
        return open_torch(path), None
    return open_safetensors(path), read_metadata(path)


def stored(tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None = None) -> dict[str, Stored]:
    """A network's tensors as they are to be stored: in `dtype`, or each in its own.

    Raises:
        ValueError: for another type than float32, float16 and bfloat16.
    """
    if dtype is None:
        return {name: Stored(array, array.dtype) for name, array in tensors.items()}
    if np.dtype(dtype) not in FLOATS.values():
        raise ValueError(f"Weights cannot be written as {np.dtype(dtype)}; choose float32, float16 or bfloat16.")
    return {name: Stored(array, np.dtype(dtype)) for name, array in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, one tensor after another: no more than one is in memory twice.

    Raises:
        ValueError: for a tensor that has values that are not finite in the type it is stored in, or a type that the
            format lacks.
        OSError: where the file cannot be written.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if strange := [name for name, one in tensors.items() if one.dtype not in names]:
        raise ValueError(f"{listed(strange)} cannot be stored as {tensors[strange[0]].dtype}.")
    # As safetensors itself orders them: wide types first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, str(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        array, dtype, _ = tensors[name]
        begin, end = end, end + array.size * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array, dtype, checked = tensors[name]
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array, dtype)
            if checked and not np.isfinite(array).all():
                raise ValueError(f"{name} has values that are not finite as {dtype}; nothing was written.")
            file.write(array.reshape(-1).view(np.uint8).data)


def open_weights(folder: Path, stem: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a network's folder: `{stem}.safetensors`, or the shards that its index file names.

    Where there are none, pickles are read: `diffusion_pytorch_model.bin`, `pytorch_model.bin`, the same with `.ckpt`,
    or their shards.

    Args:
        folder: a network's folder, as `unet/`.
        stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
        variant: "fp16" and the like, the word in `{stem}.fp16.safetensors`. Without it the plain files are taken, else
            fp16, else the only variant there is.

    Raises:
        ValueError: when there are no such weights, several variants, or damaged files.
    """
    pickled = "pytorch_model" if stem == "model" else stem
    several: list[str] = []
    for name, kind in ((stem, "safetensors"), (pickled, "bin"), (pickled, "ckpt")):
        path, words = _find(folder, name, kind, variant)
        if path is not None:
            return _open_shards(path, kind) if path.suffix == ".json" else _open(path)
        several += [f"{name}.{word}.{kind}" for word in words]
    wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    if several:
        raise ValueError(f"{folder} has no {wanted}, but {listed(several)}; give the one that is meant the plain name.")
    raise ValueError(f"{folder} has no weights: {wanted} is missing, and so is {pickled}.bin.")


def check_params(params: Params, expected: Params, where: str | Path) -> Params:
    """Compares the params with the shapes that the config implies.

    What the network has no use for, such as a vision tower beside the text encoder, is left out with a warning, as
    diffusers and transformers do.

    Args:
        params: numpy or JAX arrays.
        expected: the same tree of `jax.ShapeDtypeStruct` (`jaxdiff.build.param_shapes`).
        where: the file or folder that the sentence names.

    Returns:
        The params that the network has.

    Raises:
        ValueError: listing, by their torch names, what is missing, misshapen, no float, or not finite.
    """

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        return {
            torch_name(path): tuple(leaf.shape[axis] for axis in torch_axes(path, len(leaf.shape)))
            for path, leaf in leaves(tree)
        }

    got, want = shapes(params), shapes(expected)
    if extra := got.keys() - want.keys():
        logger.warning(
            "%s: %d tensors are left out, which the network has no use for: %s.", where, len(extra), listed(extra)
        )
        params = _part(params, expected)
    faults = {
        "missing": want.keys() - got.keys(),
        "misshapen": [f"{n} {got[n]} instead of {want[n]}" for n in want if n in got and got[n] != want[n]],
        "not float16, bfloat16, float32, float64 or float8": [
            torch_name(path) for path, leaf in leaves(params) if leaf.dtype not in _FLOATS.values()
        ],
    }
    if not any(faults.values()):
        faults = {"not finite": [torch_name(path) for path, leaf in leaves(params) if not _is_finite(leaf)]}
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{where}: the weights do not fit the config ({told}).")
    return params


def _is_finite(leaf: Any) -> bool:
    finite = bool(np.isfinite(leaf).all())
    release(leaf)  # so that a file that is read from end to end does not stand in memory
    return finite


def _part(params: Params, expected: Params) -> Params:
    """The leaves of `params` that `expected` has."""
    return {
        name: _part(params[name], entry) if isinstance(entry, dict) else params[name]
        for name, entry in expected.items()
        if name in params
    }


def _find(folder: Path, stem: str, kind: str, variant: str | None) -> tuple[Path | None, set[str]]:
    """The file of weights, or the index of its shards, and the words of all variants that there are."""

    def names(word: str | None) -> tuple[str, str]:
        if word is None:
            return f"{stem}.{kind}", f"{stem}.{kind}.index.json"
        return f"{stem}.{word}.{kind}", f"{stem}.{kind}.index.{word}.json"

    words = {p.name.removeprefix(f"{stem}.").removesuffix(f".{kind}") for p in folder.glob(f"{stem}.*.{kind}")}
    words |= {p.stem.rpartition(".")[2] for p in folder.glob(f"{stem}.{kind}.index.*.json")}
    words = {word for word in words if "-of-" not in word}
    if variant is None and not any((folder / name).exists() for name in names(None)):
        variant = "fp16" if "fp16" in words else next(iter(words)) if len(words) == 1 else None
    return next((folder / name for name in names(variant) if (folder / name).exists()), None), words


def _open(path: Path) -> dict[str, np.ndarray]:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def _open_shards(index: Path, kind: str) -> dict[str, np.ndarray]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` of tensor names to file names.")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(f".{kind}"):
            raise ValueError(f"{index} names the file {file!r}; only .{kind} files beside it are read.")
        shard = _open(index.parent / file)
        if twice := shard.keys() & tensors.keys():
            raise ValueError(f"{index}: tensors are in more than one file: {listed(twice)}.")
        if lost := {name for name, owner in weight_map.items() if owner == file} ^ shard.keys():
            raise ValueError(f"{index} and {file} disagree about tensors: {listed(lost)}.")
        tensors |= shard
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, where its data begin, and its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= header_size <= min(size - 8, _MAX_HEADER):
                raise ValueError(_not_safetensors(path))
            text = file.read(header_size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not text.lstrip().startswith(b"{"):
        raise ValueError(_not_safetensors(path))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{path} names tensors twice: {listed({n for n in names if names.count(n) > 1})}.")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique), 8 + header_size, size
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not JSON. Download or save it again.") from error


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """(begin, end, name) of a header's entry, once it is known to make sense."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in _DTYPES:
                raise ValueError(f"{path} stores {name} as {dtype}; supported: {', '.join(_FLOATS)}.")
            sensible = begin >= 0 and all(type(n) is int and n >= 0 for n in shape)
            if sensible and end - begin == math.prod(shape) * _DTYPES[dtype].itemsize:
                return begin, end, name
    raise ValueError(f"{path} is damaged: its header's entry for {name} makes no sense. Download or save it again.")


def _not_safetensors(path: Path) -> str:
    """What a file that is no safetensors file looks like instead, and what to do."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return f"{path} is empty; download or save it again."
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`."
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"{path} is a pickle under the name of a safetensors file; call it .bin."
    if head.lstrip().startswith(b"<"):
        return f"{path} is a web page, not weights; download the file itself."
    return f"{path} is not a safetensors file, nor one of torch.save, or is cut short; download or save it again."


def listed(names: Any) -> str:
    """Names in a sentence, the first ten and how many more."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
