"""The run folders of tests/runs, for reports of them."""

from __future__ import annotations

from runs.conftest import dead_owner, make_run

__all__ = ["dead_owner", "make_run"]
