"""data.carry_state: what it does not go with, said before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from ssmtrain.config.carry import slots
from ssmtrain.config.errors import UserError
from ssmtrain.config.identity import config_hash
from ssmtrain.config.load import typed
from ssmtrain.config.schema import RunConfig
from ssmtrain.model.show import report

BLOCKS: dict[str, Any] = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
    "A": {"mixer": {"kind": "attention", "n_heads": 2, "window": 8}},
    "F": {"ffn": {"kind": "mlp", "hidden": 8}},
}


def page(layout: str = "M", data: Any = None, trainer: Any = None, **more: Any) -> RunConfig:
    model = {"d_model": 16, "layout": layout, "blocks": {name: BLOCKS[name] for name in set(layout)}}
    data = {"kind": "embedded", "seq_len": 64, "carry_state": True, **(data or {})}
    limits = {"max_steps": 100, "global_batch": 256, **(trainer or {})}
    return typed({"recipe": "r", "model": model, "data": data, "trainer": limits, **more})


MIX = {"kind": "mix", "sources": {"a": {"kind": "embedded"}}}
STAGE = {"until_tokens": 9}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layout": "MA"}, r"blocks\.A\.mixer\.kind = attention keeps .*; take mamba1 or mamba2"),
        ({"layout": "F"}, "no state to carry"),
        ({"data": MIX}, r"not with data\.kind = mix.*take data\.kind=text"),
        ({"data": {"seq_len_warmup": [{**STAGE, "seq_len": 32}]}}, r"take a smaller data\.seq_len"),
        ({"trainer": {"global_batch_warmup": [{**STAGE, "global_batch": 64}]}}, "as many; leave one out"),
        ({"trainer": {"compile": True}}, r"not with trainer\.compile"),
        ({"trainer": {"cuda_graphs": True}}, r"not with trainer\.cuda_graphs"),
        ({"parallel": {"kind": "deepspeed_zero1"}}, "take parallel=ddp, or parallel=fsdp"),
    ],
)
def test_what_does_not_go_with_it(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"data\.carry_state = true: .*{says}"):
        page(**changes)
    if "layout" not in changes:
        changes["data"] = {**(changes.get("data") or {}), "carry_state": False}
        page(**changes)


def test_a_task_has_no_such_key() -> None:
    with pytest.raises(UserError, match="carry_state"):
        page(data={"kind": "mqar"}, tokenizer={"kind": "ids"})


def test_it_makes_another_run_and_older_names_stay() -> None:
    plain = page(data={"carry_state": False})
    assert config_hash(page()) != config_hash(plain)
    assert slots(page()) == 4 and slots(plain) is None
    tree = plain.model_dump(mode="json")
    del tree["data"]["carry_state"]
    assert config_hash(RunConfig.model_validate(tree)) == config_hash(plain)


def test_show_says_what_is_carried() -> None:
    (line,) = [line for line in report(page(), 257)[1] if line.startswith("carried")]
    # 4 rows, each a window of 48 channels x 4 in bf16 and a state of 4 heads x 8 x 8 in fp32.
    assert "states of the 4 rows of a step" in line and "5.50 KiB" in line
    assert not [line for line in report(page(data={"carry_state": False}), 257)[1] if "carried" in line]
