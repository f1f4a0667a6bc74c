"""The exported program and its loader: the pipeline's pictures, where there is no pipeline."""

import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_data_tokens import TRICKY
from tiny import off

import jaxdiff
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.images import read_settings
from jaxdiff.model import EMBEDDED
from jaxdiff.sampling.samplers import count_steps, make_sigmas
from jaxdiff.tools.export import load
from jaxdiff.tools.export.__main__ import Args, cli, weights, write
from jaxdiff.tools.export.program import all_levels, custom_calls, export, inputs_of

JAX = ("jax", "jaxlib", "ml_dtypes", "numpy", "numpy.libs", "scipy", "scipy.libs", "opt_einsum")
"""The folders of jax and of what it depends on."""
PROMPTS = ["a red apple", "a dog", "a blue background"]
SIZE = (32, 32)  # of 16 x 16 latents, whose attention is not dense


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    write(Args(out, batch=2, size="32x32"), pipe)
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return load.Model(folder)


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def sign(folder: Path, **changes: object) -> None:
    """Makes checksums those of the files, as someone would who means it, and sets fields of `program.json`."""
    about = json.loads((folder / "program.json").read_text()) | changes
    about["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in load.FILES}
    (folder / "program.json").write_text(json.dumps(about))


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loader_draws_the_pipelines_pictures(loaded, pipe):
    for settings in (
        {"steps": 3},
        {"steps": 1, "seed": 5, "guidance": 1.0},
        {"steps": 7, "seed": 2**32 - 3, "eta": 0.8, "guidance": 4.0, "negative_prompt": "a dog"},
        {
            "steps": 4,
            "guidance_rescale": 0.7,
            "apg_eta": 0.2,
            "apg_norm_threshold": 3.0,
            "negative_prompt": ["blue", "", "a dog"],
        },
    ):
        theirs = pipe(PROMPTS, size=SIZE, **settings)
        ours = loaded(PROMPTS, **settings)
        assert off(ours, theirs) <= 1
        assert off(ours[0], theirs[1]) > 8, "and not any picture"


@pytest.mark.slow
def test_where_there_is_jax_alone_the_shell_draws_the_pipelines_picture(folder, pipe, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    site = Path(importlib.util.find_spec("jax").submodule_search_locations[0]).parent  # pyright: ignore
    for name in JAX:
        if (site / name).exists():
            (packages / name).symlink_to(site / name)
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(packages), "JAX_PLATFORMS": "cpu"}

    def python(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *map(str, words)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    absent = (
        "import importlib.util as u; print([n for n in ('jaxdiff', 'flax', 'tokenizers', 'PIL') if u.find_spec(n)])"
    )
    assert python("-c", absent).stdout == "[]\n"
    out = tmp_path / "pictures" / "a.png"
    run = python(folder / "load.py", "a red apple", "--out", out, "--steps", 3, "--seed", 4, "--eta", 0.5)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{out}\n", "")
    theirs = pipe(["a red apple"], size=SIZE, steps=3, seed=4, eta=0.5)[0]
    assert off(np.asarray(Image.open(out)), theirs) <= 1
    told = read_settings(out)
    expected = {"prompt": "a red apple", "seed": 4, "steps": 3, "eta": 0.5, "sampler": "ddim", "width": 32}
    assert told is not None
    assert expected.items() <= told.items()


@pytest.mark.slow
def test_the_embedded_models_export_draws_its_pictures(tmp_path):
    assert cli(["--out", str(tmp_path / "out")]) == 0
    prompts = ["a red apple", "a dog, noto style, on a blue background"]
    theirs = jaxdiff.load()(prompts, seed=1)
    ours = load.Model(tmp_path / "out")(prompts, seed=1)
    assert off(ours, theirs) <= 1


@pytest.mark.slow
def test_other_levels_and_weights_of_tokens_are_arguments_too(loaded, pipe):
    levels = make_sigmas("ddim", "karras", pipe.model.scheduler, make_schedule(pipe.model.scheduler), 5)
    ours = loaded(PROMPTS[:1], levels=(levels.sigmas[:5], levels.sigmas_next[:5]))
    assert off(ours, pipe(PROMPTS[:1], size=SIZE, steps=5, schedule="karras")) <= 1

    sigmas, sigmas_next = (np.pad(part, (0, 1000 - 3)) for part in loaded.levels(3))
    ids = np.stack([loaded.tokenizer(["", "a dog"])] * 2)
    token_weights = np.ones(ids.shape)
    token_weights[:, 1, 1 : 1 + len(loaded.tokenizer.encode("a dog"))] = 1.5
    numbers = {"guidance": 7.5, "guidance_rescale": 0, "apg_eta": 1, "apg_norm_threshold": np.inf, "eta": 0}
    ours = loaded.draw(ids=ids, token_weights=token_weights, seeds=[3, 4], sigmas=sigmas, sigmas_next=sigmas_next,
                       steps=3, **numbers)  # fmt: skip
    assert off(ours, pipe(["(a dog:1.5)"] * 2, size=SIZE, steps=3, seed=3)) <= 1


def test_files_are_numbered_and_never_overwritten(folder, tmp_path, capsys):
    for names in (["a-7.png", "a-8.png"], ["a-7-2.png", "a-8-2.png"]):
        words = ["a dog", "--n", "2", "--seed", "7", "--steps", "1", "--out", str(tmp_path / "a.png")]
        assert load.main([*words, "--folder", str(folder)]) == 0
        assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_prompt_that_is_too_long_is_told(folder, tmp_path, capsys):
    words = ["word " * 60, "--steps", "1", "--out", str(tmp_path / "a.png"), "--folder", str(folder)]
    assert load.main(words) == 0
    assert "first 22" in capsys.readouterr().err


# Levels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("ddim", "model"), ("pndm", "model"), ("euler", "beta"), ("lcm", "model")]
)
def test_all_levels_are_those_that_the_sampler_would_take(pipe, sampler, schedule):
    config = replace(pipe.model.scheduler, num_train_timesteps=100)
    levels = all_levels(replace(pipe.program(Request(sampler=sampler)), scheduler=config), schedule)
    assert len(levels["ends"]) == 101
    for steps in (1, 2, 7, 30, 99, 100):
        part = slice(*levels["ends"][steps - 1 : steps + 1])
        try:
            wanted = make_sigmas(sampler, schedule, config, make_schedule(config), steps)
        except ValueError:
            assert part.start == part.stop
            continue
        n = count_steps(wanted)
        assert n == part.stop - part.start > 0
        np.testing.assert_array_equal(levels["sigmas"][part], wanted.sigmas[:n])
        np.testing.assert_array_equal(levels["sigmas_next"][part], wanted.sigmas_next[:n])


# Platforms ------------------------------------------------------------------------------------------------------------


def exported(pipe, platforms, sampler="ddim", kernels=False):
    program, empty = pipe.program(Request(sampler=sampler)), pipe.model.tokenizer([""])[0]
    return export(weights(pipe, "float32")[1], inputs_of(program, 1, len(empty)), program=program, shape=(16, 16, 4),
                  empty=empty, at_sigma=False, platforms=platforms, kernels=kernels)  # fmt: skip


def test_the_program_is_for_all_platforms_and_asks_for_nothing_but_stablehlo(folder):
    about = load.read_about(folder / "program.json")
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["custom_calls"] == []
    assert about["schedule"] == "model"
    text = load.lowered((folder / load.PROGRAM).read_bytes(), about).as_text()
    assert "custom_call" not in text
    assert "stablehlo.case" in text, "each platform takes its own branch"
    assert str(Path(jaxdiff.__file__).parents[1]).encode() not in (folder / load.PROGRAM).read_bytes()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_program_of_one_platform_has_nothing_that_only_another_knows(pipe, platform):
    program = exported(pipe, (platform,))
    assert program.platforms == (platform,)
    assert custom_calls(program) == []


@pytest.mark.tpu_compile
def test_with_kernels_the_program_of_a_tpu_has_its_own(pipe):
    assert custom_calls(exported(pipe, ("tpu",), kernels=True)) == ["tpu_custom_call"]


COMPILE = """
import sys
from pathlib import Path
from jax.experimental import topologies
from jaxdiff.tools.export import load
chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
folder = Path(sys.argv[1])
load.lowered((folder / load.PROGRAM).read_bytes(), load.read_about(folder / "program.json"), chip).compile()
"""


@pytest.mark.tpu_compile
def test_the_tpu_compiler_takes_the_program_that_a_cpu_wrote(folder):
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMPILE, str(folder)], cwd=Path(__file__).parents[1],
                          env=os.environ | settings, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


