"""fit: a typed config and its run folder in, a trained model and an exit code out."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ssmtrain.checkpoint.durable import replace_file
from ssmtrain.checkpoint.reading import no_gpu
from ssmtrain.checkpoint.runs import Run, resolve
from ssmtrain.config import launched
from ssmtrain.config.checks import uneven
from ssmtrain.config.errors import FINISHED, NON_FINITE, UNFINISHED, Lost, NonFinite, OutOfMemory, UserError
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import KEPT, FileTokenizer, tokenizer_of
from ssmtrain.kernels import backend
from ssmtrain.model.count import Counts, count_flops
from ssmtrain.model.show import report as picture
from ssmtrain.parallel import ranks
from ssmtrain.parallel.agreement import check_launch, started_here
from ssmtrain.train import attempts, report
from ssmtrain.train.clock import Clock
from ssmtrain.train.imports import import_lightning
from ssmtrain.train.room import is_out_of_memory
from ssmtrain.train.signals import Signals

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from ssmtrain.data.module import Data
    from ssmtrain.data.tokenizer import Tokenizer
    from ssmtrain.train.callbacks.checks import Checks
    from ssmtrain.train.callbacks.ending import Ending
    from ssmtrain.train.module import LitLM


def command(request: Request) -> int:
    """`ssmtrain fit config=…`: find or make the run, say what it will do, train."""
    assert request.config is not None
    launched.adopt()
    check_launch()
    place(request.config)
    run = resolve(request.config)
    try:
        for notice in run.notices:
            print(notice, flush=True)
        return FINISHED if run.finished else fit(request.config, run, request.began)
    finally:
        run.close()
        gc.freeze()  # the interpreter's last collection would take seconds and free nothing that matters


def fit(config: RunConfig, run: Run, began: float | None = None) -> int:
    """Train until a limit or a signal; returns 0 when finished, 75 when saved and unfinished.

    `began` is when the program started, on the monotonic clock; absent: now.
    Raises UserError (2), NonFinite (3), Lost (4) and OutOfMemory (5).
    """
    signals, clock = Signals(), Clock(start=began)
    signals.install()
    try:
        return _fit(config, run, signals, clock)
    except NonFinite:
        if launched.rank() == 0:
            raise
        return NON_FINITE  # agreed by all ranks: rank 0 says it once
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(config) from error
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            port = os.environ.get("MASTER_PORT", "")
            raise UserError(
                f"MASTER_PORT={port} is in use", "set another, the same for every rank"
            ) from error
        if _is_lost_rank(error):
            raise Lost("another rank was lost", f"continue with: {report.how_to_continue(run)}") from error
        raise
    finally:
        signals.restore()


def _fit(config: RunConfig, run: Run, signals: Signals, clock: Clock) -> int:
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    accelerator, devices = place(config)
    first = launched.rank() == 0
    _set_up_logging(first)
    try:
        backend.configure(config.trainer.kernels, "cuda" if accelerator == "gpu" else "cpu")
    except backend.BackendError as error:
        raise UserError(f"trainer.kernels: {error}") from None
    tokenizer = tokenizer_of(config)
    if first and config.tokenizer.kind == "bpe" and isinstance(tokenizer, FileTokenizer):
        replace_file(run.folder / KEPT, tokenizer.definition)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    counts, lines = picture(config, vocab)
    if first:
        print("\n".join([*lines, ""]), flush=True)
    data = open_data(config, tokenizer)
    if accelerator == "gpu":
        _kernels(config, vocab, data, devices)
    import_lightning()

    from ssmtrain.train.callbacks.checks import Checks, open_checks
    from ssmtrain.train.callbacks.ending import Ending
    from ssmtrain.train.module import LitLM

    checks = Checks(open_checks(config, tokenizer))
    lit = LitLM(config, vocab, data, signals, clock, run.checkpoint, run.origin)
    ending = Ending(run, tokenizer, counts.params.total, checks)
    callbacks = _callbacks(lit, run, tokenizer, counts, checks)
    trainer = make_trainer(config, run, accelerator, devices, [*callbacks, ending])
    return _train(trainer, lit, run, ending)


def _kernels(config: RunConfig, vocab: int, data: Data, devices: int) -> None:
    """Settle where kernels are kept and, before several ranks wait for each other, compile them.

    A rank that rank 0 started finds all there.
    """
    if backend.triton_obstacle("cuda") is not None:
        return
    from ssmtrain.train import warm

    warm.settle(config.trainer.kernel_cache)
    world = launched.world() or devices
    if world > 1 and "SSMTRAIN_PARENT" not in os.environ:
        rows = config.trainer.global_batch // config.data.seq_len // world
        device = torch.device("cuda", launched.local_rank())

        def say(text: str) -> None:
            if launched.rank() == 0:
                print(text, flush=True)

        warm.warm_up(config, vocab, data, device, config.trainer.micro_rows or rows, say)


def _train(trainer: Trainer, lit: LitLM, run: Run, ending: Ending) -> int:
    from ssmtrain.parallel.processes import children, wait_for

    def end_children() -> None:
        for process in children(trainer):
            process.kill()

    lit.signals.at_once = end_children
    try:
        trainer.fit(lit)
        _note_end(lit)
    except BaseException as error:
        _note_end(lit, error)
        raise
    finally:
        last_words = lit.journal.close()
        wait_for(children(trainer))
    finished = lit.stop == "finished"
    if launched.rank() == 0:
        print("\n".join([ending.text if finished else _stopped(lit, run), *last_words]), flush=True)
    if launched.local_world():
        _end_together(lit.signals)
    return FINISHED if finished else UNFINISHED


def _end_together(signals: Signals) -> None:
    """torchrun and srun end the other ranks once one has gone with a code: not before rank 0 is done."""
    ranks.agree(None)
    signals.ignore()


def _note_end(lit: LitLM, error: BaseException | None = None) -> None:
    """Leave word of how this attempt ended, for attempts.jsonl."""
    if lit.attempts is None:
        return
    if error is not None:
        lit.attempts.end = attempts.failure(error)
    elif lit.stop == "finished":
        lit.attempts.end = "finished"
    else:
        why = "out of time" if lit.stop == "seconds" else lit.signals.asked or "a signal"
        lit.attempts.end = f"stopped: {why}"


def _stopped(lit: LitLM, run: Run) -> str:
    why = "out of time" if lit.stop == "seconds" else f"stopped by {lit.signals.asked or 'a signal'}"
    text = f"{why}: saved at step {lit.state.step:,}; continue with: {report.how_to_continue(run)}"
    return f"{text}\n{attempts.line(lit.attempts.account())}" if lit.attempts else text


def place(config: RunConfig) -> tuple[str, int]:
    """Accelerator ("cpu" or "gpu") and number of processes; UserError when the machine has too few GPUs, or
    lacks the package that spreads the model."""
    trainer, started = config.trainer, started_here(config)
    if config.parallel.kind.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(
            f"parallel.kind = {config.parallel.kind}: the package deepspeed is not installed",
            "install it with: DS_BUILD_OPS=0 pip install 'ssmtrain[deepspeed]'",
            "or take parallel=ddp, or parallel=fsdp for a model that is too large for one device",
        )
    gpus = torch.cuda.device_count()
    accelerator = trainer.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "cpu":
        devices = started or trainer.devices or 1
    else:
        devices = started or trainer.devices or gpus
        if not gpus:
            raise no_gpu()
        if devices > gpus:
            raise UserError(
                f"trainer.devices: {devices} asked for, this machine has {gpus} GPUs",
                "ask srun for --gpus-per-node: each process must see all GPUs"
                if started
                else f"set trainer.devices={gpus}",
            )
    world = launched.world() or devices
    if trainer.cuda_graphs and (accelerator == "cpu" or world > 1):
        where = "on the CPU" if accelerator == "cpu" else f"on {world} devices"
        raise UserError(
            f"trainer.cuda_graphs: {where} there is none; it takes one GPU",
            "set trainer.cuda_graphs=false" + ("" if accelerator == "cpu" else " or trainer.devices=1"),
        )
    for lines in uneven(config, world):
        raise UserError(*lines)
    return accelerator, devices


def _callbacks(lit: LitLM, run: Run, tokenizer: Tokenizer, counts: Counts, checks: Checks) -> list[Callback]:
    """What happens after a step, in this order; figures before the save, so that it holds them."""
    from ssmtrain.train.callbacks.averaging import Averaging
    from ssmtrain.train.callbacks.console import Console
    from ssmtrain.train.callbacks.health import Health
    from ssmtrain.train.callbacks.ledger import Ledger, wanted
    from ssmtrain.train.callbacks.metrics import Metrics
    from ssmtrain.train.callbacks.paces import Paces
    from ssmtrain.train.callbacks.samples import Samples
    from ssmtrain.train.callbacks.saving import Saving
    from ssmtrain.train.callbacks.sinks import Sinks
    from ssmtrain.train.callbacks.stalls import Stalls
    from ssmtrain.train.callbacks.validation import Validation

    page = lit.config.trainer
    console = Console()
    found: list[Callback] = [Sinks(run, console)]
    if page.profile is not None:
        from ssmtrain.train.callbacks.profile import Profile

        found.append(Profile(run.folder, page.profile))
    if page.stall_seconds is not None:
        found.append(Stalls(run, page.stall_seconds))
    if lit.config.ema is not None:
        found.append(Averaging())
    if wanted():
        found.append(Ledger(run.ledger))
    flops = {lit.config.data.seq_len: counts.flops.total}
    for _, length in lit.lengths.stages:
        flops[length] = count_flops(lit.config.model, lit.vocab_size, length).total
    found += [Metrics(page.log_every, flops.__getitem__), Paces(page.log_every)]
    if page.health_every:
        found.append(Health(page.health_every))
    if page.val_every:
        found.append(Validation(page.val_every))
    if checks.checks:
        found.append(checks)
    if page.sample_every:
        found.append(Samples(tokenizer, page.sample_every))
    return [*found, Saving(run, page), console]


def make_trainer(
    config: RunConfig, run: Run, accelerator: str, devices: int, callbacks: list[Callback]
) -> Trainer:
    """Lightning's Trainer with everything of its own that is not exact, or not ours to show, switched off."""
    from lightning.pytorch import Trainer

    from ssmtrain.parallel.processes import environment
    from ssmtrain.parallel.strategy import spread

    world = launched.world() or devices
    alone = world == 1 and config.parallel.kind == "auto"
    # Its remarks are about what is switched off here; importing it has set its loggers to INFO.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torchmetrics)(\..*)?")
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=world // devices,
        plugins=[environment()],
        strategy="auto" if alone else spread(config.parallel, accelerator),
        precision="32-true",  # LitLM.autocast covers the forward pass only
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=run.folder,
    )
    # With several ranks Lightning would broadcast its own SIGTERM flag, and wait for it, before each step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _set_up_logging(first: bool) -> None:
    ours = logging.getLogger("ssmtrain")
    if not ours.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ssmtrain: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO if first else logging.ERROR)


def _out_of_memory(config: RunConfig) -> OutOfMemory:
    trainer = config.trainer
    advice = []
    if trainer.micro_rows != 1:
        rows = trainer.micro_rows or trainer.global_batch // config.data.seq_len // (trainer.devices or 1)
        half = next((m for m in range(rows // 2, 0, -1) if rows % m == 0), 1)
        advice.append(f"trainer.micro_batch={half}")
    if trainer.recompute != "block":
        advice.append("trainer.recompute=block")
    if trainer.precision == "fp32":
        advice.append("trainer.precision=bf16 (another run)")
    return OutOfMemory(
        "out of memory; the last checkpoint is good",
        "the global batch and the result stay the same with: "
        + (" ".join(advice[:2]) or "a smaller data.seq_len"),
    )


def _is_lost_rank(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return "gloo" in text and any(
        word in text for word in ("closed by peer", "reset", "timed out", "connect")
    )
