"""The adversary of the first stage: losses with closed forms, a fair weight, and a step that trains both sides."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.linalg import expm
from scipy.special import ndtri

from jaxdiff import build
from jaxdiff.config import AdversaryConfig, DataConfig, LPIPSConfig, OptimConfig, VAETask
from jaxdiff.models.patchgan import PatchDiscriminator
from jaxdiff.runtime.mesh import make_mesh, path_name, tree_shardings
from jaxdiff.training.adversary import LOSSES, adaptive_weight, r1_penalty
from jaxdiff.training.feed import to_devices
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.state import apply, create_state, freeze, make_step
from jaxdiff.training.tasks.vae import ENCODER, sample_moments, vae_inputs, vae_task

KEY = jax.random.key(3)
B, SIDE = 8, 32
ADVERSARY = AdversaryConfig(weight=0.7, channels=4, layers=1, r1=0.3)
TASK = VAETask(tiny.VAE, l2_weight=0.5, kl_weight=1e-3, adversary=ADVERSARY)


# Losses ---------------------------------------------------------------------------------------------------------------


def dirac(point, loss, gamma):
    """The flow of the Dirac-GAN: data at 0, the generator's point theta, verdicts psi x (Mescheder et al. 2018, 2)."""
    theta, psi = point
    real = jnp.zeros((1, 1))

    def against(psi):
        judged = loss.discriminator(psi * real, psi * theta.reshape(1, 1))
        return judged + gamma / 2 * r1_penalty(lambda x: psi * x, real)[0]

    deceive = jax.grad(lambda theta: loss.generator(psi * theta.reshape(1, 1)))
    return -jnp.stack([deceive(theta), jax.grad(against)(psi)])


# The product of both sides' slopes at verdict 0: of softplus 1/2 each, of hinge 1 and, halved, 1/2.
@pytest.mark.parametrize(("name", "slopes"), [("softplus", 1 / 4), ("hinge", 1 / 2)])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 3.0])
def test_the_dirac_gan_has_its_eigenvalues_and_spirals_in_only_with_the_penalty(name, slopes, gamma):
    flow = jax.jit(partial(dirac, loss=LOSSES[name], gamma=gamma))
    jacobian = np.asarray(jax.jacfwd(flow)(jnp.zeros(2)), np.float64)
    root = np.sqrt(complex(gamma**2 / 4 - slopes))
    found = sorted(np.linalg.eigvals(jacobian), key=lambda z: (z.real, z.imag))
    np.testing.assert_allclose(found, sorted([-gamma / 2 - root, -gamma / 2 + root], key=lambda z: (z.real, z.imag)),
                               atol=1e-6)  # fmt: skip

    x, h = jnp.array([1e-2, 0.0]), 0.01
    for _ in range(300):  # the midpoint rule, for 3 units of time
        x += h * flow(x + h / 2 * flow(x))
    np.testing.assert_allclose(x, expm(3 * jacobian) @ [1e-2, 0.0], atol=2e-5)


def test_the_best_verdict_between_two_gaussians_is_the_logarithm_of_their_ratio():
    mean, std, n = 1.0, 0.6, 40_000
    quantiles = jnp.asarray(ndtri((np.arange(n) + 0.5) / n), jnp.float32)
    real, made = quantiles, mean + std * quantiles

    def verdicts(c, x):
        return c[0] + c[1] * x + c[2] * x**2

    def loss(c):
        return LOSSES["softplus"].discriminator(verdicts(c, real), verdicts(c, made))

    newton = jax.jit(lambda c: c - jnp.linalg.solve(jax.hessian(loss)(c), jax.grad(loss)(c)))
    c = jnp.zeros(3)
    for _ in range(12):
        c = newton(c)
    want = [mean**2 / (2 * std**2) + np.log(std), -mean / std**2, 1 / (2 * std**2) - 0.5]
    np.testing.assert_allclose(c, want, rtol=2e-3)


def test_the_penalty_is_the_squared_slope_for_one_patch_as_for_many():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(5, 6, 6, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 3, 3)), jnp.float32)
    whole = r1_penalty(lambda x: (x[:, :3, :3] * w[None]).sum((1, 2, 3)), image)
    patches = r1_penalty(lambda x: (x.reshape(5, 2, 3, 2, 3, 3) * w.reshape(1, 1, 3, 1, 3, 3)).sum((2, 4, 5)), image)
    for penalty, _ in (whole, patches):
        assert float(penalty) == pytest.approx(float(jnp.square(w).sum()), rel=1e-5)
    assert patches[1].shape == (5, 2, 2)


