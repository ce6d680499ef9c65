"""Pages of the site that are made from the program: recipes, configuration, commands, linked files.

A hook of mkdocs (mkdocs.yml): nothing that it makes is kept, so nothing of it can be stale.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from ssmtrain.config import schema_file
from ssmtrain.config.catalog import shipped
from ssmtrain.config.expect import describe, show_value
from ssmtrain.config.load import load
from ssmtrain.config.schema_file import Schema, options, resolve
from ssmtrain.model.show import report
from ssmtrain.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\(((?:\.\./|docs/)?[A-Za-z0-9_./-]+)(#[A-Za-z0-9_-]+)?\)")
LEXERS = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and one for each file of the repository that a page links to."""
    made = {"recipes.md": recipes(), "reference.md": reference(), "commands.md": commands()}
    made |= {name: (ROOT / source).read_text() for name, source in COPIED.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    texts = [(f.src_uri, f.content_string) for f in files.documentation_pages()]
    for path in sorted({path for uri, text in texts for _, path in linked(uri, text)} - set(COPIED.values())):
        files.append(File.generated(config, shown_at(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files of the repository to the pages that show them."""
    here = page.file.src_uri
    for target, path in linked(here, markdown):
        there = posixpath.relpath(shown_at(path), posixpath.dirname(here) or ".")
        markdown = markdown.replace(f"]({target})", f"]({there})")
    if here in COPIED.values() or here in COPIED:
        markdown = markdown.replace("](docs/", "](")
    return markdown


def linked(uri: str, text: str) -> Iterator[tuple[str, str]]:
    """Link targets of a page that leave docs/, and the repository's files that they name."""
    base = "." if uri in COPIED else posixpath.join("docs", posixpath.dirname(uri))
    for target, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(base, target))
        if not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            yield target, path


def shown_at(path: str) -> str:
    """The page on which a file of the repository is shown."""
    copied = {source: name for name, source in COPIED.items()}
    return copied.get(path, f"source/{path}.md")


def source_page(path: str) -> str:
    """A file of the repository as a page."""
    suffix = os.path.splitext(path)[1]
    return f"# {path}\n\n````{LEXERS.get(suffix, 'text')}\n{(ROOT / path).read_text()}\n````\n"


def recipes() -> str:
    """Every recipe: what its page says of it, its picture and its counts, as `ssmtrain show` prints them."""
    lines = [
        "# Recipes",
        "",
        "Each is a page of `configs/` and a full run: `ssmtrain fit config=NAME`.",
        "",
    ]
    for file in sorted(shipped().glob("*.yaml")):
        text = file.read_text()
        said = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        config = load([f"config={file}"])
        _, picture = report(config, config.model.vocab_size or 257)
        lines += [f"## {file.stem}", "", " ".join(said), "", "```text", *picture, "```", ""]
        page = "".join(f"    {line}\n" for line in text.splitlines())
        lines.append(f'??? note "The page"\n    ```yaml\n{page}    ```\n')
    return "\n".join(lines)


def commands() -> str:
    """Every verb with its flags and words."""
    lines = ["# Commands", "", "`ssmtrain help <verb>` prints the same in a terminal.", ""]
    for name, verb in VERBS.items():
        lines += [f"## {name}", "", f"{verb.summary[:1].upper()}{verb.summary[1:]}.", ""]
        rows = [(f"`--{flag}`", text) for flag, text in verb.flags.items()]
        rows += [(f"`{word}`", text) for word, text in verb.words.items()]
        for shown, text in rows:
            value, _, rest = text.partition(" ") if text.startswith("=") else ("", "", text)
            lines.append(f"- {shown[:-1]}{value}`: {rest}")
        lines += ["", "```", verb.example or f"ssmtrain {name}", "```", ""]
    return "\n".join(lines)


def reference() -> str:
    """Every key of the configuration, from the schema that the program itself reads."""
    schema = schema_file.load()
    lines = ["# Configuration", ""]
    lines.append("Every key, its type, its default and what it means, as `ssmtrain help KEY` prints it.")
    lines.append("`<name>` stands for a name of your own; a `kind` decides which keys there are.")
    pages = {key: piece for key, piece in schema["properties"].items() if key != "defaults"}
    alone = {key: piece for key, piece in pages.items() if not is_page(schema, piece)}
    lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [row(schema, key, piece, key in schema.get("required", [])) for key, piece in alone.items()]
    for key, piece in pages.items():
        if key not in alone:
            lines += ["", f"## {key}", "", about(schema, piece), "", *tables(schema, key, piece)]
    return "\n".join(lines) + "\n"


def is_page(schema: Schema, piece: Schema) -> bool:
    """Whether keys stand below a key."""
    return any("properties" in o or "additionalProperties" in o for o in options(schema, piece))


def tables(schema: Schema, path: str, piece: Schema) -> Iterator[str]:
    """A table for each kind that may stand at a path, and for what stands below it."""
    for option in options(schema, piece):
        fields = {k: v for k, v in option.get("properties", {}).items() if k not in ("kind", "defaults")}
        kind = option.get("properties", {}).get("kind", {}).get("const")
        if kind:
            yield from ("", f"### `{path}`: {kind}", "", about(schema, option), "")
        if fields:
            yield from ("| key | type | default | meaning |", "|---|---|---|---|")
            for name, child in fields.items():
                yield row(schema, f"{path}.{name}", child, name in option.get("required", []))
            yield ""
        inner = option.get("additionalProperties")
        if isinstance(inner, dict):
            yield from tables(schema, f"{path}.<name>", inner)
        for name, child in fields.items():
            if is_page(schema, child):
                yield from tables(schema, f"{path}.{name}", child)


def row(schema: Schema, path: str, piece: Schema, required: bool) -> str:
    """A line of a table."""
    shown = "required" if required else default(piece)
    cells = (describe(schema, piece), about(schema, piece))
    kind, meaning = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| `{path}` | {kind} | {shown} | {meaning} |"


def default(piece: Schema) -> str:
    """A default in words."""
    value = piece.get("default")
    if isinstance(value, dict):
        return f"`{value['kind']}`" if "kind" in value else "as below"
    return f"`{show_value(value)}`" if value is not None else "none"


def about(schema: Schema, piece: Schema) -> str:
    """What a key means, on one line."""
    text = piece.get("description") or resolve(schema, piece).get("description", "")
    return str(text).replace("\n", " ")
