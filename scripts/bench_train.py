"""Time whole training steps on one NVIDIA GPU, beside the figures of public implementations.

    python scripts/bench_train.py                                   # every model, in every mode
    python scripts/bench_train.py mamba_130m jamba --modes eager --steps 20 --json train.json
    python scripts/bench_train.py --lengths 2048,8192,32768,131072  # hybrid or transformer, at equal size

A step is what `ssmtrain fit` takes: fp32 parameters, bf16 autocast, the loss without stored logits, the norm
of the gradient, which the host reads with the loss before it lets the step be taken, clipping where the norm
asks for it, fused AdamW; the tokens are random and the documents whole rows. Each model runs in a process of
its own with an empty Triton cache: `first step` is from a built model to the end of the first step, compiling
and all. Tokens a second are from the median time from one reading of loss and norm to the next, MFU by the
layers' own count of FLOPs over the datasheet's dense bf16 peak, the peak of memory by torch's allocator. The
shares are of GPU time. With --lengths each block is recomputed, as all lengths fit then. Exit code 1 if a
model fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A model at a batch and length, and the fastest public figures for it (docs/benchmarks.md)."""

    recipe: str
    batch: int
    length: int
    words: tuple[str, ...] = ()
    """Overrides of the recipe."""
    public: str = ""
    tokens_s: float | None = None
    peak_gb: float | None = None
    first_s: float | None = None


TUNED = "mamba-ssm 2.3.2 kernels, Liger loss"
CASES = {
    "mamba_130m": Case("mamba_130m", 16, 2048, (), TUNED, 188_979, 14.1, 7.0),
    "mamba_1b4": Case("mamba_1b4", 8, 2048, (), TUNED, 31_615, 50.3, 11.3),
    "mamba2_130m": Case("mamba2_130m", 16, 2048, (), TUNED, 239_778, 14.6, 16.4),
    "mamba2_1b3": Case("mamba2_1b3", 8, 2048, (), TUNED, 42_550, 50.2, 72.6),
    "granite_9to1": Case("granite_9to1", 16, 2048),
    "jamba_tiny": Case("jamba_tiny", 4, 4096),
    "jamba": Case(
        "jamba_tiny", 4, 4096, ("model.vocab_size=32000",), "transformers 5.17, bf16 weights", 67_759, 48.0
    ),
}
MODES = ("eager", "graphs", "compiled")
"""Called, recorded as CUDA graphs (trainer.cuda_graphs), or under torch.compile."""
LLAMA = (
    "model.layout=A",
    "model.blocks.A.mixer.position=rope",
    "model.blocks.A.ffn={kind: mlp, hidden: 5728, activation: swiglu}",
)
"""Makes of the hybrid a Llama shape of its width, depth and size."""
HYBRID = "granite_9to1_1b3"
LONG = 65536
"""Tokens of a step beyond which the first step alone warms up, and no shares are taken."""
SCANS = (
    *("forward", "backward", "ends", "starts", "join", "add_shares", "both", "sum_chunks", "one_pass"),
    *("pairs", "through_states", "sources", "walk", "gather", "outputs", "steps_forward", "steps_backward"),
    *("add_2", "add_4", "edges", "_place_chunks", "_find_documents"),
)
KINDS = {
    "scan": SCANS,
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitk", "sm90_xmma"),
    "attention": ("flash", "attention", "fmha", "flex", "triton_tem_fused"),
    "optimiser": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "softmax": ("softmax",),
    "compiled by inductor": ("triton_poi", "triton_red", "triton_per"),
    "norms and convolutions": ("_forward", "_backward", "_reduce", "norm"),
    "copies and casts": ("copy", "memcpy", "memset", "cat", "fill"),
}
"""Kinds of GPU kernels by parts of their names; whole names come first."""


@dataclass
class Result:
    """What a model took."""

    name: str
    mode: str
    batch: int
    length: int
    parameters: int = 0
    tokens_s: float | None = None
    mfu: float | None = None
    peak_gb: float | None = None
    first_s: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    note: str = ""


