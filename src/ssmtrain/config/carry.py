"""State that is carried from row to row: how many slots carry one, and what does not go with it.

All but `layer_problems` read plain attributes, so that they run before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig


def slots(config: Any) -> int | None:
    """Rows of a step, each the place of one text that goes on from step to step; None: nothing is carried."""
    if not getattr(config.data, "carry_state", False):
        return None
    return int(config.trainer.global_batch // config.data.seq_len)


def problems(config: Any) -> Iterator[str]:
    """Settings that do not go with data.carry_state, a line each."""
    if not getattr(config.data, "carry_state", False):
        return
    data, trainer, key = config.data, config.trainer, "data.carry_state = true"
    if all(block.mixer is None for block in config.model.blocks.values()):
        yield f"{key}: no block of the model has a mixer, so there is no state to carry; leave it out"
    if data.kind == "mix":
        yield (
            f"{key}: not with data.kind = mix, whose rows come from its sources in turn, so that none goes "
            "on where the one before ended; take data.kind=text with all files in data.train"
        )
    if data.seq_len_warmup:
        yield (
            f"{key}: not with data.seq_len_warmup, which cuts a row into shorter ones of one step; take a "
            "smaller data.seq_len, as the state knows what came before"
        )
    if trainer.global_batch_warmup:
        yield (
            f"{key}: not with trainer.global_batch_warmup, because each row of a step goes on with that of "
            "the step before, so that all must have as many; leave one out"
        )
    if trainer.compile:
        yield f"{key}: not with trainer.compile, which compiles passes without states; leave one out"
    if trainer.cuda_graphs:
        yield f"{key}: not with trainer.cuda_graphs, which record passes without states; leave one out"
    if config.parallel.kind.startswith("deepspeed"):
        yield (
            f"{key}: not with parallel.kind = {config.parallel.kind}, whose engine hands back no states; "
            "take parallel=ddp, or parallel=fsdp for a model that is too large for one device"
        )


def layer_problems(config: RunConfig) -> Iterator[str]:
    """Mixers whose state cannot be carried because it grows with what came before."""
    if slots(config) is None:
        return
    for name, block in config.model.blocks.items():
        mixer = block.mixer
        if mixer is not None and mixer.state_bytes(config.model.d_model, 1, 1).kv:
            kind = type(mixer).model_fields["kind"].default
            yield (
                f"data.carry_state = true: model.blocks.{name}.mixer.kind = {kind} keeps what it has read "
                "word for word, and cannot carry it from row to row; take mamba1 or mamba2 in its place, or "
                "a larger data.seq_len in place of data.carry_state"
            )
