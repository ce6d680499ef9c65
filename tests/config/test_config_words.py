"""Command-line words: Hydra's grammar, layouts, sweeps."""

from __future__ import annotations

import pytest

from ssmtrain.config.errors import UserError
from ssmtrain.config.words import MAX_ARMS, parse


def values(text: str) -> list[object]:
    return [value for _, value in parse([text], sweep=True)[0].choices]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("+seed=3", "seed", 3),
        ("++a.b=null", "a.b", None),
        ("a.b=true", "a.b", True),
        ("a.b=[1,2.5,x]", "a.b", [1, 2.5, "x"]),
        ("a.b={c: 1, d: [2]}", "a.b", {"c": 1, "d": [2]}),
        ("a.b='1,2'", "a.b", "1,2"),
        ("a.b=", "a.b", ""),
        ("name=007", "name", "007"),
        ("name=1e3", "name", "1e3"),
        ("runs_dir=/tmp/a b", "runs_dir", "/tmp/a b"),
        ("generate.prompt=Hello\\, you", "generate.prompt", "Hello, you"),
        ("model.layout=(M5H)7", "model.layout", "(M5H)7"),
        ("model.layout=ratio(40, 4)", "model.layout", "ratio(40, 4)"),
        ('model.layout="M5AM4"', "model.layout", "M5AM4"),
        ("a.b=${model.d_model}", "a.b", "${model.d_model}"),
    ],
)
def test_values(text: str, key: str, value: object) -> None:
    (word,) = parse([text])
    assert (word.key, word.value) == (key, value)
    assert type(word.value) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=1e-3,2e-3", [1e-3, 2e-3]),
        ("seed=range(3)", [0, 1, 2]),
        ("seed=range(0,10,4)", [0, 4, 8]),
        ("optim.lr=range(0.1,0.4,0.1)", [0.1, 0.2, 0.3]),
        ("optim.lr=range(0.1,0.45,0.1)", [0.1, 0.2, 0.3, 0.4]),
        ("optim.lr=range(1,0,-0.4)", [1.0, 0.6, 0.2]),
        ("optim=choice(adamw,muon)", ["adamw", "muon"]),
        ("name=1,2", ["1", "2"]),
        ("model.layout=M,M4AM5,ratio(10,2)", ["M", "M4AM5", "ratio(10,2)"]),
        ("model.layout=choice(M, (MA)5)", ["M", "(MA)5"]),
        ("a.b=[1,2],[3]", [[1, 2], [3]]),
    ],
)
def test_sweeps(text: str, expected: list[object]) -> None:
    assert values(text) == expected
    with pytest.raises(UserError, match="--multirun"):
        parse([text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lr=interval(0,1)", "has no list of values"),
        ("seed=range(1000000000)", f"at most {MAX_ARMS}"),
        ("seed=range(5,5)", "no values"),
        ("optim=glob(*)", "write the values out"),
        ("model.layout=M,,A", "an empty layout"),
        ("a.b=f(1)", "cannot be read"),
        ("=3", "is not a key"),
        ("a..b=3", "is not a key"),
    ],
)
def test_sweeps_that_cannot_be_run(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([text], sweep=True)


def test_a_flag_among_words_is_named_as_one() -> None:
    with pytest.raises(UserError, match="not a flag of this verb"):
        parse(["-x"])
