"""Every command in the README and the docs is a line that works: run in a short form, or checked to its end.

Training lines are cut to a step where the model is small; larger ones are composed, checked and drawn.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from ssmtrain import cli
from ssmtrain.checkpoint.runs import resolve
from ssmtrain.train.fit import fit
from ssmtrain.verbs import VERBS
from train.conftest import page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
SMALL = ("quickstart",)
"""Recipes of which a step takes a moment."""
ELSEWHERE = {"check resume", "check parallel", "completion"}
"""Verbs whose own tests run them; here their lines are checked up to the start."""


def blocks(text: str) -> Iterator[str]:
    """Fenced code that a shell would take: no other language than its own."""
    for language, body in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.M | re.S):
        if language in ("", "sh", "bash", "console"):
            yield body.replace("\\\n", " ")


def lines() -> list[tuple[str, str]]:
    """(page, line) of each command of ours: in blocks, and in quoted code that is a whole one."""
    found: list[tuple[str, str]] = []
    for file in PAGES:
        text = file.read_text()
        quoted = re.findall(r"`(ssmtrain [a-z]+ [^`…]*=[^`…]*)`", text)
        for line in [*(line for body in blocks(text) for line in body.splitlines()), *quoted]:
            line = re.sub(r"^\s*(?:\$ |[a-z ]{1,16}  )?(?:\.venv/bin/)?(?=(?:ssmtrain|make) )", "", line)
            if re.match(r"(ssmtrain|make) [a-z]", line) and "…" not in line:
                entry = (file.name, line.split("  #")[0].strip())
                if entry[1] not in [other for _, other in found]:
                    found.append(entry)
    return found


LINES = lines()


def test_the_pages_have_commands() -> None:
    assert len(LINES) > 25
    assert {"fit", "show", "generate", "eval"} <= {line.split()[1] for _, line in LINES}


@pytest.mark.parametrize("line", [line for _, line in LINES if line.startswith("make ")])
def test_targets_of_make_exist(line: str) -> None:
    assert [word for word in line.split()[1:] if "=" not in word and word not in TARGETS] == []


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands speak of: runs, texts."""
    folder = tmp_path_factory.mktemp("stage")
    config = page(
        folder,
        name="NAME",
        runs_dir="runs",
        schedule={"kind": "constant", "warmup": 2},
        ema={"decay": 0.5},
        trainer__max_steps=10,
        trainer__save_every=2,
        trainer__keep_last=9,
        trainer__val_every=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = resolve(config)
        try:
            assert fit(config, run) == 0
        finally:
            run.close()
    runs = folder / "runs"
    for name in ("quickstart-694809", "trunk", "mine", "one", "two", "lr-1e-3"):
        shutil.copytree(runs / "NAME", runs / name, symlinks=True)
    for place in ("", "my-texts", "path/to/texts", "better", "mine", "texts"):
        file = folder / place / "a.txt" if place else folder / "my.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("It is a truth universally acknowledged, that it is.\n" * 200)
    record = json.dumps({"body": "It is a truth.", "text": "It is a truth."}) + "\n"
    for name in ("owner/name/a.jsonl", "crawl/a.jsonl.zst"):
        (folder / name).parent.mkdir(parents=True)
        packed = name.endswith(".zst")
        text = (record * 200).encode()
        (folder / name).write_bytes(zstandard.compress(text) if packed else text)
    return folder


@pytest.mark.parametrize("line", [line for _, line in LINES if line.startswith("ssmtrain ")])
def test_lines_work(
    line: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stage, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(stage / "cache"))
    for name in ("SSMTRAIN_RUN", "SSMTRAIN_ORIGIN"):
        monkeypatch.delenv(name, raising=False)
    words = short(shlex.split(line.split(" > ")[0])[1:])
    code = cli.main(words)
    assert code == 0, f"{words}: {capfd.readouterr().err}"


def short(words: list[str]) -> list[str]:
    """The same line, as much of it as a test can take."""
    verb = max((v for v in VERBS if words[: len(v.split())] == v.split()), key=len)
    rest = [re.sub(r"@step-\d+", "@step-8", word) for word in words[len(verb.split()) :]]
    rest = [word.replace("<recipe>", "quickstart") for word in rest]
    rest = [re.sub(r"^step=\d+$", "step=10", word) for word in rest]
    rest = ["trainer.profile=2:3" if word.startswith("trainer.profile=") else word for word in rest]
    rest = ["it" if before == "--find" else word for before, word in zip(["", *rest], rest)]
    rest = [re.sub(r"^tokenizer.vocab_size=\d+$", "tokenizer.vocab_size=260", word) for word in rest]
    several = any("," in word or word.startswith("trainer.devices=") for word in rest)
    config = next((word.partition("=")[2] for word in rest if word.startswith("config=")), "")
    if verb == "launch slurm":
        kept = [word for word in rest if "," not in word and word not in ("--dry-run", "--multirun")]
        return [*verb.split(), "--dry-run", *kept]
    if verb == "fit" and not several and (config in SMALL or "runs/" in config or not config):
        kept = [word for word in rest if not word.startswith("trainer.max")]
        began = any(word.startswith("from=") for word in rest) or "runs/" in config
        kept.append(f"trainer.max_steps={11 if began else 3}")
        tiny = (
            ["trainer.global_batch=512", "data.seq_len=64", "generate.max_tokens=4"]
            if config in SMALL
            else []
        )
        if tiny and not any(word.startswith("data=") for word in rest):
            tiny += ["data=text", "data.train=my.txt"]
        own = {word.partition("=")[0] for word in tiny} - {"data"}
        kept = [f"{word}-new" if word.startswith("name=") else word for word in kept]
        return ["fit", *(word for word in kept if word.partition("=")[0] not in own), *tiny]
    lengths = [word for word in rest if word.startswith("data.val_lengths=")]
    if verb == "eval" and lengths:  # of a run on a task, which takes a minute to make
        return ["show", "config=recall", *lengths]
    if verb in ELSEWHERE or verb == "fit":
        return ["show", *(word for word in rest if "," not in word and not word.startswith("--"))]
    return [*verb.split(), *rest]
