"""The typed page of a cluster: what `ssmtrain launch slurm` asks Slurm for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[^\s\"'\\`$#-][^\s\"'\\`$#]*$", examples=["gpu"])]
"""A name of Slurm's: one word, without quotes."""
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[^\n\r]+)?$", examples=["--reservation=night"])]
_TIME = r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2})$"
Mount = Annotated[str, Field(pattern=r"^[^\n\r,:]+(:[^\n\r,:]+)*$", examples=["/data:/data"])]


class Pyxis(Config):
    """A container that srun itself starts: NVIDIA's plugin pyxis, with enroot."""

    kind: Literal["pyxis"] = "pyxis"
    image: Line
    """What srun --container-image takes: a squashfs file, or a registry's name of an image."""
    mounts: list[Mount] = []
    """Folders to see inside, as from:to; the current folder and runs_dir are always seen."""


class Apptainer(Config):
    """A container that `apptainer exec` starts in each process."""

    kind: Literal["apptainer"] = "apptainer"
    image: Line
    """The image: a .sif file, or docker://…"""
    mounts: list[Mount] = []
    """Folders to see inside, as from:to; the current folder and runs_dir are always seen."""


AnyContainer = Annotated[Pyxis | Apptainer, Field(discriminator="kind")]


class SlurmLaunch(Config):
    """A Slurm job: nodes, what a process gets, and where and how long it runs."""

    kind: Literal["slurm"] = "slurm"
    nodes: Positive = 1
    """How many nodes."""
    gpus_per_node: Count = 1
    """GPUs of each node, a process for each; 0: a job on CPUs."""
    gpu_type: Name | None = None
    """Type of the GPUs, where the cluster has several (h100)."""
    processes_per_node: Positive | None = None
    """Processes on each node; absent: one for each GPU, or one where there is none."""
    cpus_per_task: Positive | None = None
    """CPUs of each process; absent: the cluster's default."""
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$", examples=["64G"])] | None = None
    """Memory of each node, such as 64G; 0: all of it; absent: the cluster's default."""
    time: Annotated[str, Field(pattern=_TIME, examples=["12:00:00"])] | None = None
    """Time limit: minutes, or as 12:00:00 or 3-00:00:00; absent: the partition's default."""
    partition: Name | None = None
    """Partition; absent: the cluster's default."""
    account: Name | None = None
    """Account that pays."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Name | None = None
    """Features that the nodes must have (a100|h100)."""
    exclude: Name | None = None
    """Nodes not to use (node[01-03])."""
    container: AnyContainer | None = None
    """A container to run in; absent: none."""
    setup: list[Line] = []
    """Lines of shell before the run starts: modules, variables. They run as they are, on the first node."""
    program: Line | None = None
    """How ssmtrain is called there; absent: by this interpreter's path, or `ssmtrain` in a container."""
    grace: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which the run is told to save and to ask for another turn."""
    requeues: Count = 100
    """How often the job may be put back in the queue after it has saved; 0: never."""
    arms: Positive | None = None
    """With --multirun, how many arms run at a time; absent: as many as the cluster has room for."""
    extra: list[Option] = []
    """More options of sbatch, as they stand: --reservation=night."""
