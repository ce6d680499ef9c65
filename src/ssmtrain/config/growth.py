"""What grows with the tokens seen, the batch and the rows' length: pure functions of tokens or of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Staged:
    """A value that holds until so many tokens have been seen, stage after stage, and then the final one."""

    final: int
    stages: tuple[tuple[int, int], ...] = ()
    """(until how many tokens, the value), ascending."""

    def at(self, tokens: int) -> int:
        """The value for a step that begins after so many tokens."""
        return next((value for until, value in self.stages if tokens < until), self.final)

    def tokens_after(self, steps: int, seen: int = 0) -> int:
        """Tokens seen after so many steps more than `seen`, where the value is the tokens of a step."""
        tokens = seen
        for until, value in self.stages:
            here = min(steps, max(0, -(-(until - tokens) // value)))
            tokens, steps = tokens + here * value, steps - here
        return tokens + steps * self.final

    def steps_to(self, tokens: int, seen: int = 0) -> int:
        """Steps from `seen` until at least so many tokens, where the value is the tokens of a step."""
        steps = 0
        for until, value in self.stages:
            here = max(0, -(-(min(until, tokens) - seen) // value))
            steps, seen = steps + here, seen + here * value
        return steps + max(0, -(-(tokens - seen) // self.final))


def batches(trainer: Any) -> Staged:
    """Tokens of a step over the run of a trainer page (or its namespace)."""
    stages = trainer.global_batch_warmup or ()
    return Staged(trainer.global_batch, tuple((s.until_tokens, s.global_batch) for s in stages))


def lengths(data: Any) -> Staged:
    """Tokens of a row over the run of a data page (or its namespace)."""
    stages = getattr(data, "seq_len_warmup", None) or ()
    return Staged(data.seq_len, tuple((s.until_tokens, s.seq_len) for s in stages))


def problems(config: Any) -> Iterator[str]:
    """What is wrong with the warm-ups of length and batch, a line each."""
    trainer, data, row = config.trainer, config.data, config.data.seq_len
    yield from _ascending("data.seq_len_warmup", "seq_len", lengths(data))
    for number, (_, length) in enumerate(lengths(data).stages):
        if row % length:
            near = max(n for n in range(1, min(length, row) + 1) if row % n == 0)
            yield (
                f"data.seq_len_warmup[{number}].seq_len = {length}: rows of data.seq_len = {row} are cut "
                f"into shorter ones, so it must divide that; the nearest below is {near}"
            )
    grown = batches(trainer)
    yield from _ascending("trainer.global_batch_warmup", "global_batch", grown)
    micro = None if trainer.micro_batch == "auto" else trainer.micro_batch
    devices = trainer.devices or 1
    for number, (_, batch) in enumerate(grown.stages):
        mine, rest = divmod(batch, row * devices)
        if rest or (micro and mine > micro and mine % micro):
            share = row * devices * min(micro or 1, max(1, mine))
            yield (
                f"trainer.global_batch_warmup[{number}].global_batch = {batch}: tokens of a step, expected "
                f"whole micro-batches of rows (data.seq_len = {row}) for each device, as "
                f"{max(1, batch // share) * share} has"
            )
    if grown.stages and config.parallel.kind.startswith("deepspeed"):
        yield (
            f"parallel.kind = {config.parallel.kind}: not with trainer.global_batch_warmup, because its "
            "engine is made for one number of micro-batches; take parallel=ddp or parallel=fsdp"
        )


def _ascending(key: str, field: str, staged: Staged) -> Iterator[str]:
    before, least = 0, 0
    for number, (until, value) in enumerate(staged.stages):
        if until <= before:
            yield f"{key}[{number}].until_tokens = {until}: expected more than the stage before, {before}"
        if not least < value < staged.final:
            yield (
                f"{key}[{number}].{field} = {value}: a warm-up grows; expected more than {least} and less "
                f"than the {field} = {staged.final} that follows it"
            )
        before, least = until, value
