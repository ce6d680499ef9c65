"""Shell completion: what the query answers, and the bash script around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ssmtrain.cli import main
from ssmtrain.config.completion import BASH, candidates

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
    assert candidates("ssmtrain runs show o") == ["one"]
    assert candidates("ssmtrain runs diff one ") == ["runs_dir=", "sweep/arm"]
    assert candidates("ssmtrain report runs_dir=runs s") == ["sweep/arm"]
    assert candidates("ssmtrain runs rm runs_dir=elsewhere s") == []


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


def test_scripts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert "complete -o default -F _ssmtrain ssmtrain" in capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    assert "compdef _ssmtrain ssmtrain" in capsys.readouterr().out
    assert main(["completion", "query", "ssmtrain fit optim="]) == 0
    assert capsys.readouterr().out.split() == ["optim=adamw", "optim=muon"]
