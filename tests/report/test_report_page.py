"""The page: what is on it, that it needs nothing else, that no run can put code or secrets in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from runs.conftest import MakeRun, train_record, val_record
from ssmtrain.cli import main

VOID = {"meta", "br", "img", "hr", "link", "input"}
EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">"\'&$\\mathbf{x}$'


class Page(HTMLParser):
    """Reads a page and remembers its elements, its text and what it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    """The page at a path, each element closed and nothing loaded from elsewhere."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith("#"), (tag, key, value)
        assert not re.search(r"url\((?!#)", value) and "javascript:" not in value
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert "default-src 'none'" in source
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, key, value in page.attributes if key == "href"]
    targets += re.findall(r"url\(#([^)]*)\)", source)
    assert targets and set(targets) <= set(ids)
    return page


def full(steps: int) -> list[dict[str, Any]]:
    """Records of every kind, those of mixtures and of several validation sets too."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append(train_record(step, aux={"balance": 0.1}, mixture={"web": 0.7, "code": 0.3}, mfu=0.4))
        if step % 3 == 0:
            found.append(val_record(step, 4.0 / step**0.2) | {"web": {"loss": 2.0, "bpb": 1.5 + 1 / step}})
            layers = {"mamba2": {"state_max": 1.0 * step, "dt_min": 1e-4, "dt_max": 0.1, "dt_clamped": 0.0}}
            norms = {"mamba2": 0.5, "attention": 1e-4}
            found.append({"kind": "health", "step": step, "grad_norm": norms, "layers": layers})
            found.append({"kind": "sample", "step": step, "text": f"It is sample {step}\nof it"})
    return found


def test_the_page_of_a_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("mine", 9, "finished", "finished", full(9))
    (folder / "report.json").write_text('{"yardsticks": {"gzip": 2.9}, "params": 956848}')
    (folder / "report.md").write_text("# mine\n\n## Sample\n\n> The last\n> words\n\n## Next\n")
    assert main(["report", "mine"]) == 0
    assert "runs/mine/report.html" in capsys.readouterr().out
    page = read(folder / "report.html")
    for said in (
        *(
            "Bits per byte against tokens",
            "Bits per byte against time",
            "Bits per byte against training FLOPs",
        ),
        *("Learning rate", "Norm of the gradient", "Speed", "Share of the peak", "validation: web", "gzip"),
        *("Health of the layers", "mamba2, state", "mamba2, dt clamped", "mixture", "code", "balance"),
        *("Where the time went", "goodput: 66.7 % of 12 s in 1 start", "The whole config of mine"),
        *("d_state: 32", "It is sample 3\nof it", "The last\nwords", "956,848", "9 of 20", "finished"),
    ):
        assert said in page.text, said
    labels = [value for _, key, value in page.attributes if key == "aria-label"]
    charts = page.tags.count("figure")
    pictures = [key for _, key, value in page.attributes if (key, value) == ("role", "img")]
    assert charts == page.tags.count("svg") == len(pictures) - 1  # and the bar of the time
    assert (
        "Bits per byte against tokens. training: 7.246 at 2.048k to 4.67 at 18.43k tokens, lowest 4.67."
        in next(label for label in labels if label.startswith("Bits"))
    )
    assert ("html", "lang", "en") in page.attributes and page.tags.count("title") == 1
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    style = (folder / "report.html").read_text()
    assert "prefers-color-scheme:dark" in style and "currentColor" in style and "var(--c1)" in style
    assert "#010203" not in style and "$" not in style


