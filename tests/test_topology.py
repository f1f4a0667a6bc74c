"""One run is the same on any number of devices and processes: its data, its draws and, but for rounding, its end."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxdiff.config import CLIPTextConfig, DataConfig, DiffusionTask, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.sharding import make_mesh
from jaxdiff.training.feed import local_rows, to_devices
from jaxdiff.training.tasks.diffusion import diffusion_task

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "jaxdiff" / "assets" / "emoji"
STEPS = 6  # of tests/configs/topology.py
TOLERANCE = 2e-6  # of parameters after them; a step moves them by 1e-3

MESHES = {
    "1": {},
    "2": {"data": 2},
    "4": {"data": 2, "fsdp": 2},
    "8": {"data": 8},
    "8 in three axes": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(axes: dict[str, int]) -> Mesh:
    return make_mesh(**{"data": 1} | axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


TASK = DiffusionTask(
    unet=UNetConfig(
        sample_size=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=4096,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    scheduler=SchedulerConfig(prediction_type="v_prediction"),
    caption_dropout=0.5,
)
DATA = DataConfig(source="emoji", root=str(ROOT / "tests" / "data"), size=16, batch_size=16, flip=True, crop=0.8)


def what_networks_see(mesh: Mesh) -> dict[str, np.ndarray]:
    """The arguments of UNet and text encoder in the third step's loss, compiled for the mesh, and the step's batch.

    They hold all that is drawn: latents from moments, timesteps, noise, dropped captions.
    """
    tokenizer = Tokenizer.load(str(EMBEDDED / "tokenizer"), 32)
    task = diffusion_task(TASK, VAEConfig(), {"empty_tokens": tokenizer([""])[0]})
    rng = np.random.default_rng(0)
    batch = next(batches(DATA, open_source(DATA), tokenizer, seed=3, start_step=2, rows=local_rows(mesh, 16)))
    image = batch.pop("image")
    batch["moments"] = np.tile(image[:, ::4, ::4, :1], (1, 1, 1, 8)) + rng.normal(size=8).astype(np.float32)

    def step(params: Any, frozen: Any, batch: Any, key: Any) -> dict[str, Any]:
        seen = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__" and isinstance(context.module, UNet2DConditionModel):
                seen["x"], seen["t"] = args[:2]
            if context.method_name == "__call__" and isinstance(context.module, CLIPTextModel):
                seen["tokens"] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            task.loss(params, frozen, batch, jax.random.fold_in(key, 2), task.memory)
        return seen

    params = jax.jit(task.init)(jax.random.key(0))
    seen = jax.jit(step)(params, task.frozen, to_devices(batch, mesh), jax.random.key(1))
    return {name: np.asarray(a) for name, a in (seen | {"image": image, "index": batch["index"]}).items()}


@pytest.fixture(scope="session")
def seen_by_one() -> dict[str, np.ndarray]:
    return what_networks_see(mesh_of(MESHES["1"]))


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_networks_are_shown_the_same_bits_on_any_mesh(name: str, seen_by_one: dict[str, np.ndarray]) -> None:
    seen = what_networks_see(mesh_of(MESHES[name]))
    assert set(seen) == {"x", "t", "tokens", "image", "index"}
    assert {key: seen[key].tobytes() == a.tobytes() for key, a in seen_by_one.items()} == dict.fromkeys(seen, True)
    assert len(np.unique(seen["t"])) > 8  # they are draws
    assert len(np.unique(seen["tokens"], axis=0)) < 16  # of which some captions are dropped
