"""The autoencoder decodes a large batch in slices."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import build
from jaxdiff.config import VAEConfig
from jaxdiff.nn.slices import in_slices
from jaxdiff.tools.bench.models import random_params

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}


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
