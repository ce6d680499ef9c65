"""`launch slurm --multirun`: an array with a job for each arm, submitted through submitit (extra `slurm`).

submitit keeps what it calls as pickles in the multirun's own folder and reads them back on the nodes. A turn
of an arm is `ssmtrain fit`, a process of its own with its own signals and exit code, as in a single job.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config.arms import Arm, plan
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.launch import job
from ssmtrain.launch.slurm import LOOK, refusal

if TYPE_CHECKING:
    from ssmtrain.config.request import Request
    from ssmtrain.config.schema import RunConfig

ITSELF = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
"""An arm as scontrol takes it; the number of one of the arms' jobs is that of the whole array."""


def submit_arms(request: Request) -> int:
    """Submit every arm of a `launch slurm … --multirun` line as one array; --dry-run prints its script."""
    arms = plan(request.overrides)
    configs = [job.for_the_job(arm.config) for arm in arms]
    _alike(configs)
    slurm = _submitit()
    first, lines = configs[0], [f"{job.program(config)} {job.fit_words(config)}" for config in configs]
    # Beside the arms' folders.
    place = job.run_folder(first).parent / job.FOLDER
    asked = parameters(first, arms[0].name.partition("/")[0], len(arms))
    if request.flags.get("dry-run"):
        python = _python(first)
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(place))}"
        print(slurm._make_sbatch_string(command=command, folder=place, map_count=len(arms), **asked))
        print("\n".join(f"# {number}: {line}" for number, line in enumerate(lines)))
        return FINISHED
    number = _submit(slurm, place, asked, configs, lines)
    if request.as_json:
        print(json.dumps({"job": number, "arms": [arm.name for arm in arms], "logs": str(place)}))
        return FINISHED
    print("\n".join(told(number, arms, place)))
    return FINISHED


def _submitit() -> Any:
    try:
        from submitit.slurm import slurm
    except ImportError:
        raise UserError("--multirun submits through submitit: pip install 'ssmtrain[slurm]'") from None
    return slurm


def _alike(configs: list[RunConfig]) -> None:
    """The jobs of an array all ask for the same."""
    first = configs[0]
    for config in configs:
        if config.launch != first.launch:
            raise UserError("launch.…: the jobs of an array are alike; submit these arms one by one")
    if first.launch.time is None:
        raise UserError("launch.time: an array needs a time limit, as in launch.time=12:00:00")


def parameters(config: RunConfig, name: str, arms: int) -> dict[str, Any]:
    """What submitit is asked for: the options of a single job, under a name for all arms."""
    wanted = {**job.options(config), **job.extra(config)}
    return {
        "job_name": name,
        "array_parallelism": config.launch.arms or arms,
        "setup": job.setup(config),
        # Not in `turn`: a signal may end the process before it gets there.
        "teardown": job.ending(config, ITSELF).splitlines(),
        "srun_args": job.srun_options(config),
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {key: True if value is None else value for key, value in wanted.items()},
    }


def _python(config: RunConfig) -> str:
    """The interpreter that submitit runs in: within pyxis, the image's."""
    container = config.launch.container
    return "python" if container is not None and container.kind == "pyxis" else shlex.quote(sys.executable)


def _submit(
    slurm: Any, place: Path, asked: dict[str, Any], configs: list[RunConfig], lines: list[str]
) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    for config in configs:
        job.write(config)
    try:
        executor = slurm.SlurmExecutor(folder=place, python=_python(configs[0]))
        executor.update_parameters(**asked)
        found = executor.map_array(turn, lines)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(*refusal(str(error))) from None
    except RuntimeError as error:  # submitit's word for a machine without srun
        raise UserError(f"{error} Submit from a login node of the cluster", LOOK) from None
    return str(found[0].job_id).partition("_")[0]


def told(number: str, arms: list[Arm], place: Path) -> list[str]:
    """What the user sees of a submitted array."""
    return [
        f"job {number} submitted: an array of {len(arms)}",
        *(f"  {number}_{index}  {arm.name}" for index, arm in enumerate(arms)),
        f"  follow   tail -F {shlex.quote(str(place))}/{number}_*_0_log.out",
        f"  queue    squeue -j {number}",
        f"  cancel   scancel {number}",
    ]


def turn(line: str) -> None:
    """One turn of an arm on the cluster: run `line` (shell), hand it the signals, end with its exit code."""
    child = subprocess.Popen(["bash", "-c", f"exec {line}"])
    # In the place of submitit's, which would requeue without waiting for the save.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    code = child.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)
