"""Texts to token ids: prompts, truncation that is counted, batches of alike length."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

_FIELD = re.compile(r"\{(text|pair)\}")

#: A text, or two that belong together.
Text = str | tuple[str, str]
#: Ids of one text by the names of a model's inputs, such as ``input_ids``.
Tokens = dict[str, list[int]]


class Tokenization:
    """Turns texts into token ids, at most ``max_length`` of each.

    Without a prompt what is too long is cut by the tokenizer (of a pair the longer text). With a prompt the text inside
    it is cut, so that what the prompt says after it stays.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: Template with ``{text}``, and ``{pair}`` for the second of two; ``None`` for the texts alone.
        max_length: Tokens of one text, special ones included; ``None`` for any number.

    Raises:
        ValueError: Where the prompt has no ``{text}``, or leaves no room for one.
    """

    def __init__(self, tokenizer: Any, prompt: str | None = None, max_length: int | None = None) -> None:
        if prompt is not None and "{text}" not in prompt:
            raise ValueError(
                f"prompt={prompt!r} must be a template with {{text}}, such as 'Review: {{text}}\\nSentiment:'."
            )
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        if max_length is not None:
            empty = ["", ""] if "{pair}" in (prompt or "") else [""]
            fixed = len(self._tokenize([self._fill(empty)])[0]["input_ids"])
            if fixed >= max_length:
                raise ValueError(
                    f"max_length={max_length} leaves no room for a text: the prompt and special tokens alone are "
                    f"{fixed} tokens."
                )

    def __call__(self, texts: Sequence[Text]) -> tuple[list[Tokens], int]:
        """Token ids of every text, and how many texts were cut.

        Raises:
            ValueError: For a text without any token, and texts that do not fit the prompt.
        """
        parts = [[text] if isinstance(text, str) else list(text) for text in texts]
        if {len(part) for part in parts} not in ({1}, {2}):
            raise ValueError("texts must be strings or pairs of strings, all of them alike.")
        rows = self._tokenize([self._fill(part) for part in parts])
        cut = 0
        for index, row in enumerate(rows):
            if not row["input_ids"]:
                raise ValueError(f"The text {texts[index]!r} has no tokens. Remove the row, or use a prompt.")
            if self.max_length is not None and len(row["input_ids"]) > self.max_length:
                rows[index] = self._shortened(parts[index])
                cut += 1
        return rows, cut

    def _fill(self, parts: Sequence[str]) -> tuple[str, ...]:
        """What goes to the tokenizer: the prompt with the texts in it, or the texts themselves."""
        if self.prompt is None:
            return tuple(parts)
        if len(parts) == 2 and "{pair}" not in self.prompt:
            raise ValueError(f"The texts are pairs, and prompt={self.prompt!r} has no {{pair}} for the second.")
        if len(parts) == 1 and "{pair}" in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has a {{pair}}, and the texts are none.")
        # by a function, so that braces and backslashes in a text stay what they are
        return (_FIELD.sub(lambda field: parts[field[1] == "pair"], self.prompt),)

    def _tokenize(self, filled: Sequence[tuple[str, ...]], **options: Any) -> list[Tokens]:
        second = [texts[1] for texts in filled] if filled and len(filled[0]) == 2 else None
        encoded = self.tokenizer(
            [texts[0] for texts in filled],
            second,
            padding=False,
            return_attention_mask=False,
            verbose=False,
            **{"truncation": False, **options},
        )
        return [{name: values[row] for name, values in encoded.items()} for row in range(len(filled))]

    def _shortened(self, parts: list[str]) -> Tokens:
        assert self.max_length is not None
        if self.prompt is None:
            return self._tokenize([self._fill(parts)], truncation=True, max_length=self.max_length)[0]
        while True:
            (row,) = self._tokenize([self._fill(parts)])
            excess = len(row["input_ids"]) - self.max_length
            if excess <= 0:
                return row
            longest = max(range(len(parts)), key=lambda part: len(parts[part]))
            size = len(parts[longest])
            # as many characters as the excess may be, so that a few rounds are enough
            parts[longest] = parts[longest][: size - max(1, excess * size // len(row["input_ids"]))]


def groups_of_alike_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Part rows into groups, the longest rows first, so that little of a group is padding.

    Args:
        lengths: Tokens of every row.
        max_tokens: Of a group, padding included; a longer row makes a group of its own.

    Yields:
        Numbers of the rows of a group; every row is in exactly one.

    Example:
        >>> list(groups_of_alike_length([3, 9, 2, 8], max_tokens=18))
        [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size
