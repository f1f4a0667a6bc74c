"""Sources: the emoji set, folders of a user's own, TFDS sets."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.images import decode
from jaxdiff.data.record import BadRecord
from jaxdiff.data.sources import open_source

DATA = Path(__file__).parent / "data"


def folder(root: Path, *lines: object) -> DataConfig:
    """A folder source of one picture, `a.png`, and the given metadata."""
    Image.new("RGB", (8, 8)).save(root / "a.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return DataConfig(source="folder", root=str(root))


def test_the_emoji_fixture_has_all_styles_splits_and_labels():
    splits = {name: open_source(DataConfig(root=str(DATA), split=name)) for name in ("train", "test", "heldout")}
    assert {name: len(source) for name, source in splits.items()} == {"train": 131, "test": 2, "heldout": 6}
    captions = {name: [source.record(i).caption for i in range(len(source))] for name, source in splits.items()}
    assert {c.style for c in captions["train"]} == {"3d", "flat", "gradient", "high contrast", "noto", "blob"}
    labels = {name: {c.label for c in members} for name, members in captions.items()}
    assert "bicycle" not in labels["train"]
    assert labels["test"] <= labels["train"]
    assert not labels["heldout"] & labels["train"]
    image = decode(splits["train"].record(0).image)
    assert (image.size, image.mode) == ((64, 64), "RGBA")
    assert all(c.keywords and not c.colour for c in captions["train"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"root": "nowhere"}, "run `python -m jaxdiff.tools.prepare emoji --data-dir nowhere`"),
        ({"root": str(DATA), "size": 128}, "--size 128"),
        ({"root": str(DATA), "split": "tran"}, "did you mean 'train'"),
        ({"root": str(DATA), "source": "nosuchset"}, "no TFDS data set 'nosuchset'"),
        ({"root": str(DATA), "source": "emojis"}, "did you mean 'emoji'"),
        ({"root": "nowhere", "source": "mnist"}, "'mnist' is not prepared in nowhere"),
        ({"root": "nowhere", "source": "folder"}, "nowhere is not a folder"),
        ({"root": "nowhere", "source": "latents"}, "no cached latents"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_do(values, said):
    with pytest.raises(ValueError, match=said):
        open_source(DataConfig(**values))


def test_a_folder_is_read_by_its_metadata(tmp_path):
    config = folder(
        tmp_path, {"file_name": "a.png", "text": " a dog "}, "", {"file_name": "a.png", "text": "b", "style": "c"}
    )
    source = open_source(config)
    assert [source.record(i).caption.full() for i in range(len(source))] == ["a dog", "b, c style"]
    assert source.name(0) == "a.png"
    assert decode(source.record(0).image).size == (8, 8)


def test_a_folder_is_read_by_the_texts_beside_the_pictures(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.jpg", "second\n"), ("a.png", "the\nfirst"), ("deep/c.PNG", "third")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(DataConfig(source="folder", root=str(tmp_path)))
    assert [source.record(i).caption.label for i in range(len(source))] == ["the first", "second", "third"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "x/../../a.png"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    config = folder(tmp_path, {"file_name": "a.png", "text": "a dog"}, {"file_name": name, "text": "b"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2 names .* must lie within"):
        open_source(config)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 1 is not JSON"),
        ("[1, 2]", 'needs a "file_name"'),
        ({"text": "a dog"}, 'needs a "file_name"'),
        ({"file_name": 3, "text": "a dog"}, 'needs a "file_name"'),
        ({"file_name": "a.png", "text": "a dog", "style": 5}, "needs a string"),
        ({"file_name": "a.png", "text": "a dog", "keywords": "abc"}, "list of strings"),
        ({"file_name": "a.png", "text": "a dog", "keywords": 5}, "list of strings"),
        ("[" * 100_000, "line 1 is not JSON"),
        ({"file_name": "a.png", "text": None}, "1 images and no captions"),
        ("", "holds no images"),
    ],
)
def test_metadata_that_makes_no_sense_is_said_with_its_line(tmp_path, line, said):
    with pytest.raises(ValueError, match=said):
        open_source(folder(tmp_path, line))


def test_pictures_without_any_caption_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images and no captions"):
        open_source(DataConfig(source="folder", root=str(tmp_path)))


def test_a_picture_without_a_caption_or_a_file_is_a_bad_record(tmp_path):
    rows = [{"file_name": "a.png", "text": t} for t in ("a dog", "")]
    source = open_source(
        folder(tmp_path, *rows, {"file_name": "gone.png", "text": "x"}, {"file_name": "a\0", "text": "x"})
    )
    for index, said in ((1, "no caption"), (2, "No such file"), (3, "null")):
        with pytest.raises(BadRecord, match=said):
            source.record(index)


def test_any_tfds_set_is_read_by_its_fields_and_class_names_become_captions(tmp_path):
    class Digits(tfds.core.GeneratorBasedBuilder):
        """Two pictures."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "picture": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "digit": tfds.features.ClassLabel(names=["zero", "one"]),
                "words": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(2):
                out = io.BytesIO()
                Image.fromarray(np.full((28, 28), 100 * i, np.uint8)).save(out, "PNG")
                out.seek(0)
                yield i, {"picture": out, "digit": i, "words": f"number {i}"}

    Digits(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    config = DataConfig(source="digits", root=str(tmp_path), image_field="picture", text_field="digit")
    source = open_source(config)
    seen = {source.record(i).caption.label: np.asarray(decode(source.record(i).image))[0, 0, 0] for i in range(2)}
    assert seen == {"zero": 0, "one": 100}
    assert source.sizes().tolist() == [[28, 28]] * 2
    texts = open_source(DataConfig(source="digits", root=str(tmp_path), image_field="picture", text_field="words"))
    assert {texts.record(i).caption.full() for i in range(2)} == {"number 0", "number 1"}
    with pytest.raises(
        ValueError, match=r"no field 'pictures' fit for DataConfig\.image_field; did you mean 'picture'"
    ):
        open_source(DataConfig(source="digits", root=str(tmp_path), image_field="pictures", text_field="digit"))
    with pytest.raises(ValueError, match=r"no field 'picture' fit for DataConfig\.text_field"):
        open_source(DataConfig(source="digits", root=str(tmp_path), image_field="picture", text_field="picture"))


def test_a_damaged_file_costs_the_records_it_hits_and_no_others(tmp_path):
    shutil.copytree(DATA / "emoji", tmp_path / "emoji")
    path = next(tmp_path.glob("emoji/64px/*/emoji-train.array_record*"))
    data = bytearray(path.read_bytes())
    middle = data.index(b"\x89PNG", 100_000) + 200
    data[middle] ^= 255
    path.write_bytes(data)
    source, whole = (open_source(DataConfig(root=str(root))) for root in (tmp_path, DATA))
    bad = []
    for i in range(len(source)):
        try:
            assert source.record(i) == whole.record(i)
        except BadRecord:
            bad.append(source.name(i))
    assert len(bad) == 1
    assert bad[0].startswith("emoji/64px train record ")
