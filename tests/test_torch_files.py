"""Files of torch.save are read without torch; what a pickle could do beside describing tensors is refused."""

import contextlib
import datetime
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxdiff.io.torch_files import open_torch

FLOATS = np.arange(12, dtype=np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def counts(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(kind: str, key: str, size: int, offset: int, shape: tuple, strides: tuple, stream: bool = False) -> bytes:
    """What torch.save writes for a tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(size)
    storage += (b"N" if stream else b"") + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + counts(shape) + counts(strides)
        + b"\x89" + hooks + b"tR"
    )  # fmt: skip


def dictionary(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **storages: np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", pickled)
        file.writestr("m/byteorder", "little")
        for name, numbers in storages.items():
            file.writestr(f"m/data/{name[1:]}", numbers.tobytes())
        file.writestr("m/version", "3\n")
    return path


def stream(path: Path, pickled: bytes, **storages: np.ndarray) -> Path:
    heads = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    data = b"".join(struct.pack("<q", v.size) + v.tobytes() for v in storages.values())
    path.write_bytes(b"".join(heads) + pickled + pickle.dumps([name[1:] for name in storages], 2) + data)
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_torch(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [archive, stream])
def test_views_of_one_storage_are_views_of_one_array(tmp_path, write):
    old = write is stream
    pickled = dictionary(
        whole=tensor("FloatStorage", "0", 12, 0, (3, 4), (4, 1), old),
        turned=tensor("FloatStorage", "0", 12, 0, (4, 3), (1, 4), old),
        row=tensor("FloatStorage", "0", 12, 4, (4,), (1,), old),
        scalar=tensor("LongStorage", "1", 1, 0, (), (), old),
        nothing=tensor("FloatStorage", "0", 12, 0, (0, 768), (768, 1), old),
        step=number(7),
    )
    got = open_torch(write(tmp_path / "f.pt", pickled, _0=FLOATS, _1=np.array([-5])))
    assert list(got) == ["whole", "turned", "row", "scalar", "nothing"]
    assert (got["whole"] == FLOATS.reshape(3, 4)).all()
    assert (got["turned"] == FLOATS.reshape(3, 4).T).all()
    assert (got["row"] == FLOATS[4:8]).all()
    assert got["scalar"].shape == ()
    assert got["scalar"] == -5
    assert got["nothing"].shape == (0, 768)
    assert np.shares_memory(got["whole"], got["row"])
    assert not got["row"].flags.writeable


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32), ("HalfStorage", np.float16), ("BFloat16Storage", ml_dtypes.bfloat16),
        ("DoubleStorage", np.float64), ("LongStorage", np.int64), ("ByteStorage", np.uint8), ("BoolStorage", np.bool_),
    ],
)  # fmt: skip
def test_every_type_keeps_its_bits(tmp_path, kind, dtype):
    values = np.array([1, 0, 1]).astype(dtype)
    for write in (archive, stream):
        pickled = dictionary(x=tensor(kind, "0", 3, 0, (3,), (1,), write is stream))
        got = open_torch(write(tmp_path / "f.pt", pickled, _0=values))["x"]
        assert got.dtype == dtype
        assert got.tobytes() == values.tobytes()


def test_the_state_dict_in_a_checkpoint_is_found(tmp_path):
    inner = b"}" + text("w") + tensor("FloatStorage", "0", 12, 0, (12,), (1,)) + b"s"
    got = open_torch(archive(tmp_path / "f.ckpt", dictionary(state_dict=inner, epoch=number(3)), _0=FLOATS))
    assert (got["w"] == FLOATS).all()


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, protocol):
    pickled = pickle.dumps({"x": Runs(tmp_path / "ran")}, protocol)
    refused(archive(tmp_path / "f.pt", pickled), "is not read")
    refused(stream(tmp_path / "f.pt", pickled), "is not read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"cos\nsystem\n(" + text("true") + b"tR", "its 'x' is no tensor, but an object of 'os.system'"),
        (b"cos\nsystem\n(" + text("true") + b"tR}b", "an object of 'os.system'"),
        (b"cos\nPopen\n)\x81", "an object of 'os.Popen'"),
        (b"ctorch\nDeviceStorage\nQ", "a storage of an object of 'torch.DeviceStorage'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "calls '_rebuild_tensor_v2'"),
        (b"ctorch\nfloat32\n(" + text("x") + b"tR", "calls 'float32'"),
        (b"ccollections\nOrderedDict\n)\x81", "makes no sense"),
        (b"(" + text("x") + b"ios\nsystem\n", "instruction INST"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b", "makes no sense"),  # attributes for an admitted function
        (b"\x82\x01", "instruction EXT1"),
        (b"j\xff\xff\xff\xff", "makes no sense"),  # the memo's last place, for which pickle takes 64 GB
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "instruction BINBYTES8"),  # of 2^63 bytes
        (b"\x96\0\0\0\0\1\0\0\0", "instruction BYTEARRAY8"),  # of 4 GB
        (text("module") + b"Q", "a storage of 'module'"),
        (b"}" + b")" * 3 + b"\x87K\x01s", "makes no sense"),  # a tuple for a key
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path, value, words):
    refused(archive(tmp_path / "f.pt", dictionary(x=value)), words)
    refused(stream(tmp_path / "f.pt", dictionary(x=value)), words)


@pytest.mark.parametrize("write", [archive, stream])
def test_what_a_trainer_keeps_beside_the_weights_does_nothing_and_is_left_out(tmp_path, write):
    callback = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    config = b"comegaconf.dictconfig\nDictConfig\n)\x81q\x09}(" + text("_parent") + b"h\x09" + text("_content") + b"Nub"
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nU\x02f8K\0K\1\x87R(K\3U\1<NNNtbU\x08" + bytes(8) + b"tR"
    outer = b"\x80\x02}(" + b"".join([
        text("callbacks"), b"}(" + callback + b"}(" + text("best") + scalar + b"uu",
        text("hyper_parameters"), config,
        text("attributes"), b"cpytorch_lightning.utilities.parsing\nAttributeDict\n)R(" + text("lr") + number(1) + b"u",
        text("listed"), b"comegaconf.listconfig\nListConfig\n)\x81(K\1K\2e",
        text("state_dict"), dictionary(
            weight=tensor("FloatStorage", "0", 12, 0, (3, 4), (4, 1), write is stream),
            parameter=b"ctorch._utils\n_rebuild_parameter\n("
            + tensor("FloatStorage", "0", 12, 4, (4,), (1,), write is stream) + b"\x89ccollections\nOrderedDict\n)RtR",
        )[2:-1],
    ]) + b"u."  # fmt: skip
    got = open_torch(write(tmp_path / "f.ckpt", outer, _0=FLOATS))
    assert list(got) == ["weight", "parameter"]
    assert (got["weight"] == FLOATS.reshape(3, 4)).all()
    assert (got["parameter"] == FLOATS[4:8]).all()
    refused(
        write(tmp_path / "f.ckpt", b"\x80\x02" + callback + b")\x81.", _0=FLOATS), "list of storages|dict of tensors"
    )
    refused(write(tmp_path / "f.ckpt", b"\x80\x02" + callback + b")\x81."), "but an object of 'pytorch_lightning")


def test_a_small_file_takes_little_memory(tmp_path):
    first = tensor("FloatStorage", "0", 12, 0, (1,) * 8, (1,) * 8) + b"q\0"
    bodies = {
        "dicts": b"}" * 4_000_000,
        "marks": b"(" * 4_000_000,
        "memo": b"\x94" * 4_000_000,
        "places": b"".join(b"r" + struct.pack("<I", 7 * i) for i in range(399_000)),
        "names": b"}(" + b"".join(text(str(i)) + b"h\0" for i in range(150_000)) + b"u.",
        "a line": b"c" + b"a" * 10_000_000,
        "a length": b"\x96\0\0\0\0\1\0\0\0" + bytes(10_000_000),
        "lists": b"}(" + text("a") + b"]" * 190_000 + b"a" * 189_999 + b"u.",
        "tuples": b"}(" + text("a") + b")" + b"\x85" * 390_000 + b"u.",
        "circles": b"}q\1(" + text("state_dict") + b"h\1" + text("a") + b"]q\2h\2au.",
    }
    paths = [archive(tmp_path / f"{name}.pt", b"\x80\x02" + first + body, _0=FLOATS) for name, body in bodies.items()]
    with zipfile.ZipFile(tmp_path / "records.pt", "w") as file:
        for i in range(100_000):
            file.writestr(str(i), "")
    script = """
import pathlib, resource, sys
from jaxdiff.io.torch_files import open_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_torch(pathlib.Path(path))
    except ValueError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    words = [sys.executable, "-c", script, *map(str, paths), str(tmp_path / "records.pt")]
    assert int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) < 100


def test_records_that_share_their_bytes_are_refused(tmp_path):
    one, other = (tensor("FloatStorage", key, 12, 0, (1,), (1,)) for key in "01")
    path = archive(tmp_path / "f.pt", dictionary(x=one, y=other), _0=np.zeros(10_000), _1=np.zeros(0))
    whole = bytearray(path.read_bytes())
    entries = [whole.rfind(f"m/data/{key}".encode()) - 46 for key in "01"]
    for place in (20, 24, 42):  # sizes, and where it begins
        whole[entries[1] + place : entries[1] + place + 4] = whole[entries[0] + place : entries[0] + place + 4]
    path.write_bytes(whole)
    refused(path, "lie over one another")


@pytest.mark.parametrize(
    ("size", "offset", "shape", "strides", "words"),
    [
        (12, 0, (13,), (1,), "past the end of its storage"),
        (12, 5, (8,), (1,), "past the end of its storage"),
        (12, 0, (2, 2), (11, 1), "past the end of its storage"),
        (12, 0, (2**20, 2**20), (0, 0), "past the end of its storage"),  # a view, but its copy would have 4 TB
        (12, 0, (2**40, 2**40), (2**40, 1), "past the end of its storage"),
        (12, 0, (0, 2**60), (1, 1), "the shape of 'x' makes no sense"),
        (12, -1, (1,), (1,), "no whole numbers from 0"),
        (12, 0, (2,), (-1,), "no whole numbers from 0"),
        (12, 0, (2, 2), (1,), "2 dimensions and 1 strides"),
        (12, 0, (1,) * 65, (1,) * 65, "65 dimensions"),
        (13, 0, (1,), (1,), "is not in it whole|do not have the sizes"),
        (2**62 - 1, 0, (1,), (1,), "is not in it whole|do not have the sizes"),
        (-1, 0, (1,), (1,), "no whole numbers from 0"),
    ],
)
def test_a_tensor_that_does_not_lie_in_the_file_is_refused(tmp_path, size, offset, shape, strides, words):
    for write in (archive, stream):
        pickled = dictionary(x=tensor("FloatStorage", "0", size, offset, shape, strides, write is stream))
        refused(write(tmp_path / "f.pt", pickled, _0=FLOATS), words)


def test_storages_that_are_missing_named_twice_or_compressed_are_refused(tmp_path):
    one = tensor("FloatStorage", "0", 12, 0, (1,), (1,))
    other = tensor("HalfStorage", "0", 24, 0, (1,), (1,))
    path = tmp_path / "f.pt"
    refused(archive(path, dictionary(x=one)), "'m/data/0' is missing")
    refused(archive(path, dictionary(x=one, y=other), _0=FLOATS), "two storages by one key")
    refused(archive(path, dictionary(x=one), zipfile.ZIP_DEFLATED, _0=FLOATS), "compressed or encrypted")
    refused(stream(path, dictionary(x=one)), "list of storages")
    refused(stream(path, dictionary(x=one), _0=FLOATS, _1=FLOATS), "list of storages")


def test_a_file_cut_anywhere_is_refused_in_a_sentence(tmp_path):
    for write in (archive, stream):
        pickled = dictionary(x=tensor("FloatStorage", "0", 12, 0, (12,), (1,), write is stream))
        whole = write(tmp_path / "f.pt", pickled, _0=FLOATS).read_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            refused(tmp_path / "cut.pt", "damaged|not read|not a file of torch.save")


def test_a_file_with_a_byte_changed_gives_tensors_or_a_sentence(tmp_path):
    rng = np.random.default_rng(0)
    for write in (archive, stream):
        pickled = dictionary(x=tensor("FloatStorage", "0", 12, 0, (12,), (1,), write is stream))
        whole = np.frombuffer(write(tmp_path / "f.pt", pickled, _0=FLOATS).read_bytes(), np.uint8)
        for place in range(0, len(whole), 5):
            changed = whole.copy()
            changed[place] = rng.integers(256)
            (tmp_path / "changed.pt").write_bytes(changed.tobytes())
            got = {}
            with contextlib.suppress(ValueError):
                got = open_torch(tmp_path / "changed.pt")
            assert all(array.nbytes <= FLOATS.nbytes for array in got.values())


@pytest.mark.parametrize("write", [archive, stream])
def test_dicts_in_a_dict_are_looked_into_and_none_deeper(tmp_path, write):
    """As those of IP-Adapters are; one that holds itself ends."""
    one = tensor("FloatStorage", "0", 12, 0, (12,), (1,), write is stream)
    inner = b"}q\x09(" + text("a") + one + text("again") + b"h\x09" + text("deep") + b"}" + text("b") + one + b"su"
    got = open_torch(write(tmp_path / "f.pt", dictionary(x=inner, y=one), _0=FLOATS))
    assert list(got) == ["x.a", "y"]
    assert (got["x.a"] == FLOATS).all()


@pytest.mark.parametrize("write", [archive, stream])
def test_a_dict_of_parameters_is_a_dict(tmp_path, write):
    """As the first textual inversions have it."""
    old = write is stream
    one = tensor("FloatStorage", "0", 12, 0, (3, 4), (4, 1), old)
    cls = b"ctorch.nn.modules.container\nParameterDict\n"
    cls = b"(" + text("module") + cls + text("container.py") + text("class ParameterDict: ...") + b"tQ" if old else cls
    parameters = b"}" + text("*") + one + b"s"
    whole = cls + b")\x81}(" + text("training") + b"\x88" + text("_parameters") + parameters + b"ub"
    got = open_torch(write(tmp_path / "f.pt", dictionary(string_to_param=whole, step=number(3)), _0=FLOATS))
    assert list(got) == ["string_to_param.*"]
    assert (got["string_to_param.*"] == FLOATS.reshape(3, 4)).all()


def test_names_that_would_take_memory_are_refused(tmp_path):
    one = tensor("FloatStorage", "0", 12, 0, (12,), (1,))
    inner = b"}(" + text("a") + one + text("b") + one + b"u"
    path = archive(tmp_path / "f.pt", b"\x80\x02}" + text("x" * 1_000_000) + inner + b"s.", _0=FLOATS)
    refused(path, "names that are longer")


def test_what_is_no_such_file_is_named(tmp_path):
    refused(tmp_path / "none.pt", "cannot be read: No such file")
    (tmp_path / "f.pt").write_bytes(b"<html>")
    refused(tmp_path / "f.pt", "not a file of torch.save")
    (tmp_path / "f.pt").write_bytes(pickle.dumps([1], 2))
    refused(tmp_path / "f.pt", "not one of torch.save")
    with zipfile.ZipFile(tmp_path / "f.pt", "w") as file:
        file.writestr("a.txt", "")
    refused(tmp_path / "f.pt", "0 records data.pkl")
    refused(archive(tmp_path / "f.pt", b"\x80\x02]."), "not a dict of tensors, but of the type list")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_to_the_bit(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    tensors = module.state_dict() | {
        "view": base[3:19].reshape(4, 4).T,
        "half": base.half(),
        "brain": base.bfloat16(),
        "bool": base > 4,
        "byte": base.byte(),
        "long": base.long()[::3],
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    got = open_torch(tmp_path / "f.pt")
    assert list(got) == list(tensors)
    for name, want in tensors.items():
        same = got[name].astype(np.float64) == want.double().numpy()
        assert got[name].shape == tuple(want.shape)
        assert str(got[name].dtype) == str(want.dtype).removeprefix("torch.")
        assert same.all()
    torch.save({"x": base.to("meta")}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "f.pt", "is not read")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_lightning_is_read_without_it(tmp_path, zipped, monkeypatch):
    torch = pytest.importorskip("torch")
    module = types.ModuleType("pytorch_lightning")
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict), ("ListConfig", list)):
        setattr(module, name, type(name, (base,), {"__module__": "pytorch_lightning"}))
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    callback, hyper, listed = module.ModelCheckpoint(), module.AttributeDict(lr=1e-4), module.ListConfig([1, 2])
    callback.owner, callback.best, callback.place = callback, np.float64(0.5), Path("a/b")
    hyper.parent, hyper["config"] = listed, {"a": (callback, {1, 2})}
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimiser.step()
    saved = {
        "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "self": callback}},
        "hyper_parameters": hyper, "optimizer_states": [optimiser.state_dict()], "global_step": 470000, "loops": None,
        "device": torch.device("cpu"), "size": torch.Size([2]), "dtype": torch.float16,
        "at": datetime.date(2022, 8, 22),
        "state_dict": {**layer.state_dict(), "parameter": layer.weight},
    }  # fmt: skip
    torch.save(saved, tmp_path / "f.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    got = open_torch(tmp_path / "f.ckpt")
    assert list(got) == ["weight", "bias", "parameter"]
    for name, array in got.items():
        np.testing.assert_array_equal(array, saved["state_dict"][name].detach().numpy())
