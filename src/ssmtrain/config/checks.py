"""What no single field can know: settings that contradict each other, do not fit, or would be ignored.

All but `layer_problems` read plain attributes, so that they run on a config before torch is imported.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ssmtrain.config import carry, growth, mixing, schema_file, task_rules
from ssmtrain.config.expect import show_value
from ssmtrain.config.layout import MAX_LAYERS, LayoutError, check_name, expand

if TYPE_CHECKING:
    from ssmtrain.config.model import ModelConfig
    from ssmtrain.config.schema import RunConfig

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

BYTES_VOCABULARY = 257
MAPPINGS = ("checks", "blocks", "sources", "val", "weights")
"""Keys whose value has names of the user's own."""


def as_namespace(tree: dict[str, Any]) -> SimpleNamespace:
    """A filled tree under the attributes of a RunConfig."""

    def convert(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [convert(one, "") for one in value]
        if not isinstance(value, dict):
            return value
        inner = {name: convert(one, "" if key in MAPPINGS else name) for name, one in value.items()}
        return inner if key in MAPPINGS else SimpleNamespace(**inner)

    return SimpleNamespace(**{key: convert(value, key) for key, value in tree.items()})


def problems(config: Any, training: bool = False) -> list[str]:
    """Everything wrong with a config (or its namespace) whose fields are each legal, a line each.

    `training` adds what only matters once it is to be trained.
    """
    return [
        *(_limits(config) if training else ()),
        *_name(config),
        *_paths(config),
        *_model(config.model),
        *_vocabulary(config),
        *task_rules.problems(config, _text_vocabulary(config.tokenizer)),
        *_batch(config),
        *growth.problems(config),
        *mixing.problems(config),
        *carry.problems(config),
        *_schedule(config),
        *_parallel(config),
        *_ignored(config),
    ]


def layer_problems(config: RunConfig) -> list[str]:
    """What the layers say against their settings at this width, and a depth that cannot be meant."""
    model = config.model
    lines = []
    for name, block in model.blocks.items():
        for part, layer in (("mixer", block.mixer), ("ffn", block.ffn)):
            for field, wrong in layer.check(model.d_model) if layer is not None else ():
                value = show_value(getattr(layer, field, None))
                lines.append(f"model.blocks.{name}.{part}.{field} = {value}: {wrong}")
    if model.n_layers is not None and model.n_layers > MAX_LAYERS:
        lines.append(f"model.n_layers = {model.n_layers}: at most {MAX_LAYERS}{_size(model)}")
    return [*lines, *carry.layer_problems(config)]


def _limits(config: Any) -> Iterator[str]:
    if config.trainer.max_steps is None and config.trainer.max_tokens is None:
        yield "trainer.max_steps: set it, or trainer.max_tokens: the run and its schedule end there"
    schedule = config.schedule
    if schedule.kind == "decay" and (schedule.start is None or schedule.share is None):
        yield (
            "schedule.start: schedule=decay is the end of another run; fork one with "
            "from=<run>@step-<number>, or set schedule.start and schedule.share"
        )


def _name(config: Any) -> Iterator[str]:
    if config.name is None:
        return
    parts = config.name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) for part in parts):
        yield (
            f"name = {show_value(config.name)}: expected letters, digits, '.', '_' and '-' (at most 100, "
            "starting with a letter or digit), as in name=mine or name=mine/arm"
        )


def _paths(config: Any) -> Iterator[str]:
    """No file system has a name with a NUL in it, and every call that is given one fails in its own way."""
    paths = {
        "runs_dir": config.runs_dir,
        "resume": config.resume,
        "data.cache_dir": getattr(config.data, "cache_dir", None),
        "trainer.kernel_cache": config.trainer.kernel_cache,
        "tokenizer.path": getattr(config.tokenizer, "path", None),
        "data.path": getattr(config.data, "path", None),
    }
    for key, path in paths.items():
        if path is not None and "\0" in path:
            yield f"{key} = {show_value(path)}: a path cannot hold a NUL character; delete it"


