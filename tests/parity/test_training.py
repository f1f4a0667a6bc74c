"""A training step's loss and gradients are those of torch, diffusers and transformers."""

from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xl
from diffusers import DDPMScheduler
from pairs import nchw, relative_error, torch_gradients
from PIL import Image

from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.diffusion.timesteps import uniform
from jaxdiff.training.options import resolve
from jaxdiff.training.parts import read_part, read_tokenizers, read_vae
from jaxdiff.training.tasks.diffusion import diffusion_inputs, diffusion_task

DROPPED = 0.5
CAPTIONS = ["a red apple", "a dog on a blue background", "two green apples, flat style", "a cat! and a dog"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs of other sizes than what is trained on, cut at random and mirrored."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 256, (20 + 9 * i, 50 - 3 * i, 3), np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(caption)
    return DataConfig(source="folder", root=str(root), size=16, batch_size=4, crop=0.5, flip=True)


@pytest.mark.parametrize("zero_empty", [True, False], ids=["zeros", "the empty text"])
def test_of_stable_diffusion_xl(zero_empty, pictures, tmp_path, figures):
    theirs = xl.base(tmp_path)
    task = resolve(
        TrainConfig("x", DiffusionTask(caption_dropout=DROPPED, zero_empty=zero_empty), model=str(tmp_path / "model"))
    ).task
    assert isinstance(task, DiffusionTask)
    vae, vae_params = read_vae(task, pictures)
    tokenizers = read_tokenizers(task)
    networks = ("unet", *task.text_encoders)
    weights = {name: read_part(task.init, name, getattr(task, name), "init")[1] for name in networks}
    empty = [tokenizer([""])[0] for tokenizer in tokenizers]
    weights |= {"vae": vae_params, "empty_tokens": empty[0], "empty_tokens_2": empty[1]}
    start, frozen, _ = diffusion_inputs(task, pictures, vae).split(weights)
    with closing(batches(pictures, open_source(pictures), *tokenizers, seed=3, numbers=True)) as read:
        batch = next(read)
    assert len({tuple(row) for row in batch["numbers"].tolist()}) == 4
    key = jax.random.key(3)

    @jax.jit
    def step(params, frozen, batch):
        loss_fn = diffusion_task(task, vae, frozen, None).loss
        return jax.value_and_grad(lambda p: loss_fn(p, frozen, batch, key, {})[0])(params)

    on_device = {name: jnp.asarray(rows, rows.dtype if rows.dtype.kind == "f" else jnp.int32) for name, rows in
                 batch.items()}  # fmt: skip
    loss, gradients = step(start, frozen, on_device)

    # The same draws, and all else as diffusers' own training of these models does it.
    _, drop_key, noise_key = jax.random.split(key, 3)
    dropped = np.array([bool(jax.random.bernoulli(jax.random.fold_in(drop_key, i), DROPPED)) for i in range(4)])
    assert 0 < dropped.sum() < 4
    keys = [jax.random.split(jax.random.fold_in(noise_key, i), 3) for i in range(4)]
    t = torch.tensor([int(uniform(1000)(level_key)[0]) for level_key, _, _ in keys])
    eps = nchw(np.stack([jax.random.normal(one, (8, 8, 4)) for _, one, _ in keys]))
    with torch.no_grad():
        x_0 = theirs.vae.encode(nchw(batch["image"])).latent_dist.mean * theirs.vae.config.scaling_factor
    features = []
    for name, tokens, nothing in zip(task.text_encoders, ("tokens", "tokens_2"), empty, strict=True):
        ids = batch[tokens] if zero_empty else np.where(dropped[:, None], nothing, batch[tokens])
        out = getattr(theirs, name)(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
        features.append(out.hidden_states[-2])
    context, pooled = torch.cat(features, dim=-1), out.text_embeds
    if zero_empty:
        kept = torch.tensor(~dropped, dtype=torch.float32)
        context, pooled = kept[:, None, None] * context, kept[:, None] * pooled
    noisy = DDPMScheduler(**xl.SCHEDULE).add_noise(x_0, eps, t)
    told = {"text_embeds": pooled, "time_ids": torch.from_numpy(batch["numbers"])}
    theirs.unet.train()
    expected = torch.nn.functional.mse_loss(theirs.unet(noisy, t, context, added_cond_kwargs=told).sample, eps)
    expected.backward()

    what = f"SDXL, a training step, dropped captions as {'zeros' if zero_empty else 'the empty text'}"
    figures[f"{what}: loss"] = abs(float(loss) / float(expected) - 1)
    assert figures[f"{what}: loss"] < 1e-5
    for name in networks:
        error = relative_error(gradients[name], torch_gradients(getattr(theirs, name)))
        figures[f"{what}: gradients of {name}"] = error
        assert error < 1e-4, name
