"""`ssmtrain help`: verbs, kinds and keys, explained from the generated schema (no torch, no Hydra)."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ssmtrain.config import schema_file
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.expect import SPELLINGS, describe, show_value
from ssmtrain.config.schema_file import Schema, options, resolve
from ssmtrain.verbs import VERBS

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

WIDTH = 100


def command(request: Request) -> int:
    """Print the help of a verb, a kind (mamba2) or a key (optim.lr); without words, the overview."""
    topic = " ".join(request.overrides)
    if request.as_json:
        print(json.dumps(schema_file.load() if not topic else _found(topic), indent=1, ensure_ascii=False))
        return FINISHED
    print("\n".join(page(topic)))
    return FINISHED


def page(topic: str) -> list[str]:
    """The help page of a topic as lines; UserError with the nearest topics."""
    if not topic:
        return _overview()
    if topic in VERBS:
        return _verb(topic)
    family = [name for name in VERBS if name.startswith(f"{topic} ")]
    if family:
        return [line for name in family for line in (*_verb(name), "")][:-1]
    found = _found(topic)
    lines: list[str] = []
    for where, piece in found.items():
        lines += [*_page(where, piece), ""]
    return lines[:-1]


def _overview() -> list[str]:
    width = max(map(len, VERBS))
    lines = ["usage: ssmtrain <verb> config=<recipe or page> key=value …", ""]
    lines += [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    lines += [
        "",
        "Start with: ssmtrain fit config=quickstart",
        "`ssmtrain help fit`, `help mamba2` (a kind) and `help optim.lr` (a key) say more.",
        "",
        "keys:",
    ]
    schema = schema_file.load()
    for name, piece in schema.get("properties", {}).items():
        if name != "defaults":
            lines.append(f"  {name.ljust(width)}  {_about(schema, piece)}")
    kinds = ", ".join(sorted({kind for kind, _ in _kinds(schema)}))
    return [*lines, "", *textwrap.wrap(f"kinds: {kinds}", WIDTH, subsequent_indent="  ")]


def _verb(name: str) -> list[str]:
    verb = VERBS[name]
    takes = {
        "config": "config=<recipe or page> key=value …",
        "config or run": "run=<name or folder> | config=<recipe or page>  key=value …",
        "run": "run=<name or folder>",
        "words": {
            "average": "<checkpoint> <checkpoint> …",
            "config diff": "<one> <other>",
            "completion": "bash|zsh",
            "doctor": "[config=<recipe> | run=<run>]",
        }.get(name, "[verb, kind or key]"),
    }.get(verb.takes, "")
    lines = [f"usage: ssmtrain {name} {takes}".rstrip(), "", f"  {verb.summary}"]
    for flag, text in verb.flags.items():
        shown = f"--{flag} {text[1:].split()[0]}" if text.startswith("=") else f"--{flag}"
        lines.append(f"  {shown.ljust(18)} {text.split(' ', 1)[1] if text.startswith('=') else text}")
    for word, text in verb.words.items():
        lines.append(f"  {(word + text.split()[0]).ljust(18)} {text.split(' ', 1)[1]}")
    if verb.example:
        lines += ["", f"  {verb.example}"]
    if verb.takes.startswith("config"):
        lines += ["", "`ssmtrain config list` names the recipes, `ssmtrain help` the keys."]
    return lines


def _about(schema: Schema, piece: Schema) -> str:
    text = piece.get("description") or resolve(schema, piece).get("description", "")
    return str(text).split("\n")[0]


def _kinds(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every kind with its definitions; what it is as a source of a mixture comes before its own page."""
    definitions = schema.get("$defs", {})
    for name in sorted(definitions, key=lambda name: not name.endswith("Source")):
        definition = definitions[name]
        kind = definition.get("properties", {}).get("kind", {})
        if "const" in kind:
            yield kind["const"], definition


