"""The verbs `config show`, `config list`, `config diff` and `config schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config import catalog as pages
from ssmtrain.config import schema_file
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.load import difference, load, load_run_config, to_yaml

if TYPE_CHECKING:
    from ssmtrain.config.request import Request
    from ssmtrain.config.schema import RunConfig


def show(request: Request) -> int:
    """Print the whole config, as YAML that is itself a page, or as JSON."""
    config = request.config or load_run_config(request.run or "", request.overrides)
    if request.as_json:
        from ssmtrain.config.schema import dump

        print(json.dumps(dump(config), indent=2))
        return FINISHED
    from ssmtrain.config.identity import default_name

    if config.name == default_name(config):
        # A page that was given a name by its content must not keep it when the content is edited.
        config = config.model_copy(update={"name": None})
    print(to_yaml(config), end="")
    return FINISHED


def catalog(request: Request) -> int:
    """List the recipes with their first comments."""
    found = pages.recipes()
    if request.as_json:
        rows = [
            {"name": name, "description": pages.headline(file), "path": str(file)}
            for name, file in found.items()
        ]
        print(json.dumps({"recipes": rows, "groups": pages.groups()}, indent=2))
        return FINISHED
    print("\n".join(pages.recipe_lines()))
    print("\ngroups:")
    for group, options in pages.groups().items():
        print(f"  {group}={'|'.join(options)}")
    return FINISHED


def diff(request: Request) -> int:
    """Print the keys whose values differ between two recipes, pages or runs."""
    words = request.overrides
    if len(words) != 2:
        raise UserError(
            "config diff takes two recipes, pages or runs: ssmtrain config diff quickstart runs/mine"
        )
    old, new = (_either(word) for word in words)
    lines = difference(old, new)
    if request.as_json:
        from ssmtrain.config.identity import differences

        print(json.dumps({key: list(pair) for key, pair in differences(old, new).items()}, indent=2))
        return FINISHED
    print("\n".join(lines) if lines else "no difference")
    return FINISHED


def _either(word: str) -> RunConfig:
    name = word.removeprefix("config=").removeprefix("run=")
    if name not in pages.recipes() and "/" not in name and (Path("runs") / name / "config.yaml").is_file():
        return load_run_config(name)
    return load([f"config={name}"])


def schema(request: Request) -> int:
    """Print the JSON schema of pages, for editors; nothing is required, as a page may extend another."""
    loaded = schema_file.load() if schema_file.is_fresh() else schema_file.build()
    print(json.dumps(_without_required(loaded), indent=1, ensure_ascii=False))
    return FINISHED


def _without_required(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_required(item) for item in value]
    if isinstance(value, dict):
        return {
            key: _without_required(inner)
            for key, inner in value.items()
            if not key.startswith("x-") and not (key == "required" and isinstance(inner, list))
        }
    return value
