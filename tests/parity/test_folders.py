"""Folders pass between jaxdiff and diffusers without loss, in every form that diffusers writes."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pairs import MAX_TOKENS, ROLES, TEXTS, Pair
from safetensors.torch import load_file, save_file

from jaxdiff.io.folder import write_folder
from jaxdiff.model import read_model

NETWORKS = tuple(ROLES)


def plain_config(config):
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps({key: value for key, value in values.items() if not key.startswith("_")}))


def assert_same_model(theirs, pair: Pair):
    for name in NETWORKS:
        expected = getattr(pair.torch, name)
        got = getattr(theirs, name)
        assert got.state_dict().keys() == expected.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(got.state_dict()[key], tensor, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("tokenizer", ["path", "object"])
def test_diffusers_loads_what_we_write(pair, tmp_path, tokenizer):
    if tokenizer == "path":
        networks = {name: pair.network(name) for name in NETWORKS}
        write_folder(tmp_path / "model", networks, pair.ours.scheduler, pair.path / "tokenizer")
    else:
        pair.ours.save(tmp_path / "model")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert_same_model(theirs, pair)
    got, expected = (pipe.tokenizer(TEXTS, padding="max_length")["input_ids"] for pipe in (theirs, pair.torch))
    assert got == expected
    written_otherwise = {"attention_head_dim", "transformers_version", "upcast_attention"}
    for name in (*NETWORKS, "scheduler"):
        got, expected = (plain_config(getattr(pipe, name).config) for pipe in (theirs, pair.torch))
        for key in expected.keys() - written_otherwise:
            assert got[key] == expected[key], (name, key)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_diffusers_loads_half_precision(sd1, tmp_path, dtype):
    sd1.ours.save(tmp_path / "model", dtype)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    weight = theirs.unet.conv_in.weight
    cast = sd1.torch.unet.conv_in.weight.to(getattr(torch, np.dtype(dtype).name)).float()
    torch.testing.assert_close(weight, cast, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16"}, {"max_shard_size": "40KB"}, {"variant": "fp16", "max_shard_size": "40KB"}],
    ids=["variant", "shards", "shards of a variant"],
)
def test_we_load_every_form_that_diffusers_writes(sd1, tmp_path, options):
    sd1.torch.save_pretrained(tmp_path / "model", **options)
    assert "max_shard_size" not in options or list((tmp_path / "model/unet").glob("*-of-*.safetensors"))
    back = read_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back.params, sd1.ours.params)


def test_we_load_half_precision_files(sd1, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(sd1.path, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    back = read_model(tmp_path / "model")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back.params)} == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), back.params, sd1.ours.params)


def test_we_load_text_encoders_of_transformers_4(sd1, tmp_path):
    sd1.torch.save_pretrained(tmp_path / "model")
    file = tmp_path / "model/text_encoder/model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    position_ids = {"text_model.embeddings.position_ids": torch.arange(MAX_TOKENS)[None]}
    save_file(tensors | position_ids, file, metadata={"format": "pt"})
    back = read_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back.params, sd1.ours.params)


def test_we_load_pickles_that_diffusers_and_torch_write(sd1, tmp_path):
    sd1.torch.save_pretrained(tmp_path / "model", safe_serialization=False)
    text = tmp_path / "model" / "text_encoder"
    for file in text.glob("*.safetensors"):  # transformers writes no others any more
        file.unlink()
        torch.save(sd1.torch.text_encoder.state_dict(), text / "pytorch_model.bin")
    assert not list((tmp_path / "model").rglob("*.safetensors"))
    back = read_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back.params, sd1.ours.params)
