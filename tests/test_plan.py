"""The planner counts what programs of known cost do, and plans the step that `train.py` takes."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxdiff import build
from jaxdiff.config import DataConfig, TrainConfig
from jaxdiff.runtime.mesh import AXES, make_mesh
from jaxdiff.tools import hlo
from jaxdiff.tools import plan as plan_module
from jaxdiff.tools.plan import (
    Plan,
    abstract_task,
    chip_of,
    forward_program,
    largest,
    main,
    of_largest_shape,
    plan,
    report,
    sample_program,
    wanted,
)
from jaxdiff.training.options import read_config

# One level: half the time to compile.
SMALL = ["--task.unet.block_out_channels", "8", "--task.unet.down_block_types", "CrossAttnDownBlock2D"]
SMALL += ["--task.unet.up_block_types", "CrossAttnUpBlock2D", "--data.size", "8"]
TINY = "tests/configs/tiny.py"
KIB = 1024


def compiled(f, *args):
    return hlo.parse(jax.jit(f).lower(*args).compile().as_text())


# A quarter KiB of floats on each of eight devices; rings send n - 1 parts of what they gather.
@pytest.mark.parametrize(
    ("kind", "f", "sent"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, AXES), 7 * KIB),
        ("all-reduce", lambda x: jax.lax.psum(x, AXES), 2 * 7 / 8 * KIB),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, AXES), 7 / 8 * KIB),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, AXES, 0, 0), 7 / 8 * KIB),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "data", [(i, i ^ 1) for i in range(8)]), KIB),
    ],
)
def test_collectives_are_counted_in_bytes(kind, f, sent) -> None:
    spread = partial(jax.shard_map, mesh=make_mesh(), in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    x = jnp.zeros((64, 32))
    assert compiled(spread(f), x).collectives() == {kind: sent}

    def five_times(x):
        return jax.lax.scan(lambda sums, _: (sums + jnp.sum(f(x + sums.mean())), None), jnp.zeros(()), length=5)[0][
            None
        ]

    assert compiled(spread(five_times), x).collectives()[kind] == 5 * sent


def test_what_loops_move_is_counted_in_every_turn() -> None:
    x, n = jnp.zeros((256, 256)), 10
    program = compiled(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=n)[0], x)
    each = 3 * x.nbytes  # both factors and the product
    assert 1 <= program.bytes_moved() / (n * each) < 2  # the CPU's compiler copies now and then


def test_operations_have_their_closed_form() -> None:
    def flops(f, *args) -> int:
        return hlo.flops(jax.make_jaxpr(f)(*args))

    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    assert flops(jax.grad(lambda a, b: jnp.square(a @ b).sum(), (0, 1)), a, b) == 3 * 2 * 3 * 5 * 7
    assert flops(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(4)), a, b) == 4 * 2 * 3 * 5 * 7
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))
    conv = partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert flops(conv, x, kernel) == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)


def test_the_largest_batch_is_found_in_few_trials() -> None:
    for limit in (0, 1, 2, 7, 8, 40, 100):
        tried = []

        def fits(n: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(n)
            return n <= limit

        found = largest(fits, 8)
        assert found <= limit <= found + max(1, found // 4)
        assert len(tried) <= 7


@pytest.mark.parametrize("limit", [80, 500])
@pytest.mark.parametrize(("accumulate", "mesh"), [(1, "8,1,1"), (6, "8,1,1"), (6, "2,1,4"), (4, "1,2,4")])
def test_batches_that_are_tried_are_those_that_micro_batches_divide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accumulate: int, mesh: str, limit: int
) -> None:
    data, fsdp, tensor = mesh.split(",")
    axes = ["--mesh.data", data, "--mesh.fsdp", fsdp, "--mesh.tensor", tensor]
    config = read_config(TINY, ["--optim.accumulate", str(accumulate), "--data.batch_size", "48", *axes])
    tried = []

    def planned(sized, mesh, *_):
        tried.append(sized.data.batch_size)
        assert sized.data.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"] * accumulate) == 0
        values = {f.name: 0.0 if f.type in (float, float | None) else 0 for f in fields(Plan)}
        values |= {"mesh": {}, "bounds": {}, "collectives": {}}
        return Plan(**values | {"batch": sized.data.batch_size // 8, "fits": sized.data.batch_size <= limit})

    monkeypatch.setattr(plan_module, "plan", planned)
    options = Namespace(batch=None, fit=True, forward=False, sample=0, dump=None, run=0, topology="v5e:2x4", json=True)
    plan_module._plan_on(options, config, jax.devices(), None)
    found = 8 * json.loads(capsys.readouterr().out)["batch"]
    assert found <= limit < max(1.5 * found, found + int(data) * int(fsdp) * accumulate)
    assert found in tried


def test_of_several_shapes_the_largest_is_planned() -> None:
    data = DataConfig(size=64, side_multiple=16, aspects=("1:1", "3:1", "1:2"))
    assert data.shapes == ((64, 64), (32, 112), (96, 48))
    assert of_largest_shape(data).shapes == ((96, 48),)
    assert of_largest_shape(DataConfig(size=32)).shapes == ((32, 32),)


@pytest.mark.slow
def test_a_plan_has_the_bytes_of_the_state_that_each_device_holds() -> None:
    config = read_config(TINY, [*SMALL, "--mesh.fsdp", "4"])
    task, batch = abstract_task(config)
    assert set(batch) == {"index", "moments", "tokens"}
    whole = 4 * sum(p.size for p in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
    found = plan(config, make_mesh(data=2, fsdp=4))
    assert whole / 4 < found.parameters == found.ema < whole / 2  # vectors are not split
    assert found.optimiser == pytest.approx(2 * found.parameters, rel=0.01)
    assert found.collectives["all-gather"] > 0
    assert found.batch == 1


@pytest.mark.slow
def test_a_call_of_the_unet_holds_parameters_and_latents_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *SMALL, "--devices", "2", "--forward", "--json", "--run", "1", "--dtype", "bfloat16"]) == 0
    found = json.loads(capsys.readouterr().out)
    task = read_config(TINY, SMALL).task
    params = build.param_shapes(build.unet(task.unet), task.unet)
    assert found["parameters"] == 2 * sum(p.size for p in jax.tree.leaves(params))  # whole on each device
    assert found["optimiser"] == found["ema"] == found["frozen"] == 0
    assert found["collectives"] == {}
    assert found["bytes_accessed"] > found["parameters"]
    assert found["run_seconds"] > 0
    for asked in (["--forward"], ["--sample", "4"]):
        assert main(["tests/configs/tiny_vae.py", "--devices", "1", *asked]) == 2
        assert "trains an autoencoder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", [tiny.TASK, tiny.XL_TASK], ids=["one text encoder", "two"])
def test_sampling_takes_a_call_of_the_unet_with_and_without_the_prompt_for_each_step(task) -> None:
    """But for the prompts' keys and values, which are computed once."""
    config, mesh = (
        TrainConfig("x", task, data=DataConfig(size=32, batch_size=2)),
        make_mesh(data=2, devices=jax.devices()[:2]),
    )

    def work(program, turns: int = 1) -> int:
        f, arguments, _ = program
        return hlo.flops(f.trace(*arguments).jaxpr, turns)

    drawing = sample_program(config, mesh, 5)
    step = work(drawing, 6) - work(drawing, 5)
    once = work(drawing) - step
    call = work(forward_program(config, mesh))
    assert 0.8 * 2 * call < step < 2 * call
    assert work(drawing, 20) == once + 20 * step
    parameters = drawing[2]["parameters"]
    assert set(parameters) == {"denoiser", "vae", *task.text_encoders}


