"""The toy of diffusers' scheduler tests, walked by our samplers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.denoiser import make_denoiser, sigma_to_t, to_x_0
from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, make_grid
from jaxdiff.sampling.torch_noise import TorchGenerator
from jaxdiff.sampling.walk import begin


def toy_network(x_in, t):
    """The model of diffusers' scheduler tests."""
    return x_in * t / (t + 1)


# diffusers' toy batch: 0/768, 1/768, ... over 4 pictures of 3 channels, its batch axis running fastest.
TOY = (np.arange(768, dtype=np.float32) / 768).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0)


def toy_schedule(config):
    """In single precision, as torch has it: the sums of some toys have lost more of it than they are told to."""
    betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=np.float32)
    if config.beta_schedule == "scaled_linear":
        ends = np.sqrt([config.beta_start, config.beta_end])
        betas = np.linspace(*ends, config.num_train_timesteps, dtype=np.float32) ** 2
    return Schedule(np.cumprod(1 - betas, dtype=np.float32).astype(np.float64))


def toy_noise(count):
    """What its loop draws from torch's generator with seed 0."""
    generator = TorchGenerator(0)
    return np.stack([generator.randn((4, 3, 8, 8)).transpose(0, 2, 3, 1) for _ in range(count)])


def walk_toy(sampler, config, steps, grid=None, eta=0.0):
    """From the toy batch at unit variance to the end, as diffusers' loop."""
    schedule = toy_schedule(config)
    grid = make_grid(sampler, "model", config, schedule, steps, eta) if grid is None else grid
    denoise_fn = make_denoiser(toy_network, schedule, config.prediction_type)
    noise, n, entry = toy_noise(steps), count_steps(grid), SAMPLERS[sampler]
    options = {"clip": 1.0} if "clip" in entry.options and config.clip_sample else {}
    walk = jax.jit(lambda x, noise: entry.fn(denoise_fn, begin(x), grid, noise.__getitem__, start=0, stop=n, **options))
    return walk(TOY, noise).x


def walk_scaled_toy(sampler, config, steps, spacing="model"):
    """The loop of diffusers' tests of k-diffusion's samplers: it forgets x, and steps from the network's input instead.

    So each step begins from x / sqrt(1 + sigma^2) in place of x, which the network then takes as it is; in the second
    half of a step, it is input and model's answer that make the slope.
    """
    schedule = toy_schedule(config)
    grid = make_grid(sampler, spacing, config, schedule, steps)
    top = grid.sigmas[0] if config.timestep_spacing != "leading" else np.sqrt(1 + grid.sigmas[0] ** 2)

    def walk_step(state, noise, i):
        sigma_i = jnp.asarray(grid.sigmas)[i]

        def denoise_fn(x, sigma):
            x_in = x / jnp.where(sigma == sigma_i, 1, jnp.sqrt(1 + sigma**2))
            out = toy_network(x_in, sigma_to_t(sigma, schedule))
            return x - (x_in - to_x_0(out, x_in, sigma, config.prediction_type))

        state = state._replace(x=state.x / jnp.sqrt(1 + sigma_i**2))
        return SAMPLERS[sampler].fn(denoise_fn, state, grid, noise.__getitem__, start=i, stop=i + 1)

    walk_step = jax.jit(walk_step)
    state, noise = begin(jnp.asarray(TOY * top / np.sqrt(1 + grid.sigmas[0] ** 2))), toy_noise(steps)
    for i in range(steps):
        state = walk_step(state, noise, i)
    return state.x
