"""The picture of a recipe: its strip of layers, its parameters, FLOPs, state and memory."""

from __future__ import annotations

import json
from dataclasses import replace

from ssmtrain.config.carry import slots
from ssmtrain.config.layout import expand, strip
from ssmtrain.config.model import BlockConfig
from ssmtrain.config.origin import describe
from ssmtrain.config.schema import RunConfig
from ssmtrain.layers.base import LayerConfig
from ssmtrain.model.count import Counts, carried_bytes, count
from ssmtrain.model.spread import count_sent, held


def human(n: float, unit: str = "") -> str:
    """A number with three significant digits and a decimal prefix: 1.46 B parameters, 8.79 MFLOP."""
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}{unit}"
    return f"{n:.0f} {unit}".rstrip()


def human_bytes(n: float) -> str:
    """Bytes with a binary prefix: 8.00 GiB."""
    for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= size:
            return f"{n / size:.2f} {name}"
    return f"{n:.0f} B"


def _settings(layer: LayerConfig) -> str:
    """A layer's kind and what its page sets away from the defaults."""
    data = layer.model_dump(exclude_defaults=True, exclude={"kind"})
    said = ", ".join(f"{key} {value}" for key, value in data.items())
    kind = type(layer).model_fields["kind"].default
    return f"{kind} ({said})" if said else str(kind)


def describe_block(block: BlockConfig) -> str:
    """One line: the block's mixer and ffn with the settings that differ from the defaults."""
    parts = [_settings(layer) for layer in (block.mixer, block.ffn) if layer is not None]
    return " + ".join(parts) + ("" if block.norm == "pre" else f", {block.norm} norm")


def report(config: RunConfig, vocab: int) -> tuple[Counts, list[str]]:
    """Count a recipe whose embedding has `vocab` rows, and write its picture, a list of lines."""
    counts = count(config, vocab)
    model, p, f = config.model, counts.params, counts.flops
    t = held(config, counts.training, p.total)
    names = expand(model.layout, model.n_layers)
    lines = [
        f"{config.recipe}  {model.layout}, {len(names)} layers, width {model.d_model}, vocabulary {vocab:,}",
        "",
        strip(names),
    ]
    for name, number in counts.blocks.items():
        lines.append(f"  {name:<2} x {number:<3} {describe_block(model.blocks[name])}")
    tied = "tied" if model.tie_embeddings else f"head {human(p.head)}"
    active = f", active {p.active:,} ({human(p.active)})" if p.active != p.total else ""
    share = {k: 100 * v / f.total for k, v in (("mixer", f.mixer), ("ffn", f.ffn), ("head", f.head))}
    cache = counts.state.kv + counts.state.conv + counts.state.ssm
    lines += [
        "",
        f"parameters  {p.total:,} ({human(p.total)}){active}; embedding {human(p.embedding)}, {tied}",
        f"FLOPs       {human(f.total, 'FLOP')} a token of {config.data.seq_len}, forward and backward: "
        + ", ".join(f"{k} {v:.0f} %" for k, v in share.items()),
        f"serving     {counts.sessions} sessions of {counts.context:,} tokens: "
        f"weights {human_bytes(counts.weight_bytes)}, keys and values {human_bytes(counts.state.kv)}, "
        f"SSM and conv state {human_bytes(counts.state.conv + counts.state.ssm)}, "
        f"together {human_bytes(counts.weight_bytes + cache)}",
        f"training    about {human_bytes(t.total)} a device: weights {human_bytes(t.weights)}, "
        f"gradients {human_bytes(t.gradients)}, optimiser {human_bytes(t.optimizer)}, "
        f"activations {human_bytes(t.activations)}",
        *_carried(config),
        *_messages(config, p.total),
        *(f"origin      {line}" for line in describe(config.origin)),
    ]
    return counts, lines


def _carried(config: RunConfig) -> list[str]:
    """What the rows of a step hand on to those of the next."""
    total = slots(config)
    if total is None:
        return []
    size = human_bytes(carried_bytes(config.model, total))
    return [f"carried     states of the {total:,} rows of a step, together {size}, in every checkpoint too"]


def _messages(config: RunConfig, total: int) -> list[str]:
    """What each of several devices sends in a step."""
    sent = count_sent(config, total)
    if sent.devices == 1:
        return []
    kind = "ddp" if config.parallel.kind == "auto" else config.parallel.kind
    tokens = config.trainer.global_batch // sent.devices
    return [
        f"messages    {kind} on {sent.devices} devices: each sends {human_bytes(sent.total)} in a step of "
        f"{tokens:,} tokens of its own: parameters {human_bytes(sent.gathered)}, "
        f"gradients {human_bytes(sent.summed)}"
    ]


def show(config: RunConfig, vocab: int, as_json: bool = False) -> str:
    """The picture of a recipe as text, or its numbers as JSON."""
    counts, lines = report(config, vocab)
    if not as_json:
        return "\n".join(lines)
    total = counts.params.total
    sharded = replace(counts, training=held(config, counts.training, total))
    return json.dumps({**sharded.as_dict(), "sent_bytes": count_sent(config, total).total}, indent=2)