def _found(topic: str) -> dict[str, Schema]:
    """What a topic names: places in the config, or kinds, each with its piece of the schema."""
    schema = schema_file.load()
    by_kind = {kind: definition for kind, definition in _kinds(schema) if kind == topic}
    if by_kind:
        return by_kind
    path, _, tail = topic.partition(".")
    for kind, definition in _kinds(schema):
        if kind == path and tail in definition["properties"]:
            return {topic: definition["properties"][tail]}
    found: dict[str, Schema] = {}
    for where, piece in _keys(schema):
        if where == topic or where.endswith(f".{topic}"):
            found[where] = _joined(found[where], piece) if where in found else piece
    if found:
        return {topic: found[topic]} if topic in found else found
    names = {where for where, _ in _keys(schema)} | {kind for kind, _ in _kinds(schema)}
    leaves = {name.rpartition(".")[2] for name in names}
    near = difflib.get_close_matches(topic, [*names, *leaves], 3, 0.6)
    near = [SPELLINGS[topic]] if topic in SPELLINGS else near
    hint = f"did you mean {' or '.join(near)}?" if near else "`ssmtrain help` lists the keys and kinds"
    raise UserError(f"there is no verb, kind or key called {topic!r}; {hint}")


def _joined(first: Schema, second: Schema) -> Schema:
    """One piece for a key that several kinds have: their kinds named, unless they say the same."""
    same = {k: v for k, v in first.items() if k != "x-kind"} == {
        k: v for k, v in second.items() if k != "x-kind"
    }
    if same:
        return {**first, "x-kind": f"{first.get('x-kind')}, {second.get('x-kind')}"}
    return {**first, "x-others": [*first.get("x-others", []), second]}


def _keys(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every key of the config by dotted path; blocks under <name>, a union's fields under each kind once."""

    def visit(at: Schema, path: str) -> Iterator[tuple[str, Schema]]:
        for option in options(schema, at):
            kind = option.get("properties", {}).get("kind", {}).get("const")
            for key, child in option.get("properties", {}).items():
                if key in ("kind", "defaults"):
                    continue
                where = f"{path}.{key}" if path else key
                yield where, {**child, "x-kind": kind} if kind else child
                yield from visit(child, where)
            if isinstance(option.get("additionalProperties"), dict):
                yield from visit(option["additionalProperties"], f"{path}.<name>")

    yield from visit(schema, "")


def _page(where: str, piece: Schema) -> list[str]:
    schema = schema_file.load()
    at = resolve(schema, piece)
    union = next((one for one in [at, *at.get("anyOf", [])] if "discriminator" in one), None)
    if union is not None:
        lines = [f"{where}: {_about(schema, piece)}", "  kinds:"]
        for kind, ref in union["discriminator"]["mapping"].items():
            lines.append(f"    {kind.ljust(12)} {_about(schema, {'$ref': ref})}")
        return [*lines, f"  `ssmtrain help <kind>` lists a kind's fields; choose one with {where}.kind=…"]
    if isinstance(at.get("additionalProperties"), dict):
        return [
            *_field(schema, where, piece, True, indent=""),
            "",
            *_page("each", at["additionalProperties"]),
        ]
    inside = [one for one in options(schema, at) if "properties" in one]
    at = inside[0] if len(inside) == 1 else at
    if "properties" in at:
        lines = [f"{where}: {_about(schema, piece)}", ""]
        for name, child in at["properties"].items():
            if name != "kind" or "const" not in child:
                lines += _field(schema, name, child, name in at.get("required", []))
        return lines
    lines = []
    for one in (piece, *piece.get("x-others", [])):
        lines += _field(schema, where, one, "default" not in one, indent="")
    return lines


def _field(schema: Schema, name: str, piece: Schema, required: bool, indent: str = "  ") -> list[str]:
    default = "required" if required else f"default {_default(piece.get('default'))}"
    kind = f" ({piece['x-kind']})" if piece.get("x-kind") else ""
    head = textwrap.wrap(
        f"{name}{kind}: {describe(schema, piece)}; {default}",
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
    )
    about = _about(schema, piece)
    return head + textwrap.wrap(
        about, WIDTH, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "
    )


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return value["kind"] if set(value) >= {"kind"} else "as below"
    if isinstance(value, list):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return show_value(value)
