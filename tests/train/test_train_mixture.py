"""Mixtures, growing batches and lengthening rows: what a run reads, exactly, however often it is stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.records import read_config
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.mixture import Mixture
from ssmtrain.data.module import open_data
from ssmtrain.data.shards import TokenStream
from ssmtrain.parallel import ranks
from ssmtrain.train.forks import load_from
from ssmtrain.train.module import LitLM
from train.conftest import TEXT, ledger, losses, page, records, run_of, same, weights

Train = Callable[..., tuple[int, Path]]

WARM_UPS: dict[str, Any] = {
    "data__seq_len_warmup": [{"until_tokens": 160, "seq_len": 8}, {"until_tokens": 600, "seq_len": 16}],
    "trainer__global_batch_warmup": [
        {"until_tokens": 130, "global_batch": 32},
        {"until_tokens": 500, "global_batch": 64},
    ],
}
TOKENS = [32] * 5 + [64] * 6 + [128] * 3
LENGTHS = [8] * 5 + [16] * 7 + [32] * 2


def mixed(folder: Path, **more: Any) -> dict[str, Any]:
    """Two sources of text, the second with a share from 384 tokens on, a phase for each of three."""
    for name, seed in (("prose", 5), ("code", 11)):
        words = TEXT.split()
        (folder / f"{name}.txt").write_text(" ".join(words[(seed * i * i) % len(words)] for i in range(400)))
    sources = {name: {"kind": "text", "train": str(folder / f"{name}.txt")} for name in ("prose", "code")}
    phases = [
        {"from_step": 0, "weights": {"prose": 1, "code": 0}},
        {"from_tokens": 384, "weights": {"prose": 0.5, "code": 0.5}},
        {"from_step": 11, "weights": {"prose": 0.25, "code": 0.75}},
    ]
    return {
        "data": {
            "kind": "mix", "sources": sources, "phases": phases, "seq_len": 32,
            "cache_dir": str(folder / "cache"), **more,
        },
        **WARM_UPS, "trainer__max_steps": 14,
    }  # fmt: skip


def stopped(train: Train, monkeypatch: pytest.MonkeyPatch, name: str, at: list[int], **changes: Any) -> Path:
    """A run that is stopped after each of these steps and then left to end."""
    before = 0
    for step in at:
        faults.arm(f"step_start:{step - before}:TERM")
        code, folder = train(name=name, **changes)
        assert code == 75 and len(ledger(folder)) == step
        before = step
    faults.arm()
    code, folder = train(name=name, **changes)
    assert code == 0
    return folder


def test_a_run_stopped_around_every_change_is_the_unbroken_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"trainer__val_every": 0, "trainer__health_every": 0, "trainer__log_every": 1}
    changes = mixed(tmp_path) | quiet
    _, whole = train(name="whole", **changes)
    lines = ledger(whole)
    tokens = [line["tokens"] for line in lines]
    assert [b - a for a, b in zip([0, *tokens], tokens, strict=False)] == TOKENS
    shown = records(whole, "train")
    assert [r["seq_len"] for r in shown] == LENGTHS and [r["global_batch"] for r in shown] == TOKENS
    # Every sample is the mixture's, in its order, none twice, none left out.
    mixture = open_data(read_config(whole)).train
    rows = [row for line in lines for row in line["samples"]]
    assert rows == mixture.names(mixture.samples(range(sum(TOKENS) // 32)).tolist())
    share = [Counter(one.partition(":")[0] for one in part) for part in (rows[:12], rows[12:17], rows[17:])]
    assert (
        share[0] == {"prose": 12} and abs(share[1]["code"] - 2.5) < 1 and share[2] == {"prose": 3, "code": 9}
    )

    parts = stopped(train, monkeypatch, "parts", [5, 8, 12], **changes)
    assert ledger(parts) == lines
    for stem in ("model", "optim", "rng"):
        assert same(weights(parts, 14, stem), weights(whole, 14, stem)), stem
    pick = ("step", "loss", "lr", "tokens", "bpb")
    assert [[r[k] for k in pick] for r in records(parts, "train")] == [[r[k] for k in pick] for r in shown]


def test_a_length_warm_up_reads_the_same_rows(train: Train) -> None:
    changes = {"data__seq_len_warmup": [{"until_tokens": 129, "seq_len": 16}], "trainer__val_every": 0}
    _, one = train(name="one", trainer__max_steps=3, **changes)
    _, four = train(name="four", trainer__max_steps=3, trainer__micro_batch=1, **changes)
    samples = open_data(read_config(one)).train.samples(range(12)).tolist()
    for folder in (one, four):
        assert [row for line in ledger(folder) for row in line["samples"]] == samples
    assert losses(four) == pytest.approx(losses(one), rel=2e-6)


def test_the_rows_of_the_next_step_are_asked_for(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each source, and on each of two ranks those of its own share."""
    asked: list[list[int]] = []
    rows, next_rows = LitLM.rows, Mixture.ahead

    def ahead(mixture: Mixture, numbers: range) -> None:
        fetched.clear()
        next_rows(mixture, numbers)
        assert len(fetched) == len(numbers)
        asked.append(mixture.names(mixture.samples(numbers).tolist()))

    def as_two(lit: LitLM) -> Any:
        """The rows of the run's one rank, after those of two, whose requests stand first."""
        for rank in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(ranks, "world", lambda: 2)
                patch.setattr(ranks, "rank", lambda rank=rank: rank)
                rows(lit)
        return rows(lit)

    fetched: list[int] = []
    real = TokenStream.ahead

    def fetches(stream: TokenStream, starts: Any, length: int) -> None:
        fetched.extend(starts := list(starts))
        real(stream, starts, length)

    monkeypatch.setattr(TokenStream, "ahead", fetches)
    monkeypatch.setattr(Mixture, "ahead", ahead)
    monkeypatch.setattr(LitLM, "rows", as_two)
    changes = {**mixed(tmp_path), **{key: [] for key in WARM_UPS}, "trainer__max_steps": 6}
    _, folder = train(**changes, trainer__val_every=0, trainer__micro_batch=1)
    read = [line["samples"] for line in ledger(folder)]
    for step, samples in enumerate(read[1:]):
        first, second, whole = asked[3 * step : 3 * step + 3]
        assert whole == samples == first + second and len(first) == len(second) == 2
    assert any(name.startswith("code") for name in read[-1])


