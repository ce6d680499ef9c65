"""Where pages are: the user's own folder first, then the recipes that come with the package."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ssmtrain.config.errors import UserError

FOLDER = "SSMTRAIN_CONFIGS"
"""Environment variable with the user's folder of pages; without it, ./configs."""


@dataclass(frozen=True)
class Page:
    """A primary page: its file and the folders in which its defaults are looked up, first match wins."""

    file: Path
    folders: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.file.stem


def shipped() -> Path:
    """The folder of the shipped recipes: inside the package, or the repository's for an editable install."""
    inside = Path(str(resources.files("ssmtrain"))) / "configs"
    if inside.is_dir():
        return inside
    return Path(str(resources.files("ssmtrain"))).parent.parent / "configs"


def folders() -> tuple[Path, ...]:
    """The folders searched for a name, in order."""
    try:
        own = Path(os.environ.get(FOLDER) or Path.cwd() / "configs").absolute()
    except OSError:
        raise UserError("the current folder no longer exists; change to another (cd ~)") from None
    found = [own] if own.is_dir() else []
    if shipped() not in found:
        found.append(shipped())
    return tuple(found)


def find(name: str) -> Page:
    """The page that `config=<name or path>` means; UserError with the nearest name or the recipes."""
    if "\0" in name or not name:
        raise UserError("config= expects the name of a recipe or a path", details=recipe_lines())
    try:
        return _find(name)
    except OSError as error:  # a folder that may not be entered, a name of thousands of letters
        raise UserError(f"config={name[:60]}: cannot be read: {error.strerror}") from None


def _find(name: str) -> Page:
    as_path = Path(os.path.expanduser(name))
    if as_path.suffix in (".yaml", ".yml") or "/" in name:
        return _at(as_path, name)
    for folder in folders():
        if (folder / f"{name}.yaml").is_file():
            return Page(folder / f"{name}.yaml", folders())
    names = list(recipes())
    near = difflib.get_close_matches(name, names, 1, 0.6)
    hint = f"did you mean config={near[0]}?" if near else "ssmtrain config list shows the recipes"
    if Path(f"{name}.yaml").is_file():
        hint = f"for the file in this folder type config=./{name}.yaml"
    raise UserError(f"config={name}: there is no such recipe; {hint}")


def _at(path: Path, shown: str) -> Page:
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if not path.exists() and Path(f"{path}.yaml").is_file():
        path = Path(f"{path}.yaml")
    if not path.is_file():
        what = "a folder, not a page" if path.is_dir() else "no such file"
        raise UserError(f"config={shown}: {what}")
    if path.suffix != ".yaml":
        raise UserError(f"config={shown}: a page's name ends in .yaml")
    path = path.absolute()
    return Page(path, (path.parent, *(f for f in folders() if f != path.parent)))


def recipes() -> dict[str, Path]:
    """Every top-level page by name, the user's hiding shipped ones of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(folders()):
        found |= {file.stem: file for file in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def groups() -> dict[str, list[str]]:
    """Every group and its options."""
    found: dict[str, set[str]] = {}
    for folder in folders():
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def headline(file: Path) -> str:
    """A page's first comment, as its one-line description."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = line.strip()
                if text.startswith("#") and not text.lstrip("# ").startswith("@package"):
                    return text.lstrip("# ")
                if text and not text.startswith("#"):
                    break
    except OSError:
        pass
    return ""


def recipe_lines() -> list[str]:
    """The recipes with their descriptions, a line each."""
    found = recipes()
    width = max((len(name) for name in found), default=0)
    return [f"  {name.ljust(width)}  {headline(file)}".rstrip() for name, file in found.items()]
