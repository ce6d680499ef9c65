"""Kernels: pure functions on tensors, one room per op.

Each room holds the public function (docstring with shapes, dispatch) in `__init__.py`, the readable
pure-torch implementation, which is also the CPU path, in `reference.py`, and, where one exists, a Triton
implementation of the same signature in `triton.py`. `backend.py` decides which one runs.

Legend, used in every docstring and shape comment:

    B  batch                L  length               D  model width
    E  inner width          H  heads                P  head dim (E = H * P)
    N  state size           G  groups (of heads that share B and C)
    K  conv width           Q  chunk length         V  vocabulary

Documents. `doc_ids` (B, L) int32 numbers the documents 0 .. n_docs - 1 row-major over the batch, no id in
two rows; `n_docs` is a host integer. None means one document per row (n_docs = B). States and windows
restart where doc_ids changes, from that document's initial state; initial and final states have n_docs on
the first axis. For the Triton implementations n_docs may be more than there are documents, where no states go
in or out: those past the last are empty, so that batches of different numbers run the same kernels.

Precision. float64 stays float64; everything else computes decays, states and sums in fp32 and returns the
dtype of its input.
"""
