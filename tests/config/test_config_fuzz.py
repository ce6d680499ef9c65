"""Pages and words made at random: a config that can be written and read again, or an error of ours."""

# Lists of pieces, as many on a line as belong together.
# ruff: noqa: E501

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from config.test_config_bad_input import GOOD
from fuzz import bounded, replaced, told, tries
from ssmtrain.config import schema_file
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, to_yaml
from ssmtrain.config.words import MAX_ARMS, parse
from ssmtrain.config.yaml_reader import MAX_NODES, parse_yaml

TREE: dict[str, Any] = yaml.safe_load(GOOD)
MIX: dict[str, Any] = copy.deepcopy(TREE) | {
    "data": {
        "kind": "mix",
        "seq_len": 128,
        "seq_len_warmup": [{"until_tokens": 4096, "seq_len": 64}],
        "sources": {"a": {"kind": "text", "train": "a.txt", "weight": 2}, "b": {"kind": "embedded"}},
        "phases": [{"from_step": 5, "weights": {"a": 1, "b": 0}}],
    },
    "checks": {"recall": {"kind": "mqar", "seq_len": 64, "vocab_size": 64, "n_pairs": 4}},
    "logger": {"kind": "wandb", "project": "p"},
}

PIECES = st.sampled_from(
    [
        *("a", "b", "model", "data", "kind", "text", "x y", "é", "🐍", "\u2028", "\ufeff", "\x85", "\x07", "\0"),
        *(": ", ":", "- ", "-", "? ", "\n", "\n  ", "\n\t", "\t", " ", "#", " # x", "\r", "\r\n"),
        *("[", "]", "{", "}", ",", "'", '"', "|", ">", "|2-\n", "\\", '"\\x', '"\\ud800"', "%YAML 1.2\n", "%"),
        *("&a ", "*a", "<<: *a", "<<: ", "!!str ", "!", "!!python/name:os.system ", "---\n", "...\n", "@", "`"),
        *("0", "010", "1_0", "0x", "0x1f", "1e3", "1e999", ".5", ".inf", "-.inf", ".nan", "12:30:00", "0o7"),
        *("-0", "+1", "9" * 50, "9" * 5000, "0x" + "f" * 300, "1e-999", "_", "0_", "true", "no", "~", "null"),
        *("${", "}", "${a}", "${model.d_model}", "${..a}", "${oc.env:HOME}", "???", "_target_", "defaults"),
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=25).map("".join)

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            *(0, 1, 2, 3, 64, 128, 1024, 0.5, 1e300, 1e-300, 10**40, "auto", "none", "x" * 300, "a\0b", "\n"),
            *("M4AM5", "(" * 900, "M" * 5000, "ratio(10,2)", "(M2)" * 50 + "9999", "²", "M²", "/dev/zero", "~"),
            *("${model.d_model}", "${data}", "${optim.lr}x", "${.kind}", "${..optim}", "${oc.env:HOME}", "???"),
            *("mamba1", "mamba2", "attention", "mlp", "moe", "mix", "text", "hub", "mqar", "parity", "file"),
            *("fsdp", "deepspeed_zero3", "muon", "wsd", "decay", "wandb", "bpe", "10:15", "9:1", "~/x", "-1"),
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["kind", "a", "b", "M", "A", "No", "_target_", "defaults"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)  # fmt: skip


def keys() -> list[str]:
    """Every key of the schema that a line may name, kinds' own keys included."""
    found: set[str] = set()

    def visit(at: Any, path: str, depth: int) -> None:
        for option in schema_file.options(schema, at):
            for key, child in option.get("properties", {}).items():
                found.add(f"{path}{key}")
                if depth < 3:
                    visit(child, f"{path}{key}.", depth + 1)

    schema = schema_file.load()
    visit(schema, "", 0)
    blocks = ("M", "M.mixer", "A.ffn", "M.mixer.d_state", "A.ffn.hidden", "M.mixer.kind")
    return sorted(found) + [f"model.blocks.{key}" for key in blocks] + ["data.sources.a.weight"]


KEYS = st.sampled_from(keys())
RAW = st.one_of(
    st.sampled_from(["1", "2", "64", "128", "0.5", "1e-3", "auto", "true", "null", "bf16", "[1,2]", "a,b"]),
    VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]),
    TEXTS,
    st.lists(
        st.sampled_from(
            [
                *("choice(", "range(", "interval(", "shuffle(", "sort(", "tag(", "int(", "glob(", ")", ",", "="),
                *("1", "0", "-1", "1e400", "nan", "inf", "0.1", "9" * 30, "a", "M", "[", "]", "{", "}", ":", "'"),
                *("start=", "step=", "1,2", "\\", " ", "${a}", "a:b", "null", "*", '"', "\\'", "M,A", "(M,A)"),
            ]
        ),
        max_size=9,
    ).map("".join),
)  # fmt: skip
WORDS = st.one_of(
    st.builds("{}={}".format, KEYS, RAW),
    st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", "@"]), KEYS, RAW),
    KEYS.map("~{}".format),
    st.builds("{}={}".format, st.sampled_from(["data", "optim", "parallel", "model", "a.b"]), RAW),
    st.text(max_size=12),
    TEXTS,
)


LARGE = [1, 2, 3, 4, 7, 64, 128, 1024, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 10**30, 10**400]
NUMBERS = [0.0, 1e-300, 1e-9, 0.1, 0.5, 0.999, 1.0, 3.7, 1e30, 1.7e308]


