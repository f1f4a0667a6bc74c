"""Pictures with images beside their prompts are diffusers'."""

import shutil

import kinds
import numpy as np
import pytest
import torch
import xl
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
from pairs import TEXTS, nchw
from PIL import Image
from safetensors.torch import save_file
from test_image_encoders import SIZES
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import jaxdiff

PROMPTS = TEXTS[:2]
ENCODER = SIZES["quick_gelu"]
SIZE = {"width": 24, "height": 16}


def scaled(tensor, generator, times=1.0):
    return times * torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5


def tensors_of(unet, kind, seed):
    """An IP-Adapter's tensors by the names of the authors' files, written out by hand; diffusers' loader reads them."""
    generator = torch.Generator().manual_seed(seed)
    dim, clip = unet.config.cross_attention_dim, ENCODER["hidden_size"]
    if kind == "plain":
        net = ImageProjection(ENCODER["projection_dim"], dim, 4)
        names = {"image_embeds.": "proj."}
    elif kind == "full":
        net = IPAdapterFullImageProjection(clip, dim)
        names = {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2.", "norm.": "proj.3."}
    else:
        net = IPAdapterPlusImageProjection(clip, dim, hidden_dims=16, depth=4, heads=2, num_queries=5)
        names = {".ln0.": ".0.norm1.", ".ln1.": ".0.norm2.", ".attn.to_q.": ".0.to_q.", ".attn.to_out.0.": ".0.to_out.",
                 ".ff.0.": ".1.0.", ".ff.1.net.0.proj.": ".1.1.", ".ff.1.net.2.": ".1.3."}  # fmt: skip
    found = {}
    for name, tensor in net.state_dict().items():
        for theirs, original in names.items():
            name = name.replace(theirs, original)
        found[f"image_proj.{name}"] = tensor + (0.3 if tensor.ndim == 1 else 0.0) * torch.randn(
            tensor.shape, generator=generator
        )
    for name in [name for name in found if ".attn.to_k." in name]:
        both = torch.cat([found.pop(name), found.pop(name.replace("to_k", "to_v"))])
        found[name.replace(".attn.to_k.", ".0.to_kv.")] = both
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(layers):
        key = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        for which in "kv":
            value = scaled(torch.empty(key.shape[0], dim), generator, 2.0)
            found[f"ip_adapter.{2 * i + 1}.to_{which}_ip.weight"] = value
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write(folder, tensors, kind, suffix):
    path = folder / f"{kind}{suffix}"
    if suffix == ".bin":
        parts = {part: {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(part)}
                 for part in ("image_proj", "ip_adapter")}  # fmt: skip
        torch.save(parts, path)
    else:
        save_file(tensors, path)
    return path


def make_encoder(folder):
    torch.manual_seed(5)
    encoder = xl.spiced(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)), 5)
    encoder.save_pretrained(folder / "image_encoder")
    return encoder


def read_by_diffusers(pipe, paths):
    pipe.load_ip_adapter(str(paths[0].parent), subfolder="", weight_name=[path.name for path in paths],
                         image_encoder_folder=None)  # fmt: skip
    assert any(isinstance(one, IPAdapterAttnProcessor2_0) for one in pipe.unet.attn_processors.values())


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (30, 40 + i, 3)).astype(np.uint8) for i in range(3)]


@pytest.fixture
def parts(tmp_path):
    """The networks of Stable Diffusion 1, the image encoder and what makes images for it; the model is saved."""
    networks = kinds.parts(tmp_path, block_out_channels=(16, 32), layers_per_block=1)
    xl.saved(StableDiffusionPipeline(**networks, **kinds.SAFETY), tmp_path)
    size = ENCODER["image_size"]
    return networks | {
        "image_encoder": make_encoder(tmp_path),
        "feature_extractor": CLIPImageProcessor(size=size, crop_size=size),
        "safety_checker": None,
        "requires_safety_checker": False,
    }


def pil(image):
    return [pil(one) for one in image] if isinstance(image, list) else Image.fromarray(image)


def theirs(pipe, images, scale, latents=None, steps=4, guidance=5.0, **more):
    pipe.set_progress_bar_config(disable=True)
    pipe.set_ip_adapter_scale(scale)
    given = {} if latents is None else {"latents": nchw(latents), **SIZE}
    return pipe(PROMPTS, ip_adapter_image=pil(images), num_inference_steps=steps, guidance_scale=guidance,
                output_type="np", **given, **more).images  # fmt: skip


