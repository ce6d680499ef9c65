"""The Triton gated RMSNorm against the formula in float64 and the torch reference in its own dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cases import assert_all_close, distance
from kernels.triton.shim import poisoned
from ssmtrain.kernels import tuned
from ssmtrain.kernels.gated_norm import reference
from ssmtrain.kernels.gated_norm import triton as ours
from ssmtrain.kernels.gated_norm.projected import projected_norm
from ssmtrain.kernels.parts import parts

GATES = ("none", "first", "last")
OPTIONS = {"eps": 1e-5, "n_groups": 1}


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that a kernel forgets to write shows."""
    poisoned(monkeypatch, ours)


def draw(
    shape: tuple[int, ...], gate: str, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 3
) -> dict[str, Tensor]:
    """Random inputs and the cotangent; the weight is fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name in ("x", "z", "dy")}
    tensors["z"] *= 2
    if gate == "none":
        del tensors["z"]
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return tensors | {"weight": torch.randn(shape[-1], generator=generator).to(device)}


def run(tensors: dict[str, Tensor], gate: str, norm=ours.gated_norm, **options) -> dict[str, Tensor]:
    """The output and all gradients; inputs keep their strides."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "dy"}
    options = OPTIONS | options | {"norm_before_gate": gate == "last"}
    y = norm(leaves["x"], leaves.get("z"), leaves["weight"], **options)
    y.backward(tensors["dy"])
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def exact(tensors: dict[str, Tensor], gate: str, **options) -> dict[str, Tensor]:
    """The same in float64, by the reference."""
    return run({name: t.double() for name, t in tensors.items()}, gate, reference.gated_norm, **options)


STREAM = {
    "ours": ours.stream_norm,
    "apart": lambda x, weight, branch, scale, **options: (
        total := reference.add_branch(x, branch, scale),
        reference.gated_norm(total, None, weight, n_groups=1, norm_before_gate=False, **options),
    ),
}


