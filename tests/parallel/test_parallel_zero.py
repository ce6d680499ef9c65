"""DeepSpeed's engine on two gloo ranks: what it holds, sends, sums, drops, and gives back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.ranks import together
from parallel.zero_ranks import step_as_one
from ssmtrain.config.parallel import Zero1, Zero2, Zero3

HOW = {
    "1": Zero1(),
    "2": Zero2(),
    "2 in bf16, on the host": Zero2(reduce="bf16", offload_optimizer=True),
    "3": Zero3(),
    "3 in bf16, on the host": Zero3(reduce="bf16", offload_optimizer=True, offload_params=True),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_ranks_hold_and_step_a_model_as_one(how: Zero1, tmp_path: Path) -> None:
    assert together(step_as_one, 2, tmp_path, tmp_path, how).count("as one") == 2
