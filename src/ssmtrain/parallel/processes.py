"""Local ranks: started by Lightning, watched by us, so that a lost rank ends the others within seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssmtrain.config import launched
from ssmtrain.config.errors import LOST, NON_FINITE, OUT_OF_MEMORY, UNFINISHED, WRONG_INPUT
from ssmtrain.parallel.shard import gradients_kept

GRACE = 6.0
"""Seconds that the other ranks get to end by themselves, with the better message, once one is gone."""
PLANNED = (0, UNFINISHED)


def environment() -> ClusterEnvironment:
    """Where Lightning finds the ranks: torchrun or srun started them, or this process or its parent does.

    Lightning's own guess takes every process within a Slurm job for a task of srun.
    """
    return TorchElasticEnvironment() if launched.local_world() else LightningEnvironment()


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher with our observer: its own kills all ranks, the first too, without a word."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other local ranks, watch them or the parent, and run `function`."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            # A started rank sees LOCAL_RANK and says that it is created externally: this is rank 0.
            self._call_children_scripts()
            _in_background(lambda: _watch_children(self.procs))
        elif os.environ.get("SSMTRAIN_PARENT"):
            parent = int(os.environ["SSMTRAIN_PARENT"])
            _in_background(lambda: _watch_parent(parent))
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        os.environ["SSMTRAIN_PARENT"] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ["SSMTRAIN_PARENT"]


class Ddp(DDPStrategy):
    """Lightning's DDP started by our launcher; `compress` sums gradients in bf16."""

    compress = False

    def setup_environment(self) -> None:
        """Make the process group; its messages within a node leave most of a GPU to the passes."""
        if self.num_nodes == 1:
            # NCCL takes 24 of 132 multiprocessors of an H200 and waits in them for the slower rank; 8 move
            # gradients faster than a backward pass makes them.
            os.environ.setdefault("NCCL_MAX_CTAS", "8")
        super().setup_environment()

    def configure_ddp(self) -> None:
        """Wrap the model."""
        assert self.lightning_module is not None
        self._ddp_kwargs["bucket_cap_mb"] = bucket_mib(self.lightning_module.parameters())
        super().configure_ddp()
        if self.compress:
            assert isinstance(self.model, DistributedDataParallel)
            # torch reads a hook's annotations, and does not understand those that are postponed.
            self.model.register_comm_hook(None, lambda _, bucket: _in_bf16(bucket))

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def bucket_mib(parameters: Iterable[nn.Parameter]) -> int:
    """MiB of gradients that are summed in one message: a sixteenth of them, at least 25 and at most 256.

    In each message the ranks wait for the slowest, on multiprocessors that the backward pass would use: with
    97 messages of 25 MiB or more a step of 1.3 B parameters spent 123 ms in them, 0.3 ms a message without
    the waiting.
    """
    total = sum(p.nbytes for p in parameters if p.requires_grad) >> 20
    return min(256, max(25, total // 16))


def _in_bf16(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks in bf16; torch's own hook of the kind wants NCCL."""
    whole = bucket.buffer()
    halved = whole.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(halved, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: whole.copy_(done.value()[0]))


class Fsdp(Ddp):
    """The process group and the ranks of DDP, for a model that is cut over them: see `shard`."""

    def configure_ddp(self) -> None:
        """Nothing: the model brings its own gathering and summing."""

    def model_to_device(self) -> None:
        """Nothing: each part was put where it stays when the model was cut."""

    def block_backward_sync(self) -> Any:
        """Keep gradients whole until the step's last micro-batch."""
        assert self.lightning_module is not None
        model = self.lightning_module.model
        assert isinstance(model, nn.Module)
        return gradients_kept(model)

    def teardown(self) -> None:
        """As DDP's, but what is cut over the ranks stays: Lightning would move it to the host."""
        self.optimizers = []
        module, self._lightning_module = self._lightning_module, None
        try:
            super().teardown()
        finally:
            self._lightning_module = module


def children(trainer: Any) -> list[subprocess.Popen]:
    """The local ranks that this process started."""
    return list(getattr(trainer.strategy.launcher, "procs", []))


def wait_for(processes: list[subprocess.Popen], seconds: float = 30.0) -> None:
    """Wait until the other local ranks have ended, and end those that have not by then."""
    limit = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _in_background(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True, name="ssmtrain-ranks").start()


def _watch_children(processes: list[subprocess.Popen]) -> None:
    """End this process and all ranks when one has failed and the rest did not notice by themselves."""
    while True:
        time.sleep(0.5)
        codes = [process.poll() for process in processes]
        failed = [(i, code) for i, code in enumerate(codes) if code is not None and code not in PLANNED]
        if failed:
            break
        if all(code is not None for code in codes):
            return
    time.sleep(GRACE)
    rank, code = failed[0][0] + 1, failed[0][1]
    known = code in (WRONG_INPUT, NON_FINITE, OUT_OF_MEMORY)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    _say(f"rank {rank} (process {processes[rank - 1].pid}) ended with {how}: stopping the others")
    for process in processes:
        with contextlib.suppress(OSError):
            process.kill()
    os._exit(code if known else LOST)


def _watch_parent(parent: int) -> None:
    """End this rank when rank 0 is gone and this rank, perhaps waiting for it on a GPU, did not notice."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    os._exit(LOST)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"ssmtrain: {text}\n".encode())
