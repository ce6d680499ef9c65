"""FSDP2: matrices, their gradients and optimiser states cut over the ranks, gathered a few blocks at a time.

What is not a matrix (norms, A_log, D, step biases, convolutions, routers: a thousandth of a model) stays
whole on every rank. Cut, each would cost the host as much as a matrix does, in every pass, and it must not
lose digits where matrices may.

What is saved, loaded, drawn or scored is the whole model, as without it: here is what passes between the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from ssmtrain.config.parallel import Fsdp
from ssmtrain.layers.base import ParamSpec
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.spread import blocks_of_unit
from ssmtrain.parallel import ranks


@dataclass(frozen=True)
class Scattered:
    """A tensor that lies in pieces over the ranks, in a way that only they together can undo."""

    shape: torch.Size
    dtype: torch.dtype
    whole: Callable[[], Tensor]
    """Put it together, on every rank, all of which must call it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape.numel() * self.dtype.itemsize


def shard(model: HybridModel, device: torch.device, config: Fsdp) -> None:
    """Cut a model, which every rank has whole and alike, over the ranks: units of blocks, and the rest.

    A unit moves to the device before it is cut: no more than one lies there whole.
    """
    # A block may return a view of what a product made; nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    world, replicas = dist.get_world_size(), config.replicas
    if replicas == 1:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, world // replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    kept = _kept_whole(model)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    summed = torch.bfloat16 if config.reduce == "bf16" else torch.float32
    # What a block is given keeps its type: the stream is fp32 where it must be.
    blocks = MixedPrecisionPolicy(
        torch.bfloat16 if config.gather == "bf16" else None, summed, cast_forward_inputs=False
    )
    rest = MixedPrecisionPolicy(None, summed, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.offload else OffloadPolicy()
    cut = partial(fully_shard, mesh=mesh, ignored_params=kept, offload_policy=place)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    size = config.unit or blocks_of_unit(sizes)
    units = [list(model.blocks[at : at + size]) for at in range(0, len(model.blocks), size)]
    for unit in units:
        # What the backward pass wants first is not let go of: it would be gathered again at once.
        cut(unit, mp_policy=blocks, reshard_after_forward=config.reshard and unit is not units[-1])
    cut(model, mp_policy=rest, reshard_after_forward=False)
    for this, following in pairwise(units):
        # Asked for before a unit runs, not after: the host may be no faster than the device.
        _as_cut(this).set_modules_to_forward_prefetch([_as_cut(following)])


def _as_cut(unit: list[nn.Module]) -> FSDPModule:
    first = unit[0]
    assert isinstance(first, FSDPModule)
    return first


def is_matrix(name: str, parameter: Tensor, spec: ParamSpec) -> bool:
    """Whether a parameter is a matrix, or a stack of them, that a product may round: see the top."""
    return parameter.ndim >= 2 and not spec.fp32 and ".conv" not in name


def _kept_whole(model: HybridModel) -> set[nn.Parameter]:
    specs = model.specs()
    return {p for name, p in model.named_parameters() if not is_matrix(name, p, specs[name])}


def average_whole(model: nn.Module) -> None:
    """Average over the ranks, in one message, the gradients of what is whole on each of them."""
    if not is_sharded(model):
        return
    grads = [p.grad for p in model.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if grads:
        joined = torch.cat([grad.flatten() for grad in grads])
        ranks.sum_(joined).div_(ranks.world())
        parts = joined.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


def holders(tensor: Tensor) -> int:
    """How many ranks hold what this one holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return ranks.world()
    return tensor.device_mesh.size(0) if tensor.device_mesh.ndim == 2 else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has cut a model over the ranks."""
    return isinstance(model, FSDPModule)


def is_cut(model: nn.Module) -> bool:
    """Whether no rank can run a model without the others: FSDP2 or deepspeed_zero3 has cut it."""
    return is_sharded(model) or any(in_pieces(parameter) for parameter in model.parameters())


def in_pieces(parameter: Tensor) -> bool:
    """Whether deepspeed_zero3 has cut a parameter: its own storage is empty between passes."""
    return hasattr(parameter, "ds_tensor")


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, or the tensor where it is whole.

    Of a parameter under deepspeed_zero3: as many of its numbers, in one dimension, as each rank has, the last
    one's filled up.
    """
    if in_pieces(tensor):
        return tensor.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed's
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if in_pieces(parameter) else parameter.shape  # type: ignore[attr-defined]  # DeepSpeed's


def as_held(piece: Tensor, parameter: Tensor) -> Tensor | Scattered:
    """What is held as a parameter is (its values, their average), as something that can be made whole."""
    if not in_pieces(parameter):
        return piece
    shape, device = shape_of(parameter), parameter.device

    def whole() -> Tensor:
        pieces = ranks.gather(piece.detach().to(device).contiguous())
        return torch.cat(pieces)[: shape.numel()].view(shape)

    return Scattered(shape, piece.dtype, whole)


def tensors_of(model: nn.Module) -> dict[str, Tensor | Scattered]:
    """The state dict of a model; parameters that lie in pieces as such."""
    cut = {name: as_held(mine(p), p) for name, p in model.named_parameters() if in_pieces(p)}
    return {**model.state_dict(), **cut}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of value, which every rank has whole, where and as the parameter of its shape lies."""
    if in_pieces(parameter):
        piece = torch.zeros_like(mine(parameter))
        own = value.flatten()[ranks.rank() * len(piece) :][: len(piece)]
        piece[: len(own)] = own
        return piece
    rows = rows_of(parameter)
    if rows is None:
        return value.to(parameter.device, copy=True)
    cut = torch.empty_like(parameter.detach())
    own = mine(cut)
    own.copy_(value[rows[0] : rows[0] + len(own)])
    return cut


def whole(tensors: Mapping[str, Tensor | Scattered]) -> dict[str, Tensor]:
    """Tensors put together again: on rank 0, in host memory, those that were cut; the others as they are.

    Every rank must call it. On other ranks a tensor that was cut is empty.
    """
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor | Scattered) -> Tensor:
    if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.whole() if isinstance(tensor, Scattered) else tensor.full_tensor()
    return gathered.cpu() if ranks.rank() == 0 else gathered.new_empty(0, device="cpu")


def rows_of(tensor: Tensor) -> tuple[int, int] | None:
    """(first row, rows of the whole) of this rank's part of a tensor; None where the tensor is whole."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    total, ways = tensor.shape[0], mesh.size(mesh.ndim - 1)
    return min(place[-1] * -(-total // ways), total), total


def to_write(tensors: Mapping[str, Tensor | Scattered]) -> dict[str, Tensor]:
    """Those of the tensors, or this rank's rows of them, that fall to this rank where each is written once.

    Of tensors that every rank has whole, or none has, each takes about as many bytes; the latter are put
    together one at a time. All must ask in the same moment of a run, for tensors of the same names and
    shapes.
    """
    rank, load = ranks.rank(), [0] * ranks.world()
    found: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate()
            first_replica = coordinate is not None and all(place == 0 for place in coordinate[:-1])
            if first_replica and len(tensor.to_local()):
                found[name] = tensor
            continue
        least = load.index(min(load))
        load[least] += max(tensor.nbytes, 1)
        if isinstance(tensor, Scattered):
            gathered = tensor.whole()
            if least == rank:
                found[name] = gathered.to("cpu", copy=True)
        elif least == rank:
            found[name] = tensor
    return found


@contextmanager
def on_first(model: HybridModel) -> Iterator[HybridModel | None]:
    """The model, whole, for rank 0 to use by itself; None on other ranks where it is cut, which only help.

    Every rank must enter. What rank 0 gets of a model that is cut is a copy.
    """
    if not is_cut(model):
        yield model if ranks.rank() == 0 else None
        return
    tensors = whole(tensors_of(model))
    if ranks.rank():
        yield None
        return
    device = next(model.parameters()).device
    with torch.device("meta"):
        copy = HybridModel(model.config, model.vocab_size)
    copy.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in copy.state_dict().items():
            tensor.copy_(tensors[name])
    yield copy.train(model.training)


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Backward passes in here add to the gradients of whole parameters: none are summed over the ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def cut_again(model: nn.Module) -> None:
    """Let go of what passes without gradients have gathered and kept for a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
