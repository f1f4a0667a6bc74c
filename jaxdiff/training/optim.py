"""AdamW with warm-up, cosine decay and clipping."""

import jax
import optax

from jaxdiff.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to `lr`, then half a cosine to `lr * final_lr_share` at `steps`."""
    warmup = min(config.warmup_steps, steps - 1)
    first = config.lr / (warmup + 1)  # not 0, which would waste the first batch
    return optax.warmup_cosine_decay_schedule(first, config.lr, warmup, steps, config.lr * config.final_lr_share)


def adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind a clip by global norm; biases and norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