def compare(got, expected, plain, figures, name):
    error = xl.largest(got, expected)
    figures[f"IP-Adapter, {name}: largest difference of 255"] = error
    assert plain is None or np.abs(got.astype(int) - plain).max() > 3  # it does something
    assert error <= 0.51


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_pictures(parts, kind, suffix, latents, photos, tmp_path, figures):
    path = write(tmp_path, tensors_of(parts["unet"], kind, 8), kind, suffix)
    pipe = StableDiffusionPipeline(**parts)
    read_by_diffusers(pipe, [path])
    own = jaxdiff.load(tmp_path / "model", ip_adapters=[path])
    asked = {"steps": 4, "guidance": 5.0, "size": (24, 16), "latents": latents}
    plain = own(PROMPTS, **asked).astype(int)
    for scale in (1.0, 0.4) if suffix == ".bin" else (0.7,):
        got = own(PROMPTS, image_prompt=photos[0], image_prompt_scale=scale, **asked)
        expected = theirs(pipe, photos[0], scale, latents)
        compare(got, expected, plain, figures, f"{kind}{suffix}, scale {scale}")
    if suffix == ".bin":
        got = own(PROMPTS, image_prompt=tuple(photos), image_prompt_scale=0.8, **asked)
        compare(got, theirs(pipe, [photos], 0.8, latents), plain, figures, f"{kind}, three images")
        got = own(PROMPTS, image_prompt=photos[1], **asked | {"guidance": 1.0})
        compare(got, theirs(pipe, photos[1], 1.0, latents, guidance=1.0), None, figures, f"{kind}, no guidance")


def test_two_adapters(parts, latents, photos, tmp_path, figures):
    paths = [write(tmp_path, tensors_of(parts["unet"], kind, seed), kind, ".safetensors")
             for seed, kind in enumerate(("plain", "plus"))]  # fmt: skip
    pipe = StableDiffusionPipeline(**parts)
    read_by_diffusers(pipe, paths)
    own = jaxdiff.load(tmp_path / "model", ip_adapters=paths)
    asked = {"steps": 4, "guidance": 5.0, "size": (24, 16), "latents": latents}
    got = own(PROMPTS, image_prompt=tuple(photos[:2]), image_prompt_scale=(0.7, 0.4), **asked)
    compare(got, theirs(pipe, photos[:2], [0.7, 0.4], latents), own(PROMPTS, **asked), figures, "two at once")


def test_beside_a_control_network(parts, latents, photos, tmp_path, figures):
    path = write(tmp_path, tensors_of(parts["unet"], "plus", 8), "plus", ".safetensors")
    net = xl.spiced(ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)), 3)
    net.save_pretrained(tmp_path / "net")
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net)
    read_by_diffusers(pipe, [path])
    own = jaxdiff.load(tmp_path / "model", ip_adapters=[path], controls=[tmp_path / "net"])
    hint = np.random.default_rng(3).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    asked = {"steps": 4, "guidance": 5.0, "size": (24, 16), "latents": latents, "control_image": hint}
    got = own(PROMPTS, image_prompt=photos[0], image_prompt_scale=0.8, **asked)
    expected = theirs(pipe, photos[0], 0.8, latents, image=pil(hint))
    compare(got, expected, own(PROMPTS, **asked), figures, "with a ControlNet")


def test_an_image_that_is_drawn_over(parts, photos, tmp_path, monkeypatch, figures):
    path = write(tmp_path, tensors_of(parts["unet"], "plain", 8), "plain", ".safetensors")
    pipe = StableDiffusionImg2ImgPipeline(**parts)
    read_by_diffusers(pipe, [path])
    noise = np.random.default_rng(6).normal(size=(2, 8, 12, 4)).astype(np.float32)
    draws = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
    monkeypatch.setattr(draws, lambda *_, **__: nchw(noise))
    start = np.random.default_rng(5).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    own = jaxdiff.load(tmp_path / "model", ip_adapters=[path])
    asked = {"steps": 5, "guidance": 5.0, "image": start, "strength": 0.8, "latents": noise}
    got = own(PROMPTS, image_prompt=photos[0], **asked)
    expected = theirs(pipe, photos[0], 1.0, steps=5, image=[pil(start)] * 2, strength=0.8)
    compare(got, expected, own(PROMPTS, **asked), figures, "img2img")


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_stable_diffusion_xl(kind, latents, photos, tmp_path, figures):
    whole = xl.base(tmp_path)
    path = write(tmp_path, tensors_of(whole.unet, kind, 8), kind, ".safetensors")
    encoder = make_encoder(tmp_path)
    shutil.move(tmp_path / "image_encoder", tmp_path / "another")
    size = ENCODER["image_size"]
    pipe = StableDiffusionXLPipeline(
        **whole.components | {"image_encoder": encoder, "add_watermarker": False,
                              "feature_extractor": CLIPImageProcessor(size=size, crop_size=size)}
    )  # fmt: skip
    read_by_diffusers(pipe, [path])
    own = jaxdiff.load(tmp_path / "model", ip_adapters=[path], image_encoder=tmp_path / "another")
    asked = {"steps": 4, "guidance": 5.0, "size": (24, 16), "latents": latents}
    got = own(PROMPTS, image_prompt=photos[0], image_prompt_scale=0.6, **asked)
    compare(got, theirs(pipe, photos[0], 0.6, latents), own(PROMPTS, **asked), figures, f"XL, {kind}")
