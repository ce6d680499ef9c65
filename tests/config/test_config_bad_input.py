"""The bad-input table: every wrong page or word ends as a UserError that says where, what, and what was meant."""

# One case a line, however long.
# ruff: noqa: E501

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.load import load, to_yaml

GOOD = """\
model:
  d_model: 64
  n_layers: 10
  layout: M4AM5
  blocks:
    M: {mixer: {kind: mamba2, d_state: 16, head_dim: 16}}
    A: {mixer: {kind: attention, n_heads: 4}, ffn: {kind: mlp, hidden: 64}}
optim: {kind: adamw, lr: 0.001}
schedule: {kind: wsd, warmup: 0.1}
trainer: {max_steps: 20, global_batch: 1024}
data: {kind: embedded, seq_len: 128}
"""


def swap(old: str, new: str) -> str:
    """The good page with one piece replaced."""
    assert old in GOOD, old
    return GOOD.replace(old, new)


def plus(line: str) -> str:
    """The good page with a line more."""
    return f"{GOOD}{line}\n"


@dataclass
class Case:
    """One wrong input: its number in the catalogue, page, words after it, what the message must say."""

    number: str
    page: str | bytes
    says: tuple[str, ...]
    words: tuple[str, ...] = ()


def case(number: str, page: str | bytes, *says: str, words: tuple[str, ...] = ()) -> Case:
    return Case(number, page, says, words)


def mix(a: str = "weight: 1", b: str = "weight: 1", phase: str = "") -> str:
    """The good page on two sources."""
    sources = f"{{a: {{kind: text, train: a.txt, {a}}}, b: {{kind: text, train: b.txt, {b}}}}}"
    phases = f", phases: [{phase}]" if phase else ""
    return swap("{kind: embedded, seq_len: 128}", f"{{kind: mix, seq_len: 128, sources: {sources}{phases}}}")


def word(number: str, *words_and_says: str) -> Case:
    """The good page with one word on the line."""
    return Case(number, GOOD, words_and_says[1:], (words_and_says[0],))


MOE = "{kind: moe, n_experts: 4, top_k: 2, hidden: 32}"

