"""Tensors from the files of `torch.save`, without PyTorch and without running what a pickle says.

Such a file is a pickle that describes tensors, and their storages as raw bytes: beside it in a zip archive (since
PyTorch 1.6), or behind it in one stream (before). A pickle is a program, so it is not given to `pickle`, which runs
it: the few instructions that checkpoints need are followed here, and all others are refused. What is not of PyTorch's
own tensors, such as a trainer's callbacks beside a state dict, becomes a placeholder that has a name and does nothing.
Tensors are views of the mapped file, as those of safetensors files are, once everything that the pickle claims of them
is known to lie in it.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxdiff.io.mapped import map_file

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64", "half", "float", "double")
_INSTRUCTIONS = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_MAGIC = 0x1950A86A20F9469CFC6C  # of the stream, torch/serialization.py: MAGIC_NUMBER and PROTOCOL_VERSION
_VERSION = 1001
# So that a small file cannot take much memory. A tensor takes some 40 instructions and 130 bytes of a pickle.
_MAX_BYTES = 2**22  # of a pickle, and of an archive's list of records
_MAX_INSTRUCTIONS = 400_000
_MAX_TENSORS = 20_000
_MAX_NAME = 1000  # letters of a tensor inside a dict
_MAX_DIMS = 8  # PyTorch allows 64, and no network has a weight of more than 5
_SHOWN = 60  # characters of a file's own text in an error sentence


class _Global(NamedTuple):
    """An admitted name of a pickle: a marker, which nothing can be called through or written to."""

    module: str
    name: str


class _Placeholder(NamedTuple):
    """What stands for a class or function that is not admitted, and for all that would be made of it: a name."""

    name: str


class _Storage(NamedTuple):
    """What the pickle says of a run of equal numbers."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """What the pickle says of a view of a storage; lengths, offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_DICT = _Global("collections", "OrderedDict")
_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_PARAMETERS = _Global("torch.nn.modules.container", "ParameterDict")  # of the first textual inversions
_ADMITTED = {
    _DICT,
    _REBUILD,
    _PARAMETER,
    _PARAMETERS,
    *(_Global("torch", name) for name in _STORAGES),
    *(_Global("torch", name) for name in _DTYPES),
}


class _Damaged(Exception):
    """What is wrong with a file, in the words that follow "is damaged: "."""


class _Refused(Exception):
    """What a file has that is not read, as a sentence's end."""


