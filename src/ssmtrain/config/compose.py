"""Pages and command-line words into one plain tree: Hydra's defaults lists and override grammar.

Hydra (pinned) finds the pages, orders them by their defaults lists and parses the overrides. The merge is
done here, because a `kind` that changes must take its older siblings with it, between pages as on the command
line; and pages are read by our own reader, because OmegaConf's resolves tags and grows aliases.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssmtrain.config import schema_file
from ssmtrain.config.catalog import Page
from ssmtrain.config.errors import UserError
from ssmtrain.config.guard import check_defaults, check_tree, walk
from ssmtrain.config.words import Word
from ssmtrain.config.yaml_reader import read_yaml

Tree = dict[str, Any]

_HEADER = "\0package"
"""Where a page's `# @package` line travels until the page stands in its place."""


class PageSource(FileConfigSource):
    """A folder of pages read by the safe reader; nothing outside the folder is reached."""

    @staticmethod
    def scheme() -> str:
        """Name of this source in a search path."""
        return "page"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one page."""
        file = Path(self.path) / self._normalize_file_name(config_path)
        page = read_yaml(file)
        check_defaults(page, file.name)
        header = ConfigSource._get_header_dict(file.read_text(encoding="utf-8-sig")[:512])
        return ConfigResult(
            config=OmegaConf.create(page), path=self.full_path(), provider=self.provider, header=header
        )

    def is_group(self, config_path: str) -> bool:
        """Whether the folder has this group."""
        return self._inside(config_path) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether the folder has this page."""
        return self._inside(config_path) and super().is_config(config_path)

    def _inside(self, config_path: str) -> bool:
        full = os.path.abspath(os.path.join(self.path, config_path))
        return "\\" not in config_path and (full + os.sep).startswith(os.path.abspath(self.path) + os.sep)


@dataclass
class Composed:
    """One plain tree and what the user should be told about its making."""

    tree: Tree
    notices: list[str] = field(default_factory=list)


def compose(page: Page, words: Iterable[Word]) -> Composed:
    """Merge a page, what it extends and the command line, and resolve references; UserError if it cannot."""
    words = list(words)
    repository = _repository(page)
    result = Composed({})
    selections, values = _split(repository, words)
    layers = _layers(repository, page, selections)
    for path, tree in layers:
        if path.rpartition("/")[0] in selections:
            continue
        _merge(result, tree, f"{page.name}.yaml")
    # The kinds of a group that the command line replaces are those the page was written for.
    whole = Composed({})
    for _, tree in layers:
        _merge(whole, tree, page.name)
    for group, option in selections.items():
        _keep_kind(result.tree, whole.tree, group)
        tree = _package(_load(repository, f"{group}/{option}"), group)
        _merge(result, tree, f"{group}={option}")
    for word in sorted(values, key=lambda word: not word.chooses_kind):
        if word.delete:
            _delete(result.tree, word)
        else:
            _reach(result.tree, word.path)
            _merge(result, word.tree(), word.text)
    check_tree(result.tree)
    return Composed(_resolve(result.tree), result.notices)


def _repository(page: Page) -> CachingConfigRepository:
    version.setbase("1.3")
    SourcesRegistry.instance().register(PageSource)
    path = ConfigSearchPathImpl()
    for folder in page.folders:
        path.append(provider=str(folder), path=f"page://{folder}")
    return CachingConfigRepository(ConfigRepository(path))


def _ordered(repository: CachingConfigRepository, page: Page, selections: dict[str, str]) -> DefaultsList:
    try:
        return create_defaults_list(repository, page.name, [], prepend_hydra=False, skip_missing=False)
    except HydraException:
        # A group that the page leaves open (data: ???) must be on the command line.
        chosen = [OverridesParser.create().parse_override(f"{k}={v}") for k, v in selections.items()]
        return create_defaults_list(repository, page.name, chosen, prepend_hydra=False, skip_missing=False)


