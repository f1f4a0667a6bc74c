"""Pictures with textual inversions are diffusers', of every kind of file."""

import numpy as np
import pytest
import torch
import xl
from diffusers import StableDiffusionPipeline
from pairs import nchw
from safetensors.torch import save_file

import jaxdiff
from jaxdiff.model import read_model

TEXTS = ["zebra on a zebra", "a zebra"]
NEGATIVE = ["a dog", "a zebra"]


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture
def reference(pair):
    """diffusers' pipeline of the pair, new for each test, since words stay in its tokenizer."""
    pipe = StableDiffusionPipeline.from_pretrained(pair.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, latents, texts=TEXTS):
    return 255 * pipe(texts, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=9.0, latents=nchw(latents),
                      height=16, width=24, output_type="np").images  # fmt: skip


def ours(pair, latents, embeddings, texts=TEXTS):
    pipe = jaxdiff.Pipeline(pair.ours.with_embeddings(embeddings))
    return pipe(texts, NEGATIVE, steps=4, guidance=9.0, latents=latents).astype(float)


def compare(got, expected, plain, figures, name):
    figures[f"{name}: largest difference of 255"] = np.abs(got - expected).max()
    assert np.abs(expected - plain).max() > 5  # the word means something
    assert np.abs(got - expected).max() <= 0.51


def parameters(vectors):
    """As the first trainers saved it: an object that holds the parameter."""
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})


# The name of a file, the shape of its vectors, and what is saved.
KINDS = {
    "bin [d]": ("x.bin", (), lambda v: {"zebra": v}),
    "bin [1 d]": ("x.bin", (1,), lambda v: {"zebra": v}),
    "bin [n d]": ("x.bin", (3,), lambda v: {"zebra": v}),
    "bin, a parameter": ("x.bin", (), lambda v: {"zebra": torch.nn.Parameter(v)}),
    "safetensors [d]": ("x.safetensors", (), lambda v: {"zebra": v}),
    "safetensors [n d]": ("x.safetensors", (2,), lambda v: {"zebra": v}),
    "float16": ("x.safetensors", (2,), lambda v: {"zebra": v.half()}),
    "emb_params": ("zebra.safetensors", (2,), lambda v: {"emb_params": v}),
    "A1111": ("zebra.pt", (3,), lambda v: {
        "string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "zebra", "step": 499, "sd_checkpoint": None,
        "sd_checkpoint_name": None}),
}  # fmt: skip


def save(path, values):
    save_file(values, path) if path.suffix == ".safetensors" else torch.save(values, path)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures(pair, reference, latents, tmp_path, kind, figures, request):
    plain = draw(reference, latents)
    name, n, values = KINDS[kind]
    width = reference.text_encoder.config.hidden_size
    vectors = torch.randn((*n, width), generator=torch.Generator().manual_seed(1))
    save(path := tmp_path / name, values(vectors))
    reference.load_textual_inversion(path, token="zebra")
    compare(ours(pair, latents, [path]), draw(reference, latents), plain, figures, request.node.callspec.id)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_first_trainers_files(pair, reference, latents, tmp_path, legacy, figures, request):
    """Which diffusers does not read."""
    plain = draw(reference, latents)
    vectors = torch.randn((2, reference.text_encoder.config.hidden_size), generator=torch.Generator().manual_seed(2))
    path = tmp_path / "zebra.pt"
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters(vectors)}, path,
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    reference.load_textual_inversion({"zebra": vectors})
    compare(ours(pair, latents, [path]), draw(reference, latents), plain, figures, request.node.callspec.id)


@pytest.mark.parametrize("files", [1, 2])
def test_two_words(pair, reference, latents, tmp_path, files, figures, request):
    """Of one file, which diffusers does not read, and of two."""
    texts = ["zebra on <quagga>", "<quagga> zebra"]
    plain = draw(reference, latents, texts)
    generator = torch.Generator().manual_seed(3)
    width = reference.text_encoder.config.hidden_size
    words = {word: torch.randn((n, width), generator=generator) for word, n in (("zebra", 2), ("<quagga>", 1))}
    given = [words] if files == 1 else [{word: vectors} for word, vectors in words.items()]
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(given))]
    for path, values in zip(paths, given, strict=True):
        save_file(values, path)
    for word, vectors in words.items():
        reference.load_textual_inversion({word: vectors})
    expected = draw(reference, latents, texts)
    compare(ours(pair, latents, paths, texts), expected, plain, figures, request.node.callspec.id)


def test_diffusers_reads_the_words_of_a_folder_that_is_written(pair, latents, tmp_path, figures, request):
    width = pair.ours.configs["text_encoder"].hidden_size
    vectors = torch.randn((3, width), generator=torch.Generator().manual_seed(4))
    save_file({"zebra": vectors}, path := tmp_path / "x.safetensors")
    pair.ours.with_embeddings([path]).save(tmp_path / "folder")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    theirs.set_progress_bar_config(disable=True)
    plain = draw(StableDiffusionPipeline.from_pretrained(pair.path), latents)
    compare(ours(pair, latents, [path]), draw(theirs, latents), plain, figures, request.node.callspec.id)


def test_both_text_encoders_of_stable_diffusion_xl(latents, tmp_path, figures):
    """A file for both, which diffusers reads one by one."""
    pipe = xl.base(tmp_path)
    for text in (pipe.text_encoder, pipe.text_encoder_2):  # where the public 2 is, a prompt's vector is a new token's
        text.config.eos_token_id = pipe.tokenizer.eos_token_id
        if hasattr(text.text_model if hasattr(text, "text_model") else text, "eos_token_id"):
            (text.text_model if hasattr(text, "text_model") else text).eos_token_id = pipe.tokenizer.eos_token_id
    pipe.save_pretrained(tmp_path / "model")

    def theirs():
        return 255 * pipe(TEXTS, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=9.0, output_type="np",
                          latents=nchw(latents), height=16, width=24).images  # fmt: skip

    plain = theirs()
    generator = torch.Generator().manual_seed(5)
    vectors = {name: torch.randn((2, d), generator=generator) for name, d in (("clip_l", 24), ("clip_g", 40))}
    save_file(vectors, path := tmp_path / "zebra.safetensors")
    pipe.load_textual_inversion({"zebra": vectors["clip_l"]}, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(
        {"zebra": vectors["clip_g"]}, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )
    own = jaxdiff.Pipeline(read_model(tmp_path / "model").with_embeddings([path]))
    got = own(TEXTS, NEGATIVE, steps=4, guidance=9.0, latents=latents, size=(24, 16)).astype(float)
    compare(got, theirs(), plain, figures, "xl")
