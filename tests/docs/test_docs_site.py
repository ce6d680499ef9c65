"""The site builds with every link checked, and has every key, verb and recipe."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from ssmtrain.config import schema_file
from ssmtrain.config.catalog import shipped
from ssmtrain.config.manual import _keys
from ssmtrain.verbs import VERBS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or a page that no menu names is an error."""
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def words(page: Path) -> str:
    """The text of a page without its tags."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_every_key_verb_and_recipe_is_there(site: Path) -> None:
    said = words(site / "reference.html")
    keys = [where for where, _ in _keys(schema_file.load())]
    assert len(keys) > 150 and [key for key in keys if key not in said] == []
    said = words(site / "commands.html")
    assert [verb for verb in VERBS if verb not in said] == []
    said = words(site / "recipes.html")
    assert [file.stem for file in shipped().glob("*.yaml") if file.stem not in said] == []
    assert "MMAMMMMAMM" in said and "parameters  956,848" in said


def test_nothing_is_fetched(site: Path) -> None:
    """No script, style, font or picture of another address; links that a reader may click are none."""
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", page.read_text()
        )
        assert fetched == [], page


def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n[there](nowhere.md)\n[here](#nowhere)\n")
    page = (ROOT / "mkdocs.yml").read_text()
    cut = re.sub(r"^(hooks|nav|not_in_nav):.*?(?=^\S|\Z)", "", page, flags=re.M | re.S)
    (tmp_path / "mkdocs.yml").write_text(cut)
    with pytest.raises(Abort, match="2 warnings"):
        build.build(load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
