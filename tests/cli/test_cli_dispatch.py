"""Verbs, flags and exit codes, in this process."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmtrain import cli
from ssmtrain.cli import main
from ssmtrain.config import schema_file
from ssmtrain.config.errors import Lost, NonFinite, OutOfMemory, UserError
from ssmtrain.config.load import load, load_run_config, to_yaml
from ssmtrain.config.manual import page
from ssmtrain.config.request import Request
from ssmtrain.layers import ffn_kinds, mixer_kinds
from ssmtrain.verbs import VERBS


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Request]]:
    """What the rooms are asked, instead of asking them."""
    found: list[tuple[str, Request]] = []

    def function(target: str) -> Any:
        return lambda request: found.append((target, request)) or 0

    monkeypatch.setattr(cli, "_function", function)
    return found


def test_every_verb_has_its_function() -> None:
    for verb in VERBS.values():
        assert callable(cli._function(verb.target)), verb.target
    assert callable(cli._function("ssmtrain.sweep.local:command"))


def test_the_config_goes_to_the_room(asked: list[tuple[str, Request]]) -> None:
    before = list(sys.argv)
    assert main(["fit", "config=quickstart", "optim.lr=0.5"]) == 0
    target, request = asked[0]
    assert target == "ssmtrain.train.fit:command"
    assert (request.verb, request.run, request.overrides, request.flags) == (
        "fit",
        None,
        ["optim.lr=0.5"],
        {},
    )
    assert request.config == load(["config=quickstart", "optim.lr=0.5"])
    # Lightning starts the other ranks of a run by calling sys.argv again.
    assert sys.argv == before


def test_a_run_goes_to_the_room_unloaded(asked: list[tuple[str, Request]]) -> None:
    assert main(["generate", "run=first", "--prompt", "a=b --json", "generate.top_k=5", "--json"]) == 0
    assert main(["eval", "--split=train", "run=first"]) == 0
    (_, generate), (_, evaluate) = asked
    assert (generate.config, generate.run, generate.overrides) == (None, "first", ["generate.top_k=5"])
    assert generate.flags == {"prompt": "a=b --json", "json": True} and generate.as_json
    assert (evaluate.run, evaluate.flags, evaluate.as_json) == ("first", {"split": "train"}, False)


def test_multirun_goes_to_the_sweep(asked: list[tuple[str, Request]]) -> None:
    for flag in ("--multirun", "-m"):
        assert main(["fit", "config=quickstart", "seed=1,2", flag]) == 0
        target, request = asked.pop()
        assert target == "ssmtrain.sweep.local:command"
        assert (request.config, request.overrides) == (None, ["config=quickstart", "seed=1,2"])


WRONG = [
    ("fti config=quickstart", "'fti' is not a verb; did you mean `ssmtrain fit`?"),
    ("train config=quickstart", "did you mean `ssmtrain fit`?"),
    ("config=quickstart", "the verb comes first, as in: ssmtrain fit config=quickstart"),
    ("config", "config needs a second word; expected one of: ssmtrain config show"),
    ("config shwo", "config shwo: unknown"),
    ("check", "ssmtrain check resume, ssmtrain check parallel"),
    ("fit --mutlirun", "did you mean --multirun?"),
    ("fit --optim.lr=3", "settings have no dashes; type optim.lr=3"),
    ("fit config=quickstart --json", "--json goes with --multirun"),
    ("show --json=1 config=quickstart", "--json takes no value"),
    ("generate run=x --prompt", "--prompt needs a value: --prompt TEXT"),
    ("generate run=x run=y", "one run="),
    ("generate run=x config=quickstart", "not both"),
    ("fit run=x", "fit takes config=; to go on with a run: fit config=runs/x/config.yaml"),
    ("doctor now", "doctor takes no 'now'"),
    ("completion fish", "bash or zsh"),
    ("config diff quickstart", "takes two"),
    ("help learning_rate", "did you mean optim.lr?"),
    ("help mamba9", "did you mean mamba"),
    ("fit quickstart", "did you mean config=quickstart?"),
    ("fit config=quickstart trainer.max_steps=null", "trainer.max_steps: set it, or trainer.max_tokens"),
    ("fit config=quickstart --multirun", "nothing to combine"),
    ("fit config=quickstart seed=range(1000) --multirun", "at most 512"),
    ("fit config=quickstart seed=range(100) optim.lr=range(1,101) --multirun", "10000 combinations"),
    ("fit config=quickstart optim.lr=interval(0,1) --multirun", "interval()"),
    ("fit config=quickstart name=a,b --multirun", "name is the same for all arms"),
    ("fit config=quickstart model.layout=M4AM5,M4AX --multirun", "X is not one of the blocks"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_wrong_lines(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("error: ") and told.out == ""


def test_five_problems_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"optim.x{i}={i}" for i in range(8)]
    assert main(["fit", "config=quickstart", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[-1].strip() == "… and 3 more"


def test_a_missing_config_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    told = capsys.readouterr().err
    assert "granite_9to1" in told and "quickstart" in told and "more" not in told.splitlines()[-1]


class BackendError(RuntimeError):
    """As the kernels raise it."""


ENDINGS = [
    (UserError("a", "b"), 2, "error: a\n       b\n"),
    (NonFinite("layer 3"), 3, "error: layer 3\n"),
    (Lost("rank 1"), 4, "error: rank 1\n"),
    (OutOfMemory("device 0"), 5, "error: device 0\n"),
    (MemoryError(), 5, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "trainer.micro_batch=1"),
    (BackendError("triton cannot run"), 2, "error: triton cannot run\n"),
    (
        OSError(errno.ENOSPC, "No space left on device", "runs/x"),
        2,
        "error: runs/x: No space left on device\n",
    ),
    (KeyboardInterrupt(), 130, "interrupted"),
    (ZeroDivisionError("oh"), 1, "this is a bug in ssmtrain"),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDINGS, ids=lambda one: type(one).__name__)
def test_exit_codes(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert main(["fit"]) == code
    told = capsys.readouterr().err
    assert said in told
    assert ("Traceback" in told) == (code == 1)


def test_the_rooms_code_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_function", lambda target: lambda request: 75)
    assert main(["fit", "config=quickstart"]) == 75


def test_config_show_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["config", "show", "config=quickstart", "optim=muon", "seed=4"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    mine, given = load(["config=mine.yaml"]), load(["config=quickstart", "optim=muon", "seed=4"])
    assert mine == given
    changed = load(["config=mine.yaml", "seed=5"])
    assert changed.name != mine.name and changed.name.startswith("quickstart-")
    assert main(["config", "show", "config=quickstart", "name=kept", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "kept"


def test_config_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load(["config=quickstart", "optim.lr=0.25", "name=mine"])))
    for words in (["quickstart", "mine"], ["quickstart", "runs/mine"], ["config=quickstart", "run=mine"]):
        assert main(["config", "diff", *words]) == 0
        assert "optim.lr: " in (told := capsys.readouterr().out) and "-> 0.25" in told
    assert main(["config", "diff", "quickstart", "quickstart"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["config", "diff", "quickstart", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optim.lr"][1] == 0.25
    assert main(["config", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"quickstart", "jamba_mini"} <= {row["name"] for row in listed["recipes"]}
    assert all(row["description"] for row in listed["recipes"])
    assert listed["groups"]["optim"] == ["adamw", "muon"]
    assert main(["config", "schema"]) == 0
    for_editors = json.loads(capsys.readouterr().out)
    assert for_editors["properties"].keys() == schema_file.build()["properties"].keys()
    assert "defaults" in for_editors["properties"]
    assert '"required"' not in json.dumps(for_editors) and '"x-' not in json.dumps(for_editors)
    assert main(["config", "show", "run=mine"]) == 0
    assert load_run_config("mine").optim.lr == 0.25


def test_show_prints_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "config=quickstart", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layers"] == 10 and shown["params_total"] > 0
    assert main(["show", "config=quickstart"]) == 0
    assert "MMMM" in capsys.readouterr().out


def test_help_explains_everything() -> None:
    for verb in VERBS:
        assert VERBS[verb].summary in "\n".join(page(verb))
    for kind in {**mixer_kinds(), **ffn_kinds()}:
        text = "\n".join(page(kind))
        config = {**mixer_kinds(), **ffn_kinds()}[kind]
        for name, field in config.model_fields.items():
            assert name == "kind" or f"{name}: " in text
            assert name == "kind" or (field.description or "")[:30] in text
    assert "default 0.001" in "\n".join(page("optim.lr"))
    assert "(mamba2)" not in "\n".join(page("mamba2.d_state"))
    assert page("lr") and page("blocks") and page("model.blocks.<name>.mixer")
    for key in (
        "optim",
        "model",
        "trainer.precision",
        "schedule.warmup",
        "seed",
        "data.seq_len",
        "model.init.std",
    ):
        assert page(key)[0].startswith(f"{key}"), key


def test_help_of_a_kind_that_may_be_a_source_too_is_that_of_its_page() -> None:
    for kind in ("text", "mqar"):
        lines = page(kind)
        assert any(line.startswith("  seq_len: ") for line in lines)
        assert not any(line.startswith("  weight: ") for line in lines)
    assert "Share of the tokens" in "\n".join(page("mqar.weight"))
    assert " mqar, muon," in " ".join("\n".join(page("")).split())


def test_help_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "mamba2", "--json"]) == 0
    assert "d_state" in json.loads(capsys.readouterr().out)["mamba2"]["properties"]
    assert main(["help", "--json"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


def test_threads_do_not_spin_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmtrain import cli

    for ticks, expected in (([(0, 0), (10, 20)], "2000"), ([(0, 0), (19, 20)], None)):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        readings = iter(ticks)
        monkeypatch.setattr(cli, "_cpu_ticks", lambda readings=readings: next(readings))
        cli._share_the_cpu()
        assert os.environ.get("GOMP_SPINCOUNT") == expected
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    cli._share_the_cpu()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
