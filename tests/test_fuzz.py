"""Files of weights with their bytes changed by chance are read, or refused in a sentence that names the file."""

import json
import os
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

from jaxdiff.data.tokens import Tokenizer, declared_length
from jaxdiff.families import StableDiffusion
from jaxdiff.io.folder import networks_of, read_config, read_index, tokenizer_folder
from jaxdiff.io.layouts import UNSAID
from jaxdiff.io.lora import read_lora
from jaxdiff.io.scheduler import read_sampler, read_scheduler
from jaxdiff.io.single_file import open_single, write_single
from jaxdiff.io.torch_files import open_torch
from jaxdiff.io.weights import open_safetensors, read_metadata

TRIALS = int(os.environ.get("JAXDIFF_FUZZ", "150"))
"""How often each kind of file is changed; those of docs/measured.md are 50,000."""
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


def rewritten(values: dict, chance: random.Random) -> bytes:
    """A JSON object with other names or values, or its text with bytes changed."""
    values = deepcopy(values)
    for _ in range(chance.randint(1, 3)):
        node = values
        while isinstance(inner := node.get(chance.choice(list(node)) if node else ""), dict) and chance.random() < 0.8:
            node = inner
        name = chance.choice(list(node)) if node else "x"
        match chance.randrange(4):
            case 0 if name in node:
                node[chance.choice([name + "x", "", "_class_name", "num_train_timesteps"])] = node.pop(name)
            case 1 if name in node:
                del node[name]
            case 2 if isinstance(node.get(name), list) and node[name]:
                node[name][chance.randrange(len(node[name]))] = deepcopy(chance.choice(VALUES))
            case _:
                node[name] = deepcopy(
                    chance.choice([*VALUES, "DDIMScheduler", "epsilon", [1, 2], [[]], 10**400, "a" * 999])
                )
    text = json.dumps(values).encode()
    return changed(text, chance, len(text)) if chance.random() < 0.3 else text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("folder") / "model"
    tiny.model().save(made)
    return made


JSON = {
    "model_index.json": lambda folder: (read_index(folder), networks_of(read_index(folder)), read_sampler(folder)),
    "unet/config.json": lambda folder: read_config(folder, "unet"),
    "vae/config.json": lambda folder: read_config(folder, "vae"),
    "text_encoder/config.json": lambda folder: read_config(folder, "text_encoder"),
    "scheduler/scheduler_config.json": lambda folder: (read_scheduler(folder), read_sampler(folder)),
    "tokenizer/tokenizer_config.json": lambda folder: read_tokens(folder),
    "tokenizer/special_tokens_map.json": lambda folder: read_tokens(folder),
    "tokenizer/vocab.json": lambda folder: read_tokens(folder),
}


def read_tokens(folder: Path) -> None:
    own = tokenizer_folder(folder)
    Tokenizer.load(own, declared_length(own, 24))(["a dog, a red apple!"])


@pytest.mark.parametrize("name", JSON)
def test_json_of_a_folder(folder, name):
    chance, file = random.Random(4), folder / name
    whole = file.read_bytes()
    values = json.loads(whole)
    try:
        for _ in range(TRIALS):
            file.write_bytes(rewritten(values, chance))
            is_read(folder, partial(JSON[name], folder))
    finally:
        file.write_bytes(whole)


def test_merges(folder):
    chance, file = random.Random(5), folder / "tokenizer" / "merges.txt"
    whole = file.read_bytes()
    try:
        for _ in range(TRIALS):
            file.write_bytes(changed(whole, chance, len(whole)))
            is_read(folder, partial(read_tokens, folder))
    finally:
        file.write_bytes(whole)


def test_loras(tmp_path):
    chance = random.Random(6)
    networks = {StableDiffusion.FOLDERS[role]: params for role, params in tiny.model().params.items()}
    down, up = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32([2])}
    tensors |= {f"unet.mid_block.attentions.0.proj_in.lora_{half}.weight": np.ones(shape, np.float32)
                for half, shape in (("A", (2, 16, 1, 1)), ("B", (16, 2, 1, 1)))}  # fmt: skip
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {}})}
    save_file(tensors, tmp_path / "a.safetensors", said)
    whole = (tmp_path / "a.safetensors").read_bytes()
    found = 0
    for _ in range(TRIALS):
        for data in (changed(whole, chance, len(whole)), reworded(whole, chance)):
            found += survives(tmp_path / "b.safetensors", data, lambda path: read_lora(path, networks))
    assert found
