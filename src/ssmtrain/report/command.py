"""`report`: reads the runs, draws the charts, writes the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.report.charts import sections
from ssmtrain.report.gather import gather
from ssmtrain.report.page import page
from ssmtrain.report.plot import png
from ssmtrain.report.work import count
from ssmtrain.runs.find import RUNS_DIR, known, named
from ssmtrain.runs.words import size

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

NAME = "report.html"
BUCKETS = 1000
"""Of a curve of a single run; those of several share them."""
FEWEST = 40


def command(request: Request) -> int:
    """Write one page about a run, or about several beside each other, and say where it is."""
    runs_dir = Path(request.words.get("runs_dir", RUNS_DIR))
    folders = named(request.overrides, runs_dir)
    if not folders:
        raise UserError("report needs a run: ssmtrain report <name or folder> …", known(runs_dir))
    out = destination(request.words.get("out"), folders)
    buckets = max(FEWEST, BUCKETS // len(folders))
    told = [gather(folder, runs_dir, buckets, count) for folder in folders]
    found = sections(told)
    content = page(told, found, time.time()).encode("utf-8", "replace")
    replace_file(out, content)
    print(f"{out} ({size(len(content))}): open it in a browser; it needs no network")
    if request.flags.get("png"):
        for chart in (chart for section in found for chart in section.charts):
            file = out.with_name(f"{out.stem}-{chart.key}.png")
            replace_file(file, png(chart))
            print(file)
    return FINISHED


def destination(out: str | None, folders: list[Path]) -> Path:
    """Where the page goes: into the run, of several into the current folder; UserError for another place."""
    if out is None:
        return folders[0] / NAME if len(folders) == 1 else Path(NAME)
    path = Path(out).expanduser()
    if path.is_dir():
        path = path / NAME
    if path.suffix != ".html":
        raise UserError(f"out={out}: expected a name that ends in .html, or a folder", f"out={out}.html")
    if not path.parent.is_dir():
        raise UserError(f"out={out}: there is no folder {path.parent}", f"mkdir -p {path.parent}")
    return path
