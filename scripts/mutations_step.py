"""Mutations of the optimiser's kernel, of weights in 16 bits, and of norms made again for their readers."""

from __future__ import annotations

from mutation import KERNELS, Mutation

STEP = "tests/kernels/triton/test_triton_adamw.py"
NARROW = "tests/kernels/test_kernels_narrow.py"
OPTIMISER = ("tests/train/test_train_adamw.py", "-m", "not gpu")
FORGET = "tests/layers/test_layers_forget.py"


def step(name: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of the kernel."""
    return Mutation(f"step: {name}", f"{KERNELS}/adamw/triton.py", old, new, (STEP,), occurrence)


def narrow(name: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of narrow.py."""
    return Mutation(f"narrow: {name}", f"{KERNELS}/narrow.py", old, new, (NARROW,), occurrence)


def optimiser(name: str, old: str, new: str) -> Mutation:
    """A mutation of the optimiser around it."""
    return Mutation(f"optimiser: {name}", "src/ssmtrain/train/adamw.py", old, new, OPTIMISER)


def clips(name: str, old: str, new: str) -> Mutation:
    """A mutation of who asks it to step."""
    return Mutation(f"optimiser: {name}", "src/ssmtrain/train/optim.py", old, new, OPTIMISER)


def reader(name: str, old: str, new: str, file: str = "reader") -> Mutation:
    """A mutation of a norm and its reader."""
    return Mutation(f"reader: {name}", f"{KERNELS}/gated_norm/{file}.py", old, new, (FORGET,))


STEPS = [
    step("the gradient is not scaled", "g *= scale", "g *= 1.0"),
    step("the average forgets all", "m += new1 * (g - m)", "m = new1 * g"),
    step("the square is not squared", "new2 * (g * g)", "new2 * g"),
    step("no decay", "p = keep * p -", "p = p -"),
    step(
        "epsilon inside of the root",
        "below = tl.div_rn(tl.sqrt_rn(v), root) + eps",
        "below = tl.div_rn(tl.sqrt_rn(v + eps), root)",
    ),
    step("no correction of the first average", "rates.lr / (1.0 - beta1**rates.step)", "rates.lr"),
    step("no correction of the second", "math.sqrt(1.0 - beta2**rates.step)", "1.0"),
    step("a copy is written everywhere", "if kept != 0:", "if True:"),
    step("no copy is written", "_store(copy + at, p.to(copy.dtype.element_ty), inside, WHOLE)", "pass"),
    step("masks are left out", "tl.store(at, value, mask=inside)", "tl.store(at, value)"),
    step("a span too many is read whole", "if first + SPAN <= count:", "if first <= count:"),
    step("all spans are a tensor's first", ".to(tl.int64) * SPAN, tl.load", ".to(tl.int64) * 0, tl.load"),
    step("every tensor is the first", "row = rows + tl.load(place).to(tl.int64) * COLUMNS", "row = rows"),
    step("addresses are aligned", "aligned = all(", "aligned = any("),
    step("tables are kept for good", "@functools.lru_cache(KEPT)", "@functools.lru_cache(None)"),
    step(
        "the norm is of the parameters",
        "grad = _address(row, 1, tl.float32, ALIGNED)\n    total",
        "grad = _address(row, 0, tl.float32, ALIGNED)\n    total",
    ),
    step(
        "the norm leaves the last numbers out",
        "g = tl.load(grad + at, mask=at < count, other=0.0)",
        "g = tl.zeros((BLOCK,), tl.float32)",
    ),
    narrow("a copy counts whatever is done to its weight", "self.version == weight._version and", ""),
    narrow("a copy counts wherever its weight lies", " and self.address == weight.data_ptr()", ""),
    narrow(
        "a copy counts before it is written",
        "found.version = -1\n    return",
        "found.note(weight)\n    return",
    ),
    narrow("a copy is made of what is no leaf", "weight.is_leaf and weight.requires_grad", "True"),
    narrow("a copy of another type serves", "if found is None or found.dtype != dtype:", "if found is None:"),
    narrow("torch is not told", "torch.autograd.graph.increment_version(weights + copies)", "pass"),
    narrow(
        "torch is not told of copies", "increment_version(weights + copies)", "increment_version(weights)"
    ),
    narrow("nothing is renewed", "and not found.current(weight)", "and False"),
    narrow("all is renewed", "and not found.current(weight)", ""),
    optimiser("steps are not counted", "torch._foreach_add_([", "torch._foreach_sub_(["),
    optimiser(
        "a gradient that is gone is stepped",
        "        self._ready = None\n        super().zero_grad",
        "        super().zero_grad",
    ),
    optimiser(
        "a parameter without a gradient moves",
        "                continue",
        "                p.grad = torch.ones_like(p)",
    ),
    optimiser("no copies", "narrow.asked(p) if self.copies else None", "None"),
    optimiser("a step too few for the corrections", "decay, step + 1, scale", "decay, max(step, 1), scale"),
    clips("nothing is clipped", "return known < 0.999 * limit", "return True"),
    reader(
        "the weight's gradient is of a norm that is empty",
        "stream_grads(ctx, d_stream, dy, again)",
        "stream_grads(ctx, d_stream, dy)",
        "projected",
    ),
    reader("a second reading has no norm either", "reader.used = True", "pass"),
    reader("any product is the reader", "found.weight is not projection", "False"),
    reader(
        "the graph holds itself",
        "setattr(y, MARK, reader)",
        "setattr(y, MARK, reader)\n    reader.held = y",
        "projected",
    ),
    reader("the bias has no gradient", "return grad @ low, d_bias, None", "return grad @ low, None, None"),
    Mutation(
        "forget: a graph holds what it has kept",
        "src/ssmtrain/layers/forget.py",
        "return tensor if tensor.grad_fn is None else tensor.detach()",
        "return tensor",
        (FORGET,),
    ),
    Mutation(
        "outer: the rest is left out",
        f"{KERNELS}/matmul.py",
        "for part in (slice(rows), slice(rows, None)):",
        "for part in (slice(rows),):",
        ("tests/kernels/test_kernels_matmul.py", "-m", "not gpu"),
    ),
]
