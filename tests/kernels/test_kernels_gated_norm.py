"""The gated RMSNorm against its formula in float64, taken apart by autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cases import assert_all_close, outputs_and_grads
from ssmtrain.kernels.gated_norm import gated_norm, reference, stream_norm


def oracle(
    x: Tensor, weight: Tensor, z: Tensor | None = None, *, eps: float, n_groups: int, norm_before_gate: bool
) -> Tensor:
    """Group by group, as the formula reads."""
    gate = torch.ones_like(x) if z is None else z * torch.sigmoid(z)
    if not norm_before_gate:
        x = x * gate
    parts = [part / torch.sqrt((part * part).mean(-1, keepdim=True) + eps) for part in x.chunk(n_groups, -1)]
    y = torch.cat(parts, -1) * weight
    return y * gate if norm_before_gate else y


def make_inputs(gated: bool = True, shape: tuple[int, ...] = (2, 9, 12)) -> dict[str, Tensor]:
    """Random float64 inputs."""
    generator = torch.Generator().manual_seed(5)
    inputs = {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}
    inputs["weight"] = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    if gated:
        inputs["z"] = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    return inputs


def run(leaves: dict[str, Tensor], **options) -> tuple[Tensor]:
    return (gated_norm(leaves["x"], leaves.get("z"), leaves["weight"], **options),)


CASES = list(itertools.product([1, 3], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize("n_groups,norm_before_gate,gated,small", CASES)
def test_matches_the_formula(
    n_groups: int, norm_before_gate: bool, gated: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(reference, "CACHE", 12 * 4 * 5)  # pieces of 5 rows, the last one of 3
    inputs = make_inputs(gated)
    options = {"eps": 1e-5, "n_groups": n_groups, "norm_before_gate": norm_before_gate}
    truth = outputs_and_grads(lambda leaves: (oracle(**leaves, **options),), inputs)
    ours = outputs_and_grads(lambda leaves: run(leaves, **options), inputs)
    assert all(value.dtype == torch.float64 for value in ours.values())
    assert_all_close(ours, truth, 1e-12)
    single = outputs_and_grads(
        lambda leaves: run(leaves, **options), {name: t.float() for name, t in inputs.items()}
    )
    assert_all_close(single, truth, 2e-6)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_extremes_stay_finite_and_near_float64(norm_before_gate: bool) -> None:
    options = {"eps": 1e-5, "n_groups": 3, "norm_before_gate": norm_before_gate}
    inputs = make_inputs()
    cases = {
        "huge x": {"x": inputs["x"] * 1e4},
        "tiny x": {"x": inputs["x"] * 1e-12},
        "zero": {"x": torch.zeros_like(inputs["x"])},
        "equal": {"x": torch.ones_like(inputs["x"]), "z": torch.ones_like(inputs["x"])},
        "wide open and shut": {"z": inputs["z"] * 30},
    }
    for change in cases.values():
        extreme = inputs | change
        truth = outputs_and_grads(lambda leaves: (oracle(**leaves, **options),), extreme)
        ours = outputs_and_grads(
            lambda leaves: run(leaves, **options), {name: t.float() for name, t in extreme.items()}
        )
        assert all(torch.isfinite(value).all() for value in ours.values())
        assert_all_close(ours, truth, 1e-5)


def test_gradcheck() -> None:
    inputs = make_inputs(shape=(3, 4))
    leaves = [inputs[name].requires_grad_() for name in ("x", "z", "weight")]
    for norm_before_gate in (False, True):
        assert torch.autograd.gradcheck(
            lambda *tensors, first=norm_before_gate: gated_norm(*tensors, n_groups=2, norm_before_gate=first),
            leaves,
            fast_mode=True,
        )


def test_views_of_a_wider_projection_and_any_leading_axes() -> None:
    inputs = make_inputs()
    wide = torch.cat([inputs["z"], inputs["x"]], -1)
    y = gated_norm(inputs["x"], inputs["z"], inputs["weight"])
    view = gated_norm(wide[..., 12:], wide[..., :12], inputs["weight"])
    torch.testing.assert_close(view, y, rtol=1e-13, atol=1e-13)
    token = gated_norm(inputs["x"][0, 0], inputs["z"][0, 0], inputs["weight"])
    torch.testing.assert_close(token, y[0, 0], rtol=1e-13, atol=1e-13)
    turned = gated_norm(inputs["x"].transpose(0, 1), inputs["z"].transpose(0, 1), inputs["weight"])
    torch.testing.assert_close(turned, y.transpose(0, 1), rtol=1e-13, atol=1e-13)


def test_half_precision_is_computed_in_fp32() -> None:
    inputs = make_inputs()
    x, z, weight = inputs["x"].bfloat16().requires_grad_(), inputs["z"].bfloat16(), inputs["weight"].float()
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_norm(x, z, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, gated_norm(x.float(), z.float(), weight).bfloat16())
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_out_dtype_rounds_once(dtype: torch.dtype, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CACHE", 12 * 4 * 5)
    for own in (torch.float32, torch.bfloat16):
        inputs = {name: t.to(own) for name, t in make_inputs(gated).items()}
        ours = outputs_and_grads(lambda leaves: run(leaves, out_dtype=dtype), inputs)
        plain = outputs_and_grads(
            lambda leaves: (run({name: t.float() for name, t in leaves.items()})[0].to(dtype),), inputs
        )
        assert ours["output 0"].dtype == dtype and ours["grad x"].dtype == own
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_stream_norm_is_the_stream_and_its_norm(used: tuple[int, ...]) -> None:
    options = {"eps": 1e-5, "n_groups": 1, "norm_before_gate": False}

    def pick(*outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs[i] for i in used)

    inputs = make_inputs(gated=False)
    truth = outputs_and_grads(lambda leaves: pick(leaves["x"] + 0, oracle(**leaves, **options)), inputs)
    ours = outputs_and_grads(lambda leaves: pick(*stream_norm(leaves["x"] + 0, leaves["weight"])), inputs)
    assert_all_close(ours, truth, 1e-12)
    single = {name: t.float() for name, t in inputs.items()}
    for dtype, tolerance in ((None, 2e-6), (torch.bfloat16, 4e-3)):
        near = outputs_and_grads(
            lambda leaves, dtype=dtype: pick(
                *stream_norm(leaves["x"] + 0, leaves["weight"], out_dtype=dtype)
            ),
            single,
        )
        assert_all_close(near, truth, tolerance)
        assert near["grad x"].dtype == torch.float32


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_stream_norm_of_a_sum(used: tuple[int, ...]) -> None:
    options = {"eps": 1e-5, "n_groups": 1, "norm_before_gate": False}
    inputs = make_inputs(gated=False)
    inputs["branch"] = inputs["x"].flip(0) - 0.5

    def plain(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = x + 0.25 * branch
        return tuple((total, oracle(total, weight=weight, z=None, **options))[i] for i in used)

    def ours(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = stream_norm(leaves["x"], leaves["weight"], branch=leaves["branch"], scale=0.25)
        return tuple(found[i] for i in used)

    truth = outputs_and_grads(lambda leaves: plain(**leaves), inputs)
    assert_all_close(outputs_and_grads(ours, inputs), truth, 1e-12)
    mixed = {name: t.float() for name, t in inputs.items()} | {"branch": inputs["branch"].bfloat16()}
    near = outputs_and_grads(ours, mixed)
    assert near["output 0"].dtype == torch.float32 and near["grad branch"].dtype == torch.bfloat16
    assert_all_close(near, truth, 4e-3)


def test_shapes_that_disagree_are_named() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="branch"):
        stream_norm(inputs["x"], inputs["weight"], branch=inputs["x"][:1])
    with pytest.raises(ValueError, match="stream_norm"):
        stream_norm(inputs["x"], inputs["weight"][:-1])
    with pytest.raises(ValueError, match="n_groups"):
        gated_norm(inputs["x"], inputs["z"], inputs["weight"], n_groups=5)
    with pytest.raises(ValueError, match="differ"):
        gated_norm(inputs["x"], inputs["z"][:1], inputs["weight"])
