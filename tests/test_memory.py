"""Weights take memory once, from files or in less width, and drawing needs no more than it says."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxdiff.generation import pipeline, weights
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.weights import Weights
from jaxdiff.io.convert import leaves
from jaxdiff.io.mapped import check_unchanged
from jaxdiff.model import EMBEDDED, read_model

SETTINGS = {"steps": 3, "guidance": 3.0, "seed": 1}


@pytest.fixture
def folder(model, tmp_path):
    """The tiny model, in files."""
    model.save(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder):
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes())  # in place


def test_what_is_read_are_views_of_the_file(folder):
    for _, leaf in leaves(read_model(folder).params):
        assert not leaf.flags.owndata
        assert not leaf.flags.writeable


def test_a_file_that_is_written_to_while_it_is_read_is_refused(folder):
    pipe = Pipeline(read_model(folder))
    rewrite(folder)
    with pytest.raises(ValueError, match="safetensors was written to"):
        pipe("a dog", **SETTINGS)
    with pytest.raises(ValueError, match="safetensors was written to"):
        pipe.save(folder.parent / "again")


def test_a_file_that_was_moved_and_then_cut_short_is_refused(folder):
    pipe = Pipeline(read_model(folder))
    shutil.move(folder, folder.parent / "moved")
    for file in (folder.parent / "moved").rglob("*.safetensors"):
        os.truncate(file, 1000)
    with pytest.raises(ValueError, match="safetensors was written to"):
        pipe("a dog", **SETTINGS)


def test_a_file_that_is_replaced_or_deleted_stays_what_it_was(folder):
    wanted = Pipeline(read_model(folder))("a dog", **SETTINGS)
    pipe = Pipeline(read_model(folder))
    shutil.move(folder, folder.parent / "old")
    shutil.copytree(EMBEDDED, folder)
    np.testing.assert_array_equal(pipe("a dog", **SETTINGS), wanted)
    shutil.rmtree(folder.parent / "old")
    pipe.save(folder.parent / "again")
    np.testing.assert_array_equal(Pipeline(read_model(folder.parent / "again"))("a dog", **SETTINGS), wanted)


@pytest.mark.parametrize("memory", ["normal", "low", "lowest"])
def test_shapes_are_those_of_the_weights_to_come(model, memory, monkeypatch):
    monkeypatch.setattr("jaxdiff.nn.conv.prepared_tile", lambda c, c2: 4)
    monkeypatch.setattr("jaxdiff.nn.linear._NARROWED", 0)
    placed = Weights(model.params, np.float32, memory=memory)
    for role in placed:
        shapes, found = placed.shapes(role), placed[role]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    for name, kept in {"winograd": "normal", "step": "lowest"}.items():
        assert (memory == kept) == any(name in path for path, _ in leaves(placed.shapes("denoiser")))


def test_with_little_memory_one_network_is_there_at_a_time(model):
    placed = Weights(model.params, np.float32, memory="low")
    sizes = {role: placed.missing_bytes(role) for role in placed}
    for role in placed:
        placed[role]
        assert [placed.missing_bytes(other) for other in placed] == [0 if o == role else sizes[o] for o in placed]


def test_with_little_memory_images_are_nearly_the_same(model, pipe):
    wanted = pipe(["a dog", "a cat"], **SETTINGS).astype(int)
    found = Pipeline(model, memory="low")(["a dog", "a cat"], **SETTINGS)
    assert 0 < np.abs(found - wanted).max() <= 4


def test_with_8_bits_images_are_those_of_weights_in_whole_steps(model, monkeypatch):
    monkeypatch.setattr("jaxdiff.nn.linear._NARROWED", 0)

    def rounded(path, leaf):
        if leaf.ndim < 2:
            return leaf
        half = leaf.astype(np.float16).astype(np.float32)
        if path[0].key == "vae" or path[-1].key != "kernel":
            return half
        step = np.abs(half).max(tuple(range(half.ndim - 1))) / np.float32(127)
        return np.round(half / step) * step

    wanted = Pipeline(model.with_params(jax.tree.map_with_path(rounded, model.params)))("a dog", **SETTINGS)
    found = Pipeline(model, memory="lowest")("a dog", **SETTINGS)
    plain = Pipeline(model)("a dog", **SETTINGS)
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert np.abs(found.astype(int) - plain).max() > 8


@pytest.mark.parametrize("make", [np.asarray, jax.numpy.asarray])
def test_half_width_that_a_weight_does_not_fit_is_refused(model, make):
    params = jax.tree.map(lambda leaf: make(np.full_like(leaf, 1e6)), model.params["vae"])
    with pytest.raises(ValueError, match="/kernel has a number beyond 65504"):
        Weights({"vae": params}, np.float32, memory="low")["vae"]


def test_threads_may_ask_for_networks_at_the_same_time(model):
    placed = Weights(model.params, np.float32, memory="low")

    def ask(i):
        return [len(placed[role]) for role in list(placed)[i % 3 :] * 20]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(min(found) > 0 for found in pool.map(ask, range(12)))
    finally:
        sys.setswitchinterval(before)


def test_decoding_what_the_devices_do_not_divide_is_done_by_each(model, pipe):
    spread = Pipeline(model, devices=jax.devices()[:3])
    latents = pipe.noise([0, 1])
    np.testing.assert_array_equal(spread.decode(latents), pipe.decode(latents))


def test_a_program_is_checked_against_memory_once(model, monkeypatch):
    pipe = Pipeline(model)
    pipe("a dog", **SETTINGS)
    monkeypatch.setattr(pipeline, "give_back_memory", lambda: pytest.fail("the same program is checked again"))
    pipe("a cat", **SETTINGS)


def test_another_word_for_memory_is_refused(model):
    with pytest.raises(ValueError, match=r"memory.*'high'.*normal, low, lowest"):
        Pipeline(model, memory="high")


def test_what_does_not_fit_is_refused_before_it_starts(model, monkeypatch):
    monkeypatch.setattr(pipeline, "memory_bytes", lambda: 10**6)
    with pytest.raises(ValueError, match=r"need about .* GB of memory.*--memory low"):
        Pipeline(model)("a dog", **SETTINGS)


def test_what_may_not_fit_is_told(model, monkeypatch):
    monkeypatch.setattr(pipeline, "free_bytes", lambda: 10)
    with pytest.warns(UserWarning, match="GB are free"):
        Pipeline(model)("a dog", **SETTINGS)


def test_arrays_of_no_file_are_never_refused():
    check_unchanged(np.zeros(3)[1:])
    check_unchanged(jax.numpy.zeros(3))
    assert weights.by_module(lambda _, module: module, {"a": {"b": 1}, "c": 2}) == {"a": {"b": 1}, "c": 2}
