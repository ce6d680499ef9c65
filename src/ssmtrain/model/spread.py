"""What spreading a model over devices costs and saves, by formula: bytes sent in a step, bytes held.

A ring sends (n - 1) / n of a tensor from each of n devices to gather or to scatter it, and twice that to sum
it on all of them (Patarasuk and Yuan 2009); fp32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ssmtrain.config.layout import expand
from ssmtrain.config.schema import Fsdp, RunConfig
from ssmtrain.model.count import FP32, TrainingBytes, block_norms


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
    return max(1, -(-rows // (config.trainer.micro_batch or max(rows, 1))))


def count_sent(config: RunConfig, total: int) -> Sent:
    """Bytes that each device sends in a step, of a model of `total` parameters."""
    n, spread = world(config), config.parallel
    if n == 1:
        return Sent(1)
    if not isinstance(spread, Fsdp):
        return Sent(n, 0, _ring(n, 2 * FP32 * total))
    groups = spread.replicas
    within = n // groups
    blocks = sum(block_sizes(config))
    # What stands around the blocks stays from the forward pass to the backward pass.
    gathered = FP32 * ((2 if spread.reshard else 1) * blocks + total - blocks) * passes(config)
    summed = _ring(within, FP32 * total) + _ring(groups, 2 * FP32 * total // within)
    return Sent(n, _ring(within, gathered), summed)


def held(config: RunConfig, whole: TrainingBytes, total: int) -> TrainingBytes:
    """What one of the devices holds, given what it would hold of the whole model."""
    n, spread = world(config), config.parallel
    if not isinstance(spread, Fsdp) or n == 1:
        return whole
    ways = n // spread.replicas
    sizes = block_sizes(config)
    around = total - sum(sizes)
    # Whole at a time: what stands around the blocks, a block in use and the next one on its way.
    gathered = around + (2 * max(sizes, default=0) if spread.reshard else sum(sizes))
    gradients = total if passes(config) > 1 else gathered + total // ways
    return replace(
        whole,
        weights=FP32 * (total // ways + gathered),
        gradients=FP32 * min(gradients, total),
        optimizer=whole.optimizer // ways,
    )


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
