"""The quickstart in a shortened form, through the real command line: train, continue, read, write, score."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = [
    "config=quickstart",
    "name=small",
    "model.d_model=32",
    "model.layout=M2A",
    "model.blocks.M.mixer.head_dim=16",
    "model.blocks.A.mixer.n_heads=2",
    "trainer.log_every=2",
    "generate.max_tokens=24",
]


def ssmtrain(folder: Path, *words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "ssmtrain", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_quickstart_from_first_step_to_last_word(tmp_path: Path) -> None:
    first = ssmtrain(tmp_path, "fit", *SMALL, "trainer.max_steps=12")
    for words in (
        "bits per byte",
        "gzip",
        "xz",
        "bz2",
        "Sample:",
        "loss.png",
        "ssmtrain generate",
        "data=text",
    ):
        assert words in first
    run = tmp_path / "runs" / "small"
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 12
    # Twelve tiny steps learn little, but less than eight bits a byte.
    assert 2.0 < report["val_bpb"] < 7.5
    assert (run / "loss.png").stat().st_size > 1000

    score = json.loads(ssmtrain(tmp_path, "eval", "run=small", "--json"))
    assert abs(score["bits_per_byte"] - report["val_bpb"]) < 1e-4
    said = json.loads(ssmtrain(tmp_path, "generate", "run=small", "--prompt", "It is a truth", "--json"))
    again = json.loads(ssmtrain(tmp_path, "generate", "run=small", "--prompt", "It is a truth", "--json"))
    assert said["text"] == again["text"] and said["checkpoint"] == "step-00000012"
