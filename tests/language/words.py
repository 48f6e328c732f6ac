"""A tokenizer of words."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def words(*texts: str) -> Any:
    """A tokenizer that knows the words of some texts."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>"])}
    for text in texts:
        for word, _ in Whitespace().pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
