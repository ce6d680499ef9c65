"""Train one model several ways from the same weights on the same batches, on one NVIDIA GPU.

    python scripts/loss_compare_gpu.py                       # Mamba and Mamba-2 of 130 M, 500 steps each way
    python scripts/loss_compare_gpu.py mamba2_130m --steps 50
    python scripts/loss_compare_gpu.py --bias                # errors of the kernels' gradients instead

The ways: our kernels under bf16 autocast, our torch references in fp32, our kernels from weights of two other
seeds, and mamba-ssm's model under bf16 autocast where it is installed and runs; without its CUDA extension,
Mamba takes mambapy's scan there. Passes other than the references' are recorded as CUDA graphs. Rows are
bytes of the embedded corpus. The mean gap between kernels in bf16 and references in fp32 has to stay below
the mean one between two of three seeds, and in no stretch of 50 steps reach the largest of these; else the
exit code is 1.

With --bias, each kernel's outputs and gradients in bf16, fp16 and fp32 over 100 random draws against its
reference in float64 on the same inputs: the mean error and the mean of error over value, each in standard
errors of the draws. Beyond 5 of them the kernel leans to one side, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import kernel_cases
import kernel_peers
from kernel_cases import Case
from loss_compare import PURE, our_names
from ssmtrain.config.data import EmbeddedData
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load
from ssmtrain.config.model import ModelConfig
from ssmtrain.data.module import Batch
from ssmtrain.data.sources import split_text
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.train.graph import Graphs, Pass

STRETCH = 50
DRAWS = 100
FAR = 5.0
"""Standard errors: of some 120 means, none strays as far by chance."""
MAMBA_SSM = replace(
    PURE,
    ends=PURE.ends | {"input.weight": "backbone.embedding.weight"},
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of tokens (B, L) and labels (B, L)."""


@dataclass(frozen=True)
class Way:
    """How the model is trained."""

    name: str
    kernels: str = "auto"
    autocast: bool = True
    seed: int = 0
    peer: bool = False


KERNELS = Way("kernels, bf16")
FP32 = Way("references, fp32", kernels="reference", autocast=False)
SEEDS = tuple(Way(f"kernels, bf16, seed {seed}", seed=seed) for seed in (1, 2))
PEER = Way("mamba-ssm, bf16", peer=True)


