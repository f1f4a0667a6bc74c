"""From a picture to its noise and back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.ddim import ddim
from jaxdiff.sampling.inversion import backwards, ddim_inversion, edict, edict_inversion
from jaxdiff.sampling.loop import begin, no_noise, sampling_loop
from jaxdiff.sampling.sigmas import MODEL

CONFIG = SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False)
X_0 = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 3)), jnp.float32)


def crooked(x, sigma):
    """A model that is no model of anything."""
    return 0.9 * jnp.sin(x / jnp.sqrt(1 + sigma**2)) + 0.1 * jnp.roll(x, 1, axis=0) / (1 + sigma)


def there_and_back(up, down, steps, denoise_fn=crooked, x_0=X_0):
    sigmas = MODEL(CONFIG, make_schedule(CONFIG), steps)
    noise = sampling_loop(up, denoise_fn, no_noise, begin(x_0), backwards(sigmas, steps), 0, steps)
    state = noise._replace(taken=jnp.zeros((), jnp.int32))
    return noise, sampling_loop(down, denoise_fn, no_noise, state, sigmas, 0, steps)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_edict_is_undone_exactly_whatever_the_model(steps):
    _, back = jax.jit(lambda: there_and_back(edict_inversion, edict, steps))()
    assert np.linalg.norm(back.x - X_0) / np.linalg.norm(X_0) < 3e-5


def test_edict_can_be_gone_up_again_and_ends_at_the_same_pair():
    steps, sigmas = 9, MODEL(CONFIG, make_schedule(CONFIG), 9)
    down = sampling_loop(edict, crooked, no_noise, begin(X_0), sigmas, 0, steps)
    state = down._replace(taken=jnp.ones((), jnp.int32))  # it goes on with its own second latent
    up = sampling_loop(edict_inversion, crooked, no_noise, state, backwards(sigmas, steps), 0, steps)
    np.testing.assert_allclose(up.x, X_0, atol=1e-4)
    np.testing.assert_allclose(up.history[0], X_0, atol=1e-4)


def gaussian(x, sigma):
    """The model of data that are N(0, 1/4)."""
    return 0.25 / (0.25 + sigma**2) * x


def test_ddim_inversion_errs_half_as_much_with_twice_the_steps():
    errors = []
    for steps in (25, 50, 100, 200):
        _, back = there_and_back(ddim_inversion, ddim, steps, gaussian)
        errors.append(float(np.linalg.norm(back.x - X_0)))
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(2, abs=0.2)


def test_the_noise_of_gaussian_data_is_the_data_stretched():
    """For data N(0, s^2), D(x, sigma) = s^2 x / (s^2 + sigma^2), and the way up keeps x / sqrt(s^2 + sigma^2)."""
    s, steps = 0.5, 400
    noise, _ = there_and_back(ddim_inversion, ddim, steps, gaussian)
    sigmas = MODEL(CONFIG, make_schedule(CONFIG), steps)
    low, high = sigmas.sigmas_next[steps - 1], sigmas.sigmas[0]
    expected = X_0 * jnp.sqrt(1 + low**2) * jnp.sqrt((s**2 + high**2) / (s**2 + low**2)) / jnp.sqrt(1 + high**2)
    assert np.linalg.norm(noise.x - expected) / np.linalg.norm(expected) < 0.03


def test_levels_reversed_twice_are_themselves():
    sigmas = MODEL(CONFIG, make_schedule(CONFIG), 20)
    for there, back in zip(sigmas, backwards(backwards(sigmas, 20), 20), strict=True):
        np.testing.assert_array_equal(there, back)
