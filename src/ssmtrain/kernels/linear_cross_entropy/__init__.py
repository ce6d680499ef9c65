"""The head's projection and its cross-entropy in one, without ever holding the logits of a long row."""

from __future__ import annotations

from torch import Tensor

from ssmtrain.kernels.backend import chosen
from ssmtrain.kernels.linear_cross_entropy import reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of logit_scale * hidden weight^T: (T, D), (V, D), labels (T,) -> loss, n_valid.

    The loss is an fp32 scalar (float64 for float64), n_valid an int64 scalar; rows labelled ignore_index
    count for neither. `chunk` rows of logits exist at a time, by default about 2^24 / V (2^27 / V on a GPU).
    Labels outside [0, V) raise as in torch's cross_entropy; in Triton they make NaN of the loss and of the
    gradients that their rows enter. Gradients are computed in the forward pass.
    """
    if chosen("linear_cross_entropy", hidden.device.type) == "triton":
        from ssmtrain.kernels.linear_cross_entropy.triton import linear_cross_entropy as run
    else:
        run = reference.linear_cross_entropy
    return run(hidden, weight, labels, logit_scale=logit_scale, ignore_index=ignore_index, chunk=chunk)