def run_stream(
    tensors: dict[str, Tensor],
    used: str = "both",
    norm: str = "ours",
    out_dtype: torch.dtype | None = None,
    scale: float = 0.75,
) -> dict[str, Tensor]:
    """The norm of a stream, and all gradients where both outputs, or one, are read on."""
    names = ("x", "weight", "branch")
    leaves = {name: tensors[name].detach().requires_grad_() for name in names if name in tensors}
    x, weight, branch = (leaves.get(name) for name in names)
    stream, y = STREAM[norm](x, weight, branch=branch, scale=scale, eps=1e-5, out_dtype=out_dtype)
    found = {"stream": stream, "y": y}
    grads = {"stream": tensors["dx"].to(stream.dtype), "y": tensors["dy"].to(y.dtype)}
    read = ["stream", "y"] if used == "both" else [used]
    torch.autograd.backward([found[name] for name in read], [grads[name] for name in read])
    found |= {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return {name: t.detach() for name, t in found.items()}


def draw_stream(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    branch: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Inputs of `run_stream`, the stream's gradient among them, and a branch of that dtype."""
    tensors = draw(shape, "first", device, dtype)
    tensors["dx"] = tensors.pop("z")
    if branch is not None:
        tensors["branch"] = draw(shape, "none", device, branch, seed=4)["x"]
    return tensors


def use(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Put a launch configuration in the place of the one for the shape."""
    known = ("BLOCK", "PIECES", "ROWS", "num_warps", "STAGES", "maxnreg")
    assert set(changes) <= set(known)

    def lookup(kernel: str, device: torch.device, key: str, fallback: tuned.Config) -> tuned.Config:
        return fallback | {name: value for name, value in changes.items() if name in fallback}

    monkeypatch.setattr(tuned, "lookup", lookup)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "width,n_groups,rows",
    [(8, 1, 3), (48, 3, 9), (80, 1, 1), (82, 2, 3), (96, 4, 2), (164, 1, 9), (3, 3, 2)],
)
def test_matches_float64(gate: str, width: int, n_groups: int, rows: int, device: torch.device) -> None:
    tensors = draw((rows, width), gate, device)
    # A group of one channel is its own norm: dx is the small difference of large terms.
    tolerance = 1e-6 if width > n_groups else 1e-2
    truth = exact(tensors, gate, n_groups=n_groups)
    assert_all_close(run(tensors, gate, n_groups=n_groups), truth, tolerance)


@pytest.mark.parametrize("gate,width,n_groups", [("none", 72, 1), ("first", 64, 1), ("last", 84, 2)])
def test_groups_wider_than_a_program(
    gate: str, width: int, n_groups: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward reads twice; backward cuts the group in slices, which take their mean from a kernel before."""
    use(monkeypatch, BLOCK=16, PIECES=2, ROWS=1)
    tensors = draw((2, width), gate, device)
    truth = exact(tensors, gate, n_groups=n_groups)
    assert_all_close(run(tensors, gate, n_groups=n_groups), truth, 1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_one_row_per_program_and_no_masks(
    gate: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of every real width."""
    use(monkeypatch, BLOCK=32, PIECES=5, ROWS=1)
    tensors = draw((2, 2, 160), gate, device)
    assert_all_close(run(tensors, gate), exact(tensors, gate), 1e-6)


def test_runs_and_their_sum(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one row, the last one short, one for all; and more parts than a step of the sum takes."""
    tensors = draw((20, 4), "first", device)
    truth = exact(tensors, "first")
    for length in (1, 7, 1000):
        monkeypatch.setattr(ours, "_run_length", lambda *shape, length=length: length)
        assert_all_close(run(tensors, "first"), truth, 1e-5)
    parts = torch.randn(600, 20, generator=torch.Generator().manual_seed(1)).to(device)
    total = torch.full((20,), float("nan"), device=device)
    ours._add[(2,)](parts, total, 600, WIDTH=20, BLOCK=16, ROWS=256)
    assert distance(total, parts.double().sum(0)) < 1e-6


@pytest.mark.parametrize("gate", GATES)
def test_slices_of_a_projection_are_read_in_place(gate: str, device: torch.device) -> None:
    tensors = draw((2, 5, 48), gate, device)
    truth = run(tensors, gate)
    sliced = dict(tensors)
    for name, pad in (("x", 8), ("z", 16), ("dy", 24)):
        if name in tensors:
            nan = torch.full((2, 5, pad), float("nan"), device=device)
            sliced[name] = torch.cat([nan, tensors[name], nan], -1)[..., pad : 48 + pad]
    for name, tensor in sliced.items():
        if name != "weight":
            assert not tensor.is_contiguous() and ours._rows(tensor).data_ptr() == tensor.data_ptr()
    views = run(sliced, gate)
    assert all(torch.equal(views[name], truth[name]) for name in truth)
    assert all(value.is_contiguous() for value in views.values())


def test_other_layouts(device: torch.device) -> None:
    """Channels apart, leading axes that no stride spans, one cotangent for all, and no leading axis."""
    tensors = draw((3, 4, 16), "first", device)
    truth = run(tensors, "first")
    apart = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    turned = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t
        for name, t in tensors.items()
    }
    for change in (apart, turned):
        same = run(change, "first")
        assert all(torch.equal(same[name], truth[name]) for name in truth)
    for dy in (torch.ones(1, 1, 1, device=device), tensors["dy"][:1, :1]):
        broadcast = tensors | {"dy": dy.expand(3, 4, 16)}
        assert_all_close(run(broadcast, "first"), exact(broadcast, "first"), 1e-6)
    token = {name: t[0, 0] if t.dim() == 3 else t for name, t in tensors.items()}
    assert torch.equal(run(token, "first")["dx"], truth["dx"][0, 0])


@pytest.mark.parametrize("gate", GATES)
def test_extremes_are_finite_and_near_float64(gate: str, device: torch.device) -> None:
    tensors = draw((4, 48), gate, device)
    scale = torch.tensor([1e4, 1e-20, 0.0, 1.0], device=device)[:, None]
    changes = [{"x": tensors["x"] * scale}]
    if gate != "none":
        changes += [{"z": tensors["z"] * 50}, {"z": torch.full_like(tensors["z"], -1e4)}]
    for change in changes:
        extreme = tensors | change
        found, truth = run(extreme, gate), exact(extreme, gate)
        assert all(torch.isfinite(value).all() for value in found.values())
        for row in range(4):
            for name in ("y", "dx"):
                assert distance(found[name][row], truth[name][row]) < 1e-5, (name, row)
        assert_all_close(found, truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", GATES)
def test_half_precision_errs_as_little_as_the_reference(
    gate: str, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = draw((48, 96), gate, device, dtype)
    truth = exact(tensors, gate)
    found, reference_ = run(tensors, gate), run(tensors, gate, reference.gated_norm)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "dweight" else dtype)
        assert distance(value, truth[name]) <= 2 * distance(reference_[name], truth[name]) + 1e-7, name
        error = (value.double() - truth[name]).flatten()
        assert abs(error.mean()) <= 4 * error.std() / error.numel() ** 0.5, f"{name} is biased"


def test_mixed_dtypes(device: torch.device) -> None:
    """Each gradient has its input's dtype."""
    tensors = draw((4, 16), "first", device)
    tensors |= {"z": tensors["z"].bfloat16(), "weight": tensors["weight"].half()}
    found = run(tensors, "first")
    assert [found[name].dtype for name in ("y", "dx", "dz", "dweight")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert_all_close(found, exact(tensors, "first"), 1e-2)


def test_float64_is_the_reference(device: torch.device) -> None:
    tensors = {name: t.double() for name, t in draw((3, 8), "first", device).items()}
    found, truth = run(tensors, "first"), exact(tensors, "first")
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_dtype_rounds_once(gate: str, dtype: torch.dtype, device: torch.device) -> None:
    """From fp32, with the bits of the fp32 result rounded; and up from bf16."""
    tensors = draw((5, 96), gate, device)
    plain = run(tensors, gate, out_dtype=torch.float32)
    assert all(torch.equal(value, run(tensors, gate)[name]) for name, value in plain.items())
    low = tensors | {"dy": tensors["dy"].to(dtype)}
    found = run(low, gate, out_dtype=dtype)
    assert found["y"].dtype == dtype and torch.equal(found["y"], plain["y"].to(dtype))
    same = run(low | {"dy": low["dy"].float()}, gate)
    assert_all_close(found | {"y": same["y"]}, same, 1e-6)
    up = {name: t if name == "dy" else t.to(dtype) for name, t in tensors.items()}
    found = run(up, gate, out_dtype=torch.float32)
    assert found["y"].dtype == torch.float32 and found["dx"].dtype == dtype
    assert distance(found["y"], exact(up, gate)["y"]) < 1e-6


@pytest.mark.parametrize("used", ["both", "stream", "y"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 9, 80), (1, 164), (5, 3)])
def test_stream_norm_matches_float64(shape: tuple[int, ...], used: str, device: torch.device) -> None:
    tensors = draw_stream(shape, device)
    truth = run_stream({name: t.double() for name, t in tensors.items()}, used, "apart")
    assert_all_close(run_stream(tensors, used), truth, 1e-6)
    low = run_stream(tensors, used, out_dtype=torch.bfloat16)
    assert low["y"].dtype == torch.bfloat16 and low["stream"].dtype == torch.float32
    assert low["dx"].dtype == torch.float32
    assert_all_close(low, truth, 5e-3)


@pytest.mark.parametrize("used", ["both", "stream", "y"])
@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 8), (2, 9, 80), (1, 164), (5, 3)])
def test_stream_norm_of_a_sum_matches_float64(
    shape: tuple[int, ...], branch: torch.dtype, used: str, device: torch.device
) -> None:
    tensors = draw_stream(shape, device, branch=branch)
    truth = run_stream({name: t.double() for name, t in tensors.items()}, used, "apart")
    found = run_stream(tensors, used)
    assert found["dbranch"].dtype == branch and found["stream"].dtype == torch.float32
    d_branch = truth.pop("dbranch"), found.pop("dbranch")
    assert_all_close(found, truth, 1e-6)
    assert distance(d_branch[1], d_branch[0]) < (5e-3 if branch == torch.bfloat16 else 1e-6)
    low = run_stream(tensors, used, out_dtype=torch.bfloat16)
    assert torch.equal(low["stream"], found["stream"])
    assert torch.equal(low["y"], found["y"].bfloat16())


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_branch_of_the_streams_dtype(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    """Its gradient is the stream's, scaled; the norm is that of the sum as it is written."""
    tensors = draw_stream((4, 48), device, dtype, dtype)
    found = run_stream(tensors, scale=scale)
    alone = run_stream({**tensors, "x": found["stream"], "branch": torch.zeros_like(found["stream"])})
    assert found["stream"].dtype == dtype and torch.equal(found["y"], alone["y"])
    assert torch.equal(found["dx"], alone["dx"])
    near = 5e-3 if dtype == torch.bfloat16 else 1e-7
    assert distance(found["dbranch"], scale * found["dx"]) <= near
    assert scale != 1.0 or torch.equal(found["dbranch"], found["dx"])


def test_a_narrow_stream_and_a_wide_branch(device: torch.device) -> None:
    tensors = draw_stream((4, 48), device, torch.bfloat16, torch.float32)
    found = run_stream(tensors)
    assert found["stream"].dtype == found["dbranch"].dtype == torch.float32
    assert found["dx"].dtype == torch.bfloat16
    truth = run_stream({name: t.double() for name, t in tensors.items()}, norm="apart")
    assert_all_close(found, truth, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stream_norm_rounds_its_sum_once(dtype: torch.dtype, device: torch.device) -> None:
    """The sum is of fp32 numbers: in bf16 it errs less than the sum of rounded ones."""
    tensors = draw_stream((48, 96), device, dtype)
    truth = run_stream({name: t.double() for name, t in tensors.items()}, norm="apart")["dx"]
    found, apart = run_stream(tensors)["dx"], run_stream(tensors, norm="apart")["dx"]
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, truth.to(dtype)) or distance(found, truth) < 0.9 * distance(apart, truth)
    else:
        assert distance(found, truth) < 1e-7


@pytest.mark.parametrize("branch", [None, torch.float32])
def test_stream_norm_of_rows_wider_than_a_program(
    branch: torch.dtype | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, BLOCK=16, PIECES=2, ROWS=1)
    tensors = draw_stream((2, 72), device, branch=branch)
    truth = run_stream({name: t.double() for name, t in tensors.items()}, norm="apart")
    assert_all_close(run_stream(tensors), truth, 1e-6)
    assert_all_close(run_stream(tensors, out_dtype=torch.bfloat16), truth, 5e-3)


@pytest.mark.parametrize("gate", GATES)
def test_an_added_gradient_joins_that_of_x_alone(gate: str, device: torch.device) -> None:
    tensors = draw((9, 48), gate, device)
    x, z, weight, dy = (tensors.get(name) for name in ("x", "z", "weight", "dy"))
    _, scales = ours._norm(x, z, weight, 1e-5, 3, gate == "last", None)

    def back(add: Tensor | None) -> tuple[Tensor | None, ...]:
        dz = None if z is None else torch.empty_like(z)
        rest = add, dz, 1.0, ours._gate(z, gate == "last")
        return *ours._launch_back(dy, x, z, weight, scales, *rest), dz

    plain, found = back(None), back(100 * x)
    torch.testing.assert_close(found[0], plain[0] + 100 * x, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], plain[1]) and (z is None or torch.equal(found[2], plain[2]))


@pytest.mark.parametrize("branch", [None, torch.bfloat16])
def test_stream_norm_takes_any_layout_and_touches_no_input(
    branch: torch.dtype | None, device: torch.device
) -> None:
    tensors = draw_stream((3, 4, 16), device, branch=branch)
    truth = run_stream(tensors)
    sliced = dict(tensors)
    for name, pad in (("x", 8), ("dy", 16), ("dx", 24), ("branch", 40))[: 3 + (branch is not None)]:
        nan = torch.full((3, 4, pad), float("nan"), dtype=tensors[name].dtype, device=device)
        sliced[name] = torch.cat([nan, tensors[name], nan], -1)[..., pad : 16 + pad]
    turned = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t
        for name, t in tensors.items()
    }
    before = {name: t.clone() for name, t in tensors.items()}
    for change in (sliced, turned):
        same = run_stream(change)
        assert all(torch.equal(same[name], truth[name]) for name in truth)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    one = tensors | {"dx": torch.ones(1, 1, 1, device=device).expand(3, 4, 16)}
    wide = {name: t.double() for name, t in one.items()}
    assert_all_close(run_stream(one), run_stream(wide, norm="apart"), 1e-6 if branch is None else 5e-3)
    assert run_stream({name: t[:0] if t.dim() == 3 else t for name, t in tensors.items()})["dx"].numel() == 0


def test_stream_norm_gives_x_itself_and_only_the_gradients_wanted(device: torch.device) -> None:
    tensors = draw_stream((3, 8), device)
    x, weight = tensors["x"], tensors["weight"].requires_grad_()
    for leaf in (x, x.clone().requires_grad_()):
        stream, y = ours.stream_norm(leaf, weight, eps=1e-5)
        assert stream.data_ptr() == leaf.data_ptr() and torch.equal(stream, leaf)
        (stream * tensors["dx"] + y * tensors["dy"]).sum().backward()
        assert (leaf.grad is None) == (leaf is x)
    assert distance(weight.grad, 2 * run_stream(tensors)["dweight"]) < 1e-6
    with torch.no_grad():
        stream, y = ours.stream_norm(x, weight, eps=1e-5)
    assert not y.requires_grad and torch.equal(stream, x)


def test_stream_norm_recomputes(device: torch.device) -> None:
    tensors = draw_stream((2, 5, 16), device)
    plain = run_stream(tensors)
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "weight")]
    stream, y = checkpoint(ours.stream_norm, *leaves, eps=1e-5, use_reentrant=False)
    torch.autograd.backward([stream, y], [tensors["dx"], tensors["dy"]])
    assert torch.equal(leaves[0].grad, plain["dx"]) and torch.equal(leaves[1].grad, plain["dweight"])


