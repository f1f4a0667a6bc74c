"""The tokenizer: equal to transformers' CLIPTokenizer, in its files too."""

import gzip
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import odd
import pytest
from transformers import CLIPTokenizer

from jaxdiff.config import DataConfig
from jaxdiff.data.sources import open_source
from jaxdiff.data.tokens import BOS, EOS, Tokenizer, declared_length
from jaxdiff.io.folder import CLIP
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


PIECES = ["<cat-toy>", "<Cat-Toy>", "<CAT-TOY>", "!", "!!", " ", "  ", "a", "dog", "É", "e\u0301", "🍎",
          "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "s", "'s", "1234", "\n", ",", ".", "日本", "red",
          "<", ">", "cat-toy"]  # fmt: skip
CHANCE = random.Random(0)
ODD = [*TRICKY, *("".join(CHANCE.choices(PIECES, k=CHANCE.randint(1, 9))) for _ in range(200))]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}


def decoder(**flags):
    """A layout with `added_tokens_decoder`."""
    token = {"content": "<cat-toy>"} | FLAGS | flags
    return lambda i: {"tokenizer_config.json": {"added_tokens_decoder": {str(i): token}}}


def marks(name, **flags):
    """A layout in which the start and the end are objects with flags."""
    marked = {key: {"content": token} | FLAGS | flags for key, token in (("bos_token", BOS), ("eos_token", EOS))}
    return lambda i: {name: marked}


LAYOUTS = {
    "none": lambda i: {},
    "added_tokens": lambda i: {"added_tokens.json": {"<cat-toy>": i}},
    "two added_tokens": lambda i: {"added_tokens.json": {"dog": i + 1, "<cat-toy>": i}},
    "ids with gaps": lambda i: {"added_tokens.json": {"dog": i + 7, "<cat-toy>": i + 3}},
    "an id inside the vocabulary": lambda i: {"added_tokens.json": {"<cat-toy>": 5}},
    "a decoder with a gap": lambda i: decoder()(i + 5),
    "special added_tokens": lambda i: {
        "added_tokens.json": {"<cat-toy>": i},
        "special_tokens_map.json": {"additional_special_tokens": ["<cat-toy>"]},
    },
    "decoder": decoder(),
    "normalized decoder": decoder(normalized=True, content="<Cat-Toy>"),
    "strict decoder": decoder(lstrip=True, rstrip=True, single_word=True, special=True),
    "additional_special_tokens": lambda i: {"tokenizer_config.json": {"additional_special_tokens": ["<cat-toy>"]}},
    "extra_special_tokens": lambda i: {"tokenizer_config.json": {"extra_special_tokens": ["<cat-toy>"]}},
    "additional in the map": lambda i: {"special_tokens_map.json": {"additional_special_tokens": ["<cat-toy>"]}},
    "SD2's padding": lambda i: {"tokenizer_config.json": {"pad_token": "!"}},
    "SD2's padding in the map": lambda i: {"special_tokens_map.json": {"pad_token": "!"}},
    "a mask token": lambda i: {"tokenizer_config.json": {"mask_token": "<cat-toy>"}},
    "normalized marks": marks("special_tokens_map.json", normalized=True),
    "typed marks": marks("tokenizer_config.json", normalized=True, __type="AddedToken"),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = open_source(DataConfig(root=str(Path(__file__).parent / "data")))
    return Tokenizer.train(texts(source), 900, max_length=32)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def transformers_ids(folder: Path, max_length: int, texts: list[str] = TRICKY) -> np.ndarray:
    theirs = CLIPTokenizer.from_pretrained(folder)
    return np.asarray(theirs(texts, padding="max_length", truncation=True, max_length=max_length)["input_ids"])


@pytest.mark.parametrize("max_length", [32, 77])
def test_transformers_reads_our_folder_and_agrees_on_every_token(folder, max_length):
    ours = Tokenizer.load(folder, max_length)
    ids = ours(TRICKY)
    assert (ids.dtype, ids.shape) == (np.int32, (len(TRICKY), max_length))
    np.testing.assert_array_equal(ids, transformers_ids(folder, max_length))
    assert CLIPTokenizer.from_pretrained(folder).model_max_length == 32


def test_clips_own_vocabulary_is_in_the_package():
    clip = Tokenizer.load(CLIP)
    assert (len(clip), clip.bos_id, clip.eos_id, clip.pad_id, clip.comma_id) == (49408, 49406, 49407, 49407, 267)
    assert clip.encode(["a photo of a cat", "Hello  world!", "!!"]) == [
        [320, 1125, 539, 320, 2368],
        [3306, 1002, 256],
        [748],
    ]


@pytest.mark.parity
def test_clips_tokens_are_transformers_from_the_same_merges(tmp_path):
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as clip/simple_tokenizer.py says it
    symbols = [*map(chr, printed), *(chr(256 + i) for i in range(256 - len(printed)))]
    lines = gzip.decompress(next(CLIP.iterdir()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merged = [line.replace(" ", "") for line in lines]
    vocab = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, BOS, EOS]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    prompts = [*ODD, *(text for text in odd.CAPTIONS.values() if text)]
    for pad, index in ((EOS, None), ("!", 0)):  # of Stable Diffusion 1 and 2
        theirs = CLIPTokenizer.from_pretrained(tmp_path, pad_token=pad)
        expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
        np.testing.assert_array_equal(Tokenizer.load(CLIP).padded_with(index)(prompts), expected)


def test_the_new_single_file_layout_is_read_too(folder, tmp_path):
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    np.testing.assert_array_equal(Tokenizer.load(tmp_path, 32)(TRICKY), Tokenizer.load(folder, 32)(TRICKY))
    Tokenizer.load(tmp_path, 32).save(tmp_path / "old")
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "old", 32)(TRICKY), Tokenizer.load(folder, 32)(TRICKY))


