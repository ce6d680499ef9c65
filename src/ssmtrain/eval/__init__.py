"""Loss, perplexity and bits per byte of a model on a split or a file."""

from ssmtrain.eval.evaluate import Score, evaluate

__all__ = ["Score", "evaluate"]
