"""The toy of diffusers' scheduler tests, drawn by our samplers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.denoiser import make_denoiser, sigma_to_t
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.sampling.loop import begin, sampling_loop
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, make_sigmas
from jaxdiff.sampling.torch_noise import TorchGenerator


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
    return NoiseSchedule(np.cumprod(1 - betas, dtype=np.float32).astype(np.float64))


def toy_noise(count):
    """What its loop draws from torch's generator with seed 0."""
    generator = TorchGenerator(0)
    return np.stack([generator.randn((4, 3, 8, 8)).transpose(0, 2, 3, 1) for _ in range(count)])


def draw_toy(sampler, config, steps, sigmas=None, eta=0.0):
    """From the toy batch at unit variance to the end, as diffusers' loop."""
    schedule = toy_schedule(config)
    sigmas = make_sigmas(sampler, "model", config, schedule, steps, eta) if sigmas is None else sigmas
    denoise_fn = make_denoiser(toy_network, schedule, PREDICTIONS[config.prediction_type])
    noise, n, entry = toy_noise(steps), count_steps(sigmas), SAMPLERS[sampler]
    options = {"clip": 1.0} if "clip" in entry.options and config.clip_sample else {}
    sampler_fn = partial(entry.fn, **options)
    draw = jax.jit(lambda x, noise: sampling_loop(sampler_fn, denoise_fn, noise.__getitem__, begin(x), sigmas, 0, n).x)
    return draw(TOY, noise)


def draw_scaled_toy(sampler, config, steps, spacing="model"):
    """The loop of diffusers' tests of k-diffusion's samplers: it forgets x, and steps from the network's input instead.

    So each step begins from x / sqrt(1 + sigma^2) in place of x, which the network then takes as it is; in the second
    half of a step, it is input and model's answer that make the slope.
    """
    schedule, prediction = toy_schedule(config), PREDICTIONS[config.prediction_type]
    sigmas = make_sigmas(sampler, spacing, config, schedule, steps)
    first = sigmas.sigmas[0]
    top = first if config.timestep_spacing != "leading" else np.sqrt(1 + first**2)

    def take_step(state, noise, i):
        sigma_i = jnp.asarray(sigmas.sigmas)[i]

        def denoise_fn(x, sigma):
            x_in = x / jnp.where(sigma == sigma_i, 1, jnp.sqrt(1 + sigma**2))
            out = toy_network(x_in, sigma_to_t(sigma, schedule))
            return x - (x_in - prediction.x_0(out, x_in, sigma))

        state = state._replace(x=state.x / jnp.sqrt(1 + sigma_i**2))
        return sampling_loop(SAMPLERS[sampler].fn, denoise_fn, noise.__getitem__, state, sigmas, i, i + 1)

    take_step = jax.jit(take_step)
    state, noise = begin(jnp.asarray(TOY * top / np.sqrt(1 + first**2))), toy_noise(steps)
    for i in range(steps):
        state = take_step(state, noise, i)
    return state.x
