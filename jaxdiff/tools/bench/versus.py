"""The same work by diffusers on torch, with the same weights, in the same process: the parity extra's only place here.

Each rival is a function of no arguments that does what one call of our program does, and returns what it gave in our
layout, so that the two can be compared.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import UNetConfig, to_dict
from jaxdiff.io.convert import to_torch
from jaxdiff.io.scheduler import scheduler_values
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.tools.bench.measure import Spread, cores, seconds, timed
from jaxdiff.tools.bench.targets import Setting, Work
from jaxdiff.types import Params


@dataclass(frozen=True)
class Versus:
    """Pairs of runs, one of ours and one of theirs after the other."""

    against: str
    layout: str
    """Of torch's memory: the faster of its two was taken."""
    threads: int | None
    """Of both, on a CPU."""
    first: float
    """Seconds of their first call, after the layout was chosen; it compiles, where they compile."""
    seconds: Spread
    ratio: Spread
    """Our time over theirs, pair by pair."""
    error: float
    error_of: str


@dataclass(frozen=True)
class Rival:
    """Their program."""

    network: Any
    """What is laid out in memory."""
    hot: Any
    """The part of it that torch.compile is given."""
    run: Callable[[], Any]
    short: Callable[[], Any]
    """As `run`, but no longer than it takes to tell which layout is faster."""


def check_torch() -> None:
    """Refuses in a sentence where torch or diffusers is missing, before anything is measured."""
    for name in ("torch", "diffusers"):  # not imported yet: our own memory is measured without them
        if find_spec(name) is None:
            raise ValueError(f"--vs needs {name}, which is not installed: pip install 'jaxdiff[parity]'.")
    if jax.default_backend() not in ("cpu", "gpu"):
        raise ValueError(f"--vs compares on CPUs and NVIDIA GPUs; torch has no backend for {jax.default_backend()}.")


def versus(
    target: str,
    setting: Setting,
    work: Work,
    ours: Callable[[], Any],
    our_first: Any,
    *,
    runs: int,
    warmup: int,
    compiled: bool,
) -> Versus:
    """Alternates `ours` with diffusers' program for the same work.

    Args:
        target: its name.
        setting: the model and the sizes.
        work: our program; its `raw` weights and `inputs` are theirs, too.
        ours: runs it once.
        our_first: what it gave at first.
        runs: pairs.
        warmup: their runs before these, after the first.
        compiled: whether torch.compile makes their program.
    """
    import diffusers
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise ValueError("--vs compares on one device, and this torch sees no GPU: install one made for CUDA.")
    with _silence():
        if on_cpu := jax.default_backend() == "cpu":
            torch.set_num_threads(cores())
        grads = nullcontext() if target == "train" else torch.inference_mode()
        with grads:
            rival = RIVALS[target](setting, work)
            layout = _faster_layout(rival)
            if compiled:
                rival.hot.compile()
            first, their_first = timed(rival.run)
            error, error_of = _error(target, our_first, their_first)
            for _ in range(warmup):
                rival.run()
            theirs, ratios = [], []
            for i in range(runs):
                order = (ours, rival.run) if i % 2 == 0 else (rival.run, ours)  # neither always comes second
                times = {run: seconds(run) for run in order}
                theirs.append(times[rival.run])
                ratios.append(times[ours] / times[rival.run])
    how = "torch.compile" if compiled else "eager"
    name = f"diffusers {diffusers.__version__}, torch {torch.__version__}, {how}"
    return Versus(name, layout, torch.get_num_threads() if on_cpu else None, first, Spread.of(theirs),
                  Spread.of(ratios), error, error_of)  # fmt: skip


