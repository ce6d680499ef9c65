"""The pages of mixtures and warm-ups: what is refused, and where phases and stages begin."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.growth import Staged
from ssmtrain.config.identity import config_hash
from ssmtrain.config.load import load, to_yaml, typed
from ssmtrain.config.mixing import past, phases
from ssmtrain.config.schema import RunConfig

BLOCKS = {"A": {"mixer": {"kind": "attention", "n_heads": 2}}}


def page(data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    model = {"d_model": 16, "layout": "A", "blocks": BLOCKS}
    limits = {"max_steps": 100, "global_batch": 256, **(trainer or {})}
    data = {"kind": "embedded", "seq_len": 64, **(data or {})}
    return typed({"recipe": "r", "model": model, "data": data, "trainer": limits, **more})


def mix(*phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    sources = {name: {"kind": "text", "train": name} for name in ("a", "b")}
    return {"kind": "mix", "sources": sources, "phases": list(phases) or None, **more}


def stage(until: int, **value: int) -> dict[str, int]:
    return {"until_tokens": until, **value}


@pytest.mark.parametrize(
    ("data", "trainer", "says"),
    [
        ({"seq_len_warmup": [stage(9, seq_len=24)]}, {}, r"\.seq_len = 24: .* below is 16"),
        ({"seq_len_warmup": [stage(9, seq_len=64)]}, {}, "a warm-up grows"),
        ({"seq_len_warmup": [stage(9, seq_len=8), stage(9, seq_len=16)]}, {}, "than the stage before, 9"),
        ({}, {"global_batch_warmup": [stage(9, global_batch=96)]}, r"global_batch = 96: .* as 64 has"),
        ({}, {"global_batch_warmup": [stage(9, global_batch=512)]}, "more than 0 and less than"),
        ({}, {"global_batch_warmup": [stage(9, global_batch=64)], "devices": 2}, "each device, as 128 has"),
        (
            {},
            {"global_batch": 512, "global_batch_warmup": [stage(9, global_batch=192)], "micro_batch": 2},
            "as 128 has",
        ),
        (mix({"weights": {"a": 1, "b": 1}}), {}, "give from_step or from_tokens"),
        (mix({"from_step": 1, "from_tokens": 2, "weights": {"a": 1, "b": 1}}), {}, "one of them"),
        (mix({"from_step": 1, "weights": {"a": 1}}), {}, r"weights\.b is missing"),
        (mix({"from_step": 1, "weights": {"a": 1, "b": 1, "c": 1}}), {}, r"weights\.c: there is no such"),
        (mix({"from_step": 1, "weights": {"a": 0, "b": 0}}), {}, "no source has a weight above 0"),
        (mix(*[{"from_step": n, "weights": {"a": 1, "b": 1}} for n in (5, 4)]), {}, "put them in order"),
        (mix(sources={"a": {"kind": "embedded", "seq_len": 9}}), {}, r"sources\.a\.seq_len"),
        (mix(sources={"a/b": {"kind": "embedded"}}), {}, r"sources\.a/b: not a name"),
        (mix(sources={}), {}, r"data\.sources is empty"),
        (
            mix({"from_step": 0, "weights": {"a": 1}}, sources={"a": {"kind": "embedded", "weight": 2}}),
            {},
            r"sources\.a\.weight: no effect beside data\.phases\[0\]",
        ),
        (
            mix(sources={"a": {"kind": "text", "train": "x", "val": "y", "val_fraction": 0.2}}),
            {},
            r"data\.sources\.a\.val_fraction = 0\.2: no effect",
        ),
        ({"kind": "text", "train": "x", "val": {"loss": "y"}}, {}, r"data\.val\.loss: not a name"),
    ],
)  # fmt: skip
def test_what_is_refused(data: dict[str, Any], trainer: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        page(data, trainer)


def test_a_batch_that_grows_is_not_for_deepspeed() -> None:
    trainer = {"global_batch_warmup": [stage(9, global_batch=64)]}
    with pytest.raises(UserError, match=r"not with trainer\.global_batch_warmup"):
        page({}, trainer, parallel={"kind": "deepspeed_zero2"})


def test_pages_without_the_new_keys_keep_their_hash() -> None:
    plain = page()
    assert plain.data.seq_len_warmup is None and plain.trainer.global_batch_warmup is None
    assert config_hash(plain)[:12] == "b004cc7d0b83"
    assert config_hash(page({"seq_len_warmup": [stage(9, seq_len=8)]})) != config_hash(plain)
    assert config_hash(page({}, {"global_batch_warmup": [stage(9, global_batch=64)]})) != config_hash(plain)


def test_a_mixture_on_the_line_and_written_out(tmp_path: Path) -> None:
    words = ["data=mix", "data.sources.own.train=x.txt", "data.sources.own.weight=0.5"]
    words.append("data.phases=[{from_step:5,weights:{austen:1,own:2}}]")
    words.append("data.seq_len_warmup=[{until_tokens:4096,seq_len:128}]")
    config = load(["config=quickstart", *words])
    assert phases(config) == [(0, {"austen": 1.0, "own": 0.5}), (20, {"austen": 1.0, "own": 2.0})]
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load([f"config={tmp_path}/written.yaml"]) == config


def test_phases_begin_with_a_row() -> None:
    weights = {"a": 1.0, "b": 3.0}
    data = mix({"from_tokens": 100, "weights": weights}, {"from_step": 3, "weights": weights})
    grown = {"global_batch_warmup": [stage(200, global_batch=64)]}
    plan = phases(page(data | {"seq_len": 64}, grown))
    assert [begin for begin, _ in plan] == [0, 2, 3], "three steps of 64 tokens"
    rewritten = [[0, {"a": 2, "b": 2}], [2, {"a": 0.25, "b": 0.75}], [3, {"a": 9, "b": 1}]]
    assert past(plan, 3) == past(rewritten, 3) and past(plan, 4) != past(rewritten, 4)


@pytest.mark.parametrize("stages", [(), ((104, 8),), ((1, 8), (50, 16), (90, 32))])
def test_staged_steps_against_the_slow_way(stages: tuple[tuple[int, int], ...]) -> None:
    grown = Staged(64, stages)
    tokens = [0]
    for _ in range(60):
        value = next((value for until, value in stages if tokens[-1] < until), 64)
        tokens.append(tokens[-1] + value)
    assert [grown.tokens_after(step) for step in range(61)] == tokens
    assert [b - a for a, b in itertools.pairwise(tokens)] == [grown.at(seen) for seen in tokens[:-1]]
    for asked in range(0, 900, 7):
        assert grown.steps_to(asked) == next(step for step, seen in enumerate(tokens) if seen >= asked)
