"""A batch's folder: whatever stops a process, each picture is there once, whole and listed."""

import html.parser
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.generation.batch.files import Line
from jaxdiff.generation.batch.groups import Job, jobs_of
from jaxdiff.generation.batch.store import Store, fingerprint
from jaxdiff.generation.request import Request
from jaxdiff.io.images import read_image, read_settings

HOSTILE = "<script>alert(1)</script>\"'&lt; {0} {n} </figure><!-- \u202e 日本 \\"


def wanted(*prompts: str, n: int = 1) -> list[Job]:
    return list(jobs_of(Line(i, Request(prompt, n=n)) for i, prompt in enumerate(prompts, 1)))


def drawn(job: Job) -> np.ndarray:
    """What a picture is a pure function of: its seed and prompt."""
    words = [job.seed, *job.request.prompt.encode()]
    return np.random.default_rng(words).integers(0, 256, (6, 8, 3), np.uint8)


def settings(job: Job) -> dict:
    return {"prompt": job.request.prompt, "seed": job.seed, "width": 8, "height": 6}


def draw(store: Store, at_most: int = 10**9) -> int:
    todo = store.missing()[:at_most]
    for job in todo:
        store.add(job, drawn(job), settings(job))
    return len(todo)


def opened(folder: Path, those: list[Job], **options) -> Store:
    return Store(folder, {"requests": fingerprint(those), "model": "m"}, those, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_whole(folder: Path, those: list[Job], indices: int = 1) -> None:
    """Each picture is there once, equal to what it should be, listed once, and nothing else is there."""
    with opened(folder, those) as store:
        assert store.missing() == []
        names = [store.name(job) for job in those]
        for job, name in zip(those, names, strict=True):
            np.testing.assert_array_equal(read_image(folder / name), drawn(job))
            assert read_settings(folder / name) == settings(job)
        assert [entry["file"] for entry in store.entries()] == names
    there = {name for name in contents(folder) if not name.endswith(".jsonl")}
    assert there - {"index.html", "contact-sheet.png"} == {*names, "batch.json"}


def test_pictures_are_named_by_line_and_seed_and_listed_once_they_are_whole(tmp_path):
    those = wanted("a red apple", "日本", n=2)
    with opened(tmp_path / "new" / "out", those) as store:
        assert store.missing() == those
        path = store.add(those[1], drawn(those[1]), settings(those[1]))
        assert path.name == "00001-a-red-apple-1.png"
        assert store.missing() == [those[0], *those[2:]]
        (line,) = (store.folder / "images.jsonl").read_text().splitlines()
        assert json.loads(line) == {"file": path.name, "line": 1, "seed": 1, "bytes": path.stat().st_size,
                                    "settings": settings(those[1])}  # fmt: skip
        assert store.name(those[2]) == "00002-image-2.png"
        draw(store)
    check_whole(tmp_path / "new" / "out", those)


def test_the_same_command_again_draws_only_what_is_missing(tmp_path):
    those = wanted("a", "b", "c", n=2)
    with opened(tmp_path, those) as store:
        assert draw(store, 4) == 4
    before = contents(tmp_path)
    with opened(tmp_path, those) as store:
        assert draw(store) == 2
    after = contents(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".png"))
    with opened(tmp_path, those) as store:
        assert draw(store) == 0
    check_whole(tmp_path, those)


def test_a_line_that_was_only_begun_is_drawn_again_wherever_it_was_cut(tmp_path):
    those = wanted("a", HOSTILE, "c")
    with opened(tmp_path, those) as store:
        draw(store, 2)
    whole = (tmp_path / "images.jsonl").read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        (tmp_path / "images.jsonl").write_bytes(whole[:cut])
        with opened(tmp_path, those) as store:
            assert store.missing() == those[1:]
            assert draw(store, 1) == 1
        assert (tmp_path / "images.jsonl").read_bytes() == whole
    with opened(tmp_path, those) as store:
        draw(store)
    check_whole(tmp_path, those)


