"""Kernels compiled before the ranks meet: all that a step launches, of each block once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssmtrain.config import launched as launched_by
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import Batch, Data, MemoryStream, Rows
from ssmtrain.kernels import backend, cache, tuned
from ssmtrain.layers import forget
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.parallel.apply import apply
from ssmtrain.train import warm

from .conftest import page

CPU = torch.device("cpu")
BLOCKS = {
    "M": {"mixer": {"kind": "mamba2", "d_state": 16, "head_dim": 16}},
    "N": {"mixer": {"kind": "mamba2", "d_state": 16, "head_dim": 16}},
    "S": {"mixer": {"kind": "mamba1", "d_state": 4}},
    "A": {
        "mixer": {"kind": "attention", "n_heads": 2},
        "ffn": {"kind": "mlp", "hidden": 32},
        "norm": "sandwich",
    },
    "E": {"ffn": {"kind": "moe", "hidden": 16, "n_experts": 4, "top_k": 2}},
}


def recipe(folder: Path, layout: str, **changes: Any) -> RunConfig:
    used = {name: block for name, block in BLOCKS.items() if name in layout}
    return page(folder, model__blocks=used, model__layout=layout, model__d_model=32, **changes)


def text(*documents: int, length: int = 32) -> Data:
    """Rows of documents of these many tokens."""
    starts = np.cumsum([0, *documents[:-1]]).astype(np.int64)
    ids = np.arange(sum(documents)) % 31
    rows = Rows(MemoryStream(ids, starts), length, None, 0)
    return SimpleNamespace(train=rows)  # type: ignore[return-value]  # what is read of it


@contextmanager
def launched() -> Iterator[set[Any]]:
    """What Triton would tell apart of the kernels that are launched; none of them runs."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    seen: set[Any] = set()

    def seen_as(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        whole = isinstance(value, int) and not isinstance(value, bool)
        return (value == 1, value % 16 == 0) if whole else type(value).__name__

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        seen.add((self.fn.__name__, tuple(map(seen_as, args)), str(sorted(constants.items(), key=str))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", record)
        yield seen


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not tuned.interpreting():
        pytest.skip("for the interpreter")
    monkeypatch.setattr(forget, "DEVICES", {"cpu"})
    monkeypatch.setattr(backend, "_current", backend._current)
    backend.configure("triton", "cpu")


def train_step(config: RunConfig, vocab: int, batch: Batch) -> None:
    """Forward and backward as LitLM takes them."""
    with torch.device("meta"):
        model = HybridModel(config.model, vocab)
    apply(model, config.trainer).to_empty(device="cpu")
    init_weights(model, config.model.init, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.trainer.precision == "bf16"):
        out = model(batch.inputs, batch.labels, Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs))
    assert out.loss_sum is not None
    (out.loss_sum if out.aux is None else out.loss_sum + out.aux).backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "recompute", "documents"),
    [("MMAM", "none", (20, 30, 40)), ("SEM", "ops", (70, 30, 40)), ("AMM", "block", (20, 30, 40))],
)
def test_a_step_launches_nothing_new(
    layout: str,
    recompute: str,
    documents: tuple[int, ...],
    precision: str,
    tmp_path: Path,
    interpreted: None,
) -> None:
    config = recipe(tmp_path, layout, trainer__precision=precision, trainer__recompute=recompute)
    data = text(*documents)
    with launched() as foreseen:
        warm.run_blocks(config, 31, warm.batches(data, 2), CPU)
    with launched() as seen:
        train_step(config, 31, data.train.batch(range(2)))
    assert len(seen) > 8, seen
    assert not seen - foreseen, sorted(map(str, seen - foreseen))


def test_each_pair_of_blocks_once(tmp_path: Path) -> None:
    model = recipe(tmp_path, "MMNAMA").model
    assert warm.steps(model) == [("M", None), ("M", "M"), ("A", "M"), ("M", "A")], "N is as M"


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is cut over devices because it fits none is never there whole."""
    import weakref

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Counted(warm.Block):
        def to_empty(self, **where: Any) -> Any:
            nonlocal most
            alive.add(self)
            most = max(most, len(alive))
            return super().to_empty(**where)

    monkeypatch.setattr(warm, "Block", Counted)
    warm.run_blocks(recipe(tmp_path, "MMAMAM"), 31, warm.batches(text(40, 50), 2), CPU)
    assert most == 1


def test_batches_of_each_kind() -> None:
    def kinds(data: Data, rows: int) -> list[tuple[bool, bool]]:
        return [(b.doc_ids is not None, b.n_docs % 16 == 0) for b in warm.batches(data, rows)]

    assert kinds(text(320), 2) == [(False, False)], "one document"
    assert kinds(text(*[32] * 10), 2) == [(False, False)], "a row each"
    assert kinds(text(320, 10, 300), 2) == [(False, False), (True, False)], "the first rows are one document"
    assert kinds(text(*[16] * 400), 2) == [(True, False)]
    short = kinds(text(*np.random.default_rng(0).integers(1, 9, 900).tolist()), 4)
    assert sorted(short) == [(True, False), (True, True)]
    assert (False, False) in kinds(text(20, 400, 20, 400), 2)


class Gpu:
    """A GPU that is not there, for the lines that are printed and the record that is kept."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, work: Callable[..., None]) -> None:
        self.said: list[str] = []
        self.config = recipe(folder, "MA", trainer__kernel_cache=str(folder / "kernels"))
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, "elsewhere")
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(warm, "run_blocks", work)

    def start(self, **changes: Any) -> list[str]:
        trainer = self.config.trainer.model_copy(update=changes)
        config = self.config.model_copy(update={"trainer": trainer})
        self.said.clear()
        warm.warm_up(config, 31, text(40, 50), torch.device("cuda", 0), 2, self.said.append)
        return self.said


