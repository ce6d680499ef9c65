"""What a rank of test_parallel_zero does: step a model with the others, and compare with torch's own step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssmtrain.config.parallel import Zero1
from ssmtrain.kernels import backend
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights
from ssmtrain.model.spread import count_sent
from ssmtrain.parallel import ranks, zero
from ssmtrain.parallel.apply import apply
from ssmtrain.parallel.shard import as_held, in_pieces, like, mine, on_first, tensors_of, to_write
from ssmtrain.train import optim
from ssmtrain.train.callbacks.health import gradient_norms
from train.conftest import page

Tensors = dict[str, Tensor]


def step_as_one(folder: Path, how: Zero1) -> None:
    """Everything that a rank can see of DeepSpeed's engine."""
    sent = _counted()
    dist.init_process_group("gloo")
    backend.configure("auto", "cpu")
    _Case(folder, how, sent).check()
    dist.barrier()
    dist.destroy_process_group()
    print("as one")


def _counted() -> dict[str, int]:
    """Bytes of each kind of message from now on."""
    sent: dict[str, int] = {}

    def counting(name: str) -> None:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            sent[name] = sent.get(name, 0) + max(t.nbytes for t in tensors)
            return real(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        counting(name)
    return sent


def _written(tensors: Tensors) -> tuple[Tensors, int]:
    """What the ranks write together, as rank 0 has it, and how many bytes this one does."""
    own = to_write(tensors)
    found = {}
    for name in sorted(tensors):
        there = ranks.gather(torch.tensor([name in own]))
        assert sum(map(int, there)) == 1, name
        value = own[name].detach().clone() if name in own else torch.zeros(tensors[name].shape)
        dist.broadcast(value, [bool(t) for t in there].index(True))
        found[name] = value
    return found, sum(t.nbytes for t in own.values())


class _Case:
    """A model under one way, beside the same model and optimiser of torch alone."""

    def __init__(self, folder: Path, how: Zero1, sent: dict[str, int]) -> None:
        self.how, self.sent, self.rank, self.world = how, sent, dist.get_rank(), dist.get_world_size()
        config = page(folder)
        changes = {"d_model": 20, "layout": "MAMAMA", "tie_embeddings": True}
        shape = type(config.model).model_validate({**config.model.model_dump(), **changes})
        self.one = HybridModel(shape, 257)
        init_weights(self.one, shape.init, 0)
        self.total = sum(p.numel() for p in self.one.parameters())
        shapes = (3, self.world, 2, 33)  # pass, rank
        self.rows = torch.randint(257, shapes, generator=torch.Generator().manual_seed(0))
        self.model = copy.deepcopy(self.one)
        recompute = "block" if getattr(how, "offload_params", False) else "ops"
        apply(self.model, config.trainer.model_copy(update={"recompute": recompute}))
        if how.stage == 3:
            zero.cut(self.model, torch.device("cpu"), how)
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if how.reduce == "bf16":
            autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        self.autocast = autocast
        specs = self.one.specs()
        (self.ours,) = optim.build_optimizers(dict(self.one.named_parameters()), specs, config.optim)
        self.named = dict(self.model.named_parameters())
        (opt,) = optim.build_optimizers(self.named, specs, config.optim)
        self.engine = zero.start(
            self.model, opt, how, torch.device("cpu"), clip=1.0, passes=2, autocast=autocast,
            check=partial(optim.check_state, optim.owners([opt])),
        )  # fmt: skip
        trainer = {**config.trainer.model_dump(), "devices": 2, "micro_batch": 1}
        whole = {**config.model_dump(), "model": shape, "trainer": trainer, "parallel": how}
        self.config = config.model_validate(whole)

    def check(self) -> None:
        """All of it, in the order of a run."""
        self.what_is_held()
        self.state()
        self.one_step()
        self.what_is_sent()
        self.no_number()
        self.without_gradients()

    def loss(self, forward: Any, i: int, r: int) -> Tensor:
        inputs, labels = self.rows[i, r, :, :-1], self.rows[i, r, :, 1:].contiguous()
        value: Tensor = forward(inputs, labels, Context(n_docs=2)).loss_sum / 64
        return value

    def passes(self, bad: float = 0.0) -> None:
        """Two micro-batches; `bad` is added to the first loss of rank 1."""
        for i in range(2):
            with self.engine.micro_batch(last=i == 1):
                value = self.loss(self.engine.forward, i, self.rank)
                self.engine.backward(value + bad if self.rank == 1 and i == 0 else value)

    def what_is_held(self) -> None:
        cut = [name for name, p in self.named.items() if in_pieces(p)]
        assert bool(cut) == (self.how.stage == 3)
        if cut:
            held = sum(mine(p).numel() for p in self.named.values())
            assert held < 0.51 * self.total, (held, self.total)
            assert sum(p.numel() for p in self.named.values()) < 0.01 * self.total  # between passes
        # An average of the weights lies as they do.
        for n, p in self.one.named_parameters():
            held_as = as_held(like(p.detach() + 1, self.named[n]), self.named[n])
            assert torch.equal(held_as.whole() if cut else held_as, p + 1), n

    def state(self) -> None:
        """Put in and given back to the bit, each tensor by one rank, about as many bytes by each."""
        generator = torch.Generator().manual_seed(1)
        saved = {f"{n}/step": torch.tensor(5.0) for n in self.named}
        for n, p in self.one.named_parameters():
            saved[f"{n}/exp_avg"] = torch.randn(p.shape, generator=generator) * 1e-3
            saved[f"{n}/exp_avg_sq"] = torch.rand(p.shape, generator=generator) * 1e-3
        try:
            self.engine.load(self.named, {k: v for k, v in saved.items() if k != "input.weight/exp_avg"})
            raise SystemExit("state that lacks a tensor was taken")
        except ValueError as error:
            assert "input.weight/exp_avg" in str(error)
        self.engine.load(self.named, saved)
        optim.load_state_tensors([self.ours], dict(self.one.named_parameters()), saved)
        for tensors, wanted in (
            (self.engine.states(), saved),
            (tensors_of(self.model), self.one.state_dict()),
        ):
            found, bytes_here = _written(tensors)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[k], wanted[k]) for k in wanted)
            whole = sum(t.nbytes for t in wanted.values())
            assert bytes_here < 0.7 * whole, (bytes_here, whole)

    def by_torch(self) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """The same step of all ranks' rows in one process: norm and gradients."""
        for i in range(2):
            for r in range(self.world):
                with self.autocast():
                    value = self.loss(self.one, i, r)
                (value / self.world).backward()
        grads = [(n, p.grad.clone()) for n, p in self.one.named_parameters() if p.grad is not None]
        parameters = list(self.one.parameters())
        norm = optim.gradient_norm(parameters)
        optim.clip_gradients(parameters, 1.0, norm, float(norm))
        optim.set_lr([self.ours], 0.02)
        self.ours.step()
        self.ours.zero_grad()
        return norm, grads

    def one_step(self) -> None:
        """A step of two passes: gradients, their norm, weights, against torch."""
        tight = self.how.reduce == "fp32"
        rtol = 1e-4 if tight else 3e-2
        self.passes()
        norm_one, grads_one = self.by_torch()
        kinds = {n: n for n in self.named}
        got = gradient_norms(self.engine.gradients(), kinds, False)
        want = gradient_norms(grads_one, kinds, False)
        assert all(abs(got[n] / want[n] - 1) < 10 * rtol for n in want if want[n] > 1e-3), (got, want)
        norm = self.engine.norm(0.02)
        assert abs(norm / norm_one - 1) < rtol, (norm, norm_one)
        self.engine.apply(0.02, norm, float(norm))
        self.engine.clear()
        found, _ = _written(tensors_of(self.model))
        for n, p in self.one.named_parameters():
            gap = (found[n] - p).abs().max()
            assert gap < (2e-5 if tight else 4e-3), (n, gap)
            assert p.dtype == found[n].dtype == torch.float32
        steps, _ = _written(self.engine.states())
        assert all(float(steps[f"{n}/step"]) == 6 for n in self.named)

    def what_is_sent(self) -> None:
        """As much as model/spread.py counts, but for padding and what is too small to cut."""
        self.sent.clear()
        self.passes()
        assert self.engine.norm(0.02).isfinite()
        counted = count_sent(self.config, self.total)
        for kind, wanted in (
            ("all_gather_into_tensor", counted.gathered),
            ("reduce_scatter_tensor" if self.how.stage == 3 else "reduce", counted.summed),
        ):
            # Half of it is each rank's own.
            assert abs(self.sent[kind] / 2 - wanted) < 0.03 * wanted, (self.sent, counted)
        assert self.sent.get("all_reduce", 0) < 100 and len(self.sent) == 3, self.sent

    def no_number(self) -> None:
        """A loss that is not a number on one rank, or is infinite with a good gradient: no rank steps."""
        for bad in (torch.nan, torch.inf):
            before = _written(tensors_of(self.model))[0]
            self.passes(bad)
            assert not self.engine.norm(0.02).isfinite()
            self.engine.clear()
            after = _written(tensors_of(self.model))[0]
            assert all(torch.equal(after[k], v) for k, v in before.items())
        steps, _ = _written(self.engine.states())
        assert all(float(steps[f"{n}/step"]) == 7 for n in self.named)

    def without_gradients(self) -> None:
        """Also on rank 0 by itself; and a pass after all that."""
        found, _ = _written(tensors_of(self.model))
        for n, p in self.one.named_parameters():
            p.data.copy_(found[n])
        with torch.no_grad():
            expected = self.loss(self.one, 2, 0)
            assert torch.allclose(self.loss(self.model, 2, 0), expected)
            assert torch.allclose(self.loss(self.model, 2, 0), expected)
        with on_first(self.model) as alone, torch.no_grad():
            assert (alone is None) == (self.rank > 0)
            if alone is not None:
                assert torch.allclose(self.loss(alone, 2, 0), expected)
        with self.engine.micro_batch(last=True):
            self.engine.backward(self.loss(self.engine.forward, 2, self.rank))
        assert self.engine.norm(0.02).isfinite()