def test_pictures_that_are_gone_cut_or_half_written_are_drawn_again(tmp_path):
    those = wanted("a", "b", "c", "d", "e")
    with opened(tmp_path, those) as store:
        draw(store)
        names = [store.name(job) for job in those]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:50])
    (tmp_path / f".{names[2]}.0.partial").write_bytes(b"half")  # killed while it drew the picture anew
    (tmp_path / ".batch.json.0.partial").write_bytes(b"{")
    with opened(tmp_path, those) as store:
        assert store.missing() == those[:2]
        assert not list(tmp_path.glob(".*"))
        draw(store)
    check_whole(tmp_path, those)


def test_damage_in_the_middle_of_the_index_costs_its_lines_alone(tmp_path):
    those = wanted("a", "b", "c", "d")
    with opened(tmp_path, those) as store:
        draw(store)
    index = tmp_path / "images.jsonl"
    lines = index.read_bytes().splitlines()
    junk = [b"\xff\0", b"[]", b"7", b'{"file": 3}', b"[" * 100_000,
            b'{"file": "../x", "line": 1, "seed": 1, "bytes": 1, "settings": {}}',
            b'{"file": "..", "line": 1, "seed": 1, "bytes": 4096, "settings": {}}',
            b'{"file": "a\\u0000b", "line": 1, "seed": 1, "bytes": 1, "settings": {}}']  # fmt: skip
    index.write_bytes(b"\n".join([lines[0], lines[1][:20], *junk, *lines[2:], lines[3], b""]))
    with opened(tmp_path, those) as store:
        assert store.missing() == [those[1]]
        draw(store)
    check_whole(tmp_path, those)


def test_another_batch_in_the_same_folder_is_told(tmp_path):
    those = wanted("a", "b")
    with opened(tmp_path, those) as store:
        draw(store)
    before = contents(tmp_path)
    for other in (wanted("a", "c"), wanted("a"), wanted("a", "b", n=2)):
        with pytest.raises(ValueError, match=r"requests was '\w{16}' and is '\w{16}'"):
            opened(tmp_path, other)
    with pytest.raises(ValueError, match="model was 'm' and is 'x'"):
        Store(tmp_path, {"requests": fingerprint(those), "model": "x"}, those)
    with pytest.raises(ValueError, match=r"format was 'png' and is 'jpeg'"):
        opened(tmp_path, those, format="jpeg")
    (tmp_path / "batch.json").write_text("{")
    with pytest.raises(ValueError, match=r"batch\.json is not JSON"):
        opened(tmp_path, those)
    assert {**contents(tmp_path), "batch.json": b""} == {**before, "batch.json": b""}


