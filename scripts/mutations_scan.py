"""Mutations of the selective scan of Mamba."""

from __future__ import annotations

from mutation import KERNELS, OFFSETS, Mutation


def selective(name: str, part: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of selective_scan/triton_{part}.py."""
    file = f"{KERNELS}/selective_scan/triton_{part}.py"
    found = "tests/kernels/triton/test_triton_selective_scan.py"
    return Mutation(f"selective: {name}", file, old, new, (found,), occurrence)


def n16(name: str, part: str, old: str, new: str, occurrence: int = 0) -> Mutation:
    """A mutation of selective_scan/triton_n16{part}.py."""
    file = f"{KERNELS}/selective_scan/triton_n16{part}.py"
    found = "tests/kernels/triton/test_selective_scan_n16_on_cpu.py"
    return Mutation(f"n16: {name}", file, old, new, (found,), occurrence)


SELECTIVE = [
    Mutation(
        "selective: 32-bit windows",
        f"{KERNELS}/selective_scan/triton_forward.py",
        "at = w.to(tl.int64) * W",
        "at = w * W",
        (OFFSETS,),
        0,
    ),
    selective(
        "pieces from the row's start",
        "forward",
        "tl.minimum(first + (at - first + W - 1) // W * W, after)",
        "tl.minimum(at, after)",
    ),
    selective(
        "the last token's neighbours count",
        "forward",
        "tl.where(live, step, 0.0)",
        "tl.where(True, step, 0.0)",
    ),
    selective("a term of the logarithm is off", "forward", "p = 0.33330512 + u * p", "p = 0.3333 + u * p"),
    selective("steps are not clamped", "forward", "tl.maximum(step, low), high)", "step, high)"),
    selective("clamped steps have gradients", "forward", "live & (step >= low) & (step <= high)", "live"),
    selective(
        "one group late", "forward", "xs, raws, gates = next_xs, next_raws,", "raws, gates = next_raws,"
    ),
    selective(
        "documents begin with what enters windows",
        "forward",
        "e, n, E, N, pitch, at != first)",
        "e, n, E, N, pitch, True)",
    ),
    selective(
        "continued pieces begin with initial states",
        "forward",
        "h = kept(initial, d, e, n, E, N, pitch, at == first)",
        "h = kept(initial, d, e, n, E, N, pitch, True)",
    ),
    selective("final states of pieces", "forward", "h, at + size == after)", "h, at == first)"),
    selective(
        "what passes through does not decay",
        "forward",
        "h * power(rates * (total * LOG2E)[None, :], True)",
        "h",
    ),
    selective(
        "a polynomial of one degree less",
        "forward",
        "1.3398875e-3 + x * 1.5353362e-4",
        "1.3398875e-3 + x * 0.0",
    ),
    selective("infinity less infinity", "forward", "x = tl.where(x < -1000.0, -1000.0, x)", "x += 0.0"),
    selective("nothing passes through", "forward", "through = enters &", "through = (w < 0) & enters &"),
    selective("no skip", "forward", "0) + skip * x", "0)"),
    selective("back: the state after instead of before", "backward", "h = before[SPAN - 1 - j]", "h = h"),
    selective("back: gradients do not decay", "backward", "g *= decays[SPAN - 1 - j]", "g *= 1.0"),
    selective(
        "back: later pieces are not heard",
        "backward",
        "e, n, E, N, pitch, end != after)",
        "e, n, E, N, pitch, end == 0)",
    ),
    selective(
        "back: final gradients in every piece",
        "backward",
        "g = kept(d_final, d, e, n, E, N, pitch, end == after)",
        "g = kept(d_final, d, e, n, E, N, pitch, True)",
    ),
    selective(
        "back: initial gradients of every piece", "backward", "pitch, g, start == first)", "pitch, g, True)"
    ),
    selective(
        "back: blocks begin with the piece's state",
        "backward",
        "e, n, E, N, pitch, base > 0)",
        "e, n, E, N, pitch, base < 0)",
    ),
    selective(
        "back: dead tokens have shares",
        "backward",
        "of_B, mask=(n < N) & (at < size)",
        "of_B, mask=(n < N) & (at < size + 1)",
    ),
    selective(
        "back: the bias of dead tokens",
        "backward",
        "t + i < size, shift, low",
        "t + i < size + 1, shift, low",
    ),
    selective("shares of one block are left out", "backward", "in range(blocks)", "in range(blocks - 1)"),
]

N16 = [
    n16("the last token's neighbours count", "", "live = (t + q < size) & (e < E)", "live = e < E"),
    n16(
        "pieces end late",
        "",
        "mask=(t + i < size)[:, None] & (col",
        "mask=(t + i < size + 1)[:, None] & (col",
    ),
    n16("B and C of the next document", "", "mask=(t + i < size)[:, None] & (n >= 0)", "mask=(n >= 0)"),
    n16("tokens change places", "", "swapped(parts[0], parts[2],", "swapped(parts[2], parts[0],"),
    n16("lanes give away what they should keep", "", "upper = lane & BIT != 0", "upper = lane & BIT == 0"),
    n16("no copy of channels that are not there", "", "(column + e < columns)", "(e < columns)"),
    n16("a state early", "", "(begin > 0) & (begin % EVERY == 0)", "(begin > 0) & (begin % EVERY == 16)"),
    n16("what entered is left out", "", "inside & (at != first), E, N)", "inside & (at < 0), E, N)"),
    n16(
        "final states of pieces",
        "",
        "h, mask=inside & (at + size == after))",
        "h, mask=inside & (at == first))",
    ),
    n16("offsets end before channels", "", "first.shape[2] * WINDOW.value < 2**31", "True"),
    n16("states beyond N", "", "(n < N) & (block * BE + e < E)", "block * BE + e < E"),
    n16(
        "ends: nothing of the documents' states",
        "_ends",
        "inside & (at == first), E, N)",
        "inside & (at < 0), E, N)",
    ),
    n16("ends: steps of one token", "_ends", "total += step", "total = step"),
    n16("starts: dead tokens", "_ends", "live = (t + q < size) & (e < E)", "live = e < E"),
    n16("starts: final gradients in every piece", "_ends", "(begin + size == after), E", "(begin > 0), E"),
    n16("starts: no gate", "_ends", "pull *= gate * sigmoid(gate)", "pull *= 1.0"),
    n16("back: the state after instead of before", "_backward", "h = before[j]", "h = h"),
    n16("back: gradients do not decay", "_backward", "g *= power(rates * unit, EXACT)", "g *= 1.0"),
    n16(
        "back: later pieces are not heard",
        "_backward",
        "inside & (end != after), E, N)",
        "inside & (end == 0), E, N)",
    ),
    n16(
        "back: final gradients in every piece", "_backward", "inside & (end == after), E, N)", "inside, E, N)"
    ),
    n16(
        "back: initial gradients of every piece",
        "_backward",
        "mask=inside & (at == first))",
        "mask=inside)",
    ),
    n16("back: a turn begins with the window", "_backward", "end = gl.load(ends + chain)", "end = end"),
    n16(
        "back: a turn begins with no gradient",
        "_backward",
        "g, all_A = gl.load(room + own),",
        "g, all_A = g,",
    ),
    n16("back: a turn forgets D", "_backward", "gl.store(room + 32 * BE + tile_of(q), sum_D)", "pass"),
    n16("back: a turn's piece begins anew", "_backward", "if end == last_of:", "if end > begin:"),
    n16(
        "back: turns of 32 bits", "_backward", "room = carry + chain.to(gl.int64)", "room = carry + chain * 0"
    ),
    n16(
        "back: states of A out of order",
        "",
        "lanes.permute(3, 4, 0, 2, 1)",
        "lanes.permute(3, 4, 0, 1, 2)",
    ),
    n16(
        "back: blocks begin with nothing",
        "_backward",
        "mask=(own >= 0) & (base > 0)",
        "mask=(own >= 0) & (base < 0)",
    ),
    n16(
        "back: shares of dead tokens",
        "_backward",
        "mask=column // 32 < rest - t",
        "mask=column // 32 < rest - t + 1",
    ),
    n16("back: sums in the order of lanes", "_backward", "(lane // 2 + lane % 2 * 2)", "lane"),
    n16("back: a tile twice", "_backward", "t // TILE - 1, rest", "t // TILE, rest"),
    n16("back: no tile before the last", "_backward", "at, last - 1, rest", "at, last, rest"),
    n16("back: tokens of shares change places", "_backward", "tokens[0], tokens[2]", "tokens[2], tokens[0]"),
    n16("back: the unit of A", "_backward", "all_A * (1.0 / LOG2E)", "all_A"),
    n16("back: one state late", "_backward", "gl.maximum(s - 2, 0)", "gl.maximum(s - 1, 0)"),
]
"""Of selective_scan/triton_n16*.py."""
