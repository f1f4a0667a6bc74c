"""Stable Diffusion XL and its kin draw what diffusers draws, from the same latents."""

import json
import math

import jax
import numpy as np
import pytest
import torch
import tyro
import xl
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from pairs import TEXTS, nchw
from safetensors.torch import load_file

import jaxdiff
from jaxdiff import build
from jaxdiff.config import UNetConfig
from jaxdiff.io.convert import leaves, torch_axes, torch_name
from jaxdiff.io.weights import read_metadata
from jaxdiff.runtime.cli import exit_code
from jaxdiff.tools import convert as converting

PROMPTS = [TEXTS[0], "a dog! two green apples"]
ROUNDED = 0.51
"""Of 255, what rounding to whole numbers costs, and a hundredth."""


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    return xl.base(folder), jaxdiff.load(folder / "model")


CALLS = [
    ({}, {}),
    ({"negative_prompt": ["a cat", " "]}, {"negative_prompt": ["a cat", " "]}),
    ({"original_size": (40, 31), "crop": (3, 5)}, {"original_size": (31, 40), "crops_coords_top_left": (5, 3)}),
    ({"guidance": 1.0}, {"guidance_scale": 1.0}),
]


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    return xl.refiner(folder), folder / "model"


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (16, 24, 3)).astype(np.uint8)


SIZE = {"height": 16, "width": 24}


def convert(words):
    return exit_code(lambda: converting.main(tyro.cli(converting.Args, args=list(map(str, words)))))


def assert_same_params(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def error(ours, theirs, figures, what):
    """The largest difference of 255, told; theirs in [0, 1]."""
    largest = xl.largest(ours, theirs)
    figures[f"{what}: largest difference of 255"] = largest
    return largest


def test_the_refiner_takes_over(base, refiner, latents, figures):
    reference, own = base
    second, path = refiner
    pipe = jaxdiff.Pipeline(own.model, refiner=jaxdiff.load(path))
    common = {"num_inference_steps": 7, "guidance_scale": 5.0, "output_type": "latent"}
    for start in (0.4, 0.8, 1.0):
        got = pipe(PROMPTS, steps=7, guidance=5.0, latents=latents, refiner_start=start)
        drawn = reference(PROMPTS, latents=nchw(latents), denoising_end=start, **common, **SIZE).images
        if start < 1:
            sizes = dict.fromkeys(("original_size", "target_size", "negative_original_size"), (16, 24))
            drawn = second(PROMPTS, image=drawn, denoising_start=start, **sizes, **common).images
        expected = reference.vae.decode(drawn / reference.vae.config.scaling_factor).sample.detach()
        expected = reference.image_processor.postprocess(expected, "np")
        assert error(got, expected, figures, f"SDXL and refiner from {start}") <= ROUNDED


def test_the_refiner_alone_changes_an_image(refiner, picture, figures):
    second, path = refiner
    common = {"num_inference_steps": 9, "guidance_scale": 5.0, "original_size": (16, 24), "target_size": (16, 24)}
    generator = torch.Generator().manual_seed(3)
    expected = second(PROMPTS[0], negative_prompt="a cat", image=picture[None] / 255.0, strength=0.4,
                      generator=generator, output_type="np", **common).images  # fmt: skip
    _, noise = torch.randn((2, 4, 8, 12), generator=generator.manual_seed(3))  # the first is the autoencoder's
    asked = {"image": picture, "strength": 0.4, "steps": 9, "guidance": 5.0}
    got = jaxdiff.load(path)(PROMPTS[0], "a cat", latents=noise.numpy().transpose(1, 2, 0), **asked)
    assert error(got, expected, figures, "SDXL's refiner, an image") <= ROUNDED


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo(tmp_path, steps, figures):
    reference = xl.turbo(tmp_path)
    got = jaxdiff.load(tmp_path / "model")(PROMPTS[0], steps=steps, guidance=0.0, rng="torch", seed=5, size=(24, 16))
    expected = reference(PROMPTS[0], num_inference_steps=steps, guidance_scale=0.0, output_type="np",
                         generator=torch.Generator().manual_seed(5), **SIZE).images  # fmt: skip
    assert error(got, expected, figures, f"SDXL-Turbo, {steps} steps") <= ROUNDED


def test_inpainting(tmp_path, picture, latents, figures):
    reference = xl.inpainting(tmp_path)
    mask = np.zeros((16, 24), np.float32)
    mask[4:12, 8:20] = 1
    got = jaxdiff.load(tmp_path / "model")(PROMPTS[0], image=picture, mask=mask, steps=5, guidance=5.0,
                                           latents=latents[0])  # fmt: skip
    expected = reference(PROMPTS[0], image=picture[None] / 255.0, mask_image=mask[None], strength=1.0,
                         num_inference_steps=5, guidance_scale=5.0, latents=nchw(latents[:1]), output_type="np",
                         **SIZE).images  # fmt: skip
    inside = (slice(None), slice(4, 12), slice(8, 20))
    assert error(got[inside], expected[inside], figures, "SDXL inpainting") <= ROUNDED


def test_a_saved_model_draws_the_same_in_diffusers_and_here(base, latents, tmp_path):
    reference, pipe = base
    pipe.save(tmp_path / "again")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "again", add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "latents": nchw(latents), "output_type": "np"} | SIZE
    np.testing.assert_array_equal(again(PROMPTS, **asked).images, reference(PROMPTS, **asked).images)
    ours = {"steps": 3, "latents": latents}
    np.testing.assert_array_equal(jaxdiff.load(tmp_path / "again")(PROMPTS, **ours), pipe(PROMPTS, **ours))


