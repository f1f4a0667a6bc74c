"""Guidance that keeps something between steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.guidance import Guidance, guided
from jaxdiff.diffusion.prediction import EPSILON
from jaxdiff.sampling.euler import euler, heun
from jaxdiff.sampling.loop import begin, no_noise, sampling_loop
from jaxdiff.sampling.sigmas import Sigmas

LEVELS = np.array([4.0, 2.0, 1.0, 0.5], np.float32)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_momentum_adds_up_the_directions_of_all_steps_as_a_geometric_series(sampler):
    x_u, x_c = jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))
    guidance = Guidance(3.0, apg_momentum=-0.5)
    denoise_fn = guided(lambda x, sigma: jnp.stack([x_u, x_c]), lambda sigma: jnp.ones((1, 1, 1, 1)), guidance, EPSILON)
    state = begin(x_c)._replace(memory=guidance.memory(x_c))
    for steps in range(1, 5):
        end = sampling_loop(sampler, denoise_fn, no_noise, state, Sigmas(LEVELS, np.append(LEVELS[1:], 0)), 0, steps)
        series = (1 - (-0.5) ** steps) / 1.5  # 1 + b + b^2 + ... with b = -1/2
        np.testing.assert_allclose(end.memory[0], series, rtol=1e-6)
        np.testing.assert_allclose(end.guess, 1 + (3 - 1) * series, rtol=1e-6)


def test_no_momentum_keeps_nothing():
    assert Guidance(3.0).memory(jnp.zeros((2, 2, 1))) == ()
