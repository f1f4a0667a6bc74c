"""Odd images and captions (`odd.py`) through every source: the right value, or a bad record with name and reason."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import odd
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.images import decode, prepare
from jaxdiff.data.loader import batches
from jaxdiff.data.readers import Bad, Collection, LeftOut
from jaxdiff.data.record import BadRecord, Record, Source
from jaxdiff.data.sources import open_source, summary
from jaxdiff.data.tokens import Tokenizer

PLAIN = odd.IMAGES["8-bits.bmp"][0]
Rows = list[tuple[str, bytes, bytes]]
"""Name, image, caption."""
Found = dict[str, Record | str]
"""Name -> the record, or the reason why it is bad."""


def from_source(source: Source) -> Found:
    found: Found = {}
    for i in range(len(source)):
        try:
            found[source.name(i)] = source.record(i)
        except BadRecord as error:
            found[source.name(i)] = str(error)
    return found


def from_collection(path: Path, **fields: str) -> Found:
    collection, found = Collection(str(path), **fields), {}
    for unit in collection.units():
        for one in collection.read(unit):
            if not isinstance(one, LeftOut):
                found[one.name] = (
                    f"{one.reason} ({one.detail})" if isinstance(one, Bad) else Record(one.caption, one.data)
                )
    return found


def write_sidecars(root: Path, rows: Rows, suffix: str = ".txt") -> Path:
    for name, image, caption in rows:
        (root / name).write_bytes(image)
        (root / name).with_suffix(suffix).write_bytes(caption)
    return root


def write_lines(root: Path, rows: Rows) -> Path:
    lines = []
    for name, image, caption in rows:
        (root / name).write_bytes(image)
        row = {"file_name": name, "caption": caption.decode("utf-8", "surrogateescape")}
        lines.append(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape"))
    (root / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    return root


def write_csv(root: Path, rows: Rows) -> Path:
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "likes"])
        for name, image, caption in rows:
            (root / name).write_bytes(image)
            writer.writerow([name, caption.decode("utf-8", "surrogateescape"), 3])
    return root


def write_tar(root: Path, rows: Rows) -> Path:
    members = [
        (Path(name).with_suffix(end).name, data)
        for name, image, text in rows
        for end, data in ((Path(name).suffix, image), (".txt", text))
    ]
    return tar(root / "a.tar", *members)


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(root: Path, rows: Rows) -> Path:
    pa, pq = (pytest.importorskip(name, reason="needs the `beam` extra") for name in ("pyarrow", "pyarrow.parquet"))
    texts = pa.array([caption for _, _, caption in rows], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [image for _, image, _ in rows], "text": texts}), root / "a.parquet")
    return root / "a.parquet"


def write_tfds(root: Path, rows: Rows, features: dict | None = None, **fields: list) -> Path:
    class Odd(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Whatever `rows` holds."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features_ = {"image": tfds.features.Image(), "caption": tfds.features.Text()} | (features or {})
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features_), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (_, image, caption) in enumerate(rows):
                more = {name: values[i] for name, values in fields.items()}
                yield i, {"image": io.BytesIO(image), "caption": caption} | more

    Odd(data_dir=root).download_and_prepare(file_format="array_record")
    return root


def folder(path: Path) -> Found:
    return from_source(open_source(DataConfig(source="folder", root=str(path))))


def tfds_set(path: Path, text_field: str = "caption") -> Found:
    return from_source(open_source(DataConfig(source="odd", root=str(path), text_field=text_field)))


DOORS: dict[str, tuple[Callable[[Path, Rows], Path], Callable[[Path], Found]]] = {
    "folder": (write_sidecars, folder),
    "folder of .caption": (lambda root, rows: write_sidecars(root, rows, ".caption"), folder),
    "metadata.jsonl": (write_lines, folder),
    "metadata.csv": (write_csv, folder),
    "collected folder": (write_sidecars, from_collection),
    "collected metadata.jsonl": (write_lines, from_collection),
    "tar": (write_tar, from_collection),
    "parquet": (write_parquet, from_collection),
    "tfds": (write_tfds, tfds_set),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_caption_is_its_text_or_a_named_bad_record(tmp_path, door):
    write, read = DOORS[door]
    captions = {bytes_: text for bytes_, text in odd.CAPTIONS.items() if door != "metadata.csv" or b"\0" not in bytes_}
    found = read(write(tmp_path, [(f"{i:03}.bmp", PLAIN, caption) for i, caption in enumerate(captions)]))
    assert len(found) == len(captions)
    texts = [one.caption.full() if isinstance(one, Record) else None for _, one in sorted(found.items(), key=number)]
    assert texts == list(captions.values())
    reasons = {one for one in found.values() if isinstance(one, str)}
    assert all("no caption" in reason or "not UTF-8" in reason or "not plain UTF-8" in reason for reason in reasons)


def number(item: tuple[str, object]) -> int:
    """The place of a record, which its name ends with."""
    return int("".join(filter(str.isdigit, Path(item[0]).stem.split(" ")[-1])))


@pytest.mark.parametrize("door", DOORS)
def test_an_image_is_its_pixels_or_a_bad_record(tmp_path, door):
    write, read = DOORS[door]
    images = {f"{i:03}{Path(name).suffix}": odd.IMAGES[name] for i, name in enumerate(odd.IMAGES)}
    found = read(write(tmp_path, [(name, data, b"x") for name, (data, _) in images.items()]))
    assert len(found) == len(images)
    for (_, one), (name, (_, pixels)) in zip(sorted(found.items(), key=number), images.items(), strict=True):
        assert isinstance(one, Record), (name, one)
        if pixels is None:
            with pytest.raises(BadRecord):
                decode(one.image)
        else:
            odd.assert_alike(np.asarray(decode(one.image)), pixels, name)


# Captions


def write_folder(root: Path, *lines: object, file: str = "metadata.jsonl") -> DataConfig:
    (root / "a.bmp").write_bytes(PLAIN)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / file).write_text(text, encoding="utf-8")
    return DataConfig(source="folder", root=str(root))


def test_of_a_list_of_captions_one_is_drawn_each_epoch_as_often_as_the_others(tmp_path):
    texts = ["a dog", "ein Hund", "un chien"]
    config = write_folder(tmp_path, {"file_name": "a.bmp", "captions": texts})
    caption = open_source(config).record(0).caption
    assert caption.texts == tuple(texts)
    assert caption == Caption.unpack(json.loads(json.dumps(vars(caption))))
    drawn = [caption.draw(np.random.default_rng(i)) for i in range(3000)]
    assert all(abs(drawn.count(text) / 3000 - 1 / 3) < 0.03 for text in texts)
    assert set(drawn) == set(texts)


@pytest.mark.parametrize(
    "value", [[], [""], ["a dog", ""], ["a dog", None], ["a dog", "\ufffd"], 5, 1.5, True, {"en": 1}]
)
def test_a_list_with_a_bad_caption_and_what_is_no_text_are_bad_records(tmp_path, value):
    config = write_folder(tmp_path, {"file_name": "a.bmp", "text": "x"}, {"file_name": "a.bmp", "text": value})
    with pytest.raises(BadRecord, match="caption"):
        open_source(config).record(1)


def test_lists_of_captions_are_read_from_parquet_and_tfds(tmp_path):
    pa, pq = (pytest.importorskip(name, reason="needs the `beam` extra") for name in ("pyarrow", "pyarrow.parquet"))
    lists = [[b"a", b"b"], [b"c"], [], [b"d", b"caf\xe9"], None] * 30  # several batches
    expected = [("a", "b"), ("c",), None, None, None] * 30
    for array, make, string, binary in (
        (pa.ListArray, pa.list_, pa.string(), pa.binary()),
        (pa.LargeListArray, pa.large_list, pa.large_string(), pa.large_binary()),
    ):
        texts = pa.array(lists, make(binary))
        texts = array.from_arrays(texts.offsets, texts.values.view(string), type=make(string), mask=texts.is_null())
        pq.write_table(pa.table({"image": [PLAIN] * len(lists), "captions": texts}), tmp_path / "a.parquet")
        found = list(from_collection(tmp_path / "a.parquet").values())
        assert [one.caption.texts if isinstance(one, Record) else None for one in found] == expected
    words = pa.array(["a dog", "a cat", "a dog"]).dictionary_encode()
    pq.write_table(pa.table({"image": [PLAIN] * 3, "text": words}), tmp_path / "b.parquet")
    found = from_collection(tmp_path / "b.parquet").values()
    assert [one.caption.full() for one in found if isinstance(one, Record)] == ["a dog", "a cat", "a dog"]

    rows = [("", PLAIN, b"x")] * 2
    features = {"captions": tfds.features.Sequence(tfds.features.Text())}
    write_tfds(tmp_path, rows, features, captions=[["a", "b"], ["c", b"caf\xe9"]])
    found = list(tfds_set(tmp_path, "captions").values())
    assert [one.caption.texts if isinstance(one, Record) else None for one in found] == [("a", "b"), None]


def test_a_label_of_no_class_is_a_bad_record_and_not_the_last_class(tmp_path):
    features = {"label": tfds.features.ClassLabel(names=["cat", "dog"])}
    write_tfds(tmp_path, [("", PLAIN, b"x")] * 3, features, label=[1, -1, 0])
    found = list(tfds_set(tmp_path, "label").values())
    assert [one.caption.full() if isinstance(one, Record) else one[:9] for one in found] == ["dog", "its label", "cat"]


def test_a_caption_too_long_for_the_encoder_is_counted(tmp_path):
    config = write_folder(tmp_path, *({"file_name": "a.bmp", "text": f"{i} " + "a dog " * i} for i in range(8)))
    config = DataConfig(source="folder", root=config.root, size=4, batch_size=8)
    tokenizer = Tokenizer.train(["a dog"] * 2, 520, max_length=10)
    read = batches(config, open_source(config), tokenizer, seed=0)
    next(read)
    long = [i for i in range(8) if len(tokenizer.encode([f"{i} " + "a dog " * i])[0]) > 8]
    assert read.n_cut == len(long) > 0
    assert int(read.first_cut.split()[0]) in long
    next(read)
    assert read.n_cut == 2 * len(long)
    read.close()


# Folders


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a"}, "a"),
        ({"caption": "a"}, "a"),
        ({"prompt": "a"}, "a"),
        ({"caption": "a", "text": "b"}, "a"),
        ({"caption": "", "text": "b"}, None),
    ],
)
def test_the_first_usual_field_of_metadata_is_the_caption(tmp_path, row, text):
    found = folder(Path(write_folder(tmp_path, {"file_name": "a.bmp"} | row, {"file_name": "b", "text": "x"}).root))
    assert (found["a.bmp"].caption.full() if isinstance(found["a.bmp"], Record) else None) == text


def test_the_field_of_metadata_that_is_named_is_the_only_one(tmp_path):
    config = write_folder(tmp_path, {"file_name": "a.bmp", "text": "b", "de": "a"}, {"file_name": "b", "text": "b"})
    source = open_source(DataConfig(source="folder", root=config.root, text_field="de"))
    assert source.record(0).caption.full() == "a"
    with pytest.raises(BadRecord, match="no caption"):
        source.record(1)


def test_quotes_commas_and_lines_of_a_csv_belong_to_its_captions(tmp_path):
    config = write_folder(
        tmp_path, "file_name,caption", 'a.bmp,"a ""dog"",', 'running"', "", "a.bmp,b", file="metadata.csv"
    )
    source = open_source(config)
    assert [source.record(i).caption.full() for i in range(len(source))] == ['a "dog", running', "b"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("file_name,text", "a.bmp,a dog, running"), "line 2 has 3 values for 2 columns"),
        (("file_name,text", "a.bmp"), "line 2 has 1 values for 2 columns"),
        (("file_name,text", '"a.bmp"x,b'), "line 2 is not CSV"),
        (("file_name;text", "a.bmp;b"), 'needs a column "file_name"'),
        (("file_name,label", "a.bmp,b"), "lacks a column of captions"),
        (("file_name,text,text", "a.bmp,b,c"), "a column twice"),
        (("file_name,text", "../a.bmp,b"), "line 2 names .* must lie within"),
        (("file_name,text", "a.bmp,\0"), "not UTF-8, but UTF-16 perhaps"),
    ],
)
def test_a_csv_that_makes_no_sense_is_reported_with_its_line(tmp_path, lines, said):
    with pytest.raises(ValueError, match=rf"metadata\.csv.* {said}"):
        open_source(write_folder(tmp_path, *lines, file="metadata.csv"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_metadata_in_another_encoding_is_reported_as_a_whole(tmp_path, encoding):
    line = '{"file_name": "a.bmp", "text": "a dog"}'
    (tmp_path / "metadata.jsonl").write_text(line, encoding=encoding)
    for read in (folder, from_collection):
        with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8"):
            read(tmp_path)


def test_what_is_left_out_of_a_folder_is_reported_by_kind_and_linked_folders_are_followed(tmp_path):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (root / "deep", root / ".cache", elsewhere):
        path.mkdir(parents=True)
    write_sidecars(elsewhere, [("b.bmp", PLAIN, b"linked")])
    write_sidecars(root, [("a.bmp", PLAIN, b"one"), ("c.BMP", PLAIN, b"caf\xe9"), ("d.jpe", PLAIN, b"four")])
    (root / "deep" / "e.bmp").write_bytes(PLAIN)
    (root / "d.TXT").write_text("the same name")
    for name in ("x.heic", "y.HEIC", "z.mp4", "a.json", "LICENSE", "notes.txt", ".DS_Store", "._a.bmp", ".cache/f.bmp"):
        (root / name).write_bytes(PLAIN)
    (root / "prepared").mkdir()
    for name in ("shard.array_record", "index.json"):
        (root / "prepared" / name).touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "deep" / "back").symlink_to(root)
    (root / "gone.bmp").symlink_to(root / "gone.bmp")
    os.mkfifo(root / "pipe.bmp")
    found = folder(root)
    assert {name: one.caption.full() if isinstance(one, Record) else one[:12] for name, one in found.items()} == {
        "a.bmp": "one",
        "c.BMP": "its caption ",
        "d.jpe": "four",
        "deep/e.bmp": "it has no ca",
        "linked/b.bmp": "linked",
    }
    said = summary(open_source(DataConfig(source="folder", root=str(root))))
    for part in ("5 images, 3 with captions", "c.BMP", "deep/e.bmp", "2 .heic", "1 .mp4", "1 .json", "2 .txt",
                 "1 without a suffix", "3 hidden", "1 linked twice", "2 links that lead nowhere"):  # fmt: skip
        assert part in said
    assert "save .heic as PNG" in said
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"phone holds no images .* but 1 \.heic"):
        folder(tmp_path / "phone")
    kinds = Collection(str(root)).left_out()
    assert (kinds[".heic"], kinds["hidden"]) == (2, 3)


def test_file_names_that_are_no_text_are_read_and_printed(tmp_path):
    for end in (b".bmp", b".txt", b".caf\xe9"):
        (tmp_path / os.fsdecode(b"caf\xe9" + end)).write_bytes(PLAIN if end == b".bmp" else b"a dog")
    found = folder(tmp_path)
    assert [one.caption.full() for one in found.values() if isinstance(one, Record)] == ["a dog"]
    for text in (*found, summary(open_source(DataConfig(source="folder", root=str(tmp_path))))):
        assert text.encode().decode() == text


def test_images_that_metadata_does_not_name_are_reported(tmp_path):
    config = write_folder(tmp_path, {"file_name": "a.bmp", "text": "x"})
    for name in ("b.bmp", "c.png", "d.heic"):
        (tmp_path / name).write_bytes(PLAIN)
    said = summary(open_source(config))
    for part in ("1 images, 1 with", "1 .bmp that metadata.jsonl does not name", "1 .png that", "1 .heic"):
        assert part in said
    (tmp_path / "metadata.csv").write_text("file_name,text\na.bmp,y")
    with pytest.raises(ValueError, match=r"metadata\.jsonl and metadata\.csv: remove one"):
        open_source(config)


def test_a_collection_takes_nothing_from_outside_its_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_sidecars(tmp_path / "b", [("b.bmp", PLAIN, b"linked")])
    write_sidecars(tmp_path / "a", [("a.bmp", PLAIN, b"own")])
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "c.bmp").write_bytes(PLAIN)
    (tmp_path / "a" / "c.txt").symlink_to(tmp_path / "b" / "b.txt")
    found = from_collection(tmp_path / "a")
    assert {name: isinstance(one, Record) for name, one in found.items()} == {
        "a.bmp": True,
        "c.bmp": False,
        "linked/b.bmp": False,
    }


# Grounds


@pytest.mark.parametrize("alpha", [0, 128, 254])
def test_alpha_becomes_white_and_leaves_captions_alone(tmp_path, alpha):
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 255))
    image.putpixel((3, 3), (200, 100, 50, alpha))
    (tmp_path / "a.png").write_bytes(odd.encoded(image, "PNG"))
    (tmp_path / "a.txt").write_text("my dog Rex")
    record = open_source(DataConfig(source="folder", root=str(tmp_path))).record(0)
    white = np.full((8, 8, 3), 255)
    expected = np.asarray(image)[..., :3].astype(float)
    expected[3, 3] += (white[3, 3] - expected[3, 3]) * (1 - alpha / 255)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, caption, _ = prepare(record, rng, DataConfig(), (8, 8))
        assert np.abs(image - expected).max() <= 0.6
        assert caption.draw(rng) == "my dog Rex"


def test_drawings_keep_their_grounds_when_they_were_collected():
    data = Path(__file__).parent / "data"
    collection = Collection("tfds:emoji", tfds_dir=str(data), unit_records=5)
    (unit, *_) = collection.units()
    for one in collection.read(unit):
        assert not isinstance(one, Bad | LeftOut)
        caption = type(one).unpack(one.pack()).caption
        assert caption == one.caption
        assert caption.drawing
        _, drawn, _ = prepare(Record(caption, one.data), np.random.default_rng(0), DataConfig(), (8, 8))
        assert drawn.colour


# WebDataset


def solid(value: int) -> bytes:
    return odd.encoded(Image.new("RGB", (2, 2), (value,) * 3), "PNG")


@pytest.mark.parametrize(
    ("members", "field", "value"),
    [
        (("depth.png", "jpg"), "", "jpg"),
        (("jpg", "depth.png"), "", "jpg"),
        (("depth.png", "seg.png", "webp"), "", "webp"),
        (("depth.png",), "", "depth.png"),
        (("depth.png", "seg.png"), "", None),
        (("jpg", "png"), "", None),
        (("png", "png"), "", None),
        (("depth.png", "jpg"), "depth.png", "depth.png"),
        (("jpg", "png"), "png", "png"),
        (("seg.png", "depth.png"), "seg.png", "seg.png"),
        (("jpg",), "png", None),
        (("JPG",), "", "JPG"),
    ],
)
def test_of_several_images_of_a_tars_record_the_plain_or_named_one_is_taken(tmp_path, members, field, value):
    data = {suffix: solid(i) for i, suffix in enumerate(members)}
    path = tar(tmp_path / "a.tar", *((f"1.{suffix}", data[suffix]) for suffix in members), ("1.txt", b"x"))
    (one,) = from_collection(path, image_field=field).values()
    assert (one.image if isinstance(one, Record) else None) == (data[value] if value else None)


@pytest.mark.parametrize(
    ("members", "field", "text"),
    [
        ({"txt": b"a", "json": b'{"caption": "b"}'}, "", "a"),
        ({"caption": b"a"}, "", "a"),
        ({"json": b'{"text": "a"}'}, "", "a"),
        ({"json": b'\xef\xbb\xbf{"captions": ["a"]}'}, "", "a"),
        ({"txt": b"b", "json": b'{"caption": "b", "long": "a"}'}, "long", "a"),
        ({"txt": b"b", "long.txt": b"a"}, "long.txt", "a"),
        ({"txt": b"b"}, "long", None),
        ({"txt": b"", "json": b'{"caption": "b"}'}, "", None),
        ({"json": b'{"caption": "caf\xe9"}'}, "", None),
        ({"json": b"[]"}, "", None),
        ({}, "", None),
    ],
)
def test_a_tars_caption_is_the_plain_or_named_one(tmp_path, members, field, text):
    path = tar(tmp_path / "a.tar", ("1.png", solid(0)), *((f"1.{suffix}", data) for suffix, data in members.items()))
    (one,) = from_collection(path, text_field=field).values()
    assert (one.caption.full() if isinstance(one, Record) else None) == text


def test_members_that_no_record_uses_are_counted_by_kind(tmp_path):
    members = [(f"{i}.{end}", solid(0)) for i in range(3) for end in ("jpg", "depth.png", "cls")]
    path = tar(tmp_path / "a.tar", *members, ("3.png", solid(0)), ("3.caption", b"x"))
    collection = Collection(str(path))
    (left_out,) = [one for unit in collection.units() for one in collection.read(unit) if isinstance(one, LeftOut)]
    assert left_out.kinds == {".depth.png": 3, ".cls": 3}
