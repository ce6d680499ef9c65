"""The Triton linear cross-entropy against float64 and the torch reference in its own dtype."""

from __future__ import annotations

from mmap import mmap

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, distance
from kernels.triton import shim
from ssmtrain.kernels import tuned
from ssmtrain.kernels.linear_cross_entropy import reference
from ssmtrain.kernels.linear_cross_entropy import triton as ours
from ssmtrain.kernels.tuned import interpreting

IGNORED = -100
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows, and so does what is beyond the vocabulary."""
    shim.poisoned(monkeypatch, ours, reference)


def draw(
    rows: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 3
) -> dict[str, Tensor]:
    """Random hidden, weight and labels, every seventh to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 2 * width**-0.5
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[2::7] = IGNORED
    return {
        "hidden": hidden.to(device, dtype),
        "weight": weight.to(device, dtype),
        "labels": labels.to(device),
    }


def run(tensors: dict[str, Tensor], op=ours.linear_cross_entropy, **options) -> dict[str, Tensor]:
    """The loss, and the gradients of 0.3 times it; inputs keep their strides."""
    options = {"logit_scale": 1.0, "ignore_index": IGNORED, "chunk": None} | options
    hidden, weight = (tensors[name].detach().requires_grad_() for name in ("hidden", "weight"))
    loss, n_valid = op(hidden, weight, tensors["labels"], **options)
    (0.3 * loss).backward()
    assert n_valid.dtype == torch.int64 and n_valid.shape == loss.shape == ()
    assert int(n_valid) == int((tensors["labels"] != options["ignore_index"]).sum())
    return {"loss": loss.detach(), "dhidden": hidden.grad, "dweight": weight.grad}


def exact(tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The same in float64, by the reference."""
    doubled = {name: t if name == "labels" else t.double() for name, t in tensors.items()}
    return run(doubled, reference.linear_cross_entropy, **options)


def use(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Put a launch configuration in the place of the one for the vocabulary."""
    upstream = ours._config

    def config(pitch: int) -> tuned.Config:
        found = upstream(pitch)
        assert set(changes) <= set(found)
        return found | changes

    monkeypatch.setattr(ours, "_config", config)


@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
@pytest.mark.parametrize("block", [None, 16, 128])
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 150, 320])
def test_matches_float64(
    vocab: int, block: int | None, scale: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block and many, with a vocabulary and a pitch that are a multiple of it and are not."""
    if block:
        use(monkeypatch, BLOCK=block)
    tensors = draw(9, 12, vocab, device)
    truth = exact(tensors, logit_scale=scale)
    if vocab == 1:
        assert not any(value.any() for value in truth.values())
    assert_all_close(run(tensors, logit_scale=scale), truth, 2e-6)


@pytest.mark.parametrize("vocab", [63, 70, 150, 192])
@pytest.mark.parametrize("held", [1, 2, 3, 4])
def test_what_stays_in_registers(
    held: int, vocab: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a row, more than it has, and less, to the same bits; and rows that are not read."""
    use(monkeypatch, BLOCK=32, HELD=0)
    tensors = draw(9, 12, vocab, device)
    before = run(tensors, logit_scale=2.0)
    use(monkeypatch, BLOCK=32, HELD=held)
    found = run(tensors, logit_scale=2.0)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert_all_close(found, exact(tensors, logit_scale=2.0), 2e-6)


@pytest.mark.parametrize("chunk", [None, 1, 4, 6, 18, 100])
def test_any_chunks_share_their_buffers(chunk: int | None, device: torch.device) -> None:
    """Fewer rows than a chunk, a whole number of chunks, and a last one that is short."""
    tensors = draw(18, 12, 70, device)
    assert_all_close(run(tensors, chunk=chunk), exact(tensors), 2e-6)


def test_ignored_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, chunks of nothing else, all; their gradients are zero, whatever their logits."""
    use(monkeypatch, BLOCK=16)
    tensors = draw(18, 12, 70, device)
    tensors["labels"][4:12] = IGNORED
    tensors["hidden"][5] *= 1e6
    found = run(tensors, chunk=4)
    assert_all_close(found, exact(tensors), 2e-6)
    assert not found["dhidden"][tensors["labels"] == IGNORED].any()
    kept = tensors["labels"] != IGNORED
    alone = tensors | {"hidden": tensors["hidden"][kept], "labels": tensors["labels"][kept]}
    assert_all_close(found | {"dhidden": found["dhidden"][kept]}, run(alone), 1e-6)
    found = run(tensors | {"labels": torch.full_like(tensors["labels"], IGNORED)}, chunk=4)
    assert not any(value.any() for value in found.values())


def test_another_ignored_label(device: torch.device) -> None:
    tensors = draw(18, 12, 70, device)
    tensors["labels"][tensors["labels"] == IGNORED] = 5
    assert_all_close(run(tensors, ignore_index=5), exact(tensors, ignore_index=5), 2e-6)


@pytest.mark.parametrize("label", [70, -1, 10**6, 63 + 2**32, -(2**40)])
def test_labels_outside_the_vocabulary_make_nan(label: int, device: torch.device) -> None:
    tensors = draw(9, 12, 70, device)
    tensors["labels"][3] = label
    found = run(tensors)
    assert found["loss"].isnan() and found["dweight"].isnan().all()
    assert found["dhidden"].isnan().all(1).tolist() == [row == 3 for row in range(9)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows(value: float, device: torch.device) -> None:
    tensors = draw(9, 12, 70, device)
    tensors["hidden"][3, 1] = value
    found = run(tensors)
    assert found["loss"].isnan() and found["dhidden"].isnan().all(1).tolist() == [
        row == 3 for row in range(9)
    ]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 1e30, -1e30])
def test_extreme_logits(shift: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near float64 where the products are exact in fp32: maxima late and early, all large, all low."""
    use(monkeypatch, BLOCK=16)
    steps = torch.arange(100, device=device).roll(37) * 2.0 - 100
    weight = torch.stack([steps, torch.full_like(steps, shift)], 1)
    large = 0.0 if abs(shift) > 1e4 else 1.0
    hidden = torch.tensor(
        [[100.0, 0.0], [-100.0, 0.0], [large, 1.0], [0.0, 1.0], [0.125, 0.0]], device=device
    )
    labels = torch.tensor([3, 99, 50, 0, 20], device=device)
    tensors = {"hidden": hidden, "weight": weight, "labels": labels}
    truth, found = exact(tensors), run(tensors)
    assert all(torch.isfinite(value).all() for value in found.values())
    # The other column's gradient is the shift times a sum that is zero.
    truth, found = (each | {"dhidden": each["dhidden"][:, 0]} for each in (truth, found))
    assert_all_close(found, truth, 1e-6)
    for row in range(5):
        assert distance(found["dhidden"][row], truth["dhidden"][row]) < 1e-5, row


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_precision_errs_as_little_as_the_reference(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, BLOCK=64)
    tensors = draw(90, 32, 300, device, dtype)
    truth = exact(tensors, logit_scale=0.5)
    found = run(tensors, logit_scale=0.5, chunk=32)
    expected = run(tensors, reference.linear_cross_entropy, logit_scale=0.5, chunk=32)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "loss" else dtype)
        assert distance(value, truth[name]) <= 2 * distance(expected[name], truth[name]) + 1e-7, name


