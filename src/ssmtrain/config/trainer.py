"""The trainer page: length, batch, precision, saving and printing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config, Count, Positive, PositiveFloat


class SpikeConfig(Config):
    """What happens at a step whose loss or gradient leaps far above those of the steps before it."""

    action: Literal["skip", "rollback"] = "skip"
    """skip: leave the step out; rollback: put the last checkpoint back and leave out all rows read since,
    also after max_nonfinite steps in a row that were not finite."""
    sigma: PositiveFloat = 6.0
    """Standard deviations above the mean that are a leap."""
    window: Annotated[int, Field(ge=4)] = 128
    """Steps that say what is usual; no step is a leap before half as many were taken."""
    rollbacks: Positive = 3
    """Times that a run goes back to one checkpoint; then it stops (exit 3)."""


class TrainerConfig(Config):
    """How long, how much at once, in which precision, and what is saved and printed when."""

    max_steps: Positive | None = None
    """Stop after this many optimiser steps; the schedule's horizon."""
    max_tokens: Positive | None = None
    """Stop after this many tokens; the schedule's horizon when max_steps is absent."""
    max_seconds: PositiveFloat | None = None
    """Save and stop (exit 75) after this many seconds of this process; never shortens the schedule."""
    global_batch: Positive = 8192
    """Tokens in an optimiser step, over all devices and micro-batches."""
    micro_batch: Positive | Literal["auto"] | None = None
    """Rows that one device computes at a time; absent: the global batch divided by the devices; auto: half of
    that, again and again, until a pass before the first step finds memory, and so for the rest of the run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 throughout, or bf16 autocast over fp32 parameters."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Which implementation of the kernels runs; a named one that cannot run is an error."""
    kernel_cache: str | None = None
    """Folder in which compiled kernels are kept; absent: Triton's own, TRITON_CACHE_DIR or ~/.triton/cache.
    Several nodes may share one."""
    recompute: Literal["none", "ops", "block"] = "ops"
    """What the backward pass computes again rather than finds kept: nothing; on a GPU the results of ops that
    are cheap beside products and scans (norms, convolutions, gates); or each block from its input."""
    compile: bool = False
    """Run the blocks under torch.compile."""
    cuda_graphs: bool = False
    """Record a micro-batch's passes as one CUDA graph: for models that a core cannot call fast enough."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """What to train on."""
    devices: Positive | None = None
    """How many devices (processes) on this machine; absent: all GPUs, or one process on the CPU."""
    threads: Positive | None = None
    """CPU threads per process; absent: torch's choice."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    health_every: Count = 100
    """Steps between health metrics of the layers; 0: never."""
    profile: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$", examples=["10:15"])] | None = None
    """Profile these steps, first:last: a Chrome trace and the time by kind of layer and by op, in the run's
    profile/; absent: none."""
    val_every: Count = 200
    """Steps between validations; 0: only at the end."""
    val_tokens: Positive | None = None
    """Tokens of a validation during training; absent: the whole split, as it always is at the end."""
    sample_every: Count = 0
    """Steps between printed samples; 0: only at the end."""
    save_every: Positive = 200
    """Steps between checkpoints; one is always saved at the end."""
    save_async: bool = False
    """Write checkpoints while training goes on: a step waits for a copy in host memory alone. It takes the
    memory of what a device saves: 12 bytes a parameter under AdamW, divided by the devices."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least 2, so that a damaged newest one has a predecessor."""
    keep_every: Positive | None = None
    """Steps between checkpoints that are kept for good, beside the last and the best; absent: none."""
    max_nonfinite: Positive = 3
    """Stop (exit 3) after this many non-finite steps in a row; each one is skipped and counted."""
    spikes: SpikeConfig | None = None
    """What happens at a step whose loss or gradient leaps; absent: it is trained on like any other."""
    stall_seconds: PositiveFloat | None = 600.0
    """With several devices: end the run (exit 4), the rank and its place named, when no rank takes a forward
    pass for so long; absent: wait as long as the engine's messages do, half an hour."""
    load_nonfinite: bool = False
    """Load a checkpoint that holds NaN or infinity as it is; else it is refused and its tensors are named."""

    @property
    def micro_rows(self) -> int | None:
        """micro_batch where the page has a number."""
        return None if self.micro_batch == "auto" else self.micro_batch
