"""The text-to-image objective as a whole, on the smallest UNet: its settings, bfloat16, and device meshes."""

from contextlib import closing
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from shell import ROOT
from tiny import TASK, XL_TASK

from jaxdiff.config import DataConfig, EMAConfig, OptimConfig, SchedulerConfig, VAEConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.record import Record
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.diffusion import timesteps, weights
from jaxdiff.diffusion.loss import diffusion_loss
from jaxdiff.diffusion.prediction import EPSILON, PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.model import read_model
from jaxdiff.runtime.mesh import make_mesh, path_name, tree_shardings
from jaxdiff.training.feed import to_devices
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.state import Task, create_state, make_step
from jaxdiff.training.tasks.diffusion import diffusion_inputs, diffusion_task, draw_fn, weight_fn

FLOW = SchedulerConfig(prediction_type="flow_prediction", clip_sample=False, shift=2.0)
# The gradient of a key's bias is zero but for rounding, which a small eps would blow up to whole steps.
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0, eps=1e-4)
B = 16
FROZEN = {"empty_tokens": jnp.zeros(6, jnp.int32)}


def batch(step: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "moments": rng.normal(size=(B, 4, 4, 8)).astype(np.float32),
        "tokens": rng.integers(0, 32, (B, 6)).astype(np.int32),
        "index": np.arange(step * B, (step + 1) * B),
    }


def xl_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = rng.integers(4, 100, (B, 6)).astype(np.float32)
    return batch() | {"tokens_2": rng.integers(0, 32, (B, 6)).astype(np.int32), "numbers": sizes}


ON_DEVICE = {name: jnp.asarray(rows, jnp.float32 if name == "moments" else jnp.int32) for name, rows in batch().items()}


def task_of(settings=None, dtype=jnp.float32):
    return diffusion_task(replace(TASK, **settings or {}), VAEConfig(), FROZEN, dtype=dtype)


