import pytest
import torch

from lightning_faast.language import FastWeightLM, Translator
from lightning_faast.language.translation import bleu
from tests.language.models import llama
from tests.language.words import words

SOURCES = ["ein hund", "eine katze läuft", "ein mann mit hut"]
TARGETS = ["a dog", "a cat runs", "a man with hat"]
TEMPLATE = "German: {source} English: {target}"


def tokenizer():
    return words(TEMPLATE, *SOURCES, *TARGETS)


def test_only_targets_are_learned() -> None:
    batch = Translator(llama(), tokenizer(), TEMPLATE).batch(SOURCES[:1], TARGETS[:1])
    known = tokenizer()
    assert known.decode(batch["input_ids"][0]) == "German : ein hund English : a dog <eos>"
    assert known.decode(batch["labels"][0][batch["labels"][0] != -100]) == "a dog <eos>"
    cut = Translator(llama(), tokenizer(), TEMPLATE, max_tokens=8)
    assert cut.batch(SOURCES, TARGETS)["input_ids"].shape == (3, 8)
    assert cut.pairs_cut == 3


def test_batches_translate_as_single_sentences_do() -> None:
    model = llama()
    with FastWeightLM(model, mode="knn_lm", k=1, temperature=1.0, interpolation=0.99) as lm:
        translator = Translator(lm, tokenizer(), TEMPLATE).learn(SOURCES, TARGETS)
        assert translator.translate(SOURCES, beams=5, max_new_tokens=8) == TARGETS
        singly = [translator.translate([s], beams=2, max_new_tokens=8)[0] for s in SOURCES]
        assert translator.translate(SOURCES, beams=2, max_new_tokens=8, batch_size=2) == singly
        with pytest.raises(ValueError, match="beyond"):
            translator.translate(SOURCES, max_new_tokens=60)
    assert Translator(model, tokenizer(), TEMPLATE).translate([]) == []


def test_bleu_says_how_it_was_computed() -> None:
    pytest.importorskip("sacrebleu")
    found = bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert found.score == pytest.approx(100)
    assert "tok:13a" in found.signature
    with pytest.raises(ValueError, match="references"):
        bleu(["a"], [])


def test_templates_are_checked() -> None:
    with pytest.raises(ValueError, match="source"):
        Translator(llama(), tokenizer(), "{target} {source}")
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match="end-of-text"):
        Translator(llama(), without, TEMPLATE)
    assert torch.is_tensor(Translator(llama(), tokenizer(), TEMPLATE).batch(["hund"], ["dog"])["labels"])
