"""Shell completion: what the query answers, and the bash script around it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ssmtrain.cli import main
from ssmtrain.config.completion import about, candidates
from ssmtrain.config.shells import BASH, ZSH
from ssmtrain.verbs import VERBS

CASES = [
    ("ssmtrain ", ["fit", "doctor", "config"]),
    ("ssmtrain f", ["fit"]),
    ("ssmtrain config ", ["show", "list", "diff", "schema"]),
    ("ssmtrain check r", ["resume"]),
    ("ssmtrain fit ", ["config=", "optim=", "optim.", "trainer.", "seed="]),
    ("ssmtrain fit con", ["config="]),
    ("ssmtrain fit config=granite_9to1 con", []),
    ("ssmtrain fit config=quick", ["config=quickstart"]),
    ("ssmtrain generate ", ["run=", "config="]),
    ("ssmtrain fit config=quickstart optim.l", ["optim.lr="]),
    ("ssmtrain fit fr", ["from="]),
    ("ssmtrain fit ", ["from=", "init="]),
    ("ssmtrain eval run=first w", ["weights="]),
    ("ssmtrain average ", ["out=", "run=", "last=", "weights="]),
    ("ssmtrain convert run=first o", ["out="]),
    ("ssmtrain convert r", ["run="]),
    ("ssmtrain convert run=first r", []),
    ("ssmtrain fit optim=m", ["optim=muon"]),
    ("ssmtrain fit optim.kind=", ["optim.kind=adamw", "optim.kind=muon"]),
    ("ssmtrain fit trainer.precision=b", ["trainer.precision=bf16"]),
    ("ssmtrain fit trainer.compile=", ["trainer.compile=false", "trainer.compile=true"]),
    ("ssmtrain fit config=quickstart model.bl", ["model.blocks."]),
    ("ssmtrain fit config=granite_9to1 model.blocks.", ["model.blocks.A.", "model.blocks.M."]),
    ("ssmtrain fit config=granite_9to1 model.blocks.M.", ["model.blocks.M.mixer."]),
    ("ssmtrain fit config=granite_9to1 model.blocks.M.mixer.d_s", ["model.blocks.M.mixer.d_state="]),
    ("ssmtrain fit config=granite_9to1 model.blocks.A.mixer.d_s", []),
    (
        "ssmtrain fit config=granite_9to1 model.blocks.A.mixer.position=",
        ["model.blocks.A.mixer.position=rope"],
    ),
    ("ssmtrain fit --m", ["--multirun"]),
    ("ssmtrain generate --", ["--prompt", "--json", "--help"]),
    ("ssmtrain help mam", ["mamba1", "mamba2"]),
    ("ssmtrain help optim.l", ["optim.lr"]),
    ("ssmtrain completion ", ["bash", "zsh"]),
    ("ssmtrain config diff qui", ["quickstart"]),
    ("ssmtrain runs ", ["ls", "show", "diff", "tail", "rm"]),
    ("ssmtrain runs ls so", ["sort="]),
    ("ssmtrain runs rm --y", ["--yes"]),
    ("ssmtrain nonsense ", []),
    ("ssmtrain data ", ["show"]),
    ("ssmtrain data show run=first s", ["step="]),
    ("ssmtrain replay ", ["run=", "step="]),
    ("ssmtrain doctor op", []),
    ("ssmtrain eval run=first weights=", ["weights=ema"]),
    ("ssmtrain eval run=first --split ", ["train", "val"]),
    ("ssmtrain fit config=quickstart trainer.max_steps=", ["trainer.max_steps=600"]),
    ("ssmtrain fit trainer.val_every=", ["trainer.val_every=200"]),
    ("ssmtrain fit trainer.profile=", ["trainer.profile=10:15"]),
    ("ssmtrain fit config=quickstart parallel=fsdp parallel.u", ["parallel.unit="]),
    ("ssmtrain fit config=quickstart parallel=ddp parallel.u", []),
    ("ssmtrain fit config=quickstart logger.kind=wandb logger.m", ["logger.mode="]),
    ("ssmtrain fit config=quickstart data=text data.na", []),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_candidates(line: str, expected: list[str]) -> None:
    found = candidates(line)
    assert set(expected) <= set(found)
    current = "" if line.endswith(" ") else line.split()[-1]
    assert all(word.startswith(current) for word in found)
    if not expected:
        assert found == []


def test_convert_takes_no_keys() -> None:
    assert candidates("ssmtrain convert run=first o") == ["out="]


def test_runs_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "sweep/arm"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert candidates("ssmtrain eval run=") == ["run=one", "run=sweep/arm"]
    for step in (50, 100):
        (tmp_path / "runs" / "one" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert candidates("ssmtrain fit from=one@") == ["from=one@step-100", "from=one@step-50"]
    (tmp_path / "runs" / "one" / "best").symlink_to("checkpoints/step-00000100")
    assert candidates("ssmtrain replay run=one@b") == ["run=one@best"]
    assert candidates("ssmtrain runs show o") == ["one"]
    assert candidates("ssmtrain runs diff one ") == ["runs_dir=", "sweep/arm"]
    assert candidates("ssmtrain report runs_dir=runs s") == ["sweep/arm"]
    assert candidates("ssmtrain runs rm runs_dir=elsewhere s") == []
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert candidates("ssmtrain eval runs_dir=elsewhere run=o") == ["run=one"]


def bash(line: str, answer: str) -> list[str]:
    """What bash would put in COMPREPLY, with a stub for the program."""
    script = (
        f"{BASH}\nssmtrain() {{ printf '%s' \"$3\" >&2; printf '{answer}'; }}\n"
        f"COMP_LINE={line!r}; COMP_POINT={len(line)}; _ssmtrain; printf '<%s>' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip("<>").split("><")


def test_the_bash_script() -> None:
    # bash itself keeps what stands before the last =, so only the rest may be offered
    assert bash("ssmtrain fit optim.kind=", "optim.kind=adamw\\noptim.kind=muon\\n") == ["adamw", "muon"]
    assert bash("ssmtrain fit op", "optim.\\noptim=\\n") == ["optim.", "optim="]
    assert bash("ssmtrain fit zzz", "") == [""]


def test_what_a_word_is() -> None:
    line = "ssmtrain fit config=quickstart trainer."
    assert about("trainer.save_every=", line) == (
        "a whole number above 0, default 200: Steps between checkpoints; one is always saved at the end."
    )
    assert about("fit", "ssmtrain f") == VERBS["fit"].summary
    assert about("show", "ssmtrain data ") == VERBS["data show"].summary
    assert about("--full", "ssmtrain replay run=a --f") == VERBS["replay"].flags["full"]
    assert about("step=", "ssmtrain replay run=a ") == "the step"
    assert about("config=quickstart", "ssmtrain fit config=q").startswith("A small hybrid on Jane Austen")
    assert about("optim=", "ssmtrain fit ").startswith("one of adamw, muon: The optimiser")
    assert about("model.", "ssmtrain fit ") == "The model."
    assert about("trainer.precision=bf16", "ssmtrain fit trainer.precision=") == ""
    assert about("anything", "ssmtrain nonsense ") == ""


class Terminal:
    """An interactive shell with the real completion; `ssmtrain` itself only says what it was called with."""

    def __init__(self, command: list[str], script: str, folder: Path) -> None:
        self.folder = folder
        program = f"{sys.executable} -m ssmtrain"
        stub = f'ssmtrain() {{ if [ "$1" = completion ]; then {program} "$@"; else echo "<$*>"; fi; }}'
        (folder / "start.sh").write_text(f"{stub}\n{script}")
        self.child, self.file = pty.fork()
        if self.child == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 300, 0, 0))
            os.chdir(folder)
            os.execvpe(command[0], command, {**os.environ, "PS1": "", "TERM": "dumb"})
        self.send(". ./start.sh; echo rea''dy\n", "ready")

    def send(self, text: str, until: str) -> str:
        """Type, and read until something is there."""
        os.write(self.file, text.encode())
        said, limit = "", time.monotonic() + 60
        while until not in said and time.monotonic() < limit:
            if select.select([self.file], [], [], 0.1)[0]:
                said += os.read(self.file, 65536).decode(errors="replace")
        assert until in said, said
        return said

    def tab(self, line: str, called: str) -> None:
        """Type a line that has one completion, TAB and Enter: the program must be called so."""
        os.write(self.file, f"{line}\t".encode())
        self.send("\n", f"<{called}>")

    def close(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        os.close(self.file)


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], BASH),
    "zsh": (["zsh", "-f", "-i"], f"PROMPT=; autoload -Uz compinit; compinit -u -D\n{ZSH}"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_in_a_real_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000050").mkdir(parents=True)
    terminal = Terminal(*SHELLS[shell], tmp_path)
    try:
        terminal.tab("ssmtrain repl", "replay")
        terminal.tab("ssmtrain eval run=mi", "eval run=mine")
        terminal.tab("ssmtrain replay run=mine@st", "replay run=mine@step-50")
        terminal.tab("ssmtrain fit trainer.prec\tb", "fit trainer.precision=bf16")
        shown = terminal.send("ssmtrain fit optim.kind=\t\t\t", "muon")
        assert "adamw" in shown
    finally:
        terminal.close()


def test_scripts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert "complete -o default -F _ssmtrain ssmtrain" in capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    assert "compdef _ssmtrain ssmtrain" in capsys.readouterr().out
    assert main(["completion", "query", "ssmtrain fit optim="]) == 0
    assert capsys.readouterr().out.split() == ["optim=adamw", "optim=muon"]
