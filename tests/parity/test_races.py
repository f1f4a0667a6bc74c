"""Races of the benchmark against diffusers, whose program runs in a process of its own."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["unet --runs 3", "text --runs 3", "sample --steps 2 --runs 2", "vae --runs 2"])
def test_the_other_process_gives_what_ours_gives_and_is_watched(command, tmp_path):
    out = tmp_path / "race.json"
    words = [*command.split(), "--model", "emoji", "--vs", "diffusers", "--json", str(out)]
    env = os.environ | {"XLA_FLAGS": ""}  # on one device
    env.pop("JAX_NUM_CPU_DEVICES", None)
    run = subprocess.run([sys.executable, "-m", "jaxdiff.tools.bench", *words], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (rival,) = json.loads(out.read_text())["results"][0]["versus"]
    assert rival["error"] < (0.5 if command.startswith("sample") else 1e-5)
    assert len(rival["ratio"]["runs"]) == int(command[-1])
    if sys.platform == "linux":
        assert rival["beside"] >= 0  # of a core; how much depends on what else the machine does
        assert min(rival["alive"]) > 1
