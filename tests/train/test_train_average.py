"""The verbs average and convert: sums by hand, files for other programs, runs that begin from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.average import average
from ssmtrain.checkpoint.records import read_config
from ssmtrain.checkpoint.runs import open_run, resolve
from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.train.fit import fit
from ssmtrain.train.forks import load_from
from train.conftest import ledger, records, same, weights


def _said(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """What a line that is refused says."""
    capsys.readouterr()
    assert main(list(line)) == 2
    return capsys.readouterr().err


def _loss(capsys: pytest.CaptureFixture[str], run: Path) -> float:
    capsys.readouterr()
    assert main(["eval", f"run={run}", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


def test_the_average_is_the_sum_by_hand(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "uniform"
    assert main(["average", f"run={parent}", "last=3", f"out={out}"]) == 0
    parts = [weights(parent, step) for step in (4, 6, 8)]
    for name, tensor in weights(out, 8).items():
        by_hand = sum(part[name].double() for part in parts) / 3
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), by_hand, rtol=1e-7, atol=1e-12), name
    named = [f"{parent}@step-8", f"{parent}/checkpoints/step-00000002"]
    weighted = tmp_path / "weighted"
    assert main(["average", *named, "weights=3,1", f"out={weighted}"]) == 0
    for name, tensor in weights(weighted, 8).items():
        by_hand = 0.75 * weights(parent, 8)[name].double() + 0.25 * weights(parent, 2)[name].double()
        assert torch.allclose(tensor.double(), by_hand, rtol=1e-7, atol=1e-12), name
    assert store.load_state(weighted / "checkpoints/step-00000008")["average"][0]["share"] == 0.75
    # One checkpoint and nothing of another is that one, to the bit.
    alone = average([parent / "checkpoints/step-00000004", parent / "checkpoints/step-00000008"], [1.0, 0.0])
    assert same(alone, weights(parent, 4))


def test_an_average_reads_as_a_run(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "averaged"
    assert main(["average", f"run={parent}", "last=2", f"out={out}"]) == 0
    assert _loss(capsys, parent) < _loss(capsys, out) < 5.0
    assert main(["generate", f"run={out}"]) == 0
    runs = f"runs_dir={tmp_path}/runs"
    run = resolve(load_from({"from": str(out)}, ["name=on", "trainer.max_steps=9", runs]))
    assert fit(run.config, run) == 0
    run.close()
    # Step and place in the data go on; an optimiser there is none to go on with.
    assert [line["step"] for line in ledger(run.folder)] == [9]
    assert records(run.folder, "fork")[0]["data"] == "kept"
    assert weights(run.folder, 9, "optim")["input.weight/step"] == 1
    start = load_from({"init": str(out)}, [runs])
    assert start.origin is not None and start.origin.kind == "weights"
    config = read_config(parent).model_copy(
        update={"name": "resumed", "resume": f"{out}/checkpoints/step-00000008"}
    )
    run = resolve(config)
    with pytest.raises(UserError, match="weights alone, so no run can be resumed"):
        fit(config, run)
    run.close()


def test_what_average_refuses(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, two = f"out={tmp_path}/out", (f"{parent}@step-6", f"{parent}@step-8")
    assert "needs out=<folder>" in _said(capsys, "average", *two)
    assert "at least two checkpoints" in _said(capsys, "average", two[0], out)
    assert "is given twice" in _said(capsys, "average", two[0], two[0], out)
    assert "has 4 good checkpoints" in _said(capsys, "average", f"run={parent}", "last=5", out)
    assert "or run= with last=" in _said(capsys, "average", f"run={parent}", out)
    for bad in ("1,2,3", "1,x", "0,0", "1,-1", "1,inf"):
        assert "expected 2 numbers from 0 up" in _said(capsys, "average", *two, f"weights={bad}", out)
    assert "there is no such checkpoint" in _said(capsys, "average", two[0], f"{parent}@step-5", out)
    assert f"out={parent} exists already" in _said(capsys, "average", *two, f"out={parent}")
    other = Path(shutil.copytree(parent, tmp_path / "other"))
    page = other / "config.yaml"
    page.write_text(page.read_text().replace("tie_embeddings: true", "tie_embeddings: false"))
    assert "model.tie_embeddings: true there, false here" in _said(
        capsys, "average", two[0], f"{other}@step-8", out
    )
    assert not (tmp_path / "out").exists()


def test_convert_writes_what_other_programs_read(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "exported", tmp_path / "one" / "mine.safetensors"
    assert main(["convert", f"run={parent}@step-6", f"out={folder}"]) == 0
    assert main(["convert", f"run={parent}", f"out={file}"]) == 0
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "export.json"}
    assert {path.name for path in file.parent.iterdir()} == {"mine.safetensors", "mine.yaml", "mine.json"}
    assert same(load_file(folder / "model.safetensors"), weights(parent, 6))
    assert same(load_file(file), weights(parent, 8))
    assert _loss(capsys, file) == _loss(capsys, parent) < _loss(capsys, folder)
    for out, step in ((folder, 6), (file, 8)):
        config = load_from({"init": str(out)}, [f"runs_dir={tmp_path}/runs", "trainer.max_steps=3"])
        assert config.origin is not None and config.origin.step == step and config.name != "parent"
        run = resolve(config)
        assert run.origin is not None and same(load_file(run.origin), weights(parent, step))
        run.close()
    assert "begin a run from them with init=" in _said(capsys, "fit", f"from={file}")
    assert "model.safetensors exists already" in _said(capsys, "convert", f"run={parent}", f"out={folder}")
    assert "convert needs out=" in _said(capsys, "convert", f"run={parent}")
    assert "needs run=" in _said(capsys, "convert", "out=x")
    assert "changes nothing" in _said(capsys, "convert", f"run={parent}", "out=x", "seed=1")


def test_an_export_that_is_damaged_or_half_written_is_refused(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert main(["convert", f"run={parent}", f"out={out}"]) == 0
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert "is damaged: model.safetensors has sha256" in _said(capsys, "fit", f"init={out}")
    assert "is damaged" in _said(capsys, "eval", f"run={out}")
    (out / "export.json").unlink()
    assert "it was not written whole" in _said(capsys, "fit", f"init={out}")
    bare = tmp_path / "bare.safetensors"
    shutil.copy(out / "model.safetensors", bare)
    assert "bare.yaml, the config of these weights, is not beside them" in _said(
        capsys, "fit", f"init={bare}"
    )


def test_convert_takes_the_moving_average(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parent / "checkpoints" / "step-00000008"
    tensors = {"model": store.load_tensors(path, "model")}
    tensors["ema"] = {n: t * 2 for n, t in tensors["model"].items() if n != "input.weight"}
    store.save(path.parent, 10, tensors, store.load_state(path) | {"ema": True})
    assert main(["convert", f"run={parent}", "weights=ema", f"out={tmp_path}/e"]) == 0
    found = load_file(tmp_path / "e" / "model.safetensors")
    assert same(found, tensors["model"] | tensors["ema"])
    assert json.loads((tmp_path / "e" / "export.json").read_text())["weights"] == "ema"
    assert "has no moving average" in _said(capsys, "convert", f"run={parent}@step-8", "weights=ema", "out=x")
    assert open_run(str(tmp_path / "e")).checkpoint == tmp_path / "e" / "model.safetensors"
