"""What a schema expects of a tree, a line per problem: path, value, what would be right, nearest name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from ssmtrain.config.schema_file import Schema, options, resolve

SPELLINGS = {
    "learning_rate": "optim.lr",
    "batch_size": "trainer.global_batch",
    "steps": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "time_limit": "trainer.max_seconds",
    "max_time": "trainer.max_seconds",
    "hidden_size": "model.d_model",
    "num_layers": "model.n_layers",
    "num_hidden_layers": "model.n_layers",
    "pattern": "model.layout",
    "hybrid_override_pattern": "model.layout",
    "context_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "headdim": "head_dim",
    "state_size": "d_state",
    "num_heads": "n_heads",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden",
    "num_experts": "n_experts",
    "num_experts_per_tok": "top_k",
    "conv_kernel": "d_conv",
    "ngroups": "n_groups",
    "strategy": "parallel.kind",
    "pattern_string": "model.layout",
    "save_interval": "trainer.save_every",
    "grad_clip": "optim.clip",
    "gradient_clip_val": "optim.clip",
    "dtype": "trainer.precision",
    "num_nodes": "launch.nodes",
    "nnodes": "launch.nodes",
    "walltime": "launch.time",
}
"""Other projects' names for our keys."""

Path = tuple[str, ...]


def problems(schema: Schema, tree: Any) -> list[str]:
    """Every way in which the tree is not what the schema expects, a line each."""
    return list(_check(schema, schema, tree, ()))


def show_path(path: Path) -> str:
    """A path as it is typed; list items in brackets."""
    text = ""
    for part in path:
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text


