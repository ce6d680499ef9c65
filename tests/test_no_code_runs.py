"""Nothing that is loaded runs code: no module names a loader that could, and canaries stay untouched."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmtrain.cli import main
from ssmtrain.config.errors import UserError
from ssmtrain.data.prepare import load as load_prepared
from ssmtrain.data.prepare import prepare
from train.conftest import page

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "src" / "ssmtrain").rglob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
"""Modules that make objects, and so calls, out of bytes."""

CALLS = {
    "eval", "exec", "compile", "__import__", "execfile",
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "np.load", "numpy.load", "np.save", "numpy.save", "np.fromfile",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.full_load_all",
    "hydra.utils.instantiate", "instantiate", "hydra.utils.get_class", "hydra.utils.get_method",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile", "gzip.open", "bz2.open", "lzma.open",
    "dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object", "dist.scatter_object_list",
    "dist.send_object_list", "dist.recv_object_list",
    "importlib.import_module", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
"""Calls that unpickle, run text as code, import by a name, go through a shell, or unpack."""

OPTIONS = {"allow_pickle", "trust_remote_code", "shell", "weights_only"}
"""Options whose very presence means that someone thought about switching a guard off."""

ALLOWED: dict[str, set[str]] = {
    # The names stand in the verbs' table, and in this package's own folder of layers.
    "src/ssmtrain/cli.py": {"importlib.import_module"},
    "src/ssmtrain/layers/__init__.py": {"importlib.import_module"},
    "src/ssmtrain/doctor.py": {"importlib.import_module"},
    # Scripts of maintainers: modules of ours and of the peers they measure; the archive of the novels.
    "scripts/kernel_launches.py": {"importlib.import_module"},
    "scripts/kernel_peers.py": {"importlib.import_module"},
    "scripts/loss_compare_gpu.py": {"importlib.import_module"},
    "scripts/tune_kernels.py": {"importlib.import_module"},
    "scripts/make_corpus.py": {"tarfile.open"},
    # Beside which ours is timed, on files of its own.
    "scripts/bench_checkpoint.py": {"torch.load", "torch.save", "weights_only="},
}


def dangers(text: str) -> Iterator[str]:
    """What a module's source names of MODULES, CALLS and OPTIONS."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name in CALLS or name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            if name in CALLS or name.removeprefix("torch.distributed.") in {
                one.removeprefix("dist.") for one in CALLS if one.startswith("dist.")
            }:
                yield name
        elif isinstance(node, ast.keyword) and node.arg in OPTIONS:
            yield f"{node.arg}="


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_names_a_loader_that_runs_code(file: Path) -> None:
    found = set(dangers(file.read_text(encoding="utf-8")))
    assert found <= ALLOWED.get(str(file.relative_to(ROOT)), set())


def test_what_is_allowed_is_still_needed() -> None:
    for name, calls in ALLOWED.items():
        assert set(dangers((ROOT / name).read_text(encoding="utf-8"))) == calls, name


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\nx = torch.load(path)",
        "load = torch.load",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "f = exec",
        "from hydra.utils import instantiate",
        "subprocess.run(line, shell=True)",
        "torch.distributed.all_gather_object(a, b)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "x.load_state_dict(torch.load(p, weights_only=False))",
        "exec(compile(text, name, mode))",
    ],
)
def test_the_scan_sees(text: str) -> None:
    assert list(dangers(text))


def test_model_eval_is_no_eval() -> None:
    assert not list(dangers("model.eval()\nre.compile('x')\ntorch.compile(f)\nyaml.safe_load(text)"))


# Canaries: what would leave a file behind if it were opened as what it is.


