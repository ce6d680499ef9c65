"""ZeRO: DeepSpeed's engine cuts optimiser states, gradients and parameters of the built model over the ranks.

The engine sums gradients, clips, steps, and drops a step whose gradient is not finite; the process group, the
loss, the digits of the passes and the checkpoints are ours. None of its kernels is built: states are stepped
by torch's AdamW.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssmtrain.config.parallel import Zero3, ZeroStage
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel, Output
from ssmtrain.model.spread import bucket, kept_whole
from ssmtrain.parallel.processes import Fsdp
from ssmtrain.parallel.shard import Scattered, like, shape_of

MOMENTS = ("exp_avg", "exp_avg_sq")

Check = Callable[[Mapping[str, nn.Parameter], Mapping[str, Tensor]], None]


def load_deepspeed(device: torch.device) -> Any:
    """The package, told what device it is on, in the process group that there is."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would look for compilers and, on a CPU, build its own all-reduce, for most of a minute.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.utils.logger.setLevel("ERROR")
    # It calls torch's messages by names that torch is about to change, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def settings(
    config: ZeroStage, clip: float | None, passes: int, sizes: list[int], total: int, on_gpu: bool
) -> dict[str, Any]:
    """What the engine is told, for a step of so many micro-batches of a model of `total` parameters, those of
    its blocks `sizes`."""
    host = {"device": "cpu", "pin_memory": on_gpu}
    size = bucket(total)
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": size,
        "allgather_bucket_size": size + size % 2,
        # A part of the gradient goes to its owner; by default all of it would go to all.
        "use_multi_rank_bucket_allreduce": False,
    }
    if isinstance(config, Zero3):
        # While a block runs the next is on its way, and one that is done is let go of. Each of a block's
        # modules asks for more ahead of it: what there is room for bounds that.
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": max(sizes)}
        zero["stage3_max_live_parameters"] = total - sum(sizes) + 2 * max(sizes)
        zero["stage3_param_persistence_threshold"] = kept_whole(total)
        if config.offload_params:
            zero["offload_param"] = host
    if config.offload_optimizer:
        zero["offload_optimizer"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": clip or 0.0,
        "communication_data_type": config.reduce,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }


class Zero(Fsdp):
    """The process group and the ranks of DDP, for a model that DeepSpeed runs."""

    cuts_parameters = False

    def setup_environment(self) -> None:
        """Make the process group; the engine asks the environment which rank of its node this is."""
        super().setup_environment()
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))

    def model_to_device(self) -> None:
        """Move what is not cut."""
        if not self.cuts_parameters:
            super(Fsdp, self).model_to_device()


def cut(model: HybridModel, device: torch.device, config: Zero3) -> None:
    """Cut the parameters of a model, which every rank has whole and alike, over the ranks."""
    load_deepspeed(device).zero.Init(
        module=model,
        remote_device="cpu" if config.offload_params else None,
        pin_memory=device.type == "cuda",
        mem_efficient_linear=False,
        dtype=torch.float32,
    )
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))


def start(
    model: HybridModel,
    optimizer: Optimizer,
    config: ZeroStage,
    device: torch.device,
    *,
    clip: float | None,
    passes: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    check: Check,
) -> ZeroEngine:
    """The engine of a model and its optimiser, for so many micro-batches a step, whose forward passes run in
    `autocast`; `check` raises ValueError for saved state that does not fit."""
    deepspeed = load_deepspeed(device)
    sizes = [_size(block) for block in model.blocks]
    page = settings(config, clip, passes, sizes, _size(model), device.type == "cuda")
    whole = Whole(model, autocast)
    engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=page, dist_init_required=False)
    if config.stage == 3:
        _gather_by_block(deepspeed, whole)
    return ZeroEngine(deepspeed, engine, whole, config.stage, device, check)


def _size(module: nn.Module) -> int:
    return sum(shape_of(parameter).numel() for parameter in module.parameters())


def _gather_by_block(deepspeed: Any, whole: Whole) -> None:
    """Have a block's parameters gathered before it runs, and those around the blocks before all."""
    # The engine would gather each module's own alone, and what is read from outside of one not at all.
    register = deepspeed.zero.register_external_parameter
    model = whole.model
    for block in model.blocks:
        for parameter in block.parameters():
            register(block, parameter)
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks."):
            register(whole, parameter)
            register(model, parameter)  # a validation calls it alone


