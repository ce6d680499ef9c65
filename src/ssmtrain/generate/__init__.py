"""Text from a trained model: prefill once, then one token at a time over the layers' states."""

from ssmtrain.generate.sampler import sample, stream

__all__ = ["sample", "stream"]