def _model(model: Any) -> Iterator[str]:
    for name, block in model.blocks.items():
        wrong = check_name(name)
        if wrong:
            yield f"model.blocks.{name}: {wrong}"
        if block.mixer is None and block.ffn is None:
            yield f"model.blocks.{name}: it has neither a mixer nor an ffn; give it one of them"
    if not model.blocks:
        yield "model.blocks is empty: expected at least one named block"
        return
    if model.n_layers is not None and model.n_layers > MAX_LAYERS:
        return  # layer_problems says how large it would be
    try:
        names = expand(model.layout, model.n_layers)
    except LayoutError as error:
        yield f"model.layout: {error}"
        return
    yield from _used(model, names)


def _size(model: ModelConfig) -> str:
    """How large the model would be, for a depth that is surely a slip."""
    try:
        unit = expand(model.layout)
        blocks = [model.blocks[name] for name in unit if name in model.blocks]
        layers = [layer for block in blocks for layer in (block.mixer, block.ffn) if layer is not None]
        params = sum(layer.num_params(model.d_model) for layer in layers) * (model.n_layers or 0) / len(unit)
    except (LayoutError, ZeroDivisionError):
        return ""
    return f" (this one would have {params:.1e} parameters, {params * 4 / 2**40:,.1f} TiB of weights)"


