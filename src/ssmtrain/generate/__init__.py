"""Text from a trained model: prefill once, then one token at a time over the layers' states."""

from ssmtrain.generate.command import command
from ssmtrain.generate.sampler import sample, stream

__all__ = ["command", "sample", "stream"]
