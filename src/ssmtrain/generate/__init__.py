"""Text from a trained model: prefill once, then one token at a time over the layers' states."""

from ssmtrain.generate.command import command
from ssmtrain.generate.sampler import printable, sample, stream

__all__ = ["command", "printable", "sample", "stream"]
