"""The typed page of a run: model, data, tokenizer, optimiser, schedule, trainer and what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field

from ssmtrain.config.base import Config
from ssmtrain.config.ema import EmaConfig
from ssmtrain.config.launch import SlurmLaunch
from ssmtrain.config.origin import Origin
from ssmtrain.layers import ffn_kinds, mixer_kinds
from ssmtrain.layers.base import FfnConfig, MixerConfig

if TYPE_CHECKING:
    AnyMixer = MixerConfig
    AnyFfn = FfnConfig
else:
    AnyMixer = Annotated[Union[tuple(mixer_kinds().values())], Field(discriminator="kind")]  # noqa: UP007
    AnyFfn = Annotated[Union[tuple(ffn_kinds().values())], Field(discriminator="kind")]  # noqa: UP007

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class BlockConfig(Config):
    """One block: a mixer, an ffn, or both, each a residual branch with its norm."""

    mixer: AnyMixer | None = None
    """The layer that mixes over time; absent: the block has an ffn only."""
    ffn: AnyFfn | None = None
    """The layer that mixes over channels; absent: the block has a mixer only."""
    norm: Literal["pre", "post", "sandwich"] = "pre"
    """Where a branch's norm sits: before it, after it, or both."""


class MultipliersConfig(Config):
    """Scalars of maximal-update-style models such as Granite 4; attention's is the `scale` of its kind."""

    embedding: PositiveFloat = 1.0
    """Multiplies the embedding's output."""
    residual: PositiveFloat = 1.0
    """Multiplies each branch's output before it is added to the residual stream."""
    logits: PositiveFloat = 1.0
    """Multiplies the logits (Granite's logits_scaling is the inverse)."""


class InitConfig(Config):
    """How the model's weights start; each kind draws its own special parameters (A, dt) itself."""

    embedding_std: PositiveFloat = 0.02
    """Standard deviation of the embedding and of an untied head."""
    std: PositiveFloat | None = None
    """Standard deviation of every projection; absent: torch's default for linear maps, as Mamba has it."""
    rescale_residual: bool = True
    """Divide the output projections of residual branches by sqrt(number of branches in the model)."""


class ModelConfig(Config):
    """A language model: token embedding, blocks in the order of the layout, norm and head."""

    d_model: Positive
    """Width of the residual stream."""
    layout: str
    """Which block stands at each depth: a formula over the names in `blocks`, such as M5AM4."""
    blocks: dict[str, BlockConfig]
    """The named blocks: one capital letter, optionally one small letter (M, A, Sw)."""
    n_layers: Positive | None = None
    """Depth to which the formula is tiled; absent: the formula's own length."""
    vocab_size: Positive | None = None
    """Rows of the embedding; at least the tokenizer's size, which is the default."""
    tie_embeddings: bool = True
    """Use the embedding's weight as the head's."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the RMSNorms of blocks and head."""
    residual_fp32: bool = True
    """Keep the residual stream in fp32 under bf16 autocast."""
    multipliers: MultipliersConfig = MultipliersConfig()
    """Scalars on embedding, residual branches and logits."""
    init: InitConfig = InitConfig()
    """How the weights start."""


class _Data(Config):
    seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens in a row."""
    cache_dir: str | None = None
    """Where prepared shards are kept; absent: the user's cache folder."""


class EmbeddedData(_Data):
    """A corpus inside the package: six novels by Jane Austen; five train, Persuasion validates."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["austen"] = "austen"
    """Which corpus."""


class TextData(_Data):
    """The user's own text files; each file is one document."""

    kind: Literal["text"] = "text"
    train: str | list[str]
    """Files, globs or directories (searched for `include`) to train on."""
    val: str | list[str] | None = None
    """Files, globs or directories to validate on; absent: the last `val_fraction` of documents or text."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the text held out when `val` is absent."""
    include: list[str] = ["**/*.txt", "**/*.md"]
    """Globs of the files taken from a directory, in sorted path order; hidden ones are left out."""


AnyData = Annotated[EmbeddedData | TextData, Field(discriminator="kind")]


