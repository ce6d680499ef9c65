"""What may import what: the rooms, and the packages that are heavy or optional."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "ssmtrain"

BELOW_MODEL = {"config", "layers", "kernels"}
BELOW_TRAIN = BELOW_MODEL | {"model", "data", "parallel", "checkpoint", "generate", "eval"}
SEEN_FROM_OUTSIDE = {
    *("checkpoint.lock", "checkpoint.names", "checkpoint.best", "checkpoint.records", "checkpoint.durable"),
    *("train.attempts", "train.callbacks.words"),
}
"""What reads a run's folder without torch."""

LAW: dict[str, set[str]] = {
    "config.base": set(),
    "config.errors": set(),
    "config.layout": set(),
    "config.request": set(),
    "config.model": {"config", "layers"},
    "config.schema": {"config", "layers"},
    "config": {"config", "verbs"},
    "verbs": set(),
    "kernels": set(),
    "layers": {"kernels", "config.base"},
    "model": BELOW_MODEL,
    "digest": set(),
    "data": {"config", "digest"},
    "parallel": BELOW_MODEL | {"model"},
    "checkpoint": BELOW_MODEL | {"model", "digest"},
    "generate": BELOW_MODEL | {"model", "checkpoint", "data"},
    "eval": BELOW_MODEL | {"model", "checkpoint", "data"},
    "runs": {"config", *SEEN_FROM_OUTSIDE},
    "report": {"config", "runs", "model", "data", *SEEN_FROM_OUTSIDE},
    "report.plot": {"config.errors"},
    "train": BELOW_TRAIN | {"report.plot"},
    "check": BELOW_TRAIN | {"train"},
    "explain": BELOW_TRAIN | {"train"},
    "sweep": {"config"},
    "launch": {"config"},
    "doctor": {"config", "kernels", "needs"},
    "needs": {"config", "model", "data", "checkpoint"},
    "cli": BELOW_TRAIN
    | {"train", "check", "explain", "sweep", "launch", "doctor", "runs", "report", "verbs"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""A room (or the closest named part of one) and what of ours it may import besides itself."""

ROOMS_OF_PACKAGES: dict[str, set[str]] = {
    "lightning": {"train", "parallel"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "pydantic": {"config", "layers", "data"},
    "triton": {"kernels"},
    "packaging": {"doctor"},
    "numpy": {"data", "train", "checkpoint", "explain"},
    "torch": BELOW_TRAIN - {"config"} | {"train", "check", "explain", "doctor"},
}

ONE_FILE = {
    "datasets", "deepspeed", "huggingface_hub", "lightning_utilities", "lm_eval", "matplotlib", "peft",
    "pyarrow", "safetensors", "submitit", "tensorboard", "tokenizers", "transformers", "wandb", "zstandard",
}  # fmt: skip

EVERYWHERE = {"yaml", "rich"}

AT_CALL_ONLY = {
    "cli.py": {"ssmtrain.config.errors", "ssmtrain.config.request", "ssmtrain.verbs"},
    "doctor.py": {"ssmtrain.config.errors"},
}
"""Files whose other imports stand inside functions, so that --help stays quick."""


def runtime_imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) of a file, those for type checkers left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from ssmtrain.config import load` imports a module, not a name.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _is_module(name) else str(node.module) for name in inner]
        else:
            continue
        for name in names:
            yield name, id(node) not in in_functions


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part(module: str) -> str:
    """`config.load` of ssmtrain.config.load."""
    return module.removeprefix("ssmtrain").lstrip(".")


def law_of(module: str) -> tuple[str, set[str]]:
    """The closest entry of the law for a module of ours."""
    names = part(module) or "__init__"
    while names not in LAW:
        above = names.rpartition(".")[0]
        assert above, f"{module}: no law for this room"
        names = above
    return names, LAW[names]


FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    names = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


def allowed(module: str, target: str) -> bool:
    name, may = law_of(module)
    room = part(module).split(".")[0]
    inside = part(target)
    if name == room and inside.split(".")[0] == room:
        return True
    if inside in ("", "__init__"):
        return True  # the version
    return any(inside == one or inside.startswith(f"{one}.") for one in may)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms(file: Path) -> None:
    module = module_of(file)
    for target, _ in runtime_imports(file):
        if target.split(".")[0] == "ssmtrain":
            assert allowed(module, target), f"{module} may not import {target}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_packages(file: Path) -> None:
    room = part(module_of(file)).split(".")[0]
    for target, _ in runtime_imports(file):
        package = target.split(".")[0]
        if package in sys.stdlib_module_names or package == "ssmtrain" or package in EVERYWHERE | ONE_FILE:
            continue
        assert package in ROOMS_OF_PACKAGES, f"{file}: {package} is in no list of this test"
        assert room in ROOMS_OF_PACKAGES[package], f"{file} may not import {package}"


def test_optional_packages_are_imported_in_one_file() -> None:
    users: dict[str, set[Path]] = {}
    for file in FILES:
        for target, _ in runtime_imports(file):
            users.setdefault(target.split(".")[0], set()).add(file)
    for package in ONE_FILE & set(users):
        assert len(users[package]) == 1, f"{package} is imported in {sorted(map(str, users[package]))}"


@pytest.mark.parametrize("name", AT_CALL_ONLY)
def test_the_command_line_is_thin(name: str) -> None:
    early = {target for target, at_import in runtime_imports(ROOT / name) if at_import}
    ours = {target for target in early if target.split(".")[0] == "ssmtrain"}
    assert ours <= AT_CALL_ONLY[name]
    assert {target.split(".")[0] for target in early - ours} <= sys.stdlib_module_names


def test_the_law_catches() -> None:
    assert not allowed("ssmtrain.kernels.ssd.reference", "ssmtrain.layers.base")
    assert not allowed("ssmtrain.config.layout", "ssmtrain.config.base")
    assert not allowed("ssmtrain.config.load", "ssmtrain.layers")
    assert not allowed("ssmtrain.layers.moe", "ssmtrain.config.schema")
    assert not allowed("ssmtrain.data.rows", "ssmtrain.model")
    assert not allowed("ssmtrain.eval.evaluate", "ssmtrain.train.fit")
    assert allowed("ssmtrain.layers.moe", "ssmtrain.layers.mlp")
    assert allowed("ssmtrain.train.fit", "ssmtrain")
    assert allowed("ssmtrain.config.schema", "ssmtrain.layers.base")
    with pytest.raises(AssertionError, match="no law"):
        law_of("ssmtrain.helpers")


def test_the_map_names_every_room() -> None:
    text = (ROOT.parents[1] / "CONTRIBUTING.md").read_text()
    rooms = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    files = [path.name for path in ROOT.glob("*.py") if not path.name.startswith("__")]
    assert [name for name in (*(f"{room}/" for room in rooms), *files) if f"`{name}`" not in text] == []


def test_no_room_of_leftovers() -> None:
    names = {file.stem for file in FILES} | {file.parent.name for file in FILES}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