class _File(io.BufferedReader):
    """A file that is read in pieces as large as a pickle may be, whatever length the file itself claims of one."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # as zipfile asks for an archive's last bytes
            size = _MAX_BYTES
        if size > _MAX_BYTES:
            raise _Refused("it holds a text, or a list of records, that is longer than a model's ever is")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_MAX_BYTES)


def open_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict's file, or of the state dict under `state_dict` in it, as read-only arrays.

    Those of a dict inside it, such as an IP-Adapter's `image_proj`, have names with a dot between: `image_proj.norm`.
    Views of one storage are views of one array. What else the dict holds, such as the number of a step, is left out.
    Beside the file, which is mapped, it takes less than 100 MB of memory whatever the file says of itself.

    Raises:
        ValueError: when the file is missing, damaged, cut short, of another kind, or has an object of another class in
            a tensor's place, naming the file and what to do.
    """
    try:
        with _File(io.FileIO(path)) as file:
            head = file.read(4)
            file.seek(0)
            if head == b"PK\x03\x04":
                tree, raw = _read_zip(file)
            elif head.startswith(b"\x80"):
                tree, raw = _read_stream(file)
            else:
                raise ValueError(f"{path} is not a file of torch.save; download or save it again.")
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            tree = tree["state_dict"]
        if not isinstance(tree, dict):
            raise _Refused(f"what it holds is not a dict of tensors, but {_told(tree)}")
        for name, value in tree.items():
            if isinstance(value, _Placeholder):
                raise _Refused(f"its {_told(name)} is no tensor, but {_told(value)}, which is not made")
        found = _named(tree)
        data = map_file(path)
        storages: dict[_Storage, np.ndarray] = {}
        return {name: _array(name, value, raw, data, storages) for name, value in found.items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except _Refused as error:
        raise ValueError(f"{path} is not read: {error}; convert it to safetensors.") from error
    except _Damaged as error:
        raise ValueError(f"{path} is damaged: {error}. Download or save it again.") from error


def _named(tree: dict[Any, Any]) -> dict[str, _Tensor]:
    """The tensors of a dict and of the dicts in it, which are looked into no deeper: one in itself would never end."""
    found: dict[str, _Tensor] = {}
    for name, value in tree.items():
        inside = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, one in inside:
            if isinstance(name, str) and isinstance(inner, str | None) and isinstance(one, _Tensor):
                if inner is not None and len(name) + len(inner) > _MAX_NAME:  # names are made here, one for each
                    raise _Refused("its tensors have names that are longer than a model's ever are")
                found[name if inner is None else f"{name}.{inner}"] = one
                if len(found) > _MAX_TENSORS:
                    raise _Refused(f"it has more than {_MAX_TENSORS} tensors, which no model has")
    return found


def _array(
    name: str,
    tensor: _Tensor,
    raw: Callable[[_Storage], tuple[int, int]],
    data: np.ndarray,
    storages: dict[_Storage, np.ndarray],
) -> np.ndarray:
    """The view that a tensor is, once it is known to lie in its storage, and that to lie in the file."""
    storage, offset, shape, strides = tensor
    if storage not in storages:
        begin, end = raw(storage)
        if end - begin != storage.size * storage.dtype.itemsize or not 0 <= begin <= end <= len(data):
            raise _Damaged(f"the storage of {_shown(name)} is not in it whole")
        numbers = data[begin:end].view(np.ndarray).view(storage.dtype)
        # In a stream nothing is aligned, and much of what reads arrays is slower then, or refuses them.
        storages[storage] = np.require(numbers, requirements="A")
        storages[storage].flags.writeable = False
    if not all(shape):
        if math.prod(n for n in shape if n) >= 2**48:  # NumPy makes no array of such a shape, even without elements
            raise _Damaged(f"the shape of {_shown(name)} makes no sense")
        return np.zeros(shape, storage.dtype)
    # A shape of more elements than the storage has (PyTorch's `expand`) could be of any size once it is copied.
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.size or math.prod(shape) > storage.size:
        raise _Damaged(f"{_shown(name)} reaches past the end of its storage")
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storages[storage][offset:], shape, steps, writeable=False)


