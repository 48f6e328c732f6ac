"""InContextClassifier: a language model that is shown examples in its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_faast.language import architecture
from lightning_faast.language.label_words import LabelWords, check_labels, label_log_likelihoods
from lightning_faast.language.perplexity import token_device, underlying
from lightning_faast.language.prompts import beginning, encode


class InContextClassifier:
    r"""Classification by in-context learning: examples before the query, classes by the likelihood of their words.

    The examples are encoded once, and all queries read their keys and values from the cache. They are taken class by
    class in turn until the model's positions are full; how many that were, :meth:`figures` says. Without examples it
    is zero-shot.

    Args:
        model: A causal language model, or a :class:`FastWeightLM` (whose layer, where it is a middle one, must have
            learned before :meth:`fit`).
        tokenizer: Of the model.
        words: One for each class.
        template: As of :class:`LabelWords`.
        instruction: What comes before the examples.
        separator: Between examples.
        max_tokens: Of a sequence; the model's positions where not given.
        max_query_tokens: Kept free for the query; texts of longer ones are cut. As many as the longest example has
            where not given, or all there are without examples.
        batch_size: Queries at a time; each needs the memory of the whole cache.

    Example::

        classifier = InContextClassifier(model, tokenizer, ["negative", "positive"], "Review: {text}\nMood: {label}")
        classifier.fit(texts, labels).predict(["A fine film."])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        words: Sequence[str],
        template: str,
        *,
        instruction: str = "",
        separator: str = "\n\n",
        max_tokens: int | None = None,
        max_query_tokens: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.label_words = LabelWords(tokenizer, words, template)
        self.instruction, self.separator = instruction, separator
        positions = architecture.max_positions(underlying(model))
        if max_tokens is not None and positions is not None and max_tokens > positions:
            raise ValueError(f"max_tokens is {max_tokens}, and the model was made for {positions} positions.")
        self.max_tokens = positions if max_tokens is None else max_tokens
        self.max_query_tokens, self.batch_size = max_query_tokens, batch_size
        self._cache: Any = None
        self._prefix: list[int] | None = None

    def fit(self, texts: Sequence[str] = (), labels: Sequence[int] = ()) -> InContextClassifier:
        """Encode the examples. Returns itself.

        Args:
            texts: Examples; none for zero-shot.
            labels: Class of each.

        Raises:
            ValueError: For labels that are no classes, and where there is no room for a query.
        """
        labels = [int(label) for label in labels]
        check_labels(texts, labels, len(self.label_words.words))
        tokenizer = self.label_words.tokenizer
        head = beginning(tokenizer) + encode(tokenizer, [self.instruction])[0]
        rendered = [self.label_words.render(texts[i], labels[i]) + self.separator for i in in_turn(labels)]
        examples = encode(tokenizer, rendered)
        longest = max(map(len, self.label_words.label_ids))
        self._room = self.max_query_tokens
        if self._room is None and examples:
            self._room = max(map(len, examples))
        fitted = examples
        if self.max_tokens is not None:
            left = self.max_tokens - len(head) - longest
            if left < 1:
                raise ValueError(
                    f"Of {self.max_tokens} tokens, {left} are left for the query: shorten the instruction."
                )
            self._room = left if self._room is None else min(self._room, left)
            left -= self._room
            sizes = torch.tensor([len(ids) for ids in examples], dtype=torch.int64).cumsum(0)
            fitted = examples[: int((sizes <= left).sum())]
        self._given, self._fitted, self._cut = len(texts), len(fitted), 0
        self._prefix = head + [token for ids in fitted for token in ids]
        self._cache = self._encode(self._prefix) if self._prefix else None
        self.tokens_encoded = len(self._prefix)
        return self

    @torch.no_grad()
    def _encode(self, ids: list[int]) -> Any:
        last_only = "logits_to_keep" in architecture.arguments(underlying(self.model))
        options = {"logits_to_keep": 1} if last_only else {}
        with architecture.evaluating(self.model):
            inputs = torch.tensor([ids], device=token_device(self.model))
            return self.model(input_ids=inputs, use_cache=True, **options).past_key_values

    def predict_log_proba(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities [N, c] of the classes, float64: likelihoods of all tokens of their words, normalized.

        Raises:
            RuntimeError: Before :meth:`fit`.
        """
        if self._prefix is None:
            raise RuntimeError("Call fit(texts, labels) first, or fit() for zero-shot.")
        prompts, cut = self.label_words.prompts(texts, self._room)
        self._cut += cut
        self.tokens_encoded += sum(map(len, prompts))
        scores = label_log_likelihoods(
            self.model, prompts, self.label_words.label_ids, cache=self._cache, batch_size=self.batch_size
        )
        return scores.log_softmax(1)

    def predict(self, texts: Sequence[str]) -> Tensor:
        """Classes [N] of texts."""
        return self.predict_log_proba(texts).argmax(1)

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of the cache."""
        layers = [] if self._cache is None else self._cache.layers
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))

    def figures(self) -> dict[str, float]:
        """Examples given and fitted, tokens encoded (prefix and queries), queries cut, and bytes of the cache."""
        if self._prefix is None:
            raise RuntimeError("Call fit(texts, labels) first, or fit() for zero-shot.")
        return {
            "demonstrations_given": float(self._given),
            "demonstrations": float(self._fitted),
            "prefix_tokens": float(len(self._prefix)),
            "tokens_encoded": float(self.tokens_encoded),
            "queries_cut": float(self._cut),
            "bytes_to_predict": float(self.bytes_to_predict),
        }

    def summary(self) -> str:
        """How many examples fitted: one line."""
        figures = self.figures()
        return (
            f"in context, {figures['demonstrations']:.0f} of {figures['demonstrations_given']:.0f} examples fitted, "
            f"{figures['prefix_tokens']:.0f} tokens"
        )


def in_turn(labels: Sequence[int]) -> list[int]:
    """Places of labels, class by class in turn, so that wherever they end classes are as even as can be.

    Example:
        >>> from lightning_faast.language.in_context import in_turn
        >>> in_turn([0, 0, 0, 1, 1])
        [0, 3, 1, 4, 2]
    """
    seen: dict[int, int] = {}
    rounds = []
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        rounds.append((seen[label], label, place))
    return [place for *_, place in sorted(rounds)]
