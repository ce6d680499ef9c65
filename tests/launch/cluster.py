"""A Slurm of its own on this machine: munge, controller and one node on loopback, all in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SYSTEM = "/usr/sbin:/usr/local/sbin:/sbin"

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as its credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
FirstJobId={first}
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 State=UP
"""


class Missing(Exception):
    """Slurm cannot run here; the text says what to do."""


@dataclass
class Cluster:
    """A running controller and node; `environment` is what its commands need."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def call(self, *line: str) -> str:
        """What a command of Slurm prints; AssertionError when it fails."""
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        words = self.call("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, number: str, until: Callable[[dict[str, str]], bool], seconds: float = 120
    ) -> dict[str, str]:
        """Wait until a job is as wanted, and return what scontrol says of it then."""
        limit = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < limit, f"{job}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{file}:\n{file.read_text()[-3000:]}" for file in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End the jobs, the daemons, and what they left in the folder."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
            self.call("scancel", "--user", getpass.getuser())
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start() -> Cluster:
    """Start munge, slurmctld and slurmd; Missing when they are not installed."""
    path = f"{os.environ.get('PATH', '')}:{SYSTEM}"
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        raise Missing(f"no {', '.join(absent)} here: apt-get install slurm-wlm munge")
    # Not pytest's folder: a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(
        CONF.format(
            host=host,
            ports=_free_ports(2),
            user=getpass.getuser(),
            folder=folder,
            first=secrets.randbelow(50000) + 1,
        )
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    environment |= {"PATH": path, "SLURM_CONF": str(conf)}
    cluster = Cluster(folder, environment)
    try:
        _munge(cluster)
        for line in (["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf), "-N", host]):
            _daemon(cluster, line)
        _until(cluster, lambda: "idle" in cluster.call("sinfo", "-h", "-o", "%t"))
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _munge(cluster: Cluster) -> None:
    key, at = cluster.folder / "munge.key", cluster.folder / "munge"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = [f"--{what}-file={at}.{what}" for what in ("key", "pid", "log", "seed")]
    _daemon(cluster, ["munged", "--foreground", "--force", f"--socket={at}.socket", *files])
    _until(cluster, (cluster.folder / "munge.socket").exists)


def _daemon(cluster: Cluster, line: list[str]) -> None:
    with (cluster.folder / f"{line[0]}.out.log").open("w") as log:
        cluster.daemons.append(
            subprocess.Popen(
                line, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=cluster.folder,
            )
        )  # fmt: skip


def _until(cluster: Cluster, ready: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while True:
        ended = [daemon.args for daemon in cluster.daemons if daemon.poll() is not None]
        assert not ended, f"{ended} ended\n{cluster.logs()}"
        with contextlib.suppress(AssertionError):
            if ready():
                return
        assert time.monotonic() < limit, cluster.logs()
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
