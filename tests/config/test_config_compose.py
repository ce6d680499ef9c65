"""Pages, groups, kinds and words become the config that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmtrain.config.catalog import recipes, shipped
from ssmtrain.config.errors import UserError
from ssmtrain.config.load import config_hash, difference, load, load_run_config, to_yaml
from ssmtrain.config.task_rules import TASKS
from ssmtrain.layers.mamba1 import Mamba1Config

BASE = """\
# A base page.
defaults: [data: austen, tokenizer: bytes, optim: adamw, schedule: wsd, trainer: auto, _self_]
model:
  d_model: 64
  layout: M4AM5
  blocks:
    M: {mixer: {kind: mamba2, d_state: 16, head_dim: 16}}
    A: {mixer: {kind: attention, n_heads: 4}, ffn: {kind: mlp, hidden: 64}}
data: {seq_len: 256}
optim: {lr: 0.004, weight_decay: 0.2}
schedule: {warmup: 7, decay: 3}
trainer: {max_steps: 20, global_batch: 1024, accelerator: cpu}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def test_every_shipped_recipe_loads() -> None:
    for name in sorted(path.stem for path in shipped().glob("*.yaml")):
        config = load([f"config={name}"])
        assert config.recipe == name
        assert config.name == f"{name}-{config_hash(config)[:6]}"


def test_every_group_page_stands_alone(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"model": {"vocab": {"a": 0}}}')
    for page in sorted(shipped().glob("*/*.yaml")):
        words = [f"{page.parent.name}={page.stem}"]
        beside = {"text": "data.train=x.txt", "mix": "data.sources.own.train=x.txt", "hub": "data.path=x"}
        beside |= {"file": f"tokenizer.path={tokenizer}", "ids": "data=parity"}
        beside |= dict.fromkeys(TASKS, "tokenizer=ids")
        words += [beside[page.stem]] if page.stem in beside else []
        config = load(["config=base.yaml", *words])
        if hasattr(getattr(config, page.parent.name, None), "kind"):
            assert getattr(config, page.parent.name).kind in (page.stem, "embedded")


def test_words_set_what_the_page_leaves_open(folder: Path) -> None:
    config = load(
        ["config=base.yaml", "optim.clip=null", "+trainer.micro_batch=2", "++seed=3", "~schedule.decay"]
    )
    assert (config.optim.clip, config.trainer.micro_batch, config.seed) == (None, 2, 3)
    assert config.schedule.decay == 0.2


def test_values_keep_their_types(folder: Path) -> None:
    words = ["name=2026", "optim.lr=1e-3", "optim.betas=[0.8,0.99]", "model.blocks.A.norm=post"]
    config = load(["config=base.yaml", *words])
    assert config.name == "2026"
    assert config.optim.lr == 0.001
    assert config.optim.betas == (0.8, 0.99)
    assert config.model.blocks["A"].norm == "post"


@pytest.mark.parametrize(
    "value", ["~/texts/a#1.txt", "a b.txt", "texts/*.txt", "'quoted (1).txt'", "x@y:z", "ü.txt"]
)
def test_paths_need_no_second_quoting(folder: Path, value: str) -> None:
    config = load(["config=base.yaml", "data=text", f"data.train={value}"])
    assert config.data.train == value.strip("'")


@pytest.mark.parametrize("formula", ["(M2A)3M", "M4AM5", "ratio(10, 2)", "M (MA)4 M", "'M4AM5'"])
def test_layouts_need_no_quoting(folder: Path, formula: str) -> None:
    assert load(["config=base.yaml", f"model.layout={formula}"]).model.layout == formula.strip("'")


def test_a_kind_takes_its_siblings_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["config=base.yaml", "model.blocks.M.mixer.kind=mamba1"])
    assert config.model.blocks["M"].mixer == Mamba1Config()
    told = capsys.readouterr().err
    assert "model.blocks.M.mixer.kind changes from mamba2 to mamba1" in told
    assert "dropped d_state=16, head_dim=16" in told


def test_what_the_line_gives_stays_beside_a_new_kind(folder: Path) -> None:
    words = ["model.blocks.M.mixer.d_state=8", "model.blocks.M.mixer.kind=mamba1"]
    for order in (words, words[::-1]):
        assert load(["config=base.yaml", *order]).model.blocks["M"].mixer == Mamba1Config(d_state=8)
    whole = load(["config=base.yaml", "model.blocks.M.mixer={kind: mamba1, d_state: 8}"])
    assert whole.model.blocks["M"].mixer == Mamba1Config(d_state=8)


def test_the_same_kind_drops_nothing(folder: Path) -> None:
    config = load(["config=base.yaml", "model.blocks.M.mixer.kind=mamba2", "optim=adamw"])
    assert config == load(["config=base.yaml"])


