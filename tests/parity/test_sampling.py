"""Every sampler takes the steps of its scheduler in diffusers, run live on the same model, levels and noise."""

import importlib
import math
import zlib
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from pairs import relative_error

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.prediction import EPSILON, FLOW, SAMPLE, V
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.loop import begin, sampling_loop
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, first_state, make_sigmas, starts_at_sigma
from jaxdiff.sampling.sigmas import ALIGNED
from jaxdiff.sampling.torch_noise import TorchGenerator, torch_latents

SHAPE = (4, 4, 3)
KINDS = (EPSILON, V, SAMPLE)
NOISES = 2100


class Corrected3M(diffusers.DPMSolverMultistepScheduler):
    """diffusers 0.42 has (1 - exp(-2h) - 2h) / (2h)^2 - 1/2 for the weight of D2; k-diffusion, where the sampler was
    published, has + 1/2, which goes to 0 with h. `test_the_sign_that_is_corrected...` tells which one is right."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None, **kwargs):
        x = super().multistep_dpm_solver_third_order_update(model_output_list, sample=sample, noise=noise)
        i = self.step_index
        lambdas = -self.sigmas[[i + 1, i, i - 1, i - 2]].log()
        h, h_0, h_1 = lambdas[:-1] - lambdas[1:]
        m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        bend = ((m0 - m1) * h / h_0 - (m1 - m2) * h / h_1) * h / (h_0 + h_1)
        return x + self._sigma_to_alpha_sigma_t(self.sigmas[i + 1])[0] * bend


SDE = {"algorithm_type": "sde-dpmsolver++"}
SPACED = ("karras", "exponential", "beta")
K = ("model", "trailing", *SPACED)
# sampler -> class, its options, predictions that it knows, schedules
CASES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, 3, ("model", "trailing")),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, 3, ("model", "trailing")),
    "euler": ("EulerDiscreteScheduler", {}, 3, K),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, 2, ("model", "trailing")),
    "heun": ("HeunDiscreteScheduler", {}, 3, K),
    "dpm2": ("KDPM2DiscreteScheduler", {}, 2, K),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, 2, K),
    "lms": ("LMSDiscreteScheduler", {}, 3, K),
    # diffusers takes the means of v for models that predict it, and for other spacings than leading begins its second
    # step at a level where it has not been.
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, 1, ("model",)),
    "deis": ("DEISMultistepScheduler", {}, 3, K),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, 3, K),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE, 3, K),
    "dpmpp_3m_sde": (Corrected3M, {**SDE, "solver_order": 3}, 3, K),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, 2, K),
    "unipc": ("UniPCMultistepScheduler", {}, 3, K),
    "lcm": ("LCMScheduler", {}, 3, ("model",)),
    "tcd": ("TCDScheduler", {}, 3, ("model",)),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}, "flow", ("model", *SPACED)),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}, "flow", ("model",)),
}
# With a thousand steps, lms in float32 is 1.6 % from itself in float64, here and in diffusers.
MOST = {"lcm": 50, "tcd": 50, "lms": 100} | dict.fromkeys(("ddim", "ddpm", "euler", "euler_ancestral", "heun"), 1000)
BETAS = (
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
)


def network(xp, x_in, sigma):
    """A model that is told the noise level: diffusers rounds the training step that it would tell on spaced grids."""
    t = sigma / (1 + sigma)
    return 0.8 * xp.tanh(x_in + t) + 0.3 * t


def settings(name):
    """Ten random ones; the first with two, three and the most steps. One step is ours (see `timesteps`)."""
    _, _, known, schedules = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for seed in range(10):
        flow = known == "flow"
        steps = {0: 2, 1: 3, 2: MOST.get(name, 999), 3: min(MOST.get(name, 999), 999)}.get(seed)
        steps = steps or int(rng.integers(2, 40))
        yield {
            "seed": seed,
            "steps": steps,
            "prediction_type": "flow_prediction" if flow else KINDS[rng.integers(known)].name,
            "schedule": str(rng.choice(schedules)),
            "eta": float(rng.uniform()) if name in ("ddim", "tcd") else 0.0,
            "set_alpha_to_one": bool(rng.integers(2)) or name not in ("ddim", "pndm"),
            **({"shift": float(rng.choice([1, 3]))} if flow else BETAS[rng.integers(2)]),
            **({} if flow else {"timestep_spacing": str(rng.choice(["leading", "trailing", "linspace"])),
                                "steps_offset": int(rng.integers(2)) if steps < 1000 else 0}),
            **({"timestep_spacing": "leading"} if name == "pndm" else {}),
        }  # fmt: skip


def make_theirs(name, config, schedule, steps):
    cls, options, _, _ = CASES[name]
    cls = getattr(diffusers, cls) if isinstance(cls, str) else cls
    if config.prediction_type == "flow_prediction":
        fields = {"shift": config.shift}
    else:
        fields = {key: getattr(config, key) for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
        fields |= {"timestep_spacing": config.timestep_spacing, "steps_offset": config.steps_offset}
        if name in ("ddim", "pndm"):
            fields["set_alpha_to_one"] = config.set_alpha_to_one
    if schedule in SPACED:
        fields[f"use_{schedule}_sigmas"] = True
    if schedule == "trailing":
        fields["timestep_spacing"] = "trailing"
    scheduler = cls(**fields, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def level(name, scheduler, t):
    """The sigma that the scheduler's coming call of the model is at."""
    if name.startswith("flow"):
        time = float(scheduler.sigmas[scheduler.step_index])
        return time / max(1 - time, 1e-6)
    if not hasattr(scheduler, "sigmas"):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        return math.sqrt((1 - alpha_bar) / alpha_bar)
    i = scheduler.step_index
    if name.startswith("dpm2") and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[i if name == "dpm2" else i - 1])
    if name == "dpmpp_sde" and not scheduler.state_in_first_order:
        return float(scheduler.mid_point_sigma)
    return float(scheduler.sigmas[i])


