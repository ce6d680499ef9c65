"""The command line: verbs, flags and exit codes. Each verb's work is in its own room, imported when called.

sys.argv is never changed: Lightning starts the local ranks of a run by calling the same line again.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import gc
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from ssmtrain.config.errors import (
    BUG,
    FINISHED,
    INTERRUPTED,
    OUT_OF_MEMORY,
    SHOWN,
    WRONG_INPUT,
    Stop,
    UserError,
)
from ssmtrain.config.request import Request
from ssmtrain.verbs import SYNONYMS, VERBS, Verb

PIPE_CLOSED = 141
"""What a shell reports for a program whose reader went away (128 + SIGPIPE)."""


LONGEST = 2000
"""Characters of a line that is said on standard error: what is wrong may be a megabyte long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show a character gets another, not a crash.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return _ended_by(error)
    return code


def run(args: list[str]) -> int:
    """Dispatch a command line; exceptions pass through."""
    began = time.monotonic()
    if args and args[0] in ("--version", "-V"):
        from ssmtrain import __version__

        print(f"ssmtrain {__version__}")
        return 0
    name, rest = _verb(args)
    verb = VERBS[name]
    flags, words = _flags(name, verb, rest)
    if flags.pop("help", False):
        name, verb, words, flags = "help", VERBS["help"], name.split(), {}
    if name not in ("help", "completion", "doctor"):
        if not __debug__:
            raise UserError(
                "python -O takes assertions away, and Hydra's reader of key=value words works inside some",
                "run without -O, and unset PYTHONOPTIMIZE",
            )
        from ssmtrain.config.redact import redact_logging

        redact_logging()
    if name in ("fit", "eval", "generate", "replay"):
        _share_the_cpu()
    # Imports make a million objects that live on: looking for garbage among them costs half a second.
    gc.disable()
    try:
        request = dataclasses.replace(_request(name, verb, flags, words), began=began)
        function = _function(
            "ssmtrain.sweep.local:command" if name == "fit" and flags.get("multirun") else verb.target
        )
    finally:
        gc.enable()
    return int(function(request))


def _share_the_cpu() -> None:
    """Keep torch's threads from spinning at barriers when other programs use this machine.

    On an idle machine spinning is somewhat faster; on a busy one it makes training several times slower.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    try:
        first = _cpu_ticks()
        time.sleep(0.1)
        idle, total = (b - a for a, b in zip(first, _cpu_ticks(), strict=True))
    except (OSError, ValueError):
        return
    if idle < 0.75 * total:
        os.environ["GOMP_SPINCOUNT"] = "2000"


def _cpu_ticks() -> tuple[int, int]:
    """Idle and total CPU time of the machine since it started, in ticks (proc(5))."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _verb(args: list[str]) -> tuple[str, list[str]]:
    """The verb (one or two words) and what follows it."""
    if not args:
        width = max(map(len, VERBS))
        raise UserError(
            "a verb is missing; `ssmtrain help` explains them, `ssmtrain fit config=quickstart` is a start",
            details=[f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()],
        )
    if args[0] in ("-h", "--help"):
        return "help", args[1:]
    pair = " ".join(args[:2])
    if pair in VERBS:
        return pair, args[2:]
    if args[0] in VERBS:
        return args[0], args[1:]
    family = [name for name in VERBS if name.startswith(f"{args[0]} ")]
    if family:
        if len(args) > 1 and args[1] in ("-h", "--help"):
            return "help", args[:1]
        said = f"{args[0]} {args[1]}: unknown" if len(args) > 1 else f"{args[0]} needs a second word"
        raise UserError(f"{said}; expected one of: {', '.join(f'ssmtrain {name}' for name in family)}")
    near = next(iter(difflib.get_close_matches(args[0], [*VERBS, *SYNONYMS], 1, 0.5)), None)
    near = SYNONYMS.get(near or "", near)
    hint = f"did you mean `ssmtrain {near}`?" if near else "`ssmtrain help` lists the verbs"
    if "=" in args[0]:
        hint = f"the verb comes first, as in: ssmtrain fit {args[0]}"
    raise UserError(f"{args[0]!r} is not a verb; {hint}")


