"""Calls of the ops with Triton bodies, at given shapes and laid out as the layers lay them out.

What check_kernels.py compiles, bench_kernels.py times and tune_kernels.py tunes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssmtrain.kernels.adamw import Rates
from ssmtrain.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from ssmtrain.kernels.gated_norm import gated_norm, projected_norm, stream_norm
from ssmtrain.kernels.gated_norm.reader import read, reader_of
from ssmtrain.kernels.linear_cross_entropy import linear_cross_entropy
from ssmtrain.kernels.selective_scan import selective_scan, selective_scan_step
from ssmtrain.kernels.ssd import ssd, ssd_step

Inputs = dict[str, Tensor | None]
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    name: str
    op: str
    """Folder of the op in ssmtrain.kernels."""
    make: Callable[[torch.device | str], Inputs]
    """Inputs on a device; those that require a gradient get one."""
    call: Callable[[Inputs], tuple[Tensor, ...]]
    """The outputs, differentiable ones."""
    backward: bool = True
    """Whether the call has a backward pass (the steps of decoding have none)."""
    shape: dict[str, int] = field(default_factory=dict)

    def gradients(
        self, inputs: Inputs, outputs: tuple[Tensor, ...], grads: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients of all inputs that require one."""
        wanted = [x for x in inputs.values() if x is not None and x.requires_grad]
        return torch.autograd.grad(outputs, wanted, grads)

    def both(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Outputs, and where there is a backward pass, gradients."""
        outputs = self.call(inputs)
        if not self.backward:
            return outputs
        return outputs + self.gradients(inputs, outputs, [torch.ones_like(y) for y in outputs])


def ssd_case(
    B: int,
    L: int,
    H: int,
    P: int,
    N: int,
    G: int = 1,
    *,
    dtype: torch.dtype = BF16,
    documents: int = 0,
    state: bool = False,
    gate: bool = False,
    plain: bool = False,
    D_channels: bool = False,
) -> Case:
    """x, B, C are views of the convolution's output, dt of the projection's.

    `documents` is their length, 0 for one per row; `state` an initial and a final state; `gate` z; `plain` no
    D, dt_bias and softplus; `D_channels` D (H, P).
    """
    n_docs = B * -(-L // documents) if documents else B

    def make(device: torch.device | str) -> Inputs:
        joint = torch.randn(B, L, H * P + 2 * G * N, device=device, dtype=dtype)
        joint[..., H * P :].mul_(N**-0.25)
        x, b, c = joint.split([H * P, G * N, G * N], dim=-1)
        projected = torch.randn(B, L, 2 * H * P + 2 * G * N + H, device=device, dtype=dtype)
        dt = projected[..., -H:]
        inputs: Inputs = {
            "x": x.unflatten(-1, (H, P)),
            "dt": dt.abs_().mul_(0.1) if plain else dt,
            "A": -torch.empty(H, device=device).uniform_(1, 16),
            "B": b.unflatten(-1, (G, N)),
            "C": c.unflatten(-1, (G, N)),
            "D": None if plain else torch.ones(*(H, P)[: 1 + D_channels], device=device),
            "dt_bias": None if plain else torch.empty(H, device=device).uniform_(-6.9, -2.3),
            "z": projected[..., : H * P].unflatten(-1, (H, P)) if gate else None,
            "initial_state": torch.randn(n_docs, H, P, N, device=device) if state else None,
        }
        return leaves(inputs) | {"doc_ids": doc_ids(B, L, documents, device)}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        docs: dict[str, Any] = {} if inputs["doc_ids"] is None else {"n_docs": n_docs}
        y, final = ssd(**inputs, **docs, dt_softplus=not plain, return_final_state=state)  # type: ignore[arg-type]
        return (y,) if final is None else (y, final)

    flags = {"docs": documents, "state": state, "gate": gate, "plain": plain, "Dp": D_channels}
    name = named(f"ssd B{B} L{L} H{H} P{P} N{N} G{G}", dtype, flags)
    return Case(name, "ssd", make, call, shape={"B": B, "L": L, "H": H, "P": P, "N": N, "G": G})


def ssd_step_case(B: int, H: int, P: int, N: int, G: int = 1, *, dtype: torch.dtype = BF16) -> Case:
    """One token of decoding."""

    def make(device: torch.device | str) -> Inputs:
        def row(*shape: int) -> Tensor:
            return torch.randn(B, *shape, device=device, dtype=dtype)

        heads = torch.rand(H, device=device)
        state = torch.randn(B, H, P, N, device=device)
        inputs: Inputs = {"state": state, "x": row(H, P), "dt": row(H), "A": -heads - 1, "B": row(G, N)}
        return inputs | {"C": row(G, N), "D": heads, "dt_bias": heads}

    name = named(f"ssd_step B{B} H{H} P{P} N{N} G{G}", dtype, {})
    return Case(name, "ssd", make, lambda inputs: (ssd_step(**inputs),), backward=False)  # type: ignore[arg-type]


def conv_case(
    B: int,
    L: int,
    C: int,
    K: int = 4,
    *,
    dtype: torch.dtype = BF16,
    parent: int | None = None,
    documents: int = 0,
    state: bool = False,
    bias: bool = True,
    activation: str | None = "silu",
) -> Case:
    """x is a slice of a projection `parent` channels wide, None for a tensor of its own."""
    n_docs = B * -(-L // documents) if documents else B

    def make(device: torch.device | str) -> Inputs:
        width = parent or C
        start = (width - C) // 2 // 16 * 16
        inputs: Inputs = {
            "x": torch.randn(B, L, width, device=device, dtype=dtype)[..., start : start + C],
            "weight": torch.randn(C, K, device=device),
            "bias": torch.randn(C, device=device) if bias else None,
            "initial_state": torch.randn(n_docs, C, K, device=device, dtype=dtype) if state else None,
        }
        return leaves(inputs) | {"doc_ids": doc_ids(B, L, documents, device)}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        docs: dict[str, Any] = {} if inputs["doc_ids"] is None else {"n_docs": n_docs}
        rest = {"activation": activation, "return_final_state": state}
        y, final = causal_conv1d(**inputs, **docs, **rest)  # type: ignore[arg-type]
        return (y,) if final is None else (y, final)

    flags = {"docs": documents, "state": state, "sliced": parent is not None, "no bias": not bias}
    name = named(f"conv B{B} L{L} C{C} K{K}", dtype, flags | {"linear": activation is None})
    return Case(name, "causal_conv1d", make, call, shape={"B": B, "L": L, "C": C, "K": K})


def conv_step_case(B: int, C: int, K: int = 4, *, dtype: torch.dtype = BF16) -> Case:
    """One token of decoding."""

    def make(device: torch.device | str) -> Inputs:
        state, weight = torch.randn(B, C, K, device=device, dtype=dtype), torch.randn(C, K, device=device)
        x = torch.randn(B, 2 * C, device=device, dtype=dtype)[:, C:]
        return {"state": state, "x": x, "weight": weight, "bias": weight[:, 0].contiguous()}

    name = named(f"conv_step B{B} C{C} K{K}", dtype, {})
    return Case(name, "causal_conv1d", make, lambda i: (causal_conv1d_step(**i),), backward=False)  # type: ignore[arg-type]


def norm_case(
    B: int,
    L: int,
    E: int,
    *,
    dtype: torch.dtype = BF16,
    n_groups: int = 1,
    gate: bool = True,
    norm_before_gate: bool = False,
    parent: int | None = None,
) -> Case:
    """x is a tensor of its own; z a slice of a projection `parent` channels wide, None for its own."""

    def make(device: torch.device | str) -> Inputs:
        z = torch.randn(B, L, parent or E, device=device, dtype=dtype)[..., :E] if gate else None
        x = torch.randn(B, L, E, device=device, dtype=dtype)
        return leaves({"x": x, "z": z, "weight": torch.ones(E, device=device)})

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = {"n_groups": n_groups, "norm_before_gate": norm_before_gate}
        return (gated_norm(**inputs, **rest),)  # type: ignore[arg-type]

    flags = {"groups": n_groups, "no gate": not gate, "norm first": norm_before_gate, "sliced": bool(parent)}
    name = named(f"norm B{B} L{L} E{E}", dtype, flags)
    return Case(name, "gated_norm", make, call, shape={"B": B, "L": L, "E": E})


def projected_norm_case(
    B: int,
    L: int,
    E: int,
    D: int,
    *,
    dtype: torch.dtype = BF16,
    n_groups: int = 1,
    norm_before_gate: bool = False,
) -> Case:
    """A gated norm and the mixer's last product, whose fp32 weight is D x E."""

    def make(device: torch.device | str) -> Inputs:
        x = torch.randn(B, L, E, device=device, dtype=dtype)
        z = torch.randn(B, L, 2 * E, device=device, dtype=dtype)[..., :E]
        weight, projection = torch.ones(E, device=device), torch.randn(D, E, device=device).mul_(E**-0.5)
        return leaves({"x": x, "z": z, "weight": weight, "projection": projection})

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = {"n_groups": n_groups, "norm_before_gate": norm_before_gate}
        return (projected_norm(**inputs, bias=None, **rest),)  # type: ignore[arg-type]

    name = named(f"norm B{B} L{L} E{E} to {D}", dtype, {"groups": n_groups, "norm first": norm_before_gate})
    return Case(name, "gated_norm", make, call, shape={"B": B, "L": L, "E": E, "D": D})


def stream_norm_case(
    B: int, L: int, E: int, *, dtype: torch.dtype = torch.float32, branch: bool = True, to: int = 0
) -> Case:
    """The norm at a block's entry under bf16 autocast, the stream going on beside it, with what the block
    before adds to it; and the product that reads it, whose fp32 weight is `to` x E."""

    def make(device: torch.device | str) -> Inputs:
        x = torch.randn(B, L, E, device=device, dtype=dtype)
        more = {"branch": torch.randn(B, L, E, device=device, dtype=BF16)} if branch else {}
        if to:
            more["reader"] = torch.randn(to, E, device=device).mul_(E**-0.5)
        return leaves({"x": x, "weight": torch.ones(E, device=device)} | more)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        stream, y = stream_norm(**inputs, out_dtype=BF16)  # type: ignore[arg-type]
        if not to:
            return stream, y
        reader = reader_of(y, inputs["reader"])  # type: ignore[arg-type]
        assert reader is not None
        return stream, read(y, reader, None)

    name = named(f"stream norm B{B} L{L} E{E}", dtype, {"alone": not branch, "to": to})
    return Case(name, "gated_norm", make, call, shape={"B": B, "L": L, "E": E})


def selective_case(
    B: int,
    L: int,
    E: int,
    N: int = 16,
    *,
    dtype: torch.dtype = BF16,
    documents: int = 0,
    state: bool = False,
    gate: bool = True,
) -> Case:
    """z is half of a projection, B and C parts of another, as the Mamba layer has them."""
    n_docs = B * -(-L // documents) if documents else B

    def make(device: torch.device | str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        z, (_, b, c) = normal(B, L, 2 * E)[..., E:], normal(B, L, 160 + 2 * N).split([160, N, N], dim=-1)
        inputs: Inputs = {
            "u": normal(B, L, E),
            "dt": normal(B, L, E).mul_(0.1),
            "A": -torch.arange(1.0, N + 1, device=device).repeat(E, 1),
            "B": b,
            "C": c,
            "D": torch.ones(E, device=device),
            "z": z if gate else None,
            "dt_bias": torch.empty(E, device=device).uniform_(-6.9, -2.3),
            "initial_state": torch.randn(n_docs, E, N, device=device) if state else None,
        }
        return leaves(inputs) | {"doc_ids": doc_ids(B, L, documents, device)}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        docs: dict[str, Any] = {} if inputs["doc_ids"] is None else {"n_docs": n_docs}
        y, final = selective_scan(**inputs, **docs, return_final_state=state)  # type: ignore[arg-type]
        return (y,) if final is None else (y, final)

    flags = {"docs": documents, "state": state, "gate": gate}
    name = named(f"scan B{B} L{L} E{E} N{N}", dtype, flags)
    return Case(name, "selective_scan", make, call, shape={"B": B, "L": L, "E": E, "N": N})


def selective_step_case(B: int, E: int, N: int = 16) -> Case:
    """One token of decoding."""

    def make(device: torch.device | str) -> Inputs:
        u, dt, z = (torch.randn(B, E, device=device, dtype=BF16) for _ in range(3))
        b, c = (torch.randn(B, N, device=device, dtype=BF16) for _ in range(2))
        heads, A = torch.rand(E, device=device), -torch.rand(E, N, device=device)
        inputs: Inputs = {"state": torch.randn(B, E, N, device=device), "u": u, "dt": dt, "A": A, "B": b}
        return inputs | {"C": c, "D": heads, "z": z, "dt_bias": heads}

    name = named(f"scan_step B{B} E{E} N{N}", BF16, {})
    return Case(name, "selective_scan", make, lambda i: (selective_scan_step(**i),), backward=False)  # type: ignore[arg-type]


def head_case(T: int, D: int, V: int, *, dtype: torch.dtype = BF16, grads: bool = True) -> Case:
    """The loss of T rows; without `grads` its value alone."""

    def make(device: torch.device | str) -> Inputs:
        hidden = torch.randn(T, D, device=device, dtype=dtype)
        weight = torch.randn(V, D, device=device, dtype=dtype) * D**-0.5
        labels = torch.randint(0, V, (T,), device=device)
        both: Inputs = {"hidden": hidden, "weight": weight}
        return (leaves(both) if grads else both) | {"labels": labels}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(**inputs)[0],)  # type: ignore[arg-type]

    name = named(f"head T{T} D{D} V{V}", dtype, {"value": not grads})
    return Case(name, "linear_cross_entropy", make, call, backward=grads, shape={"T": T, "D": D, "V": V})


def step_case(aligned: bool = True, half: bool = False) -> Case:
    """A step of AdamW and the norm of the gradient: of tables, whatever they name."""

    def make(device: torch.device | str) -> Inputs:
        rows = torch.zeros(3, 6, dtype=torch.int64, device=device)
        return {"rows": rows, "places": torch.zeros(100, 2, dtype=torch.int32, device=device)}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        from ssmtrain.kernels.adamw import triton

        table = triton.Table(inputs["rows"], inputs["places"], aligned, half)  # type: ignore[arg-type]
        triton.adamw(table, Rates(1e-3, (0.9, 0.95), 1e-8, 0.1, 3, 0.5))
        return (triton.squares(table),)

    name = f"step{'' if aligned else ' unaligned'}{' fp16' if half else ''}"
    return Case(name, "adamw", make, call, backward=False, shape={})


def to_compile(quick: bool = False) -> Iterator[Case]:
    """Cases that between them reach every kernel, on the shapes of published models and on odd ones."""
    yield from smallest()
    yield ssd_case(8, 4096, 80, 64, 128)
    yield conv_case(8, 4096, 5376, parent=10576)
    yield norm_case(8, 4096, 5120, parent=10576)
    yield projected_norm_case(8, 4096, 5120, 2560)
    yield stream_norm_case(8, 4096, 2560, to=10576)
    yield selective_case(8, 4096, 5120)
    yield head_case(32768, 768, 50288)
    yield step_case()
    if quick:
        return
    wide = {"documents": 512, "state": True}
    yield ssd_case(1, 32768, 80, 64, 128)
    yield ssd_case(8, 4096, 128, 64, 256)
    yield ssd_case(8, 4096, 128, 64, 128, 8)
    for N in (64, 128, 256):  # rows longer than a window of triton_hopper.py
        yield ssd_case(4, 8192, 80, 64, N)
        yield ssd_case(4, 8192, 80, 64, N, documents=512)
        yield ssd_case(4, 8192, 80, 64, N, **wide)
    yield ssd_case(2, 1000, 24, 64, 128, gate=True, D_channels=True, state=True)
    yield ssd_case(2, 1000, 6, 20, 24, 3, plain=True)
    yield ssd_case(2, 1024, 16, 128, 128, dtype=torch.float32)
    yield ssd_case(2, 1024, 32, 32, 16, dtype=torch.float16)
    for P, N in ((16, 16), (32, 128), (80, 64), (128, 256)):
        yield ssd_case(2, 1024, 32, P, N, documents=100)
    yield ssd_step_case(64, 80, 64, 128)
    yield conv_case(8, 4096, 5376, parent=10576, **wide)
    yield conv_case(2, 1000, 777, 3, bias=False, activation=None)
    yield conv_case(2, 1000, 256, 2, dtype=torch.float32, **wide)
    yield conv_step_case(64, 5376)
    yield norm_case(2, 1000, 5120, gate=False)
    yield norm_case(2, 1000, 8192, n_groups=8, norm_before_gate=True)
    yield norm_case(2, 1000, 768, dtype=torch.float32)
    yield projected_norm_case(2, 1000, 8192, 768, n_groups=8, norm_before_gate=True)
    yield projected_norm_case(2, 1000, 768, 768, dtype=torch.float32)
    yield projected_norm_case(2, 1000, 20480, 768)
    for E in (768, 1000, 2048, 8192, 20480):
        yield stream_norm_case(2, 1000, E)
        yield stream_norm_case(2, 1000, E, to=64)
    yield stream_norm_case(2, 1000, 2560, branch=False)
    yield stream_norm_case(2, 1000, 2560, dtype=BF16)
    yield norm_case(2, 1000, 20480)
    yield norm_case(1, 7, 120)
    yield selective_case(1, 32768, 5120)
    yield selective_case(2, 8192, 1536, documents=512, state=True)
    yield selective_case(2, 1000, 1000, 24, gate=False, dtype=torch.float32)
    yield selective_case(1, 5000, 256, 8, gate=False, dtype=torch.float32, documents=100, state=True)
    for N in (64, 256):
        yield selective_case(2, 4096, 768, N, documents=100)
    yield selective_step_case(64, 5120)
    yield head_case(32768, 768, 50288, grads=False)
    yield head_case(1000, 768, 50257, dtype=torch.float16)
    yield head_case(1000, 768, 32000, dtype=torch.float32)
    yield head_case(4096, 256, 257)
    yield step_case(aligned=False)
    yield step_case(half=True)


def smallest() -> Iterator[Case]:
    """Cases whose every size is one where it can be: Triton compiles a number that is 1 in as a constant."""
    for dtype in (BF16, torch.float32):
        yield ssd_case(1, 1, 1, 16, 16, dtype=dtype, state=True)
        yield ssd_case(1, 1, 1, 1, 1, dtype=dtype, documents=1)
        yield conv_case(1, 1, 1, dtype=dtype, documents=1)
        yield conv_case(1, 1, 8, dtype=dtype, state=True)
        yield norm_case(1, 1, 1, dtype=dtype)
        yield stream_norm_case(1, 1, 1, dtype=dtype)
        yield selective_case(1, 1, 1, 1, dtype=dtype, documents=1, state=True)
        yield selective_case(1, 1, 1, 1, dtype=dtype)
        yield head_case(1, 1, 1, dtype=dtype)
    yield ssd_case(1, 1, 1, 64, 64, state=True)
    yield ssd_step_case(1, 1, 1, 1)
    yield conv_step_case(1, 1)
    yield selective_step_case(1, 1, 1)


def to_tune() -> Iterator[Case]:
    """Cases whose shapes are worth an entry in tuned.json: those of published models, in training."""
    yield ssd_case(8, 4096, 80, 64, 128)
    yield ssd_case(8, 4096, 80, 64, 64)
    yield ssd_case(8, 4096, 128, 64, 256)
    yield conv_case(8, 4096, 5376, parent=10576)
    yield conv_case(8, 4096, 5376, parent=10576, documents=512)
    yield norm_case(8, 4096, 5120, parent=10576)
    yield norm_case(8, 4096, 2048)


def leaves(inputs: Inputs) -> Inputs:
    """The same views, as leaves that require gradients."""
    return {name: None if x is None else x.detach().requires_grad_() for name, x in inputs.items()}


def doc_ids(B: int, L: int, length: int, device: torch.device | str) -> Tensor | None:
    """Ids of documents of this length (the last of a row may be shorter), numbered over the batch."""
    if not length:
        return None
    per_row = -(-L // length)
    row = torch.arange(L, device=device) // length
    return (row[None] + per_row * torch.arange(B, device=device)[:, None]).to(torch.int32)


def named(shape: str, dtype: torch.dtype, flags: dict[str, Any]) -> str:
    """A case's name: its shape and what is unusual about it."""
    unusual = [
        key if value is True else f"{key} {value}" for key, value in flags.items() if value not in (0, 1)
    ]
    unusual += [key for key, value in flags.items() if value is True]
    kind = [] if dtype == BF16 else [str(dtype).removeprefix("torch.")]
    return " ".join([shape, *kind, *unusual])
