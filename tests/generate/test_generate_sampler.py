"""Sampling: filters of the distribution, decoding piece by piece, reproducibility."""

import torch

from ssmtrain.config.model import ModelConfig
from ssmtrain.config.schema import GenerateConfig
from ssmtrain.data.tokenizer import ByteTokenizer
from ssmtrain.generate.sampler import choose, printable, sample, stream
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.model.init import init_weights

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def drawn(config: GenerateConfig, n: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {int(choose(LOGITS, config, generator)) for _ in range(n)}


def tiny() -> HybridModel:
    blocks = {
        "M": {"mixer": {"kind": "mamba2", "d_state": 8, "head_dim": 8}},
        "A": {"mixer": {"kind": "attention", "n_heads": 2}},
    }
    config = ModelConfig.model_validate({"d_model": 16, "layout": "MA", "blocks": blocks})
    model = HybridModel(config, 257)
    init_weights(model, config.init, 0)
    return model


def test_filters_keep_what_they_say() -> None:
    assert drawn(GenerateConfig(temperature=0.0)) == {0}
    assert drawn(GenerateConfig(temperature=1.0)) == {0, 1, 2, 3}
    assert drawn(GenerateConfig(temperature=1.0, top_k=2)) == {0, 1}
    assert drawn(GenerateConfig(temperature=1.0, top_p=0.8)) == {0, 1}
    assert drawn(GenerateConfig(temperature=1.0, top_p=0.81)) == {0, 1, 2}
    assert drawn(GenerateConfig(temperature=1.0, top_p=1e-6)) == {0}


def test_temperature_sharpens() -> None:
    generator = torch.Generator().manual_seed(0)
    many = LOGITS.expand(20000, 4)
    warm = choose(many, GenerateConfig(temperature=1.0), generator).bincount(minlength=4) / 20000
    cold = choose(many, GenerateConfig(temperature=0.5), generator).bincount(minlength=4) / 20000
    squares = LOGITS.exp().square()[0]
    torch.testing.assert_close(warm, LOGITS.exp()[0], atol=0.02, rtol=0)
    torch.testing.assert_close(cold, squares / squares.sum(), atol=0.02, rtol=0)


def test_greedy_equals_argmax_of_the_full_pass() -> None:
    model = tiny()
    ids = list(b"It is a truth")
    text = sample(model, ByteTokenizer(), "It is a truth", GenerateConfig(max_tokens=12, temperature=0.0), 0)
    expected: list[int] = []
    for _ in range(12):
        logits = model(torch.tensor([ids + expected])).logits
        expected.append(int(logits[0, -1].argmax()))
        if expected[-1] == 256:
            break
    assert text == ByteTokenizer().decode(expected)


def test_same_seed_same_text_and_the_global_generator_is_left_alone() -> None:
    model, tokenizer, config = tiny().train(), ByteTokenizer(), GenerateConfig(max_tokens=20)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, "", config, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert first == sample(model, tokenizer, "", config, 5)
    assert first != sample(model, tokenizer, "", config, 6)
    assert first == "".join(stream(model, tokenizer, "", config, 5))


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b") == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd"
