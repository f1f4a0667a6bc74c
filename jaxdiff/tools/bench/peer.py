"""The same work by diffusers on torch, in a process of its own: the parity extra's only place here.

Each rival is a function of no arguments that does what one call of our program does, and returns what it gave in our
layout, so that the two can be compared. Between its turns the process waits for a message, and does nothing.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from jaxdiff.config import UNetConfig, to_dict
from jaxdiff.io.convert import to_torch
from jaxdiff.io.scheduler import scheduler_values
from jaxdiff.tools.bench.measure import seconds, timed
from jaxdiff.tools.bench.models import ModelSizes, weights


@dataclass(frozen=True)
class Brief:
    """What the other process is told: all else it makes itself, such as the weights."""

    target: str
    model: ModelSizes
    size: int
    dtype: str
    device: str
    """cpu or cuda."""
    threads: int
    options: dict[str, Any]
    inputs: dict[str, Any]
    """Arrays of NumPy, and numbers."""
    compiled: bool
    """Whether torch.compile makes the program."""


@dataclass(frozen=True)
class Made:
    """What it answers once its program has run for the first time."""

    name: str
    layout: str
    threads: int | None
    first: float
    out: Any


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


def serve(connection: Connection, brief: Brief) -> None:
    """Makes the program, sends `Made`, and then the seconds of one run for each message; an error is sent, and ends it.

    The process ends when the other side closes the connection.
    """
    try:
        with _silence():
            for answer in _answers(brief):
                connection.send(answer)
                connection.recv()
    except EOFError:
        return
    except Exception as error:
        connection.send(ValueError(f"Torch's program failed: {type(error).__name__}: {error}"))


def _answers(brief: Brief) -> Iterator[Any]:
    """`Made`, and then seconds without end."""
    import torch

    if brief.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--vs compares on one device, and this torch sees no GPU: install one made for CUDA.")
    if brief.device == "cpu":
        torch.set_num_threads(brief.threads)
    with nullcontext() if brief.target == "train" else torch.inference_mode():
        rival = RIVALS[brief.target](brief)
        layout = _faster_layout(rival)
        if brief.compiled:
            rival.hot.compile()
        first, out = timed(rival.run)
        how = "torch.compile" if brief.compiled else "eager"
        name = f"diffusers {_diffusers().__version__}, torch {torch.__version__}, {how}"
        threads = torch.get_num_threads() if brief.device == "cpu" else None
        yield Made(name, layout, threads, first, np.asarray(out) if isinstance(out, _Lazy) else out)
        while True:
            yield seconds(rival.run)


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


def _diffusers() -> Any:
    """Untyped, since it makes its names at run time."""
    import diffusers

    return diffusers


def _finish(brief: Brief) -> None:
    """Waits for the device, as `block_until_ready` does."""
    import torch

    if brief.device == "cuda":
        torch.cuda.synchronize()


def _module(brief: Brief, part: str, dtype: str) -> Any:
    """Their network of our config, with our weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    diffusers = _diffusers()
    config = getattr(brief.model, part)
    values = to_dict(config)
    if isinstance(config, UNetConfig):  # diffusers reads the number of heads from `attention_head_dim` only
        values |= {"attention_head_dim": list(config.heads), "num_attention_heads": None}
    raw = to_torch(weights(brief.model, part)[part])
    state = {name: torch.from_numpy(array.astype(np.float32, copy=False)) for name, array in raw.items()}
    if part == "text_encoder":
        module = CLIPTextModel(CLIPTextConfig(**values))
        names = module.state_dict().keys()
        state = {name if name in names else name.removeprefix("text_model."): x for name, x in state.items()}
    else:
        with torch.device("meta"):  # whose own random weights would take half a minute
            module = (diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL)(**values)
    network: Any = module
    network.load_state_dict(state, assign=True)
    return network.to(device=brief.device, dtype=getattr(torch, dtype)).eval()