@pytest.mark.parametrize("word", ["optim=muon", "optim.kind=muon", "optim={kind: muon}"])
def test_another_optimiser_leaves_the_old_ones_numbers(folder: Path, word: str) -> None:
    config = load(["config=base.yaml", word, "optim.weight_decay=0.3"])
    assert (config.optim.kind, config.optim.lr, config.optim.weight_decay) == ("muon", 1e-3, 0.3)


def test_a_group_swapped_for_the_default_kind_drops_too(folder: Path) -> None:
    page = BASE.replace("optim: adamw", "optim: muon").replace("weight_decay: 0.2", "momentum: 0.9")
    (folder / "muon.yaml").write_text(page)
    assert load(["config=muon.yaml"]).optim.momentum == 0.9
    optim = load(["config=muon.yaml", "optim=adamw"]).optim
    assert (optim.kind, optim.lr) == ("adamw", 1e-3)


def test_a_slot_without_a_kind_has_the_default_one(folder: Path) -> None:
    page = BASE.replace("defaults: [", "#")
    (folder / "bare.yaml").write_text(page)
    config = load(["config=bare.yaml"])
    assert (config.optim.kind, config.optim.lr, config.data.kind) == ("adamw", 0.004, "embedded")
    assert load(["config=bare.yaml", "optim.kind=muon"]).optim.lr == 1e-3


@pytest.mark.parametrize("word", ["schedule=cosine", "schedule.kind=cosine"])
def test_what_all_kinds_share_stays(folder: Path, word: str) -> None:
    schedule = load(["config=base.yaml", word]).schedule
    assert (schedule.kind, schedule.warmup, schedule.floor) == ("cosine", 7, 0.1)
    data = load(["config=base.yaml", "data=text", "data.train=x.txt"]).data
    assert (data.kind, data.seq_len) == ("text", 256)


def test_a_group_on_the_line_wins_over_the_page(folder: Path) -> None:
    (folder / "configs" / "trainer").mkdir(parents=True)
    (folder / "configs" / "trainer" / "mine.yaml").write_text("max_steps: 15\naccelerator: auto\n")
    trainer = load(["config=base.yaml", "trainer=mine"]).trainer
    assert (trainer.max_steps, trainer.accelerator, trainer.global_batch) == (15, "auto", 1024)
    assert load(["config=base.yaml", "trainer=mine", "trainer.max_steps=16"]).trainer.max_steps == 16


def test_a_page_extends_a_shipped_one(folder: Path) -> None:
    (folder / "mine.yaml").write_text(
        "defaults: [quickstart, _self_]\n"
        "model: {blocks: {M: {mixer: {kind: mamba1, d_state: 8}}}}\n"
        "optim: {lr: 0.005}\n"
    )
    mine, shipped_one = load(["config=mine.yaml"]), load(["config=quickstart"])
    assert mine.model.blocks["M"].mixer == Mamba1Config(d_state=8)
    assert (mine.optim.lr, mine.recipe) == (0.005, "mine")
    assert mine.model.layout == shipped_one.model.layout
    assert mine.trainer == shipped_one.trainer


def test_the_users_folder_is_searched_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder / "own"
    own.mkdir()
    (own / "quickstart.yaml").write_text(BASE)
    (own / "optim").mkdir()
    (own / "optim" / "adamw.yaml").write_text("kind: adamw\neps: 1.0e-6\n")
    monkeypatch.setenv("SSMTRAIN_CONFIGS", str(own))
    config = load(["config=quickstart"])
    assert (config.model.d_model, config.optim.eps) == (64, 1e-6)
    assert recipes()["quickstart"] == own / "quickstart.yaml"
    assert recipes()["granite_9to1"] == shipped() / "granite_9to1.yaml"


def test_an_open_group_is_filled_by_the_line(folder: Path) -> None:
    (folder / "open.yaml").write_text(BASE.replace("optim: adamw", "optim: ???"))
    with pytest.raises(UserError, match=r"in quotes"):
        load(["config=open.yaml"])
    (folder / "open.yaml").write_text(BASE.replace("optim: adamw", "optim: '???'"))
    with pytest.raises(UserError, match=r"You must specify 'optim', e.g, optim=<OPTION>"):
        load(["config=open.yaml"])
    assert load(["config=open.yaml", "optim=muon"]).optim.kind == "muon"


