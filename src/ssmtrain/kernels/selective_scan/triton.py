"""The selective scan on a GPU: what `triton_forward` and `triton_backward` launch, and custom ops around it.

Nothing is saved for the backward pass but the inputs and a state each `EVERY` tokens, a few parts in a
hundred of what the layer keeps anyway.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ssmtrain.kernels import tuned
from ssmtrain.kernels.ahead import Back, aligned, compiled_first, launch
from ssmtrain.kernels.op import op
from ssmtrain.kernels.parts import place_of
from ssmtrain.kernels.selective_scan import reference
from ssmtrain.kernels.selective_scan.triton_backward import add_shares, backward, starts
from ssmtrain.kernels.selective_scan.triton_forward import both, ends, forward, join
from ssmtrain.kernels.selective_scan.triton_step import selective_scan_step as selective_scan_step
from ssmtrain.kernels.ssd.triton_chunks import first_tokens, sum_chunks

try:
    from ssmtrain.kernels.selective_scan import triton_n16 as n16
    from ssmtrain.kernels.selective_scan import triton_n16_backward as n16_back
    from ssmtrain.kernels.selective_scan import triton_n16_ends as n16_ends
except ImportError:  # an older Triton, without Gluon
    n16 = n16_back = n16_ends = None  # type: ignore[assignment]

LARGEST = 256
"""State size up to which the kernels run; beyond it the reference does."""

log = logging.getLogger(__name__)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    doc_ids: Tensor | None,
    n_docs: int | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute `kernels.selective_scan` (same arguments); float64 and N above 256 by the reference."""
    if u.dtype == torch.float64 or A.shape[1] > LARGEST:
        log.warning("selective_scan: the reference runs for %s, N %d", u.dtype, A.shape[1])
        return reference.selective_scan(
            u,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            doc_ids=doc_ids,
            n_docs=n_docs,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
    if n_docs == u.shape[0]:
        doc_ids = None  # rows that are documents
    # The kernels hold states as (.., N, E), so that neighbouring channels are neighbours in memory.
    initial = None if initial_state is None else initial_state.transpose(1, 2)
    tensors = [u, dt, A.t(), B, C, D, z, dt_bias, initial]
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, *_ = _scan(
        *tensors, doc_ids, n_docs or u.shape[0], dt_softplus, *dt_limit, return_final_state, learns
    )
    return y, final.transpose(1, 2) if return_final_state else None


class Plan(NamedTuple):
    """Sizes of a call and what follows from them, never from how many multiprocessors there are."""

    batch: int
    length: int
    channels: int
    N: int
    W: int
    """Tokens of a window."""
    config: tuned.Config
    lanes: bool
    """Whether the kernels of `triton_n16` run, which lay states and channels out themselves."""

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.batch * self.length

    @property
    def windows(self) -> int:
        """Of the batch."""
        return triton.cdiv(self.tokens, self.W)

    @property
    def blocks(self) -> int:
        """Programs of a window."""
        return triton.cdiv(self.channels, self.config["BE"])

    @property
    def every(self) -> int:
        """Tokens from one state that is kept to the next."""
        return n16.EVERY if self.lanes else EVERY

    @property
    def tiles(self) -> int:
        """Programs of a window in the two large kernels."""
        return triton.cdiv(self.channels, n16.CHANNELS) if self.lanes else self.blocks

    @property
    def tile(self) -> tuple[int, ...]:
        """States of such a program as they are kept: one after another, or (N, channels) of all programs."""
        return (self.tiles, 16 * n16.CHANNELS) if self.lanes else (self.N, self.channels)

    @property
    def cuts(self) -> bool:
        """Whether a document can be longer than a window."""
        return self.length > self.W

    @property
    def marked(self) -> bool:
        """Whether states are kept between a piece's first token and its last."""
        return min(self.length, self.W) > self.every

    @property
    def grid(self) -> tuple[int]:
        """One program for each window and block of channels."""
        return (self.windows * self.blocks,)

    def constants(self, *names: str) -> dict[str, int]:
        """The compile-time constants of a kernel that takes these of the configuration."""
        wanted = {"BE", "BN", "num_warps", "num_stages", "maxnreg", *names}
        return {"W": self.W} | {name: value for name, value in self.config.items() if name in wanted}


def window_length(channels: int, length: int) -> int:
    """Return W: windows of fewer tokens where channels are few, so that multiprocessors are not idle.

    No longer than a row: a window's documents are walked one after the other.
    """
    return max(512, min(4096, triton.next_power_of_2(channels), triton.next_power_of_2(length)))


def plan(u: Tensor, dt: Tensor, A: Tensor, z: Tensor | None, kernel: str) -> Plan:
    """Decide how a call is cut."""
    batch, length, channels = u.shape
    N = A.shape[0]
    BN = triton.next_power_of_2(N)
    # Sixteen states a thread, in one warp where eight channels are not too few for it.
    BE = max(8, min(32, 512 // BN))
    fallback = {"BE": BE, "BN": BN, "UNROLL": 2, "SPAN": 2}
    fallback |= {"num_warps": max(1, BE * BN // 512), "num_stages": 1}
    if kernel == "backward":
        # Left alone, ptxas takes every register there is, and a sixth of the programs wait for the others.
        fallback["maxnreg"] = 168
    dtype = str(u.dtype).removeprefix("torch.")
    config = tuned.lookup(f"selective_scan_{kernel}", u.device, f"N={BN},dtype={dtype}", fallback)
    lanes = n16 is not None and n16.fits(N, *(t for t in (u, dt, z) if t is not None))
    return Plan(batch, length, channels, N, window_length(channels, length), config, lanes)


EVERY = 256
"""Tokens from one state that is kept to the next."""


def scan(u, dt, A, B, C, D, z, dt_bias, initial, doc_ids, n_docs, softplus, low, high, want_final, learns):
    """Return y (B, L, E), final states (n_docs, N, E) and, if it learns, what the backward pass begins with.

    That is: states (.., N, E) that enter windows, and those each `EVERY` tokens; empty where there are none.
    """
    cut = plan(u, dt, A, z, "forward")
    u, dt, z = (_rows(t, cut.lanes) for t in (u, dt, z))
    B, C = _both(cut, B, C)
    low, high = _limits(softplus, low, high)
    A, D, dt_bias, initial, doc_ids = (_dense(t) for t in (A, D, dt_bias, initial, doc_ids))
    docs = None if doc_ids is None else first_tokens(doc_ids, n_docs)
    y, final, enter, marks = _outputs(u, dt, A, z, n_docs, want_final, learns)
    sizes = (cut.length, cut.tokens)
    shape = (cut.channels, cut.N, cut.channels)
    if cut.cuts:
        left, steps = torch.empty_like(enter), enter.new_empty(cut.windows, cut.channels)
        others = (dt_bias, doc_ids, docs, initial, left, steps)
        options = {"SOFTPLUS": softplus, **strides(U=u, DT=dt)}
        if cut.lanes:
            n16.run(cut, n16_ends.ends, u, dt, A, B, *others, *sizes, *shape[:2], low, high, **options)
        else:
            first = (u, dt, A, B, *others, *sizes, *shape, low, high)
            launch(ends, cut.grid, *first, **strides(B=B), **options, **cut.constants("UNROLL"))
        _join(cut, A, doc_ids, docs, left, steps, enter, back=False)
    rest = (D, z, dt_bias, doc_ids, docs, initial, _some(enter), y, _some(marks), _some(final))
    options = {"EVERY": cut.every, "SOFTPLUS": softplus, **strides(U=u, DT=dt, Z=z)}
    if cut.lanes:
        n16.run(cut, n16.forward, u, dt, A, B, *rest, *sizes, *shape[:2], low, high, **options)
    else:
        launch(
            forward,
            cut.grid,
            *(u, dt, A, B, C, *rest),
            *(*sizes, *shape, low, high),
            **strides(B=B, C=C),
            **options,
            **cut.constants("UNROLL"),
        )
    return y, final, enter if learns else enter.new_empty(0), marks


def scan_back(
    d_y, d_final, enter, marks, u, dt, A, B, C, D, z, dt_bias, initial, doc_ids, n_docs, softplus, low, high,
    room=None,
):  # fmt: skip
    """Return the gradients of u, dt, A, B, C, D, z, dt_bias and initial, empty for what is None.

    That of z is in `room`, if there is any and the kernels can write there.
    """
    cut = plan(u, dt, A, z, "backward")
    if not cut.lanes:
        room = None
    grads = _gradients(u, dt, A, B, C, D, z if room is None else None, dt_bias, initial)
    if room is not None:
        grads = (*grads[:6], room, *grads[7:])
    d_u, d_dt, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial = grads
    d_y, u, dt, z = (_rows(t, cut.lanes) for t in (d_y, u, dt, z))
    B, C = _both(cut, B, C)
    low, high = _limits(softplus, low, high)
    A, D, dt_bias, initial, doc_ids, d_final = (_dense(t) for t in (A, D, dt_bias, initial, doc_ids, d_final))
    docs = None if doc_ids is None else first_tokens(doc_ids, n_docs)
    sizes = (cut.length, cut.tokens)
    shape = (cut.channels, cut.N, cut.channels)
    leave = None

    def new(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=u.device)

    if cut.cuts:
        leave, left = new(cut.windows, cut.N, cut.channels), new(cut.windows, cut.N, cut.channels)
        steps = new(cut.windows, cut.channels)
        others = (z, dt_bias, doc_ids, docs, d_final, left, steps)
        options = {"SOFTPLUS": softplus, **strides(DY=d_y, DT=dt, Z=z)}
        if cut.lanes:
            n16.run(cut, n16_ends.starts, d_y, dt, A, C, *others, *sizes, *shape[:2], low, high, **options)
        else:
            first = (d_y, dt, A, C, *others, *sizes, *shape, low, high)
            launch(starts, cut.grid, *first, **strides(C=C), **options, **cut.constants("UNROLL"))
        _join(cut, A, doc_ids, docs, left, steps, leave, back=True)
    pitch = 16 if cut.lanes else cut.N
    shares = new(cut.tiles, cut.tokens, 2, pitch)
    of_A, sums = new(1, cut.windows, *cut.tile), new(2, cut.windows, cut.channels)
    rest = (D, z, dt_bias, doc_ids, docs, initial, _some(enter), _some(marks), leave, d_final)
    grads_of = (d_u, d_dt, _some(d_z), shares, of_A, sums, _some(d_initial))
    options = {"EVERY": cut.every, "SOFTPLUS": softplus, **strides(DY=d_y, U=u, DT=dt, Z=z)}
    counts = (*sizes, cut.windows)
    if cut.lanes:
        scratch = new(cut.windows * cut.tiles, cut.every // n16.SPAN.value, cut.tile[1])
        n_turns = n16.turns(cut, u.device)
        tensors = (d_y, u, dt, A, B, *rest, scratch, *grads_of, *n16.carried(cut, n_turns, u.device))
        limits = (*shape[:2], low, high)
        options |= strides(DZ=_some(d_z))
        n16.run(cut, n16_back.backward, *tensors, *counts, n_turns, *limits, **options, n_turns=n_turns)
    else:
        tile = cut.config["BE"] * cut.config["BN"]
        scratch = new(cut.grid[0], cut.every // cut.config["SPAN"], tile)
        launch(
            backward,
            cut.grid,
            *(d_y, u, dt, A, B, C, *rest, scratch, *grads_of),
            *(*counts, *shape, low, high),
            **strides(B=B, C=C),
            **options,
            **cut.constants("SPAN"),
        )
    grid = (triton.cdiv(2 * pitch * cut.tokens, 1024),)
    launch(add_shares, grid, shares, d_B, d_C, cut.tokens, cut.tiles, cut.N, PITCH=pitch, BLOCK=1024)
    of_A = _added(of_A.flatten(2))
    d_A.copy_(n16.ordered(of_A, cut) if cut.lanes else of_A.view(A.shape))
    of_D, of_bias = _added(sums)
    if D is not None:
        d_D.copy_(of_D)
    if dt_bias is not None:
        d_bias.copy_(of_bias)
    return grads


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """From token to token, as compile-time constants, with which loads need no arithmetic: a model's own."""
    return {f"S_{name}": 0 if t is None else t.stride(1) for name, t in tensors.items()}


def _join(cut: Plan, A, doc_ids, docs, left, steps, passed, back: bool) -> None:
    launch(
        join,
        (cut.blocks,),
        *(A, doc_ids, docs, left, steps, passed),
        *(cut.length, cut.tokens, cut.windows, cut.channels, cut.N, cut.channels),
        BACK=back,
        **cut.constants(),
    )


def _added(values: Tensor) -> Tensor:
    """Sum values (kinds, windows, columns) over windows in order."""
    kinds, n, columns = values.shape
    out = torch.empty(kinds, columns, dtype=torch.float32, device=values.device)
    launch(sum_chunks, (triton.cdiv(columns, 32), kinds), values, out, n, columns, ROWS=32, COLS=32)
    return out


def _rows(t: Tensor | None, words: bool = False) -> Tensor | None:
    """Return t (B, L, ..), copied only if its channels are not neighbours, or its rows not one string.

    In `words` of 16 bytes also if a row does not begin at one.
    """
    if t is None:
        return t
    string = t.stride(2) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    if string and not (words and (t.stride(1) * t.element_size() % 16 or not aligned(t))):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _both(cut: Plan, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and C in fp32, since every channel reads them, and each would convert them again.

    For lanes both are one tensor (tokens, 2, 16).
    """
    if not cut.lanes:
        return B.to(torch.float32).contiguous(), C.to(torch.float32).contiguous()
    pairs = torch.empty(*B.shape[:2], 2, 16, dtype=torch.float32, device=B.device)
    B, C = (t if t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous() for t in (B, C))
    places = (B.stride(1), B.stride(2), C.stride(1), C.stride(2))
    launch(both, (triton.cdiv(cut.tokens, 64),), B, C, pairs, cut.tokens, cut.N, *places, ROWS=64)
    return pairs, pairs


def _limits(softplus: bool, low: float, high: float) -> tuple[float | None, float | None]:
    """Return the limits of the step sizes, None where no step lies outside of them."""
    return (None, None) if softplus and low <= 0 and high == math.inf else (low, high)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _some(t: Tensor) -> Tensor | None:
    """Return None for an empty tensor: an op has to return one where there is nothing too."""
    return t if t.numel() else None


def _outputs(
    u: Tensor, dt: Tensor, A: Tensor, z: Tensor | None, n_docs: int, want_final: bool, learns: bool
) -> tuple[Tensor, ...]:
    cut = plan(u, dt, A, z, "forward")
    states = (cut.N, cut.channels)
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        u.new_empty((n_docs, *states) if want_final else 0, dtype=torch.float32),
        u.new_empty((cut.windows, *states) if cut.cuts else 0, dtype=torch.float32),
        u.new_empty(
            (cut.tokens // cut.every + 1, *cut.tile) if learns and cut.marked else 0, dtype=torch.float32
        ),
    )


def _gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    like = next(t for t in tensors if t is not None)
    return tuple(
        like.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in tensors
    )


def _back_arguments(args: tuple, fakes: tuple, results: tuple[Tensor, ...]) -> tuple:
    """Return the arguments of `scan_back` after a call of `scan`, all without memory."""
    y, final, enter, marks = results
    room = fakes[6] if args[6] is not None and place_of(args[6]) else None
    return (y, final if args[14] else None, enter, marks, *fakes[:14], *(() if room is None else (room,)))


_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " Tensor? initial, Tensor? doc_ids, int n_docs, bool softplus, float low, float high"
)
_scan = op(
    "selective_scan",
    schema=f"({_INPUTS}, bool want_final, bool learns) -> (Tensor, Tensor, Tensor, Tensor)",
)(compiled_first(scan, Back(scan_back, _back_arguments)))
_scan_back = op(
    "selective_scan_back",
    schema=f"(Tensor d_y, Tensor? d_final, Tensor enter, Tensor marks, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(compiled_first(scan_back))


@_scan.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial, doc_ids, n_docs, softplus, low, high, want_final, learns):
    """Shapes of `scan`."""
    y, final, enter, marks = _outputs(u, dt, A, z, n_docs, want_final, learns)
    return y, final, enter if learns else enter.new_empty(0), marks


@_scan_back.register_fake
def _(d_y, d_final, enter, marks, u, dt, A, B, C, D, z, dt_bias, initial, *rest):
    """Shapes of `scan_back`."""
    return _gradients(u, dt, A, B, C, D, z, dt_bias, initial)


def _keep(ctx, inputs, output) -> None:
    _, _, enter, marks = output
    ctx.save_for_backward(enter, marks, *inputs[:10])
    ctx.rest, ctx.want_final = inputs[10:14], inputs[14]
    ctx.place = None if inputs[6] is None else place_of(inputs[6])
    ctx.mark_non_differentiable(enter, marks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_y, d_final, *_):
    enter, marks, *saved = ctx.saved_tensors  # once: activation recompute does not unpack them twice
    u = saved[0]
    if d_y is None:
        d_y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    d_final = d_final if ctx.want_final else None
    grads = _scan_back.into(ctx.place)(d_y, d_final, enter, marks, *saved, *ctx.rest)
    found = [None if t is None else grad for t, grad in zip(saved[:9], grads, strict=True)]
    return (*found, *[None] * 7)


_scan.register_autograd(_differentiate, setup_context=_keep)
