"""A folder with a tiny recipe, from which jobs are launched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ssmtrain.config import launched

TEXT = "it was the house of a lady and she said to him that there is no other"

PAGE = """\
model:
  d_model: 16
  layout: MA
  blocks:
    M: {mixer: {kind: mamba2, d_state: 8, head_dim: 8}}
    A: {mixer: {kind: attention, n_heads: 2}, ffn: {kind: mlp, hidden: 16}}
data: {kind: text, train: text.txt, seq_len: 32, cache_dir: cache}
trainer: {max_steps: 8, global_batch: 128, val_every: 0, health_every: 0, threads: 1}
generate: {max_tokens: 4}
launch: {gpus_per_node: 0, processes_per_node: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: page.yaml and a few KB of text."""
    draw = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(TEXT.split()) for _ in range(2000)))
    (tmp_path / "page.yaml").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    for name in (*launched.NAMES, "SSMTRAIN_RUN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
