"""Makes a target's program, runs it, and gathers what was found."""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax

from jaxdiff.config import DataConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.tools import hlo
from jaxdiff.tools.bench import measure
from jaxdiff.tools.bench.measure import Spread
from jaxdiff.tools.bench.models import ModelSizes
from jaxdiff.tools.bench.result import Result
from jaxdiff.tools.bench.targets import TARGETS, Setting, Work
from jaxdiff.tools.bench.versus import versus
from jaxdiff.training.feed import Feed, calls, local_rows

TRACED = 3  # runs in a profile
READ_AHEAD = 8  # batches of a loader that are not timed: it has read some before it is asked


def program(
    target: str, setting: Setting, runs: int, warmup: int, trace: Path | None, rivals: Sequence[bool]
) -> Result:
    """Compiles one target at one batch and times it.

    Args:
        target: a name in `TARGETS`.
        setting: model and sizes.
        runs: those that are timed.
        warmup: those before them, after the first.
        trace: a folder for a profile of some more.
        rivals: for each of torch's programs to compare with, whether torch.compile makes it.
    """
    work = TARGETS[target](setting)
    made = measure.make(work.f, work.args)
    peak = measure.best(setting.mesh.size)

    measure.forget_peak()
    run, feed = _runner(made.compiled, work), _feed(work, setting)
    first, first_out = measure.timed(run)
    with feed or nullcontext():
        times, waits = [], []
        for _ in range(warmup + runs):
            began = time.perf_counter()
            batch = next(feed)[1] if feed else None
            waits.append(time.perf_counter() - began)
            times.append(measure.seconds(lambda batch=batch: run(batch)))
    waits, times = waits[warmup:], times[warmup:]
    memory, memory_of = measure.peak()

    if trace:
        with jax.profiler.trace(str(trace)):
            for _ in range(TRACED):
                jax.block_until_ready(run())
    against = tuple(
        versus(target, setting, work, run, first_out, runs=runs, warmup=warmup, compiled=compiled)
        for compiled in rivals
    )

    devices, known = setting.mesh.size, work.turns == 1
    seconds = Spread.of([wait + step for wait, step in zip(waits, times, strict=True)] if feed else times)
    rate, speed = setting.batch / seconds.median, work.flops / seconds.median
    moved = devices * float(hlo.parse(made.compiled.as_text(), work.turns).bytes_moved())
    counted = (made.compiled.cost_analysis() or {}).get("flops", 0) if known else 0
    analysis = made.compiled.memory_analysis()
    return Result(
        target=target,
        model=setting.model.name,
        batch=setting.batch,
        size=setting.size,
        dtype=setting.dtype,
        devices=devices,
        mesh=dict(setting.mesh.shape),
        options=setting.options,
        trace=made.trace,
        lower=made.lower,
        compile=made.compile,
        first=first,
        seconds=seconds,
        images_per_second=rate,
        images_per_second_per_device=rate / devices,
        flops=work.flops,
        xla_flops=devices * counted if counted > 0 else None,
        flops_per_second=speed,
        peak_share=speed / peak.flops if peak else None,
        bytes_moved=moved,
        bandwidth_share=moved / seconds.median / peak.bandwidth if peak else None,
        peak_source=peak.source if peak else None,
        temporaries=analysis.temp_size_in_bytes if analysis else None,
        peak_memory=memory,
        peak_memory_of=memory_of,
        wait_share=sum(waits) / sum(waits + times) if feed else None,
        versus=against,
    )


def _runner(compiled: Any, work: Work) -> Callable[..., Any]:
    """One run of the program, on its own arguments or, in training, with another batch; the state goes on."""
    args = work.args

    def run(batch: Any = None) -> Any:
        nonlocal args
        if batch is not None:
            args = work.fed(args, batch)
        out = compiled(*args)
        args = work.advance(args, out)
        return work.fetch(out)

    return run


def _feed(work: Work, setting: Setting) -> Feed | None:
    """The batches of training on real images."""
    if setting.fed is None:
        return None
    assert work.config is not None
    rows = local_rows(setting.mesh, setting.batch)
    data = work.config.data
    source = batches(data, open_source(data), _tokenizer(setting.model), seed=0, rows=rows)
    return Feed(calls(source, itertools.repeat(1)), setting.mesh)


def _tokenizer(model: ModelSizes) -> Tokenizer:
    return Tokenizer.load(model.tokenizer, model.text_encoder.max_position_embeddings)


def loader(config: DataConfig, model: ModelSizes, steps: int) -> Result:
    """Times the loader alone, over so many batches; images/s are those of all of them together."""
    measure.forget_peak()
    with closing(batches(config, open_source(config), _tokenizer(model), seed=0)) as source:
        first = measure.seconds(lambda: next(source))
        for _ in range(READ_AHEAD):
            next(source)
        times = [measure.seconds(lambda: next(source)) for _ in range(steps)]
    memory, memory_of = measure.peak()
    rate = config.batch_size * steps / sum(times)
    return Result(
        target="data",
        model=model.name,
        batch=config.batch_size,
        size=config.size,
        dtype="float32",
        devices=1,
        mesh={},
        options={"source": config.source, "workers": config.workers},
        first=first,
        seconds=Spread.of(times),
        images_per_second=rate,
        images_per_second_per_device=rate,
        peak_memory=memory,
        peak_memory_of=memory_of,
    )
