"""Compile a run's kernels before its ranks meet, once for all processes that share a cache.

Compiling takes a core as long as a training step takes a second: ranks that meet first and compile then wait
for each other in a collective, which cannot be told from a hang. Each distinct block is made by itself, with
random weights, run forwards and backwards on rows of the run's own data, and let go of.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmtrain
from ssmtrain.config.carry import slots
from ssmtrain.config.errors import UserError
from ssmtrain.config.growth import lengths
from ssmtrain.config.model import ModelConfig
from ssmtrain.config.schema import RunConfig, dump
from ssmtrain.data.batch import Batch, cut
from ssmtrain.data.mixture import Mixture
from ssmtrain.data.module import Data, Rows
from ssmtrain.kernels import cache
from ssmtrain.layers.base import Context
from ssmtrain.layers.norm import Stream
from ssmtrain.model.block import Block
from ssmtrain.model.heads import LmHead
from ssmtrain.model.hybrid import layout_names
from ssmtrain.model.inputs import TokenInput
from ssmtrain.parallel.apply import apply_to
from ssmtrain.train.once import once

Say = Callable[[str], None]


def settle(folder: str | None) -> Path:
    """Keep kernels in a folder (None: where Triton does), which must be one that can be written to."""
    place = cache.use(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"trainer.kernel_cache: kernels cannot be kept in {place}: {error.strerror}",
            "set trainer.kernel_cache to a folder that can be written to",
        ) from None
    return place


def warm_up(config: RunConfig, vocab: int, data: Data, device: torch.device, rows: int, say: Say) -> None:
    """Compile what the model launches for `rows` rows at a time, where no process has done so before.

    Failing costs no more than the time: kernels that are not there compile in the first step.
    """
    folder = settle(config.trainer.kernel_cache)
    name = torch.cuda.get_device_name(device)
    found: list[Batch] = []

    def work() -> dict[str, Any]:
        say(f"compiling kernels for {name} into {folder}: this takes a while, once")
        began = time.monotonic()
        with cache.compiled() as names, torch.cuda.device(device):
            run_blocks(config, vocab, found, device)
            torch.cuda.synchronize(device)
        release(device)
        seconds = time.monotonic() - began
        say(f"compiled {len(names)} kernels in {seconds:.1f} s")
        return {"kernels": len(names), "seconds": round(seconds, 1), "gpu": name}

    def waiting() -> None:
        say(f"another process compiles kernels into {folder}: waiting for it")

    try:
        shapes = dict.fromkeys((config.data.seq_len, *(length for _, length in lengths(config.data).stages)))
        found += [cut(batch, length) for batch in batches(data, rows) for length in shapes]
        record = folder / "ssmtrain" / f"{_key(config, vocab, found, device)}.json"
        once(record, work, waiting, lead=(device.index or 0) == 0)
    except Exception as error:
        release(device)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"kernels were not compiled before the first step, which will take longer: {what}")


def batches(data: Data, rows: int) -> list[Batch]:
    """Batches of each kind that the run may meet: Triton looks at whether rows hold several documents, and at
    whether their number is a multiple of 16."""
    text, length = data.train, data.train.seq_len
    if not isinstance(text, (Rows, Mixture)):
        return [text.batch(range(rows))]  # the rows of a task are one document each
    sources = text.sources.values() if isinstance(text, Mixture) else [text]
    parts = [part for part in sources if isinstance(part, Rows)]
    kinds: dict[Any, Batch] = {}
    for at in range(64):
        batch = text.batch(range(at * rows, (at + 1) * rows))
        kinds.setdefault(_kind(batch), batch)
        if at == 0 and batch.doc_ids is None:
            inside = [(part, s) for part in parts for s in part.stream.starts[:10_000].tolist() if s % length]
            if not inside:
                break
            part, start = inside[0]
            packed = part.batch_rows([start // length] * rows)
            kinds.setdefault(_kind(packed), packed)
        if {True, False} <= kinds.keys():
            break
    first = next(iter(kinds.values()))
    # Documents longer than a row: some rows are one.
    if any(part.stream.tokens > length * len(part.stream.starts) for part in parts):
        kinds.setdefault(None, replace(first, doc_ids=None, n_docs=rows))
    return list(kinds.values())


def _kind(batch: Batch) -> Any:
    return None if batch.doc_ids is None else batch.n_docs % 16 == 0


def steps(config: ModelConfig) -> list[tuple[str, str | None]]:
    """Each block of the layout and the block before it (None: the input), each pair of configs once.

    The norm that a block begins with adds up the stream that the one before it leaves.
    """
    same = _names(config)
    return list(dict.fromkeys(zip(same, [None, *same])))


def _names(config: ModelConfig) -> list[str]:
    """The block at each depth, by the first name of its like."""
    names = layout_names(config)
    first = {name: next(n for n in names if config.blocks[n] == config.blocks[name]) for name in set(names)}
    return [first[name] for name in names]


def run_blocks(config: RunConfig, vocab: int, found: list[Batch], device: torch.device) -> None:
    """Forward and backward of the input, of each distinct block, and of the head, one at a time."""
    model, trainer = config.model, config.trainer.model_copy(update={"compile": False})
    d, m = model.d_model, model.multipliers
    source = torch.Generator(device).manual_seed(config.seed)

    def new(like: tuple[torch.Size, torch.dtype]) -> Tensor:
        noise = torch.randn(like[0], generator=source, device=device, dtype=torch.float32)
        return noise.to(like[1]).requires_grad_()

    whole = (found[0].inputs.shape[0], found[0].inputs.shape[1], d)
    leaves: dict[str | None, list[Any]] = {None: [(torch.Size(whole), torch.float32)]}
    for name, before in steps(model):
        with torch.device("meta"):
            block = Block(model.blocks[name], d, model.norm_eps, m.residual, model.residual_fp32)
        _draw(block, device, source)
        apply_to(block, trainer, m.residual)
        for batch in found:
            stream = Stream(*map(new, leaves[before]))
            ctx, state = _context(batch, device), None
            if slots(config) is not None:
                dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
                state = block.init_state(batch.n_docs, 1, dtype, device)
                ctx.states = [state]
            with _autocast(config, device):
                out, _, stats = block(stream, ctx, state)
            extra = [stats["aux"] + stats["z"]] if stats else []
            parts = [part for part in out if part is not None]
            leaves[name] = [(part.shape, part.dtype) for part in parts]
            roots = [*parts, *extra]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
            for parameter in block.parameters():
                parameter.grad = None
        del block, stream, out, stats, extra, parts, roots
        gc.collect()  # a block that knows its wrapped forward is not freed otherwise
    last = Stream(*map(new, leaves[_names(model)[-1]]))
    _ends(config, vocab, found[0], device, last, source)


def _ends(
    config: RunConfig,
    vocab: int,
    batch: Batch,
    device: torch.device,
    last: Stream,
    source: torch.Generator,
) -> None:
    """The input and the head, which share a weight where they are tied."""
    model, m = config.model, config.model.multipliers
    std = model.init.embedding_std
    with torch.device("meta"):
        entry = TokenInput(vocab, model.d_model, std, m.embedding)
        head = LmHead(vocab, model.d_model, model.norm_eps, std, model.tie_embeddings, m.logits)
    for module in (entry, head):
        _draw(module, device, source)
    there = batch.to(device)
    with _autocast(config, device):
        x = entry(there.inputs)
        loss, count = head.loss(last.total(m.residual), there.labels, entry.weight)
    torch.autograd.backward([loss / count.clamp(min=1), x], [torch.ones_like(loss), torch.ones_like(x)])


def _draw(module: nn.Module, device: torch.device, source: torch.Generator) -> None:
    module.to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02, generator=source)
        for buffer in module.buffers():
            buffer.zero_()


def _context(batch: Batch, device: torch.device) -> Context:
    ids = None if batch.doc_ids is None else batch.doc_ids.to(device)
    return Context(doc_ids=ids, n_docs=batch.n_docs)


def _autocast(config: RunConfig, device: torch.device) -> Any:
    """As `LitLM.autocast`."""
    if config.trainer.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def release(device: torch.device) -> None:
    """Give the device's memory back, and forget how much it was: training reports its own peak."""
    gc.collect()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def _key(config: RunConfig, vocab: int, found: list[Batch], device: torch.device) -> str:
    """What decides which kernels are compiled, in 32 hex digits."""
    trainer = config.trainer
    text = [
        *cache.fingerprint(device, _sources()),
        dump(config)["model"],
        [vocab, trainer.precision, trainer.recompute, trainer.kernels, slots(config) is not None],
        [(list(batch.inputs.shape), str(_kind(batch))) for batch in found],
    ]
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:32]


def _sources() -> Iterator[Path]:
    house = Path(ssmtrain.__file__).parent
    for room in ("kernels", "layers", "model", "parallel"):
        yield from (house / room).rglob("*.py")
    yield house / "kernels" / "tuned.json"
