"""Pictures that control images steer are diffusers'."""

import inspect
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import xl
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from pairs import (
    FILE_SD1_TEXT,
    FILE_SD1_UNET,
    FILE_SD2_TEXT,
    FILE_SD2_UNET,
    FILE_VAE,
    TEXTS,
    make_pair,
    nchw,
    randomise,
)
from PIL import Image
from safetensors.torch import save_file
from xl import without_noise

import jaxdiff
from jaxdiff.io.control import read_control
from jaxdiff.io.convert import leaves
from jaxdiff.model import read_model

TEXTS = TEXTS[:2]
SIZE = 24, 16


def spiced(module, seed):
    """What begins as zeros, moved away from there: it would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return randomise(module, seed)


def make_net(pair, seed, **config):
    net = ControlNetModel.from_unet(pair.torch.unet, conditioning_embedding_out_channels=(8, 16))
    net.register_to_config(**config)
    return spiced(net, seed)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def controlled(request, tmp_path_factory):
    """A pair, and three networks for it with their folders; the third one takes means over the image."""
    pair = request.getfixturevalue(request.param)
    nets = [make_net(pair, 1), make_net(pair, 2, controlnet_conditioning_channel_order="bgr"),
            make_net(pair, 3, global_pool_conditions=True)]  # fmt: skip
    folders = []
    for i, net in enumerate(nets):
        net.save_pretrained(folder := tmp_path_factory.mktemp(f"{request.param}-{i}"))
        folders.append(folder)
    return pair, nets, folders


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    """Two control images, of another size than the result."""
    return [np.random.default_rng(i).integers(0, 256, (20 + 4 * i, 28, 3)).astype(np.uint8) for i in range(2)]


def theirs(pair, nets, latents, images, **more):
    pipe = StableDiffusionControlNetPipeline(**pair.torch.components, controlnet=nets if len(nets) > 1 else nets[0])
    return painted(pipe, images, latents=nchw(latents), **more)


def painted(pipe, images, name="image", guidance_scale=5.0, **more):
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(image) for image in images]
    given = {name: images if len(images) > 1 else images[0], "width": SIZE[0], "height": SIZE[1]} | more
    return 255 * pipe(TEXTS, num_inference_steps=4, guidance_scale=guidance_scale, output_type="np", **given).images


def ours(pair, folders, latents, images, **more):
    pipe = jaxdiff.Pipeline(pair.ours.with_controls(folders))
    more = {"guidance": 5.0, "size": SIZE, "latents": latents} | more
    return pipe(TEXTS, steps=4, control_image=tuple(images), **more).astype(float)


# What is asked of diffusers, and of us.
ASKED = {
    "plain": ({}, {}),
    "scale": ({"controlnet_conditioning_scale": 0.4}, {"control_scale": 0.4}),
    "start and end": ({"control_guidance_start": 0.25, "control_guidance_end": 0.75},
                      {"control_start": 0.25, "control_end": 0.75}),
    "an interval without a step": ({"control_guidance_start": 0.3, "control_guidance_end": 0.4},
                                   {"control_start": 0.3, "control_end": 0.4}),
    "guess": ({"guess_mode": True}, {"control_guess": True}),
    "without guidance": ({"guidance_scale": 1.0}, {"guidance": 1.0}),
}  # fmt: skip


def compare(got, expected, plain, figures, name):
    figures[f"{name}: largest difference of 255"] = np.abs(got - expected).max()
    assert plain is None or np.abs(expected - plain).max() > 5  # it does something
    assert np.abs(got - expected).max() <= 0.51


@pytest.fixture(scope="module")
def plain(controlled, latents):
    pair, _, _ = controlled
    return jaxdiff.Pipeline(pair.ours)(TEXTS, steps=4, guidance=5.0, latents=latents).astype(float)


@pytest.mark.parametrize("kind", ASKED)
def test_pictures(controlled, latents, images, plain, kind, figures, request):
    pair, nets, folders = controlled
    asked, ours_asked = ASKED[kind]
    expected = theirs(pair, nets[:1], latents, images[:1], **asked)
    got = ours(pair, folders[:1], latents, images[:1], **ours_asked)
    does_nothing = kind in ("an interval without a step", "without guidance")
    compare(got, expected, None if does_nothing else plain, figures, request.node.callspec.id)
    if kind == "an interval without a step":
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("guess", [False, True])
def test_two_at_once(controlled, latents, images, plain, guess, figures, request):
    """The second reads colours from blue to red."""
    pair, nets, folders = controlled
    expected = theirs(pair, nets[:2], latents, images, controlnet_conditioning_scale=[0.8, 0.5], guess_mode=guess,
                      control_guidance_start=[0.0, 0.25], control_guidance_end=[0.5, 1.0])  # fmt: skip
    got = ours(pair, folders[:2], latents, images, control_scale=(0.8, 0.5), control_start=(0.0, 0.25),
               control_end=(0.5, 1.0), control_guess=guess)  # fmt: skip
    compare(got, expected, plain, figures, request.node.callspec.id)


def test_means_over_the_image(controlled, latents, images, plain, figures, request):
    pair, nets, folders = controlled
    expected = theirs(pair, nets[2:], latents, images[:1])
    compare(ours(pair, folders[2:], latents, images[:1]), expected, plain, figures, request.node.callspec.id)


def test_another_sampler(controlled, latents, images, tmp_path, figures, request):
    pair, nets, folders = controlled
    scheduler = EulerDiscreteScheduler.from_config(pair.torch.scheduler.config)
    parts = pair.torch.components | {"scheduler": scheduler}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=nets[0])
    expected = painted(pipe, images[:1], latents=nchw(latents), control_guidance_end=0.5)
    own = jaxdiff.Pipeline(read_model(tmp_path).with_controls(folders[:1]))
    got = own(TEXTS, steps=4, control_image=images[0], guidance=5.0, size=SIZE, latents=latents, control_end=0.5)
    assert own.defaults["sampler"] == "euler"
    compare(got.astype(float), expected, None, figures, request.node.callspec.id)


def test_an_image_that_is_drawn_over(controlled, images, monkeypatch, figures, request):
    """The steps that count are those that are taken."""
    pair, nets, folders = controlled
    start = np.random.default_rng(5).integers(0, 256, (*SIZE[::-1], 3)).astype(np.uint8)
    noise = np.random.default_rng(6).normal(size=(2, 8, 12, 4)).astype(np.float32)
    parts = pair.torch.components | {"vae": without_noise(deepcopy(pair.torch.vae))}
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=nets[0])
    draws = "diffusers.pipelines.controlnet.pipeline_controlnet_img2img.randn_tensor"
    monkeypatch.setattr(draws, lambda *_, **__: nchw(noise))
    expected = painted(pipe, images[:1], "control_image", image=[Image.fromarray(start)] * 2, strength=0.75,
                       controlnet_conditioning_scale=1.0, control_guidance_start=0.3)  # fmt: skip
    got = ours(pair, folders[:1], noise, images[:1], image=start, strength=0.75, size=None, control_start=0.3)
    compare(got, expected, None, figures, request.node.callspec.id)


def xl_net(unet, seed, **others):
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return spiced(net, seed)


@pytest.mark.parametrize("guess", [False, True])
def test_stable_diffusion_xl(tmp_path, latents, images, guess, figures, request):
    whole = xl.base(tmp_path)
    nets = [xl_net(whole.unet, seed) for seed in (1, 2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    pipe = StableDiffusionXLControlNetPipeline(**whole.components, controlnet=nets, add_watermarker=False)
    expected = painted(pipe, images, latents=nchw(latents), controlnet_conditioning_scale=[0.7, 0.4], guess_mode=guess)
    model = read_model(tmp_path / "model")
    own = jaxdiff.Pipeline(model.with_controls([tmp_path / "0", tmp_path / "1"]))
    asked = {"steps": 4, "guidance": 5.0, "size": SIZE, "latents": latents}
    got = own(TEXTS, None, control_image=tuple(images), control_scale=(0.7, 0.4), control_guess=guess, **asked)
    plain = jaxdiff.Pipeline(model)(TEXTS, None, **asked)
    compare(got.astype(float), expected, plain.astype(float), figures, request.node.callspec.id)


def original(net):
    """A network's tensors by the authors' names, written out by hand."""
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "controlnet_mid_block": "middle_block_out.0",
             "controlnet_cond_embedding.conv_in": "input_hint_block.0",
             "controlnet_cond_embedding.conv_out": "input_hint_block.14",
             "mid_block.attentions.0": "middle_block.1"}  # fmt: skip
    names |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 + 2 * i}" for i in range(6)}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    i = 1
    for level, block in enumerate(net.down_blocks):
        for j in range(len(block.resnets)):
            resnets[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{i}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{i}.1"
            i += 1
        if block.downsamplers is not None:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
            i += 1
    names |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(i)}
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    names |= {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in resnets.items() for a, b in inside.items()}
    found = {}
    for name, tensor in net.state_dict().items():
        start = max((ours for ours in names if name.startswith(f"{ours}.")), key=len)
        found[names[start] + name.removeprefix(start)] = tensor.contiguous()
    assert len(found) == len(net.state_dict())
    return found


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def of_published_sizes(request, tmp_path_factory):
    """A network with the groups and heads of published ones, the four widths of their embedding, and its model."""
    unet, text = (FILE_SD1_UNET, FILE_SD1_TEXT) if request.param == "sd1" else (FILE_SD2_UNET, FILE_SD2_TEXT)
    vae = FILE_VAE | {"block_out_channels": (32,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
                      "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    pair = make_pair(tmp_path_factory.mktemp("published"), unet, text, {}, 30, vae)
    net = ControlNetModel.from_unet(pair.torch.unet, conditioning_embedding_out_channels=(4, 6, 8, 8))
    return pair, spiced(net, 4)


@pytest.mark.parametrize("kind", ["original", "without a prefix", "pickle", "diffusers", "diffusers, float16"])
def test_files(of_published_sizes, kind, tmp_path):
    """Of every layout the tensors are the folder's, to the bit, and diffusers reads them alike."""
    pair, net = of_published_sizes
    net.save_pretrained(tmp_path / "folder")
    whole = read_control(tmp_path / "folder")
    by_original = original(net)
    tensors = {
        "original": lambda: {f"control_model.{name}": tensor for name, tensor in by_original.items()},
        "without a prefix": lambda: by_original,
        "pickle": lambda: {"state_dict": {f"control_model.{name}": tensor for name, tensor in by_original.items()}},
        "diffusers": net.state_dict,
        "diffusers, float16": lambda: {name: tensor.half() for name, tensor in net.state_dict().items()},
    }[kind]()
    path = tmp_path / ("a.pth" if kind == "pickle" else "a.safetensors")
    torch.save(tensors, path) if kind == "pickle" else save_file(tensors, path)
    found = read_control(path)
    assert found.config == replace(whole.config, attention_head_dim=found.config.attention_head_dim)
    assert found.config.heads == whole.config.heads
    expected = dict(leaves(whole.params))
    assert dict(leaves(found.params)).keys() == expected.keys()
    for name, leaf in leaves(found.params):
        np.testing.assert_array_equal(leaf, expected[name].astype(leaf.dtype))
    pair.ours.with_controls([path])
    if kind == "original":
        theirs = ControlNetModel.from_single_file(path, config=str(tmp_path / "folder"), local_files_only=True)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, net.state_dict()[name])


