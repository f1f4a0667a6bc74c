"""The autoencoder decodes a large batch in slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import build
from jaxdiff.config import DataConfig, VAEConfig, VAETask
from jaxdiff.nn.slices import in_slices
from jaxdiff.tools.bench.models import random_params
from jaxdiff.training.tasks.vae import vae_inputs, vae_task

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}


def test_psnr_is_a_mean_over_images_and_the_same_in_micro_batches() -> None:
    task = VAETask(
        VAEConfig(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, latent_channels=1, **BLOCKS)
    )
    params = jax.tree.map(jnp.asarray, random_params(build.param_shapes(build.vae(task.vae), task.vae)))
    rng = np.random.default_rng(0)
    images = np.linspace(0.1, 0.9, 4, dtype=np.float32)[:, None, None, None] * rng.uniform(-1, 1, (4, 8, 8, 3))
    metrics = jax.jit(lambda batch: vae_task(task, {}).loss(params, {}, batch, jax.random.key(0), {})[1])

    def of(rows: slice) -> float:
        batch = {"image": jnp.asarray(images[rows], jnp.float32), "index": jnp.arange(4)[rows]}
        return float(metrics(batch)["psnr"])

    halves = of(slice(0, 2)), of(slice(2, 4))
    assert abs(halves[0] - halves[1]) > 0.1
    assert of(slice(0, 4)) == pytest.approx(np.mean(halves), rel=1e-5)


def test_an_autoencoder_without_quant_conv_trains_its_decoder_alone() -> None:
    config = VAEConfig(
        block_out_channels=(4,), norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False, **BLOCKS
    )
    task = VAETask(config, init="somewhere", train_encoder=False)
    inputs = vae_inputs(task, DataConfig(size=8, batch_size=2))
    assert (set(inputs.frozen), inputs.trained) == ({"encoder"}, ("decoder",))


def test_slices_are_the_images_of_the_whole_batch_and_take_less_memory() -> None:
    config = VAEConfig(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **BLOCKS)
    vae = build.vae(config)
    params = jax.tree.map(jnp.asarray, random_params(build.param_shapes(vae, config)))
    z = jax.random.normal(jax.random.key(1), (5, 16, 16, config.latent_channels))

    def decode(z):
        return vae.apply({"params": params}, z[None], method="decode")[0]

    def sliced(z):
        return in_slices(decode, z, 2 * 16 * 16)

    np.testing.assert_allclose(jax.jit(sliced)(z), jax.jit(jax.vmap(decode))(z), rtol=1e-4, atol=1e-5)

    def temporaries(f, n: int) -> int:
        shape = jax.ShapeDtypeStruct((n, *z.shape[1:]), jnp.float32)
        return jax.jit(f).lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(sliced, 16) < temporaries(jax.vmap(decode), 16) / 2
