"""Rows made from numbers alone: a file for each task, its random numbers, and what the trainer reads."""

from ssmtrain.data.tasks.rows import ENDLESS, TaskRows, at_length, fingerprint

__all__ = ["ENDLESS", "TaskRows", "at_length", "fingerprint"]
