"""Runs that begin from another run's checkpoint: what they keep, what they refuse, what they remember."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtrain.checkpoint import faults, store
from ssmtrain.checkpoint.records import read_config
from ssmtrain.checkpoint.runs import locate, resolve
from ssmtrain.config.errors import UserError
from ssmtrain.config.identity import config_hash
from ssmtrain.model.show import report as picture
from ssmtrain.train.attempts import read
from ssmtrain.train.fit import fit
from ssmtrain.train.forks import load_from
from train.conftest import ledger, losses, page, records, same, weights


def fork(own: str, *words: str) -> tuple[int, Path]:
    """`fit <own> <words>` in this process, in the runs folder beside the parent's."""
    key, _, text = own.partition("=")
    runs = Path(text.partition("@")[0]).parent
    config = load_from({key: text}, [f"runs_dir={runs}", *words])
    run = resolve(config)
    try:
        return fit(config, run), run.folder
    finally:
        run.close()


def test_a_fork_without_changes_goes_on_as_its_parent_did(parent: Path) -> None:
    code, folder = fork(f"from={parent}@step-4", "name=twin")
    assert code == 0
    assert ledger(folder) == ledger(parent)[4:]
    for stem in ("model", "optim", "rng"):
        assert same(weights(folder, 8, stem), weights(parent, 8, stem)), stem
    assert [r["step"] for r in records(folder, "train")] == [6, 8]
    assert [(a.begin, a.step) for a in read(folder / "attempts.jsonl")] == [(4, 8)]
    assert records(folder, "fork") == [
        {
            "kind": "fork", "step": 4, "path": str(parent / "checkpoints/step-00000004"), "data": "kept",
            "rows": 16, "tokens": 512,
        }
    ]  # fmt: skip


