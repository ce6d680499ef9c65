"""Parameters and FLOPs of a run's model, from the layers' own formulas."""

from __future__ import annotations

from pathlib import Path


def count(folder: Path) -> tuple[int, int] | None:
    """(parameters, FLOPs per token of training) of a run; None where its config is of another version."""
    from ssmtrain.checkpoint.records import read_config
    from ssmtrain.config.errors import Stop
    from ssmtrain.data.tokenizer import vocab_rows
    from ssmtrain.model.count import count_flops, count_params

    try:
        config = read_config(folder)
        vocab = vocab_rows(config)
        flops = count_flops(config.model, vocab, config.data.seq_len)
        return count_params(config.model, vocab).total, flops.total
    except (Stop, OSError, ValueError, RuntimeError):
        return None
