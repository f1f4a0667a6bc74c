"""Weights files: what is good is read exactly, what is not is refused in a sentence."""

import json
import pickle
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_torch_files import FLOATS, archive, dictionary, tensor, text

from jaxdiff.generation.weights import Weights
from jaxdiff.io.convert import from_torch
from jaxdiff.io.weights import Stored, check_params, open_file, open_safetensors, open_weights, write_safetensors

STEM = "diffusion_pytorch_model"


def tensors(dtype=np.float32, start=0):
    return {
        "conv.weight": np.arange(start, start + 24).reshape(2, 3, 2, 2).astype(dtype),
        "conv.bias": np.array([0.5, -1], dtype),
    }


def raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_a_file_is_read_as_it_was_written(tmp_path, dtype):
    save_file(tensors(dtype), tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = open_safetensors(tmp_path / "a.safetensors")
    for name, array in tensors(dtype).items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_scalars_and_empty_tensors_are_read(tmp_path):
    save_file({"a": np.array(3, np.float32), "b": np.zeros((0, 4), np.float32)}, tmp_path / "a.safetensors")
    read = open_safetensors(tmp_path / "a.safetensors")
    assert read["a"] == 3
    assert read["b"].shape == (0, 4)


def test_plain_files_come_first_and_a_lone_variant_is_found(tmp_path):
    save_file(tensors(), tmp_path / f"{STEM}.fp16.safetensors")
    assert open_weights(tmp_path, STEM).keys() == tensors().keys()
    save_file(tensors(start=9), tmp_path / f"{STEM}.safetensors")
    assert open_weights(tmp_path, STEM)["conv.weight"][0, 0, 0, 0] == 9
    assert open_weights(tmp_path, STEM, "fp16")["conv.weight"][0, 0, 0, 0] == 0
    (tmp_path / f"{STEM}.safetensors").unlink()
    save_file(tensors(start=5), tmp_path / f"{STEM}.non_ema.safetensors")
    assert open_weights(tmp_path, STEM)["conv.weight"][0, 0, 0, 0] == 0
    (tmp_path / f"{STEM}.fp16.safetensors").rename(tmp_path / f"{STEM}.fp8.safetensors")
    with pytest.raises(ValueError, match=r"fp8\.safetensors, .*non_ema.*plain name"):
        open_weights(tmp_path, STEM)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits_keep_their_bits_and_are_widened_where_they_are_placed(tmp_path, kind):
    finite = np.arange(256, dtype=np.uint8).view(kind)
    finite = finite[np.isfinite(finite.astype(np.float32))][:240].reshape(4, 60)
    write_safetensors(tmp_path / "a.safetensors", {"a.weight": Stored(finite, finite.dtype)})
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.get_slice("a.weight").get_dtype() == {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[kind]
    params = from_torch(open_safetensors(tmp_path / "a.safetensors").items())
    assert params["a"]["kernel"].tobytes("F") == finite.tobytes()
    check_params(params, {"a": {"kernel": jax.ShapeDtypeStruct((60, 4), np.float32)}}, "a file")
    for memory, dtype, wide in (("normal", "float32", "float32"), ("normal", "bfloat16", "bfloat16"),
                                ("low", "float32", "float16")):  # fmt: skip
        placed = Weights({"vae": params}, dtype, memory=memory)["vae"]["a"]["kernel"]
        assert placed.dtype == wide
        np.testing.assert_array_equal(np.asarray(placed, np.float32), finite.T.astype(np.float32))


def shards(folder: Path, index: dict | None = None, suffix: str = "index") -> None:
    save_file({"conv.weight": tensors()["conv.weight"]}, folder / f"{STEM}-00001-of-00002.safetensors")
    save_file({"conv.bias": tensors()["conv.bias"]}, folder / f"{STEM}-00002-of-00002.safetensors")
    weight_map = {name: f"{STEM}-0000{i}-of-00002.safetensors" for i, name in enumerate(tensors(), 1)}
    (folder / f"{STEM}.safetensors.{suffix}.json").write_text(json.dumps({"weight_map": weight_map} | (index or {})))


@pytest.mark.parametrize("suffix", ["index", "index.fp16"])
def test_shards_are_joined(tmp_path, suffix):
    shards(tmp_path, suffix=suffix)
    read = open_weights(tmp_path, STEM)
    for name, array in tensors().items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"conv.weight": "../outside.safetensors"}}, "only .safetensors files beside it"),
        ({"weight_map": {"conv.weight": "/etc/passwd"}}, "only .safetensors files beside it"),
        ({"weight_map": {"conv.weight": "model.bin"}}, "only .safetensors files beside it"),
        ({"weight_map": {"conv.weight": f"{STEM}-00003-of-00003.safetensors"}}, "cannot be read: No such file"),
        ({"weight_map": {"conv.bias": f"{STEM}-00001-of-00002.safetensors"}}, "disagree.*conv.bias, conv.weight"),
        ({"weight_map": []}, "no `weight_map`"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, sentence):
    shards(tmp_path, index)
    with pytest.raises(ValueError, match=sentence):
        open_weights(tmp_path, STEM)


