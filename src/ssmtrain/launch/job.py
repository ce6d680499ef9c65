"""A Slurm job as a readable batch script: what it asks for, the set-up, one srun, and what its code means."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from ssmtrain.config.checks import uneven
from ssmtrain.config.errors import UNFINISHED, UserError
from ssmtrain.config.identity import differences, may_change
from ssmtrain.config.load import load_run_config, to_yaml
from ssmtrain.config.schema import RunConfig

FOLDER = "launch"
"""Where, in a run's folder, the script, the page it runs and its logs are."""

EARLY = 128 + signal.SIGUSR1
"""What srun says of a process that SIGUSR1 ended; none of the signals with which Slurm ends jobs."""

SCRIPT = """\
#!/bin/bash
# {what}. Written by `ssmtrain launch slurm`; once more: sbatch {script}
{options}

{setup}srun {srun}
{ending}"""

ENDING = """\
code=$?

# {unfinished}: saved and not finished, before the time limit or when the job is to make room for another.
# {early}: the signal came before ssmtrain could hear it, and nothing is lost.
if [ "$code" -eq {early} ]; then code={unfinished}; fi
if [ "$code" -eq {unfinished} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  echo "ssmtrain: saved; back to the queue"
  scontrol requeue "{job}"
fi
exit "$code"
"""


def run_folder(config: RunConfig) -> Path:
    """The folder of the config's run, absolute; nothing is made."""
    assert config.name is not None
    return Path(os.path.abspath(config.runs_dir)) / config.name


def processes(config: RunConfig) -> int:
    """Processes on each node."""
    return config.launch.processes_per_node or max(config.launch.gpus_per_node, 1)


def for_the_job(config: RunConfig) -> RunConfig:
    """The config as it runs there, with the devices that the job has; UserError for what does not fit it."""
    wrong = [*_problems(config), *_spread(config)]
    if wrong:
        raise UserError(*wrong)
    _same_run(config)
    accelerator = "gpu" if config.launch.gpus_per_node else "cpu"
    trainer = config.trainer.model_copy(update={"accelerator": accelerator})
    return config.model_copy(update={"trainer": trainer})


def _problems(config: RunConfig) -> Iterator[str]:
    launch, trainer = config.launch, config.trainer
    gpus = launch.gpus_per_node
    if gpus and launch.processes_per_node not in (None, gpus):
        yield (
            f"launch.processes_per_node = {launch.processes_per_node}: a process has one GPU, and "
            f"launch.gpus_per_node = {gpus}; leave it out, or set launch.gpus_per_node=0 for a job on CPUs"
        )
    if launch.gpu_type and not gpus:
        yield f"launch.gpu_type = {launch.gpu_type}: no effect with launch.gpus_per_node=0; leave it out"
    if trainer.accelerator == ("cpu" if gpus else "gpu"):
        take = "launch.gpus_per_node=0" if gpus else "launch.gpus_per_node=1, or more"
        yield f"trainer.accelerator = {trainer.accelerator}: launch.gpus_per_node is {gpus}; set {take}"
    limit = _seconds(launch.time or "0")
    if 0 < limit <= launch.grace:
        yield (
            f"launch.time = {launch.time}: {limit} seconds, and launch.grace = {launch.grace} of them are "
            "for saving: each turn would save as it begins; give launch.time more or launch.grace less"
        )
    if config.resume != "auto" and launch.requeues:
        yield (
            f"resume = {config.resume}: a job that is put back in the queue must find where it stopped; set "
            "resume=auto, or launch.requeues=0"
        )


def _seconds(time: str) -> int:
    """A time limit as Slurm reads it, in seconds: minutes[:seconds], h:m:s, d-h[:m[:s]]; 0: none."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _spread(config: RunConfig) -> Iterator[str]:
    """Settings that do not go with as many processes."""
    trainer, each = config.trainer, processes(config)
    world = each * config.launch.nodes
    if trainer.devices not in (None, each):
        yield f"trainer.devices = {trainer.devices}: the job has {each} processes on each node; leave it out"
    yield from (line for line, *_ in uneven(config, world))
    if trainer.cuda_graphs and (world > 1 or not config.launch.gpus_per_node):
        yield "trainer.cuda_graphs: it takes one GPU; set trainer.cuda_graphs=false"


def _same_run(config: RunConfig) -> None:
    """Say now, not after hours in the queue, that the folder holds a run of another config."""
    folder = run_folder(config)
    if not any(folder.glob("checkpoints/step-*")) or not (folder / "config.yaml").is_file():
        return
    changed = differences(load_run_config(folder), config)
    wrong = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items() if not may_change(key)]
    if wrong:
        raise UserError(
            f"run {config.name} was started with another config:",
            *wrong[:2],
            f"start another run with name=…, or continue this one with config={folder / 'config.yaml'}",
        )


def options(config: RunConfig) -> dict[str, str | None]:
    """sbatch's long options and their values (None: it takes none), without those of the log."""
    launch = config.launch
    gpus = f"{launch.gpu_type}:{launch.gpus_per_node}" if launch.gpu_type else str(launch.gpus_per_node)
    asked = {
        "chdir": str(Path.cwd()),
        "nodes": str(launch.nodes),
        "ntasks-per-node": str(processes(config)),
        "gpus-per-node": gpus if launch.gpus_per_node else None,
        "cpus-per-task": str(launch.cpus_per_task) if launch.cpus_per_task else None,
        "mem": launch.memory,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "open-mode": "append",
        # To the processes of srun, not to the script.
        "signal": f"USR1@{launch.grace}",
    }
    found: dict[str, str | None] = {key: value for key, value in asked.items() if value is not None}
    found["requeue" if launch.requeues else "no-requeue"] = None
    return found