def run(steps, settings=None, mesh=None, dtype=jnp.float32, accumulate=1, task=None, pictures=None):
    """The last state and the losses of some steps on ever the same pictures, with noise of their own."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    task, tx = task or task_of(settings, dtype), optimiser(OPTIM, learning_rate(OPTIM, 100))
    state = create_state(task, tx, jax.random.key(0), mesh, EMAConfig())
    step_fn = make_step(task, tx, state, EMAConfig(), accumulate)
    frozen = jax.device_put(task.frozen, tree_shardings(mesh, task.frozen))
    metrics = []
    for _ in range(steps):
        state, found = step_fn(state, frozen, to_devices(pictures or batch(), mesh), jax.random.key(1))
        metrics.append(float(found["loss"]))
    return state, np.array(metrics)


def jaxpr_of(task):
    params = jax.eval_shape(task.init, jax.random.key(0))

    def grads(params, frozen, batch, memory):
        return jax.grad(lambda p: task.loss(p, frozen, batch, jax.random.key(0), memory)[0])(params)

    return jax.make_jaxpr(grads)(params, task.frozen, ON_DEVICE, task.memory)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_in_bfloat16_products_are_bfloat16_and_norms_softmax_and_loss_are_not():
    dtypes = {}
    for eqn in equations(jaxpr_of(task_of(dtype=jnp.bfloat16)).jaxpr):
        dtypes.setdefault(eqn.primitive.name, set()).update(str(v.aval.dtype) for v in eqn.invars[:1])
    assert dtypes["conv_general_dilated"] == {"bfloat16"}
    assert "bfloat16" in dtypes["dot_general"]
    for name in ("reduce_max", "rsqrt", "integer_pow"):  # of softmax, of norms, and the loss's square
        assert dtypes[name] == {"float32"}, (name, dtypes[name])


@pytest.mark.slow
def test_every_gradient_of_the_embedded_model_in_bfloat16_is_that_of_float32_to_3_percent():
    """Sums over 16,384 pixels, and 1,400 tokens that are all the same. Weights are trained ones: random networks have
    gradients that are small differences. Less than 1e-4 of all is rounding, too: a key's bias changes nothing."""
    model, rng, b = read_model(), np.random.default_rng(0), 64
    unet, text = model.networks["denoiser"], model.networks["text_encoder"]
    task = replace(TASK, unet=unet.config, text_encoder=text.config, scheduler=model.scheduler)
    start = {"unet": unet.params, "text_encoder": text.params}
    frozen = {"empty_tokens": jnp.asarray(model.tokenizer([""])[0])}
    many = {
        "moments": jnp.asarray(rng.normal(size=(b, 16, 16, 8)), jnp.float32),
        "tokens": jnp.asarray(model.tokenizer(["a red apple, noto style, on a blue background"] * b)),
        "index": jnp.arange(b),
    }

    def found(dtype):
        loss_fn = diffusion_task(task, model.networks["vae"].config, frozen, dtype=dtype).loss
        loss = jax.jit(
            jax.value_and_grad(lambda p: loss_fn(p, frozen, many, jax.random.key(0), {})[0]),
            compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
        )  # which takes far longer to compile than to run
        value, grads = loss(jax.tree.map(jnp.float32, start))
        return float(value), {path_name(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}

    (value, full), (half_value, half) = found(jnp.float32), found(jnp.bfloat16)
    assert half_value == pytest.approx(value, rel=5e-3)
    size = np.sqrt(sum(np.square(g).sum() for g in full.values()))
    errors = {name: np.linalg.norm(half[name] - g) / np.linalg.norm(g) for name, g in full.items()
              if np.linalg.norm(g) > 1e-4 * size}  # fmt: skip
    assert len(errors) > 300
    assert max(errors.values()) < 0.03, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.slow
def test_training_in_bfloat16_with_float32_masters_follows_float32():
    (_, full), (state, half) = run(40), run(40, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {np.dtype(np.float32)}
    np.testing.assert_allclose(half, full, rtol=0.05)
    assert half[-8:].mean() < 0.9 * half[:8].mean()


@pytest.mark.slow
def test_flow_matching_takes_the_same_steps_on_eight_devices_in_micro_batches():
    settings = {"scheduler": FLOW, "timesteps": "logit_normal", "noise_offset": 0.1}
    _, losses = run(3, settings)
    _, found = run(3, settings, make_mesh(data=2, fsdp=2, tensor=2), accumulate=2)
    np.testing.assert_allclose(found, losses, rtol=2e-3)


@pytest.mark.slow
def test_stable_diffusion_xl_takes_the_same_steps_on_eight_devices_in_micro_batches():
    """Losses and every parameter, after three steps."""
    task = diffusion_task(replace(XL_TASK, caption_dropout=0.4), VAEConfig(), {})
    state, losses = run(3, task=task, pictures=xl_batch())
    other, found = run(3, mesh=make_mesh(data=2, fsdp=2, tensor=2), accumulate=2, task=task, pictures=xl_batch())
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(other.params),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(b, a, atol=2e-4, err_msg=path_name(path))


@cache
def compiled_loss(config):
    loss = diffusion_task(config, VAEConfig(), {}).loss
    return jax.jit(lambda params, frozen, pictures: loss(params, frozen, pictures, jax.random.key(2), {})[0])


def xl_loss(config, frozen, pictures, params):
    pictures = {name: jnp.asarray(rows) for name, rows in pictures.items()} | {"index": jnp.arange(B, dtype=jnp.int32)}
    return float(compiled_loss(config)(params, frozen, pictures))


@pytest.mark.slow
def test_a_dropped_caption_of_stable_diffusion_xl_is_zeros_and_the_sizes_stay():
    """Without captions all prompts are alike, and as good as features and a vector of zeros."""
    everything = replace(XL_TASK, caption_dropout=1.0)
    task = diffusion_task(everything, VAEConfig(), {})
    params = random_params_of(task)
    pictures = xl_batch()
    losses = {xl_loss(everything, {}, pictures, params)}
    pictures["tokens"], pictures["tokens_2"] = pictures["tokens"][::-1].copy(), pictures["tokens_2"][::-1].copy()
    losses.add(xl_loss(everything, {}, pictures, params))
    nothing = {"context": np.zeros((B, 6, 20), np.float16), "pooled": np.zeros((B, 10), np.float16)}
    cached = replace(XL_TASK, caption_dropout=0.0, train_text_encoder=False, latent_variants=1, text_variants=1)
    told = {name: rows for name, rows in pictures.items() if not name.startswith("tokens")}
    losses.add(xl_loss(cached, {}, nothing | told, {"unet": params["unet"]}))
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)
    losses = {max(losses)}
    pictures["numbers"] = pictures["numbers"][::-1].copy()
    losses.add(xl_loss(everything, {}, pictures, params))
    assert len(losses) == 2
    losses.add(xl_loss(replace(everything, zero_empty=False), FROZEN | {"empty_tokens_2": jnp.ones(6, jnp.int32)},
                       pictures, params))  # fmt: skip
    assert len(losses) == 3


def random_params_of(task):
    """Weights that are nowhere 0, so that everything that is read counts."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), jnp.float32), shapes)


@pytest.mark.slow
def test_importance_sampling_draws_the_same_levels_on_eight_devices_and_in_micro_batches():
    """With a network of 8 numbers, one for each level, which all want to be 0."""
    schedule, steps = make_schedule(replace(TASK.scheduler, num_train_timesteps=8)), 24

    def init(key):
        return {"scale": jnp.linspace(0.1, 3, 8)}

    def loss(params, frozen, batch, key, memory):
        def network_fn(x, t, context):
            return params["scale"][t.astype(int)][:, None, None, None] * x

        draw_fn = timesteps.importance(memory)
        index, context = batch["index"], jnp.zeros((len(batch["index"]), 1, 1))
        return diffusion_loss(network_fn, batch["x"], context, key, index, schedule=schedule,
                              prediction=PREDICTIONS["v_prediction"], draw_fn=draw_fn)  # fmt: skip

    task = Task(init, loss, memory=timesteps.history(8), remember=lambda past, seen: timesteps.remember(past, **seen))
    tx = optimiser(OPTIM, learning_rate(OPTIM, 100))
    found = []
    for n, accumulate in ((1, 1), (8, 2)):
        mesh = make_mesh(devices=jax.devices()[:n])
        state = create_state(task, tx, jax.random.key(0), mesh)
        step_fn = make_step(task, tx, state, accumulate=accumulate)
        for step in range(steps):
            pictures = {"x": batch(step)["moments"], "index": batch(step)["index"]}
            state, _ = step_fn(state, {}, to_devices(pictures, mesh), jax.random.key(1))
        found.append(jax.device_get(state))
    for other in found[1:]:
        np.testing.assert_array_equal(other.memory["seen"], found[0].memory["seen"])
        np.testing.assert_allclose(other.params["scale"], found[0].params["scale"], rtol=1e-5)
    seen = found[0].memory["seen"]
    assert seen.sum() == steps * B
    assert seen.min() >= timesteps.HISTORY  # after which the history counts: large losses come more often
    assert seen[-2:].sum() > seen[:2].sum()


# Inputs ---------------------------------------------------------------------------------------------------------------

DATA = DataConfig(source="emoji", root=str(ROOT / "tests" / "data"), size=16, batch_size=4)
CACHED = {"latent_variants": 1, "text_variants": 1, "train_text_encoder": False}
VAE = VAEConfig(
    block_out_channels=(2, 2, 2, 2),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=2,
)


class Encoded:
    """Records as a run caches them: moments, and contexts where captions are encoded, too."""

    def __init__(self, contexts, xl):
        self.contexts, self.xl = contexts, xl

    def __len__(self):
        return 4

    def record(self, index):
        made = {"contexts": (np.ones((6, 20 if self.xl else 8), np.float16),)} if self.contexts else {}
        made |= {"pooled": (np.ones(10, np.float16),)} if self.contexts and self.xl else {}
        return Record(Caption("apple"), moments=np.ones((2, 2, 8), np.float16), numbers=(9, 9, 0, 0, 8, 8), **made)

    def name(self, index):
        return str(index)

    def sizes(self):
        return np.full((4, 2), 2)


class Noted(dict):
    """A dict that remembers what was read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(
    ("settings", "source", "names"),
    [
        ({}, "emoji", {"image", "tokens"}),
        ({"train_text_encoder": False}, "emoji", {"image", "tokens"}),
        ({"latent_variants": 1}, "emoji", {"moments", "tokens"}),
        ({"latent_variants": 1, "train_text_encoder": False}, "emoji", {"moments", "tokens"}),
        ({}, "latents", {"moments", "tokens"}),
        (CACHED, "emoji", {"moments", "context"}),
    ],
    ids=["images", "images, text frozen", "latents", "latents, text frozen", "latents of another run", "all cached"],
)
@pytest.mark.parametrize("base", [TASK, XL_TASK], ids=["one text encoder", "two"])
def test_data_give_and_the_loss_reads_what_the_inputs_say(base, settings, source, names):
    config = replace(base, **settings)
    if config.reads_sizes:
        names = names | {"numbers", "pooled" if "context" in names else "tokens_2"}
    inputs = diffusion_inputs(config, replace(DATA, source=source), VAE)
    assert set(inputs.batch) == names | {"index"}

    # What is read from a cache, or from pictures, has these shapes and types on the devices.
    cached = "moments" in names
    data = replace(DATA, source="latents", root="") if cached else DATA
    records = Encoded("context" in names, config.reads_sizes) if cached else open_source(data)
    tokenizers = [Tokenizer.load(ROOT / "jaxdiff" / "assets" / "emoji" / "tokenizer", 6)] * len(config.text_encoders)
    with closing(batches(data, records, *tokenizers, seed=0, numbers=config.reads_sizes)) as reader:
        found = to_devices(next(reader), make_mesh(devices=jax.devices()[:1]))
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.batch.items()
    }

    # Every array is read, and each network has one part to play.
    task = diffusion_task(config, VAE, inputs.frozen)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert set(params) == set(inputs.trained)
    frozen = {name for name, tree in inputs.frozen.items() if isinstance(tree, dict)}
    assert sorted([*inputs.trained, *frozen, *inputs.kept]) == [*config.text_encoders, "unet", "vae"]
    seen = set()

    def loss(params, frozen, batch, key):
        batch = Noted(batch)
        value, *_ = task.loss(params, frozen, batch, key, task.memory)
        seen.update(batch.read)
        return value

    assert jax.eval_shape(loss, params, task.frozen, inputs.batch, jax.random.key(0)).shape == ()
    assert seen == set(inputs.batch)


