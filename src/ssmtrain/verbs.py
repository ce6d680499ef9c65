"""The verbs of the command line: what each does, takes, and which function does it (data only)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verb:
    """One verb: what it does, what it takes, and the function that does it."""

    summary: str
    target: str
    """module:function, taking a Request and returning an exit code."""
    takes: str = ""
    """What the line must name: "config", "run", "config or run", or nothing; "words" takes bare words."""
    flags: dict[str, str] = field(default_factory=dict)
    """Flag -> what it does; a flag whose text starts with = takes a value."""
    example: str = ""
    words: dict[str, str] = field(default_factory=dict)
    """Words of the line that are this verb's own and no keys of the config -> =VALUE and what they do."""


_JSON = {"json": "print JSON"}
_EMA = {"weights": "=ema the moving average of the weights, where the run has one"}
_RUNS_DIR = {"runs_dir": "=FOLDER where the runs are; absent: runs"}

VERBS: dict[str, Verb] = {
    "fit": Verb(
        "train a recipe, or continue where it stopped",
        "ssmtrain.train.fit:command",
        "config",
        {
            "multirun": "run every combination of a=1,2 … one after another",
            "json": "with --multirun: print JSON",
        },
        "ssmtrain fit config=quickstart optim.lr=2e-3",
        {
            "from": "=RUN[@step-N|@best] fork it: keep its weights, optimiser, step and place in the data",
            "init": "=RUN|EXPORT begin at step 0 from its weights alone",
        },
    ),
    "show": Verb(
        "print a recipe's layers, parameters, FLOPs, state and memory",
        "ssmtrain.cli:show",
        "config or run",
        _JSON,
        "ssmtrain show config=quickstart show.context=131072",
    ),
    "generate": Verb(
        "continue a prompt with a trained run",
        "ssmtrain.generate.command:command",
        "config or run",
        {"prompt": "=TEXT the text to continue", **_JSON},
        'ssmtrain generate run=quickstart-1a2b3c --prompt "It is a truth"',
        _EMA,
    ),
    "eval": Verb(
        "loss, perplexity and bits per byte of a run on a split or a file",
        "ssmtrain.eval.command:command",
        "config or run",
        {"split": "=NAME train or val (default)", "file": "=PATH a text file instead", **_JSON},
        "ssmtrain eval run=quickstart-1a2b3c --file my.txt",
        _EMA,
    ),
    "average": Verb(
        "merge the weights of several checkpoints into one",
        "ssmtrain.checkpoint.average:command",
        "words",
        {},
        "ssmtrain average run=quickstart-1a2b3c last=3 out=averaged",
        {
            "out": "=FOLDER where the average goes; it reads as a run",
            "run": "=RUN with last=: take its newest checkpoints",
            "last": "=N how many of them",
            "weights": "=A,B,… what each checkpoint counts; without it all count the same",
        },
    ),
    "convert": Verb(
        "write a run's weights as one safetensors file with its config",
        "ssmtrain.checkpoint.convert:command",
        "run",
        {},
        "ssmtrain convert run=quickstart-1a2b3c@best out=exported",
        {"out": "=FOLDER|FILE.safetensors where they go", **_EMA},
    ),
    "prepare": Verb(
        "turn a recipe's text into token shards (fit does it by itself)",
        "ssmtrain.data.report:command",
        "config or run",
        _JSON,
        "ssmtrain prepare config=quickstart data=text data.train=texts/",
        {"workers": "=N processes that tokenise (one for each core); the result is the same"},
    ),
    "data show": Verb(
        "print what a step reads: rows, documents, masks; or the steps that read a document",
        "ssmtrain.explain.command:command",
        "config or run",
        {
            "find": "=TEXT a file's name, or words of a text: the steps at which it is read",
            "full": "all rows, and their whole text",
            **_JSON,
        },
        "ssmtrain data show run=quickstart-1a2b3c step=120",
        {
            "step": "=N the step",
            "rows": "=I,J:K of its rows only these, from 0",
            "source": "=NAME only what this source of a mixture gives",
        },
    ),
    "replay": Verb(
        "take a step of a run once more, to the bit, and say what its loss and gradient are made of",
        "ssmtrain.explain.replay:command",
        "run",
        {"full": "the whole text of the worst rows", **_JSON},
        "ssmtrain replay run=quickstart-1a2b3c step=120",
        {"step": "=N the step"},
    ),
    "config show": Verb(
        "print the whole config of a line, every default spelled out",
        "ssmtrain.config.command:show",
        "config or run",
        _JSON,
        "ssmtrain config show config=quickstart optim=muon > mine.yaml",
    ),
    "config list": Verb("list the recipes", "ssmtrain.config.command:catalog", "", _JSON),
    "config diff": Verb(
        "print what differs between two recipes, pages or runs",
        "ssmtrain.config.command:diff",
        "words",
        _JSON,
        "ssmtrain config diff quickstart runs/mine",
    ),
    "config schema": Verb("print the JSON schema for editors", "ssmtrain.config.command:schema"),
    "check resume": Verb(
        "prove on a recipe that a killed run continues to the last bit",
        "ssmtrain.check.resume:command",
        "config",
        _JSON,
        "ssmtrain check resume config=quickstart",
    ),
    "check parallel": Verb(
        "compare a recipe's losses on several devices with those of one process",
        "ssmtrain.check.parallel:command",
        "config",
        _JSON,
        "ssmtrain check parallel config=quickstart parallel=fsdp trainer.devices=2",
    ),
    "launch slurm": Verb(
        "train a recipe as a job of a Slurm cluster, put back in the queue until it is finished",
        "ssmtrain.launch.slurm:command",
        "config",
        {
            "dry-run": "print the batch script and do nothing else",
            "multirun": "submit an array with a job for every combination of a=1,2 … (extra `slurm`)",
            **_JSON,
        },
        "ssmtrain launch slurm config=granite_9to1 launch.nodes=4 launch.gpus_per_node=8 launch.time=9:00:00",
    ),
    "runs ls": Verb(
        "a table of the runs: state, step, loss, speed, size",
        "ssmtrain.runs.ls:command",
        "words",
        _JSON,
        "ssmtrain runs ls sort=val",
        {"sort": "=name|state|step|loss|val|speed|changed|size which comes first", **_RUNS_DIR},
    ),
    "runs show": Verb(
        "one run: progress, how each start ended, checkpoints, what to type next",
        "ssmtrain.runs.show:command",
        "words",
        _JSON,
        "ssmtrain runs show quickstart-1a2b3c",
        _RUNS_DIR,
    ),
    "runs diff": Verb(
        "what sets runs apart, and what each came to",
        "ssmtrain.runs.diff:command",
        "words",
        _JSON,
        "ssmtrain runs diff first second",
        _RUNS_DIR,
    ),
    "runs tail": Verb(
        "watch a run from another terminal",
        "ssmtrain.runs.tail:command",
        "words",
        {},
        "ssmtrain runs tail quickstart-1a2b3c",
        {"lines": "=N lines of the past to begin with", **_RUNS_DIR},
    ),
    "runs rm": Verb(
        "delete runs, after a list and a question",
        "ssmtrain.runs.rm:command",
        "words",
        {"yes": "do not ask"},
        "ssmtrain runs rm quickstart-1a2b3c",
        _RUNS_DIR,
    ),
    "report": Verb(
        "curves, layers, time and config of runs as one HTML page",
        "ssmtrain.report.command:command",
        "words",
        {"png": "write the pictures beside the page as PNG files too"},
        "ssmtrain report first second out=both.html",
        {"out": "=FILE.html where the page goes", **_RUNS_DIR},
    ),
    "doctor": Verb(
        "versions, devices, kernels, disk, and what would be slow",
        "ssmtrain.doctor:command",
        "words",
        _JSON,
        "ssmtrain doctor config=quickstart",
        {
            "config": "=RECIPE what this recipe would need here: room for a checkpoint, memory",
            "run": "=RUN the same of a run",
        },
    ),
    "help": Verb(
        "explain a verb, a kind or a key",
        "ssmtrain.config.manual:command",
        "words",
        _JSON,
        "ssmtrain help mamba2",
    ),
    "completion": Verb(
        "print the completion script of a shell (bash, zsh)",
        "ssmtrain.config.completion:command",
        "words",
        {},
        'eval "$(ssmtrain completion bash)"',
    ),
}

SYNONYMS = {
    "train": "fit",
    "run": "fit",
    "resume": "fit",
    "merge": "average",
    "export": "convert",
    "fork": "fit",
    "sample": "generate",
    "evaluate": "eval",
    "info": "show",
    "summary": "show",
    "list": "config list",
    "ls": "runs ls",
    "ps": "runs ls",
    "status": "runs show",
    "tail": "runs tail",
    "watch": "runs tail",
    "rm": "runs rm",
    "delete": "runs rm",
    "compare": "runs diff",
    "plot": "report",
    "recipes": "config list",
    "diff": "config diff",
    "preprocess": "prepare",
    "submit": "launch slurm",
    "sbatch": "launch slurm",
    "slurm": "launch slurm",
    "tokenize": "prepare",
    "data": "data show",
    "explain": "replay",
    "spike": "replay",
}