def adapter(kind, channels, factor, seed):
    """A T2I-Adapter, whose features are of a size with the UNet's."""
    torch.manual_seed(seed)
    return randomise(T2IAdapter(3, list(channels), 2, factor, kind), seed)


def twice(images):
    """Each image for both prompts."""
    return [[Image.fromarray(image)] * 2 for image in images]


def with_adapters(cls, components, adapter):
    """A pipeline of the parts that it knows."""
    known = inspect.signature(cls.__init__).parameters
    return cls(adapter=adapter, **{name: part for name, part in components.items() if name in known})


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
def test_t2i_adapters(pair, kind, latents, images, tmp_path, figures, request):
    channels = pair.torch.unet.config.block_out_channels
    light = kind == "light_adapter"
    net = adapter(kind, channels[: len(channels) - light], 2, 5)
    net.save_pretrained(tmp_path)
    if light and channels[-1] != channels[-2]:
        with pytest.raises(ValueError, match="It is for another model"):
            ours(pair, [tmp_path], latents, images[:1])
        return
    pipe = with_adapters(StableDiffusionAdapterPipeline, pair.torch.components, net)
    expected = painted(pipe, images[:1], image=twice(images)[0], latents=nchw(latents), adapter_conditioning_scale=0.8)
    plain = ours(pair, [tmp_path], latents, images[:1], control_scale=0.0)
    got = ours(pair, [tmp_path], latents, images[:1], control_scale=0.8)
    compare(got, expected, plain, figures, request.node.callspec.id)


