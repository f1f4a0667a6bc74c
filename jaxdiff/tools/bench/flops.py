"""Operations that the networks' mathematics asks for, from their configs alone.

A multiplication and its addition are two. Matrix products and convolutions count, what is done to single numbers does
not, and neither does how a program goes about it: a convolution by Winograd's algorithm or a block that is computed
again still counts as written here, so that FLOP/s of two programs compare as their times do.
"""

from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig


def unet(config: UNetConfig, batch: int, height: int, width: int, tokens: int) -> int:
    """One evaluation on latents of this size, with prompts of so many tokens."""
    module, context = build.unet(config), config.cross_attention_dim
    channels, emb = module.channels, 4 * module.channels[0]
    pixels = _pyramid(height, width, len(channels))

    def layer(level: int, c_in: int, depth: int) -> int:
        c = channels[level]
        return _resnet(pixels[level], c_in, c, emb) + _transformer(pixels[level], c, tokens, context, depth)

    total = _dense(1, channels[0], emb) + _dense(1, emb, emb) + _conv(pixels[0], config.in_channels, channels[0])
    c, skips, last = channels[0], [channels[0]], len(channels) - 1
    for level, n in enumerate(module.layers):
        for _ in range(n):
            total += layer(level, c, module.down_depths[level])
            c = channels[level]
            skips.append(c)
        if level < last:
            total += _conv(pixels[level + 1], c, c)
            skips.append(c)
    total += layer(last, c, module.mid_depth) + layer(last, c, 0)
    for level in reversed(range(last + 1)):
        for _ in range(module.layers[level] + 1):
            total += layer(level, c + skips.pop(), module.up_depths[level])
            c = channels[level]
        if level:
            total += _conv(pixels[level - 1], c, c)
    return batch * (total + _conv(pixels[0], c, config.out_channels))


def vae_encode(config: VAEConfig, batch: int, height: int, width: int) -> int:
    """Images of this size, in pixels, to moments."""
    channels, moments = config.block_out_channels, 2 * config.latent_channels
    pixels = _pyramid(height, width, len(channels))
    total = _conv(pixels[0], config.in_channels, channels[0])
    c = channels[0]
    for level, c_out in enumerate(channels):
        total += _resnet(pixels[level], c, c_out) + (config.layers_per_block - 1) * _resnet(pixels[level], c_out, c_out)
        c = c_out
        if level < len(channels) - 1:
            total += _conv(pixels[level + 1], c, c)
    total += _middle(pixels[-1], c) + _conv(pixels[-1], c, moments) + _conv(pixels[-1], moments, moments, side=1)
    return batch * total


def vae_decode(config: VAEConfig, batch: int, height: int, width: int) -> int:
    """Latents to images of this size, in pixels."""
    channels, latent = config.block_out_channels, config.latent_channels
    pixels = _pyramid(height, width, len(channels))
    c = channels[-1]
    total = _conv(pixels[-1], latent, latent, side=1) + _conv(pixels[-1], latent, c) + _middle(pixels[-1], c)
    for level in reversed(range(len(channels))):
        c_out = channels[level]
        total += _resnet(pixels[level], c, c_out) + config.layers_per_block * _resnet(pixels[level], c_out, c_out)
        c = c_out
        if level:
            total += _conv(pixels[level - 1], c, c)
    return batch * (total + _conv(pixels[0], c, config.out_channels))


def text_encoder(config: CLIPTextConfig, batch: int) -> int:
    """Prompts, each of the config's full length, to their features."""
    t, d = config.max_position_embeddings, config.hidden_size
    layer = 4 * _dense(t, d, d) + _attention(t, t, d) + 2 * _dense(t, d, config.intermediate_size)
    return batch * config.num_hidden_layers * layer


def _pyramid(height: int, width: int, levels: int) -> list[int]:
    """Pixels of each level; a stride of 2 rounds up."""
    return [-(-height // 2**i) * -(-width // 2**i) for i in range(levels)]


def _dense(rows: int, d_in: int, d_out: int) -> int:
    return 2 * rows * d_in * d_out


def _conv(pixels: int, c_in: int, c_out: int, side: int = 3) -> int:
    return 2 * pixels * side**2 * c_in * c_out


def _attention(queries: int, keys: int, d: int) -> int:
    """Scores, and the sum that they weigh; the number of heads does not matter."""
    return 4 * queries * keys * d


def _resnet(pixels: int, c_in: int, c_out: int, emb: int = 0) -> int:
    shortcut = _conv(pixels, c_in, c_out, side=1) if c_in != c_out else 0
    return _conv(pixels, c_in, c_out) + _conv(pixels, c_out, c_out) + _dense(1, emb, c_out) + shortcut


def _transformer(pixels: int, c: int, tokens: int, context: int, depth: int) -> int:
    if not depth:
        return 0
    own = 4 * _dense(pixels, c, c) + _attention(pixels, pixels, c)
    cross = 2 * _dense(pixels, c, c) + 2 * _dense(tokens, context, c) + _attention(pixels, tokens, c)
    forward = _dense(pixels, c, 8 * c) + _dense(pixels, 4 * c, c)
    return 2 * _dense(pixels, c, c) + depth * (own + cross + forward)


def _middle(pixels: int, c: int) -> int:
    """The autoencoder's: a residual block on either side of attention."""
    return 2 * _resnet(pixels, c, c) + 4 * _dense(pixels, c, c) + _attention(pixels, pixels, c)