def test_said_before_and_after_and_done_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, ran = tmp_path / "kernels", []

    def work(*rest: Any) -> None:
        ran.append(os.environ["TRITON_CACHE_DIR"])
        from triton import knobs

        for name, hit in (("walk", False), ("outputs", True), ("pairs", False)):
            knobs.compilation.listener(src=SimpleNamespace(name=name), cache_hit=hit, times=None)  # type: ignore[misc]

    gpu = Gpu(monkeypatch, tmp_path, work)
    first, second = gpu.start()
    assert first == f"compiling kernels for a GPU into {folder}: this takes a while, once"
    assert second.startswith("compiled 2 kernels in ")
    assert ran == [str(folder)]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert gpu.start() == [] and len(ran) == 1, "all is there"
    assert gpu.start(precision="bf16") and len(ran) == 2, "other kernels"
    assert gpu.start(lr=1) == [] and len(ran) == 2, "the same kernels"
    other = tmp_path / "other"
    assert str(other) in gpu.start(kernel_cache=str(other))[0]


def test_what_fails_costs_only_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(*rest: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    gpu = Gpu(monkeypatch, tmp_path, work)
    for _ in range(2):  # a later start tries again
        said = gpu.start()
        assert len(said) == 2
        assert said[1].endswith("which will take longer: OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ({"SSMTRAIN_PARENT": "1", "LOCAL_RANK": "1"}, None),
        ({}, ("cuda:0", 2, True)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ("cuda:1", 1, False)),
    ],
    ids=["started by rank 0", "rank 0", "torchrun"],
)
def test_who_compiles(
    told: dict[str, str],
    asked: tuple[str, int, bool] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 0 before it starts others; what torchrun starts, each on its GPU, with rank 0's words alone."""
    from ssmtrain.train import fit

    for name in launched_by.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TRITON_CACHE_DIR": "elsewhere", **told}.items():
        monkeypatch.setenv(name, value)
    seen: list[Any] = []

    def warm_up(
        config: Any, vocab: int, data: Any, device: Any, rows: int, say: Callable[[str], None]
    ) -> None:
        say("hello")
        seen.append((str(device), rows, "hello" in capsys.readouterr().out))

    monkeypatch.setattr(backend, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(warm, "warm_up", warm_up)
    config = recipe(tmp_path, "MA", trainer__kernel_cache=str(tmp_path / "kernels"))
    fit._kernels(config, 31, text(40, 50), 2)
    assert seen == ([] if asked is None else [asked])
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "kernels"), "the same for all ranks"
    if not told:
        fit._kernels(config, 31, text(40, 50), 1)
        assert len(seen) == 1, "one process waits for none"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"trainer\.kernel_cache: kernels cannot be kept in .*file/here: Not a dir"
    ):
        warm.settle(str(tmp_path / "file" / "here"))


def test_the_cache_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's compiler moves a cache that nobody has named, to another folder for each device."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # to be put back afterwards
    monkeypatch.delenv("TRITON_CACHE_DIR")
    try:
        assert cache.use(None) == tmp_path / ".triton" / "cache"
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".triton" / "cache")
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)


COLD_AND_WARM = """
import sys
from pathlib import Path
import torch
from ssmtrain.kernels import backend, cache
from train import test_train_warm as here
from ssmtrain.train import warm

backend.configure("auto", "cuda")
device = torch.device("cuda", 0)
config = here.recipe(Path(sys.argv[1]), "MMAMS", trainer__precision=sys.argv[2])
data = here.text(20, 30, 40)
if sys.argv[3] == "warm":
    warm.warm_up(config, 31, data, device, 2, print)
else:
    cache.use(None)
with cache.compiled() as names:
    batch = data.train.batch(range(2))
    here.gpu_step(config, 31, batch)
print("new:", sorted(names))
"""


def gpu_step(config: RunConfig, vocab: int, batch: Batch) -> None:
    """`train_step` on a GPU."""
    with torch.device("meta"):
        model = HybridModel(config.model, vocab)
    apply(model, config.trainer).to_empty(device="cuda")
    init_weights(model, config.model.init, 0)
    there = batch.to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=config.trainer.precision == "bf16"):
        out = model(there.inputs, there.labels, Context(doc_ids=there.doc_ids, n_docs=there.n_docs))
    assert out.loss_sum is not None
    out.loss_sum.backward()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_it_a_step_compiles_nothing(precision: str, tmp_path: Path) -> None:
    """In one process that warms a fresh cache up, and in another that finds it warm."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    env.pop("TRITON_INTERPRET", None)
    for mode in ("warm", "cold"):
        line = [sys.executable, "-c", COLD_AND_WARM, str(tmp_path), precision, mode]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("new: []\n"), done.stdout
        assert mode == "cold" or "compiled 0 kernels" not in done.stdout, done.stdout