@contextmanager
def _silence() -> Iterator[None]:
    """Warnings and bars of libraries that are only measured here."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with warnings.catch_warnings(action="ignore"):
        import transformers
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        logging.getLogger("torch").setLevel(logging.ERROR)
        yield


def _faster_layout(rival: Rival) -> str:
    """Leaves the network in the faster of torch's two layouts for images."""
    import torch

    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    times = {}
    for name, memory_format in formats.items():
        rival.network.to(memory_format=memory_format)
        seconds(rival.short)
        times[name] = seconds(rival.short)
    layout = min(times, key=times.__getitem__)
    rival.network.to(memory_format=formats[layout])
    return layout


def _error(target: str, ours: Any, theirs: Any) -> tuple[float, str]:
    """How far the two results are apart."""
    if target == "sample":
        difference = np.abs(np.asarray(ours, np.float64) - 255 * theirs)
        return float(difference.mean()), "mean difference of pixels, of 255"
    if target == "train":
        pairs = [(float(ours[name]), theirs[name]) for name in ("loss", "grad_norm")]
        return max(abs(a - b) / abs(b) for a, b in pairs), "relative difference of the first loss and gradient norm"
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)), "relative error of the output"


# Their programs -------------------------------------------------------------------------------------------------------


def _diffusers() -> Any:
    """Untyped, since it makes its names at run time."""
    import diffusers

    return diffusers


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _finish() -> None:
    """Waits for the device, as `block_until_ready` does."""
    import torch

    if _device() == "cuda":
        torch.cuda.synchronize()


def _module(setting: Setting, raw: dict[str, Params], part: str, dtype: str) -> Any:
    """Their network of our config, with our weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    diffusers = _diffusers()
    config = getattr(setting.model, part)
    values = to_dict(config)
    if isinstance(config, UNetConfig):  # diffusers reads the number of heads from `attention_head_dim` only
        values |= {"attention_head_dim": list(config.heads), "num_attention_heads": None}
    state = {
        name: torch.from_numpy(array.astype(np.float32, copy=False)) for name, array in to_torch(raw[part]).items()
    }
    if part == "text_encoder":
        module = CLIPTextModel(CLIPTextConfig(**values))
        names = module.state_dict().keys()
        state = {name if name in names else name.removeprefix("text_model."): x for name, x in state.items()}
    else:
        with torch.device("meta"):  # whose own random weights would take half a minute
            module = (diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL)(**values)
    network: Any = module
    network.load_state_dict(state, assign=True)
    return network.to(device=_device(), dtype=getattr(torch, dtype)).eval()


def _tensor(x: Any, dtype: str | None = None) -> Any:
    """Images and latents become NCHW."""
    import torch

    array = np.array(x)
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(_device())
    return tensor.to(getattr(torch, dtype)) if dtype else tensor


def _ours(x: Any) -> np.ndarray:
    array = x.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _unet(setting: Setting, work: Work) -> Rival:
    network = _module(setting, work.raw, "unet", setting.dtype)
    x, context = (_tensor(work.inputs[name], setting.dtype) for name in ("x", "context"))
    t = _tensor(work.inputs["t"])
    return _evaluated(network, lambda: network(x, t, context).sample)


def _vae(setting: Setting, work: Work) -> Rival:
    network = _module(setting, work.raw, "vae", setting.dtype)
    x = _tensor(next(iter(work.inputs.values())), setting.dtype)
    if setting.options["encode"]:
        return _evaluated(network, lambda: network.encode(x).latent_dist.parameters, network.encoder)
    return _evaluated(network, lambda: network.decode(x).sample, network.decoder)


def _text(setting: Setting, work: Work) -> Rival:
    network = _module(setting, work.raw, "text_encoder", setting.dtype)
    tokens = _tensor(work.inputs["tokens"]).long()
    return _evaluated(network, lambda: network(tokens).last_hidden_state)


def _evaluated(network: Any, evaluate: Callable[[], Any], hot: Any = None) -> Rival:
    """The run waits for the device; what it gave is copied to the host only where it is looked at."""

    def run() -> Any:
        out = evaluate()
        _finish()
        return _Lazy(out)

    return Rival(network, hot or network, run, run)


class _Lazy:
    """An output that becomes an array of ours when NumPy asks for it."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _ours(self._tensor).astype(dtype or np.float32)