def test_references_are_filled_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    page = BASE.replace("d_model: 64", "d_model: ${model.blocks.A.ffn.hidden}").replace(
        "M: {mixer: {kind: mamba2, d_state: 16, head_dim: 16}}",
        "M: {mixer: {kind: mamba2, d_state: 16, head_dim: 16}, ffn: '${..A.ffn}'}",
    )
    (folder / "refs.yaml").write_text(page + "name: ${oc.env:USER}-1\n")
    config = load(["config=refs.yaml", "model.blocks.A.ffn.hidden=128"])
    assert (config.model.d_model, config.name) == (128, "ada-1")
    assert config.model.blocks["M"].ffn == config.model.blocks["A"].ffn
    below = load(["config=refs.yaml", "model.blocks.A.mixer.n_heads=2"])
    assert below.model.blocks["A"].mixer.n_heads == 2


def test_a_word_below_a_reference_changes_only_its_own(folder: Path) -> None:
    page = BASE.replace("head_dim: 16}}", "head_dim: 16}, ffn: '${model.blocks.A.ffn}'}")
    (folder / "refs.yaml").write_text(page)
    config = load(["config=refs.yaml", "model.blocks.M.ffn.hidden=32"])
    assert (config.model.blocks["M"].ffn.hidden, config.model.blocks["A"].ffn.hidden) == (32, 64)


def test_the_resolved_config_is_a_page(folder: Path) -> None:
    for words in (
        ["config=base.yaml"],
        ["config=base.yaml", "optim=muon", "name=mine/arm"],
        ["config=jamba_mini"],
    ):
        config = load(words)
        (folder / "resolved.yaml").write_text(to_yaml(config))
        again = load(["config=resolved.yaml"])
        assert again == config
        assert to_yaml(again) == to_yaml(config)


def test_a_run_has_its_config(folder: Path) -> None:
    config = load(["config=base.yaml", "name=first"])
    run = folder / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    for where in ("first", "runs/first", "runs/first/config.yaml", str(run)):
        assert load_run_config(where) == config
    assert load_run_config("first", ["generate.temperature=0"]).generate.temperature == 0
    assert load(["config=runs/first"]) == config
    with pytest.raises(UserError, match=r"runs here: first"):
        load_run_config("frist")
    with pytest.raises(UserError, match="did you mean"):
        load_run_config("first", ["generate.temprature=0"])
    with pytest.raises(UserError, match="not both"):
        load_run_config("first", ["config=base.yaml"])


def test_the_name_follows_what_is_learned(folder: Path) -> None:
    base = load(["config=base.yaml"])
    free = [
        "trainer.max_steps=30",
        "trainer.devices=1",
        "logger=wandb",
        "trainer.log_every=1",
        "generate.top_k=5",
    ]
    assert load(["config=base.yaml", *free]).name == base.name
    for word in (
        "optim.lr=1",
        "seed=1",
        "trainer.global_batch=2048",
        "model.layout=M5AM4",
        "trainer.precision=bf16",
    ):
        assert load(["config=base.yaml", word]).name != base.name


def test_differences_are_named(folder: Path) -> None:
    old = load(["config=base.yaml", "name=x"])
    new = load(
        [
            "config=base.yaml",
            "name=x",
            "optim.lr=0.1",
            "model.blocks.A.ffn=null",
            "model.tie_embeddings=false",
        ]
    )
    assert difference(old, old) == []
    lines = difference(old, new)
    assert "optim.lr: 0.004 -> 0.1" in lines
    assert "model.tie_embeddings: true -> false" in lines
    assert "model.blocks.A.ffn.hidden: 64 -> null" in lines


def test_a_file_in_the_folder_is_hinted_at(folder: Path) -> None:
    for word, said in (
        ("config=base", r"type config=./base.yaml"),
        ("config=quikstart", "did you mean config=quickstart"),
        ("config=nowhere/x.yaml", "no such file"),
        ("config=~nobody-of-this-name/x.yaml", "no such file"),
        ("config=.", "no such recipe"),
        ("config=./", "a folder, not a page"),
    ):
        with pytest.raises(UserError, match=said):
            load([word])


def test_merge_keys_and_anchors_work(folder: Path) -> None:
    page = BASE.replace("    A: {mixer", "    A: {<<: *m, mixer").replace(
        "    M: {mixer", "    M: &m {norm: post, mixer"
    )
    (folder / "anchors.yaml").write_text(page)
    assert load(["config=anchors.yaml"]).model.blocks["A"].norm == "post"


def test_a_layout_on_the_line_may_do_without_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["config=quickstart", "model.layout=M10"])
    assert set(config.model.blocks) == {"M"}
    assert "left out blocks that are not in it: A" in capsys.readouterr().err
    assert set(load(["config=quickstart", "model.layout=M9A"]).model.blocks) == {"M", "A"}
    assert load(["config=quickstart", "model.layout=M10", "model.blocks.A.mixer.n_heads=2"]) == config
    with pytest.raises(UserError, match="X is not one of the blocks"):
        load(["config=quickstart", "model.layout=M9X"])
