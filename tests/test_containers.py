"""Images and manifests as far as text tells: what is copied exists and is enough, what is run is legal."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssmtrain.cli import main
from ssmtrain.config.load import load

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GUIDE = (ROOT / "docs" / "cluster.md").read_text()


def instructions(file: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of each line, comments left out and continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def blocks(language: str) -> list[str]:
    """The guide's code blocks of a language, or ("") of none."""
    return [
        text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.M | re.S) if name == language
    ]


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [file.name for file in FILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied(file: Path) -> None:
    copied = [word for name, rest in instructions(file) if name == "COPY" for word in rest.split()[:-1]]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied and all((ROOT / path).exists() for path in copied)
    assert all(any(fnmatch.fnmatch(path, line) for line in sent) for path in copied)
    project, build = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = ["pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]]
    needed += [path.split("/")[0] for path in (*build["packages"], *build["force-include"])]
    assert set(needed) <= set(copied)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_run(file: Path) -> None:
    found = dict(instructions(file))
    (program,) = json.loads(found["ENTRYPOINT"])
    verb, *words = json.loads(found["CMD"])
    assert program in PROJECT["project"]["scripts"] and verb == "fit"
    assert load(words, training=True).recipe == "quickstart"
    install = next(rest for name, rest in instructions(file) if name == "RUN" and ".[" in rest)
    extras = install.partition(".[")[2].partition("]")[0].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    # The version of torch is read from the constraints, and there is one.
    assert any(line.startswith("torch==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert "sed -n 's/^torch==//p' constraints.txt" in file.read_text()


def containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [one for item in value for one in containers(item)]
    if not isinstance(value, dict):
        return []
    return value.get("containers", []) + [one for inner in value.values() for one in containers(inner)]


def test_the_manifests_run_legal_lines() -> None:
    pages = [page for block in blocks("yaml") for page in yaml.safe_load_all(block)]
    jobs = [page for page in pages if page.get("kind") == "Job"]
    assert len(jobs) == 2
    for one in (one for job in jobs for one in containers(job["spec"])):
        words = one["args"]
        if one.get("command") == ["torchrun"]:
            at = words.index("--no-python")
            assert words[at + 1] == "ssmtrain" and "--nproc-per-node=8" in words
            words = words[at + 2 :]
        config = load(words[1:], training=True)
        rows = config.trainer.global_batch // config.data.seq_len
        ranks = 8 * job_nodes(jobs, one)
        assert words[0] == "fit" and rows % (ranks * (config.trainer.micro_batch or 1)) == 0
        mounts = {mount["mountPath"] for mount in one["volumeMounts"]}
        assert config.runs_dir in mounts and one["resources"]["limits"]["nvidia.com/gpu"] == 8


def job_nodes(jobs: list[dict[str, Any]], container: dict[str, Any]) -> int:
    job = next(job for job in jobs if container in containers(job["spec"]))
    return int(job["spec"].get("completions", 1))


def test_the_guides_lines_are_legal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for block in blocks("") for line in block.replace("\\\n", "").splitlines()]
    launches = [shlex.split(line)[1:] for line in lines if line.startswith("ssmtrain launch")]
    assert len(launches) == 2
    (tmp_path / "configs" / "launch").mkdir(parents=True)
    own = next(block for block in blocks("yaml") if "kind: slurm" in block)
    (tmp_path / "configs" / "launch" / "mine.yaml").write_text(own)
    monkeypatch.chdir(tmp_path)
    words = ["config=quickstart", "launch=mine", "trainer.global_batch=8192"]
    for line in [*launches, ["launch", "slurm", *words]]:
        assert main([*line, "--dry-run"]) == 0, capsys.readouterr().err
    script = capsys.readouterr().out
    assert "#SBATCH --account=llm" in script and "#SBATCH --reservation=night" in script
    torchrun = next(line for line in lines if line.startswith("torchrun"))
    fit = shlex.split(torchrun[torchrun.index("ssmtrain") :])
    assert fit[1] == "fit" and load(fit[2:], training=True).recipe == "granite_9to1"