def test_the_decay_branch_starts_at_the_forks_rate(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = fork(
        f"from={parent}@step-4", "schedule=decay", "trainer.max_steps=8", "trainer.log_every=1"
    )
    assert code == 0
    assert [r["lr"] for r in records(folder, "train")] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert losses(folder)[0] == losses(parent)[4] and losses(folder)[1:] != losses(parent)[5:]
    config = read_config(folder)
    assert config.origin is not None and (config.origin.kind, config.origin.step) == ("fork", 4)
    assert f"forked from {parent} at step 4" in (folder / "report.md").read_text()
    assert f"origin      forked from {parent} at step 4" in picture(config, 257)[1]
    assert capsys.readouterr().out.count(f"forked from {parent} at step 4") == 2
    # A branch of the branch goes on with its decay; asked for again, it begins again from the rate there.
    on = load_from({"from": f"{folder}@step-6"}, ["trainer.max_steps=10"])
    assert (on.schedule.start, on.schedule.share) == (4, 1.0)  # type: ignore[union-attr]  # a decay
    anew = load_from({"from": f"{folder}@step-6"}, ["trainer.max_steps=10", "schedule=decay"])
    assert (anew.schedule.start, anew.schedule.share) == (6, 0.5)  # type: ignore[union-attr]  # a decay
    with pytest.raises(UserError, match=r"down to 0 of its peak already\nfork an earlier step"):
        load_from({"from": f"{folder}@step-8"}, ["trainer.max_steps=10", "schedule=decay"])


def test_an_interrupted_fork_resumes_to_the_same_bits_without_its_parent(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("schedule=decay", "trainer.max_steps=10", "trainer.save_every=100")
    _, whole = fork(f"from={parent}@step-4", "name=whole", *words)
    faults.arm("step_end:3:TERM")
    code, folder = fork(f"from={parent}@step-4", *words)
    assert code == 75
    faults.arm()
    name = folder.name
    shutil.rmtree(parent / "checkpoints" / "step-00000004")
    code, folder = fork(f"from={parent}@step-4", *words)
    assert (code, folder.name) == (0, name)
    assert ledger(folder) == ledger(whole) and len(ledger(folder)) == 6
    for stem in ("model", "optim", "rng"):
        assert same(weights(folder, 10, stem), weights(whole, 10, stem)), stem
    with pytest.raises(UserError, match=r"no such checkpoint\nthe nearest: .*step-2, .*step-6, .*step-8"):
        fork(f"from={parent}@step-5", *words)


def test_another_text_is_read_from_its_beginning(
    parent: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ssmtrain")
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "other.txt").write_text(text.replace("truth", "trout"))
    code, folder = fork(f"from={parent}@step-6", "name=other", f"data.train={tmp_path}/other.txt")
    assert code == 0 and "read from its beginning" in caplog.text
    assert [line["samples"] for line in ledger(folder)] == [line["samples"] for line in ledger(parent)[:2]]
    assert [line["step"] for line in ledger(folder)] == [7, 8]
    assert records(folder, "fork")[0]["data"] == "from its beginning"
    assert weights(folder, 8, "optim")["input.weight/step"] == 8


def test_what_makes_a_fork_is_in_its_name(parent: Path) -> None:
    base = read_config(parent).model_copy(update={"name": None})
    four, again, six = (
        load_from({"from": f"{parent}@step-{step}"}, ["trainer.max_steps=9"]) for step in (4, 4, 6)
    )
    hashes = {config_hash(config) for config in (base, four, again, six)}
    assert len(hashes) == 3 and locate(four)[0] == locate(again)[0] != locate(six)[0]
    # Where the parent lies is no part of it.
    assert four.origin is not None
    moved = four.model_copy(update={"origin": four.origin.model_copy(update={"run": "elsewhere"})})
    assert config_hash(moved) == config_hash(four)
    newest = load_from({"from": str(parent)}, ["trainer.max_steps=9"])
    assert newest.origin is not None and newest.origin.step == 8


REFUSED = [
    ("from", ["model.d_model=32", "trainer.max_steps=9"], r"model\.d_model: 16 there, 32 here"),
    ("from", ["model.norm_eps=1e-6", "trainer.max_steps=9"], r"model\.norm_eps: 1e-05 there, 1e-06 here"),
    ("from", ["optim=muon", "trainer.max_steps=9"], r"optim\.kind: 'adamw' there, 'muon' here\ninit="),
    ("from", ["seed=1", "trainer.max_steps=9"], r"keeps tokenizer, optimiser and order of the data"),
    ("from", [], r"trainer\.max_steps = 8: the fork begins at step 8"),
    ("from", ["trainer.global_batch=256", "schedule.unit=tokens", "trainer.max_steps=9"], r"counts in steps"),
    ("init", ["model.d_model=32"], r"weights are of another model.*\n.*d_model: 16 there, 32 here"),
    ("init", ["schedule=decay"], r"schedule=decay is the end of another run"),
]


@pytest.mark.parametrize(("word", "changes", "said"), REFUSED)
def test_what_a_fork_cannot_change_is_refused_with_the_difference(
    parent: Path, word: str, changes: list[str], said: str
) -> None:
    before = sorted(parent.parent.iterdir())
    with pytest.raises(UserError, match=said):
        load_from({word: str(parent)}, [f"runs_dir={parent.parent}", *changes])
    assert sorted(parent.parent.iterdir()) == before


def test_a_tokenizer_whose_content_changed_is_refused(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = store.load_state(parent / "checkpoints/step-00000004")
    monkeypatch.setattr(store, "load_state", lambda path: state | {"tokenizer": "another"})
    with pytest.raises(UserError, match="its content has changed"):
        fork(f"from={parent}@step-4", "name=other")


def test_init_takes_weights_and_begins_anew(parent: Path) -> None:
    code, folder = fork(
        f"init={parent}@step-6",
        "optim.lr=1e-30",
        "seed=3",
        "trainer.max_steps=2",
        "schedule.warmup=0",
        "name=tuned",
    )
    assert code == 0
    assert [line["step"] for line in ledger(folder)] == [1, 2]
    old, new = weights(parent, 6), weights(folder, 2)
    assert all(torch.allclose(old[name], new[name], rtol=0, atol=1e-20) for name in old)
    assert weights(folder, 2, "optim")["input.weight/step"] == 2
    config = read_config(folder)
    assert config.origin is not None and (config.origin.kind, config.origin.step) == ("weights", 6)


def test_an_origin_that_changed_is_not_used(parent: Path) -> None:
    config = load_from({"from": f"{parent}@step-4"}, ["name=late", f"runs_dir={parent.parent}"])
    path = parent / "checkpoints" / "step-00000004"
    tensors = {stem: store.load_tensors(path, stem) for stem in ("model", "optim", "rng")}
    state = store.load_state(path)
    shutil.rmtree(path)
    store.save(path.parent, 4, tensors, state | {"versions": {}})
    from ssmtrain.checkpoint import origins

    origins._verified.clear()
    with pytest.raises(UserError, match="is no longer what this run began from"):
        resolve(config)


SRUN = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize("told", [{"WORLD_SIZE": "2"}, SRUN], ids=["torchrun", "srun"])
def test_ranks_of_a_launcher_need_a_step(
    told: dict[str, str], parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"name the step, as in from=.*@step-1000"):
        load_from({"from": str(parent)}, ["trainer.max_steps=9"])
    config = load_from({"from": f"{parent}@step-8"}, ["trainer.max_steps=9"])
    # A rank that rank 0 started takes what rank 0 took.
    monkeypatch.setenv("LOCAL_RANK", "1")
    shutil.rmtree(parent / "checkpoints" / "step-00000008")
    assert load_from({"from": f"{parent}@step-8"}, ["trainer.max_steps=9"]) == config


def test_a_page_may_be_named_too(parent: Path, tmp_path: Path) -> None:
    from ssmtrain.config.load import to_yaml

    own: Any = page(tmp_path, name=None, optim__lr=0.5, trainer__max_steps=12)
    (tmp_path / "own.yaml").write_text(to_yaml(own))
    config = load_from({"from": f"{parent}@step-4"}, [f"config={tmp_path}/own.yaml"])
    assert config.optim.lr == 0.5 and config.recipe == "custom" and config.name != "parent"
    with pytest.raises(UserError, match="give one of them"):
        load_from({"from": str(parent), "init": str(parent)}, [])