def _read_zip(file: io.BufferedReader) -> tuple[Any, Callable[[_Storage], tuple[int, int]]]:
    """What the archive's pickle says, and where in the file a storage lies."""
    try:
        records = {info.filename: info for info in zipfile.ZipFile(file).infolist()}  # `_File` bounds their number
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        raise _Damaged("it is a zip archive that is cut short or broken") from error
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refused(f"it is a zip archive with {len(pickles)} records data.pkl, not one")
    folder = pickles[0].removesuffix("data.pkl")

    def span(name: str) -> tuple[int, int]:
        if (info := records.get(name)) is None:
            raise _Damaged(f"its record {_shown(name)} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(f"its record {_shown(name)} is compressed or encrypted, which torch.save does not do")
        file.seek(max(0, info.header_offset))  # below 0 where the list claims a place before the file
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise _Damaged(f"its record {_shown(name)} is not where the archive says")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        return begin, begin + info.file_size

    def read(name: str) -> bytes:
        begin, end = span(name)
        if end > file.seek(0, io.SEEK_END):  # else a record could claim any size, and memory for it
            raise _Damaged(f"its record {_shown(name)} is cut short")
        file.seek(begin)
        return file.read(end - begin)

    order = f"{folder}byteorder"
    if order in records and read(order) != b"little":
        raise _Refused("its numbers are big-endian")
    tree = _unpickle(io.BytesIO(read(pickles[0])))
    # Their places are found now, while the file is open.
    spans = {name: span(name) for name in records if name.startswith(f"{folder}data/")}
    # Storages that are not aligned are copied, so many that share their bytes would be larger than the file.
    if sum(end - begin for begin, end in spans.values()) > file.seek(0, io.SEEK_END):
        raise _Damaged("its records lie over one another")

    def raw(storage: _Storage) -> tuple[int, int]:
        name = f"{folder}data/{storage.key}"
        if name not in spans:
            raise _Damaged(f"its record {_shown(name)} is missing")
        return spans[name]

    return tree, raw


def _read_stream(file: io.BufferedReader) -> tuple[Any, Callable[[_Storage], tuple[int, int]]]:
    """As `_read_zip` does, of a stream: three pickles that say what it is, the tree, the keys, the storages."""
    if _unpickle(file) != _MAGIC:
        raise _Refused("it is a pickle, but not one of torch.save")
    if _unpickle(file) != _VERSION:
        raise _Refused(f"its version is not {_VERSION}, the only one that there was")
    system = _unpickle(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    said: dict[str, _Storage] = {}
    tree, keys = _unpickle(file, said), _unpickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != said.keys():
        raise _Damaged("its list of storages does not fit its tensors")
    spans: dict[str, tuple[int, int]] = {}
    for key in keys:
        # Each begins with its number of elements.
        size = struct.unpack("<q", head)[0] if len(head := file.read(8)) == 8 else -1
        if size != said[key].size or key in spans:
            raise _Damaged("its storages are cut short, or do not have the sizes that its tensors name")
        begin = file.tell()
        spans[key] = begin, begin + size * said[key].dtype.itemsize
        file.seek(spans[key][1])
    return tree, lambda storage: spans[storage.key]


def _unpickle(file: io.BufferedReader | io.BytesIO, said: dict[str, _Storage] | None = None) -> Any:
    """What the pickle at the file's position describes: dicts, lists, tuples, texts, numbers, `_Tensor`s, placeholders.

    Args:
        file: stands behind the pickle afterwards.
        said: gets every storage that is named, by its key; one that is named twice must be the same.

    Raises:
        _Refused: for instructions that checkpoints do not need, and pickles that are too long.
        _Damaged: for a pickle that makes no sense.
    """
    said = {} if said is None else said
    memo: dict[int, Any] = {}
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    try:
        for name, argument in _instructions(file):
            match name:
                case "PROTO" | "FRAME":
                    argument()
                case "STOP":
                    return stack.pop()
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument())
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":  # the last two of Python 2
                    stack.append(argument())
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
                case "MARK":
                    below.append(stack)
                    stack = []
                case "TUPLE":
                    items = since_mark()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(name[-1]))]
                    stack.append(tuple(items[::-1]))
                case "APPEND" | "APPENDS":
                    items = since_mark() if name == "APPENDS" else [stack.pop()]
                    if not isinstance(stack[-1], _Placeholder):
                        _of(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    if not isinstance(stack[-1], _Placeholder):
                        pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
                        _of(dict, stack[-1]).update(pairs)
                case "BINPUT" | "LONG_BINPUT":
                    memo[_of(int, argument())] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[_of(int, argument())])
                case "GLOBAL":
                    stack.append(_global(_line(file), _line(file)))  # pickletools would resolve backslashes
                case "STACK_GLOBAL":
                    attribute, module = _of(str, stack.pop()), _of(str, stack.pop())
                    stack.append(_global(module, attribute))
                case "BINPERSID":
                    match stack.pop():
                        case ("module", _Global() | _Placeholder() as cls, *_):  # streams have its source beside it
                            stack.append(cls)
                            continue
                        case value:
                            storage = _storage(value)
                    if said.setdefault(storage.key, storage) != storage:
                        raise _Damaged("it names two storages by one key")
                    stack.append(storage)
                case "REDUCE":
                    arguments, function = _of(tuple, stack.pop()), stack.pop()
                    stack.append(_made(function, arguments))
                case "NEWOBJ":
                    _of(tuple, stack.pop())
                    if stack[-1] == _PARAMETERS:
                        stack[-1] = {}
                    else:
                        _of(_Placeholder, stack[-1])
                case "BUILD":
                    state = stack.pop()
                    if not isinstance(stack[-1], _Placeholder):
                        own = _of(dict, stack[-1])  # a state dict, whose `_metadata` has the versions of modules
                        if isinstance(state, dict) and isinstance(inside := state.get("_parameters"), dict):
                            own.update(inside)
                case _:
                    raise _Refused(f"its pickle has the instruction {name}, which checkpoints do not need")
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
        # What pickletools and Python's own operations raise where bytes end early or do not fit each other.
        raise _Damaged("its pickle is cut short or makes no sense") from error


