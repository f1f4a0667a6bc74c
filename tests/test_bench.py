"""The benchmark times what the library runs, counts what the networks ask for, and refuses in a sentence."""

import json
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.tools import hlo
from jaxdiff.tools.bench import flops, measure, result
from jaxdiff.tools.bench.__main__ import cli
from jaxdiff.tools.bench.measure import Spread
from jaxdiff.tools.bench.models import find_model
from jaxdiff.tools.bench.targets import PROMPT, TARGETS, Setting
from jaxdiff.tools.chips import CHIPS, chip_name

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmarks

SIZE = 16  # pixels, which the tiny autoencoder halves once
ALL = 8  # devices, which conftest makes


@pytest.fixture(scope="module")
def pipe():
    """With a denoiser of one level, which takes half the time to compile."""
    one_level = replace(
        tiny.UNET,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
    )
    return Pipeline(tiny.model(denoiser=one_level))


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save(path)
    return str(path)


@pytest.fixture
def bench(folder, tmp_path, capsys):
    """Runs the command line on the tiny model: (exit code, the JSON's only result, what it printed, its error)."""

    def run(*words):
        file = tmp_path / "out.json"
        code = cli([*map(str, words), "--model", folder, "--json", str(file)])
        out, err = capsys.readouterr()
        return code, json.loads(file.read_text())["results"][0] if code == 0 else {}, out, err

    return run


def setting(folder, devices=1, **options):
    return Setting(find_model(folder), ALL, SIZE, "float32", make_mesh(devices=jax.devices()[:devices]), options)


# Counting -------------------------------------------------------------------------------------------------------------

UNET = UNetConfig(
    block_out_channels=(8, 16, 24),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=(1, 2, 1),
    transformer_layers_per_block=(1, 1, 2),
    attention_head_dim=2,
    cross_attention_dim=12,
    norm_num_groups=4,
)
VAE = VAEConfig(
    block_out_channels=(8, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4,
)
TEXT = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)


@pytest.mark.parametrize(
    ("config", "shapes", "method", "closed_form"),
    [
        (UNET, ((2, 9, 6, 4), (2,), (2, 7, 12)), None, flops.unet(UNET, 2, 9, 6, 7)),
        (VAE, ((2, 24, 16, 3),), "encode", flops.vae_encode(VAE, 2, 24, 16)),
        (VAE, ((2, 6, 4, 4),), "decode", flops.vae_decode(VAE, 2, 24, 16)),
        (TEXT, ((2, 77),), None, flops.text_encoder(TEXT, 2)),
    ],
    ids=["unet", "vae encode", "vae decode", "text"],
)
def test_the_closed_form_of_operations_is_what_the_program_multiplies(config, shapes, method, closed_form):
    name = {UNetConfig: "unet", VAEConfig: "vae", CLIPTextConfig: "text_encoder"}[type(config)]
    module = getattr(build, name)(config)
    dtype = jnp.int32 if name == "text_encoder" else jnp.float32
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.make_jaxpr(lambda params, *x: module.apply({"params": params}, *x, method=method))(
        build.param_shapes(module, config), *inputs
    )
    assert hlo.flops(traced) == closed_form


@pytest.mark.slow
def test_xla_counts_the_same_operations_but_for_the_zeros_round_pictures():
    config = VAEConfig()
    module = build.vae(config)
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    decode = jax.jit(lambda params, z: module.apply({"params": params}, z, method="decode"))
    traced = decode.trace(build.param_shapes(module, config), z)
    # A GPU's program has plain convolutions; a CPU's multiplies less.
    counted = traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]
    assert counted == pytest.approx(flops.vae_decode(config, 1, 512, 512), rel=0.03)


def test_loops_of_unknown_length_are_counted_as_often_as_is_said():
    x = jnp.zeros((64, 64))
    loop = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x)).lower(x, 1).compile().as_text()
    once, ten = (hlo.parse(loop, turns).bytes_moved() for turns in (1, 10))
    assert 9 * 3 * x.nbytes <= ten - once < 2 * 9 * 3 * x.nbytes


def test_quartiles_are_those_of_the_runs():
    times = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (times.q1, times.median, times.q3) == (2.0, 3.0, 4.0)
    assert times.runs == (4.0, 1.0, 3.0, 2.0, 5.0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert chip_name(kind) == name
    assert name is None or name in CHIPS


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch):
    def version(name):
        if name == "jaxdiff":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(measure, "version", version)
    assert measure.machine()["jaxdiff"] == jaxdiff.__version__