class Whole(nn.Module):
    """The model as the engine calls it: in the run's digits, and its results are tensors for hooks to see."""

    def __init__(self, model: HybridModel, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.out: Output | None = None

    def forward(self, inputs: Tensor, labels: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The sums of losses and router losses; the rest is left in `out`."""
        with self.autocast():  # the engine has switched it off
            out = self.model(inputs, labels, ctx)
        self.out = out
        assert out.loss_sum is not None
        return out.loss_sum, out.aux


class ZeroEngine:
    """What LitLM asks of an engine (train/engine.py), by DeepSpeed's."""

    together = True

    def __init__(
        self, deepspeed: Any, engine: Any, whole: Whole, stage: int, device: torch.device, check: Check
    ) -> None:
        self.api, self.engine, self.whole, self.stage = deepspeed.utils, engine, whole, stage
        self.device, self.check = device, check
        self.zero = engine.optimizer
        """Its ZeRO optimiser, around ours."""
        # torch would make a group's state when it first steps it; the engine has looked for all by then.
        for _, flat in self._groups():
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            self.zero.optimizer.state[flat] = {"step": step, **moments}
        if stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def forward(self, inputs: Tensor, labels: Tensor, ctx: Context) -> Output:
        """The model's sums."""
        loss, aux = self.engine(inputs, labels, ctx)
        out, self.whole.out = self.whole.out, None
        assert out is not None
        return replace(out, loss_sum=loss, aux=aux)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Say which micro-batch is the last: only then the gradient is whole."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add to the gradient, which the engine averages over the ranks."""
        # A loss can overflow while its gradient does not: such a step must be dropped too, on every rank.
        good = loss.detach().isfinite()
        self.engine.backward(loss * torch.where(good, 1.0, torch.nan), scale_wrt_gas=False)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged gradient, a whole parameter's at a time; every rank must take them all."""
        for name, parameter in self.whole.model.named_parameters():
            yield name, self.api.safe_get_full_grad(parameter)

    def norm(self, lr: float) -> Tensor:
        """Clip, and step where the norm is finite; returns it ()."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def apply(self, lr: float, norm: Tensor, known: float) -> None:
        """Nothing: see `norm`."""

    def clear(self) -> None:
        """Nothing: the engine keeps no gradient."""

    def _groups(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """Parameters in groups, each with the flat tensor that this rank's part of them is stepped in."""
        if self.stage == 3:
            return list(zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True))
        return list(zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True))

    def states(self) -> dict[str, Tensor | Scattered]:
        """The optimiser's state as `parameter/key` -> tensor; its moments lie in pieces."""
        names = {id(p): name for name, p in self.whole.model.named_parameters()}
        found: dict[str, Tensor | Scattered] = {}
        for parameters, flat in self._groups():
            step = self.zero.optimizer.state[flat]["step"]
            for parameter in parameters:
                name = names[id(parameter)]
                found[f"{name}/step"] = step
                for key in MOMENTS:
                    gather = partial(self.api.safe_get_full_optimizer_state, parameter, key)
                    found[f"{name}/{key}"] = Scattered(shape_of(parameter), torch.float32, gather)
        return found

    @torch.no_grad()
    def load(self, named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
        """Put saved state back, bit for bit; ValueError when it does not fit."""
        self.check(named, saved)
        if not saved:
            return
        names = {id(p): name for name, p in named.items()}
        for parameters, flat in self._groups():
            steps = {float(saved[f"{names[id(p)]}/step"]) for p in parameters}
            if len(steps) > 1:
                raise ValueError("its parameters were not all stepped as often: take parallel=ddp or fsdp")
            self.zero.optimizer.state[flat]["step"].fill_(steps.pop())
        for name, parameter in named.items():
            for key in MOMENTS:
                value = saved[f"{name}/{key}"]
                if self.stage == 3:
                    self.api.safe_set_local_optimizer_state(parameter, like(value, parameter), key)
                else:
                    self.api.safe_set_full_optimizer_state(parameter, value, key)
