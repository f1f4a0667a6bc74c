"""Textual inversions: whole words whose tokens have vectors of their own, or a sentence that says why not."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.io.embeddings import Embedding, read_embedding
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.model import read_model
from jaxdiff.prompts.encode import Words, encode

D = tiny.TEXT_ENCODER.hidden_size
N = len(tiny.tokenizer())
"""The first number of a further token."""


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def write(tmp_path):
    """Writes tensors to a safetensors file of this name."""

    def write(tensors, name="style.safetensors"):
        arrays = {key: np.asarray(value, np.float32) for key, value in tensors.items()}
        write_safetensors(tmp_path / name, {k: s._replace(checked=False) for k, s in stored(arrays).items()})
        return tmp_path / name

    return write


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def table(model):
    """The text encoder's table of tokens."""
    return np.asarray(model.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"])


@pytest.mark.parametrize("shape", [(D,), (1, D), (3, D)])
def test_a_word_has_the_rows_of_its_vectors_and_all_others_are_as_they_were(model, write, shape):
    taught = model.with_embeddings([write({"<zebra>": normal(*shape)})])
    ids = taught.tokenizer.words["<zebra>"]
    assert ids == tuple(range(N, N + len(ids)))
    np.testing.assert_array_equal(table(taught)[list(ids)], normal(*shape).reshape(-1, D))
    others = [i for i in range(len(table(model))) if i not in ids]
    np.testing.assert_array_equal(table(taught)[others], table(model)[others])
    assert taught.tokenizer.encode(["a <zebra> dog"]) == [
        [*model.tokenizer.encode(["a"])[0], *ids, *model.tokenizer.encode(["dog"])[0]]
    ]


def test_a_table_without_room_grows(model, write):
    full = tiny.model(text_encoder=replace(tiny.TEXT_ENCODER, vocab_size=N))
    taught = full.with_embeddings([write({"xx": normal(2, D)})])
    assert taught.configs["text_encoder"].vocab_size == N + 2
    np.testing.assert_array_equal(table(taught), [*table(full), *normal(2, D)])


def test_words_are_found_whole_and_in_any_case(model, write):
    tokenizer = model.with_embeddings([write({"Zebra": normal(2, D)})]).tokenizer
    plain, ids = model.tokenizer, list(tokenizer.words["Zebra"])
    for text in ("zebras", "a_zebra", "zebra2", "gezebra"):
        assert tokenizer.encode([text]) == plain.encode([text])
    for text in ("zebra", "Zebra", "ZEBRA"):
        assert tokenizer.encode([text]) == [ids]
    comma = plain.encode([","])[0]
    assert tokenizer.encode(["zebra,zebra"]) == [[*ids, *comma, *ids]]


def test_a_word_that_ends_in_no_letters_is_whole_anywhere(model, write):
    tokenizer = model.with_embeddings([write({"<zebra>": normal(D)})]).tokenizer
    (i,) = tokenizer.words["<zebra>"]
    assert tokenizer.encode(["a<zebra>s"]) == [
        [*model.tokenizer.encode(["a"])[0], i, *model.tokenizer.encode(["s"])[0]]
    ]


FILES = {
    "emb_params": ({"emb_params": normal(2, D)}, "style"),
    "first trainers": ({"string_to_param.*": normal(2, D)}, "style"),
    "SDXL's own name": ({"clip_l": normal(2, D)}, "style"),
    "diffusers": ({"<x>": normal(2, D)}, "<x>"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_teaches_the_same(model, write, kind):
    tensors, word = FILES[kind]
    taught = model.with_embeddings([write(tensors)])
    assert [*taught.tokenizer.words] == [word]
    named = model.with_embeddings([(write(tensors), "my cat")])
    assert [*named.tokenizer.words] == ["my cat"]
    for one in (taught, named):
        np.testing.assert_array_equal(table(one)[N : N + 2], normal(2, D))


def test_of_a_file_with_several_words_all_are_taught_or_one(model, write):
    path = write({"<x>": normal(D), "<y>": normal(2, D)})
    assert model.with_embeddings([path]).tokenizer.words == {"<x>": (N,), "<y>": (N + 1, N + 2)}
    assert [*model.with_embeddings([(path, "<y>")]).tokenizer.words] == ["<y>"]
    with pytest.raises(ValueError, match="no word 'z'; it has <x>, <y>"):
        model.with_embeddings([(path, "z")])


def test_both_text_encoders_get_their_own(write):
    path = write({"clip_l": normal(2, 8), "clip_g": normal(2, 12)})
    found = read_embedding(Embedding(path), {"text_encoder": 8, "text_encoder_2": 12})
    np.testing.assert_array_equal(found["style"]["text_encoder"], normal(2, 8))
    np.testing.assert_array_equal(found["style"]["text_encoder_2"], normal(2, 12))
    path = write({"clip_l": normal(2, 8), "clip_g": normal(3, 12)})
    with pytest.raises(ValueError, match="must be as many"):
        read_embedding(Embedding(path), {"text_encoder": 8, "text_encoder_2": 12})
    path = write({"x": normal(8)})
    with pytest.raises(ValueError, match="this model's text encoders take 8 and 12"):
        read_embedding(Embedding(path), {"text_encoder": 8, "text_encoder_2": 12})


@pytest.mark.parametrize(("d", "told"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (1280, "SDXL"),
                                         (40, ", and")])  # fmt: skip
def test_another_width_is_refused_with_the_model_that_has_it(model, write, d, told):
    with pytest.raises(ValueError, match=rf"have {d} numbers.*?{told}.*takes {D}"):
        model.with_embeddings([write({"x": normal(1, d)})])


def test_sdxls_files_are_refused_by_a_model_of_one_text_encoder(model, write):
    with pytest.raises(ValueError, match="it is for SDXL"):
        model.with_embeddings([write({"clip_l": normal(1, 768), "clip_g": normal(1, 1280)})])


LONG = "x" * 101
BAD = {
    "not finite": ({"x": np.full(D, np.nan)}, "'x' is not finite"),
    "infinite": ({"x": np.full((1, D), np.inf)}, "'x' is not finite"),
    "a kernel": ({"conv.weight": normal(D, D, 3, 3)}, "no textual inversion.*conv.weight"),
    "a number": ({"x": np.float32(1)}, r"'x' is float32 \[\]"),
    "nothing": ({}, "its tensors are none"),
    "empty": ({"x": np.zeros((0, D))}, "is float32"),
    "many vectors": ({"x": np.zeros((1025, D))}, "1025 vectors, more than the 1024"),
    "many words": ({f"x{i}": np.zeros((600, D)) for i in range(2)}, "1200 vectors, more than the 1024"),
    "a word of nothing": ({" ": normal(D)}, "cannot be written in a prompt"),
    "a word of two lines": ({"a\nb": normal(D)}, "cannot be written in a prompt"),
    "a long word": ({LONG: normal(D)}, "cannot be written in a prompt"),
    "several of the first trainers'": (
        {"string_to_param.*": normal(D), "string_to_param.x": normal(D)}, "2 entries in its string_to_param"
    ),
    "a word of the tokenizer's": ({"<|endoftext|>": normal(D)}, "has a token .* already.*FILE:TOKEN"),
    "a beginning of words": ({"a": normal(D)}, "has a token 'a' already"),
    "a word and the second token of another": ({"xx": normal(2, D), "XX_1": normal(D)}, "has a token 'xx_1' already"),
    "twice in two cases": ({"xx": normal(D), "XX": normal(D)}, "has a token 'xx' already"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_makes_no_sense_is_told(model, write, kind):
    tensors, told = BAD[kind]
    with pytest.raises(ValueError, match=told):
        model.with_embeddings([write(tensors)])


def test_numbers_that_are_no_floats_are_told(model, tmp_path):
    write_safetensors(path := tmp_path / "a.safetensors", stored({"x": np.zeros((2, D), np.int64)}))
    with pytest.raises(ValueError, match="'x' is int64"):
        model.with_embeddings([path])


@pytest.mark.parametrize("given", [3, ("a.pt", 3), ("a.pt", "x", 1), None])
def test_what_is_no_file_and_word_is_told(model, given):
    with pytest.raises(ValueError, match="give a file, or a file and a word"):
        model.with_embeddings([given])


def test_one_word_of_two_files_is_told(model, write):
    paths = [write({"xx": normal(D)}), write({"xx": normal(D)}, "b.safetensors")]
    with pytest.raises(ValueError, match=r"b\.safetensors teaches the word 'xx', and so does another"):
        model.with_embeddings(paths)
    with pytest.raises(ValueError, match="has a token 'xx' already"):
        model.with_embeddings(paths[:1]).with_embeddings(paths[1:])
    both = model.with_embeddings([paths[0], (paths[1], "yy")])
    assert both.tokenizer.words == {"xx": (N,), "yy": (N + 1,)}
    assert both.embeddings == (Embedding(paths[0]), Embedding(paths[1], "yy"))


def tokens(text, tokenizer):
    """The prompt's tokens, chunk after chunk, and their weights."""
    prompts, warnings = encode([Words(text)], tokenizer, 4)
    return prompts.ids[0, 0, 1], prompts.token_weights[0, 0, 1], warnings


def test_all_of_a_words_tokens_have_its_weight_in_every_chunk(model, write):
    tokenizer = model.with_embeddings([write({"zebra": normal(3, D)})]).tokenizer
    ids, weights, warnings = tokens("a (zebra:1.3) BREAK [zebra]", tokenizer)
    assert warnings == []
    start, end = tokenizer.bos_id, tokenizer.eos_id
    (a,) = tokenizer.encode(["a"])[0]
    np.testing.assert_array_equal(ids[0, :6], [start, a, N, N + 1, N + 2, end])
    np.testing.assert_allclose(weights[0, :6], [1, 1, 1.3, 1.3, 1.3, 1], rtol=1e-6)
    np.testing.assert_array_equal(ids[1, :5], [start, N, N + 1, N + 2, end])
    np.testing.assert_allclose(weights[1, :5], [1, *[1 / 1.1] * 3, 1], rtol=1e-6)


def test_chunks_end_before_a_word_and_not_inside_it(model, write):
    tokenizer = model.with_embeddings([write({"zebra": normal(4, D)})]).tokenizer
    room = tokenizer.max_length - 2
    ids, _, _ = tokens(f"{'a ' * (room - 2)}zebra", tokenizer)
    np.testing.assert_array_equal(ids[1, 1:5], [N, N + 1, N + 2, N + 3])
    assert tokenizer.cut(f"{'a ' * (room - 2)}zebra a") == "zebra a", "two of its tokens do not fit"


@pytest.mark.parametrize("text", ["embedding:Zebra", "embedding:zebra.pt", "Embedding:zebra"])
def test_comfys_spelling_is_the_word(model, write, text):
    tokenizer = model.with_embeddings([write({"Zebra": normal(2, D)})]).tokenizer
    for prompt in (f"a {text}, a dog", f"a ({text}:1.2)"):
        ids, weights, warnings = tokens(prompt, tokenizer)
        expected = tokens(prompt.replace(text, "zebra"), tokenizer)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(weights, expected[1])
        assert warnings == []
    assert "no textual inversion is called so" in tokens("embedding:zebras", tokenizer)[2][0]


def test_pictures_change_with_the_word_alone(model, write):
    path = write({"zebra": normal(2, D)})
    taught, plain = Pipeline(model.with_embeddings([path])), Pipeline(model)
    for negative in ("", "a dog"):
        same = {"negative_prompt": negative, "steps": 2}
        np.testing.assert_array_equal(taught("a red apple", **same), plain("a red apple", **same))
        assert tiny.off(taught("a red zebra", **same), plain("a red zebra", **same)) > 5
    assert tiny.off(taught("", "zebra", steps=2), plain("", "zebra", steps=2)) > 5


def test_a_folder_keeps_its_words(model, write, tmp_path):
    taught = model.with_embeddings([write({"zebra": normal(3, D), "<x>": normal(D)})])
    taught.save(tmp_path / "folder")
    again = read_model(tmp_path / "folder")
    assert again.tokenizer.words == taught.tokenizer.words
    np.testing.assert_array_equal(table(again), table(taught))
    assert again.tokenizer.encode(["a zebra, zebras <x>"]) == taught.tokenizer.encode(["a zebra, zebras <x>"])


def test_a_name_is_told_as_no_list(model):
    with pytest.raises(ValueError, match="give a list"):
        jaxdiff.load(embeddings="a.pt")


def test_what_to_write_is_told(model, write, caplog):
    with caplog.at_level(logging.INFO, "jaxdiff"):
        model.with_embeddings([write({"emb_params": normal(2, D)}, "Zebra.safetensors")])
    assert "write 'Zebra' (2 vectors) in prompts" in caplog.text


def test_names_of_a_header_that_are_no_text_are_told(model, tmp_path):
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [D], "data_offsets": [0, 4 * D]}}).encode()
    (path := tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * D))
    with pytest.raises(ValueError, match="cannot be written in a prompt"):
        model.with_embeddings([path])