def test_the_peak_of_memory_is_counted_from_when_it_is_forgotten():
    if sys.platform != "linux":
        pytest.skip("only Linux forgets a peak")
    measure.forget_peak()
    before, _ = measure.peak()
    held = np.ones(2**24)  # 128 MiB
    assert measure.peak()[0] - before > 0.9 * held.nbytes
    del held
    measure.forget_peak()
    assert measure.peak()[0] < before + 2**25


# What is timed --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sample_that_is_timed_is_the_picture_that_a_user_gets(folder, pipe):
    work = TARGETS["sample"](setting(folder, ALL, steps=3, guidance=4.0))
    pictures = work.fetch(work.f(*work.args))
    expected = pipe([PROMPT] * ALL, seed=0, steps=3, guidance=4.0)
    assert np.abs(pictures.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("target", [pytest.param("unet", marks=pytest.mark.slow), "text"])
def test_a_mesh_computes_what_one_device_does(folder, target):
    one, many = (TARGETS[target](setting(folder, devices)) for devices in (1, ALL))
    got, expected = (work.fetch(work.f(*work.args)) for work in (many, one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)


@pytest.mark.slow
def test_figures_follow_from_times(bench, folder):
    code, found, out, _ = bench("unet", "--batch", ALL, "--runs", 3, "--mesh.fsdp", 4)
    assert code == 0
    times = found["seconds"]
    assert len(times["runs"]) == 3
    assert min(times["runs"]) <= times["q1"] <= times["median"] <= times["q3"] <= max(times["runs"])
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["images_per_second"] == pytest.approx(ALL / times["median"])
    assert found["images_per_second_per_device"] == pytest.approx(found["images_per_second"] / ALL)
    config = find_model(folder).unet
    assert found["flops"] == flops.unet(config, ALL, 8, 8, tiny.TEXT_ENCODER.max_position_embeddings)
    assert found["flops_per_second"] == pytest.approx(found["flops"] / times["median"])
    assert 0 < found["peak_share"] < 1
    assert 0.5 < found["xla_flops"] / found["flops"] < 1.5
    assert found["bytes_moved"] > 0
    assert found["peak_memory"] > found["temporaries"] > 0
    assert min(found[part] for part in ("trace", "lower", "compile", "first")) > 0
    assert "8 devices (data 2 x fsdp 4 x tensor 1)" in out


@pytest.mark.slow
@pytest.mark.parametrize("words", [("vae",), ("vae", "--encode"), ("text",)])
def test_every_network_runs(bench, words):
    code, found, out, _ = bench(*words, "--batch", ALL, "--runs", 1, "--warmup", 0)
    assert code == 0
    assert found["target"] == words[0]
    assert "images/s" in out


@pytest.mark.slow
def test_training_that_is_fed_tells_how_long_it_waits(bench, folder):
    code, found, out, _ = bench("train", "--batch", ALL, "--runs", 2, "--data.source", "emoji",
                                "--data.root", "tests/data")  # fmt: skip
    assert code == 0
    assert 0 <= found["wait_share"] < 1
    assert "waiting for input" in out
    of_unet = 3 * flops.unet(find_model(folder).unet, ALL, 8, 8, 12)
    assert found["flops"] > of_unet  # pictures and captions are encoded, too


@pytest.mark.slow
def test_the_loader_is_timed_alone(bench):
    code, found, *_ = bench("data", "--batch", 4, "--steps", 3, "--data.root", "tests/data")
    assert code == 0
    assert found["images_per_second"] > 0
    assert found["compile"] is None


@pytest.mark.slow
def test_a_profile_and_a_plot_are_written(bench, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    code, *_ = bench("text", "--batch", 8, 16, "--runs", 1, "--trace", tmp_path / "profile", "--plot", plot)
    assert code == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "<svg" in plot.read_text()


# Comparing ------------------------------------------------------------------------------------------------------------


def test_two_files_compare_by_the_ratios_of_their_times(bench, tmp_path, capsys):
    bench("text", "--batch", ALL, "--runs", 2)
    file, other = tmp_path / "out.json", tmp_path / "other.json"
    values = json.loads(file.read_text())
    for name in ("median", "q1", "q3"):
        values["results"][0]["seconds"][name] *= 2
    other.write_text(json.dumps(values))
    assert cli(["compare", str(file), str(other)]) == 0
    assert "2.000" in capsys.readouterr().out
    assert cli(["compare", str(other), str(file)]) == 0
    assert "0.500" in capsys.readouterr().out
    values["results"][0]["target"] = "vae"
    other.write_text(json.dumps(values))
    assert cli(["compare", str(file), str(other)]) == 2
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "results": [{"seconds": {}}]}',
                                  '{"format": 1, "results": [3]}', '{"format": 2, "results": []}'])  # fmt: skip
