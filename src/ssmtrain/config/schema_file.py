"""The generated schema.json: what --help, completion and quick checks read without importing torch.

It is the JSON schema of RunConfig, for editors too, with two additions: `x-shared` on a union of kinds lists
the fields that all its kinds have from a common base; `x-sources` is a digest of the source it was made from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

_FIELDS = re.compile(r"^class .*?(?=^    def |^    @|^\S|\Z)|^[A-Z]\w* = .*?$", re.MULTILINE | re.DOTALL)

FILE = Path(__file__).with_name("schema.json")
PAGES = (
    "schema", "model", "data", "tasks", "optim", "schedule", "ema", "trainer", "parallel", "launch", "logger",
    "origin",
)  # fmt: skip
"""The modules beside the layers that the schema is made from."""


@cache
def load() -> Schema:
    """The schema as generated; an empty one when the file is not there yet."""
    try:
        schema = json.loads(FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return dict(schema)


def digest() -> str:
    """Hex digest of the source that the schema is made from: classes up to their first method, aliases."""
    package = FILE.parent.parent
    files = [
        *sorted((package / "layers").glob("*.py")),
        FILE.with_name("base.py"),
        *(FILE.with_name(f"{name}.py") for name in PAGES),
    ]
    summed = hashlib.sha256()
    for file in files:
        for part in _FIELDS.findall(file.read_text(encoding="utf-8")):
            summed.update(f"{file.name}\0{part.strip()}\0".encode())
    return summed.hexdigest()


def is_fresh() -> bool:
    """Whether the file describes the code as it stands."""
    return load().get("x-sources") == digest()


def build() -> Schema:
    """Make the schema from the models (imports torch)."""
    from ssmtrain.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    _add_shared(schema)
    schema = _without_titles(schema)
    # A page may lean on others and leave the rest to them.
    schema["properties"]["defaults"] = {
        "description": "Pages this one extends, in order; _self_ stands for this page.",
        "type": "array",
        "items": {},
    }
    schema["x-sources"] = digest()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ssmtrain page", **schema}


def text() -> str:
    """The file's content as it should be."""
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


def _without_titles(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if isinstance(value, dict):
        return {k: _without_titles(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
    return value


def _add_shared(schema: Schema) -> None:
    from ssmtrain.config.base import Config

    classes: dict[str, type[Config]] = {}
    todo = list(Config.__subclasses__())
    while todo:
        one = todo.pop()
        classes[one.__name__] = one
        todo += one.__subclasses__()
    for union in _unions(schema):
        members = [classes[ref.rpartition("/")[2]] for ref in union["discriminator"]["mapping"].values()]
        common = set.intersection(*(set(member.__mro__) for member in members))
        bases = [base for base in common if issubclass(base, Config)]
        union["x-shared"] = sorted({name for base in bases for name in base.model_fields})


def _unions(value: Any) -> list[Schema]:
    found: list[Schema] = []
    if isinstance(value, dict):
        if isinstance(value.get("discriminator"), dict):
            found.append(value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            found += _unions(item)
    return found


def piece(path: tuple[str, ...], kinds: Any = None, schema: Schema | None = None) -> Schema | None:
    """The part of the schema at a path, or None; `kinds` is the tree whose `kind` keys choose in unions."""
    schema = load() if schema is None else schema
    at: Schema | None = schema
    for key in path:
        if at is None:
            return None
        at = _child(schema, at, key, kinds)
        kinds = kinds.get(key) if isinstance(kinds, dict) else None
    return at


def _child(schema: Schema, at: Schema, key: str, node: Any) -> Schema | None:
    for option in options(schema, at, node):
        properties = option.get("properties", {})
        if key in properties:
            return dict(properties[key])
        if isinstance(option.get("additionalProperties"), dict):
            return dict(option["additionalProperties"])
    return None


def options(schema: Schema, at: Schema, node: Any = None) -> list[Schema]:
    """What a piece may be, references followed; the kind that `node` names, if it does, else all kinds."""
    at = resolve(schema, at)
    if "discriminator" in at:
        mapping = at["discriminator"]["mapping"]
        kind = node.get("kind") if isinstance(node, dict) else None
        chosen = [mapping[kind]] if isinstance(kind, str) and kind in mapping else list(mapping.values())
        return [resolve(schema, {"$ref": ref}) for ref in chosen]
    if "anyOf" in at:
        return [option for one in at["anyOf"] for option in options(schema, one, node)]
    return [at]


def resolve(schema: Schema, at: Schema) -> Schema:
    """Follow a $ref, keeping what stands beside it."""
    if "$ref" not in at:
        return at
    target = schema["$defs"][at["$ref"].rpartition("/")[2]]
    return {**target, **{k: v for k, v in at.items() if k != "$ref"}}


def filled(tree: Any, at: Schema | None = None) -> Any:
    """A tree of the right shape with every default written out, as the typed config would be dumped."""
    schema = load()
    if isinstance(tree, list):
        lists = [one["items"] for one in options(schema, at or schema) if one.get("items")]
        return [filled(item, lists[0]) for item in tree] if lists else tree
    if not isinstance(tree, dict):
        return tree
    shapes = [one for one in options(schema, at or schema, tree) if one.get("type") == "object"]
    shape = shapes[0] if shapes else {}
    result = dict(tree)
    for key, piece in shape.get("properties", {}).items():
        if key in tree:
            result[key] = filled(tree[key], piece)
        elif "default" in piece:
            result[key] = copy.deepcopy(piece["default"])
    if isinstance(shape.get("additionalProperties"), dict):
        result = {key: filled(value, shape["additionalProperties"]) for key, value in tree.items()}
    return result


def union_at(path: tuple[str, ...]) -> Schema | None:
    """The union of kinds at a path, if there is one."""
    at = piece(path)
    found = [at, *at.get("anyOf", [])] if at else []
    return next((one for one in found if "discriminator" in one), None)


def default_kind(path: tuple[str, ...]) -> str | None:
    """The kind of a slot that the page leaves open."""
    at = piece(path)
    default = at.get("default") if at else None
    return default.get("kind") if isinstance(default, dict) else None


def shared_fields(path: tuple[str, ...]) -> list[str]:
    """The fields that stay when the kind of this slot changes; all, where the slot is no union."""
    union = union_at(path)
    if union is not None:
        return list(union.get("x-shared", []))
    names: list[str] = []
    for option in options(load(), piece(path) or {}):
        names += option.get("properties", {})
    return names


@cache
def text_keys() -> frozenset[str]:
    """The keys whose value is text and never a number."""
    schema = load()
    found: set[str] = set()

    def visit(at: Schema, path: str) -> None:
        kinds = options(schema, at)
        types = {option.get("type") for option in kinds}
        if "string" in types and not types & {"integer", "number"}:
            found.add(path)
        for option in kinds:
            for key, child in option.get("properties", {}).items():
                visit(child, f"{path}.{key}" if path else key)

    if schema:
        visit(schema, "")
    return frozenset(found)
