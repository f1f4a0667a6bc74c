"""Files of weights with their bytes changed by chance are read, or refused in a sentence that names the file."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_single_file import LIKE_SD1, LIKE_SD2, named
from test_torch_files import FLOATS, archive, dictionary, stream, tensor, text

from jaxdiff.io.layouts import UNSAID
from jaxdiff.io.single_file import open_single, write_single
from jaxdiff.io.torch_files import open_torch
from jaxdiff.io.weights import open_safetensors, read_metadata

TRIALS = 150
# Values that a header's field does not expect.
VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, 0.5, "", "F32", "I64", "F8_E4M3", "\ud800", [], [-1], [0],
          [2**62, 4], [1.5], [[1]], {}, {"dtype": "F32"}, {"unet": {"attention_head_dim": []}}, '{"pad_id": {}}',
          '{"unet": {"norm_num_groups": []}}', "v"]  # fmt: skip


def changed(data: bytes, chance: random.Random, end: int) -> bytes:
    """The bytes with up to four changes before `end`."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, size = chance.randrange(max(1, min(end, len(out)))), chance.choice([1, 1, 2, 4, 8, 30])
        kind = chance.choice(["bits", "bytes", "number", "out", "in", "again", "cut"])
        if kind == "bits":
            out[place : place + 1] = bytes([out[place] ^ (1 << chance.randrange(8))]) if out else b""
        elif kind == "bytes":
            out[place : place + size] = chance.randbytes(size)
        elif kind == "number":
            number = chance.choice([0, 1, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            out[place : place + size] = (number % 256**size).to_bytes(size, chance.choice(["little", "big"]))
        elif kind == "out":
            del out[place : place + size]
        elif kind == "in":
            out[place:place] = chance.randbytes(size)
        elif kind == "again":
            out[place:place] = out[chance.randrange(len(out) + 1) :][:size]
        elif chance.random() < 0.2:
            del out[place:]
    return bytes(out)


def reworded(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file of which the header's JSON has other names or values."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(header))
        match chance.randrange(5):
            case 0:
                header[chance.choice([name.rsplit(".", 1)[0], name + ".x", "", chance.choice(list(header))])] = (
                    header.pop(name)
                )
            case 1:
                header[name] = deepcopy(chance.choice(VALUES))
            case 2 if isinstance(header[name], dict) and header[name]:
                header[name][chance.choice(list(header[name]))] = deepcopy(chance.choice(VALUES))
            case 3:
                part = chance.choice(list(UNSAID))
                said = {part: {chance.choice(UNSAID[part]): chance.choice(VALUES)}}
                header["__metadata__"] = {"jaxdiff": json.dumps(said)}
            case _:
                shape = header[name].get("shape") if isinstance(header[name], dict) else None
                if isinstance(shape, list):
                    shape[:] = chance.choice([shape[::-1], shape[1:], [*shape, 1], [1, *shape], shape[:1] * len(shape)])
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + data[8 + size :]


def is_read(path: Path, read: Callable[[], object]) -> bool:
    """Whether something is read; else it was refused in a sentence that names the file."""
    try:
        read()
    except ValueError as error:
        told = str(error)
    else:
        return True
    assert str(path) in told
    return False


def read_single(path: Path) -> None:
    file = open_single(path)
    file.warn_of_unknown()
    for use in (lambda: file.scheduler, lambda: file.pads, lambda: file.defaults):
        is_read(path, use)
    for name in file.places:
        is_read(path, partial(file.network, name))


def survives(path: Path, data: bytes, read: Callable[[Path], object]) -> bool:
    path.write_bytes(data)
    return is_read(path, partial(read, path))


def test_safetensors(tmp_path):
    chance = random.Random(0)
    save_file({"a": FLOATS.reshape(3, 4), "b.c": np.ones(2, np.int64), "d": np.zeros(0)}, tmp_path / "a", {"e": "f"})
    whole = (tmp_path / "a").read_bytes()
    for _ in range(TRIALS):
        for data in (changed(whole, chance, len(whole)), reworded(whole, chance)):
            survives(tmp_path / "b.safetensors", data, open_safetensors)
            survives(tmp_path / "b.safetensors", data, read_metadata)


@pytest.mark.parametrize("write", [archive, stream])
def test_torch_files(tmp_path, write):
    chance = random.Random(1)
    one, other = (tensor(kind, key, 12, 0, (3, 4), (4, 1), write is stream)
                  for kind, key in (("FloatStorage", "0"), ("HalfStorage", "1")))  # fmt: skip
    callback = b"ctrainer\nCallback\n)\x81q\x01}(" + text("best") + b"G" + bytes(8) + text("self") + b"h\x01ub"
    inner = dictionary(a=one, b=other)[2:-1]
    path = write(tmp_path / "a.ckpt", dictionary(state_dict=inner, callback=callback), _0=FLOATS, _1=FLOATS.astype("e"))
    whole = path.read_bytes()
    found = [survives(tmp_path / "b.ckpt", changed(whole, chance, len(whole)), open_torch) for _ in range(4 * TRIALS)]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("like", [LIKE_SD1, LIKE_SD2], ids=["sd1", "sd2"])
def test_single_files(tmp_path, like, caplog):
    chance = random.Random(2)
    model = tiny.model(**like)
    write_single(tmp_path / "a.safetensors", named(model), model.scheduler, {"text_encoder": 3}, defaults={"steps": 4})
    tensors = {name: array.astype(np.bool_) for name, array in load_file(tmp_path / "a.safetensors").items()}
    said = {"modelspec.prediction_type": "v", "jaxdiff": json.dumps({"unet": {"norm_num_groups": 8}, "pad_id": 3})}
    save_file(tensors, tmp_path / "a.safetensors", said)
    whole = (tmp_path / "a.safetensors").read_bytes()
    for _ in range(TRIALS // 2):
        for data in (changed(whole, chance, int.from_bytes(whole[:8], "little")), reworded(whole, chance)):
            survives(tmp_path / "b.safetensors", data, read_single)
