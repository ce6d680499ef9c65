"""Which run a config means, from where it continues, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from ssmtrain.checkpoint import runs, store
from ssmtrain.checkpoint.records import cut_jsonl, read_config, read_status
from ssmtrain.checkpoint.runs import Run, locate, open_run, resolve
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, typed
from ssmtrain.config.schema import RunConfig

PAGE = {
    "recipe": "tiny",
    "model": {"d_model": 16, "layout": "A", "blocks": {"A": {"mixer": {"kind": "attention", "n_heads": 2}}}},
    "trainer": {"max_steps": 10},
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in (runs.DECISION, "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)


def _config(**changes: object) -> RunConfig:
    return typed(PAGE | changes)


def _trained(steps: list[int], **changes: object) -> Run:
    """A run that has saved at these steps and was left."""
    run = resolve(_config(**changes))
    for step in steps:
        store.save(run.checkpoints, step, {"model": {"w": torch.ones(3) * step}}, {"tokens": step * 100})
        run.mark("unfinished", step, step * 100)
    run.close()
    return run


def _damage(path: Path) -> None:
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")


def test_a_fresh_run(tmp_path: Path) -> None:
    run = resolve(_config())
    assert run.name.startswith("tiny-") and len(run.name) == len("tiny-") + 6
    assert run.folder == Path("runs") / run.name
    assert run.checkpoint is None and run.step == 0 and not run.finished and run.notices == []
    assert {path.name for path in run.folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "lock",
        "status.json",
    }
    assert read_status(run.folder) == {"status": "unfinished", "step": 0, "tokens": 0}
    for path in (run.folder, run.checkpoints):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.folder / "config.yaml").stat().st_mode) == 0o600
    run.close()


def test_the_written_config_is_a_page_of_the_same_run() -> None:
    run = resolve(_config())
    run.close()
    again = load([f"config={run.folder}/config.yaml"])
    assert again == run.config and read_config(run.folder) == run.config
    assert locate(again) == (run.name, run.folder)
    other = load([f"config={run.folder}/config.yaml", "seed=7"])
    assert locate(other)[0] != run.name
    named = resolve(_config(name="mine"))
    named.close()
    assert locate(load(["config=runs/mine/config.yaml", "seed=7"]))[0] == "mine"


def test_an_unfinished_run_continues_and_says_from_where() -> None:
    _trained([4, 8], name="r")
    Path("runs/r/metrics.jsonl").write_text('{"step": 8}\n{"step": 9}\n{"step": 1')
    Path("runs/r/ledger.jsonl").write_text('{"step": 7}\n{"step": 8}\n')
    run = resolve(_config(name="r"))
    assert run.step == 8 and run.checkpoint == Path("runs/r/checkpoints/step-00000008")
    assert run.notices == ["continuing run r from step 8"]
    assert run.metrics.read_text() == '{"step": 8}\n' and len(run.ledger.read_text().splitlines()) == 2
    assert read_status(run.folder) == {"status": "unfinished", "step": 8, "tokens": 800}
    run.close()


def test_a_run_without_checkpoint_starts_over() -> None:
    _trained([], name="r")
    Path("runs/r/metrics.jsonl").write_text('{"kind": "start"}\n{"step": 0}\n{"step": 1}\n')
    run = resolve(_config(name="r"))
    assert run.checkpoint is None and "no checkpoint yet" in run.notices[0]
    assert run.metrics.read_text() == ""
    run.close()


def test_damage_falls_back_and_is_named_by_file() -> None:
    _trained([4, 8], name="r")
    _damage(Path("runs/r/checkpoints/step-00000008"))
    run = resolve(_config(name="r"))
    run.close()
    assert run.step == 4
    assert run.notices[0].startswith("step-00000008 is damaged: model.safetensors has sha256")
    assert run.notices[1] == "continuing run r from step 4"
    _damage(Path("runs/r/checkpoints/step-00000004"))
    with pytest.raises(UserError) as error:
        resolve(_config(name="r"))
    assert error.value.lines[0] == "run r has no good checkpoint:" and len(error.value.lines) == 4
    assert "step-00000004" in error.value.lines[2]


def _finish(run: Run, step: int) -> None:
    run.mark("finished", step, step * 100)


def test_a_finished_run_says_so() -> None:
    _finish(_trained([5, 10], name="r"), 10)
    run = resolve(_config(name="r"))
    assert run.finished and run.step == 10
    assert run.notices[0] == "run r is finished at step 10 (runs/r)"
    assert read_status(run.folder)["status"] == "finished"
    run.close()


def test_a_finished_run_with_a_later_limit_continues() -> None:
    _finish(_trained([5, 10], name="r"), 10)
    run = resolve(_config(name="r", trainer={"max_steps": 20}))
    run.close()
    assert not run.finished and run.step == 10
    assert run.notices == ["trainer.max_steps changes from 10 to 20", "continuing run r from step 10"]
    assert read_config(run.folder).trainer.max_steps == 20


def test_a_finished_run_whose_end_is_lost_is_not_finished() -> None:
    run = _trained([5, 10], name="r")
    _finish(run, 10)
    (run.checkpoints / "step-00000010" / "model.safetensors").unlink()
    run = resolve(_config(name="r"))
    run.close()
    assert not run.finished and run.step == 5


def test_another_config_is_refused_with_the_difference() -> None:
    _trained([4], name="r")
    with pytest.raises(UserError) as error:
        resolve(_config(name="r", seed=3, optim={"kind": "adamw", "lr": 0.5}))
    lines = error.value.lines
    assert lines[0].startswith("run r was started with another config")
    assert lines[1:3] == ["  seed: 0 in the run, 3 now", "  optim.lr: 0.001 in the run, 0.5 now"]
    assert lines[3].startswith("may change: trainer") and "name=" in lines[4]
    assert read_config(Path("runs/r")).seed == 0


def test_a_run_that_saved_nothing_takes_another_config() -> None:
    _trained([], name="r")
    run = resolve(_config(name="r", seed=3))
    run.close()
    assert "starting over" in run.notices[0] and read_config(run.folder).seed == 3


def test_what_may_change_may_change() -> None:
    _trained([4], name="r")
    trainer = {"max_steps": 12, "save_every": 3, "devices": 2, "log_every": 1}
    run = resolve(_config(name="r", trainer=trainer, logger={"kind": "wandb"}, generate={"max_tokens": 5}))
    run.close()
    assert run.step == 4
    assert "trainer.devices changes from None to 2" in run.notices
    assert any("last bits" in notice for notice in run.notices)
    for fixed in ({"global_batch": 1024}, {"precision": "bf16"}):
        with pytest.raises(UserError, match="another config"):
            resolve(_config(name="r", trainer=fixed))


def test_never_refuses_what_exists() -> None:
    _trained([4], name="r")
    with pytest.raises(UserError, match="resume=never"):
        resolve(_config(name="r", resume="never"))
    resolve(_config(name="s", resume="never")).close()
    assert read_config(Path("runs/s")).resume == "auto"


def test_a_named_checkpoint_is_used_and_later_ones_set_aside() -> None:
    run = _trained([4, 8], name="r")
    run = resolve(_config(name="r", resume="runs/r/checkpoints/step-00000004"))
    run.close()
    assert run.step == 4
    assert [path.name for path in store.checkpoints(run.checkpoints)] == ["step-00000004"]
    assert len(list(run.checkpoints.glob("aside-*/step-00000008/manifest.json"))) == 1
    assert resolve(_config(name="r")).step == 4


def test_a_damaged_named_checkpoint_is_an_error_and_nothing_else_is_tried() -> None:
    run = _trained([4, 8], name="r")
    _damage(run.checkpoints / "step-00000008")
    with pytest.raises(UserError, match=r"step-00000008 is damaged:\nmodel\.safetensors has sha256"):
        resolve(_config(name="r", resume="runs/r/checkpoints/step-00000008"))
    for wrong in ("runs/r", "runs/r/checkpoints/step-8", "nowhere", "Auto"):
        with pytest.raises(UserError, match="not a checkpoint folder"):
            resolve(_config(name="r", resume=wrong))
    assert len(store.checkpoints(run.checkpoints)) == 2


def test_a_new_run_from_another_runs_checkpoint() -> None:
    _trained([4], name="r")
    _trained([6], name="busy")
    start = "runs/r/checkpoints/step-00000004"
    run = resolve(_config(name="fork", resume=start))
    run.close()
    assert run.step == 4 and run.checkpoint == Path(start).resolve()
    with pytest.raises(UserError, match="checkpoints of its own"):
        resolve(_config(name="busy", resume=start))
    with pytest.raises(UserError, match="another config: seed"):
        resolve(_config(name="fork2", resume=start, seed=1))


def test_the_second_process_is_refused_by_name() -> None:
    first = resolve(_config(name="r"))
    with pytest.raises(UserError, match=rf"run r is in use by process {os.getpid()} on"):
        resolve(_config(name="r"))
    first.close()
    resolve(_config(name="r")).close()


def test_a_refused_start_releases_the_run() -> None:
    _trained([4], name="r")
    for _ in range(2):
        with pytest.raises(UserError, match="another config"):
            resolve(_config(name="r", seed=3))
    resolve(_config(name="r")).close()


UNSAFE = [
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "/tmp/x",
    "a/b/c",
    "a//b",
    "a\nb",
    "a\0b",
    ".hidden",
    "-rf",
    "x" * 300,
]
UNSAFE += ["naïve", "a b", "a/checkpoints", "lock"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused_and_nothing_is_made(name: str) -> None:
    with pytest.raises(UserError, match="name: "):
        locate(RunConfig.model_validate(PAGE | {"name": name}))
    assert not Path("runs").exists()


def test_arms_are_folders_of_their_own() -> None:
    run = resolve(_config(name="sweep/lr_0.1"))
    assert run.folder == Path("runs/sweep/lr_0.1") and run.folder.is_dir()
    run.close()
    with pytest.raises(UserError, match=r"exists and is not a run: it holds lr_0\.1"):
        resolve(_config(name="sweep"))


def test_foreign_folders_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    Path("runs").mkdir()
    Path("runs/link").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leads out of runs"):
        resolve(_config(name="link"))
    Path("runs/file").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        resolve(_config(name="file"))
    Path("runs/photos").mkdir()
    Path("runs/photos/cat.jpg").write_text("")
    with pytest.raises(UserError, match=r"holds cat\.jpg"):
        resolve(_config(name="photos"))
    assert os.listdir("outside") == [] and os.listdir("runs/photos") == ["cat.jpg"]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(UserError, match="cannot write in runs/r: Permission denied"):
        resolve(_config(name="r"))


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    run = _trained([4], name="r")
    stale = run.checkpoints / f"step-00000008.tmp-{'a' * 32}"
    stale.mkdir()
    (run.folder / f".status.json.{'b' * 32}").write_text("{")
    (run.folder / ".mine").write_text("")
    resolve(_config(name="r")).close()
    assert not stale.exists() and (run.folder / ".mine").exists()
    assert not list(run.folder.glob(".status*"))


def test_other_ranks_follow_and_touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _trained([4, 8], name="r")
    leader = resolve(_config(name="r", resume="runs/r/checkpoints/step-00000004"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    follower = resolve(_config(name="r", resume="runs/r/checkpoints/step-00000004"))
    assert follower.checkpoint == leader.checkpoint and follower.held is None and follower.notices == []
    leader.close()
    # Started by a scheduler instead of rank 0: the same decision from the same files.
    monkeypatch.delenv(runs.DECISION)
    assert resolve(_config(name="r")).step == 4
    assert resolve(_config(name="new")).checkpoint is None and not Path("runs/new").exists()
    _finish(first, 4)
    assert resolve(_config(name="r", trainer={"max_steps": 4})).finished


def test_open_run_by_name_folder_and_checkpoint() -> None:
    run = _trained([4, 8], name="r")
    newest = run.checkpoints / "step-00000008"
    for where in ("r", "runs/r", str(run.folder.resolve())):
        opened = open_run(where)
        assert opened.name == "r" and opened.step == 8 and opened.config == run.config
    assert open_run(str(run.checkpoints / "step-00000004")).step == 4
    _damage(newest)
    opened = open_run("r")
    assert opened.step == 4 and "step-00000008 is damaged" in opened.notices[0]
    with pytest.raises(UserError, match=r"is damaged:\nmodel\.safetensors"):
        open_run(str(newest))


def test_open_run_helps_with_names() -> None:
    with pytest.raises(UserError, match="there are no runs in runs"):
        open_run("quickstart")
    _trained([], name="quickstart-abc123")
    with pytest.raises(UserError, match="runs in runs: quickstart-abc123"):
        open_run("quickstart")
    with pytest.raises(UserError, match="no good checkpoint yet"):
        open_run("quickstart-abc123")


def test_cut_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert cut_jsonl(path, 5) == 0
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 5, 6)]
    path.write_text("".join(lines) + '{"step": 7}')
    inode = path.stat().st_ino
    assert cut_jsonl(path, 5) == 2 and path.read_text() == "".join(lines[:3])
    assert path.stat().st_ino != inode
    assert cut_jsonl(path, 5) == 0
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    assert cut_jsonl(path, 5) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["a: &a [1]\nb: *a\n", "- 1\n", "\xff", "model: {d_model: 1}\n", ""])
def test_a_config_that_is_none_is_refused(text: str) -> None:
    run = _trained([4], name="r")
    (run.folder / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml is not a config"):
        open_run("r")