class Payload:
    """Unpickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own, in which no canary may die."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSMTRAIN_RUN", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    yield tmp_path
    assert not (tmp_path / "owned").exists()


def test_the_canary_sings(folder: Path) -> None:
    """The payloads are live: torch and numpy, told to trust them, do what they say."""
    torch.save(Payload(), "model.pt")
    torch.load("model.pt", weights_only=False)
    assert (folder / "owned").exists()
    (folder / "owned").unlink()
    np.save("tokens.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.load("tokens.npy", allow_pickle=True)
    assert (folder / "owned").exists()
    (folder / "owned").unlink()


def archives(folder: Path) -> dict[str, Path]:
    """Packed and pickled things that someone may give as a text, each under an honest and a false name."""
    (folder / "inside.txt").write_text("text\n" * 100)
    made: dict[str, Path] = {}
    with tarfile.open(folder / "evil.tar", "w") as tar:
        for name in ("../evil.txt", "/tmp/evil.txt", "inside.txt"):
            tar.add(folder / "inside.txt", arcname=name)
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with zipfile.ZipFile(folder / "evil.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("../evil.txt", "x" * 10**6)
    torch.save(Payload(), folder / "evil.pt")
    np.save(folder / "evil.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    (folder / "evil.pkl").write_bytes(pickle.dumps(Payload()))
    for path in folder.glob("evil.*"):
        named = path.with_name(f"{path.suffix[1:]}.txt")
        named.write_bytes(path.read_bytes())
        made |= {path.name: path, named.name: named}
    return made


KINDS = {"evil.tar": "this is tar data", "tar.txt": "this is tar data", "evil.zip": "this is zip data"}


def test_archives_and_pickles_are_no_texts(folder: Path) -> None:
    for name, path in archives(folder).items():
        config = page(folder, data__train=str(path), data__val=str(folder / "text.txt"))
        with pytest.raises(UserError) as error:
            prepare(config)
        assert f"data.train: {path}:" in error.value.lines[0], name
        assert KINDS.get(name, "this is ") in error.value.lines[0], name
    assert not (folder / "evil.txt").exists() and not Path("/tmp/evil.txt").exists()


def test_a_tokenizer_that_is_a_pickle_or_a_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page(folder)
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Payload()))
    (folder / "tokenizer.py").write_text("open('owned', 'w')")
    (folder / "tokenization_evil.py").write_text("open('owned', 'w')")
    words = ["show", "config=quickstart"]
    for name in ("tokenizer.json", "tokenizer.py"):
        assert main([*words, "tokenizer.kind=file", f"tokenizer.path={name}"]) == 2
        assert "not a tokenizer.json" in capsys.readouterr().err


def test_code_beside_a_config_is_not_imported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "configs").mkdir()
    for name in ("ssmtrain_plugin.py", "sitecustomize.py", "conftest.py", "hydra_plugins.py", "mamba9.py"):
        (folder / name).write_text("open('owned', 'w')")
        (folder / "configs" / name).write_text("open('owned', 'w')")
    (folder / "configs" / "mine.yaml").write_text("defaults: [quickstart, _self_]\n")
    assert main(["show", "config=mine"]) == 0
    assert main(["show", "config=mine", "model.blocks.M.mixer.kind=mamba9"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"},
        {"dtype": "<f2"},
        {"dtype": "<i2"},
        {"shard_tokens": 0},
        {"splits": {"file": "../train-00000.bin"}},
        {"splits": {"file": "{}/train-00000.bin"}},
        {"splits": {"items": -1}},
        {"splits": {"items": 0}},
    ],
    ids=str,
)
def test_prepared_data_of_a_stranger(change: dict[str, Any], folder: Path) -> None:
    """A shared cache folder may be anyone's: its manifest names neither objects nor files elsewhere."""
    made = prepare(page(folder))
    assert load_prepared(made.folder) is not None
    # As large as the one it replaces: nothing but its name is wrong.
    shutil.copy(made.folder / "train-00000.bin", made.folder.parent)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    for key, value in change.items():
        if key == "splits":
            filled = {k: v.format(folder / "cache") if k == "file" else v for k, v in value.items()}
            manifest["splits"]["train"]["shards"][0].update(filled)
        else:
            manifest[key] = value
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_prepared(made.folder) is None


AUDIT = """
import sys
seen = []
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system") or (event == "exec" and "page.yaml" in str(arguments)):
        seen.append((event, arguments))
sys.addaudithook(hook)
from ssmtrain.cli import main
code = main(["generate", "run=runs/tiny", "--prompt", "it", "generate.max_tokens=2"])
classes = [a for e, a in seen if e == "pickle.find_class"]
print("CODE", code, "SEEN", seen, file=sys.stderr)
sys.exit(bool(seen) or code)
"""


def test_the_interpreter_sees_no_unpickling(folder: Path) -> None:
    """Python's own audit of a whole `generate`: no class is looked up for a pickle, no shell is called."""
    from ssmtrain.checkpoint import store
    from ssmtrain.checkpoint.records import write_config
    from ssmtrain.model.hybrid import HybridModel
    from ssmtrain.model.init import init_weights

    config = page(folder)
    model = HybridModel(config.model, 257)
    init_weights(model, config.model.init, 0)
    run = folder / "runs" / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    write_config(run, config)
    store.save(run / "checkpoints", 1, {"model": dict(model.state_dict())}, {"tokens": 1})
    line = [sys.executable, "-c", AUDIT]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SEEN []" in done.stderr
