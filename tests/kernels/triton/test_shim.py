"""The repaired interpreter is right, and each of its traps is still there: a canary that fails can go.

A failing canary says that the installed Triton has mended a trap: delete the repair from shim.py with it,
once no supported release needs it.
"""

from __future__ import annotations

import inspect
import math
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from kernels.triton import shim
from ssmtrain.kernels.tuned import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="of the interpreter only")
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
MENDED_RANGE = RELEASE >= (3, 7) or np.lib.NumpyVersion(np.__version__) < "2.4.0"


@triton.jit
def _decay(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def _scan(a, b, out, ROWS: tl.constexpr, COLS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    _, state = tl.associative_scan((tl.load(a + at), tl.load(b + at)), AXIS, _decay, reverse=REVERSE)
    tl.store(out + at, state)


@triton.jit
def _dot(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr = "tf32"):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def _cast(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def _add(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def _masked(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < 1))


@triton.jit
def _first(x, out, n):
    tl.store(out, tl.load(x, mask=n > 0, other=0.0))


@triton.jit
def _copy(x, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def _rows(x, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row, tl.load(x + row * stride))


@triton.jit
def _far(out, first):
    wide = first.to(tl.int64)
    for step in tl.range(wide, wide + 1):
        tl.store(out + tl.arange(0, 4), (step + tl.arange(0, 4)) * 2)


@triton.jit
def _count(out, n):
    total = 0
    for step in range(n):
        total += step
    tl.store(out, total)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter as it comes."""
    builder = shim.interpreter.InterpreterBuilder
    monkeypatch.setattr(shim.interpreter.interpreter_builder, "options", shim.upstream_options)
    monkeypatch.setattr(shim.interpreter, "_convert_float", shim._upstream_convert)
    monkeypatch.setattr(shim.interpreter, "_patch_lang_tensor", shim._upstream_patch)
    monkeypatch.setattr(shim.interpreter, "_patch_lang_core", shim._upstream_core)
    monkeypatch.setattr(shim.interpreter.ScanOps, "generic_scan", shim._upstream_scan)
    monkeypatch.setattr(builder, "create_dot", shim._upstream_dot)
    monkeypatch.setattr(builder, "binary_op", shim._upstream_binary)
    monkeypatch.setattr(builder, "create_masked_load", shim._upstream_load)
    monkeypatch.setattr(builder, "create_masked_store", shim._upstream_store)
    monkeypatch.setattr(shim.interpreter.GridExecutor, "_restore_args_dev", shim._upstream_restore)


def scan(rows: int, cols: int, axis: int, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The interpreter's scan and torch's in float64."""
    a, b = torch.rand(rows, cols), torch.randn(rows, cols)
    out = torch.empty(rows, cols)
    _scan[(1,)](a, b, out, rows, cols, axis, reverse)
    steps, decays = b.double().movedim(axis, 0), a.double().movedim(axis, 0)
    if reverse:
        steps, decays = steps.flip(0), decays.flip(0)
    state, states = torch.zeros_like(steps[0]), []
    for decay, step in zip(decays, steps, strict=True):
        state = decay * state + step
        states.append(state)
    expected = torch.stack(states[::-1] if reverse else states)
    return out, expected.movedim(0, axis)


def dot(dtype: torch.dtype, precision: str = "tf32") -> tuple[torch.Tensor, torch.Tensor]:
    """The interpreter's product and torch's in float64."""
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, 16, precision)
    return out, a.double() @ b.double()


def casts() -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 to bf16 by the interpreter and by torch: ties, carries, subnormals, infinities, NaN among them."""
    special = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, 1e-40, -0.0, math.inf, -math.inf, math.nan]
    x = torch.cat([torch.tensor(special), torch.randn(1024 - len(special))])
    out = torch.empty(1024, dtype=torch.bfloat16)
    _cast[(1,)](x, out, 1024)
    return out, x.bfloat16()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans_are_right(axis: int, reverse: bool) -> None:
    torch.testing.assert_close(*scan(16, 8, axis, reverse), check_dtype=False)


@pytest.mark.parametrize("precision", ["tf32", "bf16x6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_right(dtype: torch.dtype, precision: str) -> None:
    torch.testing.assert_close(*dot(dtype, precision), check_dtype=False, rtol=1e-5, atol=1e-5)


def test_casts_to_bf16_round_to_nearest_even() -> None:
    torch.testing.assert_close(*casts(), rtol=0, atol=0, equal_nan=True)


def test_casts_from_bf16_are_exact() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(2**16)
    _cast[(1,)](x, out, 2**16)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_on_bf16_is_an_error() -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="add on bf16"):
        _add[(1,)](x, torch.empty_like(x), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8])
def test_lanes_masked_off_hold_nothing_to_rely_on(dtype: torch.dtype) -> None:
    out = torch.zeros(4, dtype=dtype)
    _masked[(1,)](torch.ones(4, dtype=dtype), out, 4)
    assert out[0] == 1
    assert not (out[1:] == 0).any() and not (out[1:] == 1).any()


def test_a_scalar_masked_off_is_its_other() -> None:
    out = torch.ones(1)
    _first[(1,)](torch.ones(1), out, 0)
    assert out.item() == 0


def test_ranges_take_bounds_known_at_run_time() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](out, 5)
    assert out.item() == 10


def test_what_lies_outside_of_the_tensors_is_out_of_bounds() -> None:
    whole, out = torch.arange(8.0), torch.zeros(4)
    _copy[(1,)](whole[2:5], out, 3, 4)
    assert out.tolist() == [2, 3, 4, 0]
    for x, y in ((whole[2:5], out), (out, whole[2:5])):
        with pytest.raises(Exception, match="outside of the launch's tensors"):
            _copy[(1,)](x, y, 4, 4)


def test_offsets_beyond_32_bits_are_seen_to_overflow() -> None:
    # Three elements, 2^30 apart, in memory that no one has touched.
    x = torch.empty(2**31 + 3, dtype=torch.bfloat16)[:: 2**30 + 1]
    x.copy_(torch.tensor([1, 2, 3]))
    out = torch.zeros(3, dtype=torch.bfloat16)
    _rows[(3,)](x, out, 2**30 + 1, WIDE=True)
    assert out.tolist() == [1, 2, 3]
    with pytest.raises(Exception, match="outside of the launch's tensors"), np.errstate(over="ignore"):
        _rows[(3,)](x, out, 2**30 + 1, WIDE=False)


def test_ranges_are_as_wide_as_their_bounds() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    _far[(1,)](out, 2**30)
    assert out.tolist() == [2**31, 2**31 + 2, 2**31 + 4, 2**31 + 6]


def test_the_last_programs_alone_may_run() -> None:
    x, out = torch.ones(40), torch.zeros(40)
    with shim.last_programs(3):
        _copy[(10,)](x, out, 40, 4)
        _copy[lambda meta: (1,)](x, out, 40, 4)
    assert out.tolist() == [1.0] * 4 + [0.0] * 24 + [1.0] * 12


def test_poisoned_memory_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kernel")
    module.torch = torch
    with monkeypatch.context() as patch:
        shim.poisoned(patch, module)
        x = module.torch.ones(2)
        assert module.torch.empty(3).isnan().all() and module.torch.empty_like(x).isnan().all()
        assert x.new_empty(3).isnan().all() and x.new_empty(3).shape == (3,)
        assert (module.torch.empty(2, dtype=torch.int32) == shim.POISON).all()
        assert module.torch.float32 is torch.float32
    assert module.torch is torch
    with pytest.raises(AssertionError, match="does not import torch"):
        shim.poisoned(monkeypatch, SimpleNamespace(__name__="other"))


@pytest.mark.usefixtures("upstream")
class TestCanaries:
    """Each fails when upstream has mended the trap."""

    def test_scans_cost_a_call_per_element(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        monkeypatch.setattr(_decay, "fn", lambda *args: calls.append(1) or args[2:])
        scan(8, 4, 0, False)
        assert len(calls) == 7 * 4

    def test_products_of_bf16_are_of_raw_bits(self) -> None:
        out, expected = dot(torch.bfloat16)
        assert not torch.allclose(out.double(), expected, rtol=1e-2, atol=1e-2)

    def test_products_of_bf16_parts_are_refused(self) -> None:
        with pytest.raises(InterpreterError, match="input_precision must be one of"):
            dot(torch.float32, "bf16x6")

    def test_casts_to_bf16_truncate(self) -> None:
        out, expected = casts()
        assert not torch.equal(out.nan_to_num(), expected.nan_to_num())

    def test_arithmetic_on_bf16_is_of_raw_bits(self) -> None:
        x, out = torch.ones(2, 4, dtype=torch.bfloat16)
        _add[(1,)](x, out, 4)
        assert not torch.equal(out, x + x)

    def test_ranges_forget_the_width_of_their_bounds(self) -> None:
        out = torch.zeros(4, dtype=torch.int64)
        with np.errstate(over="ignore"):
            _far[(1,)](out, 2**30)
        assert (out < 0).all()

    def test_neighbours_of_a_view_are_read(self) -> None:
        whole, out = torch.arange(8.0), torch.zeros(4)
        _copy[(1,)](whole[2:5], out, 4, 4)
        assert out.tolist() == [2, 3, 4, 5]

    def test_launches_copy_tensors_onto_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copied = []
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, other: copied.append(1))
        _cast[(1,)](torch.zeros(4), torch.zeros(4), 4)
        assert copied

    def test_lanes_masked_off_are_zero(self) -> None:
        out = torch.ones(4)
        _masked[(1,)](torch.ones(4), out, 4)
        assert out.tolist() == [1, 0, 0, 0]

    @pytest.mark.skipif(MENDED_RANGE, reason="Triton 3.7 mended it; older numpy allows it")
    def test_ranges_refuse_bounds_known_at_run_time(self) -> None:
        with pytest.raises(Exception, match="TypeError"):
            _count[(1,)](torch.zeros(1, dtype=torch.int32), 5)

    def test_integers_are_added_twice(self) -> None:
        assert shim.upstream_options.sanitize_overflow

    def test_types_are_looked_up_in_a_new_table(self) -> None:
        assert "np_types = {" in inspect.getsource(shim._upstream_type)
