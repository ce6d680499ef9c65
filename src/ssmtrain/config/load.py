"""From the words of a command line to one frozen, typed, checked RunConfig."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config import launched, schema_file
from ssmtrain.config.catalog import Page, find, folders, recipe_lines, recipes
from ssmtrain.config.checks import as_namespace, layer_problems
from ssmtrain.config.checks import problems as contradictions
from ssmtrain.config.errors import UserError
from ssmtrain.config.expect import problems
from ssmtrain.config.layout import expand
from ssmtrain.config.reference import parse as parse_reference

if TYPE_CHECKING:
    from ssmtrain.config.schema import RunConfig

Tree = dict[str, Any]


def load(argv_overrides: Sequence[str], training: bool = False) -> RunConfig:
    """The config of `config=<recipe or page> key=value …`; UserError (exit 2) before anything is made.

    `training` also refuses what only matters once it is to be trained.

    What merging dropped is said on stderr, once (rank 0).
    """
    named = [word for word in argv_overrides if _is_config(word)]
    if not named:
        bare = next((word for word in argv_overrides if word in recipes()), None)
        if bare is not None:
            raise UserError(f"{bare!r} is not key=value; did you mean config={bare}?")
        raise UserError(
            "config= is missing: give the name of a recipe or the path of a page", details=recipe_lines()
        )
    if len(named) > 1:
        raise UserError(f"config= is given twice: {' and '.join(named)}")
    page = find(named[0].partition("=")[2].strip("\"'"))
    return _load(page, [word for word in argv_overrides if not _is_config(word)], training)


def load_run_config(run: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run (folder, its config.yaml, or name under runs_dir) with key=value words on top."""
    for word in overrides:
        if _is_config(word):
            raise UserError(f"{word}: a run has its config already; give run= or config=, not both")
    file = _run_page(Path(os.path.expanduser(run)), overrides)
    beside = file.absolute().parent
    page = Page(file.absolute(), (beside, *(folder for folder in folders() if folder != beside)))
    return _load(page, list(overrides))


def _run_page(run: Path, overrides: Sequence[str]) -> Path:
    runs_dir = next((word.partition("=")[2] for word in overrides if word.startswith("runs_dir=")), "runs")
    run = Path(parse_reference(str(run)).where)
    try:
        for place in (run, Path(runs_dir) / run):
            for file in (place, place / "config.yaml"):
                if file.is_file() and file.suffix == ".yaml":
                    return file
    except OSError as error:
        raise UserError(f"run={str(run)[:60]}: cannot be read: {error.strerror}") from None
    known = sorted(str(file.parent.relative_to(runs_dir)) for file in Path(runs_dir).glob("**/config.yaml"))
    near = difflib.get_close_matches(str(run), known, 3, 0.4) or known[:5]
    hint = f"runs here: {', '.join(near)}" if near else f"there are no runs in {runs_dir}/ yet"
    raise UserError(f"run={run}: there is no such run; {hint}")


def _is_config(word: str) -> bool:
    return word.lstrip("+").startswith("config=")


def _load(page: Page, texts: list[str], training: bool = False) -> RunConfig:
    # Hydra is imported once the page is known to exist, torch once the tree is known to have the right shape.
    from ssmtrain.config.compose import compose
    from ssmtrain.config.words import parse

    try:
        words = parse(texts)
        composed = compose(page, words)
    except RecursionError:
        longest = max(texts, key=len, default="")
        raise UserError(f"{longest[:60]}…: nested too deeply") from None
    if any(word.key == "model.layout" for word in words):
        composed.notices.extend(_without_unused_blocks(composed.tree))
    _say(composed.notices)
    tree = _completed(composed.tree, page)
    if schema_file.is_fresh():
        _refuse(problems(schema_file.load(), tree))
        _refuse(contradictions(as_namespace(schema_file.filled(tree)), training))
    return typed(tree, training)


def typed(tree: Tree, training: bool = False) -> RunConfig:
    """Validate a plain tree; UserError with a line per problem."""
    from pydantic import ValidationError

    from ssmtrain.config.identity import default_name
    from ssmtrain.config.schema import RunConfig

    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = problems(schema_file.build(), tree)
        raise UserError(*(lines or [_plain(one) for one in error.errors(include_url=False)])) from None
    _refuse(contradictions(config, training) + layer_problems(config))
    return config if config.name else config.model_copy(update={"name": default_name(config)})


def _plain(error: Any) -> str:
    return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"


def _refuse(lines: list[str]) -> None:
    if lines:
        raise UserError(*lines)


def _completed(tree: Tree, page: Page) -> Tree:
    """Add what a page may leave open: its recipe's name, and the kind of slots that have a default one."""
    for slot, value in tree.items():
        kind = schema_file.default_kind((slot,))
        if kind is not None and isinstance(value, dict):
            tree[slot] = {"kind": kind, **value}
    return {"recipe": page.name, **tree}


def _without_unused_blocks(tree: Tree) -> list[str]:
    """Leave out the blocks that a layout typed on the line does without, as in a sweep over ratios.

    On a page an unused block is an error: there it is a mistake, here it is what was asked for.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("blocks"), dict):
        return []
    try:
        names = expand(str(model.get("layout")), model.get("n_layers"))
    except (ValueError, TypeError):
        return []  # the checks that follow say what is wrong with it
    unused = [name for name in model["blocks"] if name not in names]
    if unused and set(names) <= set(model["blocks"]):
        model["blocks"] = {name: block for name, block in model["blocks"].items() if name in names}
        return [f"model.layout={model['layout']}: left out blocks that are not in it: {', '.join(unused)}"]
    return []


def _say(notices: list[str]) -> None:
    if launched.rank() == 0:
        for line in notices:
            print(line, file=sys.stderr)


def to_yaml(config: RunConfig) -> str:
    """The config with every value spelled out, itself a page for `config=`."""
    import yaml

    from ssmtrain.config.schema import dump

    return yaml.dump(dump(config), Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=100)


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes lists of plain values on one line."""

    def write_list(dumper: Any, value: list[Any]) -> Any:
        flow = not any(isinstance(item, dict | list) for item in value)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)

    Dumper.add_representer(list, write_list)
    return Dumper


def config_hash(config: RunConfig) -> str:
    """Hex sha256 of what decides the run: the config without limits, devices, logger and output settings."""
    from ssmtrain.config.identity import config_hash

    return config_hash(config)


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two configs, a line per key: `optim.lr: 0.001 -> 0.002`."""
    from ssmtrain.config.expect import show_value
    from ssmtrain.config.identity import differences

    changed = differences(old, new)
    return [f"{key}: {show_value(a)} -> {show_value(b)}" for key, (a, b) in changed.items()]
