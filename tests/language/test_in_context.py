from typing import Any

import pytest
import torch
import transformers as hf

from lightning_faast.language import FastWeightLM, InContextClassifier, LabelWords
from lightning_faast.language.in_context import in_turn
from lightning_faast.language.label_words import label_log_likelihoods
from tests.language.models import FAMILIES, gpt2, llama
from tests.language.words import words

TEMPLATE = "Review: {text} Mood : {label}"
WORDS = ["bad", "very good", "so so so"]
TEXTS = ["a fine film", "a dull film", "dull", "fine and dull", "a film"]
LABELS = [1, 0, 0, 2, 2]


def tokenizer() -> Any:
    return words(TEMPLATE, *WORDS, *TEXTS, "Tell the mood .")


def sliding(window: int = 6) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.MistralConfig(vocab_size=97, sliding_window=window, num_key_value_heads=1, **sizes)
    return hf.MistralForCausalLM(config).eval()


@torch.no_grad()
def one_by_one(model: Any, prefix: list[int], prompts: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Without a cache, one sequence at a time."""
    scores = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            ids = torch.tensor([prefix + prompt + label])
            logits = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            told = logits[-len(label) - 1 : -1].gather(1, torch.tensor(label)[:, None])
            scores[i, j] = told.sum()
    return scores


@pytest.mark.parametrize("make", [llama, gpt2, FAMILIES["gemma2"], FAMILIES["gpt_neox"], sliding])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_shared_cache_equals_whole_prompts(make: Any, batch_size: int) -> None:
    model, known = make(), tokenizer()
    classifier = InContextClassifier(
        model, known, WORDS, TEMPLATE, instruction="Tell the mood .", separator=" . ", batch_size=batch_size
    )
    classifier.fit(TEXTS[:3], LABELS[:3])
    found = classifier.predict_log_proba(TEXTS)
    prompts, _ = classifier.label_words.prompts(TEXTS)
    expected = one_by_one(model, classifier._prefix, prompts, classifier.label_words.label_ids)
    torch.testing.assert_close(found, expected.log_softmax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.predict_log_proba(TEXTS), found)  # the cache is as it was
    torch.testing.assert_close(classifier.predict_log_proba(TEXTS[2:]), found[2:], rtol=1e-5, atol=1e-5)
    assert classifier.figures()["demonstrations"] == 3
    assert known.decode(classifier._prefix).startswith("Tell the mood . Review : a dull film Mood : bad .")


def test_examples_that_do_not_fit_are_reported() -> None:
    known = tokenizer()
    classifier = InContextClassifier(llama(), known, WORDS, TEMPLATE, separator=" . ").fit(TEXTS * 3, LABELS * 3)
    figures = classifier.figures()
    assert figures["demonstrations_given"] == 15
    assert 0 < figures["demonstrations"] < 15
    longest = max(len(ids) for ids in classifier.label_words.label_ids)
    rendered = [TEMPLATE.format(text=t, label=WORDS[y]) + " ." for t, y in zip(TEXTS, LABELS, strict=True)]
    example = max(map(len, known(rendered)["input_ids"]))
    assert figures["prefix_tokens"] <= 64 - example - longest
    assert figures["prefix_tokens"] + example > 64 - example - longest
    per_token = 3 * 2 * 4 * 8 * 4  # layers, keys and values, heads, width of one, bytes
    assert figures["bytes_to_predict"] == figures["prefix_tokens"] * per_token
    assert "of 15 examples fitted" in classifier.summary()
    assert classifier.predict([" ".join(["fine"] * 100)]).shape == (1,)
    assert classifier.figures()["queries_cut"] == 1
    assert classifier.figures()["tokens_encoded"] <= 64


def test_zero_shot_is_label_words_alone() -> None:
    model, known = llama(), tokenizer()
    label_words = LabelWords(known, WORDS, TEMPLATE)
    expected = label_words.log_likelihoods(model, TEXTS)
    found = InContextClassifier(model, known, WORDS, TEMPLATE).fit().predict_log_proba(TEXTS)
    torch.testing.assert_close(found, expected.log_softmax(1))
    prompts, _ = label_words.prompts(TEXTS)
    torch.testing.assert_close(expected, one_by_one(model, [], prompts, label_words.label_ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"key_layers": [0]}, {"layer": "middle"}], ids=str)
def test_fast_weights_learn_label_words(options: dict[str, Any]) -> None:
    known = tokenizer()
    label_words = LabelWords(known, WORDS[:2], TEMPLATE)
    with FastWeightLM(llama(), **options) as lm:
        before = label_words.log_likelihoods(lm, TEXTS)
        batch = label_words.batch(TEXTS[:3] * 8, LABELS[:3] * 8)
        told = batch["labels"][batch["labels"] != -100]
        assert known.decode(told[:4]) == "very good bad bad"
        lm.learn(**batch)
        assert lm.tokens == 8 * 4
        after = label_words.log_likelihoods(lm, TEXTS)
        prompts, _ = label_words.prompts(TEXTS)
        torch.testing.assert_close(after, one_by_one(lm, [], prompts, label_words.label_ids), rtol=1e-4, atol=1e-4)
        if not options:
            gold = torch.tensor(LABELS[:3])[:, None]
            assert after[:3].gather(1, gold).mean() > before[:3].gather(1, gold).mean()
            assert InContextClassifier(lm, known, WORDS, TEMPLATE).fit().predict(TEXTS).shape == (5,)


def test_beginning_of_text_comes_once() -> None:
    from tokenizers.processors import TemplateProcessing

    known = tokenizer()
    known.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 2)])
    classifier = InContextClassifier(llama(), known, WORDS, TEMPLATE, separator=" . ").fit(TEXTS[:2], LABELS[:2])
    assert [i for i, token in enumerate(classifier._prefix) if token == 2] == [0]
    label_words = classifier.label_words
    assert label_words.batch(TEXTS[:1], [0])["input_ids"][0, 0] == 2
    prompts, _ = label_words.prompts(TEXTS)
    expected = one_by_one(classifier.model, [2], prompts, label_words.label_ids)
    torch.testing.assert_close(label_words.log_likelihoods(classifier.model, TEXTS), expected, rtol=1e-5, atol=1e-5)


def test_classes_come_in_turn() -> None:
    assert in_turn([2, 2, 0, 2, 0, 1]) == [2, 5, 0, 4, 1, 3]
    assert in_turn([]) == []


def test_bad_input_is_refused() -> None:
    model, known = llama(), tokenizer()
    for template in ("{text}{label}", "{label} {text}", "no text {label}"):
        with pytest.raises(ValueError, match="template"):
            LabelWords(known, WORDS, template)
    with pytest.raises(ValueError, match="other tokens"):
        LabelWords(known, ["bad", "bad"], TEMPLATE)
    with pytest.raises(ValueError, match="no tokens of its own"):
        LabelWords(known, ["bad", ""], TEMPLATE)
    classifier = InContextClassifier(model, known, WORDS, TEMPLATE)
    with pytest.raises(RuntimeError, match="fit"):
        classifier.predict(TEXTS)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        classifier.fit(TEXTS[:1], [3])
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        classifier.fit(TEXTS[:2], [0])
    with pytest.raises(ValueError, match="positions"):
        InContextClassifier(model, known, WORDS, TEMPLATE, max_tokens=1000)
    with pytest.raises(ValueError, match="instruction"):
        InContextClassifier(model, known, WORDS, TEMPLATE, instruction="mood " * 70).fit()
    with pytest.raises(ValueError, match="template alone"):
        InContextClassifier(model, known, WORDS, TEMPLATE, max_tokens=5).fit().predict(TEXTS)
    with pytest.raises(ValueError, match="empty"):
        label_log_likelihoods(model, [[]], [[1]])
