"""Every network's output and parameter gradients are diffusers' and transformers', in float32."""

import gzip
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import get_activation
from pairs import MAX_TOKENS, SD1_UNET, TEXTS, nhwc, randomise, relative_error, torch_gradients
from transformers import CLIPTextConfig, CLIPTextModel

from jaxdiff import build
from jaxdiff.config import UNetConfig, from_dict
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.convert import from_torch
from jaxdiff.io.weights import check_params
from jaxdiff.nn.layers import ACTIVATIONS

TOLERANCE = 1e-4


def compare(figures, what, ours_fn, params, theirs, module, cotangent):
    """Output, and the gradient of <output, cotangent> with respect to every parameter."""

    @jax.jit
    def output_and_gradient(p, cotangent):
        out, pullback = jax.vjp(ours_fn, p)
        return out, pullback(cotangent)[0]

    out, gradient = output_and_gradient(params, jnp.asarray(cotangent))
    output_error = relative_error(out, theirs.detach())
    theirs.backward(cotangent)
    gradient_error = relative_error(gradient, torch_gradients(module))
    figures[f"{what}: output"], figures[f"{what}: gradients"] = output_error, gradient_error
    assert output_error < TOLERANCE
    assert gradient_error < TOLERANCE


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SMALL_UNET = SD1_UNET | {"layers_per_block": 1}
UNETS = {
    "an odd size": {"size": (9, 14)},
    "two numbers of layers and transformers": {
        "layers_per_block": (1, 2), "transformer_layers_per_block": (2, 1), "use_linear_projection": True,
    },
    "other sinusoids and norms, and remat": {
        "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3, "norm_num_groups": 4,
    },
    "mish, a centred input, embeddings that scale and shift, and a middle's divisor": {
        "act_fn": "mish", "center_input_sample": True, "resnet_time_scale_shift": "scale_shift",
        "mid_block_scale_factor": 1.5,
    },
    "nine channels in, one level": {
        "in_channels": 9, "block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}  # fmt: skip


def compare_unet(figures, what, module, params, ours, channels, context_dim, size=(16, 16)):
    x, context, t = random(2, channels, *size), random(2, 7, context_dim, seed=1), torch.tensor([3, 801])
    theirs = module(x, t, context).sample.permute(0, 2, 3, 1)
    cotangent = random(*theirs.shape, seed=2)

    def ours_fn(p):
        return ours.apply({"params": p}, nhwc(x), jnp.array([3.0, 801.0]), jnp.asarray(context))

    compare(figures, what, ours_fn, params, theirs, module, cotangent)


def test_unet(pair, figures, request):
    config, params = pair.network("unet")
    what = f"UNet {request.node.callspec.id}"
    compare_unet(figures, what, pair.torch.unet, params, build.unet(config), 4, config.cross_attention_dim)


@pytest.mark.parametrize("what", UNETS)
def test_unets_of_every_make(what, figures):
    options = SMALL_UNET | UNETS[what]
    size = options.pop("size", (16, 16))
    torch.manual_seed(0)
    module = randomise(UNet2DConditionModel(**options), 1)
    config = from_dict(UNetConfig, options)
    params = from_torch((name, np.asarray(tensor)) for name, tensor in module.state_dict().items())
    ours = build.unet(config, remat="blocks" if "remat" in what else "none")
    check_params(params, build.param_shapes(ours, config), what)
    compare_unet(figures, f"UNet, {what}", module, params, ours, config.in_channels, config.cross_attention_dim, size)


def compare_vae(figures, what, vae, params, ours):
    image, z = random(2, 3, 24, 32), random(2, 4, 6, 8, seed=1)
    encoded = vae.encode(image).latent_dist.parameters.permute(0, 2, 3, 1)
    compare(figures, f"VAE encode {what}", lambda p: ours.apply({"params": p}, nhwc(image), method="encode"), params,
            encoded, vae, random(*encoded.shape, seed=2))  # fmt: skip
    decoded = vae.decode(z).sample.permute(0, 2, 3, 1)
    compare(figures, f"VAE decode {what}", lambda p: ours.apply({"params": p}, nhwc(z), method="decode"), params,
            decoded, vae, random(*decoded.shape, seed=3))  # fmt: skip


def test_vae(pair, figures, request):
    config, params = pair.network("vae")
    compare_vae(figures, request.node.callspec.id, pair.torch.vae, params, build.vae(config))


VAES = {
    "gelu, and no convolution after the encoder": {"act_fn": "gelu", "use_quant_conv": False},
    "no attention in the middle, and no convolution before the decoder": {
        "mid_block_add_attention": False,
        "use_post_quant_conv": False,
    },
}


@pytest.mark.parametrize("what", VAES)
def test_vaes_of_every_make(what, figures, sd1):
    options = {n: value for n, value in sd1.torch.vae.config.items() if n[0] != "_"} | VAES[what]
    torch.manual_seed(0)
    module = randomise(AutoencoderKL(**options), 1)
    config = replace(sd1.network("vae").config, **VAES[what])
    params = from_torch((name, np.asarray(tensor)) for name, tensor in module.state_dict().items())
    ours = build.vae(config)
    check_params(params, build.param_shapes(ours, config), what)
    compare_vae(figures, what, module, params, ours)


def test_text_encoder(pair, figures, request):
    (config, params), module = pair.network("text_encoder"), pair.torch.text_encoder
    ours = build.text_encoder(config)
    tokens = torch.randint(0, config.vocab_size, (3, MAX_TOKENS), generator=torch.Generator())
    theirs = module(tokens).last_hidden_state
    compare(figures, f"text encoder {request.node.callspec.id}",
            lambda p: ours.apply({"params": p}, jnp.asarray(tokens.numpy(), jnp.int32)), params, theirs, module,
            random(*theirs.shape))  # fmt: skip


def test_the_penultimate_layer_is_transformers_penultimate_layer_normed(sd1):
    (config, params), module = sd1.network("text_encoder"), sd1.torch.text_encoder
    tokens = torch.randint(0, config.vocab_size, (3, MAX_TOKENS), generator=torch.Generator())
    hidden = module(tokens, output_hidden_states=True).hidden_states[-2]
    theirs = dict(module.named_modules())["final_layer_norm"](hidden)
    ours = build.text_encoder(config, skip_layers=1)
    out = ours.apply({"params": params}, jnp.asarray(tokens.numpy(), jnp.int32))
    assert relative_error(out, theirs.detach()) < TOLERANCE


@pytest.mark.parametrize("name", ["silu", "swish", "mish", "gelu", "relu"])
def test_activations_are_torchs(name):
    x = torch.linspace(-30, 30, 1001)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x.numpy())), get_activation(name)(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_bfloat16_stays_near_float32(sd1, name, figures):
    inputs = {
        "unet": (nhwc(random(2, 4, 16, 16)), jnp.array([3.0, 801.0]), jnp.asarray(random(2, 7, 24, seed=1))),
        "vae": (nhwc(random(2, 3, 24, 32)),),
        "text_encoder": (jnp.arange(2 * MAX_TOKENS, dtype=jnp.int32).reshape(2, -1),),
    }[name]
    config, params = sd1.network(name)
    full = jax.jit(getattr(build, name)(config).apply)({"params": params}, *inputs)
    half = jax.jit(getattr(build, name)(config, dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    figures[f"{name} in bfloat16 against float32"] = error = relative_error(
        jax.tree.map(lambda x: x.astype(jnp.float32), half), full
    )
    assert error < 0.05


def test_tokens(pair):
    ours = Tokenizer.load(pair.path / "tokenizer", MAX_TOKENS)
    texts = [*TEXTS, "", "An UPPER-case caption, with commas & numbers 123!", "word " * 40, "naïve café 日本"]
    theirs = pair.torch.tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS)["input_ids"]
    np.testing.assert_array_equal(ours(texts), theirs)


def test_the_frozen_names_are_what_diffusers_gives_today():
    data = Path(__file__).parents[1] / "data"
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
           "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    models = {
        "sd1": ({"cross_attention_dim": 768}, {"hidden_size": 768, "intermediate_size": 3072,
                                               "num_attention_heads": 12, "num_hidden_layers": 12}),
        "sd2": ({"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
                {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}),
    }  # fmt: skip
    for model, (unet, text) in models.items():
        with torch.device("meta"):
            networks = {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae),
                        "text_encoder": CLIPTextModel(CLIPTextConfig(**text))}  # fmt: skip
        rows = {f"{network} {name} {'x'.join(map(str, tensor.shape))}"
                for network, module in networks.items() for name, tensor in module.state_dict().items()}  # fmt: skip
        assert rows == set(gzip.decompress((data / f"names_{model}.txt.gz").read_bytes()).decode().splitlines())
