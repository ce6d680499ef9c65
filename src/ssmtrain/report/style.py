"""The page's style: one column on a phone, two on a screen; light or dark as the reader has it."""

from __future__ import annotations

from ssmtrain.report.plot import COLOURS

DARK = ("#7fb0ff", "#ffa05c", "#6bd79a", "#ff8fcf", "#b9a3ff", "#e0c34a", "#5fd6df", "#ff8f87")
"""COLOURS on a dark screen."""


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


CSS = (
    ":root{color-scheme:light dark;--back:#fff;--ink:#1a1c1f;--soft:#5b6068;--line:#d9dce1;--card:#f6f7f9;"
    + _variables(COLOURS)
    + "}@media(prefers-color-scheme:dark){:root{--back:#15171a;--ink:#e8eaed;--soft:#a2a8b1;--line:#363b42;"
    "--card:#1e2125;" + _variables(DARK) + "}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1rem;background:var(--back);color:var(--ink);
 font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .5rem}
p{margin:.5rem 0}.soft{color:var(--soft)}
a{color:var(--c0)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
 min-width:0}
figure svg{display:block;width:100%;height:auto;font-family:system-ui,sans-serif}
figcaption{font-size:.875rem;color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.25rem 0 0;padding:0}
.swatch{display:inline-block;width:1.2em;height:0;border-top:.25em solid;vertical-align:middle;
 margin-right:.4em}
.dots{border-top-style:dotted}.dashed{border-top-style:dashed}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .75rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;
 white-space:nowrap}
th:first-child,td.left,th.left{text-align:left}
caption{text-align:left;color:var(--soft)}
pre{white-space:pre-wrap;padding:.75rem;background:var(--card);border:1px solid var(--line);
 border-radius:.5rem;font-size:.85rem;margin:.5rem 0}
.bar{display:flex;height:1.25rem;border-radius:.25rem;overflow:hidden;background:var(--line)}
.bar span{display:block;height:100%}
summary{cursor:pointer;padding:.25rem 0}
@media print{figure{break-inside:avoid}}
"""
)
