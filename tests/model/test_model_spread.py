"""What spreading a model costs and saves, by hand; test_parallel_shard.py counts the messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssmtrain.config.schema import RunConfig
from ssmtrain.data.tokenizer import vocab_rows
from ssmtrain.model.count import TrainingBytes, count
from ssmtrain.model.show import show
from ssmtrain.model.spread import block_sizes, blocks_of_unit, count_sent, held, unit_sizes

BLOCKS: dict[str, Any] = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
    "A": {"mixer": {"kind": "attention", "n_heads": 2}, "ffn": {"kind": "mlp", "hidden": 32}},
}
P = 1_000_000
GIVEN = TrainingBytes(4 * P, 4 * P, 8 * P, 123)


def page(devices: int, micro_batch: int | None = None, **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 16, "layout": "MMA", "blocks": BLOCKS},
            "data": {"kind": "embedded", "seq_len": 32},
            "trainer": {"max_steps": 1, "global_batch": 2048, "devices": devices, "micro_batch": micro_batch},
            "parallel": parallel or {"kind": "auto"},
        }
    )


def test_blocks_and_the_rest_are_the_model() -> None:
    config = page(1)
    total = count(config, vocab_rows(config)).params.total
    sizes = block_sizes(config)
    assert len(sizes) == 3 and sizes[0] == sizes[1] != sizes[2]
    assert sum(sizes) + vocab_rows(config) * 16 + 16 == total


def test_one_device_sends_nothing() -> None:
    assert count_sent(page(1), P).total == 0
    assert held(page(1, kind="fsdp"), GIVEN, P) == GIVEN


@pytest.mark.parametrize("kind", ["auto", "ddp"])
def test_ddp_sums_gradients_once(kind: str) -> None:
    for micro in (None, 2):
        sent = count_sent(page(4, micro, kind=kind), P)
        assert (sent.gathered, sent.summed) == (0, 2 * 4 * P * 3 // 4)
    assert held(page(4, kind=kind), GIVEN, P) == GIVEN


def test_half_the_digits_are_half_the_message() -> None:
    assert count_sent(page(4, kind="ddp", reduce="bf16"), P).summed == 2 * 2 * P * 3 // 4
    config = page(4, kind="fsdp", reduce="bf16", gather="bf16", reshard=False)
    blocks = sum(block_sizes(config))
    sent = count_sent(config, P)
    assert sent.summed == 2 * P * 3 // 4
    assert sent.gathered == (2 * blocks + 4 * (P - blocks)) * 3 // 4
    assert held(config, GIVEN, P).weights == 4 * (P // 4 + P - blocks) + 2 * blocks


def test_what_lies_on_the_host_is_not_on_a_device() -> None:
    config = page(4, kind="fsdp", offload=True, unit=1)
    got, sizes = held(config, GIVEN, P), block_sizes(config)
    whole = P - sum(sizes) + 2 * max(sizes)
    assert (got.weights, got.gradients, got.optimizer) == (4 * whole, 4 * whole, 0)


def test_blocks_are_gathered_in_messages_of_a_size() -> None:
    assert unit_sizes(page(4, kind="fsdp")) == [sum(block_sizes(page(1)))]
    one, two, three = block_sizes(page(1))
    assert unit_sizes(page(4, kind="fsdp", unit=2)) == [one + two, three]
    large = [27_000_000] * 48
    assert (blocks_of_unit(large), blocks_of_unit([70_000_000]), blocks_of_unit([1 << 30] * 4)) == (2, 1, 1)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("micro, passes", [(None, 1), (4, 4)])
def test_fsdp_gathers_for_each_pass_and_scatters_once(reshard: bool, micro: int | None, passes: int) -> None:
    config = page(4, micro, kind="fsdp", reshard=reshard, unit=1)
    sizes = block_sizes(config)
    blocks = sum(sizes)
    sent = count_sent(config, P)
    once = (2 * blocks - sizes[-1] if reshard else blocks) + P - blocks
    assert sent.gathered == 4 * once * passes * 3 // 4
    assert sent.summed == 4 * P * 3 // 4
    got = held(config, GIVEN, P)
    assert got.optimizer == 2 * P and got.activations == 123
    whole = P - blocks + (2 * max(sizes) if reshard else blocks)
    assert got.weights == 4 * (P // 4 + whole)
    assert got.gradients == 4 * (P if passes > 1 else min(P, P // 4 + whole))


def test_replicas_keep_the_gathering_within() -> None:
    config = page(8, kind="fsdp", replicas=2, unit=1)
    sent = count_sent(config, P)
    sizes = block_sizes(config)
    blocks = sum(sizes)
    assert sent.gathered == 4 * (2 * blocks - sizes[-1] + P - blocks) * 3 // 4
    assert sent.summed == 4 * P * 3 // 4 + (8 * P // 4) // 2
    # As many groups as devices: each holds all of it, as under ddp.
    assert count_sent(page(8, kind="fsdp", replicas=8), P) == count_sent(page(8, kind="ddp"), P)


def test_zero_sums_to_owners_and_takes_parameters_back() -> None:
    for micro, passes in ((None, 1), (4, 4)):
        pages = {n: page(4, micro, kind=f"deepspeed_zero{n}") for n in (1, 2, 3)}
        sent = {n: count_sent(config, P) for n, config in pages.items()}
        assert (sent[1].gathered, sent[1].summed) == (4 * P * 3 // 4, 4 * P * 3 // 4)
        assert (sent[2].gathered, sent[2].summed) == (4 * P * 3 // 4, passes * 4 * P * 3 // 4)
        blocks = sum(block_sizes(pages[3]))
        assert (sent[3].gathered, sent[3].summed) == (
            passes * 4 * (P + blocks) * 3 // 4,
            passes * 4 * P * 3 // 4,
        )
    half = count_sent(page(4, kind="deepspeed_zero2", reduce="bf16"), P)
    assert (half.gathered, half.summed) == (4 * P * 3 // 4, 2 * P * 3 // 4)
    assert count_sent(page(1, kind="deepspeed_zero3"), P).total == 0


def test_zero_holds_shares_of_more_by_stage() -> None:
    large = 400_000_000  # more than a message
    whole = TrainingBytes(4 * large, 4 * large, 8 * large, 123)
    share, message = large // 4, 1 << 26

    def holds(stage: int, **changes: bool) -> tuple[int, int, int]:
        got = held(page(4, kind=f"deepspeed_zero{stage}", **changes), whole, large)
        assert got.activations == 123
        return got.weights // 4, got.gradients // 4, got.optimizer // 4

    # Weights with the copy of a share that is stepped, gradients, moments.
    assert holds(1) == (large + share, large, 2 * share)
    assert holds(2) == (large + share, share + message, 2 * share)
    assert holds(1, offload_optimizer=True) == (large, large, 0)
    assert holds(2, offload_optimizer=True) == (large, message, 0)
    sizes = block_sizes(page(4))
    around = large - sum(sizes) + 2 * max(sizes)
    assert holds(3) == (around + 2 * share, share + message, 2 * share)
    assert holds(3, offload_params=True) == (around + share, share + message, 2 * share)
    assert holds(3, offload_optimizer=True, offload_params=True) == (around, message, 0)
    assert held(page(1, kind="deepspeed_zero3"), GIVEN, P) == GIVEN


def test_nodes_have_as_many_devices_each() -> None:
    config = page(2, kind="fsdp")
    nodes = config.model_copy(update={"launch": config.launch.model_copy(update={"nodes": 2})})
    assert count_sent(nodes, P) == count_sent(page(4, kind="fsdp"), P)


def test_show_says_it() -> None:
    config = page(4, kind="fsdp")
    text, data = show(config, 257), json.loads(show(config, 257, as_json=True))
    assert "messages    fsdp on 4 devices: each sends" in text and "512 tokens of its own" in text
    total = data["params_total"]
    assert data["sent_bytes"] == count_sent(config, total).total
    assert data["training_bytes"]["optimizer"] == 2 * total
    assert "messages" not in show(page(1), 257)