def test_what_is_no_safetensors_file_is_told_apart(tmp_path):
    path = tmp_path / f"{STEM}.safetensors"
    for content, sentence in [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        (b"PK\x03\x04" + bytes(100), "is a pickle"),
        (b"nonsense that is long enough", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as caught:
            open_weights(tmp_path, STEM)
        assert str(path) in str(caught.value)


PICKLED = dictionary(a=tensor("FloatStorage", "0", 12, 0, (3, 4), (4, 1)))


@pytest.mark.parametrize(("stem", "pickled"), [(STEM, STEM), ("model", "pytorch_model")])
@pytest.mark.parametrize("name", ["{}.bin", "{}.fp16.bin", "{}.ckpt"])
def test_pickles_are_read_where_there_are_no_safetensors(tmp_path, stem, pickled, name):
    archive(tmp_path / name.format(pickled), PICKLED, _0=FLOATS)
    assert (open_weights(tmp_path, stem)["a"] == FLOATS.reshape(3, 4)).all()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / f"{stem}.fp16.safetensors")
    assert open_weights(tmp_path, stem)["a"].shape == (2,)


def test_pickled_shards_are_joined_and_their_index_names_no_others(tmp_path):
    index = tmp_path / f"{STEM}.bin.index.json"
    files = {name: f"{STEM}-0000{i}-of-00002.bin" for i, name in enumerate("ab", 1)}
    for name, file in files.items():
        value = tensor("FloatStorage", "0", 12, 0, (12,), (1,))
        archive(tmp_path / file, dictionary(**{name: value}), _0=FLOATS)
    index.write_text(json.dumps({"weight_map": files}))
    assert open_weights(tmp_path, STEM).keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": files | {"c": files["a"]}}))
    with pytest.raises(ValueError, match="disagree about tensors: c"):
        open_weights(tmp_path, STEM)
    index.write_text(json.dumps({"weight_map": {"a": "../a.bin"}}))
    with pytest.raises(ValueError, match=r"only \.bin files beside it are read"):
        open_weights(tmp_path, STEM)


def test_what_is_no_weights_is_told(tmp_path):
    with pytest.raises(ValueError, match=rf"{STEM}\.safetensors is missing, and so is {STEM}\.bin"):
        open_weights(tmp_path, STEM)
    archive(tmp_path / f"{STEM}.bin", dictionary(a=b"cos\nsystem\n(" + text("true") + b"tR"))
    with pytest.raises(
        ValueError, match=rf"{STEM}\.bin is not read: its 'a' is no tensor, but an object of 'os\.system'"
    ):
        open_weights(tmp_path, STEM)


def test_every_cut_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut short|not a safetensors|empty"):
            open_safetensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="do not fill it"):
        open_safetensors(path)


def test_headers_that_make_no_sense_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    twice = b'{"a": %s, "a": %s}' % ((json.dumps(good).encode(),) * 2)
    for header, data, sentence in [
        (twice, 8, "names tensors twice: a"),
        (b"{" + b"x" * 20, 0, "header is not JSON"),
        ({"a": good | {"dtype": "F4"}}, 8, "stores a as F4; supported: F16, BF16, F32, F64, F8_E4M3, F8_E5M2"),
        ({"a": good | {"shape": [3]}}, 8, "entry for a makes no sense"),
        ({"a": good | {"shape": [-2]}}, 8, "entry for a makes no sense"),
        ({"a": good | {"data_offsets": [-8, 0]}}, 8, "entry for a makes no sense"),
        ({"a": 3}, 8, "entry for a makes no sense"),
        ({"a": good, "b": good}, 8, "do not fill it"),
        ({"a": good, "b": good | {"data_offsets": [16, 24]}}, 24, "do not fill it"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            open_safetensors(raw(path, header, bytes(data)))


def test_params_that_do_not_fit_are_listed_by_name(tmp_path):
    expected = jax.eval_shape(lambda: from_torch_zeros())
    params = from_torch(tensors().items())
    check_params(params, expected, "unet")

    other = {"other": {"bias": np.zeros(1, np.float32)}}
    with pytest.raises(ValueError, match=r"^unet: .*1 missing: conv\.weight") as caught:
        check_params({"conv": {"bias": params["conv"]["bias"]}} | other, expected, "unet")
    assert "misshapen" not in str(caught.value)
    assert check_params(params | other, expected, "unet").keys() == {"conv"}
    wrong = from_torch({**tensors(), "conv.weight": np.zeros((2, 3, 1, 1), np.float32)}.items())
    with pytest.raises(ValueError, match=r"1 misshapen: conv\.weight \(2, 3, 1, 1\) instead of \(2, 3, 2, 2\)"):
        check_params(wrong, expected, "unet")
    with pytest.raises(ValueError, match=r"2 not float16.*: conv\.bias, conv\.weight"):
        check_params(from_torch(tensors(np.int32).items()), expected, "unet")
    params["conv"]["bias"][1] = np.nan
    with pytest.raises(ValueError, match=r"1 not finite: conv\.bias"):
        check_params(params, expected, "unet")


def test_long_lists_of_names_are_cut_with_a_count():
    expected = {f"m{i:02}": {"bias": jax.ShapeDtypeStruct((1,), np.float32)} for i in range(25)}
    with pytest.raises(ValueError, match=r"25 missing: m00\.bias, .*m09\.bias and 15 more"):
        check_params({}, expected, "unet")


def from_torch_zeros():
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), from_torch(tensors().items()))


@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x0480, 0x0580, 0x10280])
def test_a_header_whose_size_begins_as_a_pickle_does_is_none(tmp_path, size):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(size)
    values = np.array([1, 2], np.float32)
    (tmp_path / "a.safetensors").write_bytes(size.to_bytes(8, "little") + header + values.tobytes())
    tensors, _ = open_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["a"], values)
