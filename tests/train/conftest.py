"""A tiny recipe on a tiny text, and fit in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssmtrain.checkpoint.runs import Run, resolve
from ssmtrain.config import schema
from ssmtrain.train.fit import fit

LINE = "it is a truth universally acknowledged that a single man in possession of a good fortune must be"
WORDS = LINE.split()
TEXT = "\n".join(" ".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(12)) for i in range(120))

MODEL: dict[str, Any] = {
    "d_model": 16,
    "layout": "MA",
    "blocks": {
        "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
        "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": {"kind": "mlp", "hidden": 16}},
    },
}


def page(folder: Path, **changes: Any) -> schema.RunConfig:
    """The tiny recipe: 4 rows of 32 bytes a step; `changes` are dotted keys with __ for the dots."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    tree: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "model": json.loads(json.dumps(MODEL)),
        "data": {"kind": "text", "train": str(text), "seq_len": 32, "cache_dir": str(folder / "cache")},
        "optim": {"kind": "adamw", "lr": 0.01},
        "trainer": {
            "max_steps": 8,
            "global_batch": 128,
            "log_every": 2,
            "val_every": 3,
            "health_every": 4,
            "save_every": 4,
        },
        "generate": {"max_tokens": 8},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return schema.RunConfig.model_validate(tree)


def run_of(config: schema.RunConfig) -> Run:
    """The run's folder, locked."""
    return resolve(config)


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Path]]:
    """Train the tiny recipe with changes in this process; returns the exit code and the run's folder."""
    monkeypatch.setenv("SSMTRAIN_LEDGER", "1")
    monkeypatch.delenv("SSMTRAIN_RUN", raising=False)

    def go(**changes: Any) -> tuple[int, Path]:
        config = page(tmp_path, **changes)
        run = run_of(config)
        try:
            return fit(config, run), run.folder
        finally:
            run.close()

    return go


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that has kept 2, 4, 6 and 8, trained once; to read only."""
    constant = {"kind": "constant", "warmup": 2}
    changes = {"trainer__save_every": 2, "trainer__keep_last": 9, "trainer__val_every": 0}
    config = page(tmp_path_factory.mktemp("trunk"), name="parent", schedule=constant, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMTRAIN_LEDGER", "1")
        run = resolve(config)
        try:
            assert fit(config, run) == 0
        finally:
            run.close()
    return run.folder


@pytest.fixture
def parent(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for a test to spoil."""
    monkeypatch.setenv("SSMTRAIN_LEDGER", "1")
    monkeypatch.delenv("SSMTRAIN_RUN", raising=False)
    monkeypatch.delenv("SSMTRAIN_ORIGIN", raising=False)
    shutil.copy(trained.parents[1] / "text.txt", tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "runs" / "parent"))


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The run's ledger."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The run's losses, every step."""
    return [float.fromhex(line["loss_hex"]) for line in ledger(folder)]


def norms(folder: Path) -> list[float]:
    """The run's gradient norms, every step."""
    return [float.fromhex(line["grad_norm_hex"]) for line in ledger(folder)]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The run's records of a kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(folder: Path, step: int, stem: str = "model") -> dict[str, torch.Tensor]:
    """A shard of one of the run's checkpoints."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{stem}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
