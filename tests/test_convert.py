"""Names and layouts go to ours and back without loss, for every parameter of SD1.5 and SD2.1."""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxdiff.io.convert import from_torch, leaves, path_of, to_torch, torch_axes, torch_name

DATA = Path(__file__).parent / "data"
SD1 = {"unet": UNetConfig(cross_attention_dim=768), "vae": VAEConfig(), "text_encoder": CLIPTextConfig()}
SD2 = {
    "unet": UNetConfig(cross_attention_dim=1024, use_linear_projection=True, attention_head_dim=(5, 10, 20, 20)),
    "vae": VAEConfig(),
    "text_encoder": CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"
    ),
}


def published(model: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """(network, torch name) -> torch shape, as diffusers 0.42 and transformers 5.23 give them (tests/parity checks)."""
    lines = gzip.decompress((DATA / f"names_{model}.txt.gz").read_bytes()).decode().splitlines()
    rows = (line.split(" ") for line in lines)
    return {(network, name): tuple(map(int, shape.split("x"))) for network, name, shape in rows}


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_every_published_name_has_a_path_of_its_own_and_comes_back(model):
    names = published(model)
    paths = {(network, path_of(name, len(shape))) for (network, name), shape in names.items()}
    assert len(paths) == len(names)
    assert {(network, torch_name(path)) for network, path in paths} == names.keys()


@pytest.mark.parametrize(("model", "configs"), [("sd1", SD1), pytest.param("sd2", SD2, marks=pytest.mark.slow)])
def test_our_networks_have_exactly_the_published_names_and_shapes(model, configs):
    ours = {}
    for network, config in configs.items():
        shapes = build.param_shapes(getattr(build, network)(config), config)
        for path, leaf in leaves(shapes):
            name = torch_name(path).removeprefix("text_model.")
            ours[network, name] = tuple(leaf.shape[axis] for axis in torch_axes(path, leaf.ndim))
    assert ours == published(model)


def test_paths_read_like_the_torch_names():
    assert path_of("down_blocks.0.resnets.1.conv1.weight", 4) == ("down_blocks_0", "resnets_1", "conv1", "kernel")
    assert path_of("time_embedding.linear_1.bias", 1) == ("time_embedding", "linear_1", "bias")
    assert path_of("a.to_out.0.weight", 2) == ("a", "to_out_0", "kernel")
    assert path_of("a.ff.net.0.proj.weight", 2) == ("a", "ff", "net_0", "proj", "kernel")
    assert path_of("a.ff.net.2.weight", 2) == ("a", "ff", "net_2", "kernel")
    assert path_of("conv_norm_out.weight", 1) == ("conv_norm_out", "scale")
    assert path_of("text_model.embeddings.token_embedding.weight", 2)[-1] == "embedding"


def test_a_convolution_and_a_dense_layer_mean_the_same_in_both_layouts():
    rng = np.random.default_rng(0)
    oihw, x = rng.normal(size=(5, 4, 3, 2)), rng.normal(size=(1, 4, 7, 6))
    oi = rng.normal(size=(5, 4))
    params = from_torch([("conv.weight", oihw), ("dense.weight", oi)])
    nchw = jax.lax.conv_general_dilated(jnp.asarray(x), jnp.asarray(oihw), (1, 1), "VALID")
    nhwc = jax.lax.conv_general_dilated(
        jnp.asarray(x.transpose(0, 2, 3, 1)),
        jnp.asarray(params["conv"]["kernel"]),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(nhwc.transpose(0, 3, 1, 2), nchw, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(params["dense"]["kernel"], oi.T)


def test_arrays_come_back_bit_for_bit_and_contiguous():
    rng = np.random.default_rng(1)
    tensors = {
        "a.0.conv.weight": rng.normal(size=(2, 3, 5, 7)).astype(np.float16),
        "a.0.proj.weight": rng.normal(size=(2, 3)).astype(np.float32),
        "a.1.token_embedding.weight": rng.normal(size=(4, 3)).astype(jnp.bfloat16),
        "norm.bias": rng.normal(size=4).astype(np.float32),
        "norm.weight": rng.normal(size=4).astype(np.float32),
    }
    back = to_torch(from_torch(tensors.items()))
    assert list(back) == sorted(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].flags.c_contiguous
        assert back[name].tobytes() == array.tobytes()


def test_old_names_are_understood():
    def at(params, *path):
        return [params := params[key] for key in path][-1]

    x = np.ones((2, 2), np.float32)
    params = from_torch([(f"encoder.mid_block.attentions.0.{old}.weight", x * i)
                         for i, old in enumerate(("query", "key", "value", "proj_attn"))])  # fmt: skip
    attention = at(params, "encoder", "mid_block", "attentions_0")
    assert [attention[new]["kernel"][0, 0] for new in ("to_q", "to_k", "to_v", "to_out_0")] == [0, 1, 2, 3]

    with_prefix = from_torch([("text_model.encoder.layers.0.mlp.fc1.weight", x),
                              ("text_model.embeddings.position_ids", np.arange(3)[None])])  # fmt: skip
    without = from_torch([("encoder.layers.0.mlp.fc1.weight", x)])
    assert jax.tree.structure(with_prefix) == jax.tree.structure(without)
    assert at(without, "text_model", "encoder", "layers_0", "mlp", "fc1", "kernel").shape == (2, 2)


def test_names_that_cannot_come_back_or_clash_are_refused():
    x = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"'blocks_0\.weight' is not one"):
        from_torch([("blocks_0.weight", x)])
    with pytest.raises(ValueError, match="there twice"):
        from_torch([("vae.attentions.0.query.weight", x), ("vae.attentions.0.to_q.weight", x)])
    with pytest.raises(ValueError, match="inside another"):
        from_torch([("a", x), ("a.bias", x)])