def test_autocast_and_mixed_dtypes(device: torch.device) -> None:
    """Multiplied in the dtype a matmul would have; each gradient has its input's dtype."""
    tensors = draw(18, 12, 70, device)
    low = {name: t if name == "labels" else t.bfloat16() for name, t in tensors.items()}
    with torch.autocast(device.type, BF16):
        found = run(tensors)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert torch.equal(found["loss"], run(low)["loss"]) and not torch.equal(
        found["loss"], run(tensors)["loss"]
    )
    found = run(low | {"weight": tensors["weight"]})
    assert found["dhidden"].dtype == BF16 and found["dweight"].dtype == torch.float32
    assert_all_close(found, exact(low | {"weight": tensors["weight"]}), 1e-2)


def test_float64_is_the_reference(device: torch.device) -> None:
    tensors = draw(9, 12, 70, device)
    tensors |= {"hidden": tensors["hidden"].double()}
    found, truth = run(tensors), run(tensors, reference.linear_cross_entropy)
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert found["loss"].dtype == torch.float64 and found["dweight"].dtype == torch.float32


def test_other_layouts(device: torch.device) -> None:
    """A slice, a transposed weight, and labels apart."""
    tensors = draw(18, 12, 70, device)
    truth = run(tensors, chunk=7)
    nan = torch.full_like(tensors["hidden"], torch.nan)
    changed = {
        "hidden": torch.cat([nan, tensors["hidden"], nan], 1)[:, 12:24],
        "weight": tensors["weight"].t().contiguous().t(),
        "labels": torch.stack([tensors["labels"], tensors["labels"] + 1], 1)[:, 0],
    }
    assert not any(tensor.is_contiguous() for tensor in changed.values())
    assert_all_close(run(changed, chunk=7), truth, 1e-6)


def test_no_rows(device: torch.device) -> None:
    found = run(draw(0, 12, 70, device))
    assert found["dhidden"].shape == (0, 12) and not found["loss"] and not found["dweight"].any()


