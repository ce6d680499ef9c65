"""scripts/bench_train.py on the CPU: what it counts and prints, not how fast a GPU is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_train
from ssmtrain.config.load import load
from ssmtrain.model.count import count_params

TINY = (
    *("model.n_layers=8", "model.d_model=32", "model.vocab_size=300"),
    *("model.blocks.M.ffn.hidden=32", "model.blocks.E.ffn.hidden=16"),
    *("model.blocks.A.mixer.n_heads=2", "model.blocks.A.mixer.n_kv_heads=1"),
)


@pytest.mark.parametrize("name", bench_train.CASES)
def test_recipes_are_there(name: str) -> None:
    case = bench_train.CASES[name]
    assert load([f"config={case.recipe}", *case.words]).model.d_model > 0


def test_hybrid_and_transformer_have_as_many_parameters() -> None:
    configs = [load([f"config={bench_train.HYBRID}", *words]).model for words in ((), bench_train.LLAMA)]
    hybrid, llama = (count_params(config, 256).total for config in configs)
    assert configs[1].layout == "A" and abs(hybrid / llama - 1) < 1e-3


def test_a_model_in_this_process() -> None:
    case = bench_train.Case("jamba_tiny", 1, 16, TINY)
    found = bench_train.run("tiny", case, "eager", 2, torch.device("cpu"))
    config = load(["config=jamba_tiny", *TINY])
    assert found.parameters == count_params(config.model, 300).total
    assert found.tokens_s and found.first_s and not found.note
    assert found.mfu is None and found.peak_gb is None and not found.shares  # a CPU's


def test_a_model_that_fails_is_named() -> None:
    case = bench_train.Case("jamba_tiny", 1, 16, ("model.no_such_key=1",))
    found = bench_train.apart("tiny", case, "eager", 1, "cpu", 60)
    assert found.note.startswith("FAILED") and found.tokens_s is None
    assert "FAILED" in "\n".join(bench_train.lines_of(found, case))


def test_report() -> None:
    case = bench_train.Case("mamba_130m", 16, 2048, (), "theirs", 100_000.0, 10.0, 5.0)
    found = bench_train.Result("mamba_130m", "eager", 16, 2048, 1, 150_000.0, 0.25, 12.5, 3.0, {"scan": 0.5})
    text = "\n".join(bench_train.lines_of(found, case))
    assert "150,000   25.0     12.5      3.0" in text
    assert "scan 50%" in text and "ours 1.50 times as fast" in text


@pytest.mark.parametrize(
    "kernel,kind",
    [
        ("backward", "scan"),
        ("_backward", "norms and convolutions"),
        ("nvjet_sm90_tst_192x192", "matrix products"),
        ("void at::native::CatArrayBatchedCopy", "copies and casts"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward", "softmax"),
        ("something new", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert bench_train.kind_of(kernel) == kind


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_train.parse(["mamba_13m"])
    assert "choose from mamba_130m" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_train.parse(["--modes", "fast"])
