"""check parallel: what it runs, that it can fail, and that every strategy trains as one process does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from ssmtrain.check import parallel
from ssmtrain.check.starts import Start
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, typed
from ssmtrain.config.request import Request
from ssmtrain.config.schema import Ddp, Fsdp

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


def test_every_strategy_trains_as_one_process(tmp_path: Path) -> None:
    """A hybrid with experts on packed documents: 50 steps of fp32 on two gloo ranks, to 1e-5 of the loss."""
    config = typed(PAGE)
    steps = parallel.STEPS
    one = parallel.ledger(parallel.alone(config), tmp_path, "one", steps)
    losses = [float.fromhex(line["loss_hex"]) for line in one]
    assert losses[-1] < 0.8 * losses[0]
    for name, strategy in {"ddp": Ddp(), "fsdp": Fsdp()}.items():
        given = config.model_copy(update={"parallel": strategy})
        several = parallel.ledger(given, tmp_path, name, steps)
        assert [line["samples"] for line in several] == [line["samples"] for line in one]
        assert [float.fromhex(line["loss_hex"]) for line in several] == pytest.approx(losses, rel=1e-5), name