def _layers(
    repository: CachingConfigRepository, page: Page, selections: dict[str, str]
) -> list[tuple[str, Tree]]:
    """The pages in the order of the defaults lists, each under its package."""
    try:
        found = _ordered(repository, page, selections)
        return [
            (
                default.config_path or "",
                _package(_load(repository, default.config_path or ""), default.package),
            )
            for default in found.defaults
        ]
    except RecursionError:
        raise UserError(f"{page.file.name}: its defaults list leads back to itself") from None
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{page.file.name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Hydra's message in one line, without its search path."""
    text = " ".join(str(error).split()).partition(" Config search path:")[0]
    text = re.sub(r"^In '[^']*': ", "", text)
    options = r"(?: Available options in '[^']+': (.*))?"
    missing = re.fullmatch(rf"Could not (?:find|load) '([^']+)'\.?{options}", text)
    if missing is None:
        return text or "its defaults list cannot be read"
    known = f"; there is {', '.join(missing[2].split())}" if missing[2] else ""
    return f"its defaults list names {missing[1]}, which does not exist{known}"


def _load(repository: CachingConfigRepository, path: str) -> Tree:
    loaded = repository.load_config(path)
    if loaded is None:
        raise UserError(f"there is no page {path}")
    tree = OmegaConf.to_container(loaded.config, resolve=False)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping")
    page = {str(key): value for key, value in tree.items()}
    header = (loaded.header or {}).get("package")
    return {_HEADER: header, **page} if header else page


def _package(tree: Tree, package: str | None) -> Tree:
    header = tree.pop(_HEADER, None)
    package = header if header is not None else package
    if package in (None, "", "_global_"):
        return tree
    for key in reversed(str(package).split(".")):
        tree = {key: tree}
    return tree


def _split(repository: CachingConfigRepository, words: list[Word]) -> tuple[dict[str, str], list[Word]]:
    """Separate group selections (optim=muon) from values."""
    selections: dict[str, str] = {}
    values: list[Word] = []
    for word in words:
        option = word.value
        is_choice = isinstance(option, str) and not word.delete and "." not in word.key
        if not is_choice or not repository.group_exists(word.key):
            values.append(word)
            continue
        options = repository.get_group_options(word.key)
        if option not in options:
            if word.key in schema_file.text_keys():
                values.append(word)
                continue
            near = difflib.get_close_matches(str(option), options, 1, 0.5)
            hint = f"did you mean {word.key}={near[0]}?" if near else f"expected one of {', '.join(options)}"
            raise UserError(f"{word.text}: there is no such page; {hint}")
        selections[word.key] = str(option)
    return selections, values


def _keep_kind(tree: Tree, whole: Tree, group: str) -> None:
    """Let the slot remember the kind that its remaining values were written for."""
    before = whole.get(group)
    if isinstance(before, dict) and "kind" in before and isinstance(tree.get(group, {}), dict):
        tree.setdefault(group, {}).setdefault("kind", before["kind"])


def _merge(into: Composed, tree: Tree, origin: str) -> None:
    """Merge a layer over the tree; a mapping whose kind changes loses the older kind's own keys."""
    into.tree = _merged(into.tree, tree, (), origin, into.notices)


def _merged(old: Any, new: Any, path: tuple[str, ...], origin: str, notices: list[str]) -> Any:
    if not isinstance(new, dict):
        return copy.deepcopy(new)
    if not isinstance(old, dict):
        old = {}
    elif "kind" in new and new["kind"] != (before := old.get("kind", schema_file.default_kind(path))):
        kept = {"kind"} | set(schema_file.shared_fields(path))
        gone = [key for key in old if key not in kept and key not in new]
        if gone and before is not None:
            names = ", ".join(f"{key}={old[key]}" if _is_plain(old[key]) else key for key in gone)
            notices.append(
                f"{'.'.join(path)}.kind changes from {before} to {new['kind']} ({origin}): dropped {names}"
            )
        old = {key: value for key, value in old.items() if key in kept}
    result = dict(old)
    for key, value in new.items():
        result[key] = _merged(old.get(key), value, (*path, str(key)), origin, notices)
    return result


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _delete(tree: Tree, word: Word) -> None:
    *above, last = word.path
    at: Any = tree
    for key in above:
        at = at.get(key) if isinstance(at, dict) else None
    if not isinstance(at, dict) or last not in at:
        raise UserError(f"{word.text}: {word.key} is not set by the page, so there is nothing to delete")
    del at[last]


def _reach(tree: Tree, path: tuple[str, ...]) -> None:
    """Copy what a reference stands for where the command line sets something below it."""
    at: Any = tree
    for key in path[:-1]:
        below = at.get(key) if isinstance(at, dict) else None
        if (
            isinstance(below, str)
            and below.startswith("${")
            and below.endswith("}")
            and below.count("${") == 1
        ):
            target: Any = tree
            for step in below[2:-1].strip().split("."):
                target = target.get(step) if isinstance(target, dict) else None
            if isinstance(target, dict):
                at[key] = below = copy.deepcopy(target)
        at = below


def _resolve(tree: Tree) -> Tree:
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from None
    assert isinstance(resolved, dict)
    missing = [".".join(path) for path, _, value in walk(resolved) if value == "???"]
    if missing:
        raise UserError(
            *(f"{key}: the page leaves this for you to set; add {key}=… to the line" for key in missing)
        )
    return {str(key): value for key, value in resolved.items()}