def fits(at: Any) -> st.SearchStrategy[Any]:
    """Values of the type that a piece of the schema asks for, small and far beyond reason."""
    schema = schema_file.load()
    at = schema_file.resolve(schema, at)
    choices = []
    for option in schema_file.options(schema, at):
        words = [option["const"]] if "const" in option else option.get("enum")
        kind = option.get("type")
        if words:
            choices.append(st.sampled_from(words))
        elif kind == "integer":
            choices.append(st.sampled_from([0, -1, *LARGE]) | st.integers(0, 40))
        elif kind == "number":
            choices.append(st.sampled_from(NUMBERS) | st.integers(0, 9))
        elif kind == "boolean":
            choices.append(st.booleans())
        elif kind == "string":
            texts = ["a", "x.txt", "10:15", "M2A", "0", "~/x", *option.get("examples", [])]
            choices.append(st.sampled_from(texts) | st.text(max_size=5))
        elif kind == "array" and "prefixItems" in option:
            choices.append(st.tuples(*map(fits, option["prefixItems"])).map(list))
        elif kind == "array":
            choices.append(st.lists(fits(option.get("items", {"type": "string"})), max_size=3))
        elif kind == "object" and isinstance(option.get("additionalProperties"), dict):
            inner = fits(option["additionalProperties"])
            choices.append(st.dictionaries(st.sampled_from(["a", "b", "M", "A"]), inner, max_size=3))
        elif kind == "object":
            choices.append(st.deferred(lambda option=option: fields(option)))
    return st.one_of(*choices, st.none()) if choices else st.none()


def fields(option: Any) -> st.SearchStrategy[Any]:
    """A mapping with what it must have and some of what it may have."""
    known = {key: fits(piece) for key, piece in option.get("properties", {}).items()}
    must = {key: known[key] for key in option.get("required", [])}
    must |= {key: known[key] for key in ("kind",) if key in known}
    some = st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True) if known else st.just([])
    return some.flatmap(lambda keys: st.fixed_dictionaries(must | {key: known[key] for key in keys}))


@cache
def groups() -> dict[str, st.SearchStrategy[Any]]:
    """What each top-level key takes."""
    found = schema_file.load()["properties"]
    return {key: fits(found[key]) for key in sorted(found) if key not in ("recipe", "origin")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loads(folder: Path, page: str | bytes, words: list[str]) -> None:
    """A page and words give a config that says all it is when it is written, or an error of ours."""
    (folder / "page.yaml").write_bytes(
        page if isinstance(page, bytes) else page.encode("utf-8", "surrogatepass")
    )
    try:
        with bounded():
            config = load(["config=page.yaml", *words])
    except UserError as error:
        told(error)
        return
    (folder / "again.yaml").write_text(to_yaml(config))
    assert load(["config=again.yaml"]) == config


@tries(200)
@given(text=TEXTS)
def test_texts_that_are_hardly_yaml(text: str) -> None:
    """Plain containers of few values, or an error that names the line."""
    try:
        with bounded():
            page = parse_yaml(text)
    except UserError as error:
        assert "config" in told(error)
        return
    left, count = [page], 0
    while left:
        value = left.pop()
        count += 1
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    assert count <= MAX_NODES


@tries(20)
@given(draw=st.data())
def test_pages_with_something_replaced(folder: Path, draw: Any) -> None:
    tree = draw.draw(st.sampled_from([TREE, TREE, MIX]))
    for _ in range(draw.draw(st.integers(1, 3))):
        key = draw.draw(st.sampled_from(sorted(tree)))
        tree = {**tree, key: replaced(tree[key], draw, VALUES)}
    loads(folder, yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), [])


@tries(20)
@given(draw=st.data())
def test_pages_of_the_right_types(folder: Path, draw: Any) -> None:
    """Every value is of a type that its key takes: what is left to refuse is what they mean together."""
    tree = copy.deepcopy(draw.draw(st.sampled_from([TREE, TREE, MIX])))
    for key in draw.draw(st.lists(st.sampled_from(sorted(groups())), min_size=1, max_size=2, unique=True)):
        value, before = draw.draw(groups()[key]), tree.get(key)
        keep = isinstance(value, dict) and isinstance(before, dict) and draw.draw(st.integers(0, 3))
        if keep and value.get("kind", "") in ("", before.get("kind", "")):
            value = {**before, **{name: inner for name, inner in value.items() if inner is not None}}
        tree[key] = value
    loads(folder, yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), [])


@tries(15)
@given(at=st.integers(0, len(GOOD)), length=st.integers(0, 12), text=TEXTS, tail=st.binary(max_size=3))
def test_pages_with_a_piece_overwritten(folder: Path, at: int, length: int, text: str, tail: bytes) -> None:
    page = GOOD[:at] + text + GOOD[at + length :]
    loads(folder, page.encode("utf-8", "surrogatepass") + tail, [])


@tries(20)
@given(words=st.lists(WORDS, min_size=1, max_size=3))
def test_words_on_a_line(folder: Path, words: list[str]) -> None:
    loads(folder, GOOD, [word for word in words if not word.lstrip("+").startswith("config=")])


@tries(150)
@given(words=st.lists(WORDS, min_size=1, max_size=2))
def test_words_of_a_multirun(words: list[str]) -> None:
    """Words, some with values of a sweep, or an error that names the word."""
    try:
        with bounded():
            found = parse(words, sweep=True)
    except UserError as error:
        told(error)
        return
    assert len(found) == len(words)
    for word in found:
        assert len(word.choices) <= MAX_ARMS or "range" not in word.text
        for text, _ in word.choices:
            assert len(parse([f"{word.key}={text}"])) == 1, word
