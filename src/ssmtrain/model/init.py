"""Initialisation: every parameter is drawn whole from a generator keyed by (seed, name).

The draw does not depend on the device, the order of construction or how many processes share the model.
"""

from __future__ import annotations

import hashlib
import math

import torch

from ssmtrain.config.model import InitConfig
from ssmtrain.layers.init import normal
from ssmtrain.model.hybrid import HybridModel


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the seed and the parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def n_branches(model: HybridModel) -> int:
    """Residual branches in the model: one per mixer and one per ffn."""
    return sum((b.mixer is not None) + (b.ffn is not None) for b in model.blocks)


@torch.no_grad()
def init_weights(model: HybridModel, config: InitConfig, seed: int) -> None:
    """Write every parameter in place.

    Output projections of residual branches are divided by sqrt(branches) (GPT-2; mamba_ssm's
    rescale_prenorm_residual); `config.std`, where set, replaces the default of plain projections.
    Raises RuntimeError if a parameter has no declared initialisation.
    """
    specs = model.specs()
    rescale = 1.0 / math.sqrt(max(n_branches(model), 1)) if config.rescale_residual else 1.0
    for name, parameter in model.named_parameters():
        if name not in specs:
            raise RuntimeError(f"parameter {name} was not declared: it has no initialisation")
        spec = specs[name]
        draw = normal(config.std) if config.std is not None and spec.plain else spec.init
        # The trainer may build the model under another default device; the draw is always the CPU's.
        with torch.device("cpu"):
            value = draw(tuple(parameter.shape), generator(seed, name))
        if spec.residual:
            value.mul_(rescale)
        parameter.copy_(value)
    for module in model.modules():
        reset = getattr(module, "reset_buffers", None)
        if reset is not None:
            reset()