def test_growth_decides_the_horizon_and_the_schedule(train: Train) -> None:
    growth = {"trainer__global_batch_warmup": [{"until_tokens": 512, "global_batch": 64}]}
    limits = {"trainer__max_steps": None, "trainer__max_tokens": 1000, "trainer__log_every": 1}
    linear = {"kind": "linear", "warmup": 0, "unit": "tokens"}
    code, folder = train(schedule=linear, **growth, **limits)
    found = records(folder, "train")
    assert code == 0 and [r["tokens"] for r in found] == [*range(64, 513, 64), 640, 768, 896, 1024]
    assert [r["lr"] for r in found[-2:]] == pytest.approx([0.01 * 256 / 1024, 0.01 * 128 / 1024])
    assert json.loads((folder / "report.json").read_text())["tokens"] == 1024
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"


def test_each_set_has_figures_of_its_own(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssmtrain.config.request import Request
    from ssmtrain.eval.command import command

    _, folder = train(**mixed(tmp_path), trainer__val_every=7)
    found = records(folder, "val")
    assert [r["step"] for r in found] == [7, 14]
    for record in found:
        sets = [record["prose"], record["code"]]
        assert record["labels"] == sum(one["labels"] for one in sets)
        total = sum(one["loss"] * one["labels"] for one in sets)
        assert record["loss"] == pytest.approx(total / record["labels"], rel=1e-9)
    told = json.loads((folder / "report.json").read_text())["val_sets"]
    assert told["code"]["bpb"] == found[-1]["code"]["bpb"]
    assert f"bits per byte of prose {found[-1]['prose']['bpb']:.4f}, code" in capsys.readouterr().out
    for split in ("val", "train"):
        flags = {"json": True, "split": split}
        assert command(Request("eval", None, run=str(folder), flags=flags)) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["sets"].keys() == {"prose", "code"}
        assert shown["labels"] == sum(one["labels"] for one in shown["sets"].values())
        if split == "val":
            assert shown["sets"]["code"]["loss"] == pytest.approx(found[-1]["code"]["loss"], rel=1e-6)


def continued(folder: Path, phases: list[dict[str, Any]], **more: Any) -> RunConfig:
    config = mixed(folder)
    return page(folder, **config | {"data": config["data"] | {"phases": phases}} | more)


def test_phases_to_come_may_change_and_those_that_have_begun_may_not(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = mixed(tmp_path) | {"trainer__val_every": 0}
    faults.arm("step_start:9:TERM")
    code, folder = train(**changes)
    assert code == 75 and len(ledger(folder)) == 9
    faults.arm()
    before = (folder / "config.yaml").read_bytes()
    begun = [*changes["data"]["phases"]]
    begun[1] = {"from_tokens": 352, "weights": {"prose": 0.5, "code": 0.5}}
    with pytest.raises(UserError, match=r"data\.phases") as refused:
        run_of(continued(tmp_path, begun))
    assert "data.phases still to come" in "".join(refused.value.lines)
    assert (folder / "config.yaml").read_bytes() == before
    later = [*changes["data"]["phases"][:2], {"from_step": 12, "weights": {"prose": 0, "code": 1}}]
    code, folder = train(**changes | {"data": changes["data"] | {"phases": later}})
    assert code == 0
    rows = [one for line in ledger(folder) for one in line["samples"]]
    mixture = open_data(read_config(folder)).train
    assert rows == mixture.names(mixture.samples(range(len(rows))).tolist())
    assert all(one.startswith("code:") for one in ledger(folder)[-1]["samples"])
    noted = records(folder, "mixture")
    assert [r["step"] for r in noted] == [9] and noted[0]["now"][2] == [21, {"prose": 0.0, "code": 1.0}]
    assert read_config(folder).data.phases[2].from_step == 12  # type: ignore[union-attr]


def test_a_fork_may_change_the_mixture_from_where_it_begins(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = mixed(tmp_path) | {"trainer__val_every": 0, "trainer__save_every": 9}
    _, trunk = train(name="trunk", **changes)
    phases = "[{from_step:0,weights:{prose:1,code:0}},{from_tokens:384,weights:{prose:1,code:1}},"
    phases += "{from_step:9,weights:{prose:0,code:1}}]"
    words = ["name=fork", f"runs_dir={tmp_path}/runs", f"data.phases={phases}"]
    config = load_from({"from": f"{trunk}@step-9"}, words)
    from ssmtrain.train.fit import fit

    run = run_of(config)
    try:
        assert fit(config, run) == 0
    finally:
        run.close()
    assert records(run.folder, "fork")[0]["data"] == "kept"
    mixture = open_data(config).train
    rows = [one for line in ledger(run.folder) for one in line["samples"]]
    begin = sum(TOKENS[:9]) // 32
    assert rows == mixture.names(mixture.samples(range(begin, sum(TOKENS) // 32)).tolist())
    assert all(one.startswith("code:") for one in rows)
    # Its steps are shown and replayed from where it began, in the middle of the warm-ups.
    capsys.readouterr()
    assert main(["data", "show", f"run={run.folder}", "step=10", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [f"{row['source']}:{row['row']}" for row in shown["rows"] if row["begin"] == 0] == rows[:2]
    assert shown["samples"] == [begin, begin + 2] and shown["seq_len"] == 16
    assert main(["replay", f"run={run.folder}", "step=13", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert (verdict["steps"], verdict["differ"]) == ([10, 11, 12, 13], [])


def test_a_source_is_not_read_more_often_than_it_may(train: Train, tmp_path: Path) -> None:
    changes = mixed(tmp_path)
    changes["data"]["sources"]["code"]["max_epochs"] = 1
    train(**changes, trainer__val_every=0)
    with pytest.raises(
        UserError, match=r"data\.sources\.code\.max_epochs = 1: the run would read it"
    ) as error:
        train(**changes | {"trainer__max_steps": 200})
    assert "data.phases" in error.value.lines[-1]
