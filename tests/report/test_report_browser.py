"""The page in a browser without a network: it fits a phone, loads nothing, complains of nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from report.test_report_page import full
from runs.conftest import MakeRun
from ssmtrain.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = 360

FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe id="page" src="{page}" style="border:0;width:{width}px;height:800px"></iframe>
<script>
onload = () => {{
  const root = document.getElementById("page").contentDocument.documentElement;
  const wide = [...root.querySelectorAll("*")].filter(
    one => !one.closest(".wide, svg") && one.getBoundingClientRect().right > {width} + 1);
  document.title = "inner " + root.clientWidth + " scroll " + root.scrollWidth + " wide " + wide.length
    + " charts " + root.querySelectorAll("figure svg").length
    + " ink " + getComputedStyle(root.querySelector("body")).color;
  document.body.append(root.innerText);
}};
</script></body></html>"""
"""A window of a phone's width, which headless browsers do not have; our page inside runs no script."""


def _browse(page: Path, home: Path) -> tuple[str, str]:
    """The page's elements after loading, and what the browser said."""
    assert CHROMIUM is not None
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    line += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--proxy-server=127.0.0.1:1",
        "--disable-background-networking",
    ]
    line += ["--allow-file-access-from-files", f"--user-data-dir={home}", "--no-first-run"]
    line += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_fits_a_phone(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("a" * 90, records=full(9), words=("optim.lr=0.25",))
    make_run("b", records=full(12))
    assert main(["report", "a*", "b", "out=page.html"]) == 0
    (tmp_path / "frame.html").write_text(FRAME.format(page="page.html", width=PHONE))
    shown, said = _browse(tmp_path / "frame.html", tmp_path / "home")
    title = re.search(r"<title>inner (\d+) scroll (\d+) wide (\d+) charts (\d+) ink ([^<]*)</title>", shown)
    assert title is not None, shown[:500]
    inner, scroll, wide, charts = map(int, title.groups()[:4])
    assert PHONE - 20 <= inner <= PHONE and scroll <= inner and wide == 0
    assert charts > 10 and title[5] == "rgb(26, 28, 31)"  # the style is applied, and nothing forbade it
    assert "Bits per byte against training FLOPs" in shown and "What sets the runs apart" in shown
    assert "CONSOLE" not in said
