"""Train ours and transformers' classes from the same weights on the same batches and compare the loss curves.

    python scripts/loss_compare.py              # 100 steps of every case, fp32 on the CPU, a few minutes
    python scripts/loss_compare.py jamba --steps 20

Every parameter of the transformers model must have its place in ours (the tables below); the curves must
agree to 1e-4 at every step, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ssmtrain.config.model import ModelConfig
from ssmtrain.model.hybrid import HybridModel

VOCAB, WIDTH, ROWS, LENGTH = 61, 32, 4, 48
TOLERANCE = 1e-4
NEAR_TIE = 1e-4
"""Logits closer than this are a tie to fp32 that has been through some steps of training."""

Names = dict[str, str | tuple[str, ...]]
"""Our name -> theirs; several are stacked along the first axis."""


def under(prefix: str, names: Names) -> Names:
    """The same table with their names under a prefix."""
    return {
        ours: prefix + theirs if isinstance(theirs, str) else tuple(prefix + name for name in theirs)
        for ours, theirs in names.items()
    }


SCAN: Names = {name: name for name in ("in_proj.weight", "out_proj.weight", "A_log", "D")} | {
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
}
MAMBA1: Names = SCAN | {
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "dt_norm.weight": "dt_layernorm.weight",
    "B_norm.weight": "b_layernorm.weight",
    "C_norm.weight": "c_layernorm.weight",
}
MAMBA2: Names = SCAN | {"dt_bias": "dt_bias", "norm.weight": "norm.weight"}
ATTENTION: Names = {f"{x}_proj.weight": f"{x}_proj.weight" for x in "qkv"} | {
    "out_proj.weight": "o_proj.weight"
}
EXPERTS: Names = {"router": "router.weight", "w_in": "experts.gate_up_proj", "w_out": "experts.down_proj"}
GATED: Names = {
    "in_proj.weight": ("gate_proj.weight", "up_proj.weight"),
    "out_proj.weight": "down_proj.weight",
}
SHARED: Names = {"in_proj.weight": "input_linear.weight", "out_proj.weight": "output_linear.weight"}


@dataclass(frozen=True)
class Family:
    """Where the weights of one transformers architecture live."""

    ends: Names
    """Embedding, last norm, head."""
    layer: str
    """Prefix of layer {i}."""
    norms: Names
    kinds: dict[str, Names]
    """Our kind -> its parameters, under the layer's prefix."""


