"""A dropless mixture of experts: every token goes to its top-k experts, whatever their load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssmtrain.kernels.digits import keep
from ssmtrain.kernels.grouped_gemm import grouped_gemm
from ssmtrain.layers.base import Context, Ffn, FfnConfig, ParamSpec, Stats
from ssmtrain.layers.init import linear_default
from ssmtrain.layers.mlp import Activation, Mlp, MlpConfig, activate, widths

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class MoeConfig(FfnConfig):
    """Mixture of experts over stacked feed-forward experts."""

    kind: Literal["moe"] = "moe"
    n_experts: Annotated[int, Field(ge=2)]
    """Number of routed experts."""
    top_k: Positive
    """Experts that each token uses."""
    hidden: Positive
    """Hidden width of each expert."""
    activation: Activation = "swiglu"
    """Activation of the experts: swiglu, gelu or relu2."""
    router: Literal["softmax", "sigmoid_bias"] = "softmax"
    """softmax, or sigmoid_bias: sigmoid scores, chosen after adding a load-evening bias (DeepSeek-V3)."""
    normalize: bool = True
    """Make the weights of a token's experts sum to 1 (Granite); false keeps the router's scores (Jamba)."""
    scaling: PositiveFloat = 1.0
    """Multiplies the experts' weights."""
    shared_hidden: Positive | None = None
    """Hidden width of an expert that every token uses besides its top-k; absent: none."""
    aux_coef: NonNegative = 0.001
    """Weight of the load-balancing loss; 0: none."""
    z_coef: NonNegative = 0.0
    """Weight of the router's z loss (mean squared log-sum-exp of its logits); 0: none."""
    bias_rate: PositiveFloat = 1e-3
    """Size of one update of the selection bias (router sigmoid_bias)."""

    def build(self, d_model: int) -> Moe:
        """Make the module; parameters are left unwritten."""
        return Moe(self, d_model)

    def check(self, d_model: int) -> Iterable[tuple[str, str]]:
        """Yield (field, what is wrong)."""
        if self.top_k > self.n_experts:
            yield "top_k", f"must not exceed n_experts ({self.n_experts})"
        if self.router != "sigmoid_bias" and self.bias_rate != type(self).model_fields["bias_rate"].default:
            yield "bias_rate", "has no effect with this router: set router to sigmoid_bias or leave it out"

    def shared(self) -> MlpConfig | None:
        """The shared expert as a dense layer."""
        return (
            MlpConfig(hidden=self.shared_hidden, activation=self.activation) if self.shared_hidden else None
        )

    def _params(self, d_model: int, experts: int) -> int:
        expert = d_model * self.hidden * (widths(self.activation) + 1)
        shared = self.shared()
        return self.n_experts * d_model + experts * expert + (shared.num_params(d_model) if shared else 0)

    def num_params(self, d_model: int) -> int:
        """Parameters of the router, all experts and the shared one."""
        return self._params(d_model, self.n_experts)

    def num_active_params(self, d_model: int) -> int:
        """Parameters that compute one token: the whole router, top_k experts, the shared one."""
        return self._params(d_model, self.top_k)

    def flops(self, d_model: int, seq_len: int) -> int:
        """Forward FLOPs per token: router, top_k experts, the shared one."""
        return 2 * self.num_active_params(d_model)


class Moe(Ffn):
    """y = sum over a token's experts of weight * expert(x), plus shared(x)."""

    reads_fp32 = True  # the router's logits: a tie in bf16 would send tokens elsewhere
    selection_bias: Tensor
    router: Tensor
    w_in: Tensor
    w_out: Tensor

    def __init__(self, config: MoeConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        E, f = config.n_experts, config.hidden
        self.declare("router", (E, d_model), ParamSpec(linear_default(d_model), fp32=True, plain=True))
        expert_in = ParamSpec(linear_default(d_model), plain=True)
        self.declare("w_in", (E, widths(config.activation) * f, d_model), expert_in)
        self.declare("w_out", (E, d_model, f), ParamSpec(linear_default(f), residual=True, plain=True))
        shared = config.shared()
        self.shared = Mlp(shared, d_model) if shared else None
        if config.router == "sigmoid_bias":
            self.register_buffer("selection_bias", torch.zeros(E, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """Set the selection bias to zero, as at the start of training."""
        if self.config.router == "sigmoid_bias":
            self.selection_bias.zero_()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Stats]:
        """Weights and experts (T, k) of tokens x (T, D), and the router's statistics; fp32 or wider."""
        config = self.config
        keep("moe", router=self.router)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.router.dtype), self.router)  # (T, E)
            if config.router == "softmax":
                scores = torch.softmax(logits, dim=-1)
                weights, experts = scores.topk(config.top_k, dim=-1)
            else:
                scores = torch.sigmoid(logits)
                # The bias decides who is chosen, never how much the chosen count.
                experts = (scores.detach() + self.selection_bias).topk(config.top_k, dim=-1).indices
                weights = scores.gather(-1, experts)
            if config.normalize:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
            return weights * config.scaling, experts, self.stats(logits, scores, experts)

    def stats(self, logits: Tensor, scores: Tensor, experts: Tensor) -> Stats:
        """Load (experts,), and the auxiliary and z losses times their coefficients.

        aux = n_experts * sum_e f_e p_e, with f_e the share of tokens that chose expert e (the shares sum to
        top_k) and p_e its mean probability (Switch Transformers, equation 4, as Mixtral and Jamba extend it
        to top-k). z is ST-MoE's, equation 5.
        """
        config = self.config
        choices = experts.reshape(-1)  # (T k,)
        # Counted without a round trip to the host, unlike bincount.
        load = choices.new_zeros(config.n_experts).scatter_add_(0, choices, torch.ones_like(choices))
        probs = scores if config.router == "softmax" else scores / scores.sum(-1, keepdim=True)
        share = load.to(scores.dtype) / experts.shape[0]
        aux = config.aux_coef * config.n_experts * torch.dot(share, probs.mean(0))
        z = config.z_coef * torch.logsumexp(logits, dim=-1).square().mean()
        return {"aux": aux, "z": z, "load": load}

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Stats]:
        """Mix x (B, L, D) over channels; returns y (B, L, D) and {aux, z, load}."""
        k = self.config.top_k
        tokens = x.flatten(0, -2)  # (T, D)
        weights, experts, stats = self.route(tokens)  # (T, k)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        # Both gathers are permutations, so their gradients add nothing up and are the same on every run.
        order = experts.reshape(-1).argsort(stable=True)  # (T k,) token-expert pairs by expert
        rows = tokens.to(dtype).repeat_interleave(k, dim=0).index_select(0, order)  # (T k, D)
        h = grouped_gemm(rows, self.w_in, stats["load"])  # (T k, 2F) or (T k, F)
        h = activate(h, self.config.activation)
        out = grouped_gemm(h, self.w_out, stats["load"])  # (T k, D)
        out = out.index_select(0, order.argsort()).unflatten(0, (-1, k))  # (T, k, D)
        y = (out * weights[..., None].to(out.dtype)).sum(1).view(x.shape)  # (B, L, D)
        if self.shared is not None:
            y = y + self.shared(x, ctx)[0]
        return y, stats

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Move the selection bias towards even load (experts,): +rate below the mean load, -rate above it.

        Called once per optimiser step with the load summed over the global batch (Wang et al. 2024,
        auxiliary-loss-free balancing, algorithm 1); does nothing with the softmax router.
        """
        if self.config.router == "sigmoid_bias":
            load = load.to(self.selection_bias.dtype)
            self.selection_bias += self.config.bias_rate * torch.sign(load.mean() - load)