def draw_theirs(name, scheduler, x, noises, eta, monkeypatch):
    """diffusers' loop; x as its scheduler has it."""
    draws = iter(noises)
    module = importlib.import_module(type(scheduler).__mro__[name == "dpmpp_3m_sde"].__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(draws)))
    if name == "dpmpp_sde":
        scheduler.noise_sampler = brownian(draws)
    for t in scheduler.timesteps:
        if getattr(scheduler, "step_index", 0) is None:
            scheduler._init_step_index(t)
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(torch, x_in, torch.tensor(level(name, scheduler, t), dtype=torch.float32))
        x = scheduler.step(out, t, x, **({"eta": eta} if name in ("ddim", "tcd") else {})).prev_sample
    return x


def brownian(draws):
    """A Brownian path's increments, each over the root of its width: to a step's middle, then over the whole step."""
    first = []

    def increment(sigma, sigma_next):
        if not first:
            first.extend((next(draws), sigma - sigma_next))
            return torch.from_numpy(first[0])
        noise, width = first
        first.clear()
        share = width / (sigma - sigma_next)
        return share.sqrt() * torch.from_numpy(noise) + (1 - share).sqrt() * torch.from_numpy(next(draws))

    return increment


@pytest.fixture(scope="module")
def loops():
    """One compiled loop a sampler, whatever the settings."""

    def compiled(name):
        entry = SAMPLERS["euler" if name == "flow_euler" else name]
        flow = CASES[name][2] == "flow"
        kinds = (FLOW,) if flow else KINDS

        @jax.jit
        def draw(x_T, sigmas, noises, stop, eta, kind):
            def denoise_fn(x, sigma):
                out = network(jnp, kinds[0].network_input(x, sigma), sigma)
                return jnp.stack([prediction.x_0(out, x, sigma) for prediction in kinds])[kind]

            sampler = partial(entry.fn, **({"eta": eta} if "eta" in entry.options else {}))
            return sampling_loop(sampler, denoise_fn, noises.__getitem__, begin(x_T), sigmas, 0, stop).x

        return draw, kinds

    return {name: compiled(name) for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("flow")])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_starts_are_their_schedulers(name, spacing):
    if name == "dpmpp_sde":
        pytest.importorskip("torchsde", reason="diffusers' DPMSolverSDEScheduler needs it")
    for schedule in CASES[name][3] if name != "pndm" or spacing == "leading" else ():
        for steps in (2, 3, 20, MOST.get(name, 999)):
            config = SchedulerConfig(timestep_spacing=spacing, clip_sample=False, **BETAS[0])
            scheduler = make_theirs(name, config, schedule, steps)
            sigmas = make_sigmas(name, schedule, config, make_schedule(config), steps)
            ours = float(first_state(np.ones(1), sigmas, starts_at_sigma(name, schedule, config))[0])
            if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
                ours *= math.sqrt(1 + float(sigmas.sigmas[0]) ** 2)
            theirs = float(getattr(scheduler, "init_noise_sigma", 1.0))
            assert ours == pytest.approx(theirs, rel=1e-5), (schedule, steps)


