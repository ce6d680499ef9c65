"""check parallel: what it runs, that it can fail, and that every strategy trains as one process does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from faults.ranks import Ranks
from ssmtrain.check import parallel
from ssmtrain.check.starts import Start
from ssmtrain.config.data import EmbeddedData
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, typed
from ssmtrain.config.parallel import Ddp, Fsdp, Zero1, Zero2, Zero3
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.sources import split_text

BLOCKS = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
    "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": {"kind": "mlp", "hidden": 32}},
    "E": {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 16}},
}
PAGE = {
    "recipe": "tiny",
    "model": {"d_model": 16, "layout": "MAE", "blocks": BLOCKS},
    "optim": {"kind": "adamw", "lr": 0.003},
    "data": {"kind": "embedded", "seq_len": 64},
    "trainer": {"max_steps": 100, "global_batch": 512, "micro_batch": 2, "threads": 1, "devices": 2},
}


@pytest.fixture(autouse=True)
def keep_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def check(
    monkeypatch: pytest.MonkeyPatch, several: float, rows: int = 1, code: int = 75, **flags: bool
) -> int:
    """Run the verb over made-up trainings whose third loss on two devices is `several`."""

    def trained(page: Path, folder: Path, fault: str) -> Start:
        config = load([f"config={page}"])
        two = config.trainer.devices == 2
        assert (config.parallel.kind, config.trainer.micro_batch) == ("fsdp" if two else "auto", 2)
        steps = int(fault.split(":")[1])
        folder.mkdir()
        with (folder / "ledger.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                loss = several if two and step == 3 else 2.0
                line = {"step": step, "loss_hex": loss.hex(), "samples": [rows if two else 1]}
                file.write(json.dumps(line) + "\n")
        return Start(folder.name, fault, code, 0, steps, "something went wrong")

    monkeypatch.setattr(parallel, "start", trained)
    config = typed({**PAGE, "parallel": {"kind": "fsdp"}})
    return parallel.command(Request("check parallel", config, None, [], flags))


def test_losses_that_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(monkeypatch, 2.0001) == 0
    said = capsys.readouterr().out
    assert "50 steps, fsdp on 2 devices" in said and "OK" in said and "5.0e-05" in said


@pytest.mark.parametrize("loss", [2.01, float("nan")])
def test_losses_that_part(
    loss: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, loss, json=True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_other_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(monkeypatch, 2.0, rows=2) == 1
    assert "rows of 50 steps" in capsys.readouterr().out


def test_a_run_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="code 2"):
        check(monkeypatch, 2.0, code=2)


def test_one_device_is_nothing_to_compare() -> None:
    page = {**PAGE, "trainer": {**PAGE["trainer"], "devices": 1}}
    with pytest.raises(UserError, match=r"trainer\.devices"):
        parallel.command(Request("check parallel", typed(page)))


def short_documents(folder: Path) -> dict:
    """Data in which a row holds several documents: a file for each few sentences of the embedded corpus."""
    words = split_text(EmbeddedData(), "train", 40_000).decode(errors="ignore").split()
    (folder / "text").mkdir()
    begin = 0
    for i in range(600):
        end = begin + 3 + 7 * i % 11
        (folder / "text" / f"{i:03d}.txt").write_text(" ".join(words[begin:end]))
        begin = end
    return {"kind": "text", "train": str(folder / "text"), "cache_dir": str(folder / "cache")}


def forked(page: Path, run: Path, fault: str) -> Start:
    """As check.starts.start, with ranks that need not import anything: a start in a quarter of the time."""
    world = load([f"config={page}"]).trainer.devices or 1
    ranks = Ranks.begin(["fit", f"config={page}"], run.with_suffix(".log"), world, {0: fault})
    code = min(ranks.wait(limit=300.0))
    return Start(run.name, fault, code, 0, 0, ranks.output)


def follow(
    config: RunConfig, folder: Path, strategies: dict[str, Any], tolerance: float, early: float
) -> None:
    """Hold the losses of each strategy on two devices against one process's, the first 20 to `early`."""
    steps = parallel.STEPS
    one = parallel.ledger(parallel.alone(config), folder, "one", steps)
    losses = [float.fromhex(line["loss_hex"]) for line in one]
    assert losses[-1] < 0.8 * losses[0]
    for name, strategy in strategies.items():
        given = config.model_copy(update={"parallel": strategy})
        several = parallel.ledger(given, folder, name, steps)
        assert [line["samples"] for line in several] == [line["samples"] for line in one]
        found = [float.fromhex(line["loss_hex"]) for line in several]
        print(name, max(abs(a / b - 1) for a, b in zip(found, losses, strict=True)))
        assert found[:20] == pytest.approx(losses[:20], rel=early), name
        assert found == pytest.approx(losses, rel=tolerance), name


