"""Optimisers: which parameters are decayed, which go to Muon, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ssmtrain.config.optim import AnyOptim, MuonConfig
from ssmtrain.layers.base import ParamSpec
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import holders, is_matrix, like, mine, shape_of
from ssmtrain.train.adamw import AdamW

EMBEDDING = "input.weight"

_STATE: dict[type[Optimizer], set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}
"""What each optimiser keeps of a parameter."""


def state_bytes(named: Mapping[str, nn.Parameter], config: AnyOptim) -> int:
    """Bytes that the optimisers keep of all ranks' parameters, or somewhat less."""
    tensors = 1 if config.kind == "muon" else 2
    return sum(tensors * shape_of(p).numel() * p.element_size() for p in named.values())


def is_decayed(name: str, spec: ParamSpec, config: AnyOptim) -> bool:
    """Whether weight decay applies: where the kind allows it, to the embedding only if asked for."""
    return spec.decay and (name != EMBEDDING or config.decay_embeddings)


def is_hidden_matrix(name: str, parameter: Tensor, spec: ParamSpec) -> bool:
    """Whether Muon takes a parameter: a projection inside a block, not a convolution, a router or a stack."""
    return (
        parameter.ndim == 2 and name.startswith("blocks.") and spec.decay and is_matrix(name, parameter, spec)
    )


def build_optimizers(
    named: Mapping[str, nn.Parameter],
    specs: Mapping[str, ParamSpec],
    config: AnyOptim,
    *,
    own: bool = True,
    copies: bool = False,
) -> list[Optimizer]:
    """AdamW over everything, or Muon over hidden matrices and AdamW over the rest; decay where it belongs.

    AdamW is ours where it can be, unless `own` is false; with `copies` it keeps weights in 16 bits too.
    KeyError if a parameter has no spec: an undeclared parameter would be decayed by accident.
    """
    hidden: dict[str, nn.Parameter] = {}
    if config.kind == "muon":
        hidden = {n: p for n, p in named.items() if is_hidden_matrix(n, p, specs[n])}
    rest = {n: p for n, p in named.items() if n not in hidden}
    optimizers: list[Optimizer] = []
    if rest:
        optimizers.append(_adamw(rest, specs, config, own, copies))
    if hidden and config.kind == "muon":
        optimizers.append(_muon(hidden, config))
    return optimizers


def _adamw(
    named: Mapping[str, nn.Parameter],
    specs: Mapping[str, ParamSpec],
    config: AnyOptim,
    own: bool,
    copies: bool,
) -> Optimizer:
    decayed = [p for n, p in named.items() if is_decayed(n, specs[n], config)]
    exempt = [p for n, p in named.items() if not is_decayed(n, specs[n], config)]
    groups = [
        {"params": params, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (exempt, 0.0))
        for params in _apart(group)
    ]
    if own and AdamW.takes(named.values()):
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, copies=copies)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in named.values())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _muon(named: Mapping[str, nn.Parameter], config: MuonConfig) -> Optimizer:
    # match_rms_adamw scales the update by 0.2 sqrt(max(rows, columns)), so that AdamW's rate fits both
    # (Moonlight, Liu et al. 2025, section 2.2).
    return torch.optim.Muon(
        list(named.values()),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    """Set the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def state_tensors(optimizers: list[Optimizer], named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimisers' state as `parameter/key` -> tensor, independent of groups and their order."""
    names = {id(p): n for n, p in named.items()}
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                found[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    return found


def owners(optimizers: list[Optimizer]) -> dict[int, Optimizer]:
    """The optimiser of each parameter, by the parameter's id."""
    return {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}


def check_state(
    owner: Mapping[int, Optimizer], named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """ValueError naming what saved state is missing, is unknown or of another shape, given the owners."""
    problems = []
    for full, value in saved.items():
        name, _, key = full.rpartition("/")
        parameter = named.get(name)
        if parameter is None:
            problems.append(f"{full}: no such parameter")
            continue
        optimizer, scalar = owner[id(parameter)], key == "step"
        shape, dtype = (torch.Size(), torch.float32) if scalar else (shape_of(parameter), parameter.dtype)
        if key not in _STATE[type(optimizer)]:
            problems.append(f"{full}: {type(optimizer).__name__} keeps no {key}")
        elif value.shape != shape or value.dtype != dtype:
            found = f"{tuple(value.shape)} {value.dtype} in the file"
            problems.append(f"{full}: {found}, {tuple(shape)} {dtype} in the model")
    wanted = [f"{n}/{key}" for n, p in named.items() if saved for key in sorted(_STATE[type(owner[id(p)])])]
    problems += [f"{full}: not in the file" for full in wanted if full not in saved]
    if problems:
        raise ValueError("the optimizer state does not fit the model: " + "; ".join(problems[:5]))


def load_state_tensors(
    optimizers: list[Optimizer], named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Put saved state back, bit for bit; ValueError as `check_state`."""
    owner = owners(optimizers)
    check_state(owner, named, saved)
    for full, value in saved.items():
        name, _, key = full.rpartition("/")
        parameter = named[name]
        place = mine(parameter) if key == "step" else parameter
        owner[id(parameter)].state[parameter][key] = like(value, place)


def norm_of(optimizers: list[Optimizer], device: torch.device) -> Tensor:
    """Norm () of the whole gradient of what optimisers step, and all that the next step can be told of it.

    Every rank must ask where parameters are cut over them.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, AdamW):
            optimizer.prepare()
            if len(optimizers) == 1:
                return optimizer.norm().to(device)
    return gradient_norm([p for o in optimizers for g in o.param_groups for p in g["params"]], device)


def take_step(optimizers: list[Optimizer], limit: float | None, norm: Tensor, known: float) -> None:
    """Clip the gradient to norm `limit` (None: not at all) and step; `known` is the norm on the host."""
    # The factor of torch.nn.utils.clip_grads_with_norm_: ours clips the gradient in its register.
    scale = 1.0 if limit is None or _within(limit, known) else min(1.0, limit / (known + 1e-6))
    others = []
    for optimizer in optimizers:
        if isinstance(optimizer, AdamW):
            optimizer.step(scale=scale)
        else:
            others.append(optimizer)
    clip_gradients([p for o in others for g in o.param_groups for p in g["params"]], limit, norm, known)
    for optimizer in others:
        optimizer.step()


def gradient_norm(parameters: list[nn.Parameter], device: torch.device | None = None) -> Tensor:
    """Norm () of the whole gradient, on a device; every rank must ask where parameters are cut over them."""
    norms = []
    for group in _apart(parameters):
        norm = torch.nn.utils.get_total_norm([mine(p.grad) for p in group if p.grad is not None])
        norm = norm if device is None else norm.to(device)
        if isinstance(group[0], DTensor):
            norm = (ranks.sum_(norm.double().square()) / holders(group[0])).sqrt().float()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _apart(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are cut over the ranks, and those that are whole: no operation takes both at once."""
    cut: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (cut if isinstance(parameter, DTensor) else whole).append(parameter)
    return [group for group in (cut, whole) if group]


def clip_gradients(parameters: list[nn.Parameter], limit: float | None, norm: Tensor, known: float) -> None:
    """Scale the gradients, in place, to norm `limit` where their norm exceeds it; None: leave them.

    `known` is the norm on the host: well below the limit the factor would be 1, in a pass over all gradients.
    """
    if limit is not None and not _within(limit, known):
        for group in _apart(parameters):
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)


def _within(limit: float, known: float) -> bool:
    """Whether a norm is so far below the limit that rounding cannot matter; NaN is not."""
    return known < 0.999 * limit
