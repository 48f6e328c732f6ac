"""Tiny random language models and a tokenizer of words."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(vocabulary: int = 50, positions: int = 128) -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **SIZES)).eval()


def gpt2(vocabulary: int = 50, positions: int = 128) -> Any:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=positions)
    return GPT2LMHeadModel(config).eval()


def mistral(vocabulary: int = 50, positions: int = 128, sliding_window: int = 8) -> Any:
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        sliding_window=sliding_window,
        num_key_value_heads=1,
        **SIZES,
    )
    return MistralForCausalLM(config).eval()


def gemma2(vocabulary: int = 50) -> Any:
    torch.manual_seed(1)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, head_dim=8, num_key_value_heads=1, **SIZES)).eval()


def words(*texts: str) -> Any:
    """A tokenizer that knows the words of some texts."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>"])}
    for text in texts:
        for word, _ in Whitespace().pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