def test_a_verdict_depends_on_its_patch_and_on_no_other_image():
    net = PatchDiscriminator(channels=4, layers=2)
    image = jax.random.normal(KEY, (3, 64, 64, 3))
    params = net.init(KEY, image)["params"]
    verdicts = jax.jit(lambda x: apply(net, params, x))
    np.testing.assert_allclose(verdicts(image)[1:2], verdicts(image[1:2]), atol=1e-6)
    h = verdicts(image).shape[1]
    read = jax.grad(lambda x: verdicts(x)[0, h // 2, h // 2, 0])(image)
    rows, columns = (np.flatnonzero(np.abs(read[0]).max((axis, 2))) for axis in (1, 0))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (34, 34)
    assert not np.abs(read[1:]).any()


# The step -------------------------------------------------------------------------------------------------------------


def batch(step=0):
    rng = np.random.default_rng(step)
    smooth = np.repeat(np.repeat(rng.uniform(-1, 1, (B, SIDE // 4, SIDE // 4, 3)), 4, 1), 4, 2)
    return {"image": smooth.astype(np.float32), "index": np.arange(step * B, (step + 1) * B, dtype=np.int32)}


def networks(task, seed=0):
    """Random weights of all that the task reads."""
    inputs = vae_inputs(task, DataConfig(size=SIDE, batch_size=B))
    rng = np.random.default_rng(seed)
    weights = {**tiny.random_params("vae", task.vae, rng)}
    weights["discriminator"] = tiny.random_params("discriminator", task.adversary, rng)
    if task.lpips.weight:
        drawn = tiny.random_params("lpips", task.lpips, rng)
        weights["lpips"] = {name: np.abs(x) if name.startswith("weight") else x for name, x in drawn.items()}
    return inputs.split(weights)[:2]


@pytest.mark.parametrize("weight_of_lpips", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_each_side_has_the_gradient_of_its_own_loss_and_the_weight_is_that_of_two_whole_gradients(weight_of_lpips):
    task = replace(TASK, lpips=LPIPSConfig(weight_of_lpips))
    params, frozen = networks(task)
    one, updates = jax.tree.map(jnp.asarray, batch()), {"updates": jnp.int32(5)}
    module, judge = build.vae(task.vae), build.discriminator(ADVERSARY)

    def copy_of(params):
        moments = apply(module, params, one["image"], method="encode")
        return apply(module, params, sample_moments(moments, one["index"], KEY), method="decode"), moments

    def likeness(params):
        error = copy_of(params)[0] - one["image"]
        total = jnp.abs(error).mean() + 0.5 * jnp.square(error).mean()
        if weight_of_lpips:
            distance = apply(build.lpips(task.lpips), frozen["lpips"], one["image"], copy_of(params)[0])
            total += weight_of_lpips * distance.mean()
        return total

    def deception(params):
        return -apply(judge, params["discriminator"], copy_of(params)[0]).mean()

    def against(params):
        verdicts = partial(apply, judge, params["discriminator"])
        real, made = verdicts(one["image"]), verdicts(copy_of(params)[0])
        slope = jax.grad(lambda x: verdicts(x).sum())(one["image"])
        penalty = jnp.square(slope).sum((1, 2, 3)).mean() / real[0].size
        return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + made).mean()) / 2 + 0.15 * penalty

    def divergence(params):
        mean, log_variance = jnp.split(copy_of(params)[1], 2, axis=-1)
        return 1e-3 * 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1).mean()

    losses = likeness, deception, divergence, against
    parts = jax.jit(lambda params: [jax.grad(f)(params) for f in losses])(params)
    last = [np.asarray(part["decoder"]["conv_out"]["kernel"]) for part in parts[:2]]
    weight = np.linalg.norm(last[0]) / (np.linalg.norm(last[1]) + 1e-4)
    want = jax.tree.map(lambda a, b, c: a + 0.7 * weight * b + c, *parts[:3])
    want["discriminator"] = parts[3]["discriminator"]

    graded = jax.jit(jax.grad(lambda p: vae_task(task, frozen).loss(p, frozen, one, KEY, updates)[:2], has_aux=True))
    found, metrics = graded(params)
    assert float(metrics["adaptive_weight"]) == pytest.approx(float(weight), rel=1e-4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()) + 1e-7, err_msg=path_name(path))
    assert 0 <= float(metrics["told_real"]) <= 1


def test_sums_and_means_differ_by_the_latents_share_of_the_image():
    params, frozen = networks(replace(TASK, adversary=AdversaryConfig()))
    losses = {}
    for sums in (False, True):
        task = replace(TASK, adversary=AdversaryConfig(), kl_sums=sums)
        loss = jax.jit(lambda p, one, t=task: vae_task(t, {}).loss(p, frozen, one, KEY, {}))
        total, metrics, _ = loss(params, batch())
        losses[sums] = float(total) - 1e-3 * float(metrics["kl"]) * (4 / (4 * 3) if sums else 1)  # 2 x 2 pixels a value
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def build_run(mesh, task, **optim):
    config = OptimConfig(**{"lr": 1e-3, "warmup_steps": 0, "schedule": "constant", "eps": 1e-4} | optim)
    start, frozen = networks(task)
    made = freeze(vae_task(task, frozen, start), config.factors)
    tx = optimiser(config, learning_rate(config, 100), made.apart)
    state = create_state(made, tx, KEY, mesh)
    step_fn = make_step(made, tx, state)
    frozen = jax.device_put(made.frozen, tree_shardings(mesh, made.frozen))
    return state, lambda state, one: step_fn(state, frozen, to_devices(one, mesh), KEY)


def run(mesh, task, steps, **optim):
    """The states after each step, and its metrics."""
    state, step_fn = build_run(mesh, task, **optim)
    states, found = [], []
    for step in range(steps):
        state, metrics = step_fn(state, batch(step))
        states.append(jax.device_get(state))
        found.append(jax.device_get(metrics))
    return states, found


def alone():
    return make_mesh(devices=jax.devices()[:1])


@pytest.mark.slow
def test_eight_devices_take_the_steps_that_one_takes():
    task = replace(TASK, adversary=replace(ADVERSARY, start=1), init="somewhere", train_encoder=False)
    (*_, expected), told = run(alone(), task, 3)
    (*_, state), found = run(make_mesh(data=2, fsdp=2, tensor=2), task, 3)
    for a, b in zip(found, told, strict=True):
        assert {name: pytest.approx(float(value), rel=2e-4, abs=1e-5) for name, value in b.items()} == a
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_before_its_start_the_adversary_learns_alone_and_a_frozen_encoder_is_in_no_state():
    task = replace(TASK, adversary=replace(ADVERSARY, start=2), init="somewhere", train_encoder=False)
    first, _ = networks(task)
    (_, before, after), told = run(alone(), task, 3)
    (_, plain, later), _ = run(alone(), replace(task, adversary=AdversaryConfig()), 3)
    for a, b in zip(jax.tree.leaves(before.params["decoder"]), jax.tree.leaves(plain.params["decoder"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params["discriminator"], first["discriminator"])
    moved["conv_out"].pop("bias")  # which hinge pulls both ways, where no verdict is beyond 1
    assert all(jax.tree.leaves(moved))
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params["decoder"], later.params["decoder"])
    assert max(jax.tree.leaves(apart)) > 1e-4
    assert int(after.memory["updates"]) == 3
    assert not {*after.params, *after.average} & {*ENCODER}
    assert {"generator_loss", "discriminator_loss", "r1", "adaptive_weight", "told_real", "told_copy"} <= told[0].keys()
    assert (plain.memory, {*plain.params}) == ({}, {"decoder", "post_quant_conv"})  # as it was without adversaries


def test_the_adversarys_gradient_is_clipped_by_itself():
    grads = {"decoder": {"w": jnp.full(4, 3.0)}, "discriminator": {"w": jnp.full(4, 50.0)}}
    config = OptimConfig(name="sgd", lr=1.0, warmup_steps=0, schedule="constant", b1=0.0, weight_decay=0.0)
    tx = optimiser(config, learning_rate(config, 10), ("discriminator",))
    updates, _ = tx.update(grads, tx.init(grads), grads, norm=jnp.float32(123.0))
    for name in grads:
        np.testing.assert_allclose(updates[name]["w"], -0.5, rtol=1e-6)


def test_the_fair_weight_has_its_bounds():
    assert float(adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))) == pytest.approx(5 / 2.0001)
    assert float(adaptive_weight(jnp.array([5.0]), jnp.zeros(1))) == 1e4


def test_what_cannot_be_trained_is_refused():
    data = DataConfig(size=16, batch_size=2)
    with pytest.raises(ValueError, match="LPIPSConfig needs images of 31 pixels along each side, and the data's have"):
        vae_inputs(replace(TASK, lpips=LPIPSConfig(1.0)), data)
    with pytest.raises(ValueError, match="AdversaryConfig needs images of 24 pixels"):
        vae_inputs(replace(TASK, adversary=replace(ADVERSARY, layers=3)), data)
    with pytest.raises(ValueError, match=r"AdversaryConfig.r1 is -1.0; it must not be negative"):
        AdversaryConfig(r1=-1.0)
    with pytest.raises(ValueError, match="nothing would make copies like their images"):
        VAETask(l1_weight=0.0, l2_weight=0.0)
    made = vae_task(TASK, {})
    tx = optimiser(OptimConfig(), learning_rate(OptimConfig(), 9), made.apart)
    state = create_state(made, tx, KEY, alone(), abstract=True)
    with pytest.raises(ValueError, match="or weighs them by all"):
        make_step(made, tx, state, accumulate=2)
