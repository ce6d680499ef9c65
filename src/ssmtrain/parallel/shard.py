"""FSDP2: parameters, gradients and optimiser states cut over the ranks, gathered a block at a time.

What is saved, loaded, drawn or scored is the whole model, as without it: here is what passes between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ssmtrain.config.schema import Fsdp
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.parallel import ranks


def shard(model: HybridModel, device: torch.device, config: Fsdp) -> None:
    """Cut a model, which every rank has whole and alike, over the ranks: a unit for each block and the rest.

    A unit moves to the device before it is cut: no more than one block lies there whole.
    """
    world, replicas = dist.get_world_size(), config.replicas
    if replicas == 1:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, world // replicas)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard)
    # Its last parameters are the first that the backward pass wants: letting go of them would gain nothing.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def holders(model: nn.Module) -> int:
    """How many ranks hold the same part of a model that is cut."""
    one = next(model.parameters())
    return one.device_mesh.size(0) if isinstance(one, DTensor) and one.device_mesh.ndim == 2 else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is cut over ranks."""
    return isinstance(model, FSDPModule)


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, or the tensor where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of value, which every rank has whole, where and as the parameter of its shape lies."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device, copy=True)
    # Every rank cuts its part out of its own copy: nothing is sent.
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together again: on rank 0, in host memory, those that were cut; the others as they are.

    Every rank must call it. On other ranks a tensor that was cut is empty.
    """
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
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


def to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors, or this rank's rows of them, that fall to this rank where each is written once.

    Of tensors that every rank has whole each takes about as many bytes; all must ask in the same moment of a
    run, for tensors of the same names and shapes.
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
        if least == rank:
            found[name] = tensor
    return found


@contextmanager
def on_first(model: HybridModel) -> Iterator[HybridModel | None]:
    """The model, whole, for rank 0 to use by itself; None on other ranks where it is cut, which only help.

    Every rank must enter. What rank 0 gets of a model that is cut is a copy.
    """
    if not is_sharded(model):
        yield model if ranks.rank() == 0 else None
        return
    tensors = whole(model.state_dict())
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