@pytest.mark.slow
def test_the_recipe_of_stable_diffusion_xl_has_the_published_sizes() -> None:
    task = read_config("configs/sdxl_finetune.py", []).task
    configs = {"unet": task.unet, **task.text_encoders}
    sizes = {name: sum(p.size for p in jax.tree.leaves(build.param_shapes(getattr(build, name)(config), config)))
             for name, config in configs.items()}  # fmt: skip
    assert sizes == {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}


@pytest.mark.slow
def test_a_step_that_is_run_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tests/configs/tiny_vae.py", "--devices", "1", "--json", "--run", "1", "--data.size", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 1
    assert found["collectives"] == {}
    assert found["run_seconds"] > 0
    assert found["peak"] > found["total"]


def test_the_command_refuses_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/emoji.py", "--devices", "3", "--data.batch_size", "8"]) == 2
    assert "not a multiple of the 3" in capsys.readouterr().err
    assert main([TINY, "--topology", "v9:2x2"]) == 2
    assert "begins with one of v4, v5e" in capsys.readouterr().err
    for batch in ("0", "-1"):
        assert main([TINY, "--devices", "1", "--batch", batch]) == 2
        assert f"--batch {batch}: it must be above 0" in capsys.readouterr().err
    assert main([TINY, "--devices", "1", "--forward", "--sample", "3"]) == 2
    assert "without --forward" in capsys.readouterr().err
    assert main([TINY, "--devices", "1", "--fit"]) == 2
    assert "--fit needs --topology" in capsys.readouterr().err
    assert main([TINY, "--topology", "v5e:4x4", "--run", "1"]) == 2
    assert "--run needs --devices" in capsys.readouterr().err


@pytest.mark.tpu_compile
def test_the_tpu_compiler_plans_a_slice() -> None:
    command = [sys.executable, "-m", "jaxdiff.tools.plan", TINY, "--topology", "v5e:2x4", "--mesh.fsdp", "8", "--json"]
    command += SMALL
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["memory"] == int(chip_of("v5e").hbm)
    assert set(found["bounds"]) == {"compute", "memory", "network"}
    assert 0 < found["seconds"] == max(found["bounds"].values())
    assert found["collectives"]["all-gather"] > 0


def test_what_does_not_fit_says_by_how_much_as_far_as_the_compiler_does(monkeypatch):
    assert wanted("RESOURCE_EXHAUSTED: Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.", 5) == 23.5 * 2**30
    assert wanted("RESOURCE_EXHAUSTED: arguments do not fit", 17 * 2**30) == 17 * 2**30
    sizes = dict.fromkeys((field.name for field in fields(Plan)), 0) | {"mesh": {"data": 1}, "fits": False}
    sizes |= dict.fromkeys(("flops", "bytes_moved", "bytes_accessed", "compile_seconds"), 0.0)
    sizes |= {"images_per_second": None, "run_seconds": None, "peak": None}
    sizes |= {"memory": 16 * 2**30, "total": 17 * 2**30, "seconds": None, "collectives": {}, "bounds": {}}
    assert "TOO MUCH, by at least 1.00 GiB" in report(Plan(**sizes), "chip")