def _tensor(brief: Brief, x: Any, dtype: str | None = None) -> Any:
    """Images and latents become NCHW."""
    import torch

    array = np.array(x)
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(brief.device)
    return tensor.to(getattr(torch, dtype)) if dtype else tensor


def _ours(x: Any) -> np.ndarray:
    array = x.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _unet(brief: Brief) -> Rival:
    network = _module(brief, "unet", brief.dtype)
    x, context = (_tensor(brief, brief.inputs[name], brief.dtype) for name in ("x", "context"))
    t = _tensor(brief, brief.inputs["t"])
    return _evaluated(brief, network, lambda: network(x, t, context).sample)


def _vae(brief: Brief) -> Rival:
    network = _module(brief, "vae", brief.dtype)
    x = _tensor(brief, next(iter(brief.inputs.values())), brief.dtype)
    if brief.options["encode"]:
        return _evaluated(brief, network, lambda: network.encode(x).latent_dist.parameters, network.encoder)
    return _evaluated(brief, network, lambda: network.decode(x).sample, network.decoder)


def _text(brief: Brief) -> Rival:
    network = _module(brief, "text_encoder", brief.dtype)
    tokens = _tensor(brief, brief.inputs["tokens"]).long()
    return _evaluated(brief, network, lambda: network(tokens).last_hidden_state)


def _evaluated(brief: Brief, network: Any, evaluate: Callable[[], Any], hot: Any = None) -> Rival:
    """The run waits for the device; what it gave is copied to the host only where it is looked at."""

    def run() -> Any:
        out = evaluate()
        _finish(brief)
        return _Lazy(out)

    return Rival(network, hot or network, run, run)


class _Lazy:
    """An output that becomes an array of ours when NumPy asks for it."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _ours(self._tensor).astype(dtype or np.float32)


def _sample(brief: Brief) -> Rival:
    import torch
    from transformers import CLIPTokenizer

    diffusers = _diffusers()
    model, inputs = brief.model, brief.inputs
    tokenizer = CLIPTokenizer.from_pretrained(model.tokenizer)
    tokenizer.model_max_length = model.text_encoder.max_position_embeddings
    parts = {part: _module(brief, part, brief.dtype) for part in ("text_encoder", "unet", "vae")}
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
    latents = _tensor(brief, inputs["latents"], brief.dtype)

    def draw(steps: int) -> Any:
        return pipe(
            inputs["prompts"],
            negative_prompt=inputs["negatives"],
            num_inference_steps=steps,
            guidance_scale=inputs["guidance"],
            latents=latents,
            height=brief.size,
            width=brief.size,
            output_type="np",
        ).images

    both = torch.cat([latents, latents])
    context = torch.zeros(len(both), tokenizer.model_max_length, model.unet.cross_attention_dim).to(both)

    def once() -> None:
        parts["unet"](both, 500, context)
        _finish(brief)

    return Rival(parts["unet"], parts["unet"], lambda: draw(inputs["steps"]), once)


def _train(brief: Brief) -> Rival:
    """The usual loop of torch: forward, backward, clip, AdamW. Ours keeps an average of the weights besides."""
    import torch

    optim, steps = brief.inputs["optim"], brief.inputs["steps"]
    network = _module(brief, "unet", "float32").train()
    seen = {name: _tensor(brief, x, "float32") for name, x in brief.inputs["seen"].items()}
    adamw = torch.optim.AdamW(network.parameters(), optim.lr / (min(optim.warmup_steps, steps - 1) + 1),
                              (optim.b1, optim.b2), optim.eps, optim.weight_decay)  # fmt: skip
    told: list[dict[str, float]] = []
    half = torch.autocast(brief.device, torch.bfloat16) if brief.dtype == "bfloat16" else nullcontext()

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


RIVALS: dict[str, Callable[[Brief], Rival]] = {
    "unet": _unet,
    "vae": _vae,
    "text": _text,
    "sample": _sample,
    "train": _train,
}
