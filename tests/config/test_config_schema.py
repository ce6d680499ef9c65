"""The generated schema, the quick check made from it, and the models: three that must agree."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from pydantic import ValidationError

from ssmtrain.config import checks, schema_file
from ssmtrain.config.expect import problems
from ssmtrain.config.load import load
from ssmtrain.config.schema import RunConfig, dump
from ssmtrain.layers import ffn_kinds, mixer_kinds

TREE: dict[str, Any] = {
    "name": "x",
    "seed": 1,
    "model": {
        "d_model": 64,
        "layout": "M4AM5",
        "n_layers": None,
        "blocks": {
            "M": {
                "mixer": {"kind": "mamba2", "d_state": 16, "dt_limit": [0.0, None], "A_range": [1.0, 16.0]}
            },
            "A": {"mixer": {"kind": "attention", "n_heads": 4}, "ffn": {"kind": "mlp", "hidden": 8}},
            "E": {"ffn": {"kind": "moe", "n_experts": 4, "top_k": 2, "hidden": 8}, "norm": "post"},
        },
        "multipliers": {"embedding": 12},
    },
    "data": {"kind": "text", "train": ["a", "b"], "seq_len": 8},
    "tokenizer": {"kind": "file", "path": "t.json"},
    "optim": {"kind": "adamw", "lr": 0.1, "betas": [0.9, 0.95], "clip": None},
    "schedule": {"kind": "wsd", "warmup": 0.1, "decay": 5},
    "trainer": {"max_steps": 3, "max_seconds": 1.5, "compile": True},
    "logger": {"kind": "wandb", "mode": "offline"},
    "generate": {"temperature": 0, "top_p": 1.0},
}

VALUES = [
    None, True, False, 0, 1, -1, 2**64, 0.5, 1.0, -0.5, float("nan"), float("inf"), "", "x", "adamw", "mlp",
    "5", "mamba2", "bf16", [], [1], [0.5, 0.5], [1, 2, 3], ["a"], [None], {}, {"kind": "mlp"}, {"a": 1},
]  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(tree, dict):
        return found + [p for key, value in tree.items() for p in places(value, (*path, key))]
    if isinstance(tree, list):
        return found + [p for i, value in enumerate(tree) for p in places(value, (*path, i))]
    return found


def mutated(rng: random.Random) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    for _ in range(rng.choice([1, 1, 1, 2])):
        path = rng.choice(places(tree))
        at = tree
        for key in path[:-1]:
            at = at[key]
        action = rng.random()
        if action < 0.15:
            del at[path[-1]]
        elif action < 0.25 and isinstance(at, dict):
            at[rng.choice(["kind", "lr", "hidden", "nonsense", "norm"])] = rng.choice(VALUES)
        else:
            at[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return tree


def accepted(tree: dict[str, Any]) -> bool:
    try:
        RunConfig.model_validate(tree)
    except ValidationError:
        return False
    return True


def test_the_tree_is_right() -> None:
    assert accepted(TREE) and problems(schema_file.build(), TREE) == []


def test_the_quick_check_agrees_with_the_models() -> None:
    schema, rng = schema_file.build(), random.Random(0)
    counts = [0, 0]
    for _ in range(2500):
        tree = mutated(rng)
        if places(tree) == []:
            continue
        good = accepted(tree)
        counts[good] += 1
        lines = problems(schema, tree)
        assert bool(lines) != good, (lines, tree)
        assert all("\n" not in line for line in lines)
    assert min(counts) > 200


def test_the_file_is_up_to_date() -> None:
    fresh = schema_file.FILE.read_text(encoding="utf-8") == schema_file.text()
    assert fresh, "src/ssmtrain/config/schema.json is stale: make schema"
    assert schema_file.is_fresh()


def test_a_change_of_a_field_makes_the_file_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    package = tmp_path / "ssmtrain"
    for file in [
        *(schema_file.FILE.parent.parent / "layers").glob("*.py"),
        *schema_file.FILE.parent.glob("*.py"),
    ]:
        copied = package / file.parent.name / file.name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(schema_file, "FILE", package / "config" / "schema.json")
    before = schema_file.digest()
    mamba2 = package / "layers" / "mamba2.py"
    text = mamba2.read_text(encoding="utf-8")
    mamba2.write_text(text.replace("def build(", "def build_it("), encoding="utf-8")
    assert schema_file.digest() == before
    mamba2.write_text(text.replace("d_state: Positive = 128", "d_state: Positive = 64"), encoding="utf-8")
    assert schema_file.digest() != before


def test_every_kind_and_key_is_described() -> None:
    schema = schema_file.build()
    for name, definition in schema["$defs"].items():
        assert definition.get("description"), name
        for key, piece in definition.get("properties", {}).items():
            described = piece.get("description") or "$ref" in piece or key == "kind"
            assert described, f"{name}.{key} has no docstring"
    for key, piece in schema["properties"].items():
        assert piece.get("description") or "$ref" in piece, key
    kinds = {**mixer_kinds(), **ffn_kinds()}
    assert set(kinds) <= {
        piece["properties"]["kind"].get("const")
        for piece in schema["$defs"].values()
        if "kind" in piece["properties"]
    }


@pytest.mark.parametrize("recipe", ["quickstart", "jamba_mini", "granite4_h_tiny", "samba_421m"])
def test_defaults_are_filled_as_the_models_fill_them(recipe: str) -> None:
    config = load([f"config={recipe}", "optim=muon", "schedule=power"])
    full = dump(config)
    sparse = without_defaults(full, full)
    assert len(str(sparse)) < len(str(full)) / 2
    assert schema_file.filled(sparse) == dump(RunConfig.model_validate(sparse)) == full
    namespace = checks.as_namespace(schema_file.filled(sparse))
    assert checks.problems(namespace) == checks.problems(config) == []


def without_defaults(tree: Any, page: Any, at: tuple[str, ...] = ()) -> Any:
    """The tree without what equals its default."""
    if not isinstance(tree, dict):
        return tree
    result = {}
    for key, value in tree.items():
        piece = schema_file.piece((*at, key), page)
        if key == "kind" or not piece or "default" not in piece or piece["default"] != value:
            result[key] = without_defaults(value, page, (*at, key))
    return result


def test_shared_fields_are_those_of_the_slot() -> None:
    schema = schema_file.build()
    assert schema["properties"]["schedule"]["x-shared"] == ["unit", "warmup"]
    assert schema["properties"]["data"]["x-shared"] == ["seq_len"]
    assert schema["properties"]["optim"]["x-shared"] == []