class BytesTokenizer(Config):
    """Text as UTF-8 bytes: 256 byte tokens and an end-of-text token."""

    kind: Literal["bytes"] = "bytes"


class FileTokenizer(Config):
    """A `tokenizer.json` as the tokenizers library writes it."""

    kind: Literal["file"] = "file"
    path: str
    """The file."""
    end_of_text: str | None = None
    """The token that closes a document; absent: the usual names are tried (<|endoftext|>, </s>, <eos>, …)."""


AnyTokenizer = Annotated[BytesTokenizer | FileTokenizer, Field(discriminator="kind")]

Betas = tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]]


class AdamWConfig(Config):
    """AdamW (Loshchilov & Hutter 2019) with decay only where it belongs."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: Annotated[Betas, Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moment estimates."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay of matrices; A_log, D, dt_bias, norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Whether the embedding (and a tied head) is decayed too."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; absent (null): no clipping."""


class MuonConfig(Config):
    """Muon (torch.optim.Muon) for two-dimensional hidden matrices, AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 1e-3
    """Peak learning rate of both; Muon's update is scaled to AdamW's root mean square."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Muon's momentum."""
    nesterov: bool = True
    """Whether Muon's momentum is Nesterov's."""
    ns_steps: Positive = 5
    """Newton-Schulz iterations."""
    betas: Annotated[Betas, Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay of matrices."""
    decay_embeddings: bool = False
    """Whether the embedding (and a tied head) is decayed too."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient; absent (null): no clipping."""


AnyOptim = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]

Span = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
"""A whole number of the schedule's unit, or a fraction (below 1) of the run."""


class _Schedule(Config):
    unit: Literal["steps", "tokens"] = "steps"
    """What whole numbers of this schedule count."""
    warmup: Span = 0.05
    """Length of the linear warm-up: a whole number of units, or a fraction (below 1) of the run."""


class WsdSchedule(_Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): constant, then linear to `floor` at the end."""

    kind: Literal["wsd"] = "wsd"
    decay: Span = 0.2
    """Length of the decay at the end."""
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class DecaySchedule(_Schedule):
    """The decay branch of a WSD run: from the rate at `start`, where it was forked, down to `floor`."""

    kind: Literal["decay"] = "decay"
    start: Count | None = None
    """Position where the decay begins; absent: the step that `from=` forks at."""
    share: Fraction | None = None
    """Learning rate at `start`, as a share of the peak; absent: what the run forked from had there."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """A straight line, half a cosine, or 1 - sqrt (Haegele et al. 2024), which falls fastest at first."""
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class CosineSchedule(_Schedule):
    """Half a cosine from the peak to `floor`."""

    kind: Literal["cosine"] = "cosine"
    floor: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""


class LinearSchedule(_Schedule):
    """A straight line from the peak to `floor`."""

    kind: Literal["linear"] = "linear"
    floor: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


class ConstantSchedule(_Schedule):
    """The peak after the warm-up."""

    kind: Literal["constant"] = "constant"


class PowerSchedule(_Schedule):
    """The power scheduler (Shen et al. 2024): a power of the tokens seen, then an exponential decay."""

    kind: Literal["power"] = "power"
    exponent: Annotated[float, Field(gt=0.0)] = 0.5
    """The rate is peak * (warm-up end / now) ** exponent after the warm-up."""
    decay: Span = 0.1
    """Length of the exponential decay at the end."""
    floor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Learning rate at the end, as a share of the rate where the decay starts."""


AnySchedule = Annotated[
    WsdSchedule | DecaySchedule | CosineSchedule | LinearSchedule | ConstantSchedule | PowerSchedule,
    Field(discriminator="kind"),
]


