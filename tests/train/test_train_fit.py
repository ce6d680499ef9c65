"""fit in this process: files, exact resume, limits, invariance to micro-batches, skips, saves that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults, store
from ssmtrain.config.errors import NonFinite, OutOfMemory, UserError
from ssmtrain.train.module import LitLM
from train.conftest import ledger, losses, norms, page, records, run_of, same, weights

Train = Callable[..., tuple[int, Path]]


def stop_at(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Send this process a signal at a named point."""
    faults.arm(plan)


def test_a_run_leaves_its_files_and_figures(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train()
    assert code == 0
    found = json.loads((folder / "report.json").read_text())
    assert found["steps"] == 8 and found["tokens"] == 8 * 128
    assert found["val_bpb"] == pytest.approx(found["val_loss"] / 0.6931472, rel=0.02)
    assert set(found["yardsticks"]) == {"gzip", "xz", "bz2"}
    assert found["train_loss"] == pytest.approx(sum(losses(folder)[6:]) / 2)
    assert (folder / "loss.png").stat().st_size > 5000
    assert [r["step"] for r in records(folder, "train")] == [1, 2, 4, 6, 8]
    assert [r["step"] for r in records(folder, "val")] == [3, 6, 8]
    health = records(folder, "health")[0]
    assert {"state_max", "dt_min", "dt_max", "dt_clamped", "A_min", "A_max"} == set(
        health["layers"]["mamba2"]
    )
    assert health["grad_norm"].keys() == {"attention", "embedding", "head", "mamba2", "mlp", "norm"}
    total = sum(norm**2 for norm in health["grad_norm"].values()) ** 0.5
    assert total == pytest.approx(float.fromhex(ledger(folder)[3]["grad_norm_hex"]), rel=1e-5)
    assert {"data", "step", "save", "val", "other"} <= set(records(folder, "train")[-1]["time"])
    shown = capsys.readouterr().out
    for words in ("bits per byte", "gzip", "Sample:", "ssmtrain generate run=", "ssmtrain show", "loss.png"):
        assert words in shown
    # Nothing is left to do: the same command again says so (the caller, command(), asks run.finished).
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"


def test_resume_is_exact_and_the_schedule_is_the_same(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    code, whole = train(name="whole")
    stop_at(monkeypatch, "step_end:3:TERM")
    code, folder = train(name="parts", trainer__save_every=100)
    assert code == 75
    assert [p.name for p in store.checkpoints(folder / "checkpoints")] == ["step-00000004"]
    torch.rand(3)  # the generators come from the checkpoint, whatever this process has drawn
    stop_at(monkeypatch, "after_optimizer:2:INT")
    code, _ = train(name="parts", trainer__save_every=100)
    assert code == 75
    faults.arm()
    code, _ = train(name="parts", trainer__save_every=100)
    assert code == 0
    assert ledger(folder) == ledger(whole)
    for stem in ("model", "optim", "rng"):
        assert same(weights(folder, 8, stem), weights(whole, 8, stem)), stem
    pick = ("step", "loss", "lr")
    then, now = ([[r[k] for k in pick] for r in records(f, "train")][-1] for f in (whole, folder))
    assert then == now


def test_validation_samples_and_health_change_no_bit(train: Train) -> None:
    _, busy = train(name="busy", trainer__sample_every=2, trainer__val_every=1, trainer__health_every=1)
    _, quiet = train(name="quiet", trainer__val_every=0, trainer__health_every=0, trainer__save_every=100)
    assert ledger(busy) == ledger(quiet)
    assert same(weights(busy, 8), weights(quiet, 8))
    assert same(weights(busy, 8, "rng"), weights(quiet, 8, "rng"))
    assert len(records(busy, "sample")) == 3


def test_micro_batches_and_recompute_give_the_same_losses(train: Train) -> None:
    _, one = train(name="one")
    _, four = train(name="four", trainer__micro_batch=1)
    _, again = train(name="again", trainer__recompute="block", trainer__micro_batch=2)
    for other in (four, again):
        assert losses(other) == pytest.approx(losses(one), rel=2e-6)
        assert norms(other) == pytest.approx(norms(one), rel=1e-5)
    assert [e["samples"] for e in ledger(four)] == [e["samples"] for e in ledger(one)]


def test_time_limit_saves_and_a_longer_run_goes_on(train: Train) -> None:
    code, folder = train(trainer__max_seconds=1e-3)
    assert code == 75
    assert len(ledger(folder)) == 1
    assert train()[0] == 0
    assert records(folder, "train")[-1]["lr"] == pytest.approx(0.01 * 0.8125 * 0.8, rel=0.3)
    code, _ = train(trainer__max_steps=10)
    assert code == 0
    assert len(ledger(folder)) == 10


def test_a_run_killed_before_its_report_gets_it_later(train: Train, tmp_path: Path) -> None:
    _, folder = train()
    before = (ledger(folder), json.loads((folder / "report.json").read_text()))
    (folder / "report.json").unlink()
    run = run_of(page(tmp_path))
    run.mark("unfinished", 8, 8 * 128)
    run.close()
    assert train()[0] == 0
    after = (ledger(folder), json.loads((folder / "report.json").read_text()))
    assert after[0] == before[0]
    assert after[1]["val_loss"] == before[1]["val_loss"]


def test_out_of_memory_says_what_to_set(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(LitLM, "run_model", full)
    with pytest.raises(OutOfMemory, match=r"trainer\.micro_batch=2 trainer\.recompute=block"):
        train()


def test_what_this_machine_has_not(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"asked for and none found"):
        train(trainer__accelerator="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"3 asked for, this machine has 2"):
        train(name="gpus", trainer__accelerator="gpu", trainer__devices=3)
    with pytest.raises(UserError, match=r"4 rows do not divide by 3 devices"):
        train(name="cpus", trainer__accelerator="cpu", trainer__devices=3)


def test_max_tokens_stops_too(train: Train) -> None:
    code, folder = train(trainer__max_tokens=300)
    assert code == 0
    assert len(ledger(folder)) == 3  # 128 tokens a step, the first step at or past the limit is the last


def test_a_tiny_text_is_learnt_by_heart(train: Train, tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text(
        "she was of course only too good for him; but as nobody minds having. "
    )
    code, folder = train(
        data__train=str(tmp_path / "line.txt"),
        data__val=str(tmp_path / "line.txt"),
        data__seq_len=16,
        model__d_model=32,
        trainer__max_steps=150,
        trainer__global_batch=80,
        trainer__val_every=0,
        trainer__health_every=0,
        trainer__save_every=1000,
        schedule={"kind": "cosine", "warmup": 10},
    )
    assert code == 0
    assert losses(folder)[-1] < 0.05
    assert json.loads((folder / "report.json").read_text())["val_loss"] < 0.05


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_routers_balance_once_a_step_and_recompute_counts_nothing_twice(
    train: Train, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    moe = {
        "kind": "moe",
        "n_experts": 4,
        "top_k": 2,
        "hidden": 8,
        "router": "sigmoid_bias",
        "bias_rate": 0.125,
    }
    seen: list[torch.Tensor] = []
    step = LitLM.training_step

    def watch(self: LitLM, *args: Any) -> None:
        step(self, *args)
        seen.append(self.loads[1])

    monkeypatch.setattr(LitLM, "training_step", watch)
    changes = {"model__blocks__A__ffn": moe, "optim__kind": optim, "trainer__max_steps": 3}
    _, plain = train(name="plain", **changes)
    _, other = train(name="other", trainer__micro_batch=2, trainer__recompute="block", **changes)
    assert all(int(load.sum()) == 128 * 2 for load in seen)
    for folder in (plain, other):
        bias = weights(folder, 3)["blocks.1.ffn.selection_bias"] / 0.125
        assert torch.equal(bias, bias.round()) and 1 <= bias.abs().max() <= 3
    health = train(name="plain", trainer__health_every=1, **{**changes, "trainer__max_steps": 4})[1]
    assert records(health, "health")[-1]["expert_load"]["max_over_mean"] >= 1.0


def test_bf16_keeps_the_parameters_in_fp32(train: Train) -> None:
    code, folder = train(trainer__precision="bf16", trainer__max_steps=2, trainer__health_every=1)
    assert code == 0
    assert {t.dtype for t in weights(folder, 2).values()} == {torch.float32}
    assert losses(folder)[0] == pytest.approx(5.55, abs=0.1)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], module: str) -> None:
    """Make a module's output infinite while the step after these many is computed."""

    def start(self: LitLM) -> None:
        def hook(layer: Any, args: Any, output: Any) -> Any:
            if self.state.step not in steps:
                return output
            outputs = output if isinstance(output, tuple) else (output,)
            bad = tuple(tensor * float("inf") for tensor in outputs)
            return bad if isinstance(output, tuple) else bad[0]

        self.model.get_submodule(module).register_forward_hook(hook)

    monkeypatch.setattr(LitLM, "on_train_start", start)


def test_a_bad_step_is_skipped_and_counted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 4}, "blocks.0.mixer.out_proj")
    code, folder = train(trainer__save_every=1, trainer__keep_last=8)
    assert code == 0
    assert json.loads((folder / "report.json").read_text())["nonfinite"] == 2
    assert same(weights(folder, 3), weights(folder, 5))
    assert same(weights(folder, 3, "optim"), weights(folder, 5, "optim"))
    assert not same(weights(folder, 5), weights(folder, 6))
    assert [r["step"] for r in records(folder, "skip")] == [4, 5]


def test_three_bad_steps_in_a_row_name_the_layer(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 3, 4}, "blocks.1.mixer_norm")
    with pytest.raises(NonFinite) as caught:
        train()
    assert "3 steps in a row" in caught.value.lines[0]
    assert "blocks.1.mixer_norm (StreamNorm) is the first" in caught.value.lines[1]


def test_a_bad_gradient_is_found_too(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: LitLM) -> None:
        self.model.blocks[0].mixer.in_proj.weight.register_hook(lambda g: g * float("nan"))  # type: ignore[union-attr, operator]

    monkeypatch.setattr(LitLM, "on_train_start", start)
    with pytest.raises(NonFinite) as caught:
        train(trainer__max_nonfinite=1)
    assert "gradient of blocks.0.mixer.in_proj.weight" in caught.value.lines[1]


def failing_saves(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    real, count = store.save, [0]

    def save(folder: Path, *args: Any) -> Path:
        count[0] += 1
        if count[0] in bad:
            raise store.SaveFailed(folder, OSError(28, "No space left on device"))
        return real(folder, *args)

    monkeypatch.setattr(store, "save", save)


def test_failed_saves_are_survived_three_in_a_row_are_not(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_saves(monkeypatch, {1, 2, 4})
    assert train(trainer__save_every=1)[0] == 0
    assert caplog.text.count("No space left on device") == 3
    failing_saves(monkeypatch, {2, 3, 4})
    with pytest.raises(UserError, match=r"No space left.*\n.*step-00000001"):
        train(name="second", trainer__save_every=1)


def test_another_text_is_refused(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, "step_end:1:TERM")
    assert train()[0] == 75
    faults.arm()
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("truth", "trout"))
    with pytest.raises(UserError, match="text or the tokenizer has changed"):
        train()