def batches(steps: int, rows: int, length: int) -> Tensor:
    """Rows (steps, B, L + 1) of bytes, from anywhere in the corpus."""
    text = torch.frombuffer(bytearray(split_text(EmbeddedData(), "train")), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - length - 1, (steps, rows, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


def ours(config: ModelConfig, seed: int, device: torch.device) -> HybridModel:
    """Our model with the weights of a seed."""
    assert config.vocab_size is not None
    with torch.device("meta"):
        model = HybridModel(config, config.vocab_size)
    model.to_empty(device=device)
    init_weights(model, config.init, seed)
    return model.train()


def our_loss(model: HybridModel) -> Loss:
    """The mean loss of our model."""

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        out = model(inputs, labels, Context())
        assert out.loss_sum is not None and out.n_labels is not None
        return out.loss_sum / out.n_labels

    return loss


def peer(config: ModelConfig, source: HybridModel, device: torch.device) -> nn.Module:
    """mamba-ssm's model with our weights; ImportError where it is not."""
    theirs = kernel_peers.mamba_part("models.mixer_seq_simple")
    configs = kernel_peers.mamba_part("models.config_mamba")
    kind = next(iter(config.blocks.values())).mixer.kind  # type: ignore[union-attr]
    layer: dict[str, Any] = {"layer": {"mamba1": "Mamba1", "mamba2": "Mamba2"}[kind]}
    if kind == "mamba2":
        layer["use_mem_eff_path"] = kernel_peers.has_conv()
    elif importlib.util.find_spec(kernel_peers.EXTENSION) is None:
        layer["use_fast_path"] = False
        kernel_peers.mamba_part("modules.mamba_simple").selective_scan_fn = parallel_scan
    model = theirs.MambaLMHeadModel(
        configs.MambaConfig(
            d_model=config.d_model,
            n_layer=len(source.blocks),
            vocab_size=config.vocab_size,
            ssm_cfg=layer,
            pad_vocab_size_multiple=1,
            tie_embeddings=config.tie_embeddings,
        ),
        device=device,
    )
    targets = dict(model.named_parameters())
    with torch.no_grad():
        for name, names in our_names(MAMBA_SSM, source):
            targets[names[0]].copy_(source.get_parameter(name).view(targets[names[0]].shape))
    return model.train()


def parallel_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    **_: Any,
) -> Tensor:
    """mambapy's in place of mamba-ssm's CUDA kernel: u, delta, z (B, E, L), A (E, N), B and C (B, N, L)."""
    pscan = importlib.import_module("mambapy.pscan").pscan
    with torch.autocast(u.device.type, enabled=False):
        steps = nn.functional.softplus(delta.float() + delta_bias[:, None])  # (B, E, L)
        wide = steps.transpose(1, 2).unsqueeze(-1)  # (B, L, E, 1)
        into = (steps * u.float()).transpose(1, 2).unsqueeze(-1) * B.float().transpose(1, 2).unsqueeze(2)
        states = pscan(torch.exp(wide * A), into)  # (B, L, E, N)
        y = (states @ C.float().transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return ((y + D[:, None] * u.float()) * nn.functional.silu(z.float())).to(u.dtype)


def curve(way: Way, config: ModelConfig, rows: Tensor, device: torch.device) -> list[float]:
    """The loss at each step: AdamW with clipping, the rate warmed up over 50 steps."""
    backend.configure(way.kernels, device.type)
    model: nn.Module = ours(config, way.seed, device)
    loss_of = our_loss(model)  # type: ignore[arg-type]
    if way.peer:
        model = peer(config, model, device)  # type: ignore[arg-type]
        network = model

        def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
            logits = network(inputs).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def passes(batch: Batch, scale: float | Tensor, share: float) -> Pass:
        with torch.autocast(device.type, torch.bfloat16, enabled=way.autocast):
            loss = loss_of(batch.inputs, batch.labels)
        loss.backward()
        return loss.detach(), {}

    parameters = list(model.parameters())
    # The references take numbers of documents to the device, which no graph records.
    graph = device.type == "cuda" and way.kernels != "reference"
    run = Graphs(passes, parameters, device) if graph else passes
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, row in enumerate(rows.to(device)):
        optimizer.param_groups[0]["lr"] = 6e-4 * min(1.0, (step + 1) / 50)
        batch = Batch(row[:, :-1], row[:, 1:].contiguous(), None, len(row), list(range(len(row))))
        losses.append(run(batch, 1.0, 1.0)[0])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    shown = torch.stack(losses).tolist()
    del model, optimizer, parameters, run
    gc.collect()
    return shown


def gaps(a: list[float], b: list[float]) -> list[float]:
    """The mean distance of two curves in each stretch of steps."""
    distance = (torch.tensor(a) - torch.tensor(b)).abs()
    return [part.mean().item() for part in distance.split(STRETCH)]


def compare(name: str, config: ModelConfig, rows: Tensor, device: torch.device) -> bool:
    """Print a model's curves and gaps; whether the kernels stay within the seeds' distance."""
    curves = {way: shown(name, way, config, rows, device) for way in (KERNELS, FP32, *SEEDS)}
    near = gaps(curves[KERNELS], curves[FP32])
    seeds = [curves[way] for way in (KERNELS, *SEEDS)]
    pairs = [gaps(a, b) for a, b in itertools.combinations(seeds, 2)]
    least, most = ([pick(stretch) for stretch in zip(*pairs, strict=True)] for pick in (min, max))
    print(f"  mean gap of kernels to fp32, each {STRETCH} steps:", *(f"{gap:.1e}" for gap in near))
    print("  of two seeds, the least of three:       ", *(f"{gap:.1e}" for gap in least))
    print("  and the largest:                        ", *(f"{gap:.1e}" for gap in most))
    over_all = statistics.fmean(near), statistics.fmean(map(statistics.fmean, pairs))
    print(f"  over the run: kernels to fp32 {over_all[0]:.2e}, two seeds {over_all[1]:.2e}")
    within = over_all[0] < over_all[1] and all(a < b for a, b in zip(near, most, strict=True))
    print(f"  {'within' if within else 'NOT WITHIN'} the distance of two seeds", flush=True)
    try:
        theirs = gaps(shown(name, PEER, config, rows, device), curves[FP32])
        print("  mean gap of mamba-ssm to fp32:          ", *(f"{gap:.1e}" for gap in theirs))
    except (ImportError, TypeError, RuntimeError, AttributeError, UserError) as error:
        print(f"# {PEER.name}: left out, {str(error).splitlines()[0] if str(error) else error!r}")
    return within


def shown(name: str, way: Way, config: ModelConfig, rows: Tensor, device: torch.device) -> list[float]:
    """The loss at each step; prints the first, the last and the seconds."""
    start = time.perf_counter()
    found = curve(way, config, rows, device)
    seconds = time.perf_counter() - start
    print(f"{name:14s} {way.name:30s} {found[0]:9.4f} {found[-1]:9.4f} {seconds:8.0f} s", flush=True)
    return found


BIASED: tuple[Case, ...] = tuple(
    case
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for case in (
        kernel_cases.ssd_case(2, 512, 4, 64, 128, dtype=dtype),
        kernel_cases.selective_case(2, 512, 64, 16, dtype=dtype),
        kernel_cases.conv_case(2, 512, 128, dtype=dtype),
        kernel_cases.norm_case(2, 256, 512, dtype=dtype),
    )
)


def errors(case: Case, draw: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Of each output and gradient, in its root mean square: the mean error, and that times the value."""
    torch.manual_seed(draw)
    inputs = case.make(device)
    exact = {
        name: t
        if t is None or not t.is_floating_point()
        else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    found: list[tuple[Tensor, ...]] = []
    grads: list[Tensor] = []
    for name, tensors in (("auto", inputs), ("reference", exact)):
        backend.configure(name, device.type)
        outputs = case.call(tensors)
        grads = grads or [torch.randn_like(y) for y in outputs]
        low = [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)]
        found.append((*outputs, *case.gradients(tensors, outputs, low)))
    names = [f"output {i}" for i in range(len(grads))]
    names += [f"grad {name}" for name, t in inputs.items() if t is not None and t.requires_grad]
    shown = {}
    for name, ours_, truth in zip(names, *found, strict=True):
        size = truth.square().mean().sqrt()
        error = (ours_.double() - truth) / size
        shown[name] = error.mean().item(), (error * truth / size).mean().item()
    return shown


def lean(values: list[float]) -> float:
    """How many of its own standard errors a mean is away from zero."""
    t = torch.tensor(values, dtype=torch.float64)
    deviation = t.std().item() / math.sqrt(len(values))
    return t.mean().item() / deviation if deviation else 0.0


def bias(draws: int, device: torch.device) -> bool:
    """Print how far each output and gradient leans; whether none does."""
    straight = True
    print(
        f"{'kernel, tensor':60s} {'mean':>10s} {'in its s.e.':>12s} {'along value':>12s} {'in its s.e.':>12s}"
    )
    for case in BIASED:
        seen: dict[str, list[tuple[float, float]]] = {}
        for draw in range(draws):
            for name, pair in errors(case, draw, device).items():
                seen.setdefault(name, []).append(pair)
        for name, pairs in seen.items():
            means = [torch.tensor(values, dtype=torch.float64).mean().item() for values in zip(*pairs)]
            leans = [lean(list(values)) for values in zip(*pairs)]
            wrong = abs(leans[0]) > FAR
            straight &= not wrong
            figures = f"{means[0]:10.1e} {leans[0]:12.1f} {means[1]:12.1e} {leans[1]:12.1f}"
            print(f"{case.name + ', ' + name:60s} {figures} {'LEANS' if wrong else ''}".rstrip(), flush=True)
    return straight


def main(words: list[str] | None = None) -> int:
    """Parse the command line, train or draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["mamba_130m", "mamba2_130m"], help="recipes")
    parser.add_argument("--steps", type=int, default=500, help="of each way (default 500)")
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default 4)")
    parser.add_argument("--length", type=int, default=512, help="of a row (default 512)")
    parser.add_argument("--bias", action="store_true", help="errors of the kernels' gradients instead")
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"with --bias (default {DRAWS})")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--words", nargs="*", default=[], help="overrides of the recipes")
    options: Any = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("loss_compare_gpu.py needs an NVIDIA GPU; torch sees none (ssmtrain doctor)")
    device = torch.device(options.device)
    if options.bias:
        return 0 if bias(options.draws, device) else 1
    print(f"{'model':14s} {'way':30s} {'first':>9s} {'last':>9s}")
    rows = batches(options.steps, options.rows, options.length)
    fine = True
    for name in options.models:
        fine &= compare(name, load([f"config={name}", *options.words]).model, rows, device)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
