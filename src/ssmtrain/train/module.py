"""LitLM: a HybridModel under Lightning, where one training_step is one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from ssmtrain.checkpoint import faults
from ssmtrain.checkpoint.weights import load_weights
from ssmtrain.config.carry import slots
from ssmtrain.config.errors import NonFinite
from ssmtrain.config.growth import lengths
from ssmtrain.config.parallel import Fsdp, Zero3, ZeroStage
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.batch import Batch, cut
from ssmtrain.data.module import Data
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel, Output
from ssmtrain.model.init import init_weights
from ssmtrain.parallel import ranks, zero
from ssmtrain.parallel.agreement import agree_on_config
from ssmtrain.parallel.apply import apply
from ssmtrain.parallel.shard import shard
from ssmtrain.train import nonfinite, optim, room, snapshot, spikes
from ssmtrain.train.attempts import Attempts
from ssmtrain.train.carry import Carry
from ssmtrain.train.clock import Clock
from ssmtrain.train.ema import Ema
from ssmtrain.train.engine import Engine, TorchEngine
from ssmtrain.train.epochs import refuse_rereading
from ssmtrain.train.graph import Graphs, Pass
from ssmtrain.train.journal import Journal
from ssmtrain.train.pace import Pace
from ssmtrain.train.schedule import horizon, lr_at
from ssmtrain.train.signals import Signals
from ssmtrain.train.state import RunState, seed_generators


@dataclass
class Step:
    """What the latest step did."""

    loss: float
    """Nats per label over the global batch."""
    aux: float
    """Router losses, averaged over the micro-batches and ranks."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    skipped: bool
    samples: list[int]
    """Ids of the rows that this rank trained on."""
    tokens: int
    """Of the global batch."""
    length: int
    """Tokens of a row."""