def test_two_t2i_adapters(pair, latents, images, tmp_path, figures, request):
    channels = pair.torch.unet.config.block_out_channels
    nets = [adapter("full_adapter", channels, 2, seed) for seed in (6, 7)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    pipe = with_adapters(StableDiffusionAdapterPipeline, pair.torch.components, nets)
    expected = painted(pipe, images, image=twice(images), latents=nchw(latents), adapter_conditioning_scale=[0.8, 0.3])
    got = ours(pair, [tmp_path / "0", tmp_path / "1"], latents, images, control_scale=(0.8, 0.3))
    compare(got, expected, None, figures, request.node.callspec.id)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_t2i_adapters_for_stable_diffusion_xl(tmp_path, latents, images, factor, figures, request):
    """Their fourth features are the middle's."""
    whole = xl.base(tmp_path)
    net = adapter("full_adapter_xl", (16, 32, 32, 32), 4, 8)
    net.save_pretrained(tmp_path / "net")
    pipe = with_adapters(StableDiffusionXLAdapterPipeline, whole.components, net)
    expected = painted(
        pipe, images[:1], image=twice(images)[0], latents=nchw(latents), adapter_conditioning_factor=factor
    )
    model = read_model(tmp_path / "model")
    asked = {"steps": 4, "guidance": 5.0, "size": SIZE, "latents": latents}
    own = jaxdiff.Pipeline(model.with_controls([tmp_path / "net"]))
    got = own(TEXTS, None, control_image=images[0], control_end=factor, **asked)
    plain = jaxdiff.Pipeline(model)(TEXTS, None, **asked)
    compare(got.astype(float), expected, plain.astype(float), figures, request.node.callspec.id)