# Left out of entries 1 to 38, because what they would break does not exist: 20 (a power of two and at most
# 256 states are limits of fused kernels; the reference takes any positive number), 27 (expert parallelism)
# and the int32 half of 29 (a limit of fused kernels; torch indexes with 64 bits).
CASES = [
    case("1 empty", "", "page.yaml: the config is empty"),
    case("1 only comments", "# nothing\n\n", "the config is empty"),
    case("2 top level a list", "- model\n- data\n", "expected a mapping", "found a list"),
    case("2 top level a word", "quickstart\n", "expected a mapping", "'quickstart'"),
    case("3 tab", "model:\n\td_model: 64\n", "page.yaml:2:1", "tab", "spaces"),
    case("4 duplicate key", plus("optim: {kind: muon}"), "'optim' stands twice", "lines 8 and 12"),
    case("4 duplicate deep key", swap("d_state: 16", "d_state: 16, d_state: 32"), "'d_state' stands twice"),
    case("5 latin-1", GOOD.encode() + b"# caf\xe9\n", "not UTF-8", "save it as UTF-8"),
    case("5 UTF-16", GOOD.encode("utf-16"), "not UTF-8"),
    case("6 unknown key", swap("lr: 0.001", "learning_rte: 0.001"), "optim.learning_rte", "did you mean `optim.lr`"),
    case("6 typo", swap("d_state: 16", "d_stat: 16"), "model.blocks.M.mixer.d_stat", "did you mean `d_state`?"),
    case("6 other spelling", swap("head_dim: 16", "headdim: 16"), "mixer.headdim = 16", "did you mean `head_dim`?"),
    case("6 wrong place", swap("lr: 0.001", "max_steps: 5"), "optim.max_steps", "did you mean `trainer.max_steps`?"),
    case("6 top level", plus("optimizer: {lr: 1}"), "optimizer", "no such key", "`optim`"),
    word("6 word", "optim.lrr=3", "optim.lrr = 3", "did you mean `lr`?"),
    case("7 text for a number", swap("lr: 0.001", 'lr: "3e-4"'), "optim.lr = '3e-4'", "number", "without quotes"),
    case("8 nan", swap("lr: 0.001", "lr: .nan"), "optim.lr = nan", "expected a number above 0"),
    word("8 nan word", "optim.lr=nan", "optim.lr = nan", "expected a number above 0"),
    case("9 inf", swap("lr: 0.001", "lr: .inf"), "optim.lr = inf", "expected a number above 0"),
    word("10 negative", "optim.lr=-1", "optim.lr = -1: expected a number above 0"),
    case("11 float steps", swap("max_steps: 20", "max_steps: 1e3"), "max_steps = 1000.0", "whole number", "write 1000"),
    word("12 zero", "trainer.max_steps=0", "trainer.max_steps = 0: expected a whole number above 0"),
    word("12 negative", "trainer.max_steps=-5", "trainer.max_steps = -5", "above 0"),
    case("13 octal", swap("global_batch: 1024", "global_batch: 010"), "page.yaml:10", "010", "octal", "write 10"),
    word("13 octal word", "trainer.global_batch=010", "global_batch = '010'", "write 10", "octal"),
    case("14 base 60", swap("max_steps: 20", "max_seconds: 12:30:00"), "12:30:00", "base-60", "write seconds"),
    case("15 on", plus("on: true"), "page.yaml:12", "the key on reads as a boolean", "'on' in quotes"),
    case("15 no", swap("    M: {", "    no: {"), "the key no reads as a boolean"),
    case("17 zero width", swap("d_model: 64", "d_model: 0"), "model.d_model = 0: expected a whole number above 0"),
    case("18 heads", swap("n_heads: 4", "n_heads: 6"), "model.blocks.A.mixer.n_heads = 6", "d_model = 64"),
    case("18 kv heads", swap("n_heads: 4}", "n_heads: 4, n_kv_heads: 3}"), "A.mixer.n_kv_heads = 3", "divide"),
    case("19 head_dim", swap("head_dim: 16", "head_dim: 24"), "model.blocks.M.mixer.head_dim = 24", "128"),
    case("20 no states", swap("d_state: 16", "d_state: 0"), "M.mixer.d_state = 0", "above 0"),
    case("21 chunk_size", swap("d_state: 16", "d_state: 16, chunk_size: -1"), "M.mixer.chunk_size = -1", "above 0"),
    case("22 unknown letter", swap("M4AM5", "MMMMMMMMMX"), "model.layout", "X is not one of the blocks (M, A)"),
    case("22 small letter", swap("M4AM5", "m4am5"), "model.layout", "unexpected 'm'"),
    case("22 unbalanced", swap("M4AM5", '"(M4A"'), "a ( without its )"),
    case("22 no", swap("M4AM5", "No"), "No is refused", "YAML reads it as false"),
    case("23 depth", swap("n_layers: 10", "n_layers: 25"), "10 layers", "n_layers = 25", "work: 20 or 30"),
    word("23 ratio", "model.layout=ratio(24,2)", "24 layers", "n_layers = 10", "work: 24"),
    word("23 too many", "model.layout=ratio(10,9)", "at most 8 of 10 layers can be A"),
    case("24 unused block", swap("M4AM5", "M"), "model.blocks.A", "has no A", "would be ignored", "~model.blocks.A"),
    case("25 depth", swap("n_layers: 10", "n_layers: 1000000"), "model.n_layers = 1000000", "parameters", "TiB"),
    case("25 count", swap("M4AM5", "M99999999999"), "model.layout", "at most 4096"),
    case("26 top_k", swap("{kind: mlp, hidden: 64}", MOE.replace("top_k: 2", "top_k: 9")), "top_k = 9", "n_experts (4)"),
    case("28 seq_len", swap("seq_len: 128", "seq_len: 1"), "data.seq_len = 1", "at least 2"),
    case("29 seq_len over the batch", swap("seq_len: 128", "seq_len: 4096"), "global_batch = 1024", "nearest are 4096"),
    word("30 batch", "trainer.global_batch=1000", "trainer.global_batch = 1000", "data.seq_len = 128", "896 or 1024"),
    case("30 shares", swap("max_steps: 20", "max_steps: 20, devices: 3, micro_batch: 2"), "multiple", "768 or 1536"),
    case("31 vocab", swap("d_model: 64", "d_model: 64\n  vocab_size: 256"), "model.vocab_size = 256", "at least 257"),
    case("32 dt", swap("d_state: 16", "d_state: 16, dt_min: 0.2"), "M.mixer.dt_min = 0.2", "dt_max"),
    case("33 dt_min", swap("d_state: 16", "d_state: 16, dt_min: 0.0"), "M.mixer.dt_min = 0.0", "above 0"),
    case("34 A_range", swap("d_state: 16", "d_state: 16, A_range: [0, 16]"), "M.mixer.A_range[0] = 0", "above 0"),
    word("35 fp8", "trainer.precision=fp8", "trainer.precision = 'fp8'", "expected one of fp32, bf16"),
    word("36 fp16", "trainer.precision=fp16", "trainer.precision = 'fp16'", "did you mean"),
    word("37 strategy", "parallel.kind=deepspeed_stage_9", "parallel.kind = 'deepspeed_stage_9'", "auto, ddp"),
    case("38 two strategies", plus("parallel: [ddp, auto]"), "parallel = ['ddp', 'auto']", "expected a mapping"),
    case("39 refers to itself", swap("d_model: 64", "d_model: ${model.d_model}"), "model.d_model", "refers to itself"),
    case("40 two in a ring", plus("name: ${runs_dir}\nruns_dir: ${name}"), "refers to itself", "->"),
    case("41 refers to nothing", swap("d_model: 64", "d_model: ${model.width}"), "refers to model.width", "not set"),
    case("42 left open", swap("{kind: adamw, lr: 0.001}", "{kind: adamw, lr: '???'}"), "optim.lr", "optim.lr=…"),
    case("43 environment", plus("name: ${oc.env:AWS_SECRET_ACCESS_KEY}"), "name", "AWS_SECRET_ACCESS_KEY", "allowed"),
    case("43 secret of slurm", plus("name: ${oc.env:SLURM_JWT}"), "SLURM_JWT", "may not be read"),
    case("43 resolver", plus("name: ${oc.create:x}"), "oc.create", "refused"),
    case("43 with a default", plus("name: '${oc.env:AWS_SECRET_ACCESS_KEY,x}'"), "AWS_SECRET_ACCESS_KEY", "may not be read"),
    case("43 nested", plus("name: '${oc.env:${recipe}}'"), "name", "not nested ones"),
    case("43 defaults", f"defaults: [optim: '${{oc.env:AWS_SECRET_ACCESS_KEY}}', _self_]\n{GOOD}", "defaults list", "are refused"),
    case("43 defaults of a key", f"defaults: ['${{oc.env:AWS_SECRET_ACCESS_KEY}}': a, _self_]\n{GOOD}", "defaults list", "are refused"),
    word("43 word", "name='${oc.env:AWS_SECRET_ACCESS_KEY}'", "AWS_SECRET_ACCESS_KEY", "may not be read"),
    case("44 target", swap("lr: 0.001", "_target_: os.system"), "optim._target_", "choose a component by its `kind`"),
    case("45 target that opens", plus("logger: {_target_: builtins.open, file: owned, mode: w}"), "logger._target_", "`kind`"),
    case("46 target that unpickles", swap("kind: attention,", "kind: attention, _target_: torch.load,"), "A.mixer._target_"),
    case("47 nested target", swap("d_state: 16", "x: [{_target_: torch.load}]"), "mixer.x.0._target_", "`kind`"),
    case("48 partial", swap("lr: 0.001", "_partial_: true"), "optim._partial_", "`kind`"),
    case("48 args", plus("_args_: [1]"), "_args_", "`kind`"),
    case("48 recursive", swap("d_model: 64", "d_model: 64\n  _recursive_: false"), "model._recursive_", "`kind`"),
    word("48 convert on the line", "model.init._convert_=all", "model.init._convert_", "`kind`"),
    word("48 target on the line", "+optim._target_=os.system", "optim._target_", "`kind`"),
    case("49 tag", plus("name: !!python/object/apply:os.system [id]"), "page.yaml:12", "tag", "refused"),
    case("49 tag of a key", plus("!!python/name:os.system x: 1"), "page.yaml:12", "a key must be a plain word"),
    case("49 tag of one's own", plus("name: !include /etc/passwd"), "page.yaml:12", "the tag !include is refused"),
    case("50 alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdef", "bcdefg")), "aliases"),
    case("50 many aliases", "a: &a x\nb: [" + "*a, " * 65 + "]\n", "more than 64 aliases"),
    case("50 merged aliases", "a: &a {x: 1}\nb: {<<: [" + "*a, " * 65 + "]}\n", "more than 64 aliases"),
    case("50 reference bomb", "a0: xxxxxxxxxx\n" + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 9}'\n" for i in range(1, 12)),
        "grow too large"),
    case("50 reference bomb of mappings", "a0: {x: 1}\n" + "".join(
        f"a{i}: {{x: '${{a{i - 1}}}', z: '${{a{i - 1}}}'}}\n" for i in range(1, 40)), "grow too large"),
    case("51 deep", "a: " + "[" * 10_000, "nested deeper than 32"),
    case("51 deep mappings", "".join(f"{' ' * i}a:\n" for i in range(40)), "nested deeper than 32"),
    word("51 deep word", "data.include=" + "[" * 500 + "]" * 500, "data.include=[[[", "nested too deeply"),
    word("51 deep key", ".".join(["a"] * 2000) + "=1", "a.a.a", "nested too deeply"),
    case("52 large", b"# " + b"x" * 2**20, "larger than 1 MiB"),
    case("53 defaults ring", f"defaults: [page, _self_]\n{GOOD}", "defaults list"),
    case("54 defaults outside", f"defaults: [../../../../etc/passwd, _self_]\n{GOOD}", "etc/passwd"),
    case("55 backslash", f"defaults: ['..\\\\secret', _self_]\n{GOOD}", "secret"),
    case("56 hydra", plus("hydra: {run: {dir: /}}"), "hydra", "no such key"),
    word("56 hydra word", "hydra.searchpath=[file:///etc]", "hydra", "no such key"),
    case("56 NUL in a path", plus('runs_dir: "a\\0b"'), "runs_dir", "NUL"),
    case("56 NUL in a resume", plus('resume: "a\\0b"'), "resume", "NUL"),
    case("56 NUL in the tokenizer", plus('tokenizer: {kind: file, path: "a\\0b"}'), "tokenizer.path", "NUL"),
    case("57 name outside", plus("name: ../../x"), "name = '../../x'", "expected letters"),
    case("57 name long", plus(f"name: {'x' * 300}"), "name = ", "at most 100"),
    case("57 name newline", plus('name: "a\\nb"'), r"name = 'a\nb'", "expected letters"),
    case("57 name NUL", plus('name: "a\\0b"'), "name = ", "expected letters"),
    case("57 name emoji", plus("name: 🐍"), "name = ", "expected letters"),
    case("58 api key", plus("logger: {kind: wandb, api_key: 0123456789}"), "logger.api_key", "does not belong"),
    case("58 token", plus("logger: {kind: wandb, project: hf_abcdefghijklmnopqrst}"), "logger.project", "secret"),
    word("58 word", "logger.password=hunter2", "logger.password", "does not belong"),
    case("58 the environment's", plus("logger: {kind: wandb, entity: canary-of-aws-0}"), "logger.entity", "secret in the environment"),
    case("58 signed token", plus(f"generate: {{prompt: eyJ{'a' * 10}.eyJ{'b' * 10}.c}}"), "generate.prompt", "secret"),
    case("58 wandb key", plus("logger: {kind: wandb, wandb_api_key: hunter2}"), "logger.wandb_api_key", "does not belong"),
    word("59 sweep", "optim.lr=1e-3,2e-3", "--multirun"),
    word("60 empty axis", "optim.lr=choice()", "optim.lr=choice()"),
    case("61 warmup", swap("warmup: 0.1", "warmup: 21"), "schedule.warmup = 21", "20 steps"),
    case("61 decay", swap("warmup: 0.1", "warmup: 10, decay: 15"), "schedule.decay = 15", "20 steps"),
    word("62 never saves", "trainer.save_every=0", "trainer.save_every = 0", "above 0"),
    word("62 keeps none", "trainer.keep_last=1", "trainer.keep_last = 1", "at least 2"),
    word("63 seed", "seed=-1", "seed = -1", "at least 0"),
    word("63 large seed", "seed=18446744073709551616", "seed = 18446744073709551616", "below 2^63"),
    case("64 beta", swap("lr: 0.001", "betas: [1.0, 0.95]"), "optim.betas[0] = 1.0", "below 1"),
    case("64 three betas", swap("lr: 0.001", "betas: [0.9, 0.95, 0.99]"), "optim.betas", "a list of 2"),
    case("65 null", swap("d_model: 64", "d_model: null"), "model.d_model = null", "whole number"),
    case("65 missing", swap("  d_model: 64\n", ""), "model.d_model is missing", "whole number"),
    case("90 negative weight", mix("weight: -1"), "data.sources.a.weight = -1: expected a number at least 0"),
    case("90 weight that is no number", mix("weight: .nan"), "data.sources.a.weight = nan: expected a number at least 0"),
    case("90 weight without end", mix("weight: .inf"), "data.sources.a.weight = inf: expected a number at least 0"),
    case("90 weight as text", mix("weight: '2'"), "data.sources.a.weight = '2'", "write it without quotes"),
    case("90 weights of nothing", mix("weight: 0", "weight: 0"), "data: from row 0 on no source has a weight above 0"),
    case("90 phase of nothing", mix(phase="{from_step: 5, weights: {a: 0, b: 0}}"), "data: from row 40 on no source has a weight above 0"),
    case("90 unknown source", mix(phase="{from_step: 5, weights: {a: 1, b: 1, c: 1}}"), "data.phases[0].weights.c: there is no such source; expected a, b"),
    case("90 source left out", mix(phase="{from_step: 5, weights: {a: 1}}"), "data.phases[0].weights.b is missing", "0 to leave the source out"),
    case("90 negative weight in a phase", mix(phase="{from_step: 5, weights: {a: 1, b: -1}}"), "data.phases[0].weights.b = -1: expected a number at least 0"),
    case("90 no sources", swap("{kind: embedded, seq_len: 128}", "{kind: mix, seq_len: 128, sources: {}}"), "data.sources is empty"),
    case("kind unknown", swap("kind: mamba2", "kind: mamba4"), "mixer.kind = 'mamba4'", "mamba1", "did you mean mamba"),
    case("kind missing", swap("kind: mamba2, ", ""), "model.blocks.M.mixer.kind is missing", "attention, mamba1"),
    case("of another kind", swap("hidden: 64", "hidden: 64, top_k: 2"), "A.ffn.top_k = 2", "no such key of mlp; it is a key of moe"),
    case("empty block", swap("{mixer: {kind: mamba2, d_state: 16, head_dim: 16}}", "{norm: post}"), "neither a mixer"),
    case("block name", swap("    A: {", "    Att: {"), "model.blocks.Att", "one capital letter"),
    case("bool for int", swap("d_model: 64", "d_model: true"), "model.d_model = true", "whole number"),
    case("yes for bool", swap("d_model: 64", "d_model: 64\n  tie_embeddings: yes"), "tie_embeddings = 'yes'", "write true"),
    case("list for a mapping", swap("{kind: adamw, lr: 0.001}", "[adamw]"), "optim = ['adamw']", "kind is one of adamw"),
    case("two documents", f"{GOOD}---\n{GOOD}", "second document"),
    case("not YAML", GOOD + "]\n", "page.yaml:12:1"),
    case("control character", GOOD + "name: \x07\n", "page.yaml", "not allowed"),
    case("ignored val_fraction", swap("{kind: embedded, seq_len: 128}",
        "{kind: text, train: a, val: b, val_fraction: 0.2, seq_len: 128}"), "data.val_fraction", "no effect"),
    case("Muon over parts of matrices", swap("{kind: adamw, lr: 0.001}", "{kind: muon, lr: 0.001}") + "parallel: {kind: fsdp}\n",
        "parallel.kind = fsdp", "parallel=ddp or optim=adamw"),
    case("graphs of messages", swap("global_batch: 1024", "global_batch: 1024, cuda_graphs: true") + "parallel: {kind: fsdp}\n",
        "parallel.kind = fsdp", "trainer.cuda_graphs=false"),
    case("cache of nothing", swap("global_batch: 1024", "global_batch: 1024, accelerator: cpu, kernel_cache: there"),
        "trainer.kernel_cache = 'there'", "no effect with trainer.accelerator=cpu"),
    case("tried alone", swap("global_batch: 1024", "global_batch: 1024, micro_batch: auto") + "parallel: {kind: fsdp}\n",
        "trainer.micro_batch = auto", "parallel=ddp"),
    case("tried in a graph", swap("global_batch: 1024", "global_batch: 1024, micro_batch: auto, cuda_graphs: true"),
        "trainer.micro_batch = auto", "give a number"),
    case("a step that is taken already", swap("global_batch: 1024", "global_batch: 1024, spikes: {}") + "parallel: {kind: deepspeed_zero2}\n",
        "trainer.spikes", "parallel=fsdp or parallel=ddp"),
    case("Muon in pieces", swap("{kind: adamw, lr: 0.001}", "{kind: muon, lr: 0.001}") + "parallel: {kind: deepspeed_zero2}\n",
        "parallel.kind = deepspeed_zero2", "parallel=ddp or optim=adamw"),
    case("graphs under DeepSpeed", swap("global_batch: 1024", "global_batch: 1024, cuda_graphs: true") + "parallel: {kind: deepspeed_zero1}\n",
        "parallel.kind = deepspeed_zero1", "trainer.cuda_graphs=false"),
    case("a compiler beside gathering", swap("global_batch: 1024", "global_batch: 1024, compile: true") + "parallel: {kind: deepspeed_zero3}\n",
        "parallel.kind = deepspeed_zero3", "parallel=fsdp or deepspeed_zero2"),
    case("parameters that are not cut", plus("parallel: {kind: deepspeed_zero2, offload_params: true}"), "parallel.offload_params", "a key of deepspeed_zero3"),
    case("no such group page", f"defaults: [optim: sgd, _self_]\n{GOOD}", "names optim/sgd, which does not exist; there is adamw, muon"),
    word("no such option", "schedule=cosin", "schedule=cosin", "did you mean schedule=cosine?"),
    word("no equals sign", "optim.lr", "'optim.lr' is not key=value", "optim.lr=…"),
    word("star", "texts/a.txt", "is not key=value", "quotes"),
    word("not a key", "a b=3", "'a b' is not a key"),
    word("open quote", "name='abc", "name='abc", "a ' is not closed"),
    word("open bracket", "data.include=[a,b", "[ and ] do not match"),
    word("delete nothing", "~optim.weight", "optim.weight is not set"),
    word("several layouts", "model.layout=M,M4AM5", "--multirun"),
    case("twice", GOOD, "optim.lr is given twice", words=("optim.lr=1", "optim.lr=2")),
    word("two configs", "config=quickstart", "config= is given twice"),
    word("tokenizer file", "tokenizer={kind: file, path: nowhere.json}", "tokenizer.path = 'nowhere.json'", "no such file"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-aws-0")
    return tmp_path


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.number)
def test_wrong_input_is_told(one: Case, folder: Path) -> None:
    page = one.page if isinstance(one.page, bytes) else one.page.encode()
    (folder / "page.yaml").write_bytes(page)
    with pytest.raises(UserError) as caught:
        load(["config=page.yaml", *one.words])
    text = "\n".join(caught.value.lines)
    for part in one.says:
        assert part in text, text
    assert "canary" not in text and "hunter2" not in text and "hf_abc" not in text
    assert all("\n" not in line and len(line) < 500 for line in caught.value.lines), text
    assert os.listdir(folder) == ["page.yaml"]


