"""The page itself: plain HTML around the charts; every text of a run is escaped and free of secrets."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from ssmtrain.config.redact import redact
from ssmtrain.report.charts import Section
from ssmtrain.report.gather import Told
from ssmtrain.report.plot import COLOURS, Chart, short, svg
from ssmtrain.report.style import CSS
from ssmtrain.runs.diff import changed, value
from ssmtrain.runs.show import short as in_short
from ssmtrain.runs.words import number, speed
from ssmtrain.train.attempts import PARTS
from ssmtrain.train.attempts import line as in_words
from ssmtrain.train.callbacks.words import duration, si

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser may load for this page: nothing. Nor does it run any script in it."""
MOST_NAMED = 12
"""Lines of a chart that are named below it and in its alternative text."""


def text(of: object) -> str:
    """Any value as text of the page."""
    return html.escape(redact("".join(c if c.isprintable() or c == "\n" else " " for c in str(of))))


def page(runs: Sequence[Told], found: Sequence[Section], made: float) -> str:
    """The whole page."""
    names = ", ".join(run.run.name for run in runs[:4]) + (
        f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    )
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(names)}: training report</title>",
        f"<style>{CSS}</style></head><body>",
        f"<header><h1>{text(names)}</h1>",
        f'<p class="soft">{len(runs)} run{"" if len(runs) == 1 else "s"}, as of {text(when)}</p></header>',
        "<main>",
        _results(runs),
        *(_section(section) for section in found),
        *([] if found else ["<p>Nothing was recorded yet.</p>"]),
        _time(runs),
        _config(runs),
        _samples(runs),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def alternative(chart: Chart) -> str:
    """A chart in words: of each line where it begins and ends, and its lowest value."""
    told = [f"{chart.title}."]
    for one in chart.series[:MOST_NAMED]:
        if one.points:
            (x0, first), (x1, last) = one.points[0], one.points[-1]
            lowest = min(y for _, y in one.points)
            ends = f"{first:.4g} at {short(x0)} to {last:.4g} at {short(x1)} {chart.x}"
            told.append(f"{one.name}: {ends}, lowest {lowest:.4g}.")
    if len(chart.series) > MOST_NAMED:
        told.append(f"And {len(chart.series) - MOST_NAMED} more lines.")
    return " ".join(told)


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself; the first row and column are headings. Cells are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows[1:]
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _results(runs: Sequence[Told]) -> str:
    head = ["run", "state", "step", "tokens", "parameters", "loss", "validation loss", "bits per byte"]
    rows = [[*head, "tokens/s", "time", "goodput"]]
    for index, told in enumerate(runs):
        run = told.run
        swatch = _swatch(index) if len(runs) > 1 else ""
        good = f"{100 * told.goodput['goodput']:.1f} %" if told.goodput else "-"
        step = f"{run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")
        cells = [run.state, step, si(run.tokens), f"{told.params:,}" if told.params else "-"]
        cells += [number(run.loss), number(run.val_loss), number(run.val_bpb), speed(run.tokens_per_s)]
        cells += [duration(told.seconds) if told.seconds else "-", good]
        rows.append([swatch + text(run.name), *map(text, cells)])
    notes = [
        f"<p>{text(told.run.name)}: {text(told.run.state)}{text(f', {told.run.why}') if told.run.why else ''}"
        f"{text(f'; {told.skipped:,} steps skipped as not finite') if told.skipped else ''}</p>"
        for told in runs
        if told.run.state in ("failed", "stalled", "killed", "stopped") or told.skipped
    ]
    told_all = table("Where each run stands", rows) + "".join(notes[:MOST_NAMED])
    return f"<section><h2>Results</h2>{told_all}</section>"


def _section(section: Section) -> str:
    charts = "".join(_figure(chart) for chart in section.charts)
    return f'<section><h2>{text(section.title)}</h2><div class="charts">{charts}</div></section>'


