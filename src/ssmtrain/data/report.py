"""What was prepared, for people and for programs: the verb `prepare`."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.data.pack import count_rows
from ssmtrain.data.prepare import LIST, Prepared, prepare
from ssmtrain.data.sources import pages
from ssmtrain.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ssmtrain.config.request import Request
    from ssmtrain.config.schema import RunConfig


def command(request: Request) -> int:
    """`ssmtrain prepare config=…` (or run=…): make the prepared data, or find it, and say what it is."""
    config = request.config
    if request.run is not None:
        from ssmtrain.config.load import load_run_config

        config = load_run_config(request.run, request.overrides)
    if config is None:
        raise UserError("prepare: say which data with config=<recipe or page>", "ssmtrain config list")
    workers = request.words.get("workers")
    if workers is not None and not (workers.isascii() and workers.isdigit() and 0 < int(workers) <= 1024):
        raise UserError(f"workers={workers}: expected a whole number of processes from 1 to 1024")
    _show_log()
    began = time.perf_counter()
    processes = None if workers is None else int(workers)
    alone = {name: config.model_copy(update={"data": page}) for name, page in pages(config.data).items()}
    tokenizer = load_tokenizer(config.tokenizer, config.data)  # one for all sources
    found = {name: prepare(one, tokenizer, processes) for name, one in alone.items()}
    seconds = time.perf_counter() - began
    if request.as_json:
        told = {name: summary(prepared, config) for name, prepared in found.items()}
        report = told.get("", {"sources": told})
        print(json.dumps(report | {"seconds": round(seconds, 3)}, indent=2))
    else:
        for name, prepared in found.items():
            print("\n".join([*([f"source     {name}"] if name else []), describe(prepared, config)]))
        made = any(prepared.made for prepared in found.values())
        size = sum(split.bytes for prepared in found.values() for split in prepared.manifest.splits.values())
        speed = f", {size / seconds / 1e6:,.0f} MB of text a second" if made and seconds > 1 else ""
        print(f"{'prepared' if made else 'found ready'} in {seconds:.1f} s{speed}")
    return FINISHED


def _show_log() -> None:
    """Say on standard error what takes long and what is left out."""
    ours = logging.getLogger("ssmtrain")
    if not ours.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ssmtrain: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)


def summary(prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """Counts by split, and where the shards are, as plain JSON."""
    m, L = prepared.manifest, config.data.seq_len
    return {
        "folder": str(prepared.folder),
        "made": prepared.made,
        "source": m.label,
        "tokenizer": {"kind": config.tokenizer.kind, "vocab_size": m.vocab_size, "sha256": m.tokenizer},
        "seq_len": L,
        "sources": {"entries": m.sources.entries, "size": m.sources.size, "list": LIST},
        "splits": {
            name: {
                "documents": s.documents,
                "empty": s.empty,
                "duplicates": s.duplicates,
                "skipped": s.skipped,
                "bytes": s.bytes,
                "tokens": s.tokens,
                "bytes_per_token": round(s.bytes / s.tokens, 4),
                "rows": count_rows(s.tokens, L),
                "sha256": s.sha256,
            }
            for name, s in m.splits.items()
        },
    }


def describe(prepared: Prepared, config: RunConfig) -> str:
    """The same as a small table."""
    s = summary(prepared, config)
    rows, tokenizer = f"rows of {s['seq_len']}", s["tokenizer"]
    out = [
        f"data       {s['source']}, tokenizer {tokenizer['kind']} ({tokenizer['vocab_size']:,} ids)",
        f"folder     {s['folder']}",
        f"{'':10} {'documents':>10} {'bytes':>15} {'tokens':>15} {'bytes/token':>12} {rows:>14}",
    ]
    for name, split in s["splits"].items():
        out.append(
            f"{name:10} {split['documents']:>10,} {split['bytes']:>15,} {split['tokens']:>15,}"
            f" {split['bytes_per_token']:>12.2f} {split['rows']:>14,}"
        )
        reasons = {"empty": "empty", "duplicates": "duplicate", "skipped": "unreadable"}
        left = [f"{split[key]:,} {word}" for key, word in reasons.items() if split[key]]
        if left:
            out.append(f"{'':10} left out: {', '.join(left)} documents")
    return "\n".join(out)