def test_latents_cached_for_another_task_are_refused_in_a_sentence():
    inputs = diffusion_inputs(replace(TASK, **CACHED), DATA, VAE)
    task = task_of()
    params = jax.eval_shape(task.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"'tokens'.*context, index, moments"):
        jax.eval_shape(task.loss, params, task.frozen, inputs.batch, jax.random.key(0), {})


def test_every_setting_of_the_config_reaches_its_function():
    sigma = jnp.array([0.1, 1.0, 10.0])
    for weighting, expected in (
        ("none", weights.unweighted(sigma, EPSILON)),
        ("min_snr", weights.min_snr(sigma, EPSILON, 3.0)),
        ("debiased", weights.debiased(sigma, EPSILON)),
        ("edm", weights.edm(sigma, EPSILON, 0.5)),
    ):
        config = replace(TASK, weighting=weighting, min_snr_gamma=3.0, sigma_data=0.5)
        np.testing.assert_array_equal(weight_fn(config)(sigma, EPSILON), expected)
    past = timesteps.history(1000)
    for name, expected in (
        ("uniform", timesteps.uniform(1000)),
        ("logit_normal", timesteps.logit_normal(1000, 0.3, 0.7)),
        ("importance", timesteps.importance(past)),
    ):
        config = replace(TASK, timesteps=name, logit_mean=0.3, logit_std=0.7)
        for key in jax.random.split(jax.random.key(0), 3):
            assert draw_fn(config, past)(key) == expected(key)
        assert bool(diffusion_task(config, VAEConfig(), FROZEN).memory) == (name == "importance")
