"""Shell completion: what may stand at the end of a line, and what it means (reads schema.json only)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config import catalog, schema_file
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.expect import describe, show_value
from ssmtrain.config.schema_file import Schema, options, resolve
from ssmtrain.config.shells import BASH, ZSH
from ssmtrain.verbs import VERBS, Verb

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

FLAGS = {"--split": ("train", "val")}
"""Values of flags that take one of a few."""


def command(request: Request) -> int:
    """Print a completion script, or (query) what may stand at the end of a line."""
    words = request.overrides
    line = words[1] if len(words) > 1 else ""
    if words[:1] == ["query"]:
        print("\n".join(candidates(line)))
        return FINISHED
    if words[:1] == ["describe"]:
        print("\n".join(f"{word}\t{about(word, line)}".rstrip() for word in candidates(line)))
        return FINISHED
    scripts = {"bash": BASH, "zsh": ZSH}
    if len(words) != 1 or words[0] not in scripts:
        raise UserError('completion takes bash or zsh, as in: eval "$(ssmtrain completion bash)"')
    sys.stdout.write(scripts[words[0]])
    return FINISHED


def candidates(line: str) -> list[str]:
    """The words that may complete the end of a command line such as `ssmtrain fit config=qu`."""
    words = line.split()
    current = "" if not words or line[-1].isspace() else words.pop()
    before = words[1:]
    firsts = sorted({name.split()[0] for name in VERBS})
    if not before:
        return [name for name in firsts if name.startswith(current)]
    pairs = [name.split()[1] for name in VERBS if name.startswith(f"{before[0]} ")]
    if pairs and len(before) == 1:
        return [word for word in pairs if word.startswith(current)]
    verb = VERBS.get(" ".join(before[:2])) or VERBS.get(before[0])
    if verb is None:
        return []
    if current.startswith("-"):
        return [f"--{flag}" for flag in (*verb.flags, "help") if f"--{flag}".startswith(current)]
    if verb.flags.get(before[-1].removeprefix("--"), "").startswith("=") and before[-1].startswith("--"):
        return [word for word in FLAGS.get(before[-1], ()) if word.startswith(current)]
    if not verb.takes:
        return []
    own = _own(verb, current, before)
    if before[0] in ("runs", "report"):
        return own + [name for name in _runs("", before) if name.startswith(current) and name not in before]
    if verb.takes == "words":
        return own or ([] if verb.words else _topics(before[0], current))
    if "=" in current:
        found = _values(current, before)
    elif verb.takes == "run":
        found = [] if any(word.startswith("run=") for word in before) else ["run="]
    else:
        found = _keys(current, before, verb.takes)
    return sorted({word for word in [*own, *found] if word.startswith(current)})


def _own(verb: Verb, current: str, before: list[str]) -> list[str]:
    """The verb's own words, and what some of them take: runs, their checkpoints, the averaged weights."""
    key, equals, _ = current.partition("=")
    if not equals:
        return [f"{word}=" for word in verb.words if word.startswith(current)]
    takes = verb.words.get(key, "")
    if takes.startswith("=RECIPE"):
        return [f"{key}={name}" for name in catalog.recipes() if f"{key}={name}".startswith(current)]
    if takes.startswith("=ema"):
        return [f"{key}=ema"]
    if takes.startswith("=RUN"):
        return [word for name in _runs(current, before) if (word := f"{key}={name}").startswith(current)]
    return []


def _topics(verb: str, current: str) -> list[str]:
    if verb == "completion":
        topics = ["bash", "zsh"]
    elif verb == "config":
        topics = list(catalog.recipes())
    else:
        from ssmtrain.config.manual import _keys as keys
        from ssmtrain.config.manual import _kinds as kinds

        schema = schema_file.load()
        topics = [where for where, _ in keys(schema)] + [kind for kind, _ in kinds(schema)]
    return sorted({topic for topic in topics if topic.startswith(current)})


def _runs(current: str, before: list[str]) -> list[str]:
    """The runs in runs_dir; behind an @ the checkpoints of one."""
    words = [word.partition("=")[2] for word in before if word.startswith("runs_dir=")]
    folder = Path(words[0] if words else "runs")
    name, at, _ = current.partition("=")[2].rpartition("@")
    if at:
        run = folder / name
        steps = sorted((run / "checkpoints").glob("step-????????"))
        best = ["best"] if (run / "best").exists() else []
        return [f"{name}@{pick}" for pick in [*best, *(f"step-{int(path.name[5:])}" for path in steps)]]
    pages = [page for glob in ("*/config.yaml", "*/*/config.yaml") for page in folder.glob(glob)]
    return sorted(str(page.parent.relative_to(folder)) for page in pages)


