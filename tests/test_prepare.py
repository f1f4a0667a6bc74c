"""Making the emoji set: its sources are checked, its splits are honest, its drawings are whole."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

emoji = pytest.importorskip("jaxdiff.data.emoji", reason="needs the `data` extra", exc_type=ImportError)

ICONS = {
    "prefix": "x",
    "width": 32,
    "height": 32,
    "icons": {
        "half": {"body": '<path fill="#f00" d="M0 0h16v32h-16z"/>'},
        "wide": {"body": '<path fill="#00f" d="M0 0h64v32h-64z"/>', "width": 64},
    },
    "aliases": {"flah": {"parent": "half", "hFlip": True}},
}


def drawn(name: str) -> Image.Image:
    return Image.open(io.BytesIO(emoji._png(emoji._svg(ICONS, name), 64)))


def prepare(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys; {code or 'pass'}; runpy.run_module('jaxdiff.tools.prepare', run_name='__main__')"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_an_alias_that_is_flipped_is_drawn_flipped():
    half = drawn("half")
    assert (half.size, half.mode) == ((64, 64), "RGBA")
    assert (np.asarray(drawn("flah")) == np.asarray(ImageOps.mirror(half))).all()
    assert half.getpixel((0, 0)) == (255, 0, 0, 255)
    assert half.getpixel((63, 0)) == (0, 0, 0, 0)


def test_a_wide_icon_keeps_its_shape_within_the_square():
    alpha = np.asarray(drawn("wide"))[..., 3]
    assert alpha.shape == (64, 64)
    assert (alpha[16:48] == 255).all()
    assert (alpha[:16] == 0).all()
    assert (alpha[48:] == 0).all()


def test_an_icon_that_is_not_there_is_not_drawn():
    assert emoji._svg(ICONS, "none") is None


def test_hexcodes_of_all_spellings_meet():
    assert emoji._key("1F636-200D-1F32B-FE0F") == emoji._key("1f636-200d-1f32b") == emoji._key("1F636_200D_1F32B")


def test_the_splits_have_their_shares_and_a_tested_concept_is_always_trained_on():
    concepts = [{"hexcode": f"{i:x}", "label": f"thing {i}"} for i in range(3000)]
    splits = [emoji._splits(concept, list(emoji.STYLES)) for concept in concepts]
    assert splits == [emoji._splits(concept, list(emoji.STYLES)) for concept in concepts]
    flat = [split for members in splits for split in members]
    assert abs(flat.count("heldout") / len(flat) - emoji.HELDOUT_SHARE) < 0.01
    assert abs(flat.count("test") / len(flat) - emoji.TEST_SHARE) < 0.01
    assert all("train" in s for s in splits if "test" in s)
    assert all(set(s) == {"heldout"} for s in splits if "heldout" in s)
    assert all(emoji._splits(concept, ["3d"]) != ["test"] for concept in concepts)


def test_concepts_that_differ_in_gender_alone_are_held_out_together():
    for i in range(200):
        labels = (f"man doing {i}", f"woman doing {i}", f"person doing {i}")
        splits = [emoji._splits({"hexcode": f"{label:.3}{i}", "label": label}, ["flat"])[0] for label in labels]
        assert len({split == "heldout" for split in splits}) == 1


def test_a_tarball_of_another_content_is_refused(tmp_path):
    (tmp_path / emoji.LABELS.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"emojibase-data-17\.0\.0\.tgz has the SHA-256 .* delete it"):
        emoji.fetch(emoji.LABELS, tmp_path)


def test_without_npm_the_command_says_what_to_do_and_leaves_nothing_behind(tmp_path):
    done = prepare("emoji", "--data-dir", str(tmp_path), PATH="")
    assert done.returncode == 2
    assert "npm, which would bring it, is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.array_record*"))


def test_an_npm_that_fails_is_quoted(tmp_path):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho npm error code E404 >&2\nexit 1\n")
    npm.chmod(0o755)
    done = prepare("emoji", "--data-dir", str(tmp_path), PATH=f"{npm.parent}:/bin:/usr/bin")
    assert done.returncode == 2
    assert "`npm pack emojibase-data@17.0.0` failed: code E404" in done.stderr


def test_without_the_data_extra_the_command_says_so(tmp_path):
    done = prepare("emoji", "--data-dir", str(tmp_path), code="sys.modules['resvg_py'] = None")
    assert done.returncode == 2
    assert "pip install -e '.[data]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_tfds_does_not_know_is_refused(tmp_path):
    done = prepare("emojii", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert "'emojii' is neither emoji nor" in done.stderr
