"""The tokenizer: equal to transformers' CLIPTokenizer, in its files too."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from jaxdiff.config import DataConfig
from jaxdiff.data.sources import open_source
from jaxdiff.data.tokens import BOS, EOS, Tokenizer
from jaxdiff.tools.tokenizer import texts

TRICKY = [
    "",
    "a red apple, noto style, on an orange background",
    "  It's  NOT\tan émoji\u2019s\n— ÇA £ 1234 &amp; x",
    "🍎🍏 日本語 ﬁ İstanbul ẞ Ǆ",
    "<|endoftext|> hi <|startoftext|>",
    "<|ENDOFTEXT|>",
    "!!!???...,, :-) #1",
    "\u200b\x00a\u00a0b\u2028c",
    "e\u0301 é",
    "don't I'LL you've",
    "\u2018quote\u2019 “x”",
    "word " * 60,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = open_source(DataConfig(root=str(Path(__file__).parent / "data")))
    return Tokenizer.train(texts(source), 900, max_length=32)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def transformers_ids(folder: Path, max_length: int) -> np.ndarray:
    theirs = CLIPTokenizer.from_pretrained(folder)
    return np.asarray(theirs(TRICKY, padding="max_length", truncation=True, max_length=max_length)["input_ids"])


@pytest.mark.parametrize("max_length", [32, 77])
def test_transformers_reads_our_folder_and_agrees_on_every_token(folder, max_length):
    ours = Tokenizer.load(folder, max_length)
    ids = ours(TRICKY)
    assert (ids.dtype, ids.shape) == (np.int32, (len(TRICKY), max_length))
    np.testing.assert_array_equal(ids, transformers_ids(folder, max_length))
    assert CLIPTokenizer.from_pretrained(folder).model_max_length == 32


def test_the_new_single_file_layout_is_read_too(folder, tmp_path):
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    np.testing.assert_array_equal(Tokenizer.load(tmp_path, 32)(TRICKY), Tokenizer.load(folder, 32)(TRICKY))
    Tokenizer.load(tmp_path, 32).save(tmp_path / "old")
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "old", 32)(TRICKY), Tokenizer.load(folder, 32)(TRICKY))


@pytest.mark.parametrize("spelling", ["!", {"content": "!", "lstrip": False}])
def test_another_padding_token_is_honoured_as_in_sd2(tokenizer, tmp_path, spelling):
    tokenizer.save(tmp_path)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | {"pad_token": spelling}))
    ours = Tokenizer.load(tmp_path, 32)
    assert ours.pad_id == 0
    np.testing.assert_array_equal(ours(TRICKY), transformers_ids(tmp_path, 32))
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").pad_id == 0


def test_saving_and_loading_changes_nothing(tokenizer, folder, tmp_path):
    loaded = Tokenizer.load(folder, 32)
    loaded.save(tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    np.testing.assert_array_equal(loaded(TRICKY), tokenizer(TRICKY))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(loaded))(TRICKY), tokenizer(TRICKY))


def test_the_vocabulary_is_laid_out_as_clips(tokenizer, folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == len(tokenizer) <= 900
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert (vocab["!"], vocab[BOS], vocab[EOS]) == (0, len(vocab) - 2, len(vocab) - 1)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (len(vocab) - 2, len(vocab) - 1, len(vocab) - 1)
    assert "background</w>" in vocab


def test_what_is_cut_is_quoted(tokenizer):
    short = "a red apple, noto style"
    assert tokenizer.cut(short) is None
    long = "A " * 30 + "THE END of it"
    assert tokenizer.cut(long) == "THE END of it"
    np.testing.assert_array_equal(tokenizer([long]), tokenizer(["a " * 30]))


def test_a_row_starts_with_start_and_ends_with_end_whatever_is_cut(tokenizer):
    ids = tokenizer(["", "word " * 100])
    assert ids[0].tolist() == [tokenizer.bos_id] + [tokenizer.eos_id] * 31
    assert (ids[1, 0], ids[1, -1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer([]).shape == (0, 32)


def test_tokens_alone_are_those_between_start_and_end(tokenizer):
    for text, tokens in zip(TRICKY, tokenizer.encode(TRICKY), strict=True):
        row = [tokenizer.bos_id, *tokens, tokenizer.eos_id]
        assert tokenizer([text])[0, : len(row)].tolist() == [*row[:31], tokenizer.eos_id][: len(row)]


def test_the_ends_of_words_are_known(tokenizer):
    (tokens,) = tokenizer.encode(["a red xqzjk, dog"])
    assert tokenizer.ends_word[tokens].sum() == 5
    assert tokenizer.ends_word[tokens[-1]]
    assert tokens.count(tokenizer.comma_id) == 1


def test_a_prompt_with_bytes_that_are_no_text_is_still_read(tokenizer):
    np.testing.assert_array_equal(tokenizer(["a \udcff b"]), tokenizer(["a ? b"]))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "vocab.json is missing"),
        ({"vocab.json": "{}"}, "merges.txt is missing"),
        ({"vocab.json": "<html>", "merges.txt": ""}, "vocab.json is not JSON"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "do not go together"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "lacks"),
        ({"vocab.json": '{"a": "x"}', "merges.txt": ""}, r"whole number from 0 on\.$"),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, r"whole number from 0 on\.$"),
        ({"vocab.json": "[" * 100_000, "merges.txt": ""}, r"vocab\.json is "),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c"}, "'a b c' is not a merge"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer"),
        ({"tokenizer.json": "<html>"}, "is not a tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        Tokenizer.load(tmp_path)


def test_merges_that_were_only_begun_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"merges\.txt has 0 merges for the \d+ tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", [5, {"a": 1}, ["x"]])
def test_a_padding_token_that_is_none_is_refused(tokenizer, tmp_path, token):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
    with pytest.raises(ValueError, match=r"pad_token is .*, not a token"):
        Tokenizer.load(tmp_path)


def test_an_id_beyond_the_others_counts_as_the_rows_it_needs(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {EOS: 99_999_999}))
    assert len(Tokenizer.load(tmp_path)) == 100_000_000


def test_sizes_that_cannot_be_are_refused(tokenizer, folder):
    with pytest.raises(ValueError, match="max_length is 2"):
        Tokenizer.load(folder, 2)
    with pytest.raises(ValueError, match="vocab_size is 514"):
        Tokenizer.train(["a"], 514)