def test_files_that_are_no_results_are_refused(tmp_path, capsys, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    assert cli(["compare", str(file), str(file)]) == 2
    assert str(file) in capsys.readouterr().err


# Refusing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("unet", "--batch", 0), "--batch is 0"),
        (("unet", "--batch", 3), "8 devices"),
        (("unet", "--size", 15), "multiple of 2"),
        (("unet", "--runs", 0), "--runs is 0"),
        (("sample", "--steps", 0), "--steps is 0"),
        (("unet", "--mesh.fsdp", 3), "there are 8"),
        (("unet", "--plot", "build/picture.gif"), ".png"),
        (("unet", "--vs", "diffusers"), "--vs"),
        (("train", "--batch", 8, "--vs", "diffusers", "--data.source", "emoji"), "--data.source"),
        (("data", "--data.root", "nowhere"), "jaxdiff.tools.prepare"),
    ],
)
def test_the_command_refuses_in_a_sentence(bench, words, sentence):
    code, _, _, err = bench(*words)
    assert code == 2
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_unknown_models_are_told_the_known_ones(capsys):
    assert cli(["unet", "--model", "sd16"]) == 2
    assert "emoji, sd15" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_anything_is_measured(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option, place in (("--json", tmp_path / "file" / "out.json"), ("--json", tmp_path), ("--trace", "/proc/no")):
        assert cli(["unet", "--model", folder, "--batch", str(ALL), option, str(place)]) == 2
        out, err = capsys.readouterr()
        assert f"{option} {place} cannot be written" in err
        assert not out


def test_missing_extras_are_named(folder, capsys, monkeypatch):
    (device, *_) = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr("jaxdiff.tools.bench.versus.find_spec", lambda name: None)
    assert cli(["unet", "--model", folder, "--vs", "diffusers"]) == 2
    assert "jaxdiff[parity]" in capsys.readouterr().err
    if find_spec("matplotlib") is None:
        assert cli(["unet", "--model", folder, "--plot", "plot.png"]) == 2
        assert "jaxdiff[plot]" in capsys.readouterr().err


# README's table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(bench, tmp_path):
    """What a comparison writes: a measurement, and a rival that took twice as long."""
    bench("unet", "--batch", ALL, "--runs", 2)
    values = result.read(tmp_path / "out.json")
    spread = {"median": 0.5, "q1": 0.4, "q3": 0.6, "runs": [0.4, 0.6]}
    rival = {"against": "diffusers 0, torch 0, eager", "seconds": spread, "ratio": spread, "error": 1e-6,
             "error_of": "relative error"}  # fmt: skip
    return values | {"results": [values["results"][0] | {"versus": [rival]}]}


@pytest.mark.slow
def test_the_table_takes_the_place_between_its_marks(figures, tmp_path, monkeypatch):
    readme, out = tmp_path / "README.md", tmp_path / "figures"
    readme.write_text(f"before\n{benchmarks.BEGIN}\nold\n{benchmarks.END}\nafter\n")
    out.mkdir()
    (out / "unet.json").write_text(json.dumps(figures))
    monkeypatch.setattr(benchmarks, "measure", lambda words, file: None)  # the figures are there
    args = benchmarks.Args(rows=("unet",), out=out, readme=readme)
    assert benchmarks.main(args) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "**0.50** (0.40 to 0.60)" in text
    assert benchmarks.main(args) == 0
    assert readme.read_text() == text  # again, and it is the same


@pytest.mark.slow
@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_wrong_results_fail_and_leave_the_table_alone(figures, tmp_path, monkeypatch, capsys, error):
    readme, out = tmp_path / "README.md", tmp_path / "figures"
    readme.write_text(f"{benchmarks.BEGIN}\nold\n{benchmarks.END}\n")
    out.mkdir()
    figures["results"][0]["versus"][0]["error"] = error
    (out / "unet.json").write_text(json.dumps(figures))
    monkeypatch.setattr(benchmarks, "measure", lambda words, file: None)
    assert benchmarks.main(benchmarks.Args(rows=("unet",), out=out, readme=readme)) == 1
    assert "WRONG: unet" in capsys.readouterr().err
    assert "old" in readme.read_text()


@pytest.mark.slow
def test_the_script_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="no row x"):
        benchmarks.main(benchmarks.Args(rows=("x",)))
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(ValueError, match="no place for the table"):
        benchmarks.main(benchmarks.Args(readme=tmp_path / "README.md"))
