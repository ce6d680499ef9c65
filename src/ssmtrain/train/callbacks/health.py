"""The health of the layers: states, step sizes, decay rates, gradients by kind, load of the experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ssmtrain.layers.base import Context, LayerConfig, Mixer
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import holders, is_sharded, mine, on_first
from ssmtrain.train.module import LitLM
from ssmtrain.train.state import forked_rng

Figures = dict[str, float]


class Health(Callback):
    """Probes the model with one validation row every so many steps; training's bits do not change."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.gradients: Figures = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Ask for the gradients of the steps that are due."""
        lit: LitLM = pl_module

        def watch() -> None:
            if (lit.state.step + 1) % self.every == 0:
                cut = is_sharded(lit.model)
                self.gradients = gradient_norms(lit.engine.gradients(), parameter_kinds(lit), cut)

        if ranks.rank() == 0 or lit.engine.together:
            lit.on_gradients.append(watch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Send a health record where the step is due."""
        lit: LitLM = pl_module
        if lit.state.step % self.every:
            return
        with lit.clock("health"), forked_rng(lit.device), on_first(lit.model) as model:
            if model is None:
                return
            figures = {"grad_norm": self.gradients, "layers": probe(lit, model)}
            load = expert_load(lit.loads)
            if load:
                figures["expert_load"] = load
        lit.journal.write("health", lit.state.step, **figures)


def parameter_kinds(lit: LitLM) -> dict[str, str]:
    """The kind that each parameter counts under: a layer's kind, norm, embedding or head."""
    kinds: dict[str, str] = {}
    for name, _ in lit.model.named_parameters():
        parts = name.split(".")
        if parts[0] != "blocks":
            kinds[name] = "embedding" if parts[0] == "input" else "head"
            continue
        layer = getattr(lit.config.model.blocks[lit.model.names[int(parts[1])]], parts[2], None)
        kinds[name] = kind_of(layer) if layer is not None else "norm"
    return kinds


def gradient_norms(gradients: Iterable[tuple[str, Tensor]], kinds: dict[str, str], cut: bool) -> Figures:
    """Norm of the gradient by kind; all ranks call it where the gradients are cut over them."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        held = holders(gradient) if cut else 1
        square = mine(gradient).double().square().sum() / held
        squares[kinds[name]] = squares[kinds[name]] + square if kinds[name] in squares else square
    sums = torch.stack([squares[kind] for kind in sorted(squares)])
    if cut:
        sums = ranks.sum_(sums)
    return dict(zip(sorted(squares), sums.sqrt().tolist(), strict=True))


@torch.no_grad()
def probe(lit: LitLM, model: HybridModel) -> dict[str, Figures]:
    """By mixer kind: largest |state|, range of dt, share of dt at a clamp, range of -A, on one row."""
    batch = lit.text.val.batch_rows([0]).to(lit.device)
    ctx = Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs, states=[None] * len(model.blocks))
    found: dict[str, Figures] = {}
    with _inputs(model) as inputs, lit.autocast():
        model(batch.inputs, batch.labels, ctx)
    plain = Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs)
    for i, (name, block) in enumerate(zip(model.names, model.blocks)):
        config, mixer = lit.config.model.blocks[name].mixer, block.mixer
        if config is not None and isinstance(mixer, Mixer):
            assert ctx.states is not None
            figures = mixer_figures(mixer, inputs[i], plain, ctx.states[i] or {})
            merge(found.setdefault(kind_of(config), {}), figures)
    return {kind: figures for kind, figures in found.items() if figures}


def kind_of(config: LayerConfig) -> str:
    """The name of a layer's kind."""
    return str(type(config).model_fields["kind"].default)


def mixer_figures(mixer: Mixer, x: Tensor, ctx: Context, state: dict[str, Tensor]) -> Figures:
    """The figures of one mixer on its input x (B, L, D) and its final state."""
    found: Figures = {}
    if "ssm" in state:
        found["state_max"] = float(state["ssm"].abs().max())
    dt = mixer.step_sizes(x, ctx)
    if dt is not None:
        low, high = getattr(mixer, "dt_limit", (0.0, float("inf")))
        found["dt_min"], found["dt_max"] = float(dt.min()), float(dt.max())
        found["dt_clamped"] = float(((dt <= low) | (dt >= high)).double().mean())
    A_log = getattr(mixer, "A_log", None)
    if A_log is not None:
        A = A_log.detach().exp()
        found["A_min"], found["A_max"] = float(A.min()), float(A.max())
    return found


def merge(into: Figures, new: Figures) -> None:
    """Combine the figures of two layers of a kind: extremes by name, the largest share."""
    for key, value in new.items():
        pick = min if key.endswith("_min") else max
        into[key] = pick(into[key], value) if key in into else value


def expert_load(loads: dict[int, Tensor]) -> Figures:
    """Largest load over the mean, worst block; share of experts that got nothing."""
    if not loads:
        return {}
    stacked = [load.double() for load in loads.values()]
    return {
        "max_over_mean": max(float(load.max() / load.mean().clamp_min(1e-9)) for load in stacked),
        "idle": max(float((load == 0).double().mean()) for load in stacked),
    }


@contextmanager
def _inputs(model: HybridModel) -> Iterator[dict[int, Tensor]]:
    """The input of every mixer, by block index, of the forward pass in the body."""
    found: dict[int, Tensor] = {}
    handles = []
    for i, block in enumerate(model.blocks):
        if isinstance(block.mixer, nn.Module):

            def keep(module: nn.Module, args: Any, i: int = i) -> None:
                found[i] = args[0].float()  # bf16 under autocast, where the figures are not taken

            handles.append(block.mixer.register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
