"""The UNet's shortcuts: keys and values made once of a prompt, and deep features of another step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdiff import build
from jaxdiff.models.unet import prompt_keys
from jaxdiff.nn.blocks import ResnetBlock


@pytest.fixture(scope="module")
def unet(model):
    """(apply, params, x, t, context) of a random UNet."""
    rng = np.random.default_rng(1)
    x, context = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 8, 8, 4), (2, 12, 16)))
    apply = jax.jit(build.unet(tiny.UNET).apply, static_argnames="only_deep")
    return apply, jax.tree.map(jnp.asarray, model.params["denoiser"]), x, jnp.full(2, 500.0), context


def test_keys_and_values_made_once_of_the_prompt_give_what_the_prompt_gives(unet):
    apply, params, x, t, context = unet
    kept = prompt_keys(params, context, jnp.float32)
    assert len(jax.tree.leaves(kept)) == 2 * 4, "one transformer down, one in the middle and two up"
    out = apply({"params": params}, x, t, context)
    np.testing.assert_allclose(apply({"params": params, "prompt": kept}, x, t, 0 * context), out, atol=1e-6)


def test_deep_features_of_the_same_input_give_the_same_output(unet):
    apply, params, x, t, context = unet
    deep = apply({"params": params}, x, t, context, only_deep=True)
    out = apply({"params": params}, x, t, context)
    np.testing.assert_allclose(apply({"params": params}, x, t, context, deep), out, atol=1e-6)
    assert np.abs(apply({"params": params}, x, t, context, 0 * deep) - out).max() > 0.1


@pytest.mark.parametrize("scale_shift", [False, True])
def test_norms_and_activations_keep_nothing_but_their_input_for_the_backward_pass(scale_shift):
    """It is the block's, those of the convolutions and that of the second norm; with `scale_shift` also that of the
    scaling, and that of the activation."""
    block = ResnetBlock(64, 32, 1e-5, scale_shift=scale_shift)
    x, emb = jnp.ones((2, 16, 16, 64)), jnp.ones((2, 32))
    params = block.init(jax.random.key(0), x, emb)
    _, pull = jax.vjp(lambda params, x: block.apply(params, x, emb), params, x)
    kept = {id(leaf) for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape}
    assert len(kept) == (6 if scale_shift else 4)
