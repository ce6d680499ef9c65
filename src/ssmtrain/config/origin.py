"""Where a run came from: a checkpoint of another run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssmtrain.config.base import Config


class Origin(Config):
    """The checkpoint that a run began from."""

    kind: Literal["fork", "weights"]
    """fork (from=): weights, optimiser, step and place in the data; weights (init=): weights alone."""
    run: str
    """Folder of the run, or of the exported weights."""
    step: Annotated[int, Field(ge=0)]
    """The checkpoint's step."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Hash of the checkpoint's manifest, or of the exported file."""


def describe(origin: Origin | None) -> list[str]:
    """Where a run began, as a line for people; none for a run that began by itself."""
    if origin is None:
        return []
    what = "forked from" if origin.kind == "fork" else "weights from"
    return [f"{what} {origin.run} at step {origin.step:,}"]
