"""The typed page of a run: model, data, tokenizer, optimiser, schedule, trainer and what surrounds them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ssmtrain.config.base import Config, Count, Positive
from ssmtrain.config.data import AnyData, AnyTokenizer, BytesTokenizer, EmbeddedData
from ssmtrain.config.ema import EmaConfig
from ssmtrain.config.launch import SlurmLaunch
from ssmtrain.config.logger import AnyLogger, NoLogger
from ssmtrain.config.model import ModelConfig
from ssmtrain.config.optim import AdamWConfig, AnyOptim
from ssmtrain.config.origin import Origin
from ssmtrain.config.parallel import AnyParallel, AutoParallel
from ssmtrain.config.schedule import AnySchedule, WsdSchedule
from ssmtrain.config.tasks import AnyCheck
from ssmtrain.config.trainer import TrainerConfig


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
    """The text, or the task."""
    tokenizer: AnyTokenizer = BytesTokenizer()
    """How text becomes tokens."""
    optim: AnyOptim = AdamWConfig()
    """The optimiser."""
    schedule: AnySchedule = WsdSchedule()
    """The learning rate over the run."""
    ema: EmaConfig | None = None
    """A moving average of the weights beside those that train; absent: none."""
    checks: dict[str, AnyCheck] = {}
    """Tasks and text files to score every so many steps beside the validation, by name."""
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
