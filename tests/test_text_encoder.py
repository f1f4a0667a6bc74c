"""The text encoder as a family calls it."""

from dataclasses import replace

import numpy as np
import tiny

from jaxdiff.families import StableDiffusion
from jaxdiff.generation.conditioning import one_chunk


def test_to_skip_layers_is_to_have_a_text_encoder_without_them(model):
    networks = model.modules()
    shorter = StableDiffusion.of(model.configs | {"text_encoder": replace(tiny.TEXT_ENCODER, num_hidden_layers=1)})
    arguments = (model.params["text_encoder"],), (one_chunk(["a dog", "a red apple"], model.tokenizer),)
    skipped = networks.encode_prompts(*arguments, clip_skip=1).context
    np.testing.assert_array_equal(skipped, shorter.encode_prompts(*arguments).context)
    assert np.abs(skipped - networks.encode_prompts(*arguments).context).max() > 0.01
