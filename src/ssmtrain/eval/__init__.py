"""Loss, perplexity and bits per byte of a model on a split or a file."""

from ssmtrain.eval.command import command
from ssmtrain.eval.evaluate import Score, evaluate

__all__ = ["Score", "command", "evaluate"]
