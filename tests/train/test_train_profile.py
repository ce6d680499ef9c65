"""trainer.profile: the bits stay the same, the files are there, every op counts under its layer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ssmtrain.config.checks import problems
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.train.kinds import BETWEEN, by_kind, named, places
from train.conftest import ledger, page

Train = Callable[..., tuple[int, Path]]


def test_a_profiled_run_has_the_bits_of_another(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain = train(name="plain", trainer__max_steps=4)
    assert not (plain / "profile").exists() and "profile of" not in capsys.readouterr().out
    code, folder = train(name="profiled", trainer__max_steps=4, trainer__profile="2:3")
    assert code == 0 and ledger(folder) == ledger(plain)
    names = {path.name for path in (folder / "profile").iterdir()}
    assert names == {"steps-2-3.trace.json.gz", "steps-2-3.json", "steps-2-3.txt"}
    told = capsys.readouterr().out
    assert (folder / "profile" / "steps-2-3.txt").read_text() in told
    assert "profile of 2 steps" in told and "backward ms" in told
    trace = json.loads(gzip.decompress((folder / "profile" / "steps-2-3.trace.json.gz").read_bytes()))
    seen = {event["name"] for event in trace["traceEvents"]}
    assert {"ssmtrain: mamba2", "ssmtrain: attention", "ssmtrain: head", "ssmtrain: data"} <= seen
    found = json.loads((folder / "profile" / "steps-2-3.json").read_text())
    kinds = {"mamba2", "attention", "mlp", "norm", "embedding", "head", "optimiser", "data", "between steps"}
    assert kinds <= found["kinds_ms"].keys() and len(found["seconds"]) == 2
    assert all(found["kinds_ms"][kind]["forward"] > 0 for kind in kinds)
    assert all(found["kinds_ms"][k]["backward"] > 0 for k in ("mamba2", "attention", "mlp", "norm", "head"))


def test_steps_that_were_taken_before_are_told(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train(trainer__max_steps=4)
    code, folder = train(trainer__max_steps=5, trainer__profile="2:3")
    assert code == 0 and "step 2 was taken before this start" in caplog.text
    assert not (folder / "profile").exists()


class Lit:
    def rows(self) -> torch.Tensor:
        return torch.zeros(3).exp()


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_every_gradient_counts_under_the_layer_that_it_is_of(recompute: str, tmp_path: Path) -> None:
    from ssmtrain.parallel.apply import apply

    config = page(tmp_path, trainer__recompute=recompute)
    model = HybridModel(config.model, 257)
    init_weights(model, config.model.init, 0)
    apply(model, config.trainer)
    lit: Any = Lit()
    lit.model, lit.config = model, config
    tokens = torch.randint(0, 256, (2, 32))
    with profile(activities=[ProfilerActivity.CPU]) as seen, named(lit):
        lit.rows()
        out = model(tokens, tokens, Context())
        out.loss_sum.backward()
        with record_function(BETWEEN):
            model(tokens, tokens, Context())
    assert "rows" not in vars(lit) and "loss" not in vars(model.head)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    homes: dict[str, set[tuple[str, bool]]] = {}
    for event, kind, backward in places(seen.events()):
        if kind != "between steps":
            homes.setdefault(event.name, set()).add((kind, backward))
    for name, kind in {
        "ChunkedScanBackward": "mamba2",
        "ScaledDotProductFlashAttentionForCpuBackward0": "attention",
        "EmbeddingBackward0": "embedding",
        "_LinearCrossEntropyBackward": "head",
        "SiluBackward0": "mlp",
    }.items():
        found = next(where for event, where in homes.items() if event.endswith(f": {name}"))
        assert found == {(kind, True)}, name
    assert homes["aten::exp"] >= {("data", False)}
    assert ("mamba2", False) in homes["ChunkedScan"]
    assert (("mamba2", True) in homes["ChunkedScan"]) == (recompute == "block")
    spent = by_kind(seen.events(), device=False)
    whole = sum(one.total for one in spent.values())
    assert spent["rest"].total < 0.3 * whole and spent["between steps"].backward == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer__profile": "3:2"}, "the last step comes before the first"),
        ({"trainer__profile": "9:9"}, "no effect, as the run ends at trainer.max_steps = 8"),
        ({"trainer__profile": "1:2", "trainer__cuda_graphs": True}, "leave out trainer.cuda_graphs"),
    ],
)
def test_a_profile_that_could_not_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert any(said in line for line in problems(page(tmp_path, **changes)))


def test_the_command_line_takes_two_steps() -> None:
    from ssmtrain.config.errors import UserError
    from ssmtrain.config.load import load

    assert load(["config=quickstart", "trainer.profile=10:15"]).trainer.profile == "10:15"
    with pytest.raises(UserError) as caught:
        load(["config=quickstart", "trainer.profile=10"])
    assert caught.value.lines == ["trainer.profile = '10': expected text such as 10:15 or null"]