def kind_of(kernel: str) -> str:
    """The kind of a GPU kernel."""
    for kind, names in KINDS.items():
        if kernel in names:
            return kind
    low = kernel.lower()
    for kind, parts in KINDS.items():
        if kind != "scan" and any(part in low for part in parts):
            return kind
    return "other"


def run(name: str, case: Case, mode: str, steps: int, device: torch.device) -> Result:
    """Train for some steps in this process."""
    from ssmtrain.config.load import load
    from ssmtrain.data.module import Batch
    from ssmtrain.data.tokenizer import vocab_rows
    from ssmtrain.kernels import backend
    from ssmtrain.layers.base import Context
    from ssmtrain.model.count import count_flops
    from ssmtrain.model.hybrid import HybridModel
    from ssmtrain.model.init import init_weights
    from ssmtrain.parallel.apply import apply
    from ssmtrain.train import optim
    from ssmtrain.train.graph import Graphs, Pass
    from ssmtrain.train.peaks import peak_flops

    words = [f"config={case.recipe}", f"data.seq_len={case.length}"]
    if not any(word.startswith("trainer.recompute=") for word in case.words):
        words.append("trainer.recompute=ops")
    config = load([*words, f"trainer.compile={'true' if mode == 'compiled' else 'false'}", *case.words])
    backend.configure("auto", device.type)
    torch.manual_seed(0)
    vocab = vocab_rows(config)
    with torch.device("meta"):
        model = HybridModel(config.model, vocab)
    model = apply(model, config.trainer)
    model.to_empty(device=device)
    init_weights(model, config.model.init, 0)
    named = dict(model.named_parameters())
    copies = config.trainer.recompute != "block"
    optimizers = optim.build_optimizers(named, model.specs(), config.optim, copies=copies)
    found = Result(name, mode, case.batch, case.length, sum(p.numel() for p in named.values()))
    parameters, seen = list(named.values()), []
    rows = torch.randint(vocab, (4, case.batch, case.length + 1), device=device)

    def passes(batch: Batch, scale: float | torch.Tensor, share: float) -> Pass:
        with torch.autocast(device.type, torch.bfloat16):
            out = model(batch.inputs, batch.labels, Context())
        assert out.loss_sum is not None
        loss = out.loss_sum * scale
        (loss if out.aux is None else loss + out.aux).backward()
        aux = torch.zeros_like(out.loss_sum) if out.aux is None else out.aux.detach()
        return torch.stack([out.loss_sum.detach(), aux]).double(), {}

    graphs = Graphs(passes, parameters, device) if mode == "graphs" else None
    labels = case.batch * case.length

    def step(i: int) -> float:
        """Take a step; returns the moment at which the host knew its loss and norm."""
        row = rows[i % len(rows)]
        batch = Batch(row[:, :-1], row[:, 1:].contiguous(), None, case.batch, list(range(case.batch)))
        sums, _ = (graphs or passes)(batch, 1 / labels, 1.0)
        norm = optim.norm_of(optimizers, device)
        known = torch.cat([sums / labels, norm.double()[None]]).tolist()
        at = time.perf_counter()
        optim.take_step(optimizers, config.optim.clip, norm, known[-1])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        seen.append(known)
        return at

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    at = step(0)
    wait()
    found.first_s = time.perf_counter() - start
    for i in range(1, 1 if labels > LONG else 4):
        at = step(i)
    taken = []
    for i in range(steps):
        before, at = at, step(i)
        taken.append(at - before)
    wait()
    if not torch.tensor(seen).isfinite().all():
        found.note = "FAILED: a loss or a gradient is not finite"
    found.tokens_s = case.batch * case.length / statistics.median(taken)
    flops = count_flops(config.model, vocab, case.length).total
    peak = peak_flops(device)
    found.mfu = found.tokens_s * flops / peak if peak else None
    if device.type == "cuda":
        found.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        found.shares = {} if labels > LONG else shares(lambda: step(0))
    return found


