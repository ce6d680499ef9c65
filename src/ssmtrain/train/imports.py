"""Lightning, imported as fast as it can be: it is half of what a process does before it trains."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

UNUSED = frozenset({"matplotlib", "scipy", "transformers"})
"""What torchmetrics, which Lightning imports, would import for metrics that nobody here asks for."""


def import_lightning() -> None:
    """Import Lightning with the garbage collector at rest, which takes a fifth off, and never scan it again.

    A full collection over its three thousand modules would stop the training loop for a quarter of a second.
    """
    gc.disable()
    try:
        with without(UNUSED):
            import lightning.pytorch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(packages: frozenset[str]) -> Iterator[None]:
    """Whoever asks in this block whether such packages are there is told that they are not, for good: where
    they are installed, importing them takes as long as the rest of Lightning."""
    from lightning_utilities.core.imports import RequirementCache

    plain = RequirementCache.__init__

    def asked(self: Any, requirement: str | None = None, module: str | None = None) -> None:
        plain(self, requirement, module)
        name = requirement or module or ""
        if re.split(r"\W", name, maxsplit=1)[0] in packages:
            self.available, self.message = False, f"{name} is not imported, as nothing here uses it"

    RequirementCache.__init__ = asked  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        RequirementCache.__init__ = plain  # type: ignore[method-assign]
