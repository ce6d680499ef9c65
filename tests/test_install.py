"""scripts/install.sh: what is missing is named with its cure; the source of torch is the one asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_TORCH = 'case "$*" in *"import torch"*) exit 1;; esac'
TOOLS = ("sh", "sed", "cat", "env")


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A PATH with a few tools, apt-get, and neither a compiler nor a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    script(folder / "apt-get", "exit 0")
    return folder


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def install(bin_dir: Path, python: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "scripts/install.sh"],
        cwd=ROOT,
        env={"PATH": str(bin_dir), "PYTHON": str(python), "VENV": str(bin_dir.parent / "venv"), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_missing_venv_module_is_named(bin_dir: Path, tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'case "$*" in *"import venv"*) exit 1;; esac')
    done = install(bin_dir, python)
    assert done.returncode == 1
    assert "venv module is missing" in done.stderr and "apt-get install -y python3-venv" in done.stderr


def test_an_old_python_is_named(bin_dir: Path, tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.1;; esac')
    done = install(bin_dir, python)
    assert done.returncode == 1 and "Python 3.9.1" in done.stderr and "PYTHON=" in done.stderr


def test_a_missing_compiler_is_named_and_the_cpu_build_is_tried_first(bin_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script(
        tmp_path / "venv" / "bin" / "python",
        f'echo "$@" >> {log}\ncase "$*" in *"import torch"*) exit 1;; esac',
    )
    done = install(bin_dir, script(tmp_path / "python", "exit 0"))
    assert done.returncode == 0, done.stderr
    assert "No C compiler" in done.stdout and "apt-get install -y build-essential" in done.stdout
    asked = [line for line in log.read_text().splitlines() if "torch==" in line]
    assert len(asked) == 1 and asked[0].endswith("+cpu")


def test_the_index_of_torch_is_honoured(bin_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script(
        tmp_path / "venv" / "bin" / "python",
        f'echo "$@" >> {log}\ncase "$*" in *"import torch"*) exit 1;; esac',
    )
    done = install(bin_dir, script(tmp_path / "python", "exit 0"), TORCH_INDEX_URL="file:///wheels")
    assert done.returncode == 0, done.stderr
    (asked,) = (line for line in log.read_text().splitlines() if "torch==" in line)
    assert "--index-url file:///wheels" in asked and not asked.endswith("+cpu")
    assert os.path.basename(asked.split()[-1]).startswith("torch==2.")