def _flags(name: str, verb: Verb, rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Separate --flags from words."""
    flags: dict[str, Any] = {}
    words: list[str] = []
    queue = list(rest)
    while queue:
        word = queue.pop(0)
        word = {"-h": "--help", "-m": "--multirun"}.get(word, word)
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, text = word[2:].partition("=")
        if flag == "help":
            flags["help"] = True
            continue
        if flag not in verb.flags:
            raise UserError(_unknown_flag(name, verb, word, flag))
        takes_text = verb.flags[flag].startswith("=")
        if not takes_text and equals:
            raise UserError(f"--{flag} takes no value")
        if takes_text and not equals:
            if not queue:
                raise UserError(f"--{flag} needs a value: --{flag} {verb.flags[flag].split()[0][1:]}")
            text = queue.pop(0)
        # The bytes as typed are UTF-8, whatever the locale made of them.
        flags[flag] = os.fsencode(text).decode("utf-8", "replace") if takes_text else True
    if name == "fit" and flags.get("json") and not flags.get("multirun"):
        raise UserError("--json goes with --multirun; a single run writes runs/<name>/report.json")
    return flags, words


def _unknown_flag(name: str, verb: Verb, word: str, flag: str) -> str:
    near = difflib.get_close_matches(flag, verb.flags, 1, 0.6)
    if near:
        return f"{word}: {name} has no such flag; did you mean --{near[0]}?"
    if "." in flag or "=" in word:
        return f"{word}: settings have no dashes; type {word.lstrip('-')}" + ("" if "=" in word else "=…")
    known = ", ".join(f"--{one}" for one in (*verb.flags, "help"))
    return f"{word}: {name} has no such flag; it has {known}"


def _request(name: str, verb: Verb, flags: dict[str, Any], words: list[str]) -> Request:
    """Check what the line names and load its config."""
    own, words = _own(verb, words)
    if verb.takes == "words":
        return Request(name, overrides=words, flags=flags, words=own)
    if not verb.takes:
        if words:
            raise UserError(f"{name} takes no {words[0]!r}")
        return Request(name, flags=flags)
    runs = [word.partition("=")[2] for word in words if word.startswith("run=")]
    overrides = [word for word in words if not word.startswith(("run=", "config="))]
    if not runs:
        if flags.get("multirun"):
            if own:
                raise UserError(f"{next(iter(own))}= begins one run at a time: leave out --multirun")
            return Request(name, overrides=words, flags=flags)
        if verb.takes == "run":
            raise UserError(f"{name} needs run=<name or folder>", f"as in: {verb.example}")
        return Request(name, _load(name, verb, words, own), None, overrides, flags, own)
    if "run" not in verb.takes:
        raise UserError(
            f"{name} takes config=; to go on with a run: {name} config=runs/{runs[0]}/config.yaml"
        )
    if len(runs) > 1 or len(overrides) + 1 < len(words):
        raise UserError(f"{name} takes one run= or one config=, not both")
    return Request(name, None, runs[0], overrides, flags, own)


def _own(verb: Verb, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The words that are the verb's own, and the rest."""
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in verb.words:
            rest.append(word)
        elif key in own:
            raise UserError(f"{key}= is given twice: {own[key]} and {text}")
        elif not text:
            raise UserError(f"{key}= needs a value: {key}{verb.words[key].split()[0]}")
        else:
            own[key] = text
    return own, rest


def _load(name: str, verb: Verb, words: list[str], own: dict[str, str]) -> Any:
    from ssmtrain.config.load import load

    if name == "fit" and own:
        from ssmtrain.train.forks import load_from

        return load_from(own, words)
    if "run" in verb.takes and not any(word.startswith("config=") for word in words):
        from ssmtrain.config.catalog import recipe_lines

        raise UserError(
            f"{name} needs run=<name or folder> or config=<recipe or page>",
            details=["recipes:", *recipe_lines()],
        )
    return load(words, training=verb.takes == "config")


def show(request: Request) -> int:
    """Print the picture of a recipe, or of a run's model."""
    from ssmtrain.config.load import load_run_config
    from ssmtrain.data.tokenizer import vocab_rows
    from ssmtrain.model.show import show as picture

    config = request.config or load_run_config(request.run or "", request.overrides)
    print(picture(config, vocab_rows(config), request.as_json))
    return FINISHED


def _function(target: str) -> Any:
    import importlib

    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _ended_by(error: BaseException) -> int:
    """Say why the program ends and return the exit code that means it."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone: say nothing more, and let Python's own flush have nowhere to fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    if os.environ.get("SSMTRAIN_DEBUG") == "1":
        _trace(error)
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    if isinstance(error, Stop):
        more = [f"… and {len(error.lines) - SHOWN} more"] if len(error.lines) > SHOWN else []
        _say(*error.lines[:SHOWN], *more, details=error.details)
        return error.code
    return _unexpected(error)


def _unexpected(error: BaseException) -> int:
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate memory" in str(error):
        _say(
            f"out of memory: {' '.join(str(error).split())[:300]}",
            "use less with trainer.micro_batch=1, data.seq_len=…, or trainer.recompute=block",
        )
        return OUT_OF_MEMORY
    if "BackendError" in names:
        _say(str(error))
        return WRONG_INPUT
    disk = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
    disk |= {errno.ENAMETOOLONG, errno.ELOOP}
    if isinstance(error, OSError) and error.errno in disk:
        _say(f"{error.filename or 'the disk'}: {error.strerror}")
        return WRONG_INPUT
    if os.environ.get("SSMTRAIN_DEBUG") != "1":
        _trace(error)
    _say(
        "this is a bug in ssmtrain; please report it with the lines above and the output of `ssmtrain doctor`"
    )
    return BUG


def _trace(error: BaseException) -> None:
    import traceback

    from ssmtrain.config.redact import redact

    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _say(*lines: str, details: Sequence[str] = ()) -> None:
    from ssmtrain.config.redact import redact

    # A name out of a stranger's file may hold the codes that move a terminal's cursor or rewrite its lines.
    told = [f"{'       ' if i else 'error: '}{line}" for i, line in enumerate(lines)]
    try:
        for line in [*told, *details]:
            shown = redact("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))
            print(shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…", file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        pass
