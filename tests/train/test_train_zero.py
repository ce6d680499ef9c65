"""DeepSpeed's engine under fit: the bits of a run that was cut off, and a machine that lacks the package."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import pytest

from ssmtrain.checkpoint.parts import read_parts
from ssmtrain.config.errors import UserError
from ssmtrain.train import fit
from train.conftest import ledger, losses, page, records, same
from train.test_train_ddp import two_forked


@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_changes_no_bit(tmp_path: Path) -> None:
    """Two ranks to the end, saving beside training; and two that lose one after step 6, go on from step 4."""
    how = {"parallel__kind": "deepspeed_zero2", "ema__decay": 0.5, "trainer__micro_batch": 1}
    code, whole, said = two_forked(tmp_path, name="whole", trainer__save_async=True, **how)
    assert code == 0, said
    code, cut, said = two_forked(tmp_path, "1", "after_optimizer:6", name="cut", **how)
    assert code == -signal.SIGKILL, said
    assert not (cut / "checkpoints" / "step-00000008").exists()
    code, cut, said = two_forked(tmp_path, name="cut", **how)
    assert code == 0 and "step 4" in said, said
    assert [e["samples"] for e in ledger(cut)] == [e["samples"] for e in ledger(whole)]
    assert losses(cut) == losses(whole)
    for stem in ("model", "optim", "ema"):
        one, two = (files(folder, stem) for folder in (whole, cut))
        assert all(len(paths) == 2 for paths in (one, two)), "each rank writes a share"
        assert same(read_parts(one), read_parts(two)), stem
    # Gradients by kind, which no rank holds whole, are those of an engine that does.
    (mine,) = (record for record in records(cut, "health") if record["step"] == 8)
    total = sum(norm**2 for norm in mine["grad_norm"].values()) ** 0.5
    assert total == pytest.approx(float.fromhex(ledger(cut)[-1]["grad_norm_hex"]), rel=1e-5)


def files(run: Path, stem: str) -> list[Path]:
    """The ranks' files of one kind in the last checkpoint."""
    return sorted((run / "checkpoints" / "step-00000008").glob(f"{stem}_*.safetensors"))


def test_without_the_package_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(fit, "find_spec", lambda name: None if name == "deepspeed" else found(name))
    config = page(tmp_path, parallel={"kind": "deepspeed_zero2"}, trainer__devices=2)
    with pytest.raises(UserError, match=r"pip install 'ssmtrain\[deepspeed\]'"):
        fit.place(config)
    assert fit.place(page(tmp_path, trainer__devices=2)) == ("cpu", 2)


def test_the_page_of_a_stage_has_no_keys_of_another() -> None:
    from ssmtrain.config.parallel import Zero1, Zero3

    keys = json.loads(Zero3().model_dump_json()).keys() - json.loads(Zero1().model_dump_json()).keys()
    assert keys == {"offload_params"}
