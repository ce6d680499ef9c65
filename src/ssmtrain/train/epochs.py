"""How often a run reads each source of a mixture, and whether that is more often than it may."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmtrain.config.errors import UserError
from ssmtrain.data.mixture import Mixture

if TYPE_CHECKING:
    from ssmtrain.train.module import LitLM


def refuse_rereading(lit: LitLM) -> None:
    """UserError when a source would be read more often than its max_epochs until the run's end."""
    data, mixture = lit.config.data, lit.text.train
    if data.kind != "mix" or not isinstance(mixture, Mixture):
        return
    rows = lit.state.rows + lit.horizon.left(lit.state.step)[0] // data.seq_len
    given, wrong = mixture.given(rows), []
    for name, source in data.sources.items():
        one = mixture.sources[name].per_epoch
        most = None if source.max_epochs is None else source.max_epochs * one
        if most is not None and given[name] > most:
            wrong.append(
                f"data.sources.{name}.max_epochs = {source.max_epochs}: the run would read it "
                f"{given[name] / one:.2f} times, {given[name]:,} of its {one:,} rows; its share may be "
                f"{most / rows:.3g} of the run's {rows:,} rows"
            )
    if wrong:
        raise UserError(
            *wrong,
            "give it less weight (later on with data.phases), raise max_epochs, or end sooner",
        )