def extra(config: RunConfig) -> dict[str, str | None]:
    """The options of launch.extra, which stand after the others and replace them."""
    pairs = (option.removeprefix("--").partition("=") for option in config.launch.extra)
    return {key: value if equals else None for key, equals, value in pairs}


def srun_options(config: RunConfig) -> list[str]:
    """The options of srun: one process that fails ends the others, in the container if there is one."""
    launch, found = config.launch, ["--kill-on-bad-exit=1"]
    if launch.cpus_per_task:
        found.append(f"--cpus-per-task={launch.cpus_per_task}")  # srun no longer takes the job's
    if launch.container is not None and launch.container.kind == "pyxis":
        found += [f"--container-image={launch.container.image}", f"--container-workdir={Path.cwd()}"]
        found.append(f"--container-mounts={','.join(_mounts(config))}")
    return found


def program(config: RunConfig) -> str:
    """What srun runs, as shell text: `ssmtrain` there, in the container if there is one."""
    launch = config.launch
    default = f"{shlex.quote(sys.executable)} -m ssmtrain" if launch.container is None else "ssmtrain"
    called = launch.program or default
    if launch.container is None or launch.container.kind == "pyxis":
        return called
    words = ["apptainer", "exec", *(["--nv"] if launch.gpus_per_node else []), "--pwd", str(Path.cwd())]
    return f"{shlex.join([*words, '--bind', ','.join(_mounts(config)), launch.container.image])} {called}"


def _mounts(config: RunConfig) -> list[str]:
    assert config.launch.container is not None
    seen = [str(Path.cwd()), os.path.abspath(config.runs_dir)]
    own = [path for i, path in enumerate(seen) if not any(Path(path).is_relative_to(p) for p in seen[:i])]
    return [*(f"{path}:{path}" for path in own), *config.launch.container.mounts]


def script(config: RunConfig) -> str:
    """The batch script of one run."""
    place = run_folder(config) / FOLDER
    asked = {"job-name": config.name or "", **options(config)}
    asked["output"] = str(place).replace("%", "%%") + "/%j.log"
    # One at a time in a run's folder: a second job of this name starts when the first has ended.
    asked["dependency"] = "singleton"
    asked |= extra(config)
    lines = [f"#SBATCH --{key}" + (f"={_directive(value)}" if value else "") for key, value in asked.items()]
    return SCRIPT.format(
        what=describe(config),
        script=shlex.quote(str(place / "job.sh")),
        options="\n".join(lines),
        setup="".join(f"{line}\n" for line in setup(config)),
        srun=" \\\n  ".join(
            [*map(shlex.quote, srun_options(config)), f"{program(config)} {fit_words(config)}"]
        ),
        ending=ending(config),
    )


def ending(config: RunConfig, job: str = "$SLURM_JOB_ID") -> str:
    """The lines after srun: what its code means, and another turn of `job` when its run has saved."""
    return ENDING.format(unfinished=UNFINISHED, early=EARLY, requeues=config.launch.requeues, job=job)


def setup(config: RunConfig) -> list[str]:
    """The lines before srun; one that fails ends the job."""
    return ["set -e", *config.launch.setup, "set +e", ""] if config.launch.setup else []


def fit_words(config: RunConfig) -> str:
    """The verb and the page that the job runs, as shell text."""
    return f"fit config={shlex.quote(str(run_folder(config) / FOLDER / 'config.yaml'))}"


def _directive(value: str) -> str:
    """A value as sbatch reads it in a script: its own quotes, not the shell's."""
    if re.fullmatch(r"[^\s\"'\\#]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def describe(config: RunConfig) -> str:
    """The job in words: "mine: 4 nodes with 8 GPUs each"."""
    launch, each = config.launch, processes(config)
    nodes = f"{launch.nodes} node{'s' if launch.nodes > 1 else ''}"
    what = f"{'GPU' if launch.gpus_per_node else 'process'}"
    many = ("s" if launch.gpus_per_node else "es") if each > 1 else ""
    return f"{config.name}: {nodes} with {each} {what}{many}{' each' if launch.nodes > 1 else ''}"


def write(config: RunConfig) -> Path:
    """Write the page that the job runs, a whole config that no later edit of a recipe changes; its folder."""
    place = run_folder(config) / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write in {place}: {error.strerror or error}", "set runs_dir=…") from None
    return place
