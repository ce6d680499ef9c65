"""What spreading a model over devices costs and saves, by formula: bytes sent in a step, bytes held.

A ring sends (n - 1) / n of a tensor from each of n devices to gather or to scatter it, and twice that to sum
it on all of them (Patarasuk and Yuan 2009). Under fsdp what is not a matrix stays whole on all devices: it is
counted with the rest, of which it is a thousandth; so is what deepspeed_zero3 keeps whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssmtrain.config.layout import expand
from ssmtrain.config.parallel import AutoParallel, Fsdp, Zero3, ZeroStage
from ssmtrain.config.schema import RunConfig
from ssmtrain.model.count import FP32, TrainingBytes, block_norms

WIDTH = {"fp32": 4, "bf16": 2}
"""Bytes of a number."""
UNIT = 1 << 26
"""Parameters of a unit of blocks, about: in fp32 a message of 256 MiB."""


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends in a step."""

    devices: int
    gathered: int = 0
    """Parameters, to those that are about to use them."""
    summed: int = 0
    """Gradients, to their owners."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.gathered + self.summed


def world(config: RunConfig) -> int:
    """The number of devices that a config names, over all nodes of its job."""
    return (config.trainer.devices or 1) * config.launch.nodes


def passes(config: RunConfig) -> int:
    """Micro-batches of a device and step."""
    rows = config.trainer.global_batch // (config.data.seq_len * world(config))
    return max(1, -(-rows // (config.trainer.micro_rows or max(rows, 1))))


def count_sent(config: RunConfig, total: int) -> Sent:
    """Bytes that each device sends in a step, of a model of `total` parameters."""
    n, spread = world(config), config.parallel
    if n == 1:
        return Sent(1)
    summed = FP32 if isinstance(spread, AutoParallel) else WIDTH[spread.reduce]
    if isinstance(spread, ZeroStage):
        # Gradients go to their owners, from stage 2 on after every micro-batch; parameters come back from
        # them after the step, or, cut, in every pass forwards and, those of blocks, backwards.
        gathered = total
        if isinstance(spread, Zero3):
            gathered = passes(config) * (total + sum(block_sizes(config)))
        sums = passes(config) if spread.stage > 1 else 1
        return Sent(n, _ring(n, FP32 * gathered), _ring(n, sums * summed * total))
    if not isinstance(spread, Fsdp):
        return Sent(n, 0, _ring(n, 2 * summed * total))
    groups = spread.replicas
    within = n // groups
    units = unit_sizes(config)
    blocks = sum(units)
    # What stands around the blocks stays from the forward pass to the backward pass, and the last of them.
    again = blocks - units[-1] if spread.reshard else 0
    each = WIDTH[spread.gather] * (blocks + again) + FP32 * (total - blocks)
    sums = _ring(within, summed * total) + _ring(groups, 2 * summed * total // within)
    return Sent(n, _ring(within, each * passes(config)), sums)


def held(config: RunConfig, whole: TrainingBytes, total: int) -> TrainingBytes:
    """What one of the devices holds, given what it would hold of the whole model."""
    n, spread = world(config), config.parallel
    if isinstance(spread, ZeroStage) and n > 1:
        return _held_by_zero(config, spread, whole, total)
    if not isinstance(spread, Fsdp) or n == 1:
        return whole
    ways = n // spread.replicas
    sizes = unit_sizes(config)
    around = total - sum(sizes)
    # Whole at a time: what stands around the blocks, the blocks in use and the next ones on their way.
    blocks = min(2 * max(sizes, default=0), sum(sizes)) if spread.reshard else sum(sizes)
    cut = 0 if spread.offload else total // ways
    gradients = total if passes(config) > 1 else around + blocks + cut
    return replace(
        whole,
        weights=FP32 * (cut + around) + WIDTH[spread.gather] * blocks,
        gradients=FP32 * min(gradients, total),
        optimizer=0 if spread.offload else whole.optimizer // ways,
    )


def _held_by_zero(config: RunConfig, spread: ZeroStage, whole: TrainingBytes, total: int) -> TrainingBytes:
    share = total // world(config)
    stepped = 0 if spread.offload_optimizer else share
    weights, gradients = total, total
    if spread.stage > 1:
        # A message on its way, and what has arrived.
        gradients = min(total, bucket(total) + stepped)
    if isinstance(spread, Zero3):
        sizes = block_sizes(config)
        in_use = total - sum(sizes) + min(2 * max(sizes, default=0), sum(sizes))
        weights = min(total, in_use) + (0 if spread.offload_params else share)
    # The engine steps a copy of its share of the parameters.
    return replace(
        whole,
        weights=FP32 * (weights + stepped),
        gradients=FP32 * gradients,
        optimizer=0 if spread.offload_optimizer else whole.optimizer // world(config),
    )


def bucket(total: int) -> int:
    """Parameters whose gradients one message of DeepSpeed's carries, of a model of `total`."""
    return max(1, min(UNIT, total))


def kept_whole(total: int) -> int:
    """Parameters of a tensor up to which deepspeed_zero3 keeps it whole, of a model of `total`."""
    return min(100_000, total // 1000)


def unit_sizes(config: RunConfig) -> list[int]:
    """Parameters of each unit of blocks that fsdp gathers in one message, in order."""
    sizes, spread = block_sizes(config), config.parallel
    n = (spread.unit if isinstance(spread, Fsdp) else None) or blocks_of_unit(sizes)
    return [sum(sizes[at : at + n]) for at in range(0, len(sizes), n)]


def blocks_of_unit(sizes: Sequence[int]) -> int:
    """Neighbouring blocks of these parameters that together make a message worth its cost to the host."""
    return max(1, min(len(sizes), round(UNIT * len(sizes) / max(sum(sizes), 1))))


def block_sizes(config: RunConfig) -> list[int]:
    """Parameters of each block, in order."""
    model, sizes = config.model, []
    for name in expand(model.layout, model.n_layers):
        block = model.blocks[name]
        layers = [layer for layer in (block.mixer, block.ffn) if layer is not None]
        own = sum(layer.num_params(model.d_model) for layer in layers)
        sizes.append(own + block_norms(block) * model.d_model)
    return sizes


def _ring(n: int, size: int) -> int:
    return size * (n - 1) // n
