"""Run directories on disks and in buckets."""

import importlib.util
from pathlib import Path

import pytest
from etils import epath

from jaxdiff.io.storage import copy_into, is_remote, place_of, staged, write_text


def test_a_folder_is_written_in_place(tmp_path: Path) -> None:
    place = place_of(str(tmp_path / "run"))
    assert not is_remote(place)
    with staged(place) as folder:
        assert folder == tmp_path / "run"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = epath.Path(tmp_path) / "config.json"
    for text in ("one", "two"):
        write_text(file, text)
        assert (tmp_path / "config.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_was_made_here_is_copied_file_by_file(tmp_path: Path) -> None:
    made = {"model_index.json": b"{}", "unet/config.json": b"{1}", "unet/deep/weights": bytes(3_000_000)}
    for name, data in made.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(data)
    copy_into(tmp_path / "here", epath.Path(tmp_path / "there"))
    assert {
        file.relative_to(tmp_path / "there").as_posix(): file.read_bytes()
        for file in (tmp_path / "there").rglob("*")
        if file.is_file()
    } == made


def test_a_place_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match=r"ftp://run: ftp:// is not known; use gs://, s3:// or a folder\."):
        place_of("ftp://run")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_bucket_without_its_client_is_told() -> None:
    with pytest.raises(ValueError, match=r"gs://bucket/run is in a bucket, which needs gcsfs: pip install gcsfs\."):
        place_of("gs://bucket/run")
