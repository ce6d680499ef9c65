"""`ssmtrain launch slurm`: write the job's script into the run's folder, submit it, say how to follow it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.launch import job

if TYPE_CHECKING:
    from ssmtrain.config.request import Request
    from ssmtrain.config.schema import RunConfig

NO_CLUSTER = "this machine knows of no Slurm cluster: submit from a login node of one"

HINTS = {
    "controller": "`scontrol ping` asks whether the cluster's controller is up",
    "configuration file": NO_CLUSTER,
    "fetch_config": NO_CLUSTER,
    "partition": "`sinfo -s` lists the partitions; set launch.partition=…",
    "account": "`sacctmgr show assoc user=$USER format=account,qos` lists yours; set launch.account=…",
    "qos": "`sacctmgr show assoc user=$USER format=account,qos` lists yours; set launch.qos=…",
    "time": "`sinfo -o '%P %l'` lists the partitions' time limits; set launch.time=…",
    "feature": "`sinfo -o '%P %f'` lists the features; set launch.constraint=…",
    "node": "`sinfo -o '%P %D %c %m %G'` lists what nodes have; change launch.nodes, gpus_per_node, memory",
}
"""What to type next, by a word of sbatch's complaint; the first that is in it."""

LOOK = "the same line with --dry-run prints the script and submits nothing"


def command(request: Request) -> int:
    """Submit one run, or with --multirun an array of them; --dry-run prints the script instead."""
    if request.flags.get("multirun"):
        from ssmtrain.launch.array import submit_arms

        return submit_arms(request)
    assert request.config is not None
    config = job.for_the_job(request.config)
    text = job.script(config)
    if request.flags.get("dry-run"):
        print(text, end="")
        return FINISHED
    place = job.write(config)
    script = place / "job.sh"
    script.write_text(text, encoding="utf-8")
    number = submit(script)
    log = place / f"{number}.log"
    if request.as_json:
        print(json.dumps({"job": number, "run": config.name, "script": str(script), "log": str(log)}))
        return FINISHED
    print("\n".join(told(config, number, script, log)))
    return FINISHED


def submit(script: Path) -> str:
    """Hand a script to sbatch and return the job's number; UserError with sbatch's words and what to do."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "sbatch is not installed here: submit from a login node of the cluster", LOOK
        ) from None
    if done.returncode:
        raise UserError(*refusal(done.stderr, done.returncode), f"the script: {script}")
    return done.stdout.strip().partition(";")[0]


def refusal(said: str, code: int = 1) -> list[str]:
    """Why sbatch refused, in its words, and the next command."""
    lines = [re.sub(r"^sbatch: (error|fatal): ", "", line) for line in said.splitlines() if line.strip()]
    why = "; ".join(lines[:2]) or f"exit code {code}"
    hint = next((hint for word, hint in HINTS.items() if word in why.lower()), LOOK)
    return [f"sbatch refused the job: {why}", hint]


def told(config: RunConfig, number: str, script: Path, log: Path) -> list[str]:
    """What the user sees of a submitted job, with commands to follow, stop and cancel it."""
    partition = f", partition {config.launch.partition}" if config.launch.partition else ""
    return [
        f"job {number} submitted: {job.describe(config)}{partition}",
        f"  follow           tail -F {shlex.quote(str(log))}",
        f"  queue            squeue -j {number}",
        f"  save and requeue scancel --signal=USR1 {number}",
        f"  cancel           scancel {number}",
        f"  script           {script}",
    ]
