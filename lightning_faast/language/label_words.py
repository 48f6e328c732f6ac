"""Classes as words that a language model may say: prompts, what to learn, and how likely each word is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_faast.language import architecture
from lightning_faast.language.perplexity import token_device, underlying
from lightning_faast.language.prompts import beginning, completions, encode


class LabelWords:
    r"""A template with a word for each class.

    Args:
        tokenizer: Of the model.
        words: One for each class; of one or several tokens.
        template: With ``{text}`` in it and ``{label}`` at its end, such as
            ``"Review: {text}\nSentiment (negative or positive): {label}"``.

    Attributes:
        label_ids: Token ids of each word, as they follow the template.

    Raises:
        ValueError: For another template, words that are alike, and words that melt into the template's last token.
    """

    def __init__(self, tokenizer: Any, words: Sequence[str], template: str) -> None:
        if not template.endswith("{label}") or template.count("{text}") != 1 or template.count("{label}") != 1:
            raise ValueError(f"template must hold {{text}} once and end with {{label}}, got {template!r}.")
        self.tokenizer = tokenizer
        self.words = list(words)
        body = template.removesuffix("{label}")
        self._prompt = body.rstrip(" ")  # tokenizers take a space as the beginning of the word after it
        self._space = body[len(self._prompt) :]
        if self._prompt.endswith("{text}") and not self._space:
            raise ValueError(f"template must put something between {{text}} and {{label}}, got {template!r}.")
        self.label_ids = self._labels()

    def _labels(self) -> list[list[int]]:
        prompt = self.render("a")
        start, *whole = encode(self.tokenizer, [prompt, *(prompt + self._space + word for word in self.words)])
        for word, ids in zip(self.words, whole, strict=True):
            if ids[: len(start)] != start or len(ids) == len(start):
                raise ValueError(
                    f"The tokenizer makes no tokens of its own of {self._space + word!r} after {prompt!r}: end the "
                    "template with other characters before {label}."
                )
        found = [ids[len(start) :] for ids in whole]
        if len(set(map(tuple, found))) < max(len(found), 2):
            raise ValueError(f"words must be two or more, each of other tokens; got {self.words} as {found}.")
        return found

    def render(self, text: str, label: int | None = None) -> str:
        """The prompt of a text, with the word of a class where one is given."""
        prompt = self._prompt.replace("{text}", text)
        return prompt if label is None else prompt + self._space + self.words[label]

    def prompts(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[list[list[int]], int]:
        """Token ids of the prompts, without special tokens, and how many texts had to be cut.

        Args:
            texts: Of the queries.
            max_tokens: Of a prompt; the end of a text is cut off where its prompt is longer.

        Raises:
            ValueError: Where the template alone is longer.
        """
        found = encode(self.tokenizer, [self.render(text) for text in texts])
        too_long = [] if max_tokens is None else [i for i, ids in enumerate(found) if len(ids) > max_tokens]
        for i in too_long:
            found[i] = self._cut(texts[i], max_tokens)  # type: ignore[arg-type]
        return found, len(too_long)

    def _cut(self, text: str, max_tokens: int) -> list[int]:
        (ids,) = encode(self.tokenizer, [text])
        keep = len(ids)
        while True:
            (prompt,) = encode(self.tokenizer, [self.render(self.tokenizer.decode(ids[:keep]))])
            if len(prompt) <= max_tokens:
                return prompt
            if not keep:
                raise ValueError(f"The template alone has {len(prompt)} tokens, and there is room for {max_tokens}.")
            keep = max(0, keep - (len(prompt) - max_tokens))

    def batch(self, texts: Sequence[str], labels: Sequence[int], max_tokens: int | None = None) -> dict[str, Tensor]:
        """What fast weights learn: prompts with the right words, labels on the words alone.

        Args:
            texts: Of a batch.
            labels: Class of each.
            max_tokens: Of a sequence; texts are cut to it.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [B, T]: ``lm.learn(**words.batch(texts, labels))``.
        """
        check_labels(texts, labels, len(self.words))
        start, longest = beginning(self.tokenizer), max(map(len, self.label_ids))
        room = None if max_tokens is None else max_tokens - len(start) - longest
        prompts, _ = self.prompts(texts, room)
        return completions([start + ids for ids in prompts], [self.label_ids[label] for label in labels])

    def log_likelihoods(self, model: Any, texts: Sequence[str], batch_size: int = 8) -> Tensor:
        """Log-likelihood of every word after every prompt [N, c], nats; texts are cut to the model's positions.

        Args:
            model: A causal language model, or a :class:`FastWeightLM`.
            texts: To classify.
            batch_size: Sequences at a time.
        """
        start, positions = beginning(self.tokenizer), architecture.max_positions(underlying(model))
        room = None if positions is None else positions - len(start) - max(map(len, self.label_ids))
        prompts, _ = self.prompts(texts, room)
        return label_log_likelihoods(model, [start + ids for ids in prompts], self.label_ids, batch_size=batch_size)


def check_labels(texts: Sequence[str], labels: Sequence[int], classes: int) -> None:
    """Refuse labels that are no classes.

    Raises:
        ValueError: Saying which.
    """
    if len(texts) != len(labels):
        raise ValueError(f"There are {len(texts)} texts and {len(labels)} labels.")
    bad = [label for label in labels if not 0 <= int(label) < classes]
    if bad:
        raise ValueError(f"Labels must be in [0, {classes}), got {bad[0]}.")


@torch.no_grad()
def label_log_likelihoods(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    cache: Any = None,
    batch_size: int = 8,
) -> Tensor:
    """Log-likelihood of all tokens of each label after each prompt, [N, c] float64, nats.

    A prompt is encoded once for all labels, and what is cached comes before each prompt without being encoded again;
    ``cache`` itself stays as it is. Sequences of one length are taken together, so there is no padding.

    Args:
        model: A causal language model, or a :class:`FastWeightLM`.
        prompts: Token ids, at least one each.
        labels: Token ids, at least one each.
        cache: A KV cache of one sequence.
        batch_size: Sequences at a time.

    Raises:
        ValueError: For an empty prompt.
    """
    if not all(len(ids) for ids in prompts):
        raise ValueError("A prompt is empty: at least one token is needed to predict a label from.")
    scores = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    longer = {n: _of_length(labels, n) for n in sorted({len(ids) for ids in labels} - {1})}
    first = torch.tensor([ids[0] for ids in labels])
    device = token_device(model)
    last_only = "logits_to_keep" in architecture.arguments(underlying(model))
    options = {"logits_to_keep": 1} if last_only else {}
    with architecture.evaluating(model):
        for n in sorted({len(ids) for ids in prompts}):
            for rows in _of_length(prompts, n).split(batch_size):
                ids = torch.tensor([list(prompts[row]) for row in rows.tolist()], device=device)
                past = None if cache is None else _rows_of(cache, torch.zeros(len(rows), dtype=torch.int64))
                out = model(input_ids=ids, past_key_values=past, use_cache=True, **options)
                scores[rows] = _log_softmax(out.logits[:, -1])[:, first]
                for members in longer.values():
                    targets = torch.tensor([list(labels[label]) for label in members.tolist()])
                    for row, member in _pairs(len(rows), len(members), batch_size):
                        told = targets[member]
                        spoken = model(
                            input_ids=told[:, :-1].to(device),
                            past_key_values=_rows_of(out.past_key_values, row),
                            use_cache=True,
                        ).logits
                        more = _log_softmax(spoken).gather(-1, told[:, 1:, None])[..., 0].sum(1)
                        scores[rows[row], members[member]] += more
    return scores


def _of_length(sequences: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([i for i, ids in enumerate(sequences) if len(ids) == length])


def _pairs(rows: int, columns: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    places = torch.arange(rows * columns)
    for part in places.split(size):
        yield part // columns, part % columns


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).to("cpu", torch.float64)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache with rows of another, which stays as it is: layers replace their tensors and never write into them."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))
    return new