def shares(step: Any) -> dict[str, float]:
    """The share of GPU time by kind of kernel in one step, and the time in which the GPU waits."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in trace.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = kind_of(event.key)
            times[kind] = times.get(kind, 0.0) + event.self_device_time_total
    total = sum(times.values())
    return {kind: taken / total for kind, taken in sorted(times.items(), key=lambda item: -item[1])}


def apart(
    name: str, case: Case, mode: str, steps: int, device: str, limit: float, kept: str | None = None
) -> Result:
    """`run` in a process of its own, with an empty Triton cache, or one that is kept from run to run."""
    words = ["--one", json.dumps([name, asdict(case), mode, steps, device])]
    failed = Result(name, mode, case.batch, case.length)
    with tempfile.TemporaryDirectory() as empty:
        cache = kept or empty
        places = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        try:
            done = subprocess.run(
                command, env=os.environ | places, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            failed.note = f"FAILED: {limit:.0f} s were not enough"
            return failed
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        failed.note = f"FAILED: {lines[-1] if lines else done.returncode}"
        return failed
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def lines_of(found: Result, case: Case) -> Iterator[str]:
    """The result, and the public one with what ours is of it."""

    def cell(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
        return "" if value is None else f"{value * scale:,.{digits}f}"

    title = f"{found.name}, {found.mode}, {found.batch} x {found.length}"
    yield (
        f"{title:44s} {cell(found.tokens_s):>9s} {cell(found.mfu, 1, 100):>6s} "
        f"{cell(found.peak_gb, 1):>8s} {cell(found.first_s, 1):>8s}  {found.note}"
    ).rstrip()
    if found.shares:
        yield "    " + ", ".join(f"{kind} {share:.0%}" for kind, share in found.shares.items())
    if case.tokens_s is not None and found.tokens_s is not None:
        ratio = found.tokens_s / case.tokens_s
        yield (
            f"    {case.public:40s} {case.tokens_s:>9,.0f} {'':6s} {cell(case.peak_gb, 1):>8s} "
            f"{cell(case.first_s, 1):>8s}  ours {ratio:.2f} times as fast"
        )


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """The models to time."""
    if arguments.lengths:
        for length in (int(word) for word in arguments.lengths.split(",")):
            batch = max(1, arguments.tokens // length)
            words = () if arguments.keep else ("trainer.recompute=block",)
            yield "hybrid", Case(HYBRID, batch, length, words)
            yield "llama", Case(HYBRID, batch, length, LLAMA + words)
        return
    for name in arguments.models or CASES:
        yield name, CASES[name]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--modes", default=",".join(MODES), help="some of them (default all)")
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default 10)")
    parser.add_argument("--lengths", help="instead a hybrid and a transformer at these lengths")
    parser.add_argument(
        "--keep", action="store_true", help="activations, with --lengths (default: recompute)"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of a step with --lengths")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.models if name not in CASES]
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}: choose from {', '.join(CASES)}")
    arguments.modes = arguments.modes.split(",")
    if set(arguments.modes) - set(MODES):
        parser.error(f"--modes takes {', '.join(MODES)}")
    return arguments


def main() -> int:
    """Parse the command line, measure, print."""
    arguments = parse()
    if arguments.one:
        name, fields, mode, steps, device = json.loads(arguments.one)
        fields["words"] = tuple(fields["words"])
        print(json.dumps(asdict(run(name, Case(**fields), mode, steps, torch.device(device)))))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_train.py needs an NVIDIA GPU; torch sees none (ssmtrain doctor)")
    facts = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else "none",
        "command": " ".join(["python", "scripts/bench_train.py", *sys.argv[1:]]),
    }
    print("\n".join(f"# {name}: {value}" for name, value in facts.items()))
    print(
        f"{'model, mode, batch x length':44s} {'tokens/s':>9s} {'MFU %':>6s} {'peak GB':>8s} {'first s':>8s}"
    )
    results = []
    with tempfile.TemporaryDirectory() as cache:
        # The first step of a model is measured with empty caches, but not that of each length.
        kept = cache if arguments.lengths else None
        for name, case in chosen(arguments):
            for mode in arguments.modes:
                found = apart(name, case, mode, arguments.steps, arguments.device, arguments.limit, kept)
                print(*lines_of(found, case), sep="\n", flush=True)
                results.append(found)
    if arguments.json:
        document = {"environment": facts, "results": [asdict(found) for found in results]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(found.note for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