def _instructions(file: io.BufferedReader | io.BytesIO) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each instruction's name, and what reads the argument behind it: of one that is refused, it is never read."""
    start = file.tell()
    for _ in range(_MAX_INSTRUCTIONS):
        op = _INSTRUCTIONS[file.read(1)]
        yield op.name, partial(op.arg.reader, file) if op.arg else lambda: None
        if file.tell() - start > _MAX_BYTES:
            break
    raise _Refused("its pickle is longer than a model's ever is")


def _line(file: io.BufferedReader | io.BytesIO) -> str:
    if not (line := file.readline()).endswith(b"\n"):
        raise ValueError(line)
    return line[:-1].decode()


def _global(module: str, name: str) -> _Global | _Placeholder:
    return found if (found := _Global(module, name)) in _ADMITTED else _Placeholder(f"{module}.{name}")


def _key(value: Any) -> Any:
    """A dict's key. Others are refused: the hash of a deeply nested tuple overflows Python's own stack."""
    return value if type(value) in (int, float, bool, _Placeholder) else _of(str, value)


def _made(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What the admitted calls give. Of what is not admitted nothing is called, and its placeholder stands for all."""
    match function, arguments:
        case (_Placeholder(), _):
            return function
        case (_Global() as f, ()) if f == _DICT:
            return {}
        case (_Global() as f, (_Tensor() as tensor, *_)) if f == _PARAMETER:
            return tensor
        case (_Global() as f, (_Storage() as storage, offset, shape, strides, *_)) if f == _REBUILD:
            shape, strides = _counts(shape), _counts(strides)
            if len(shape) != len(strides) or len(shape) > _MAX_DIMS:
                raise _Damaged(f"it has a tensor of {len(shape)} dimensions and {len(strides)} strides")
            return _Tensor(storage, _counts((offset,))[0], shape, strides)
    raise _Refused(f"its pickle calls {_told(function)}, or gives it arguments that torch.save does not")


def _storage(value: Any) -> _Storage:
    """What `torch.save` puts in a storage's place: ("storage", type, key, device, number of elements)."""
    match value:
        case ("storage", _Global("torch", name), str(key), str(), int(size), *rest) if name in _STORAGES:
            if rest in ([], [None]):  # PyTorch before 0.4 could cut a storage out of another one
                return _Storage(key, _STORAGES[name], *_counts((size,)))
    if isinstance(value, tuple) and len(value) > 1:
        value = value[1]
    raise _Refused(f"its pickle has a storage of {_told(value)}, and no such kind is known")


def _counts(values: Any) -> tuple[int, ...]:
    """Lengths, an offset or strides."""
    if not isinstance(values, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise _Damaged("it has a tensor whose shape, strides or offset are no whole numbers from 0")
    return values


def _of(kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(kind)
    return value


def _told(value: Any) -> str:
    """A value in a sentence: a name as the file has it, of all else no more than the type."""
    match value:
        case str(name) | _Global(_, name):
            return _shown(name)
        case _Placeholder(name):
            return f"an object of {_shown(name)}"
    return f"of the type {type(value).__name__.lstrip('_')}"


def _shown(name: str) -> str:
    """A file's own text in a sentence, on one line and not too long."""
    text = repr(name[: 2 * _SHOWN])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
