"""A tiny autoencoder encodes and decodes as diffusers' does, at its published size."""

import jax
import numpy as np
import torch
from diffusers import AutoencoderTiny
from pairs import nchw, nhwc, randomise

from jaxdiff import build
from jaxdiff.io.preview import read_tiny_vae
from jaxdiff.io.weights import check_params


def test_images_and_latents(tmp_path, figures):
    torch.manual_seed(0)
    net = randomise(AutoencoderTiny(), 1)
    net.save_pretrained(tmp_path)
    _, config, params = read_tiny_vae(tmp_path)
    module = build.tiny_vae(config)
    params = check_params(params, build.param_shapes(module, config), tmp_path)
    rng = np.random.default_rng(0)
    z = 2 * rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
    image = rng.uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)
    ours = {"decode": z, "encode": image}
    for method, given in ours.items():
        with torch.no_grad():
            theirs = net.decode(nchw(given)).sample if method == "decode" else net.encode(nchw(given)).latents
        got = jax.jit(lambda p, x, m=method: module.apply({"params": p}, x, method=m))(params, given)
        error = np.abs(np.asarray(got) - np.asarray(nhwc(theirs))).max() / np.abs(theirs.numpy()).max()
        figures[f"{method}: largest error of the largest value"] = error
        assert error < 1e-5