def test_several_runs_over_each_other(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run("a", records=full(2), words=("optim.lr=0.25",))
    make_run("b", records=full(2), end="failed: NonFinite: layer 3")
    assert main(["report", "a", "run=b", "--png"]) == 0
    page = read(tmp_path / "report.html")
    for said in ("a and b", "a, b", "What sets the runs apart", "optim.lr", "0.25", "0.004", "a, training"):
        assert (said in page.text) == (said != "a and b"), said
    assert "failed, NonFinite: layer 3" in page.text
    pictures = sorted(path.name for path in tmp_path.glob("report-*.png"))
    assert "report-loss-flops.png" in pictures and len(pictures) == page.tags.count("figure")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_no_run_puts_code_in_the_page(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "s3cret-of-the-environment")
    secret = "hf_" + "a" * 24
    records = [
        train_record(1, mixture={EVIL: 1.0, "w" + EVIL: 2.0}),
        {"kind": "sample", "step": 1, "text": f"{EVIL} token={secret} s3cret-of-the-environment \x1b]0;\x07"},
        {**val_record(1, 2.0), EVIL: {"bpb": 2.0, EVIL: 3.0}},
        {"kind": "health", "step": 1, "layers": {EVIL: {EVIL: 1.0}}, EVIL: 1.0, "figures": {secret: 1.0}},
    ]
    folder = make_run("mine", records=records, end=f"failed: {EVIL}")
    (folder / "report.json").write_text('{"yardsticks": {"$x^2$<script>": 1.0}}')
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"'{EVIL.replace(chr(39), '')}': 1\npassword: hunter2hunter2\n{text}")
    odd = folder.with_name(f"<b>odd$x${secret}")
    folder.rename(odd)
    assert main(["report", str(odd), "out=page.html"]) == 0
    page = read(Path("page.html"))
    assert EVIL in page.text and "<b>odd$x$[redacted]" in page.text and "$x^2$<script>" in page.text
    source = Path("page.html").read_text()
    for hidden in (
        secret,
        "s3cret-of-the-environment",
        "hunter2hunter2",
        "\x1b",
        "<script",
        "<b>",
        'onerror="a',
    ):
        assert hidden not in source, hidden
    make_run("fine")
    assert main(["report", str(odd), "fine", "out=both.html"]) == 0
    read(Path("both.html"))
    assert secret not in Path("both.html").read_text()


def test_damaged_and_young_runs_have_a_page(make_run: MakeRun, dead_owner: str) -> None:
    torn = make_run("torn", 3, end=None)
    (torn / "lock").write_text(dead_owner)
    with (torn / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\x00[]\n{"kind": "train", "step": 4, "loss": NaN, "bpb": null, "lr": "x", "tokens": []}\n'
        )
        file.write(b'{"kind": "train", "step": "5"}\n{"kind": "sample", "step": 5, "text": 7}\n{"kind": "tra')
    empty = make_run("empty")
    for file_ in empty.iterdir():
        if file_.is_file():
            file_.write_bytes(b"")
    (empty / "report.json").write_text("[1]")
    young = make_run("young", 0, records=[], end=None)
    (young / "attempts.jsonl").unlink()
    for folder in (torn, empty, young):
        assert main(["report", str(folder)]) == 0
    assert "killed" in read(torn / "report.html").text
    assert "3 of 20" in read(torn / "report.html").text
    for folder in (empty, young):
        source = (folder / "report.html").read_text()
        assert "Nothing was recorded yet" in source and "<svg" not in source
    assert main(["report", "torn", "empty", "young"]) == 0


def test_a_loss_without_bytes_is_in_nats(make_run: MakeRun) -> None:
    records = [train_record(1), train_record(2), val_record(2, 1.0) | {"accuracy": 0.5}]
    for record in records:
        del record["bpb"]
    folder = make_run("mine", records=records)
    assert main(["report", "mine"]) == 0
    said = read(folder / "report.html").text
    assert "Loss (nats per token) against tokens" in said and "accuracy" in said


def test_wrong_lines_say_what_to_type(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("mine")
    for words, said in (
        ([], "report needs a run: ssmtrain report <name or folder>"),
        (["mien"], "runs in runs: mine"),
        (["mine", "out=page.pdf"], "expected a name that ends in .html"),
        (["mine", "out=nowhere/page.html"], "there is no folder nowhere"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", "mine"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