def _page(before: list[str]) -> Any:
    """The page that the line names, with the kinds that it chooses, as far as it can be read at once."""
    page: Any = {}
    named = next((word.partition("=")[2] for word in before if word.startswith("config=")), None)
    if named is not None:
        page = _read(lambda: catalog.find(named).file)
    if not isinstance(page, dict):
        return {}
    groups = catalog.groups()
    chosen = [
        item for entry in page.get("defaults") or () if isinstance(entry, dict) for item in entry.items()
    ]
    chosen = [pair for pair in chosen if pair[0] not in page]
    for word in before:
        key, _, value = word.partition("=")
        chosen.append((key, value))
    for key, value in chosen:
        *path, last = str(key).split(".")
        if value in groups.get(key, ()):
            page[key] = _group_page(key, value)
        elif last == "kind":
            node = page
            for part in path:
                inner = node.get(part)
                node[part] = inner if isinstance(inner, dict) else {}
                node = node[part]
            node["kind"] = value
    return page


def _group_page(group: str, option: str) -> Any:
    files = (folder / group / f"{option}.yaml" for folder in catalog.folders())
    return _read(lambda: next(file for file in files if file.is_file()))


def _read(find: Callable[[], Path]) -> Any:
    from ssmtrain.config.yaml_reader import read_yaml

    try:
        return read_yaml(find())
    except (UserError, OSError):
        return {}


def _keys(current: str, before: list[str], takes: str) -> list[str]:
    if "." not in current:
        named = any(word.startswith(("config=", "run=")) for word in before)
        found = [] if named else ["config=", *(["run="] if "run" in takes else [])]
        found += [f"{group}=" for group in catalog.groups()]
    else:
        found = []
    path = tuple(current.split(".")[:-1])
    page = _page(before)
    at, node = schema_file.piece(path, page), page
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    schema = schema_file.load()
    for option in options(schema, at, node) if at else []:
        for key, child in option.get("properties", {}).items():
            if key != "defaults":
                found.append(".".join((*path, key)) + _end(schema, child))
        if isinstance(option.get("additionalProperties"), dict) and isinstance(node, dict):
            found += [".".join((*path, key)) + "." for key in node]
    return found


def _end(schema: Schema, child: Schema) -> str:
    is_object = any(option.get("type") == "object" for option in options(schema, child))
    return "." if is_object else "="


def _values(current: str, before: list[str]) -> list[str]:
    key = current.partition("=")[0]
    if key == "config":
        return [f"config={name}" for name in catalog.recipes()]
    if key == "run":
        return [f"run={name}" for name in _runs(current, before)]
    groups = catalog.groups()
    if key in groups:
        return [f"{key}={option}" for option in groups[key]]
    path = tuple(key.split("."))
    union = schema_file.union_at(path[:-1])
    if path[-1] == "kind" and union is not None:
        return [f"{key}={kind}" for kind in union["discriminator"]["mapping"]]
    schema, words = schema_file.load(), []
    page = _page(before)
    piece = schema_file.piece(path, page)
    for option in options(schema, piece) if piece else []:
        words += option.get("enum", [option["const"]] if "const" in option else [])
        words += ["true", "false"] if option.get("type") == "boolean" else []
    if piece and not words:
        words = _example(schema, piece, path, page)
    return [f"{key}={word}" for word in words]


def _example(schema: Schema, piece: Schema, path: tuple[str, ...], page: Any) -> list[str]:
    """The value that a number or text has without the line, or one of its kind, to be typed over."""
    for part in path:
        page = page.get(part) if isinstance(page, dict) else None
    value = piece.get("default") if page is None else page
    if value is None:
        given = [one for option in options(schema, piece) for one in option.get("examples", ())]
        value = given[0] if given else None
    plain = isinstance(value, int | float) or (isinstance(value, str) and value.isprintable())
    return [str(value)] if plain and value != "" and " " not in str(value) else []


def about(word: str, line: str) -> str:
    """What a candidate is: a verb's summary, a key's type and description; empty where the word says it."""
    words = line.split()
    before = words[1:] if not words or line[-1].isspace() else words[1:-1]
    verb = VERBS.get(" ".join([*before[:1], word])) or (None if before else VERBS.get(word))
    if verb is not None:
        return verb.summary
    current = VERBS.get(" ".join(before[:2])) or VERBS.get(before[0] if before else "")
    if current is None:
        return ""
    name = word.removeprefix("--").partition("=")[0].rstrip(".")
    text = (current.flags if word.startswith("-") else current.words).get(name, "")
    if text:
        return text.split(" ", 1)[-1] if text.startswith("=") else text
    if word.startswith("config=") and word != "config=":
        return catalog.headline(catalog.recipes().get(word.partition("=")[2], Path()))
    if not word.endswith(("=", ".")):
        return ""
    piece = schema_file.piece(tuple(name.split(".")), _page(before))
    if piece is None:
        return ""
    schema = schema_file.load()
    said = str(resolve(schema, piece).get("description", "")).split("\n")[0]
    if word.endswith("."):
        return said
    if name in catalog.groups():
        return f"one of {', '.join(catalog.groups()[name])}: {said}"
    default = f", default {show_value(piece['default'])}" if "default" in piece else ""
    return f"{describe(schema, piece)}{default}: {said}".rstrip(": ")