def test_only_the_gradients_that_are_wanted(device: torch.device) -> None:
    tensors = draw(18, 12, 70, device)
    both = run(tensors, chunk=7)
    rest = {"logit_scale": 1.0, "ignore_index": IGNORED, "chunk": 7}
    for name in ("hidden", "weight"):
        leaf = tensors[name].clone().requires_grad_()
        loss, _ = ours.linear_cross_entropy(**tensors | {name: leaf}, **rest)
        assert torch.equal(loss, both["loss"])
        (0.3 * loss).backward()
        assert torch.equal(leaf.grad, both[f"d{name}"])


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "no leaves"])
def test_the_value_alone_makes_no_gradients(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(18, 12, 70, device)
    truth = run(tensors, chunk=7)["loss"]
    handed = []
    kernel = ours._Residual.__call__
    monkeypatch.setattr(
        ours._Residual,
        "__call__",
        lambda self, *args: handed.append((kernel(self, *args), self._p)) or handed[-1][0],
    )
    if how != "no leaves":
        tensors = {name: t if name == "labels" else t.requires_grad_() for name, t in tensors.items()}
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)():
        loss, _ = ours.linear_cross_entropy(**tensors, logit_scale=1.0, ignore_index=IGNORED, chunk=7)
    assert torch.equal(loss, truth) and not loss.requires_grad
    assert handed == [(None, None)] * 3


def test_backward_twice_gives_the_same(device: torch.device) -> None:
    tensors = draw(18, 12, 70, device)
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    loss, _ = ours.linear_cross_entropy(**tensors, logit_scale=2.0, ignore_index=IGNORED, chunk=7)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_configurations() -> None:
    for vocab in (1, 64, 65, 257, 4096, 32000, 50257, 50288, 262144):
        pitch = -(-vocab // ours.PITCH) * ours.PITCH
        config = ours._config(pitch)
        assert config["num_warps"] <= 16 and config["BLOCK"] <= max(64, 2 * vocab)
        assert 4 * config["BLOCK"] * (config["STAGES"] - 1) <= 48 * 1024
        assert config["HELD"] * config["BLOCK"] <= pitch


def test_chunks_are_whole_tiles_of_a_gpu() -> None:
    sizes = {50288: 2560, 32000: 4096, 2**20: 128, 2**21: 64, 2**28: 1, 257: 522240}
    assert {vocab: reference.chunk_rows(vocab, True) for vocab in sizes} == sizes
    assert [reference.chunk_rows(vocab, False) for vocab in (50288, 2**25)] == [333, 1]


def test_the_sum_over_rows_is_near_float64() -> None:
    """Of as many rows as a long context has."""
    losses = 2 + 20 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert distance(losses.sum(), losses.double().sum()) < 3e-7


@pytest.mark.skipif(not interpreting(), reason="needs to choose which programs run")
def test_more_than_two_billion_logits() -> None:
    """In memory hardly touched, of which the last two rows are computed."""
    rows, pitch, vocab = 2**15 + 2, 2**16, 2**16 - 37
    try:
        memory = [mmap(-1, rows * pitch * size) for size in (4, 2)]
    except OSError:
        pytest.skip("the system grants no 13 GiB of memory, used or not")
    logits = torch.frombuffer(memory[0], dtype=torch.float32).view(rows, pitch)
    p = torch.frombuffer(memory[1], dtype=BF16).view(rows, pitch)
    labels, losses = torch.full((rows,), 5), torch.zeros(rows)
    logits[-2:, :vocab] = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    logits[-2:, vocab:] = torch.nan
    with shim.last_programs(2):
        ours._softmax[(rows,)](
            *(logits, labels, losses, p, vocab, pitch, IGNORED, 1.0),
            **ours._config(pitch),
        )
    logp = logits[-2:, :vocab].double().log_softmax(1)
    assert distance(losses[-2:], -logp[:, 5]) < 1e-6
    truth = logp.exp()
    truth[:, 5] -= 1
    assert distance(p[-2:, :vocab].float(), truth) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows,width,vocab", [(4096, 768, 50288), (3000, 768, 50257), (5000, 1024, 257)])
def test_real_sizes(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Near float64, and the same bits ten times."""
    tensors = draw(rows, width, vocab, device, dtype)
    truth = exact(tensors)
    expected = run(tensors, reference.linear_cross_entropy)
    found = run(tensors)
    for name, value in found.items():
        assert distance(value, truth[name]) <= 2 * distance(expected[name], truth[name]) + 1e-6, name
    for _ in range(10):
        again = run(tensors)
        assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50288, 50257])
def test_memory(vocab: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two buffers, the gradients, and what weighing a chunk's rows takes: no product makes a copy."""
    monkeypatch.undo()  # poison takes memory
    rows, width = 16384, 768
    tensors = draw(rows, width, vocab, device, BF16)
    run(tensors)  # cuBLAS's workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
    kept = ours.linear_cross_entropy(**tensors, logit_scale=1.0, ignore_index=IGNORED, chunk=None)
    assert kept[0].requires_grad
    peak = torch.cuda.max_memory_allocated() - before
    logits = 6 * reference.LOGITS_GPU * 1.01  # and the pitch
    grads = 2 * leaves[0].numel() + 4 * leaves[1].numel()
    assert peak <= logits + grads + (32 << 20), f"{peak / 2**20:.0f} MiB"