# One of each kind: with a history, with noise of its own, with two guesses a step. All are exported in one way.
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "heun"])
@pytest.mark.slow
def test_samplers_of_every_kind_can_be_exported_and_draw_their_pictures(pipe, tmp_path, sampler):
    write(Args(tmp_path / "out", sampler=sampler), pipe)
    ours = load.Model(tmp_path / "out")
    assert off(ours("a dog", steps=4, seed=2), pipe("a dog", steps=4, seed=2, sampler=sampler)) <= 1
    with pytest.raises(ValueError, match="no eta"):
        ours("a dog", steps=4, eta=0.5)


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_are_stored_in_the_narrower_of_the_models_type_and_the_programs(model, pipe):
    def kinds(arrays: dict) -> set[str]:
        return {str(array.dtype) for array in arrays.values()}

    half = Pipeline(model.with_params(jax.tree.map(lambda leaf: leaf.astype(np.float16), model.params)))
    assert [kinds(found) for found in weights(half, "float32")] == [{"float16"}, {"float32"}]
    assert [kinds(found) for found in weights(half, "bfloat16")] == [{"float16", "bfloat16"}, {"float32", "bfloat16"}]
    assert [kinds(found) for found in weights(pipe, "float32")] == [{"float32"}, {"float32"}]


@pytest.mark.slow
def test_a_bfloat16_program_draws_what_a_bfloat16_pipeline_does(model, tmp_path):
    half = Pipeline(model, "bfloat16")
    write(Args(tmp_path / "out", dtype="bfloat16"), half)
    ours = load.Model(tmp_path / "out")
    assert off(ours("a dog", steps=3), half("a dog", steps=3)) <= 8  # of rounding to 8 bits


