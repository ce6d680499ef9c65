"""Tasks and text files that are scored beside the validation, each every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from ssmtrain.data.module import text_rows
from ssmtrain.data.tasks.source import check_rows
from ssmtrain.eval.texts import read_text
from ssmtrain.train.module import LitLM
from ssmtrain.train.scoring import Text, figures, score

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig
    from ssmtrain.data.mixture import Ordered
    from ssmtrain.data.tokenizer import Tokenizer

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Opened:
    """A check whose rows are at hand."""

    every: int
    rows: Ordered
    max_rows: int | None
    text: Text | None


def open_checks(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Opened]:
    """The config's checks, their files read; UserError when one cannot be."""
    found = {}
    for name, check in config.checks.items():
        if check.kind == "file":
            text = read_text(check.path, f"checks.{name}.path")
            rows = text_rows([text], tokenizer, check.seq_len or config.data.seq_len)
            size = Text(rows.stream.tokens, len(text.encode()))
            found[name] = Opened(check.every, rows, check.rows, size)
        else:
            found[name] = Opened(check.every, check_rows(check), None, None)
    return found


class Checks(Callback):
    """Scores each check where its steps are due, and all of them at the end of a finished run."""

    def __init__(self, checks: dict[str, Opened]) -> None:
        self.checks = checks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Score what is due where the run goes on."""
        lit: LitLM = pl_module
        if not lit.stop:
            self.score(lit, [name for name, one in self.checks.items() if lit.state.step % one.every == 0])

    def score(self, lit: LitLM, names: list[str]) -> Figures:
        """Score and record some checks, on all ranks together."""
        found: Figures = {}
        for name in names:
            one = self.checks[name]
            found[name] = figures(score(lit, one.rows, one.max_rows), one.text)
        if found:
            lit.journal.write("check", lit.state.step, **found)
        return found