class TrainerConfig(Config):
    """How long, how much at once, in which precision, and what is saved and printed when."""

    max_steps: Positive | None = None
    """Stop after this many optimiser steps; the schedule's horizon."""
    max_tokens: Positive | None = None
    """Stop after this many tokens; the schedule's horizon when max_steps is absent."""
    max_seconds: PositiveFloat | None = None
    """Save and stop (exit 75) after this many seconds of this process; never shortens the schedule."""
    global_batch: Positive = 8192
    """Tokens in an optimiser step, over all devices and micro-batches."""
    micro_batch: Positive | None = None
    """Rows that one device computes at a time; absent: the global batch divided by the devices."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 throughout, or bf16 autocast over fp32 parameters."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Which implementation of the kernels runs; a named one that cannot run is an error."""
    kernel_cache: str | None = None
    """Folder in which compiled kernels are kept; absent: Triton's own, TRITON_CACHE_DIR or ~/.triton/cache.
    Several nodes may share one."""
    recompute: Literal["none", "ops", "block"] = "ops"
    """What the backward pass computes again rather than finds kept: nothing; on a GPU the results of ops that
    are cheap beside products and scans (norms, convolutions, gates); or each block from its input."""
    compile: bool = False
    """Run the blocks under torch.compile."""
    cuda_graphs: bool = False
    """Record a micro-batch's passes as one CUDA graph: for models that a core cannot call fast enough."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """What to train on."""
    devices: Positive | None = None
    """How many devices (processes) on this machine; absent: all GPUs, or one process on the CPU."""
    threads: Positive | None = None
    """CPU threads per process; absent: torch's choice."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    health_every: Count = 100
    """Steps between health metrics of the layers; 0: never."""
    val_every: Count = 200
    """Steps between validations; 0: only at the end."""
    val_tokens: Positive | None = None
    """Tokens of a validation during training; absent: the whole split, as it always is at the end."""
    sample_every: Count = 0
    """Steps between printed samples; 0: only at the end."""
    save_every: Positive = 200
    """Steps between checkpoints; one is always saved at the end."""
    save_async: bool = False
    """Write checkpoints while training goes on: a step waits for a copy in host memory alone. It takes the
    memory of what a device saves: 12 bytes a parameter under AdamW, divided by the devices."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least 2, so that a damaged newest one has a predecessor."""
    keep_every: Positive | None = None
    """Steps between checkpoints that are kept for good, beside the last and the best; absent: none."""
    max_nonfinite: Positive = 3
    """Stop (exit 3) after this many non-finite steps in a row; each one is skipped and counted."""
    stall_seconds: PositiveFloat | None = 600.0
    """With several devices: end the run (exit 4), the rank and its place named, when no rank takes a forward
    pass for so long; absent: wait as long as the engine's messages do, half an hour."""
    load_nonfinite: bool = False
    """Load a checkpoint that holds NaN or infinity as it is; else it is refused and its tensors are named."""


class AutoParallel(Config):
    """One process, or ddp when there are several devices."""

    kind: Literal["auto"] = "auto"


Digits = Literal["fp32", "bf16"]


class Ddp(Config):
    """Every device holds the whole model and a share of the batch."""

    kind: Literal["ddp"] = "ddp"
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""


class Fsdp(Config):
    """Every device holds a share of parameters, gradients and optimiser states, and of the batch (FSDP2)."""

    kind: Literal["fsdp"] = "fsdp"
    replicas: Positive = 1
    """Groups of neighbouring devices, each of which holds the whole model: as many as there are nodes keep
    the gathering of parameters within each; gradients are summed over groups too."""
    reshard: bool = True
    """Let go of a block's parameters after its forward pass and gather them again for the backward pass;
    false keeps them: a third fewer messages, and the whole model's parameters on each device meanwhile."""
    unit: Positive | None = None
    """Neighbouring blocks that are gathered in one message; absent: as many as have 64 million parameters."""
    gather: Digits = "fp32"
    """What the matrices of the blocks are gathered as; bf16 halves these messages and what is held whole, and
    rounds the gradient that each device makes of them. A_log, D, norms, routers and the like stay fp32."""
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""
    offload: bool = False
    """Keep each device's share in host memory and step it there; a block in use lies on the device."""


class Zero1(Config):
    """Every device holds the model and a share of the optimiser states (DeepSpeed's engine, ZeRO stage 1)."""

    kind: Literal["deepspeed_zero1"] = "deepspeed_zero1"
    reduce: Digits = "fp32"
    """What gradients are summed in over the devices; bf16 halves the messages and rounds every term."""
    offload_optimizer: bool = False
    """Keep each device's share of the optimiser states in host memory and step it there."""

    @property
    def stage(self) -> int:
        """1: optimiser states are cut; 2: gradients too; 3: parameters too."""
        return int(self.kind[-1])


