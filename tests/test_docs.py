"""README's commands and the pages' snippets do what they say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import jaxdiff
from jaxdiff.sampling.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """The working directory is empty, and no sampler stays registered."""
    before = dict(SAMPLERS)
    monkeypatch.chdir(tmp_path)
    yield
    SAMPLERS.clear()
    SAMPLERS.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/extending.md", "docs/evaluation.md"])
def test_every_snippet_runs(page, in_a_folder):
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)  # README's build on each other
        if "image" in names:
            assert names["image"].shape == (64, 64, 3)


@pytest.mark.slow
def test_the_loop_of_ones_own_draws_what_the_pipeline_draws(in_a_folder):
    names: dict = {}
    exec(next(code for code in blocks("README.md", "python") if "denoiser(" in code), names)
    drawn = jaxdiff.load()("a red apple", guidance=5, steps=20, sampler="euler")[0]
    assert np.abs(names["image"].astype(int) - drawn).max() <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model FOLDER, and PICTURES with captions."""
    root = tmp_path_factory.mktemp("docs")
    tiny.model().save(root / "FOLDER")
    (root / "PICTURES").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(root / "PICTURES" / f"{i}.png")
        (root / "PICTURES" / f"{i}.txt").write_text("a dog")
    (root / "prompts.jsonl").write_text('{"prompt": "a dog", "steps": 2}\n')
    return root


QUICKER = {
    "train.py": "--steps 2 --data.batch_size 2 --data.size 16 --mesh.data 1 --mesh.fsdp 1 --data.workers 0 "
    "--task.prompts dog --task.latent_variants 0 --task.text_variants 0 --optim.accumulate 1",
    "sample.py": "--steps 2",
}
COMMANDS = [line for block in blocks("README.md", "text") for line in block.splitlines()]


def test_readme_has_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.slow
def test_readmes_commands_for_weights_of_ones_own_and_training_run(folder):
    for line in COMMANDS:
        words = shlex.split(line)
        if any(tool in line for tool in ("jaxdiff.tools.serve", "jaxdiff.tools.plan")):
            # A server does not end, and the TPU's compiler is an extra: that they know these arguments is checked.
            words = [*words, "--help"]
        words += shlex.split(QUICKER.get(words[1], ""))
        words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
        environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *words[1:]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
