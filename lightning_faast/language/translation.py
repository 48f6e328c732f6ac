"""Translation by a causal language model: learn pairs, translate, score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_faast.data.extras import require
from lightning_faast.language import architecture
from lightning_faast.language.perplexity import token_device, underlying
from lightning_faast.language.prompts import beginning, completions, encode


class Translator:
    r"""A template for pairs of sentences, and what a model makes of it.

    Args:
        model: A causal language model, or a :class:`FastWeightLM`, which may learn pairs.
        tokenizer: Of the model, with an end-of-text token.
        template: With ``{source}`` in it and ``{target}`` at its end. The translation is what the model says up to the
            end of text or of the line.
        max_tokens: Of a learned pair; longer ones are cut at the end. The model's positions where not given.

    Attributes:
        pairs_cut: Pairs that were cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "German: {source}\nEnglish: {target}",
        max_tokens: int | None = None,
    ) -> None:
        if not template.endswith("{target}") or template.count("{source}") != 1:
            raise ValueError(f"template must hold {{source}} once and end with {{target}}, got {template!r}.")
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token (eos_token), so no translation would ever end.")
        self.model, self.tokenizer = model, tokenizer
        body = template.removesuffix("{target}")
        self._prompt = body.rstrip(" ")  # tokenizers take a space as the beginning of the word after it
        self._space = body[len(self._prompt) :]
        self.max_tokens = architecture.max_positions(underlying(model)) if max_tokens is None else max_tokens
        self.pairs_cut = 0

    def _prompts(self, sources: Sequence[str]) -> list[list[int]]:
        start = beginning(self.tokenizer)
        return [start + ids for ids in encode(self.tokenizer, [self._prompt.replace("{source}", s) for s in sources])]

    def batch(self, sources: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
        """What fast weights learn: ``input_ids``, ``attention_mask`` and ``labels`` [B, T], labels on targets alone."""
        ends = [
            [*ids, self.tokenizer.eos_token_id] for ids in encode(self.tokenizer, [self._space + t for t in targets])
        ]
        batch = completions(self._prompts(sources), ends)
        if self.max_tokens is not None:
            self.pairs_cut += int((batch["attention_mask"].sum(1) > self.max_tokens).sum())
            batch = {name: t[:, : self.max_tokens] for name, t in batch.items()}
        return batch

    def learn(self, sources: Sequence[str], targets: Sequence[str], batch_size: int = 16) -> Translator:
        """Let the fast weights learn pairs by one forward pass. Returns itself."""
        for start in range(0, len(sources), batch_size):
            span = slice(start, start + batch_size)
            self.model.learn(**self.batch(sources[span], targets[span]))
        return self

    @torch.no_grad()
    def translate(
        self, sources: Sequence[str], *, beams: int = 5, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Translations by beam search.

        Args:
            sources: Sentences.
            beams: 1 is greedy.
            max_new_tokens: Of a translation.
            batch_size: Sentences at a time, padded on the left, those of similar length together.

        Raises:
            ValueError: Where a prompt leaves no room for as many new tokens.
        """
        prompts = self._prompts(sources)
        longest = max(map(len, prompts), default=0)
        if self.max_tokens is not None and longest + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"A prompt has {longest} tokens; with max_new_tokens={max_new_tokens} that is beyond {self.max_tokens}."
            )
        eos, device = self.tokenizer.eos_token_id, token_device(self.model)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = [""] * len(prompts)
        with architecture.evaluating(self.model):
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                width = max(len(prompts[i]) for i in places)
                ids = torch.tensor([[eos] * (width - len(prompts[i])) + prompts[i] for i in places], device=device)
                mask = torch.tensor(
                    [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in places], device=device
                )
                new = self.model.generate(
                    ids,
                    attention_mask=mask,
                    num_beams=beams,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=eos,
                    pad_token_id=eos,
                )[:, width:]
                for i, text in zip(places, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    lines = text.strip().splitlines()
                    found[i] = lines[0].strip() if lines else ""
        return found


@dataclass(frozen=True)
class Bleu:
    """A BLEU score.

    Attributes:
        score: 0 to 100.
        signature: How sacrebleu computed it.
    """

    score: float
    signature: str


def bleu(translations: Sequence[str], references: Iterable[str]) -> Bleu:
    """Corpus BLEU by sacrebleu, one reference each.

    Raises:
        ImportError: Where sacrebleu is not installed.
        ValueError: For other numbers of references.

    Example:
        >>> from lightning_faast.language.translation import bleu
        >>> found = bleu(["a man rides a red bicycle"], ["a man rides a red bicycle"])
        >>> round(found.score), found.signature.split("|")[0]
        (100, 'nrefs:1')
    """
    references = list(references)
    if len(translations) != len(references) or not references:
        raise ValueError(f"There are {len(translations)} translations and {len(references)} references.")
    metric = require("sacrebleu", "language").metrics.BLEU()
    score = metric.corpus_score(list(translations), [references]).score
    return Bleu(score, str(metric.get_signature()))