def test_the_encoder_of_pictures_stays_behind_and_all_else_is_needed(folder):
    names = load.read_about(folder / "program.json")["weights"]
    assert "vae/decoder/conv_in/kernel" in names
    assert not [name for name in names if "encoder/" in name and name.startswith("vae")]


# Text -----------------------------------------------------------------------------------------------------------------


def simple(tokenizer: Tokenizer, folder: Path) -> load.Tokenizer:
    tokenizer.save(folder)
    return load.Tokenizer(
        load.read_json(folder / "vocab.json"),
        load.read_merges(folder / "merges.txt"),
        length=tokenizer.max_length,
        start=tokenizer.bos_id,
        end=tokenizer.eos_id,
        pad=tokenizer.pad_id,
        special=tokenizer.special,
    )


def test_the_loaders_tokens_are_the_pipelines(tmp_path):
    theirs = Tokenizer.load(EMBEDDED / "tokenizer", 32)
    ours = simple(theirs, tmp_path)
    np.testing.assert_array_equal(ours(TRICKY), theirs(TRICKY))
    rng = random.Random(0)
    pieces = [*"abc  'stredmlvSΣİßé1\uff12٣½!.,<|>-\"🍎日本\u0301\u200d\u00a0\n\t\x1c\udc80", "apple ", "background",
              "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "'re", "'LL"]  # fmt: skip
    texts = ["".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(3000)]
    assert [ours.encode(text) for text in texts] == theirs.encode(texts)
    np.testing.assert_array_equal(ours(texts), theirs(texts))


@pytest.mark.slow
def test_every_character_that_python_knows_has_the_pipelines_tokens(tmp_path):
    theirs = Tokenizer.load(EMBEDDED / "tokenizer", 32)
    ours = simple(theirs, tmp_path)
    texts = [f"a{c}1b{c}" for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    assert len(texts) > 140_000
    assert [ours.encode(text) for text in texts] == theirs.encode(texts)


def test_a_tokenizer_that_the_loader_does_not_copy_is_not_exported(model, tmp_path):
    class Shouting(Tokenizer):
        def encode(self, texts):
            return super().encode([text.replace("apple", "dog") for text in texts])

    backend = model.tokenizer._backend
    with pytest.raises(ValueError, match="tokenizer is not CLIP's"):
        write(Args(tmp_path / "out"), Pipeline(replace(model, tokenizer=Shouting(backend, 24))))
    assert not (tmp_path / "out").exists()


# Damage ---------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def told(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the loader's command says of a folder that it cannot draw with."""
    before = set(folder.iterdir())
    assert load.main(["a dog", "--out", str(folder / "a.png"), "--folder", str(folder), "--steps", "2", *words]) == 2
    assert set(folder.iterdir()) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", load.FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_is_named(damaged, capsys, name, damage):
    damage(damaged / name)
    assert str(damaged / name) in told(damaged, capsys)


def rewrite(folder: Path, change) -> None:
    """The weights with another header."""
    data = (folder / load.WEIGHTS).read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    text = change(header) or json.dumps(header)
    (folder / load.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + n :])


NAME = "denoiser/conv_in/kernel"


@pytest.mark.parametrize(("damage", "said"), [
    (lambda f: cut(f / load.WEIGHTS), load.WEIGHTS),
    (lambda f: (f / load.WEIGHTS).write_bytes(b""), load.WEIGHTS),
    (lambda f: (f / load.WEIGHTS).write_bytes(b"\xff" * 64), load.WEIGHTS),
    (lambda f: rewrite(f, lambda h: "[" * 100_000), load.WEIGHTS),
    (lambda f: rewrite(f, lambda h: h.pop(NAME) and None), NAME),
    (lambda f: rewrite(f, lambda h: h.update(more=h[NAME])), "more among them"),
    (lambda f: rewrite(f, lambda h: h[NAME].update(shape=[4, 3, 3, 8])), NAME),
    (lambda f: rewrite(f, lambda h: h[NAME].update(shape=[-1])), NAME),
    (lambda f: rewrite(f, lambda h: h[NAME].update(data_offsets=[0, 2**60])), NAME),
    (lambda f: rewrite(f, lambda h: h[NAME].update(dtype="F8")), NAME),
    (lambda f: shutil.copy(f / load.WEIGHTS, f / load.LEVELS), load.LEVELS),
    (lambda f: (f / load.PROGRAM).write_bytes(b"ML\xefR" + b"\0" * 99), load.PROGRAM),
    (lambda f: (f / load.PROGRAM).write_bytes(b""), load.PROGRAM),
    (lambda f: (f / load.VOCAB).write_text('{"a": "b"}'), load.VOCAB),
    (lambda f: (f / load.VOCAB).write_text("[]"), load.VOCAB),
    (lambda f: (f / load.MERGES).write_text("a b c\n"), load.MERGES),
])  # fmt: skip
def test_a_file_that_was_made_wrong_is_refused_though_its_checksum_is_right(damaged, capsys, damage, said):
    damage(damaged)
    sign(damaged)
    assert said in told(damaged, capsys)


@pytest.mark.parametrize(("changes", "said"), [
    ({"format": 2}, "format is 2"),
    ({"platforms": "cpu"}, "platforms"),
    ({"platforms": ["tpu"]}, "for tpu"),
    ({"weights": None}, "weights"),
    ({"weights": {"a": {"shape": [-1], "dtype": "float32"}}}, "weights"),
    ({"weights": {"a": {"shape": [1], "dtype": "object"}}}, "weights"),
    ({"weights": {}}, NAME.partition("/")[0]),
    ({"inputs": {}}, "inputs"),
    ({"outputs": {"images": {"shape": [1], "dtype": "uint8"}}}, "outputs"),
    ({"calling_convention_version": 10_000}, "10000"),
    ({"tokenizer": {"length": 24}}, "tokenizer"),
    ({"platforms": ["cpu"]}, load.PROGRAM),
])  # fmt: skip
def test_a_program_json_that_makes_no_sense_is_refused(damaged, capsys, changes, said):
    sign(damaged, **changes)
    assert said in told(damaged, capsys)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": 1}'])
def test_a_program_json_that_is_none_is_refused(damaged, capsys, text):
    (damaged / "program.json").write_text(text)
    assert "program.json" in told(damaged, capsys)


@pytest.mark.parametrize(("words", "said"), [
    (["--steps", "0"], "steps is 0; .*1 to 999"),
    (["--steps", "1000"], "steps is 1000; .*1 to 999"),
    (["--seed", "-1"], "seed is -1; .*0 to 4294967295"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--guidance", "1e38"], "overflowed"),
    (["--n", "0"], "--n is 0; .*1"),
    (["--out", "a.jpg"], r"a\.jpg; .*\.png"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_a_sentence(folder, capsys, words, said):
    assert re.search(said, told(folder, capsys, *words))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["--batch", "0"], "--batch is 0; .*1"),
    (["--kernels"], "--kernels .*cpu cuda tpu"),
    (["--platforms", "cpu", "cpu"], "--platforms is cpu cpu"),
    (["--sampler", "dim"], "sampler is 'dim'.*'ddim'"),
    (["--model", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_cannot_be_exported_is_told_in_a_sentence(tmp_path, capsys, words, said):
    assert cli(["--out", str(tmp_path / "out"), *words]) == 2
    assert re.match(f"error: .*{said}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_export_takes_the_place_of_an_older_one(pipe, folder, tmp_path):
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    (out / "__pycache__").mkdir()  # which Python makes when it imports load.py
    write(Args(out, platforms=("cpu",)), pipe)
    assert load.read_about(out / "program.json")["platforms"] == ["cpu"]


def test_a_size_that_the_model_cannot_draw_is_told_and_so_is_a_model_for_inpainting(pipe, tmp_path):
    with pytest.raises(ValueError, match="draws with an image"):
        write(Args(tmp_path / "out"), Pipeline(tiny.inpainting_model()))
    with pytest.raises(ValueError, match=r"33x32.*2"):
        write(Args(tmp_path / "out", size="33x32"), pipe)