class LitLM(LightningModule):
    """The model, its optimisers and the step; what happens between steps is in callbacks/."""

    def __init__(
        self,
        config: RunConfig,
        vocab_size: int,
        data: Data,
        signals: Signals,
        clock: Clock,
        checkpoint: Path | None = None,
        origin: Path | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.vocab_size, self.text, self.signals = config, vocab_size, data, signals
        self.checkpoint, self.origin = checkpoint, origin
        self.horizon, self.lengths = horizon(config.trainer), lengths(config.data)
        self.state = RunState()
        self.journal = Journal()
        self.clock = clock
        self.attempts: Attempts | None = None
        """Rank 0's."""
        self.tokens_here = 0
        """Tokens that this process's run of the program has trained on, over all ranks."""
        self.model: HybridModel
        self.engine: Engine
        self.opt: list[Optimizer] = []
        self.last: Step | None = None
        self.loads: dict[int, Tensor] = {}
        """Tokens per expert of the latest step, over all ranks, by block index."""
        self.stop: str | None = None
        """Why no further step is taken: "finished", "signal" or "seconds"."""
        self.graphs: Graphs | None = None
        self.ema: Ema | None = None
        self.carry: Carry | None = None
        self.pace: Pace | None = None
        """Of several ranks."""
        self.on_gradients: list[Callable[[], None]] = []
        """Called with the whole gradient in place, before it is clipped."""
        self.on_back: list[Callable[[int], None]] = []
        """Called with the step of the checkpoint that the run has gone back to."""
        self.newest_checkpoint: Callable[[], Path | None] = lambda: None
        """This run's newest good checkpoint, the same on every rank."""

    # Set-up, in the order in which Lightning calls it.

    def configure_model(self) -> None:
        """Build on the meta device, apply what the trainer asks for, then initialise or load."""
        agree_on_config(self.config)
        with torch.device("meta"):
            model = HybridModel(self.config.model, self.vocab_size)
        self.model = apply(model, self.config.trainer)
        spread = self.config.parallel
        # A model that is too large for a device is made in the host's memory, whole, and cut from there.
        self.model.to_empty(device="cpu" if isinstance(spread, Fsdp | Zero3) else self.device)
        # Rank 0 decides where to continue; the others must not find out for themselves.
        own, other = (ranks.from_first(str(p) if p else None) for p in (self.checkpoint, self.origin))
        self.checkpoint, self.origin = (Path(path) if path else None for path in (own, other))
        start = self.checkpoint or self.origin
        if start is None:
            init_weights(self.model, self.config.model.init, self.config.seed)
        else:
            load_weights(start, self.model, nonfinite=self.config.trainer.load_nonfinite)
        if isinstance(spread, Fsdp):
            shard(self.model, self.trainer.strategy.root_device, spread)
        elif isinstance(spread, Zero3):
            zero.cut(self.model, self.trainer.strategy.root_device, spread)
        self._assert_fp32()

    def _assert_fp32(self) -> None:
        """A_log, D, dt_bias, norms and routers must be fp32 whatever the run computes in."""
        named = dict(self.model.named_parameters())
        wrong = [n for n, spec in self.model.specs().items() if spec.fp32 and named[n].dtype != torch.float32]
        if wrong:
            raise RuntimeError(f"these parameters must be fp32 and are not: {', '.join(wrong[:5])}")

    def configure_optimizers(self) -> list[Optimizer]:
        """The optimisers that the recipe names, and who runs them."""
        named = dict(self.model.named_parameters())
        self.opt = optim.build_optimizers(
            named,
            self.model.specs(),
            self.config.optim,
            own=not isinstance(self.config.parallel, ZeroStage),
            # Blocks that are recomputed hold a weight in 16 bits no longer than they run.
            copies=self.config.trainer.recompute != "block",
        )
        if isinstance(self.config.parallel, ZeroStage):
            self.engine = zero.start(
                self.model,
                self.opt[0],
                self.config.parallel,
                self.trainer.strategy.root_device,
                clip=self.config.optim.clip,
                passes=len(self.shares()),
                autocast=self.autocast,
                check=partial(optim.check_state, optim.owners(self.opt)),
            )
        else:
            self.engine = TorchEngine(self)
        return self.opt

    def on_fit_start(self) -> None:
        """Continue from the checkpoint, or seed the generators."""
        if self.config.ema is not None:
            self.ema = Ema(self.config.ema, dict(self.model.named_parameters()))
        if (total := slots(self.config)) is not None:
            mine, bf16 = self.shares(), self.config.trainer.precision == "bf16"
            own, dtype = range(mine[0].start, mine[-1].stop), torch.bfloat16 if bf16 else torch.float32
            self.carry = Carry(self.model, own, total, dtype, self.device)
        if self.checkpoint is not None:
            self.state = snapshot.restore(self, self.checkpoint)
        elif self.origin is not None and self.config.origin and self.config.origin.kind == "fork":
            self.state = snapshot.begin(self, self.origin)
        else:
            seed_generators(self.config.seed, ranks.rank(), 0)
        refuse_rereading(self)
        if self.ema is not None:
            self.ema.begin(self.state.step)
        self.clock.before = self.state.seconds
        if self.config.trainer.cuda_graphs:
            self.graphs = Graphs(self.run_passes, list(self.model.parameters()), self.device)
        if self.horizon.reached(self.state.step, self.state.tokens):
            self.stop = "finished"

    def on_train_start(self) -> None:
        """Take the signals over: Lightning has set its own handlers after on_fit_start."""
        self.signals.install()
        self.signals.training = True
        self.clock.startup = self.clock.elapsed

    def train_dataloader(self) -> Iterator[int]:
        """Lightning's loop wants something to iterate over; the step reads the rows itself, by number."""
        return repeat(0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """End Lightning's epoch, which is the run, where no further step is to be taken."""
        return -1 if self.stop else None

    # The step.

    def shares(self) -> list[range]:
        """The rows of this rank's micro-batches, a contiguous slice, counted from the step's first."""
        trainer, world = self.config.trainer, ranks.world()
        total = self.horizon.batches.at(self.state.tokens) // self.config.data.seq_len
        mine = total // world
        first = ranks.rank() * mine
        size = trainer.micro_rows or self.state.micro_batch or mine
        return [range(at, min(at + size, first + mine)) for at in range(first, first + mine, size)]

    def rows(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        done, length, shares = self.state.rows, self.lengths.at(self.state.tokens), self.shares()
        if self.carry is not None:
            self.carry.follow(done)
        whole = [self.text.train.batch(range(done + r.start, done + r.stop)) for r in shares]
        # The step after, if it is as large: what is not in memory comes while this one is computed.
        after = done + sum(map(len, shares)) * ranks.world()
        self.text.train.ahead(range(after + shares[0].start, after + shares[-1].stop))
        return [cut(batch, length) for batch in whole]

    def run_model(self, batch: Batch) -> Output:
        """The model's sums for one batch, in the run's precision."""
        states = self.carry.begin(batch) if self.carry is not None else None
        batch = batch.to(self.device)
        with self.autocast():
            ctx = Context(doc_ids=batch.doc_ids, n_docs=batch.n_docs, states=states)
            return self.engine.forward(batch.inputs, batch.labels, ctx)

    def autocast(self) -> Any:
        """bf16 for the forward pass only: a backward pass repeats the forward's dtypes by itself."""
        if self.config.trainer.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimiser step over the global batch, or a counted skip when something was not finite."""
        faults.point("step_start")
        if self.config.trainer.micro_batch == "auto" and not self.tokens_here:
            self.state.micro_batch = room.rows_at_once(self)
        while not self.take_step():
            pass
        faults.point("step_end")

    def take_step(self) -> bool:
        """Read the rows of a step and take it; False when the run went back to a checkpoint instead."""
        before = self.clock.spent["data"]
        with self.clock("data"):
            micro = self.rows()
            mine = sum(int((b.labels != -100).sum()) for b in micro)
        if self.pace is not None:
            self.pace.add(self.clock.spent["data"] - before)
        with self.clock("step"):
            return self.step(micro, mine)

    def step(self, micro: list[Batch], my_labels: int) -> bool:
        """Gradients of the mean loss over all labels of all ranks, agreed finite, clipped, applied; False
        when the run went back to a checkpoint instead."""
        config, state = self.config, self.state
        # Filled on the device: nothing here waits until what was asked of it before is done.
        labels = ranks.sum_(torch.full((1,), float(my_labels), dtype=torch.float64, device=self.device))
        labels.clamp_(min=1.0)
        scale = ranks.world() / labels if ranks.active() else 1 / max(my_labels, 1)
        if self.pace is not None:
            self.pace.begin()
        sums = self.accumulate(micro, scale)
        for watch in self.on_gradients:
            watch()
        lr = lr_at(config.schedule, config.optim.lr, state.step, self.horizon)
        norm = self.engine.norm(lr)
        loss, aux, asked, late, grad_norm = self.agree(sums, labels, norm)
        if self.pace is not None:
            self.pace.end()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        why = spikes.leap(config.trainer.spikes, state, loss, grad_norm) if finite else None
        if not finite:
            back = self.skip(micro, loss, grad_norm)
        elif why is not None:
            back = spikes.leave_out(self, why)
        else:
            back = False
            self.apply_gradients(lr, norm, grad_norm)
            spikes.note(config.trainer.spikes, state, loss, grad_norm)
        if back:
            return False
        self.engine.clear()
        tokens, length = self.horizon.batches.at(state.tokens), self.lengths.at(state.tokens)
        samples = [i for b in micro for i in b.sample_ids]
        skipped = not finite or why is not None
        self.last = Step(loss, aux, grad_norm, lr, skipped, samples, tokens, length)
        state.step += 1
        state.rows += tokens // config.data.seq_len
        state.tokens += tokens
        if self.carry is not None and finite:
            self.carry.advance(state.rows)
        self.tokens_here += tokens
        state.seconds = self.clock.total
        if self.horizon.reached(state.step, state.tokens):
            self.stop = "finished"
        elif asked or late:
            self.stop = "signal" if asked else "seconds"
        return True

    def accumulate(self, micro: list[Batch], scale: float | Tensor) -> Tensor:
        """Backward over the micro-batches, a label counting `scale`; returns this rank's sums (2,) of loss
        and router losses.

        Gradients are averaged over the ranks at the last micro-batch, hence a factor `world` in the scale.
        """
        rows = sum(len(b.sample_ids) for b in micro)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.loads = {}
        for i, batch in enumerate(micro):
            with self.engine.micro_batch(last=i == len(micro) - 1):
                share = len(batch.sample_ids) / rows
                if self.graphs is not None and not isinstance(scale, Tensor):
                    part, loads = self.graphs(batch, scale, share)
                else:
                    part, loads = self.run_passes(batch, scale, share)
            sums += part
            for index, load in loads.items():
                self.loads[index] = self.loads[index] + load if index in self.loads else load
        return sums

    def run_passes(self, batch: Batch, scale: float | Tensor, share: float) -> Pass:
        """Forward and backward of one micro-batch, whose labels count `scale` and router losses `share`;
        returns its sums (2,) and the tokens per expert by block."""
        out = self.run_model(batch)
        assert out.loss_sum is not None
        if self.carry is not None and out.states is not None:
            self.carry.keep(batch, out.states)
        faults.point("after_forward")
        loss = out.loss_sum * (scale.to(out.loss_sum) if isinstance(scale, Tensor) else scale)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        sums[0] = out.loss_sum.detach()
        if out.aux is not None:
            loss = loss + out.aux * share
            sums[1] = out.aux.detach() * (share / ranks.world())
        if self.pace is not None:
            self.pace.mark()
        self.engine.backward(loss)
        return sums, {index: stats["load"] for index, stats in out.stats.items()}

    def agree(self, sums: Tensor, labels: Tensor, norm: Tensor) -> list[float]:
        """What every rank must decide alike: loss, router losses, asked to stop, out of time, norm.

        A rank whose own norm is not finite makes the sum of norms not finite on all of them.
        """
        limit = self.config.trainer.max_seconds
        late = limit is not None and self.clock.elapsed >= limit
        flags = torch.tensor(
            [float(self.signals.asked is not None), float(late)], dtype=torch.float64, device=self.device
        )
        parts = torch.cat([sums, flags, norm.detach().double().reshape(1)])
        *values, count = torch.cat([ranks.sum_(parts), labels]).tolist()
        values[0] /= count
        values[-1] /= ranks.world()
        return values

    def apply_gradients(self, lr: float, norm: Tensor, known: float) -> None:
        """Clip to a norm, which the host knows too, step every optimiser, balance the routers."""
        faults.point("before_optimizer")
        self.engine.apply(lr, norm, known)
        faults.point("after_optimizer")
        for index in sorted(self.loads):
            self.loads[index] = ranks.sum_(self.loads[index].clone())
            self.model.blocks[index].ffn.update_bias(self.loads[index])  # type: ignore[operator, union-attr]  # a Module's attribute
        self.state.nonfinite_row = 0

    def skip(self, micro: list[Batch], loss: float, grad_norm: float) -> bool:
        """Count a step that is not taken; after too many in a row True when the run went back to a checkpoint
        instead, or NonFinite with the first bad layer."""
        state, trainer = self.state, self.config.trainer
        state.nonfinite += 1
        state.nonfinite_row += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        row = f"{state.nonfinite_row} in a row, {trainer.max_nonfinite} stop the run"
        self.journal.write("skip", state.step + 1, what=what, loss=loss, grad_norm=grad_norm, row=row)
        if state.nonfinite_row < trainer.max_nonfinite:
            return False
        why = f"the {what} was not finite in {state.nonfinite_row} steps in a row"
        if trainer.spikes and trainer.spikes.action == "rollback" and spikes.go_back(self, why):
            return True
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        found = [nonfinite.locate(self.model, partial(self.run_model, b), gradients) for b in micro]
        clear = [text for text in found if "does not repeat" not in text]
        where = ranks.agree(clear[0] if clear else None) or found[0]
        raise NonFinite(
            f"{why}, up to step {state.step + 1}",
            where,
            "lower optim.lr, lengthen schedule.warmup or lower optim.clip; the last checkpoint is good",
        )