@pytest.mark.parametrize(("ours", "theirs"), CALLS)
def test_base(base, latents, ours, theirs, figures):
    reference, pipe = base
    got = pipe(PROMPTS, **{"steps": 4, "guidance": 5.0, "latents": latents} | ours)
    asked = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": nchw(latents), "output_type": "np"}
    expected = reference(PROMPTS, **asked | SIZE | theirs).images
    assert error(got, expected, figures, f"SDXL, {ours}") <= ROUNDED


# As small as the layout of single files allows, which has groups of 32 and heads of 64 channels; and as diffusers does,
# which looks for the tenth layer, tells text encoders by their widths and takes the projection for one of these.
FILE_UNET = {"block_out_channels": (64, 128, 128), "attention_head_dim": (1, 2, 2), "norm_num_groups": 32,
             "sample_size": 128}  # fmt: skip
FILE_TEXTS = (
    {"hidden_size": 64, "num_attention_heads": 1},
    {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 10, "projection_dim": 128},
)  # fmt: skip
FILE_VAE = {"block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 256}


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_a_single_file_is_read_by_diffusers_and_here(kind, tmp_path, latents, figures):
    whole = xl.base if kind == "base" else xl.refiner
    added = {"projection_class_embeddings_input_dim": 128 + 8 * (6 if kind == "base" else 5)}
    reference = whole(tmp_path, texts=FILE_TEXTS, vae=FILE_VAE, **FILE_UNET, **added)
    pipe = jaxdiff.load(tmp_path / "model")
    assert convert([tmp_path / "model", tmp_path / "one.safetensors"]) == 0
    again = type(reference).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "model"), local_files_only=True, add_watermarker=False
    )
    for name in pipe.model.family.FOLDERS.values():
        theirs, ours = getattr(reference, name).state_dict(), getattr(again, name).state_dict()
        assert set(theirs) == set(ours)
        assert [key for key in theirs if not torch.equal(theirs[key], ours[key])] == []
    said = json.loads(read_metadata(tmp_path / "one.safetensors").get("jaxdiff", "{}"))
    assert set(said) <= {"text_encoder", "text_encoder_2", "scheduler"}  # token ids, and how steps are spaced
    own = jaxdiff.load(tmp_path / "one.safetensors", tokenizer=tmp_path / "made_tokenizer")
    asked = {"steps": 3, "latents": latents}
    np.testing.assert_array_equal(own(PROMPTS, **asked), pipe(PROMPTS, **asked))
    assert convert([tmp_path / "one.safetensors", tmp_path / "back", "--tokenizer", tmp_path / "made_tokenizer"]) == 0
    assert_same_params(jaxdiff.load(tmp_path / "back").model.params, pipe.model.params)
    assert convert([tmp_path / "back", tmp_path / "two.safetensors"]) == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


XL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER = XL | {
    "block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280, "transformer_layers_per_block": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (6, 12, 24, 24), "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip


@pytest.mark.parametrize(("values", "total"), [(XL, 2_567_463_684), (REFINER, None)], ids=["base", "refiner"])
def test_denoisers_of_the_published_sizes_have_diffusers_names_and_shapes(values, total):
    with torch.device("meta"):
        theirs = {name: tuple(t.shape) for name, t in UNet2DConditionModel(**values).state_dict().items()}
    config = UNetConfig(**values)
    shapes = build.param_shapes(build.unet(config), config)
    ours = {
        torch_name(path): tuple(leaf.shape[axis] for axis in torch_axes(path, len(leaf.shape)))
        for path, leaf in leaves(shapes)
    }
    assert ours == theirs
    assert total in (None, sum(math.prod(shape) for shape in ours.values()))
