"""What the ranks of a run must have in common before they begin: one launch that adds up, one config."""

from __future__ import annotations

import hashlib
import json
import os
import socket

from ssmtrain.config import launched
from ssmtrain.config.errors import UserError
from ssmtrain.config.expect import show_value
from ssmtrain.config.identity import flat
from ssmtrain.config.schema import RunConfig, dump
from ssmtrain.parallel import ranks

_HOW = "start every rank with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE and let ssmtrain start them"


def check_launch() -> None:
    """UserError when the environment's ranks contradict each other, or when rank 0 of a launch by hand could
    not listen on MASTER_PORT."""
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    local, local_world = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    if rank is not None and world is None:
        raise UserError(f"RANK={rank} without WORLD_SIZE in the environment", _HOW)
    if rank is not None and world is not None and rank >= world:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world}: expected a rank from 0 to {world - 1}", _HOW)
    if (world or 1) > 1 and rank is None and local is None and "SLURM_PROCID" not in os.environ:
        raise UserError(f"WORLD_SIZE={world} without RANK in the environment", _HOW)
    if local_world is not None and (local or 0) >= local_world:
        raise UserError(
            f"LOCAL_RANK={local} with LOCAL_WORLD_SIZE={local_world}: expected below {local_world}", _HOW
        )
    if rank == 0 and (world or 1) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port()


def started_here(config: RunConfig) -> int:
    """How many ranks a launcher started on this node, 0 if none did; UserError for what cannot be joined."""
    here, world, asked = launched.local_world(), launched.world(), config.trainer.devices
    if "RANK" in os.environ and not here:
        raise UserError(
            "RANK is set, and LOCAL_WORLD_SIZE is not: nobody says how many processes this node has",
            "start with torchrun --nproc-per-node=N … -m ssmtrain fit …, or unset RANK",
        )
    if here and world % here:
        raise UserError(
            f"{world} processes were started, {here} of them on this node: every node must have as many",
            "start the same number on each: srun --ntasks-per-node=N, torchrun --nproc-per-node=N",
        )
    if here and asked not in (None, here):
        raise UserError(
            f"trainer.devices = {asked}: {here} processes were started on this node",
            f"leave it out, or start as many: srun --ntasks-per-node, torchrun --nproc-per-node={asked}",
        )
    return here


def agree_on_config(config: RunConfig) -> None:
    """UserError on every rank, naming keys and values, when the ranks were started with different configs."""
    text = json.dumps(dump(config), sort_keys=True)
    if len(set(ranks.texts(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    pages = [dict(flat(json.loads(one))) for one in ranks.texts(text)]
    other = next(rank for rank, page in enumerate(pages) if page != pages[0])
    first, second = pages[0], pages[other]
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    shown = [
        f"{key}: {show_value(first.get(key))} on rank 0, {show_value(second.get(key))} on rank {other}"
        for key in keys[:3]
    ]
    more = [f"(and {len(keys) - 3} more)"] if len(keys) > 3 else []
    raise UserError(
        "the ranks were started with different configs:", *shown, *more, "give every rank the same line"
    )


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdigit():
        raise UserError(f"{name}={value!r} in the environment: expected a whole number", _HOW)
    return int(value)


def _check_port() -> None:
    port = _number("MASTER_PORT")
    if port is None:
        return
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535", "set MASTER_PORT=29500")
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT={port}: rank 0 cannot listen there: {error.strerror}",
                "set another MASTER_PORT, the same for every rank",
            ) from None