def _used(model: Any, names: list[str]) -> Iterator[str]:
    unknown = sorted(set(names) - set(model.blocks))
    known = ", ".join(model.blocks)
    for name in unknown:
        near = difflib.get_close_matches(name, model.blocks, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield (
            f"model.layout = {show_value(model.layout)}: {name} is not one of the blocks ({known}){hint}"
            + ("" if near else f"; define model.blocks.{name}")
        )
    for name in model.blocks:
        if name not in names and not unknown:
            yield (
                f"model.blocks.{name}: the layout {model.layout} has no {name}, so this would be ignored; "
                f"put {name} in the layout or delete the block (~model.blocks.{name})"
            )


def _vocabulary(config: Any) -> Iterator[str]:
    tokenizer = config.tokenizer
    if tokenizer.kind == "file":
        if "\0" in tokenizer.path:
            return  # said among the paths
        wrong = _no_file(Path(os.path.expanduser(tokenizer.path)))
        if wrong:
            yield f"tokenizer.path = {show_value(tokenizer.path)}: {wrong}"
            return
    size, vocab = _text_vocabulary(tokenizer), config.model.vocab_size
    if vocab is not None and size is not None and vocab < size:
        yield (
            f"model.vocab_size = {vocab}: smaller than the tokenizer's {size}; "
            f"expected at least {size}, or leave it out"
        )


def _no_file(path: Path) -> str | None:
    """Why there is no file to read at a path; None where there is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "there is no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _text_vocabulary(tokenizer: Any) -> int | None:
    """Ids of a tokenizer; None when it has none of its own, or only its library can tell."""
    if tokenizer.kind != "file":
        return {"bytes": BYTES_VOCABULARY, "bpe": getattr(tokenizer, "vocab_size", None)}.get(tokenizer.kind)
    path = Path(os.path.expanduser(tokenizer.path))
    return None if "\0" in tokenizer.path or _no_file(path) else _file_vocabulary(path)


def _file_vocabulary(path: Path) -> int | None:
    """Highest token id + 1 of a tokenizer.json; None when only the tokenizers library can tell."""
    try:
        page = json.loads(path.read_bytes())
        vocab = page["model"].get("vocab", [])
        ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
        return 1 + max([*ids, *(token["id"] for token in page.get("added_tokens") or [])], default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # the library says what is wrong with it


def _given(trainer: Any) -> int | None:
    """trainer.micro_batch where the page has a number."""
    return None if trainer.micro_batch == "auto" else trainer.micro_batch


def _batch(config: Any) -> Iterator[str]:
    trainer, row = config.trainer, config.data.seq_len
    devices = trainer.devices or 1
    share = row * devices * (_given(trainer) or 1)
    if trainer.global_batch % share:
        below = trainer.global_batch // share * share
        near = " or ".join(str(n) for n in (below, below + share) if n)
        factors = [f"data.seq_len = {row}"]
        factors += [f"trainer.devices = {devices}"] if devices > 1 else []
        factors += [f"trainer.micro_batch = {_given(trainer)}"] if _given(trainer) else []
        yield (
            f"trainer.global_batch = {trainer.global_batch}: tokens of a step, expected a multiple of "
            f"{' x '.join(factors)}; the nearest are {near}"
        )


def _schedule(config: Any) -> Iterator[str]:
    trainer, schedule, grown = config.trainer, config.schedule, growth.batches(config.trainer)
    if trainer.max_steps is not None:
        steps = trainer.max_steps
    elif trainer.max_tokens is not None:
        steps = grown.steps_to(trainer.max_tokens)
    else:
        return
    if config.ema is not None and config.ema.start >= steps:
        yield f"ema.start = {config.ema.start}: the run ends at step {steps}, so there would be no average"
    total = grown.tokens_after(steps) if schedule.unit == "tokens" else steps
    warmup = _units(schedule.warmup, total)
    if warmup > total:
        yield (
            f"schedule.warmup = {schedule.warmup}: longer than the run ({total} {schedule.unit}); "
            "expected less, or a fraction such as 0.05"
        )
        return
    start = getattr(schedule, "start", None)
    if start is not None and start >= total:
        yield (
            f"schedule.start = {start}: the run ends at {total} {schedule.unit}; expected less, or a larger "
            "trainer.max_steps, which counts from the first step of the run forked from"
        )
    decay = getattr(schedule, "decay", 0)
    if warmup + _units(decay, total) > total:
        yield (
            f"schedule.decay = {decay}: with the warm-up ({schedule.warmup}) it is longer than the run "
            f"({total} {schedule.unit}); expected fractions, or whole numbers that fit"
        )


def uneven(config: Any, world: int) -> Iterator[tuple[str, ...]]:
    """What does not divide among `world` devices over all nodes, with what to do where that is plain."""
    trainer, spread = config.trainer, config.parallel
    rows = trainer.global_batch // config.data.seq_len
    if rows % (world * (_given(trainer) or 1)):
        many = f" x trainer.micro_batch={_given(trainer)}" if _given(trainer) else ""
        yield (f"trainer.global_batch: its {rows} rows do not divide by {world} devices{many}",)
    for number, (_, batch) in enumerate(growth.batches(trainer).stages):
        if batch // config.data.seq_len % world:
            key = f"trainer.global_batch_warmup[{number}].global_batch"
            yield (f"{key}: its {batch // config.data.seq_len} rows do not divide by {world} devices",)
    if spread.kind == "fsdp" and world % spread.replicas:
        yield (
            f"parallel.replicas = {spread.replicas}: {world} devices do not divide into as many groups",
            "leave it out, or set it to the number of nodes",
        )


def _parallel(config: Any) -> Iterator[str]:
    """Settings that do not go with how the model is spread."""
    spread = config.parallel
    if spread.kind in ("auto", "ddp"):
        return
    if spread.kind == "deepspeed_zero3" and config.trainer.compile:
        yield (
            "parallel.kind = deepspeed_zero3: not with trainer.compile, whose compiler would have to look "
            "into the engine's gathering; take parallel=fsdp or deepspeed_zero2, or trainer.compile=false"
        )
    if spread.kind == "fsdp" and spread.gather == "bf16" and config.trainer.precision == "fp32":
        yield (
            "parallel.gather = bf16: the run computes in fp32 (trainer.precision), so matrices must be "
            "gathered as fp32; leave it out or take trainer.precision=bf16"
        )
    if config.trainer.micro_batch == "auto":
        yield (
            f"trainer.micro_batch = auto: under {spread.kind} a rank cannot try a pass without the others; "
            "give a number, or take parallel=ddp"
        )
    if config.trainer.spikes is not None and spread.kind != "fsdp":
        yield (
            f"trainer.spikes: the engine of {spread.kind} has stepped before the run knows the loss; take "
            "parallel=fsdp or parallel=ddp, or leave it out"
        )
    if config.optim.kind == "muon":
        yield (
            f"parallel.kind = {spread.kind}: Muon works on whole matrices, and every device holds parts of "
            "them; take parallel=ddp or optim=adamw"
        )
    if config.trainer.cuda_graphs:
        yield (
            f"parallel.kind = {spread.kind}: not with trainer.cuda_graphs, which records no messages between "
            "devices; take parallel=ddp on one device or trainer.cuda_graphs=false"
        )


def _ignored(config: Any) -> Iterator[str]:
    """Settings that another setting switches off."""
    data, generate = config.data, config.generate
    fraction = schema_file.piece(("data", "val_fraction"), {"data": {"kind": "text"}}) or {}
    texts = {f"data.sources.{name}": source for name, source in getattr(data, "sources", {}).items()}
    for key, text in (texts or {"data": data}).items():
        if getattr(text, "format", "auto") == "text" and text.text_key != "text":
            shown = show_value(text.text_key)
            yield f"{key}.text_key = {shown}: no effect with {key}.format=text; leave one out"
        held = getattr(text, "val_fraction", None)
        if held != fraction.get("default") and getattr(text, "val", None) is not None:
            yield f"{key}.val_fraction = {held}: no effect beside {key}.val; leave one out"
    if generate.temperature == 0 and (generate.top_k or generate.top_p < 1):
        which = "top_k" if generate.top_k else "top_p"
        yield (
            f"generate.{which} = {getattr(generate, which)}: no effect at temperature 0, which always "
            "takes the most likely token"
        )
    trainer = config.trainer
    if trainer.keep_every is not None and trainer.keep_every % trainer.save_every:
        yield (
            f"trainer.keep_every = {trainer.keep_every}: expected a multiple of trainer.save_every = "
            f"{trainer.save_every}, because only what is saved can be kept"
        )
    if trainer.micro_batch == "auto" and trainer.cuda_graphs:
        yield (
            "trainer.micro_batch = auto: not with trainer.cuda_graphs, whose memory is another's than that "
            "of the pass that is tried; give a number"
        )
    if trainer.kernel_cache is not None and trainer.accelerator == "cpu":
        yield (
            f"trainer.kernel_cache = {show_value(trainer.kernel_cache)}: no effect with "
            "trainer.accelerator=cpu, for which no kernels are compiled; leave one out"
        )
    yield from _profile(trainer)
    if config.trainer.val_every == 0 and config.trainer.val_tokens is not None:
        yield (
            f"trainer.val_tokens = {config.trainer.val_tokens}: no effect with val_every = 0, because "
            "the validation at the end is always whole"
        )


def _profile(trainer: Any) -> Iterator[str]:
    if trainer.profile is None:
        return
    first, last = map(int, trainer.profile.split(":"))
    if last < first:
        yield f"trainer.profile = {trainer.profile}: the last step comes before the first"
    elif trainer.max_steps is not None and first > trainer.max_steps:
        yield (
            f"trainer.profile = {trainer.profile}: no effect, as the run ends at trainer.max_steps = "
            f"{trainer.max_steps}"
        )
    if trainer.cuda_graphs:
        yield (
            "trainer.profile: no layer can be told from another inside a CUDA graph; leave out "
            "trainer.cuda_graphs while profiling"
        )


def _units(span: int | float, total: int) -> float:
    return span * total if isinstance(span, float) else span
