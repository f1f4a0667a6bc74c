"""DINOv2 and both halves of CLIP, as features of images and texts, are transformers'."""

import numpy as np
import pytest
import torch
from pairs import randomise
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from jaxdiff.data.tokens import Tokenizer
from jaxdiff.evaluation.features import open_network
from jaxdiff.evaluation.scores import clip_score
from jaxdiff.io.folder import CLIP


@pytest.mark.parametrize("kind", ["plain", "swiglu", "registers", "another grid"])
def test_dinov2_of_random_weights(tmp_path, figures, kind):
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "image_size": 224}
    if kind == "another grid":
        sizes["image_size"] = 518  # as published
    torch.manual_seed(0)
    if kind == "registers":
        net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3))
    else:
        net = Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=kind == "swiglu"))
    randomise(net, 1).eval().save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        want = net(((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)).pooler_output.numpy()
    error = np.linalg.norm(open_network("dinov2", tmp_path)(images) - want) / np.linalg.norm(want)
    figures[f"DINOv2, {kind}"] = error
    assert error < 1e-5


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_clip_scores_of_random_weights(tmp_path, figures, own_tokenizer):
    texts = ["a red apple", "a dog on a blue background, noto style", "apple " * 100]
    tokenizer = Tokenizer.train(texts * 9, 520, 77) if own_tokenizer else Tokenizer.load(CLIP, 77)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_id}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 24, "patch_size": 6}, projection_dim=20)
    torch.manual_seed(0)
    net = randomise(CLIPModel(config), 1)
    net.save_pretrained(tmp_path)
    if own_tokenizer:
        tokenizer.save(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3)).astype(np.uint8)
    look = open_network("clip", tmp_path)
    with torch.no_grad():
        theirs = net.text_projection(net.text_model(torch.tensor(tokenizer(texts))).pooler_output).numpy()
    ours = look.texts(texts)
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    figures[f"CLIP's text half, {own_tokenizer=}"] = error
    assert error < 1e-5
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(look(images)), torch.tensor(theirs))
    np.testing.assert_allclose(clip_score(look(images), ours, 100.0), 100 * cosine.clip(0).numpy(), atol=1e-3)