def show_value(value: Any) -> str:
    """A value, shortened, as a page would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _check(schema: Schema, at: Schema, value: Any, path: Path) -> Iterator[str]:
    at = resolve(schema, at)
    choices = options(schema, at)
    if value is None and any(option.get("type") == "null" for option in choices):
        return
    union = _union(at)
    if union is not None and isinstance(value, dict):
        mapping = union["discriminator"]["mapping"]
        kind = value.get("kind")
        if kind not in mapping if isinstance(kind, str) else True:
            yield _kind_line(path, value, list(mapping))
            return
        yield from _fields(schema, resolve(schema, {"$ref": mapping[kind]}), value, path, mapping)
        return
    shapes = [option for option in choices if option.get("type") == "object"]
    if shapes and isinstance(value, dict):
        yield from _fields(schema, shapes[0], value, path)
        return
    arrays = [option for option in choices if option.get("type") == "array"]
    if arrays and isinstance(value, list) and _length_fits(arrays[0], value):
        for index, item in enumerate(value):
            yield from _check(schema, _item(arrays[0], index), item, (*path, str(index)))
        return
    if not any(_fits(option, value) for option in choices):
        yield _value_line(schema, at, value, path)


def _union(at: Schema) -> Schema | None:
    return next((one for one in [at, *at.get("anyOf", [])] if "discriminator" in one), None)


def _fields(
    schema: Schema, shape: Schema, value: dict[str, Any], path: Path, kinds: dict[str, str] | None = None
) -> Iterator[str]:
    properties = shape.get("properties", {})
    extra = shape.get("additionalProperties", False)
    for key, inner in value.items():
        if key in properties:
            yield from _check(schema, properties[key], inner, (*path, key))
        elif isinstance(extra, dict):
            yield from _check(schema, extra, inner, (*path, key))
        else:
            others = _kinds_with(schema, key, kinds or {})
            yield _unknown_line(schema, list(properties), key, inner, path, value.get("kind"), others)
    for key in shape.get("required", []):
        if key not in value:
            about = properties[key].get("description", "").rstrip(".")
            wanted = describe(schema, properties[key])
            yield f"{show_path((*path, key))} is missing: expected {wanted}" + (
                f" ({about})" if about else ""
            )


def _kinds_with(schema: Schema, key: str, kinds: dict[str, str]) -> list[str]:
    return [
        kind for kind, ref in kinds.items() if key in resolve(schema, {"$ref": ref}).get("properties", {})
    ]


def _unknown_line(
    schema: Schema, names: list[str], key: str, value: Any, path: Path, kind: Any, others: list[str]
) -> str:
    where = show_path((*path, key))
    of = f" of {kind}" if isinstance(kind, str) else ""
    line = f"{where} = {show_value(value)}: there is no such key{of}"
    if others:
        return f"{line}; it is a key of {' and '.join(others)}"
    near = nearest(schema, names, key, path)
    if near:
        return f"{line}; did you mean {near}?"
    known = ", ".join(name for name in names if name not in ("kind", "defaults"))
    return f"{line}; expected one of: {known}" if names and len(known) < 400 else line


def nearest(schema: Schema, names: list[str], key: str, path: Path) -> str | None:
    """The legal name that was probably meant, with its path when it stands elsewhere."""
    close = difflib.get_close_matches(key, names, 1, 0.6)
    if close:
        return f"`{close[0]}`"
    spelling = difflib.get_close_matches(key.lower(), SPELLINGS, 1, 0.8)
    if spelling and SPELLINGS[spelling[0]] != show_path((*path, key)):
        return f"`{SPELLINGS[spelling[0]]}`"
    for name, child in schema.get("properties", {}).items():
        if any(key in option.get("properties", {}) for option in options(schema, child)):
            return f"`{name}.{key}`"
    return None


def _kind_line(path: Path, value: dict[str, Any], kinds: list[str]) -> str:
    where, known = show_path((*path, "kind")), ", ".join(kinds)
    if "kind" not in value:
        return f"{where} is missing: expected one of {known}"
    kind = value["kind"]
    near = difflib.get_close_matches(str(kind), kinds, 1, 0.6)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{where} = {show_value(kind)}: expected one of {known}{hint}"


def _value_line(schema: Schema, at: Schema, value: Any, path: Path) -> str:
    line = f"{show_path(path) or 'config'} = {show_value(value)}: expected {describe(schema, at)}"
    return line + _hint(schema, at, value)


def _hint(schema: Schema, at: Schema, value: Any) -> str:
    choices = options(schema, at)
    types = {option.get("type") for option in choices}
    words = [word for option in choices for word in _words(option) if isinstance(word, str)]
    if isinstance(value, str):
        near = difflib.get_close_matches(value, words, 1, 0.6)
        if near:
            return f"; did you mean {near[0]}?"
        if "boolean" in types and value.lower() in ("yes", "no", "on", "off"):
            return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
        if types & {"number", "integer"}:
            if re.fullmatch(r"\d+(:\d\d)+", value):
                return "; write seconds"
            if re.fullmatch(r"0[0-7]+", value):
                return f"; write {value.lstrip('0')} (a leading 0 reads as octal)"
            try:
                number = float(value)
            except ValueError:
                return ""
            return "; write it without quotes" if math.isfinite(number) else ""
    if isinstance(value, float) and "integer" in types and math.isfinite(value) and value == int(value):
        return f"; write {int(value)}"
    if "string" in types and not words and isinstance(value, int | float):
        return "; put it in quotes"
    if _union(resolve(schema, at)) is None and {"object"} == types - {"null"}:
        return " with keys of its own"
    return ""


def _words(option: Schema) -> list[Any]:
    return [option["const"]] if "const" in option else list(option.get("enum", []))


def _fits(option: Schema, value: Any) -> bool:
    words = _words(option)
    if words:
        return any(value == word and type(value) is type(word) for word in words)
    kind = option.get("type")
    if kind is None:
        return True
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str) and (
            "pattern" not in option or re.search(option["pattern"], value) is not None
        )
    if kind in ("integer", "number"):
        good = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
        return good and math.isfinite(value) and _in_range(option, value)
    return False


def _in_range(option: Schema, value: float) -> bool:
    return (
        value > option.get("exclusiveMinimum", -math.inf)
        and value >= option.get("minimum", -math.inf)
        and value < option.get("exclusiveMaximum", math.inf)
        and value <= option.get("maximum", math.inf)
    )


def _length_fits(option: Schema, value: list[Any]) -> bool:
    return option.get("minItems", 0) <= len(value) <= option.get("maxItems", math.inf)


def _item(option: Schema, index: int) -> Schema:
    fixed = option.get("prefixItems", [])
    return dict(fixed[index]) if index < len(fixed) else dict(option.get("items", {}))


def describe(schema: Schema, at: Schema) -> str:
    """What a piece of the schema expects, in words: "a whole number above 0, or null"."""
    parts: list[str] = []
    union = _union(resolve(schema, at))
    for option in options(schema, at):
        text = _describe_one(schema, option)
        if union is not None and option.get("type") == "object":
            text = f"a mapping whose kind is one of {', '.join(union['discriminator']['mapping'])}"
        if text not in parts:
            parts.append(text)
    return " or ".join(parts)


def _describe_one(schema: Schema, option: Schema) -> str:
    words = _words(option)
    if words:
        return ("one of " if len(words) > 1 else "") + ", ".join(str(word) for word in words)
    kind = option.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(option)
    if kind == "array":
        if "prefixItems" in option:
            inner = ", ".join(describe(schema, item) for item in option["prefixItems"])
            return f"a list of {len(option['prefixItems'])}: [{inner}]"
        return f"a list, each {describe(schema, option['items'])}" if option.get("items") else "a list"
    if kind == "string" and option.get("examples"):
        return f"text such as {option['examples'][0]}"
    names = {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}
    return names.get(str(kind), "a value")


def _range(option: Schema) -> str:
    low, least = option.get("exclusiveMinimum"), option.get("minimum")
    high, most = option.get("exclusiveMaximum"), option.get("maximum")
    parts = []
    if low is not None:
        parts.append(f"above {_number(low)}")
    if least is not None:
        parts.append(f"at least {_number(least)}")
    if high is not None:
        parts.append(f"below {_number(high)}")
    if most is not None:
        parts.append(f"at most {_number(most)}")
    return f" {' and '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    if value == 2**63:
        return "2^63"
    return str(int(value)) if float(value).is_integer() else str(value)