@pytest.mark.parametrize("name", CASES)
def test_ten_random_settings(name, loops, monkeypatch, figures):
    if name == "dpmpp_sde":
        pytest.importorskip("torchsde", reason="diffusers' DPMSolverSDEScheduler needs it")
    draw, kinds = loops[name]
    worst = 0.0
    for setting in settings(name):
        fields = dict(setting)
        seed, steps, schedule, eta = (fields.pop(key) for key in ("seed", "steps", "schedule", "eta"))
        config, rng = SchedulerConfig(**fields, clip_sample=False), np.random.default_rng(seed)
        sigmas = make_sigmas(
            "euler" if name == "flow_euler" else name, schedule, config, make_schedule(config), steps, eta
        )
        n = count_steps(sigmas)
        x_T, noises = rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(NOISES, *SHAPE)).astype(np.float32)
        scheduler = make_theirs(name, config, schedule, steps)
        # k-diffusion's schedulers keep x = x_0 + sigma eps, all others unit variance or the flow's line.
        first, last = float(sigmas.sigmas[0]), float(sigmas.sigmas_next[n - 1])
        scale = {True: lambda s: math.sqrt(1 + s**2), False: lambda s: 1.0}[hasattr(scheduler, "is_scale_input_called")
                 or name in ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")]  # fmt: skip
        if name.startswith("flow"):
            scale = lambda s: math.sqrt(1 + s**2) / (1 + s)  # noqa: E731
        start = torch.from_numpy(x_T * np.float32(scale(first)))
        expected = draw_theirs(name, scheduler, start, noises, eta, monkeypatch).numpy() / scale(last)
        kind_index = [kind.name for kind in kinds].index(config.prediction_type)
        got = draw(x_T, sigmas, noises, n, np.float32(eta), kind_index)
        error = relative_error(got, expected)
        # A thousand steps of float32; and diffusers' heun is up to 4e-4 from Heun's method in float64, ours 1e-6.
        assert error < (5e-4 if name == "heun" else 2e-4 if steps >= 999 else 1e-4), setting
        worst = max(worst, error)
    figures[f"sampler {name}: largest relative error of ten"] = worst
    assert draw._cache_size() == 1


def test_the_sign_that_is_corrected_makes_diffusers_third_order_sde_second_order(monkeypatch):
    sigmas = {n: np.exp(np.linspace(np.log(10), np.log(0.5), n + 1)).astype(np.float32) for n in (80, 160)}

    def end(cls, n):
        scheduler = cls(**SDE, solver_order=3, lower_order_final=False, prediction_type="sample")
        scheduler.set_timesteps(n)
        scheduler.sigmas = torch.from_numpy(sigmas[n])
        module = importlib.import_module(diffusers.DPMSolverMultistepScheduler.__module__)
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.zeros(shape))
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
        for i, t in enumerate(scheduler.timesteps[:-1]):
            sigma = float(scheduler.sigmas[i])
            full = x.double() * math.sqrt(1 + sigma**2)
            x_0 = torch.tanh(full / (0.3 + sigma**2))
            x = scheduler.step(x_0, t, x.double()).prev_sample
        return x * math.sqrt(1 + float(sigmas[n][-2]) ** 2), float(sigmas[n][-2])

    orders = []
    for cls in (diffusers.DPMSolverMultistepScheduler, Corrected3M):
        errors = []
        for n in (80, 160):
            got, sigma = end(cls, n)
            errors.append(float((got - reference(sigma)).abs().max()))
        orders.append(math.log2(errors[0] / errors[1]))
    assert orders[0] < 1.4
    assert orders[1] > 1.7


def reference(sigma_end):
    """The reverse SDE without its noise, dx/dlog sigma = 2 (x - D), by Runge and Kutta."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2) * math.sqrt(101)
    logs = np.linspace(math.log(10), math.log(sigma_end), 2001)
    h = logs[1] - logs[0]

    def slope(x, log_sigma):
        return 2 * (x - torch.tanh(x / (0.3 + math.exp(2 * log_sigma))))

    for log_sigma in logs[:-1]:
        k1 = slope(x, log_sigma)
        k2 = slope(x + h / 2 * k1, log_sigma + h / 2)
        k3 = slope(x + h / 2 * k2, log_sigma + h / 2)
        k4 = slope(x + h * k3, log_sigma + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_aligned_steps_are_diffusers():
    assert list(ALIGNED[:-1]) == AysSchedules["StableDiffusionSigmas"][:-1]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**40 + 3])
def test_random_numbers_are_torchs(seed, figures):
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    error = 0.0
    for shape in [(4,), (3,), (16,), (7,), (15,), (1,), (17,), (31,), (4, 8, 8), (1,), (4, 3, 5, 7), (1000,), (), (2,)]:
        expected, got = torch.randn(shape, generator=theirs).numpy(), ours.randn(shape)
        assert got.shape == expected.shape
        error = max(error, float(np.abs(got - expected).max()))
    figures[f"torch's normal numbers, seed {seed}: largest difference"] = error
    assert error < 1e-6


def test_latents_are_those_of_a_pipelines_generator():
    generator = torch.Generator().manual_seed(5)
    expected = [torch.randn((1, 4, 8, 6), generator=generator)[0].permute(1, 2, 0) for _ in range(3)]
    np.testing.assert_allclose(torch_latents(5, (8, 6, 4), 3), torch.stack(expected), atol=1e-6)
