"""Shell completion: the scripts for bash and zsh, and the query that both ask (reads schema.json only)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtrain.config import catalog, schema_file
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.schema_file import Schema, options
from ssmtrain.verbs import VERBS, Verb

if TYPE_CHECKING:
    from ssmtrain.config.request import Request

BASH = """\
# eval "$(ssmtrain completion bash)"
_ssmtrain() {
  local line="${COMP_LINE:0:COMP_POINT}" word i
  word="${line##*[[:space:]]}"
  local IFS=$'\\n'
  COMPREPLY=($(ssmtrain completion query "$line" 2>/dev/null))
  # bash cuts words at = and replaces only the part behind it
  if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
    for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]="${COMPREPLY[i]#*=}"; done
  fi
  [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o default -F _ssmtrain ssmtrain
"""

ZSH = """\
# eval "$(ssmtrain completion zsh)"
_ssmtrain() {
  local -a found
  found=("${(@f)$(ssmtrain completion query "$LBUFFER" 2>/dev/null)}")
  if [[ -n "${found[1]}" ]]; then compadd -S '' -Q -- "${found[@]}"; else _files; fi
}
compdef _ssmtrain ssmtrain
"""


def command(request: Request) -> int:
    """Print a completion script, or (query) what may stand at the end of a line."""
    words = request.overrides
    if words[:1] == ["query"]:
        print("\n".join(candidates(words[1] if len(words) > 1 else "")))
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
    own = _own(verb, current)
    if before[0] in ("runs", "report"):
        return own + [name for name in _runs(before) if name.startswith(current) and name not in before]
    if verb.takes == "words":
        return own or ([] if verb.words else _topics(before[0], current))
    if "=" in current:
        found = _values(current, before)
    elif verb.takes == "run":
        found = [] if any(word.startswith("run=") for word in before) else ["run="]
    else:
        found = _keys(current, before, verb.takes)
    return sorted({word for word in [*own, *found] if word.startswith(current)})


def _own(verb: Verb, current: str) -> list[str]:
    """The verb's own words, and the runs that some of them take."""
    key, equals, _ = current.partition("=")
    if not equals:
        return [f"{word}=" for word in verb.words if word.startswith(current)]
    if verb.words.get(key, "").startswith("=RUN"):
        return [word for name in _runs() if (word := f"{key}={name}").startswith(current)]
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


def _runs(before: Sequence[str] = ()) -> list[str]:
    """The names of the runs, those in the folder that the line names by runs_dir=."""
    base = next((word.partition("=")[2] for word in before if word.startswith("runs_dir=")), "runs")
    return sorted(str(page.parent.relative_to(base)) for page in Path(base).glob("**/config.yaml"))


def _page(before: list[str]) -> Any:
    """The page that the line names, as far as it can be read at once; {} otherwise."""
    named = next((word.partition("=")[2] for word in before if word.startswith("config=")), None)
    if named is None:
        return {}
    from ssmtrain.config.yaml_reader import read_yaml

    try:
        return read_yaml(catalog.find(named).file)
    except UserError:
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
        return [f"run={name}" for name in _runs()]
    groups = catalog.groups()
    if key in groups:
        return [f"{key}={option}" for option in groups[key]]
    path = tuple(key.split("."))
    union = schema_file.union_at(path[:-1])
    if path[-1] == "kind" and union is not None:
        return [f"{key}={kind}" for kind in union["discriminator"]["mapping"]]
    schema, words = schema_file.load(), []
    piece = schema_file.piece(path, _page(before))
    for option in options(schema, piece) if piece else []:
        words += option.get("enum", [option["const"]] if "const" in option else [])
        words += ["true", "false"] if option.get("type") == "boolean" else []
    return [f"{key}={word}" for word in words]
