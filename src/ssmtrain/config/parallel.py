"""The pages that spread a model over devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config, Positive


class AutoParallel(Config):
    """One process, or ddp when there are several devices."""

    kind: Literal["auto"] = "auto"


Digits = Literal["fp32", "bf16"]


class Ddp(Config):
    """Every device holds the whole model and a share of the batch."""

    kind: Literal["ddp"] = "ddp"
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""


class Fsdp(Config):
    """Every device holds a share of parameters, gradients and optimiser states, and of the batch (FSDP2)."""

    kind: Literal["fsdp"] = "fsdp"
    replicas: Positive = 1
    """Groups of neighbouring devices, each of which holds the whole model: as many as there are nodes keep
    the gathering of parameters within each; gradients are summed over groups too."""
    reshard: bool = True
    """Let go of a block's parameters after its forward pass and gather them again for the backward pass;
    false keeps them: a third fewer messages, and the whole model's parameters on each device meanwhile."""
    unit: Positive | None = None
    """Neighbouring blocks that are gathered in one message; absent: as many as have 64 million parameters."""
    gather: Digits = "fp32"
    """What the matrices of the blocks are gathered as; bf16 halves these messages and what is held whole, and
    rounds the gradient that each device makes of them. A_log, D, norms, routers and the like stay fp32."""
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""
    offload: bool = False
    """Keep each device's share in host memory and step it there; a block in use lies on the device."""


class ZeroStage(Config):
    """What the stages of ZeRO have in common."""

    kind: str
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""
    offload_optimizer: bool = False
    """Keep each device's share of the optimiser states in host memory and step it there."""

    @property
    def stage(self) -> int:
        """1: optimiser states are cut; 2: gradients too; 3: parameters too."""
        return int(self.kind[-1])


class Zero1(ZeroStage):
    """Every device holds the model and a share of the optimiser states (DeepSpeed's engine, ZeRO stage 1)."""

    kind: Literal["deepspeed_zero1"] = "deepspeed_zero1"


class Zero2(ZeroStage):
    """As deepspeed_zero1, and of the gradients every device keeps its share alone (ZeRO stage 2)."""

    kind: Literal["deepspeed_zero2"] = "deepspeed_zero2"


class Zero3(ZeroStage):
    """As deepspeed_zero2, and parameters are cut too and gathered for a block at a time (ZeRO stage 3)."""

    kind: Literal["deepspeed_zero3"] = "deepspeed_zero3"
    offload_params: bool = False
    """Keep each device's share of the parameters in host memory; a block in use lies on the device."""


AnyParallel = Annotated[AutoParallel | Ddp | Fsdp | Zero1 | Zero2 | Zero3, Field(discriminator="kind")]
