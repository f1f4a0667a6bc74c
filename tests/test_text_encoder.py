"""The text encoder as a family calls it."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import tiny

from jaxdiff.families import StableDiffusion


def test_to_skip_layers_is_to_have_a_text_encoder_without_them(model):
    networks = model.modules()
    shorter = StableDiffusion.of(model.configs | {"text_encoder": replace(tiny.TEXT_ENCODER, num_hidden_layers=1)})
    ids = jnp.asarray(model.tokenizer(["a dog", "a red apple"]))[:, None]
    arguments = model.params["text_encoder"], ids, jnp.ones(ids.shape), jnp.asarray(model.tokenizer([""])[0])
    skipped = networks.encode_prompts(*arguments, clip_skip=1).context
    np.testing.assert_array_equal(skipped, shorter.encode_prompts(*arguments).context)
    assert np.abs(skipped - networks.encode_prompts(*arguments).context).max() > 0.01