def _sample(setting: Setting, work: Work) -> Rival:
    import torch
    from transformers import CLIPTokenizer

    diffusers = _diffusers()
    model, inputs = setting.model, work.inputs
    tokenizer = CLIPTokenizer.from_pretrained(model.tokenizer)
    tokenizer.model_max_length = model.text_encoder.max_position_embeddings
    parts = {part: _module(setting, work.raw, part, setting.dtype) for part in ("text_encoder", "unet", "vae")}
    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(**scheduler_values(model.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Set afterwards: the constructor would overrule `steps_offset` and `clip_sample`.
    pipe.scheduler = diffusers.DDIMScheduler(**scheduler_values(model.scheduler))
    pipe.set_progress_bar_config(disable=True)
    latents = _tensor(inputs["latents"], setting.dtype)

    def draw(steps: int) -> Any:
        return pipe(
            inputs["prompts"],
            negative_prompt=inputs["negatives"],
            num_inference_steps=steps,
            guidance_scale=inputs["guidance"],
            latents=latents,
            height=setting.size,
            width=setting.size,
            output_type="np",
        ).images

    both = torch.cat([latents, latents])
    context = torch.zeros(len(both), tokenizer.model_max_length, model.unet.cross_attention_dim).to(both)

    def once() -> None:
        parts["unet"](both, 500, context)
        _finish()

    return Rival(parts["unet"], parts["unet"], lambda: draw(inputs["steps"]), once)


def _train(setting: Setting, work: Work) -> Rival:
    """The usual loop of torch: forward, backward, clip, AdamW. Ours keeps an average of the weights besides."""
    import torch

    assert work.config is not None
    optim = work.config.optim
    network = _module(setting, work.raw, "unet", "float32").train()
    seen = {name: _tensor(x, "float32") for name, x in _example(setting, work).items()}
    adamw = torch.optim.AdamW(network.parameters(), optim.lr / (min(optim.warmup_steps, work.config.steps - 1) + 1),
                              (optim.b1, optim.b2), optim.eps, optim.weight_decay)  # fmt: skip
    told: list[dict[str, float]] = []
    half = torch.autocast(_device(), torch.bfloat16) if setting.dtype == "bfloat16" else nullcontext()

    def step() -> dict[str, float]:
        adamw.zero_grad(set_to_none=True)
        with half:
            out = network(seen["x"], seen["t"], seen["context"]).sample
        loss = torch.nn.functional.mse_loss(out.float(), seen["target"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
        adamw.step()
        told.append({"loss": loss.item(), "grad_norm": norm.item()})
        return told[0]  # what is compared: the steps after it go other ways

    return Rival(network, network, step, step)


def _example(setting: Setting, work: Work) -> dict[str, jax.Array]:
    """What our loss shows the UNet at the first step, and what it wants of it.

    The loss is asked itself: with a constant in place of the UNet's answer it says, by its gradient there, what the
    answer should have been.
    """
    task, frozen, batch = (work.inputs[name] for name in ("task", "frozen", "batch"))
    seen: dict[str, jax.Array] = {}
    answer = jnp.zeros(setting.latent)

    def loss(answer: jax.Array) -> jax.Array:
        def intercept(next_fn: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, UNet2DConditionModel) and context.method_name == "__call__":
                seen.update(zip(("x", "t", "context"), args, strict=True))
                return answer
            return next_fn(*args, **kwargs)

        with nn.intercept_methods(intercept):
            step_key = jax.random.fold_in(jax.random.key(0), 0)
            return task.loss({"unet": work.raw["unet"]}, frozen, batch, step_key, task.memory)[0]

    wanted = jax.grad(loss)(answer) * (-answer.size / 2)
    return seen | {"target": wanted}


RIVALS: dict[str, Callable[[Setting, Work], Rival]] = {
    "unet": _unet,
    "vae": _vae,
    "text": _text,
    "sample": _sample,
    "train": _train,
}
