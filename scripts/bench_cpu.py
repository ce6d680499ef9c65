"""Time a training step of ours and of transformers' models of the same size, one thread, interleaved.

    python scripts/bench_cpu.py                     # about a minute
    python scripts/bench_cpu.py --rounds 31 --only mamba2

Forward, loss and backward in fp32; B 2 x L 512, d_model 256, 2 layers, expand 2, vocabulary 512, tied head.
In each round every model takes one step, so that a drift of the machine meets all alike; printed are
medians of the rounds' ratios and of tokens per second of CPU time. The exit code is 1 when a ratio is below
its bar. `pip install transformers mambapy` brings what is compared with.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from ssmtrain.config.model import ModelConfig
from ssmtrain.kernels import backend
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights

BATCH, LENGTH, WIDTH, LAYERS, VOCAB = 2, 512, 256, 2, 512

BARS = {
    ("ours mamba2", "transformers mamba2, chunk 256"): 1.8,
    ("ours mamba2", "transformers mamba2, chunk 64"): 1.2,
    ("ours mamba1", "transformers mamba1, mambapy"): 2.5,
}
"""(ours, theirs) -> how many times faster ours must be."""

Step = Callable[[], float]


def ours(kind: str, **mixer: object) -> Step:
    """A training step of our model; returns the loss."""
    config = ModelConfig.model_validate(
        {
            "d_model": WIDTH,
            "layout": "M",
            "n_layers": LAYERS,
            "tie_embeddings": True,
            "blocks": {"M": {"mixer": {"kind": kind, **mixer}}},
        }
    )
    model = HybridModel(config, VOCAB)
    init_weights(model, config.init, seed=0)
    inputs, labels = batch()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        out = model(inputs, labels)
        loss = out.loss_sum / out.n_labels
        loss.backward()
        return loss.item()

    return step


def theirs(model: torch.nn.Module) -> Step:
    """A training step of a transformers model; returns the loss."""
    model.train()
    inputs, _ = batch()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        # transformers shifts the labels itself.
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        return loss.item()

    return step


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and each next one as its label."""
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def models(only: str | None) -> dict[str, Step]:
    """All models by name, in the order of a round."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "expand": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": False,
    }
    found: dict[str, Step] = {}
    if only in (None, "mamba2"):
        found["ours mamba2"] = ours("mamba2", d_state=64, head_dim=64, expand=2)
        for chunk in (256, 64):
            mamba2 = transformers.Mamba2Config(
                state_size=64, head_dim=64, num_heads=8, n_groups=1, chunk_size=chunk, **shared
            )
            found[f"transformers mamba2, chunk {chunk}"] = theirs(transformers.Mamba2ForCausalLM(mamba2))
    if only in (None, "mamba1"):
        if importlib.util.find_spec("mambapy") is None:
            sys.exit("the Mamba-1 comparison needs mambapy: pip install mambapy, or --only mamba2")
        found["ours mamba1"] = ours("mamba1", d_state=16, expand=2)
        mamba1 = transformers.MambaConfig(state_size=16, use_mambapy=True, **shared)
        found["transformers mamba1, mambapy"] = theirs(transformers.MambaForCausalLM(mamba1))
    return found


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each model in each round, after two rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number >= 2:
                seconds[name].append(time.process_time() - start)
    return seconds


def report(seconds: dict[str, list[float]]) -> bool:
    """Print tokens per second and ratios; returns whether every bar is met."""
    tokens = BATCH * LENGTH
    print(f"{'model':34s} {'tok/s, median':>14s} {'best':>8s} {'worst':>8s}")
    for name, taken in seconds.items():
        figures = tokens / statistics.median(taken), tokens / min(taken), tokens / max(taken)
        print(f"{name:34s} {figures[0]:14,.0f} {figures[1]:8,.0f} {figures[2]:8,.0f}")
    good = True
    for (mine, other), bar in BARS.items():
        if mine in seconds:
            ratio = statistics.median(b / a for a, b in zip(seconds[mine], seconds[other], strict=True))
            good &= ratio >= bar
            verdict = "met" if ratio >= bar else "MISSED"
            print(f"{mine} is {ratio:.2f}x {other} (bar {bar}x: {verdict})")
    return good


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default 15)")
    parser.add_argument("--only", choices=["mamba1", "mamba2"], help="one comparison only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    backend.configure("auto", "cpu")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, fp32, "
        f"{BATCH} x {LENGTH} tokens, d_model {WIDTH}, {LAYERS} layers, {arguments.rounds} rounds"
    )
    return 0 if report(measure(models(arguments.only), arguments.rounds)) else 1


if __name__ == "__main__":
    sys.exit(main())