FP32 = {
    "ddp": Ddp(),
    "fsdp": Fsdp(unit=1),
    "zero1": Zero1(offload_optimizer=True),
    "zero2": Zero2(),
    "zero3": Zero3(),
}
BF16 = {"ddp": Ddp(reduce="bf16"), "fsdp": Fsdp(gather="bf16", reduce="bf16", offload=True)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "precision, strategies, tolerance", [("fp32", FP32, 1e-5), ("bf16", BF16, 1e-3)], ids=["fp32", "bf16"]
)
def test_every_strategy_trains_as_one_process(
    precision: str,
    strategies: dict[str, Any],
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hybrid with experts on packed documents: 50 steps of two micro-batches on two gloo ranks, near one
    process's losses."""
    monkeypatch.setattr(parallel, "start", forked)
    trainer = {**PAGE["trainer"], "precision": precision}
    data = {**short_documents(tmp_path), "seq_len": 64}
    follow(typed({**PAGE, "data": data, "trainer": trainer}), tmp_path, strategies, tolerance, tolerance)


GPU = [("fp32", 1e-4, 5e-3), ("bf16", 1e-2, 5e-2)]
"""Precision, and how far losses may be apart in the first 20 steps and in all 50."""


def on_gpus(precision: str, folder: Path) -> dict[str, Any]:
    """A page for two GPUs."""
    blocks = {
        "M": {"mixer": {"kind": "mamba2", "d_state": 64, "head_dim": 32}},
        "A": {"mixer": {"kind": "attention", "n_heads": 4}, "ffn": {"kind": "mlp", "hidden": 512}},
        "E": {"ffn": {"kind": "moe", "n_experts": 8, "top_k": 2, "hidden": 128}},
    }
    return {
        **PAGE,
        "model": {"d_model": 256, "layout": "MMAEMM", "blocks": blocks},
        "data": {**short_documents(folder), "seq_len": 256},
        "trainer": {**PAGE["trainer"], "global_batch": 4096, "precision": precision, "threads": None},
    }


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision, early, tolerance", GPU)
def test_every_strategy_trains_as_one_gpu(
    precision: str, early: float, tolerance: float, tmp_path: Path
) -> None:
    """The same with Triton kernels on two GPUs, wider, in fp32 and in bf16.

    The order of sums is another, and what differs in the eighth digit grows tenfold every few steps.
    """
    ways = {"ddp": Ddp(), "fsdp": Fsdp(), "offload": Fsdp(reshard=False, offload=True)}
    if precision == "bf16":
        ways["halved"] = Fsdp(gather="bf16", reduce="bf16")
    follow(typed(on_gpus(precision, tmp_path)), tmp_path, ways, tolerance, early)


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision, early, tolerance", GPU)
def test_deepspeed_trains_as_one_gpu(precision: str, early: float, tolerance: float, tmp_path: Path) -> None:
    """The same on DeepSpeed's engine, its states, gradients and parameters cut, and on the host."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    host = Zero3(offload_optimizer=True, offload_params=True)
    ways = {"zero1": Zero1(), "zero2": Zero2(), "zero3": Zero3(), "zero3-host": host}
    follow(typed(on_gpus(precision, tmp_path)), tmp_path, ways, tolerance, early)