def _figure(chart: Chart) -> str:
    named = [one for one in chart.series if one.points]
    legend = ""
    if 1 < len(named) <= MOST_NAMED:
        items = "".join(f"<li>{_swatch(one.colour, one.dots)}{text(one.name)}</li>" for one in named)
        legend = f'<ul class="legend">{items}</ul>'
    elif len(named) > MOST_NAMED:
        legend = "<p>Colours as in the table of results.</p>"
    return (
        f'<figure><h3>{text(chart.title)}</h3><div role="img" aria-label="{text(alternative(chart))}">'
        f"{svg(chart)}</div><figcaption>{legend}</figcaption></figure>"
    )


def _swatch(colour: int, dots: bool = False) -> str:
    kind = " dots" if dots else " dashed" if colour >= len(COLOURS) else ""
    hue = f"var(--c{colour % len(COLOURS)})"
    return f'<span class="swatch{kind}" style="border-color:{hue}"></span>'


def _time(runs: Sequence[Told]) -> str:
    parts = {"productive": "training", **PARTS}
    known = [told for told in runs if told.goodput and told.goodput["seconds"]]
    if not known:
        return ""
    bars = []
    for told in known[:MOST_NAMED]:
        assert told.goodput is not None
        said, total = in_words(told.goodput), told.goodput["seconds"]
        pieces = "".join(
            f'<span style="width:{100 * told.goodput["time"][part] / total:.3f}%;'
            f'background:var(--c{index % len(COLOURS)})"></span>'
            for index, part in enumerate(parts)
        )
        bars.append(
            f"<p>{text(told.run.name)}: {text(said)}</p>"
            f'<div class="bar" role="img" aria-label="{text(said)}">{pieces}</div>'
        )
    legend = "".join(f"<li>{_swatch(index)}{text(name)}</li>" for index, name in enumerate(parts.values()))
    return f'<section><h2>Where the time went</h2>{"".join(bars)}<ul class="legend">{legend}</ul></section>'


def _config(runs: Sequence[Told]) -> str:
    found = ["<section><h2>Config</h2>"]
    if len(runs) > 1:
        keys = changed([told.page for told in runs])
        rows = [["key", *(text(told.run.name) for told in runs)]]
        rows += [[text(key), *(text(value(one)) for one in values)] for key, values in keys.items()]
        found.append(table("What sets the runs apart", rows) if keys else "<p>The configs do not differ.</p>")
    for told in runs[:MOST_NAMED]:
        brief = [["setting", "value"], *([text(key), text(of)] for key, of in in_short(told.page).items())]
        shares = _shares(told.page)
        if len(runs) == 1:
            found.append(table("In short", brief).replace("<td>", '<td class="left">'))
            found.append(shares)
        whole = text(_yaml(told.page)) or "not readable"
        summary = f"<summary>The whole config of {text(told.run.name)}</summary>"
        found.append(f"<details>{summary}<pre>{whole}</pre></details>")
    return "".join([*found, "</section>"])


def _shares(config: dict[str, Any]) -> str:
    """The sources of a mixture and their shares, where the config has some."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, dict) or not sources:
        return ""
    weights = {str(name): one.get("weight", 1.0) for name, one in sources.items() if isinstance(one, dict)}
    known = {name: float(one) for name, one in weights.items() if isinstance(one, (int, float)) and one >= 0}
    total = sum(known.values())
    if not total:
        return ""
    rows = [["source", "share of the tokens"]]
    rows += [[text(name), f"{100 * one / total:.1f} %"] for name, one in known.items()]
    return table("Mixture of the data, as the run begins", rows)


def _samples(runs: Sequence[Told]) -> str:
    found = []
    for told in runs[:MOST_NAMED]:
        samples = told.samples if len(runs) == 1 else told.samples[-1:]
        name = "" if len(runs) == 1 else f"{told.run.name}, "
        found += [
            f"<h3>{text(name)}step {step:,}</h3><pre>{text(said)}</pre>" for step, said in samples if said
        ]
    return f"<section><h2>Samples</h2>{''.join(found)}</section>" if found else ""


def _yaml(config: dict[str, Any], depth: int = 0) -> str:
    """A config as its file has it."""
    lines = []
    for key, of in config.items():
        if isinstance(of, dict) and of:
            lines += [f"{'  ' * depth}{key}:", _yaml(of, depth + 1)]
        else:
            shown = "null" if of is None else str(of).lower() if isinstance(of, bool) else of
            lines.append(f"{'  ' * depth}{key}: {shown}")
    return "\n".join(lines)