def test_no_rows(device: torch.device) -> None:
    found = run(draw((2, 0, 8), "first", device), "first")
    assert found["y"].shape == found["dx"].shape == found["dz"].shape == (2, 0, 8)
    assert torch.equal(found["dweight"], torch.zeros(8, device=device))


def test_only_what_needs_a_gradient_gets_one(device: torch.device) -> None:
    tensors = draw((3, 8), "first", device)
    x = tensors["x"].requires_grad_()
    y = ours.gated_norm(x, tensors["z"], tensors["weight"], **OPTIONS, norm_before_gate=False)
    y.backward(tensors["dy"])
    assert tensors["z"].grad is None and tensors["weight"].grad is None
    assert torch.equal(x.grad, run(tensors, "first")["dx"])


def test_tiles() -> None:
    """Real widths have no idle lanes, every group fits its tile, and programs are of a legal size."""
    for most in (ours.KEPT_FORWARD, ours.KEPT_BACKWARD):
        for channels in range(1, 512 * most, 61):
            tile = ours._tile(channels, most)
            threads = 32 * tile["num_warps"]
            lanes = tile["BLOCK"] * tile["PIECES"]
            assert channels <= lanes < channels + tile["BLOCK"]
            assert tile["ROWS"] * lanes <= most * threads and 4 <= tile["num_warps"] <= ours.MOST_WARPS
        assert ours._tile(512 * most + 1, most) is None
        for channels in (160, 768, 1024, 1536, 2048, 2560, 4096, 5120, 8192, 10240):
            tile = ours._tile(channels, most)
            assert tile["BLOCK"] * tile["PIECES"] == channels
    for channels in (80, 768, 5120, 10240, 16384, 65536):
        for item_bytes in (4, 6, 8, 10, 12):
            config = ours._backward_config(channels, item_bytes)
            ahead = config["BLOCK"] * config["PIECES"] * config["ROWS"] * item_bytes * (config["STAGES"] - 1)
            assert ahead <= ours.PIPELINE_BYTES