def test_tokens_beside_the_vocabulary_are_transformers_in_every_layout(tokenizer, folder, tmp_path, layout):
    next_id = len(tokenizer)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    for name, values in layout(next_id).items():
        (tmp_path / name).write_text(json.dumps(values))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "single")
    ours = Tokenizer.load(tmp_path, 32)
    ours.save(tmp_path / "saved")
    expected = transformers_ids(tmp_path, 32, ODD)
    np.testing.assert_array_equal(ours(ODD), expected)
    for place in ("saved", "single"):
        np.testing.assert_array_equal(Tokenizer.load(tmp_path / place, 32)(ODD), expected)
        np.testing.assert_array_equal(transformers_ids(tmp_path / place, 32, ODD), expected)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": 5}}, "5 is not a token"),
        ("tokenizer_config.json", {"additional_special_tokens": [""]}, "is not a token"),
        ("tokenizer_config.json", {"padding_side": "left"}, "padding_side is 'left'"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens is True"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "Unigram.*BPE"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}, "merge"),
    ],
)
def test_added_tokens_that_cannot_be_are_named(folder, tmp_path, name, values, words):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(folder / file, tmp_path / file)
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(tmp_path)


def test_an_added_token_that_takes_another_id_than_its_file_says_is_told(tokenizer, folder, tmp_path, caplog):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    for i, told in ((len(tokenizer), False), (5000, True)):
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<toy>": i}))
        loaded = Tokenizer.load(tmp_path)
        assert loaded.encode(["<toy>"]) == [[len(tokenizer)]]
        assert (f"'<toy>' is {len(tokenizer)}, not {i}" in caplog.text) == told == bool(caplog.records)
    loaded.save(tmp_path / "saved")
    Tokenizer.load(tmp_path / "saved")
    assert len(caplog.records) == 1, "what we write has no gap"


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
        ({"tokenizer.json": "{}"}, "BPE"),
        ({"tokenizer.json": "<html>"}, "is not JSON"),
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
    with pytest.raises(ValueError, match=r"merges\.txt has 0 merges for \d+ tokens"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", [5, {"a": 1}, ["x"]])
def test_a_padding_token_that_is_none_is_refused(tokenizer, tmp_path, token):
    tokenizer.save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="is not a token"):
        Tokenizer.load(tmp_path)


def test_an_id_beyond_the_others_counts_as_the_rows_it_needs(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {EOS: 99_999_999}))
    (tmp_path / "tokenizer_config.json").unlink()
    assert len(Tokenizer.load(tmp_path)) == 100_000_000


@pytest.mark.parametrize(("own", "found"), [(8, 8), (77, 32), (10**30, 32), (None, 32)])
def test_the_length_that_the_files_say_is_the_most(tmp_path, own, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": own}))
    assert declared_length(tmp_path, 32) == found


def test_sizes_that_cannot_be_are_refused(tokenizer, folder):
    with pytest.raises(ValueError, match="max_length is 2"):
        Tokenizer.load(folder, 2)
    with pytest.raises(ValueError, match="vocab_size is 514"):
        Tokenizer.train(["a"], 514)
