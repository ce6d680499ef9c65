"""What a page may not contain: import paths, secrets, the environment, references that grow or go round."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ssmtrain.config.errors import UserError
from ssmtrain.config.redact import SECRET_KEY, SECRET_VALUE, environment_secrets

Tree = dict[str, Any]

ENVIRONMENT = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|TMPDIR|SCRATCH|XDG_CACHE_HOME|XDG_DATA_HOME|SLURM_[A-Z_]+"
)
"""Variables that ${oc.env:NAME} may read: none of them holds a secret."""
_SECRET_ENVIRONMENT = re.compile(r"KEY|TOKEN|SECRET|PASS|CRED|JWT|AUTH")

_INSTANTIATE = re.compile(r"_[a-z]+_")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")

MAX_EXPANDED = 50_000
"""Values and characters that a page may grow to when its references are filled in."""


def check_tree(tree: Tree) -> None:
    """Refuse, before anything is resolved, what a page may not contain; UserError names the key."""
    problems: list[str] = []
    secrets = environment_secrets()
    for path, key, value in walk(tree):
        where = ".".join(path)
        if _INSTANTIATE.fullmatch(key):
            problems.append(f"{where}: a config never names code to call; choose a component by its `kind`")
        elif SECRET_KEY.fullmatch(key) and value is not None:
            problems.append(
                f"{where}: a secret does not belong in a config (it is copied into the run folder); "
                "use the service's login or an environment variable"
            )
        elif isinstance(value, str) and SECRET_VALUE.search(value):
            problems.append(f"{where}: this looks like a secret key; use the service's login instead")
        elif isinstance(value, str) and any(secret in value for secret in secrets):
            problems.append(
                f"{where}: this is a secret in the environment; leave it out, services read it from there"
            )
    if problems:
        raise UserError(*problems)
    _References(tree).check()


def check_defaults(page: Tree, shown: str) -> None:
    """Refuse references in a page's defaults list: Hydra would resolve them, secrets of the environment
    included, and name the result in its messages."""
    listed = page.get("defaults")
    pairs = list(walk(listed))
    texts = [listed, *(key for _, key, _ in pairs), *(value for _, _, value in pairs)]
    if any(isinstance(text, str) and "${" in text for text in texts):
        raise UserError(f"{shown}: a defaults list names pages; references such as ${{…}} are refused in it")


def walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every (path, last key, value) below a container, list items under their index."""
    pairs: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, dict):
        pairs = ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, list):
        pairs = ((str(i), inner) for i, inner in enumerate(value))
    for key, inner in pairs:
        yield (*path, key), key, inner
        yield from walk(inner, (*path, key))


class _References:
    """Follows every ${…} once, adding up what it would grow to."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.sizes: dict[tuple[str, ...], int] = {}
        self.open: list[tuple[str, ...]] = []

    def check(self) -> None:
        self.size((), self.tree)

    def size(self, path: tuple[str, ...], value: Any) -> int:
        if path in self.sizes:
            return self.sizes[path]
        if path in self.open:
            ring = " -> ".join(".".join(p) for p in [*self.open[self.open.index(path) :], path])
            raise UserError(f"{'.'.join(path)}: refers to itself ({ring})")
        self.open.append(path)
        if isinstance(value, dict):
            total = 1 + sum(self.size((*path, str(k)), v) for k, v in value.items())
        elif isinstance(value, list):
            total = 1 + sum(self.size((*path, str(i)), v) for i, v in enumerate(value))
        else:
            total = self.text(path, value) if isinstance(value, str) and "${" in value else 1
        self.open.pop()
        if total > MAX_EXPANDED:
            raise UserError(f"{'.'.join(path) or 'config'}: its references ${{…}} grow too large")
        self.sizes[path] = total
        return total

    def text(self, path: tuple[str, ...], value: str) -> int:
        where = ".".join(path)
        found = _REFERENCE.findall(value)
        if len(found) != value.count("${"):
            raise UserError(
                f"{where} = {value!r}: expected references like ${{model.d_model}}, not nested ones"
            )
        return len(value) + sum(self.target(path, inner.strip()) for inner in found)

    def target(self, path: tuple[str, ...], inner: str) -> int:
        where = ".".join(path)
        if ":" in inner:
            _check_resolver(where, inner)
            return 1
        dots = len(inner) - len(inner.lstrip("."))
        base = path[: len(path) - dots] if dots else ()
        if dots > len(path):
            raise UserError(f"{where}: ${{{inner}}} leads out of the config")
        steps = [step for step in re.split(r"[.\[\]]+", inner.lstrip(".")) if step]
        at: Any = self.tree
        full = (*base, *steps)
        for step in full:
            if isinstance(at, dict) and step in at:
                at = at[step]
            elif isinstance(at, list) and step.isdigit() and int(step) < len(at):
                at = at[int(step)]
            else:
                raise UserError(f"{where}: ${{{inner}}} refers to {'.'.join(full)}, which is not set")
        return self.size(tuple(full), at)


def _check_resolver(where: str, inner: str) -> None:
    resolver, argument = inner.split(":", 1)
    if resolver.strip() != "oc.env":
        raise UserError(f"{where}: ${{{inner}}} is refused; expected a key of the config, or oc.env:HOME")
    name = argument.split(",")[0].strip()
    if not ENVIRONMENT.fullmatch(name) or _SECRET_ENVIRONMENT.search(name):
        raise UserError(
            f"{where}: the environment variable {name} may not be read by a config; "
            "allowed: HOME, USER, LOGNAME, HOSTNAME, TMPDIR, SCRATCH, XDG_CACHE_HOME, XDG_DATA_HOME, SLURM_*"
        )
