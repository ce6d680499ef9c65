"""The end of a finished run: whole validation, report, status. A run that stops early has none of it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ssmtrain.checkpoint.runs import Run
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.parallel import ranks
from ssmtrain.train import report
from ssmtrain.train.callbacks.checks import Checks
from ssmtrain.train.callbacks.samples import draw
from ssmtrain.train.callbacks.validation import first_rows, lengths, note, validate
from ssmtrain.train.curve import last_loss, read
from ssmtrain.train.module import LitLM

SAMPLE_TOKENS = 400


class Ending(Callback):
    """Runs after the last step of a finished run; must stand after Saving."""

    def __init__(self, run: Run, tokenizer: Tokenizer, params: int, checks: Checks) -> None:
        self.run, self.tokenizer, self.params, self.checks = run, tokenizer, params, checks
        self.text = ""
        """What the console shows at the very end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Validate on the whole split, write the report, mark the run as finished."""
        lit: LitLM = pl_module
        if lit.stop != "finished":
            return
        val = note(lit, validate(lit), lengths(lit))
        self.compare(lit)
        checks = self.checks.score(lit, list(self.checks.checks))
        tokens = min(SAMPLE_TOKENS, max(lit.config.generate.max_tokens, 1))
        with lit.clock("sample"):
            text = draw(lit, self.tokenizer, tokens)
        if ranks.rank():
            return
        figures = self.figures(lit, val) | {"checks": checks}
        figures["yardsticks"] = report.measure(lit.config, lit.text.meta["val"]["bytes"])
        self.text = report.write(self.run, figures, text)
        self.run.mark("finished", lit.state.step, lit.state.tokens)

    def compare(self, lit: LitLM) -> None:
        """Score the last step on the text of the earlier validations too, so that the best can be told."""
        page = lit.config.trainer
        if page.val_every and page.val_tokens:
            score = validate(lit, first_rows(lit))
            lit.journal.write("best", lit.state.step, loss=score.loss, labels=score.labels)

    def figures(self, lit: LitLM, val: dict[str, Any]) -> dict[str, Any]:
        """What report.json says."""
        state, spent = lit.state, lit.clock.spent
        train, _ = read(self.run.metrics)
        busy = spent["step"] + spent["data"]
        return {
            "name": self.run.name,
            "val_loss": val["loss"],
            "val_bpb": val.get("bpb"),
            "val_perplexity": val["perplexity"],
            "val_accuracy": val.get("accuracy"),
            "val_row_accuracy": val.get("row_accuracy"),
            "val_lengths": val.get("lengths", {}),
            "val_rows": lit.text.meta["val"]["rows"],
            "val_bytes": lit.text.meta["val"]["bytes"],
            "val_sets": {name: val[name] for name in lit.text.sets},
            "best_val_loss": state.best_val,
            "best_val_step": state.best_step,
            "train_loss": last_loss(self.run.metrics),
            "train_bpb": train[-1][1] if train and "bpb" in val else None,
            "tokens_per_s": lit.tokens_here / busy if busy else 0.0,
            "params": self.params,
            "steps": state.step,
            "tokens": state.tokens,
            "nonfinite": state.nonfinite,
            "spikes": state.spikes,
            "rollbacks": state.rollbacks,
            "seconds": lit.clock.total,
            "time": lit.clock.split(),
            "goodput": lit.attempts.account() if lit.attempts else None,
        }
