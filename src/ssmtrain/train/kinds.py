"""Names of a model's parts around their forward passes, and a profile's time by those names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.profiler import record_function

from ssmtrain.layers.base import LayerConfig

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM

PREFIX = "ssmtrain: "
BETWEEN = f"{PREFIX}between steps"
BACKWARD = "autograd::engine::evaluate_function: "
COMMUNICATION = ("c10d::", "nccl:", "gloo:", "record_param_comms", "FSDP::", "mpi:")
OPTIMISER = "Optimizer."


@dataclass
class Spent:
    """Time of one kind, in milliseconds of all profiled steps."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


@contextmanager
def named(lit: LitLM) -> Iterator[None]:
    """Name what the model's parts do while the body runs: mixers and ffns by kind, norms, both ends, data.

    Compiled blocks are named whole: nothing inside them can be told apart.
    """
    handles: list[Any] = []
    for i, block in enumerate(lit.model.blocks):
        if lit.config.trainer.compile:
            handles += _watched(block, f"block {lit.model.names[i]}")
            continue
        page = lit.config.model.blocks[lit.model.names[i]]
        for name, module in block.named_children():
            layer = getattr(page, name, None)
            handles += _watched(module, _kind(layer) if layer is not None else "norm")
    handles += _watched(lit.model.input, "embedding")
    head, real_loss, real_rows = lit.model.head, lit.model.head.loss, lit.rows
    # Plain methods, which no hook sees: attributes of the instances go before them.
    object.__setattr__(head, "loss", _around(real_loss, "head"))
    object.__setattr__(lit, "rows", _around(real_rows, "data"))
    try:
        yield
    finally:
        object.__delattr__(head, "loss")
        object.__delattr__(lit, "rows")
        for handle in handles:
            handle.remove()


def by_kind(events: Sequence[Any], device: bool) -> dict[str, Spent]:
    """Milliseconds by kind of a profile's events, largest first; `device`: of the GPU, else of the CPU."""
    spent: dict[str, Spent] = {}
    for event, kind, backward in places(events):
        time = (event.self_device_time_total if device else event.self_cpu_time_total) / 1000
        entry = spent.setdefault(kind, Spent())
        if backward:
            entry.backward += time
        else:
            entry.forward += time
    return dict(sorted(spent.items(), key=lambda pair: -pair[1].total))


def places(events: Sequence[Any]) -> list[tuple[Any, str, bool]]:
    """The host's events of a profile, the kind that each counts under, and whether in the backward pass.

    An op counts under the nearest named part around it; in the backward pass under that of the op whose
    gradient it takes: the two share a number of autograd's.
    """
    host = [event for event in events if "CPU" in str(event.device_type) and not event.is_async]
    homes: dict[int, str] = {}
    found: dict[int, tuple[str, bool]] = {}
    for event in sorted(host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        kind, backward = _place(event, found, homes)
        found[id(event)] = (kind, backward)
        if event.sequence_nr >= 0 and not event.name.startswith((PREFIX, BACKWARD)):
            homes[event.sequence_nr] = kind  # the last op with a number is the one that made the node
    return [(event, *found[id(event)]) for event in host]


def _place(event: Any, found: dict[int, tuple[str, bool]], homes: dict[int, str]) -> tuple[str, bool]:
    """Kind of an event and whether it is in the backward pass: by its name, or by what is around it."""
    above = event.cpu_parent
    kind, backward = found.get(id(above), ("rest", False)) if above is not None else ("rest", False)
    name = event.name
    if kind == BETWEEN.removeprefix(PREFIX):
        return kind, backward
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX), backward
    if name.startswith(COMMUNICATION):
        return "communication", backward
    if name.startswith(OPTIMISER):
        return "optimiser", backward
    if name.startswith(BACKWARD):
        return homes.get(event.sequence_nr, "rest"), True
    return kind, backward


def _kind(layer: LayerConfig) -> str:
    return str(type(layer).model_fields["kind"].default)


def _watched(module: nn.Module, name: str) -> list[Any]:
    """Hooks that open and close a named range around a module's forward pass."""
    opened: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        opened.append(record_function(PREFIX + name))
        opened[-1].__enter__()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _around(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*args, **options)

    return run