def test_what_the_environment_may_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    (folder / "page.yaml").write_text(plus("name: job-${oc.env:SLURM_JOB_ID}"))
    assert load(["config=page.yaml"]).name == "job-42"


def test_the_good_page_is_good(folder: Path) -> None:
    (folder / "page.yaml").write_text(GOOD)
    assert load(["config=page.yaml"]).model.d_model == 64


@pytest.mark.parametrize("name", ["my page", "é", "_x", "." * 3, "p" * 200])
def test_the_run_of_a_page_can_be_continued_whatever_the_page_is_called(name: str, folder: Path) -> None:
    (folder / f"{name}.yaml").write_text(GOOD)
    config = load([f"config=./{name}.yaml"])
    (folder / "config.yaml").write_text(to_yaml(config))
    assert load(["config=./config.yaml"]).name == config.name and len(config.name or "") < 101


def test_16_underscores_in_numbers_are_allowed(folder: Path) -> None:
    (folder / "page.yaml").write_text(swap("global_batch: 1024", "global_batch: 1_024"))
    assert load(["config=page.yaml"]).trainer.global_batch == 1024
    assert load(["config=page.yaml", "trainer.global_batch=2_048"]).trainer.global_batch == 2048


def test_every_problem_has_its_line(folder: Path) -> None:
    (folder / "page.yaml").write_text(
        swap("lr: 0.001", "lrr: 1, beta: 2, clip: -1").replace("n_heads: 4", "n_head: 4")
    )
    with pytest.raises(UserError) as caught:
        load(["config=page.yaml", "trainer.max_steps=0"])
    keys = [line.split(" ")[0] for line in caught.value.lines]
    for key in ("optim.lrr", "optim.beta", "optim.clip", "model.blocks.A.mixer.n_head", "trainer.max_steps"):
        assert key in keys


def test_shapes_are_told_without_torch_and_with_it_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmtrain.config import schema_file

    (folder / "page.yaml").write_text(swap("lr: 0.001", "lrr: 1"))
    lines = []
    for fresh in (True, False):
        monkeypatch.setattr(schema_file, "is_fresh", lambda fresh=fresh: fresh)
        with pytest.raises(UserError) as caught:
            load(["config=page.yaml"])
        lines.append(caught.value.lines)
    assert lines[0] == lines[1]
