"""Pages and texts for the tests of the data room; nothing touches the user's own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmtrain.config.data import (
    AnyTokenizer,
    BytesTokenizer,
    EmbeddedData,
    FileTokenizer,
    HubData,
    TextData,
)
from ssmtrain.config.schema import RunConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssmtrain"


@pytest.fixture
def page() -> Callable[..., RunConfig]:
    """A run's page without a model: `page(train=…)` for text files, `page()` for the embedded corpus."""

    def make(seed: int = 0, tokenizer: Path | AnyTokenizer | None = None, **data: Any) -> RunConfig:
        kind = HubData if "path" in data else TextData if "train" in data else EmbeddedData
        source = kind(**data)
        reader: Any = tokenizer or BytesTokenizer()
        if isinstance(tokenizer, Path):
            reader = FileTokenizer(path=str(tokenizer))
        return RunConfig.model_construct(seed=seed, data=source, tokenizer=reader)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file below the test's folder."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE, trained here, as a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat by the door\n"] * 50, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