def test_runs_depend_on_the_shape_alone() -> None:
    for rows, programs in ((1, 1), (256, 32), (4096, 256), (8192, 512), (32768, 1024), (1 << 20, 1024)):
        length = ours._run_length(rows, 1, 5120)
        assert -(-rows // length) == programs
    assert ours._run_length(32768, 8, 1024) == 256


def test_opcheck(device: torch.device) -> None:
    for gate in ("none", "first"):
        tensors = draw((2, 8), gate, device)
        names = ("x", "z", "weight")
        inputs = [tensors[name].requires_grad_() if name in tensors else None for name in names]
        for out_dtype in (None, torch.bfloat16):
            torch.library.opcheck(ours._norm.custom, (*inputs, 1e-5, 2, gate == "last", out_dtype))
        x, z, weight = (None if t is None else t.detach() for t in inputs)
        scales = ours._norm(x, z, weight, 1e-5, 2, False, None)[1]
        torch.library.opcheck(ours._norm_back.custom, (tensors["dy"], x, z, weight, scales, 2, False))
    tensors = draw_stream((2, 8), device, branch=torch.bfloat16)
    x, branch, weight, dy = (tensors[name] for name in ("x", "branch", "weight", "dy"))
    for out_dtype in (None, torch.bfloat16):
        torch.library.opcheck(ours._sum_norm.custom, (x, branch, weight, 0.5, 1e-5, out_dtype))
    scales = ours._norm(x, None, weight, 1e-5, 1, False, None)[1]
    for add, dtype in ((None, None), (dy, torch.bfloat16)):
        torch.library.opcheck(ours._stream_norm_back.custom, (dy, x, weight, scales, add, dtype, 0.5))


def test_compiles_whole_and_recomputes(device: torch.device) -> None:
    """torch.compile takes it as one op, forward and backward, also under activation checkpointing."""
    tensors = draw((2, 5, 16), "first", device)
    truth = run(tensors, "first")
    compiled = torch.compile(ours.gated_norm, fullgraph=True, backend="aot_eager")

    def recomputed(*args: Tensor, **options) -> Tensor:
        return checkpoint(ours.gated_norm, *args, use_reentrant=False, **options)

    for norm in (compiled, recomputed):
        found = run(tensors, "first", norm)
        assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width,n_groups", [(5120, 1), (2048, 1), (4096, 1), (768, 1), (8192, 8), (1000, 2)])
def test_real_widths(width: int, n_groups: int, dtype: torch.dtype, gate: str, device: torch.device) -> None:
    """Near float64, the slice read in place, and the same bits ten times."""
    tensors = draw((3, 700, width), gate, device, dtype)
    if gate != "none":
        tensors["z"] = torch.cat([tensors["z"], tensors["z"][..., :336]], -1)[..., :width]
    truth = exact(tensors, gate, n_groups=n_groups)
    reference_ = run(tensors, gate, reference.gated_norm, n_groups=n_groups)
    found = run(tensors, gate, n_groups=n_groups)
    for name, value in found.items():
        assert distance(value, truth[name]) <= 2 * distance(reference_[name], truth[name]) + 1e-6, name
    for _ in range(10):
        again = run(tensors, gate, n_groups=n_groups)
        assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("width", [7168, 10240, 12288, 20480, 40000, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wide_rows(width: int, gate: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every tile up to the widest, and what is wider."""
    tensors = draw((67, width), gate, device, dtype)
    truth, found = exact(tensors, gate), run(tensors, gate)
    assert_all_close(found, truth, 1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [torch.bfloat16, None])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 1000, 2048, 2560, 5120, 10240, 20480])
def test_stream_norm_of_real_widths(
    width: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    branch: torch.dtype | None,
    device: torch.device,
) -> None:
    """Near float64, and the same bits ten times."""
    tensors = draw_stream((3, 700, width), device, dtype, branch)
    truth = run_stream({name: t.double() for name, t in tensors.items()}, norm="apart")
    found = run_stream(tensors, out_dtype=out_dtype)
    apart = run_stream(tensors, norm="apart", out_dtype=out_dtype)
    for name, value in found.items():
        assert value.dtype == apart[name].dtype
        assert distance(value, truth[name]) <= 2 * distance(apart[name], truth[name]) + 1e-6, name
    for _ in range(10):
        again = run_stream(tensors, out_dtype=out_dtype)
        assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.gpu
def test_compiled_by_inductor(device: torch.device) -> None:
    tensors = draw((2, 64, 5120), "first", device, torch.bfloat16)
    truth = run(tensors, "first")
    found = run(tensors, "first", torch.compile(ours.gated_norm, fullgraph=True))
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.gpu
def test_more_than_two_billion_elements(device: torch.device) -> None:
    rows, width = 430_000, 5120
    tensors = {
        name: torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for name in ("x", "z", "dy")
    }
    ends = draw((16, width), "first", device, torch.bfloat16)
    for name, tensor in tensors.items():
        tensor[:8], tensor[-8:] = ends[name][:8], ends[name][8:]
    found = run(tensors | {"weight": ends["weight"]}, "first")
    truth = run(ends, "first")
    for name in ("y", "dx", "dz"):
        assert torch.equal(torch.cat([found[name][:8], found[name][-8:]]), truth[name])
        assert not found[name][8:-8].any()
    assert distance(found["dweight"], truth["dweight"]) < 1e-6


def run_projected(
    tensors: dict[str, Tensor], gate: str, projection: Tensor, bias: Tensor, fused: bool, n_groups: int
) -> dict[str, Tensor]:
    """A norm and a product behind it, and all gradients; z is a part of something wider."""
    leaves = {"x": tensors["x"].detach().requires_grad_(), "weight": tensors["weight"].detach().clone()}
    leaves["wide"] = torch.cat([tensors["z"], tensors["z"][..., :8]], -1).requires_grad_()
    leaves["weight"].requires_grad_()
    leaves["projection"], leaves["bias"] = (t.detach().clone().requires_grad_() for t in (projection, bias))
    z, _ = parts(leaves["wide"], [tensors["z"].shape[-1:], (8,)])
    options = {"eps": 1e-5, "n_groups": n_groups, "norm_before_gate": gate == "last"}
    rest = leaves["projection"], leaves["bias"]
    if fused:
        out = projected_norm(leaves["x"], z, leaves["weight"], *rest, **options)
    else:
        y = ours.gated_norm(leaves["x"], z, leaves["weight"], **options)
        out = torch.nn.functional.linear(y, *(t.to(y.dtype) for t in rest))
    out.backward(tensors["dy"][..., : len(projection)])
    return {"out": out.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate,n_groups", [("first", 1), ("first", 2), ("last", 1)])
def test_with_the_product_behind_it(
    gate: str, n_groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The bits of norm and product apart, but for the projection's gradient, which is not rounded."""
    tensors = draw((2, 6, 48), gate, device, dtype)
    draws = torch.Generator().manual_seed(5)
    projection, bias = (torch.randn(shape, generator=draws).to(device) for shape in ((20, 48), (20,)))
    found = run_projected(tensors, gate, projection, bias, True, n_groups)
    apart = run_projected(tensors, gate, projection, bias, False, n_groups)
    assert found.keys() == apart.keys()
    for name, one in apart.items():
        assert found[name].dtype == one.dtype, name
        if name not in ("dprojection", "dbias"):
            assert torch.equal(found[name], one), name
    y = exact(tensors, gate, n_groups=n_groups)["y"].flatten(0, 1)
    rows = tensors["dy"][..., :20].double().flatten(0, 1)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert distance(found["dprojection"], rows.t() @ y) < tolerance
    assert distance(found["dbias"], rows.sum(0)) < 1e-6


def test_a_group_in_slices_with_the_product_behind_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, BLOCK=16, PIECES=2, ROWS=1)
    tensors = draw((3, 72), "first", device)
    projection = torch.randn(9, 72, generator=torch.Generator().manual_seed(5)).to(device)
    args = tensors, "first", projection, torch.zeros(9, device=device)
    found, apart = (run_projected(*args, fused, 1) for fused in (True, False))
    assert_all_close(found, {name: one.double() for name, one in apart.items()}, 1e-6)
