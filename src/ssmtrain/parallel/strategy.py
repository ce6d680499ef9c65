"""Which of Lightning's strategies, or rather of ours, a config's `parallel` names."""

from __future__ import annotations

from datetime import timedelta

from ssmtrain.config.parallel import AnyParallel, Zero3, ZeroStage
from ssmtrain.parallel.processes import Ddp, Fsdp
from ssmtrain.parallel.zero import Zero


def spread(config: AnyParallel, accelerator: str) -> Ddp:
    """The strategy that a config names for devices of a kind ("cpu": gloo, "gpu": nccl).

    The buffers (router biases) are the same on all ranks by construction, so they are not broadcast.
    """
    backend = "gloo" if accelerator == "cpu" else "nccl"
    chosen = Zero if isinstance(config, ZeroStage) else Fsdp if config.kind == "fsdp" else Ddp
    strategy = chosen(
        process_group_backend=backend,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        timeout=timedelta(minutes=30),
    )
    strategy.compress = config.kind == "ddp" and config.reduce == "bf16"
    if isinstance(strategy, Zero):
        strategy.cuts_parameters = isinstance(config, Zero3)
    return strategy
