"""GGUF files: tensors in blocks are what the formats say, models in them draw, and damaged ones are refused."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_fuzz import TRIALS, changed, read_single, survives
from test_single_file import BETAS, LIKE_SD1, VAE, named

import jaxdiff
from jaxdiff.io.gguf import Quantised, open_gguf
from jaxdiff.io.single_file import open_single, write_single
from jaxdiff.model import FileOptions, read_model

TEXT, ARRAY, INT32, UINT32 = 8, 9, 5, 4
F32, Q4_0, Q8_0 = 0, 2, 8
SETTINGS = {"steps": 2, "seed": 1, "size": (16, 16)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(path: Path, tensors: dict[str, tuple[int, tuple[int, ...], bytes]], said: dict[str, bytes]) -> Path:
    """Writes kind, shape and bytes of each tensor; `said` has the kind and the bytes of each value of the header."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(said))
    head += b"".join(text(key) + value for key, value in said.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def q8_0(array: np.ndarray) -> tuple[bytes, np.ndarray]:
    """An array of float32 in blocks of 32 with a scale and 8 bits each, and what it has become."""
    blocks = array.reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    scale = np.where(d == 0, 1, d.astype(np.float32))
    q = np.clip(np.round(blocks / scale), -127, 127).astype(np.int8)
    raw = np.concatenate([d.view(np.uint8).reshape(-1, 2), q.view(np.uint8)], 1).tobytes()
    return raw, (d.astype(np.float32) * q.astype(np.float32)).reshape(array.shape)


def shape_of(array: np.ndarray) -> bytes:
    return struct.pack("<IIQ", ARRAY, INT32, array.ndim) + np.array(array.shape, "<i4").tobytes()


def quantised_file(path: Path, tensors: dict[str, np.ndarray]) -> tuple[Path, dict[str, np.ndarray]]:
    """As ComfyUI's files are: what has two sides or more in blocks, its rows as long as a block where they are not."""
    stored, said, become = {}, {"general.architecture": struct.pack("<I", TEXT) + text("sd1")}, {}
    for name, array in tensors.items():
        if array.ndim < 2 or array.size % 32:
            stored[name], become[name] = (F32, array.shape, array.astype("<f4").tobytes()), array
            continue
        raw, become[name] = q8_0(array)
        shape = array.shape
        if shape[-1] % 32:
            shape = (array.size // 32, 32)
            said[f"comfy.gguf.orig_shape.{name}"] = shape_of(array)
        stored[name] = Q8_0, shape, raw
    return gguf(path, stored, said), become


@pytest.fixture(scope="module")
def model():
    return tiny.model(BETAS, **LIKE_SD1)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A model in blocks, and the same numbers as float32."""
    folder = tmp_path_factory.mktemp("gguf")
    write_single(folder / "a.safetensors", named(model), model.scheduler)
    path, become = quantised_file(folder / "a.gguf", load_file(folder / "a.safetensors"))
    save_file(become, folder / "b.safetensors")
    model.save(folder / "model")
    return path, folder / "b.safetensors", folder / "model"


def test_four_bits_are_halves_of_bytes_with_a_scale(tmp_path):
    q = np.arange(32) % 16
    raw = np.float16(0.5).tobytes() + bytes((q[:16] | q[16:] << 4).astype(np.uint8))
    tensors, _ = open_gguf(gguf(tmp_path / "a.gguf", {"a": (Q4_0, (1, 32), raw)}, {}))
    np.testing.assert_array_equal(tensors["a"], (q[None] - 8) / 2)


def test_a_tensor_in_blocks_is_an_array_that_takes_no_memory_until_it_is_asked_for(tmp_path):
    array = np.random.default_rng(0).normal(size=(8, 4, 3, 32)).astype(np.float32)
    raw, become = q8_0(array)
    tensors, said = open_gguf(
        gguf(tmp_path / "a.gguf", {"a": (Q8_0, (96, 32), raw)}, {"comfy.gguf.orig_shape.a": shape_of(array),
                                                                "general.name": struct.pack("<I", TEXT) + text("b")})
    )  # fmt: skip
    found = tensors["a"]
    assert isinstance(found, Quantised)
    assert said == {"general.name": "b"}
    for view in (lambda a: a, lambda a: a.transpose((2, 3, 1, 0)), lambda a: a[:, :, 0, 0], lambda a: a[0, 1].T):
        wanted = view(become)
        assert (view(found).shape, view(found).ndim, view(found).size) == (wanted.shape, wanted.ndim, wanted.size)
        np.testing.assert_array_equal(view(found), wanted)


def test_a_model_in_blocks_draws_what_its_numbers_draw(files):
    blocks, plain, _ = files
    images = [jaxdiff.load(path, tokenizer=files[2])("a dog", **SETTINGS) for path in (blocks, plain)]
    np.testing.assert_array_equal(*images)


def test_a_denoiser_alone_takes_the_place_of_a_models_own(files, model, tmp_path):
    _, plain, folder = files
    tensors = {
        name.removeprefix("model.diffusion_model."): array
        for name, array in load_file(plain).items()
        if name.startswith("model.diffusion_model.")
    }
    path, _ = quantised_file(tmp_path / "denoiser.gguf", tensors)
    found = jaxdiff.load(folder, denoiser=path).model
    numbers = read_model(plain, options=FileOptions(folder)).params["denoiser"]
    jax.tree.map(np.testing.assert_array_equal, found.params, model.params | {"denoiser": numbers})
    assert found.configs["denoiser"].block_out_channels == model.configs["denoiser"].block_out_channels
    assert found.exchanged == {"denoiser": "denoiser.gguf"}


def test_an_autoencoder_alone_keeps_the_models_own_scale(tmp_path):
    own = tiny.model(BETAS, **LIKE_SD1 | {"vae": replace(VAE, scaling_factor=0.5)})
    own.save(tmp_path / "model")
    other = tiny.model(BETAS, seed=9, **LIKE_SD1)
    write_single(tmp_path / "vae.safetensors", {"vae": other.networks["vae"]})
    found = jaxdiff.load(tmp_path / "model", vae=tmp_path / "vae.safetensors").model
    assert found.configs["vae"] == own.configs["vae"]
    jax.tree.map(np.testing.assert_array_equal, found.params, own.params | {"vae": other.params["vae"]})


def test_a_denoiser_predicts_what_its_folder_or_the_user_says(model, files, tmp_path):
    other = replace(model, scheduler=replace(model.scheduler, prediction_type="v_prediction"))
    other.save(tmp_path / "v")
    assert jaxdiff.load(files[2], denoiser=tmp_path / "v").model.scheduler.prediction_type == "v_prediction"
    for said in ("epsilon", "v_prediction"):
        found = jaxdiff.load(files[2], denoiser=files[0], prediction_type=said).model
        assert found.scheduler == replace(model.scheduler, prediction_type=said)
    assert jaxdiff.load(tmp_path / "v", denoiser=files[0]).model.scheduler.prediction_type == "v_prediction"


def test_a_network_that_does_not_fit_is_refused(files, tmp_path):
    denoiser = replace(LIKE_SD1["denoiser"], cross_attention_dim=32)
    text_encoder = replace(LIKE_SD1["text_encoder"], hidden_size=32)
    narrow = tiny.model(BETAS, **LIKE_SD1 | {"denoiser": denoiser, "text_encoder": text_encoder})
    narrow.save(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"narrow: The denoiser's cross_attention_dim is 32"):
        jaxdiff.load(files[2], denoiser=tmp_path / "narrow")
    deeper = replace(VAE, block_out_channels=(32,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
                     up_block_types=("UpDecoderBlock2D",) * 3)  # fmt: skip
    tiny.model(BETAS, **LIKE_SD1 | {"vae": deeper}).save(tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"deeper has 4 pixels to each latent"):
        jaxdiff.load(files[2], vae=tmp_path / "deeper")
    tensors = {name: array for name, array in load_file(files[1]).items() if not name.startswith("first_stage")}
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors has no vae"):
        jaxdiff.load(files[2], vae=tmp_path / "b.safetensors")


@pytest.mark.parametrize(("change", "told"), [
    (lambda b: b"GGUX" + b[4:], "is not a safetensors file"),
    (lambda b: b[:4] + struct.pack("<I", 9) + b[8:], "GGUF of version 9"),
    (lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:], "promises"),
    (lambda b: b[:-40], "behind it"),
    (lambda b: b[:60], "ends within its header"),
    (lambda b: b"GGUF", "ends within its header"),
])  # fmt: skip
def test_a_damaged_file_is_refused_in_a_sentence(files, tmp_path, change, told):
    path = tmp_path / "a.gguf"
    path.write_bytes(change(files[0].read_bytes()))
    with pytest.raises(ValueError, match=told):
        open_single(path)


def test_a_format_that_is_not_read_is_named(tmp_path):
    path = gguf(tmp_path / "a.gguf", {"input_blocks.0.0.weight": (16, (1, 256), bytes(66))}, {})
    with pytest.raises(ValueError, match=r"format of number 16; read are Q4_0"):
        open_single(path)


def test_bytes_that_are_changed_by_chance_are_read_or_refused(files, tmp_path):
    chance, whole = random.Random(0), files[0].read_bytes()
    for _ in range(TRIALS):
        survives(tmp_path / "b.gguf", changed(whole, chance, 12_000), read_single)