PURE = Family(
    ends={
        "input.weight": "backbone.embeddings.weight",
        "head.norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    },
    layer="backbone.layers.{i}.",
    norms={"mixer_norm.weight": "norm.weight"},
    kinds={"mamba1": under("mixer.", MAMBA1), "mamba2": under("mixer.", MAMBA2)},
)
JAMBA = Family(
    ends={
        "input.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.final_layernorm.weight",
        "head.weight": "lm_head.weight",
    },
    layer="model.layers.{i}.",
    norms={"mixer_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight"},
    kinds={
        "mamba1": under("mamba.", MAMBA1),
        "attention": under("self_attn.", ATTENTION),
        "mlp": under("feed_forward.", GATED),
        "moe": under("feed_forward.", EXPERTS),
    },
)
GRANITE = Family(
    ends=JAMBA.ends | {"head.norm.weight": "model.norm.weight"},
    layer="model.layers.{i}.",
    norms={
        "mixer_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
    },
    kinds={
        "mamba2": under("mamba.", MAMBA2),
        "attention": under("self_attn.", ATTENTION),
        "mlp": under("shared_mlp.", SHARED),
        "moe": under("block_sparse_moe.", EXPERTS)
        | under("shared_mlp.", {f"shared.{ours}": theirs for ours, theirs in SHARED.items()}),
    },
)


@dataclass(frozen=True)
class Case:
    """One model, described twice."""

    family: Family
    theirs: type[nn.Module]
    config: Callable[..., Any]
    fields: dict[str, Any]
    """Fields of their config."""
    ours: dict[str, Any]
    """Fields of our ModelConfig."""
    call: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of their forward."""


SIZE = {"vocab_size": VOCAB, "hidden_size": WIDTH}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def granite(experts: int, rope: bool, tied: bool) -> Case:
    """Granite 4 with its four multipliers: routed and shared experts, or dense; no or rotary positions."""
    ffn: dict[str, Any] = {"kind": "mlp", "hidden": 40}
    if experts:
        ffn = {
            "kind": "moe",
            "n_experts": experts,
            "top_k": 2,
            "hidden": 20,
            "shared_hidden": 40,
            "aux_coef": 0.0,
        }
    attention = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "scale": 0.2}
    if rope:
        attention |= {"position": "rope", "rope_theta": 500.0}
    mamba = {"kind": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2, "norm_eps": 1e-6}
    fields = {
        **SIZE,
        **HEADS,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "intermediate_size": 20,
        "shared_intermediate_size": 40,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 16,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
        "tie_word_embeddings": tied,
    }
    if rope:
        fields |= {
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        }
    ours = {
        "layout": "MAM",
        "blocks": {"M": {"mixer": mamba, "ffn": ffn}, "A": {"mixer": attention, "ffn": ffn}},
        "norm_eps": 1e-6,
        "tie_embeddings": tied,
        "multipliers": {"embedding": 12.0, "residual": 0.22, "logits": 0.25},
    }
    theirs = transformers.GraniteMoeHybridForCausalLM
    return Case(GRANITE, theirs, transformers.GraniteMoeHybridConfig, fields, ours)


def mamba1(tied: bool) -> Case:
    """Mamba with its released settings, three layers deep."""
    fields = {**SIZE, "num_hidden_layers": 3, "state_size": 8, "tie_word_embeddings": tied}
    block = {"mixer": {"kind": "mamba1", "d_state": 8}}
    ours = {"layout": "M3", "blocks": {"M": block}, "tie_embeddings": tied}
    return Case(PURE, transformers.MambaForCausalLM, transformers.MambaConfig, fields, ours)


def mamba2(tied: bool, groups: int) -> Case:
    """Mamba-2 with a gated norm in groups."""
    fields = {
        **SIZE,
        "num_hidden_layers": 3,
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 8,
        "n_groups": groups,
        "chunk_size": 16,
        "tie_word_embeddings": tied,
    }
    block = {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": groups}}
    ours = {"layout": "M3", "blocks": {"M": block}, "tie_embeddings": tied}
    return Case(PURE, transformers.Mamba2ForCausalLM, transformers.Mamba2Config, fields, ours)


def jamba() -> Case:
    """Jamba with its inner norms and one routed layer: their balancing loss pools layers, ours adds them."""
    fields = {
        **SIZE,
        **HEADS,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
        "num_experts": 4,
        "mamba_d_state": 8,
        "router_aux_loss_coef": 0.05,
        # Their default pads with token 0 and so never trains its embedding.
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    mamba = {"kind": "mamba1", "d_state": 8, "inner_norm": True, "norm_eps": 1e-6}
    mlp = {"kind": "mlp", "hidden": 40}
    moe = {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 40, "normalize": False, "aux_coef": 0.05}
    blocks = {
        "M": {"mixer": mamba, "ffn": mlp},
        "A": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}, "ffn": mlp},
        "E": {"mixer": mamba, "ffn": moe},
    }
    ours = {"layout": "MAE", "blocks": blocks, "norm_eps": 1e-6, "tie_embeddings": False}
    call = {"output_router_logits": True}
    return Case(JAMBA, transformers.JambaForCausalLM, transformers.JambaConfig, fields, ours, call)


CASES: dict[str, Callable[[], Case]] = {
    "mamba": lambda: mamba1(tied=True),
    "mamba-untied": lambda: mamba1(tied=False),
    "mamba2": lambda: mamba2(tied=False, groups=4),
    "mamba2-tied": lambda: mamba2(tied=True, groups=1),
    "jamba": jamba,
    "granite": lambda: granite(experts=4, rope=False, tied=True),
    "granite-dense-rope": lambda: granite(experts=0, rope=True, tied=False),
}


def build_pair(case: Case) -> tuple[HybridModel, nn.Module]:
    """Both models with the same weights, in training mode."""
    torch.manual_seed(0)
    theirs = case.theirs(case.config(**case.fields)).float().train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Ones, zeros and small weights would hide a norm in the wrong place or a wrong softmax scale.
            size = 0.3 if "q_proj" in name or "k_proj" in name else 0.1
            parameter.add_(size * torch.randn_like(parameter))
    ours = HybridModel(ModelConfig.model_validate({"d_model": WIDTH, **case.ours}), VOCAB).train()
    copy_weights(case.family, ours, theirs)
    return ours, theirs


def our_names(family: Family, model: HybridModel) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our name, their names) of every parameter of our model; KeyError for one that has no place."""
    for name in dict(model.named_parameters()):
        if not name.startswith("blocks."):
            found, prefix = family.ends[name], ""
        else:
            _, i, part, *rest = name.split(".")
            prefix = family.layer.format(i=i)
            block = model.blocks[int(i)]
            if part.endswith("_norm"):
                found = family.norms[f"{part}.weight"]
            else:
                found = family.kinds[getattr(block, part).config.kind][".".join(rest)]
        yield name, tuple(prefix + theirs for theirs in ((found,) if isinstance(found, str) else found))


@torch.no_grad()
def copy_weights(family: Family, ours: HybridModel, theirs: nn.Module) -> None:
    """Copy every parameter; RuntimeError when some of theirs has no place in ours."""
    source = dict(theirs.named_parameters())
    used = set()
    for name, names in our_names(family, ours):
        target = ours.get_parameter(name)
        value = torch.cat([source[n] for n in names])
        target.copy_(value.reshape(target.shape))
        used.update(names)
    if used != set(source):
        raise RuntimeError(f"no place for {sorted(set(source) - used)}")


def batch(step: int) -> Tensor:
    """Rows (B, L) of a language in which four tokens of five follow from the one before."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    noise = torch.rand(ROWS, LENGTH, generator=generator) < 0.2
    for t in range(1, LENGTH):
        rows[:, t] = torch.where(noise[:, t], rows[:, t], (3 * rows[:, t - 1] + 7) % VOCAB)
    return rows


def our_loss(model: HybridModel, rows: Tensor) -> Tensor:
    """Mean loss over the labels, and the routers' losses."""
    labels = torch.full_like(rows, -100)
    labels[:, :-1] = rows[:, 1:]
    out = model(rows, labels)
    loss = out.loss_sum / out.n_labels
    return loss if out.aux is None else loss + out.aux


class Ties:
    """Watches their routers for tokens whose last chosen and first rejected expert are all but equal.

    Rounding decides such a token's expert, in their model as in ours, and from then on the curves part:
    a batch with one is no comparison and is left out for both.
    """

    def __init__(self, model: nn.Module) -> None:
        self.margins: list[float] = []
        for name, module in model.named_modules():
            if name.endswith("router"):
                module.register_forward_hook(self.watch)

    def watch(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        """Keep the smallest margin between the logits on either side of the choice."""
        k = module.top_k
        ranked = output[0].detach().sort(dim=-1, descending=True).values  # (T, experts)
        self.margins.append((ranked[:, k - 1] - ranked[:, k]).min().item())

    def found(self) -> bool:
        """Whether the last forward pass had one."""
        margins, self.margins = self.margins, []
        return min(margins, default=1.0) < NEAR_TIE


@dataclass
class Curves:
    """What one case gave."""

    params: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    skipped: int = 0
    """Batches left out for a near tie of a router."""

    @property
    def gap(self) -> float:
        """Largest difference of the losses at the same step."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))


def compare(name: str, steps: int) -> Curves:
    """Train both models of a case side by side: AdamW with clipping, each from its own gradients."""
    case = CASES[name]()
    models = ours, theirs = build_pair(case)
    adamw = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(m.parameters(), **adamw) for m in models]
    ties = Ties(theirs)
    curves = Curves(sum(p.numel() for p in ours.parameters()))
    while len(curves.ours) < steps:
        rows = batch(len(curves.ours) + curves.skipped)
        their_loss = theirs(input_ids=rows, labels=rows, use_cache=False, **case.call).loss
        if ties.found():
            curves.skipped += 1
            continue
        losses = (our_loss(ours, rows), their_loss)
        for model, optimizer, loss in zip(models, optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        curves.ours.append(losses[0].item())
        curves.theirs.append(losses[1].item())
    return curves


def main(argv: list[str] | None = None) -> int:
    """Run the cases named, print a table; 1 if a curve differs by more than the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps (default 100)")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, fp32 CPU, {args.steps} steps")
    heads = f"{'first loss':>12}{'last ours':>12}{'last theirs':>13}{'largest gap':>13}{'skipped':>9}"
    print(f"{'case':<20}{'params':>8}{heads}{'seconds':>9}")
    worst = 0.0
    for name in args.cases or CASES:
        start = time.perf_counter()
        c = compare(name, args.steps)
        worst = max(worst, c.gap)
        losses = f"{c.ours[0]:>12.6f}{c.ours[-1]:>12.6f}{c.theirs[-1]:>13.6f}{c.gap:>13.2e}"
        seconds = time.perf_counter() - start
        print(f"{name:<20}{c.params:>8}{losses}{c.skipped:>9}{seconds:>9.0f}", flush=True)
    print(f"largest gap {worst:.2e}: {'within' if worst <= TOLERANCE else 'OVER'} {TOLERANCE:g}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