def test_files_that_are_not_of_the_batch_are_never_touched(tmp_path):
    those = wanted("a", "b")
    (tmp_path / "holiday.png").write_bytes(b"mine")
    (tmp_path / "00002-b-1.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"00002-b-1\.png"):
        opened(tmp_path, those)
    assert contents(tmp_path) == {"holiday.png": b"mine", "00002-b-1.png": b"mine"}
    (tmp_path / "00002-b-1.png").unlink()
    with opened(tmp_path, those) as store:
        draw(store)
        store.finish()
    assert (tmp_path / "holiday.png").read_bytes() == b"mine"


def test_a_fingerprint_changes_with_any_argument_and_the_images_contents(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(image)

    def of(**arguments) -> str:
        return fingerprint(jobs_of([Line(1, Request.of({"prompt": "a", "image": str(image)} | arguments))]))

    base = of()
    assert of() == base
    moved = tmp_path / "b.png"
    moved.write_bytes(image.read_bytes())
    assert of(image=str(moved)) == base
    box = [{"prompt": "b", "box": [0, 0, 1, 0.5]}]
    changed = [{"prompt": "b"}, {"negative_prompt": "b"}, {"seed": 7}, {"n": 2}, {"steps": 7}, {"guidance": 1.0},
               {"guidance_interval": (0.0, 1.0)}, {"sampler": "euler"}, {"schedule": "karras"}, {"eta": 0.5},
               {"cache_interval": 2}, {"size": (2, 4)}, {"strength": 0.5}, {"mask": str(image)}, {"image": None},
               {"invert": "ddim"}, {"invert": "exact", "source_prompt": "b"}, {"invert": "exact", "keep_layout": 0.5},
               {"regions": box}, {"outpaint": (0, 2, 0, 0)}, {"upscale": 2}, {"to_prompt": "b"}, {"to_seed": 1},
               {"to_seed": 1, "mix": 0.25}, {"outpaint": (0, 2, 0, 0), "feather": 1}, {"tile": 8}, {"rng": "torch"},
               {"guidance_rescale": 0.5}, {"apg_eta": 0}, {"apg_norm_threshold": 1}, {"latent_upscale": 2},
               {"pag_scale": 3}, {"literal": True}, {"apg_momentum": -0.5}, {"clip_skip": 1},
               {"original_size": (2, 4)}, {"crop": (1, 2)}, {"aesthetic_score": 5.0},
               {"refiner_start": 0.5}, {"depth": str(image)}, {"image_guidance": 2.0},
               {"control_image": (str(image),)}, {"control_image": (str(image),) * 2},
               {"control_image": str(image), "control_scale": 0.5}, {"control_image": str(image), "control_start": 0.5},
               {"control_image": str(image), "control_end": 0.5}, {"control_image": str(image), "control_guess": True},
               {"image_prompt": (str(image),)}, {"image_prompt": (str(image),), "image_prompt_scale": 0.5},
               {"noise_level": 3},
               ]  # fmt: skip
    assert {one.name for one in fields(Request)} - {"latents"} == {name for change in changed for name in change}
    assert len({base, *(of(**change) for change in changed)}) == 1 + len(changed)
    Image.new("RGB", (2, 2), "red").save(image)
    assert of() != base


def test_two_processes_do_not_draw_the_same_part_at_once(tmp_path):
    those = wanted("a")
    with opened(tmp_path, those), pytest.raises(ValueError, match="Another process"):
        opened(tmp_path, those)
    opened(tmp_path, those).close()


def test_several_processes_share_a_folder(tmp_path):
    those = wanted(*"abcdefg", n=2)
    stores = [opened(tmp_path, those, index=k, count=3) for k in range(3)]
    assert sorted(p.index for store in stores for p in store.missing()) == list(range(14))
    for store in stores:
        draw(store, 3)
        store.close()
    # A process whose number is no more left something behind; the others' is theirs to sweep.
    (tmp_path / ".x.png.2.partial").write_bytes(b"")
    with opened(tmp_path, those, index=1, count=2) as one:
        assert (tmp_path / ".x.png.2.partial").exists()
        with opened(tmp_path, those, index=0, count=2) as none:
            assert not (tmp_path / ".x.png.2.partial").exists()
            assert len(one.missing()) + len(none.missing()) == 5
            draw(one)
            draw(none)
    check_whole(tmp_path, those)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "images-0.jsonl", "images-1.jsonl", "images-2.jsonl", "images.jsonl",
    ]  # fmt: skip


def test_threads_may_add_at_once(tmp_path):
    those = wanted(*(f"p{i}" for i in range(40)))
    with opened(tmp_path, those) as store:
        threads = [threading.Thread(target=lambda k=k: [store.add(p, drawn(p), settings(p)) for p in those[k::4]])
                   for k in range(4)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    check_whole(tmp_path, those)


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import draw, opened, wanted
those = wanted(*(f"p{{i}}" for i in range(60)), n=2)
with opened(Path(sys.argv[1]), those) as store:
    print("ready", flush=True)
    draw(store)
    store.finish()
"""


@pytest.mark.slow
def test_a_batch_that_is_killed_again_and_again_equals_an_unbroken_one(tmp_path):
    those = wanted(*(f"p{i}" for i in range(60)), n=2)
    with opened(tmp_path / "unbroken", those) as store:
        draw(store)
        store.finish()
    rng = random.Random(0)
    command = [sys.executable, "-c", WORKER.format(tests=str(Path(__file__).parent)), str(tmp_path / "killed")]
    kills = 0
    for _ in range(30):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            if kills < 3:
                process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 2
    check_whole(tmp_path / "killed", those)
    unbroken, killed = contents(tmp_path / "unbroken"), contents(tmp_path / "killed")
    del unbroken["index.html"], killed["index.html"]  # their titles are the folders' names
    assert unbroken == killed


def test_without_metadata_nothing_says_what_was_asked_for(tmp_path):
    those = wanted("secret words")
    with opened(tmp_path, those, metadata=False) as store:
        draw(store)
        store.finish()
    assert "00001-0.png" in contents(tmp_path)
    assert not any(b"secret" in data or "secret" in name for name, data in contents(tmp_path).items())


@pytest.mark.parametrize(("format", "ending"), [("jpeg", "jpg"), ("webp", "webp")])
def test_other_formats_are_kept_as_well(tmp_path, format, ending):
    those = wanted("a")
    with opened(tmp_path, those, format=format) as store:
        draw(store)
        assert store.name(those[0]) == f"00001-a-0.{ending}"
    assert read_settings(tmp_path / f"00001-a-0.{ending}") == settings(those[0])


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out.*Not a directory"):
        opened(tmp_path / "file" / "out", wanted("a"))
    with pytest.raises(ValueError, match=r"format is 'bmp'.*webp"):
        opened(tmp_path / "out", wanted("a"), format="bmp")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_line_that_does_not_fit_on_the_disk_is_told(tmp_path):
    those = wanted("a", "b")
    with opened(tmp_path, those) as store:
        full = os.open("/dev/full", os.O_WRONLY)
        kept = os.dup(store._index.fileno())
        os.dup2(full, store._index.fileno())
        with pytest.raises(ValueError, match=r"00001-a-0\.png.*No space left"):
            draw(store, 1)
        os.dup2(kept, store._index.fileno())
        os.close(full)
        os.close(kept)
        assert store.missing() == those
        draw(store)
    check_whole(tmp_path, those)


class Reader(html.parser.HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside of scripts."""

    def __init__(self):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements[-1:] and self.elements[-1][0] not in ("script", "style"):
            self.text += data


def test_the_page_shows_every_picture_and_believes_no_prompt(tmp_path):
    those = wanted("a dog", HOSTILE, "a cat")
    with opened(tmp_path, those) as store:
        draw(store)
        path, sheet = store.finish("<b>title</b>")
    assert read_image(sheet).shape[2] == 3
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    tags = [tag for tag, _ in reader.elements]
    assert (tags.count("figure"), tags.count("img"), tags.count("script"), tags.count("b")) == (3, 3, 1, 0)
    images = [attributes for tag, attributes in reader.elements if tag == "img"]
    for attributes, job in zip(images, those, strict=True):
        assert (tmp_path / attributes["src"]).is_file()
        assert attributes["loading"] == "lazy"
        assert (attributes["width"], attributes["height"]) == ("8", "6")
        assert attributes["alt"] == job.request.prompt
        assert set(attributes) == {"src", "loading", "alt", "width", "height"}
    assert HOSTILE in reader.text
    assert "line 2, seed 1" in reader.text
    assert "3 of 3" in reader.text
    assert not any(word in text for word in ("http:", "https:", "//"))


def test_the_page_is_there_without_pictures(tmp_path):
    with opened(tmp_path, wanted("a")) as store:
        assert "0 of 0" in store.finish()[0].read_text()
        assert store.sheet() is None


def test_the_contact_sheet_holds_pictures_of_any_size(tmp_path):
    those = wanted("a", "b", "c")
    with opened(tmp_path, those) as store:
        for job, shape in zip(those, ((6, 8, 3), (8, 4, 3), (2, 2, 3)), strict=True):
            store.add(job, np.zeros(shape, np.uint8), settings(job))
        sheet = store.sheet()
        assert sheet is not None
        assert (sheet == 0).all(-1).sum() >= 20 * 20 * (48 + 32 + 4)
        assert store.sheet(2).shape[1] == sheet.shape[1]
