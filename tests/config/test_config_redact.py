"""Secrets do not get out: by their look, their name or the environment, whatever writes and wherever to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssmtrain import cli
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load
from ssmtrain.config.redact import MARK, environment_secrets, redact, redact_logging, redacted
from ssmtrain.train.callbacks import wandb_log
from ssmtrain.train.journal import Journal, JsonLines
from train.conftest import page

SECRET = "hunter2-of-the-cluster"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


@pytest.fixture
def logging_redacted() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    redact_logging()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize(
    "text",
    [
        f"key {SECRET} rejected",
        f"https://user:{SECRET}@host/x",
        "https://user:pw@host/x",
        "hf_abcdefghijklmnopqrstuv",
        "sk-proj-abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrst and AKIAABCDEFGHIJKLMNOP",
        f"eyJ{'a' * 10}.eyJ{'b' * 10}.{'c' * 20}",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "Authorization: Bearer abcdefgh12345",
        "logger.password='hunter2",
        "wandb_api_key=hunter2, next",
        '{"api_key": "hunter2"}',
        "AWS_SECRET_ACCESS_KEY=hunter2",
    ],
)
def test_secrets_are_taken_out(text: str) -> None:
    clean = redact(text)
    assert MARK in clean
    for part in (
        SECRET,
        "hunter2",
        ":pw@",
        "hf_abc",
        "sk-proj",
        "ghp_",
        "AKIAABC",
        "eyJ",
        "BEGIN",
        "abcdefgh1",
    ):
        assert part not in clean, clean


@pytest.mark.parametrize(
    "text",
    [
        "step 100 loss 1.7622 12,345 tokens/s",
        "generate.max_tokens=256 tokenizer.kind=bytes",
        "the key optim.lr: expected a number above 0",
        "runs/tiny/checkpoints/step-00000100 sha256 0123456789abcdef0123",
        "http://host:29500/x and git@github.com:owner/name",
        "a secret garden, and the passwords of the past",
        "tokenizer.end_of_text: it has no token '<eos>'",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_what_counts_as_a_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {
        "HF_TOKEN": "abc12345x",
        "MY_SECRET_THING": "abc12345y",
        "APIKEY": "abc12345z",
        "DB_PASSWORD": "abc12345w",
        "SHORT_KEY": "abc1",  # shorter than any password worth the name, and likely to be a word
        "AUTH_MODE": "disabled",
        "SSH_AUTH_SOCK": str(tmp_path),
        "COMPASS": "abc12345v",
        "GIT_AUTHOR_NAME": "abc12345u",
        "KEYBOARD": "abc12345t",
    }
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    found = environment_secrets()
    assert {"abc12345x", "abc12345y", "abc12345z", "abc12345w", SECRET} <= set(found)
    assert not {"abc1", "disabled", str(tmp_path), "abc12345v", "abc12345u", "abc12345t"} & set(found)


def test_containers_keep_their_shape() -> None:
    tree: dict[str, Any] = {
        "a": [1, f"x {SECRET}", None],
        "password": "hunter2",
        "n_token": 5,
        "b": {"c": True},
    }
    assert redacted(tree) == {"a": [1, f"x {MARK}", None], "password": MARK, "n_token": 5, "b": {"c": 1}}


def test_a_config_with_the_environments_secret_is_refused_unnamed() -> None:
    with pytest.raises(UserError) as error:
        load(["config=quickstart", f"generate.prompt={SECRET}"])
    assert "generate.prompt: this is a secret in the environment" in error.value.lines[0]
    assert SECRET not in str(error.value)


def test_every_log_is_redacted(logging_redacted: None, caplog: pytest.LogCaptureFixture) -> None:
    redact_logging()
    for name in ("ssmtrain.train", "wandb", "some.library"):
        logging.getLogger(name).warning("login of %s failed", SECRET)
        try:
            raise ConnectionError(f"401 for {SECRET}")
        except ConnectionError:
            logging.getLogger(name).exception("no page")
    logging.getLogger("ssmtrain").warning("%d steps", 5)
    assert SECRET not in caplog.text and caplog.text.count(MARK) == 6
    assert "ConnectionError: 401 for" in caplog.text and "5 steps" in caplog.text


def test_errors_and_tracebacks_are_redacted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = [UserError(f"no {SECRET}", details=[f"but {SECRET}"]), ZeroDivisionError(SECRET)]

    def fail(args: list[str]) -> int:
        raise endings[int(args[0])]

    monkeypatch.setattr(cli, "run", fail)
    for number in ("0", "1"):
        cli.main([number])
        told = capsys.readouterr().err
        assert SECRET not in told and MARK in told


def test_records_are_redacted_before_any_sink(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Sink:
        write, close = seen.append, lambda self: None

    journal = Journal()
    journal.sinks = [Sink(), JsonLines(tmp_path / "metrics.jsonl")]
    journal.write("sample", 1, text=f"it is {SECRET}", loss=1.0)
    journal.close()
    assert seen == [{"kind": "sample", "step": 1, "text": f"it is {MARK}", "loss": 1.0}]
    assert SECRET not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "metrics.jsonl").stat().st_mode & 0o777 == 0o600


def test_tracked_configs_and_refusals_are_redacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A config made in Python has passed no check: what wandb is given is redacted all the same."""
    import wandb

    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        raise ConnectionError(f"the key {SECRET} is not valid")

    monkeypatch.setattr(wandb, "init", init)
    config = page(tmp_path, logger={"kind": "wandb"}, generate={"prompt": f"say {SECRET}"})
    assert wandb_log.open_wandb(config.logger, config, "tiny", tmp_path) is None
    assert asked["config"]["generate"]["prompt"] == f"say {MARK}" and SECRET not in str(asked["config"])
    assert asked["settings"].disable_git and asked["settings"].disable_code
    assert SECRET not in str(asked["settings"]) and SECRET not in caplog.text and MARK in caplog.text


def test_the_page_that_a_run_keeps_has_no_environment(tmp_path: Path) -> None:
    from ssmtrain.checkpoint.runs import resolve

    run = resolve(page(tmp_path))
    run.close()
    text = "".join(path.read_text() for path in run.folder.rglob("*") if path.is_file())
    assert SECRET not in text