class Zero2(Zero1):
    """As deepspeed_zero1, and of the gradients every device keeps its share alone (ZeRO stage 2)."""

    kind: Literal["deepspeed_zero2"] = "deepspeed_zero2"  # type: ignore[assignment]


class Zero3(Zero1):
    """As deepspeed_zero2, and parameters are cut too and gathered for a block at a time (ZeRO stage 3)."""

    kind: Literal["deepspeed_zero3"] = "deepspeed_zero3"  # type: ignore[assignment]
    offload_params: bool = False
    """Keep each device's share of the parameters in host memory; a block in use lies on the device."""


AnyParallel = Annotated[AutoParallel | Ddp | Fsdp | Zero1 | Zero2 | Zero3, Field(discriminator="kind")]


class NoLogger(Config):
    """metrics.jsonl and the console only."""

    kind: Literal["none"] = "none"


class WandbLogger(Config):
    """Weights & Biases, beside metrics.jsonl; the key comes from its own login or WANDB_API_KEY."""

    kind: Literal["wandb"] = "wandb"
    project: str = "ssmtrain"
    """Project."""
    entity: str | None = None
    """Team or user; absent: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in the run folder until `wandb sync`."""


class TensorBoardLogger(Config):
    """TensorBoard event files in the run folder (extra `tensorboard`)."""

    kind: Literal["tensorboard"] = "tensorboard"


AnyLogger = Annotated[NoLogger | WandbLogger | TensorBoardLogger, Field(discriminator="kind")]


class ShowConfig(Config):
    """What `ssmtrain show` assumes about serving."""

    sessions: Positive = 8
    """Concurrent sessions."""
    context: Positive = 131072
    """Tokens of context in each."""


class GenerateConfig(Config):
    """How text is sampled."""

    max_tokens: Positive = 256
    """Tokens to generate."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: Count = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the most likely tokens that hold this share of the probability."""
    prompt: str = ""
    """Text to continue in samples during training."""


class RunConfig(Config):
    """One full run."""

    name: str | None = None
    """Folder of the run under runs_dir; absent: the recipe and six hex digits of the config's hash."""
    recipe: str = "custom"
    """Name of the recipe; set by the loader."""
    runs_dir: str = "runs"
    """Where run folders are made."""
    resume: str = "auto"
    """auto: continue an unfinished run of this config; never: refuse to continue; or a checkpoint folder."""
    origin: Origin | None = None
    """The checkpoint of another run that this one began from; written by `from=` and `init=` of fit."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the weights, the order of the data and the samples."""
    model: ModelConfig
    """The model."""
    data: AnyData = EmbeddedData()
    """The text."""
    tokenizer: AnyTokenizer = BytesTokenizer()
    """How text becomes tokens."""
    optim: AnyOptim = AdamWConfig()
    """The optimiser."""
    schedule: AnySchedule = WsdSchedule()
    """The learning rate over the run."""
    ema: EmaConfig | None = None
    """A moving average of the weights beside those that train; absent: none."""
    trainer: TrainerConfig = TrainerConfig()
    """Length, batch, precision, saving and printing."""
    parallel: AnyParallel = AutoParallel()
    """How the model is spread over devices."""
    launch: SlurmLaunch = SlurmLaunch()
    """What `ssmtrain launch slurm` asks the cluster for."""
    logger: AnyLogger = NoLogger()
    """Where metrics go besides metrics.jsonl."""
    show: ShowConfig = ShowConfig()
    """What `ssmtrain show` assumes about serving."""
    generate: GenerateConfig = GenerateConfig()
    """How text is sampled."""


def dump(config: Config) -> dict[str, Any]:
    """The config as plain containers, every value spelled out, each `kind` first."""
    return _kind_first(config.model_dump(mode="json"))


def _kind_first(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    first = ["kind"] if "kind" in value else []
    return {key: _kind_first(value[key]) for key in [*first, *(key for key in value if key != "kind")]}
