"""Single files pass between jaxdiff and diffusers without loss, and draw the same pictures in both."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders import single_file_utils as theirs
from pairs import (
    FILE_SD1_TEXT,
    FILE_SD1_UNET,
    FILE_SD2_TEXT,
    FILE_SD2_UNET,
    FILE_VAE,
    ROLES,
    TEXTS,
    make_pair,
    nchw,
)
from safetensors.torch import load_file, save_file
from test_folders import assert_same_model

import jaxdiff
from jaxdiff.io.single_file import write_single
from jaxdiff.model import FileOptions, read_model

NAMES = tuple(ROLES)


@pytest.fixture(scope="module")
def file_sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("file_sd1")
    return make_pair(folder, FILE_SD1_UNET, FILE_SD1_TEXT, {}, seed=30, vae=FILE_VAE)


@pytest.fixture(scope="module")
def file_sd2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("file_sd2")
    v = {"prediction_type": "v_prediction"}
    return make_pair(folder, FILE_SD2_UNET, FILE_SD2_TEXT, v, seed=40, vae=FILE_VAE | {"sample_size": 192}, pad="!")


def write(pair, path):
    """A file of the pair's networks."""
    write_single(path, {name: pair.network(name) for name in NAMES}, pair.ours.scheduler)
    return path


def original(pair, path):
    """The same as the original code would save it: no metadata, but buffers, averages and all of the text tower."""
    tensors = load_file(write(pair, path))
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    tensors |= {"model_ema." + name.removeprefix("model.").replace(".", ""): 1.1 * t for name, t in unet.items()}
    tensors |= {"betas": torch.linspace(0.1, 0.2, 1000), "model_ema.decay": torch.tensor(0.9999)}
    if any("resblocks" in name for name in tensors):
        blocks = "cond_stage_model.model.transformer.resblocks"
        last = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{blocks}.3.")}
        tensors |= {name.replace(f"{blocks}.3", f"{blocks}.4"): tensor + 1 for name, tensor in last.items()}
        tensors["cond_stage_model.model.text_projection"] = torch.ones(128, 128)
        tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    else:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(tensors, path)
    return path


def from_file(pair, path, **options):
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(pair.path), local_files_only=True, safety_checker=None, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["sd1", "sd2", "file_sd1", "file_sd2"])
def test_diffusers_reads_what_we_write(name, request, tmp_path):
    pair = request.getfixturevalue(name)
    assert_same_model(from_file(pair, write(pair, tmp_path / "a.safetensors")), pair)


@pytest.mark.parametrize("name", ["file_sd1", "file_sd2"])
def test_diffusers_own_conversion_agrees_tensor_by_tensor(name, request, tmp_path):
    pair = request.getfixturevalue(name)
    tensors = load_file(original(pair, tmp_path / "a.safetensors"))
    unet, vae, text = (getattr(pair.torch, part) for part in NAMES)
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        spare = {key for key in tensors if ".resblocks.4." in key or key.endswith("text_projection")}
        kept = {key: tensor for key, tensor in tensors.items() if key not in spare}
        converted_text = theirs.convert_open_clip_checkpoint(text, kept)
    else:
        converted_text = theirs.convert_ldm_clip_checkpoint(tensors)
    converted_text = {key.removeprefix("text_model."): tensor for key, tensor in converted_text.items()}
    converted_text.pop("embeddings.position_ids", None)
    for converted, module in (
        (theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config)), unet),
        (theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config)), vae),
        (converted_text, text),
    ):
        expected = module.state_dict()
        assert converted.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(converted[key], tensor), key


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "legacy ckpt"])
@pytest.mark.parametrize("name", ["file_sd1", "file_sd2"])
def test_a_single_file_draws_diffusers_picture(name, form, request, tmp_path, figures):
    pair = request.getfixturevalue(name)
    path = original(pair, tmp_path / "a.safetensors")
    if form != "safetensors":
        zipped = form == "ckpt"
        saved = {"state_dict": load_file(path), "global_step": 470000}
        torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        path = tmp_path / "a.ckpt"
    reference = from_file(pair, path)
    ours = jaxdiff.load(path, tokenizer=pair.path)
    assert dataclasses.replace(ours.model, name="", defaults={}).scheduler == pair.ours.scheduler
    assert {r: dataclasses.replace(c, **KEPT.get(r, {})) for r, c in ours.model.configs.items()} == {
        r: dataclasses.replace(c, **KEPT.get(r, {})) for r, c in pair.ours.configs.items()
    }
    latents = np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)
    got = ours(TEXTS[:2], ["", "a cat"], steps=4, guidance=7.5, latents=latents)
    expected = reference(TEXTS[:2], negative_prompt=["", "a cat"], num_inference_steps=4, guidance_scale=7.5,
                         latents=nchw(latents), height=16, width=24, output_type="np").images  # fmt: skip
    assert expected.std() > 0.05
    figures[f"single file, {name}, {form}: largest difference of 255"] = worst = np.abs(got - 255 * expected).max()
    assert worst <= 0.51


# What a file of these sizes says otherwise, and nothing draws by.
KEPT = {
    "denoiser": {"attention_head_dim": 1, "num_attention_heads": None},
    "text_encoder": {"projection_dim": 1, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1},
}


def test_averaged_weights_are_diffusers(file_sd1, tmp_path):
    path = original(file_sd1, tmp_path / "a.safetensors")
    reference = from_file(file_sd1, path, extract_ema=True)
    ours = read_model(path, options=FileOptions(file_sd1.path, ema=True))
    reference.save_pretrained(tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, ours.params, read_model(tmp_path / "folder").params)


def test_a_vae_alone_is_read_by_both(file_sd1, tmp_path):
    write_single(tmp_path / "vae.safetensors", {"vae": file_sd1.network("vae")})
    got = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(file_sd1.path), subfolder="vae", local_files_only=True
    )
    for key, tensor in file_sd1.torch.vae.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key
