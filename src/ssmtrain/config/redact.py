"""Secrets kept out of what leaves the program: messages, logs, records, tracked configs."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable
from typing import Any

MARK = "[redacted]"

_NAMES = (
    r"api[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?|passwo?r?d|passphrase|credentials?"
    r"|(?:access|auth|hf|hub|wandb|bearer)?[_-]?token|(?:access|private)[_-]?key"
)
SECRET_KEY = re.compile(rf"(?:.*[_-])?(?:{_NAMES})", re.IGNORECASE)
"""Names of settings that hold secrets."""

SECRET_VALUE = re.compile(
    r"(?:(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|AKIA|ASIA|AIza|xox[abeprs]-|wandb_v1_)[A-Za-z0-9_-]{12,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
"""Texts that are secrets by their look: keys of services, signed tokens, private keys."""

_ENVIRONMENT = re.compile(
    r"(?:.*_)?(?:(?:API|ACCESS|PRIVATE|SECRET)?_?KEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|JWT|AUTH"
    r"|CREDENTIALS?)(?:_.*)?",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    rf"(?<![A-Za-z0-9])({_NAMES})(=|[\"']\s*:\s*)([\"']?[^\s\"',;)}}]+)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_BEARER = re.compile(r"(?<=\bBearer )[A-Za-z0-9._~+/=-]{8,}")
_SHORTEST = 8
_SHORTEST_WORD = 16
"""Of one without digits or signs: AUTH_MODE=disabled is no secret."""


def environment_secrets() -> list[str]:
    """The values of this process's environment variables that are named like secrets, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT.fullmatch(name)
        and len(value) >= (_SHORTEST_WORD if value.isalpha() else _SHORTEST)
        # SSH_AUTH_SOCK and GOOGLE_APPLICATION_CREDENTIALS say where a secret is, not what it is.
        and not (os.path.isabs(value) and os.path.exists(value))
    }
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """The text with every secret in it replaced by [redacted]: known by its look, its name, or this
    process's environment."""
    for value in environment_secrets():
        text = text.replace(value, MARK)
    text = _BEARER.sub(MARK, _IN_URL.sub(MARK, SECRET_VALUE.sub(MARK, text)))
    return _ASSIGNED.sub(rf"\1\2{MARK}", text)


def redacted(value: Any) -> Any:
    """Plain containers with every text redacted, and whatever stands under a secret's name."""
    if isinstance(value, dict):
        return {
            key: MARK
            if isinstance(key, str) and isinstance(inner, str) and SECRET_KEY.fullmatch(key)
            else redacted(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def redact_logging() -> None:
    """Redact every log record of this process, whichever library makes it and wherever it goes."""
    make = logging.getLogRecordFactory()
    if isinstance(make, _Redacting):
        return
    logging.setLogRecordFactory(_Redacting(make))


class _Redacting:
    """Makes log records whose message and traceback hold no secret."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self.make = make

    def __call__(self, *args: Any, **options: Any) -> logging.LogRecord:
        record = self.make(*args, **options)
        try:
            said = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # arguments that do not fit the message: the handler says so
        clean = redact(said)
        if clean != said:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
        return record
