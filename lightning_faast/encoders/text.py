"""Models of transformers as encoders of text."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional

from lightning_faast.encoders.text_loading import choose_pooling, describe_computation, layer_stack, load, positions
from lightning_faast.encoders.text_pooling import Pooling, pool
from lightning_faast.encoders.text_tokens import Text, Tokenization, Tokens, groups_of_alike_length


class TextEncoder(nn.Module):
    r"""A model of transformers, encoder or decoder: texts in, one feature vector a text out.

    The hidden states of a layer become one vector by ``pooling``. Tokenization is part of the encoder, so that a prompt
    or a length belongs to it and not to the data. Within a batch texts of alike length go through the model together,
    so that little is spent on padding; features come in the order of the texts, and each is that of its text alone, up
    to rounding. Large batches help, also on a CPU.

    Frozen, which is the default, the encoder needs no gradients and stays in eval mode whatever ``train()`` is called
    on the module around it.

    Args:
        model_name: A model's name on the hub (``sentence-transformers/all-MiniLM-L6-v2``), or a local folder of its
            files. Of an encoder-decoder the encoder is taken.
        pretrained: Load pretrained weights; ``False`` for random ones.
        gguf_file: A GGUF file of that folder or repository to take the weights from.
        pooling: ``"mean"``, ``"cls"`` (the first token), ``"last"`` or ``"max"``, over tokens that are no padding;
            ``None`` for what a sentence encoder's own files say, else the mean.
        layers: The layer or layers whose hidden states are taken: 0 for the embeddings, -1 for the last, after its
            norm. Several are pooled one by one, scaled to unit norm where ``normalize`` is set, and concatenated.
        prompt: Template around each text, such as ``"Review: {text}\nSentiment (negative or positive):"``; of pairs
            with ``{pair}`` for the second. ``None`` for the texts alone, pairs as the model's tokenizer joins them.
        max_length: Tokens of a text, beyond which it is cut (:meth:`report_truncation` says how many were); ``None``
            for what the model's files say.
        normalize: Divide each feature vector by its Euclidean norm; a vector of zeros stays one. ``None`` for what a
            sentence encoder's own files say, else true.
        frozen: Keep the weights, and the eval mode, as they are.
        dtype: Of the weights: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        max_tokens: Tokens that go through the model at once, padding included. More of them use a GPU better.
        trust_remote_code: Whether Python code that comes with the model may run.

    Attributes:
        num_features: Width of the features.

    Raises:
        ValueError: For options that cannot be, or exclude each other, and weights that lack some of the model's.
        FileNotFoundError: Where a folder lacks files.
        ConnectionError: Where files are to be downloaded and cannot be.
        ImportError: Where transformers is not installed.

    Example::

        encoder = TextEncoder("sentence-transformers/all-MiniLM-L6-v2")
        encoder(["a gripping film", "two hours of my life"]).shape  # torch.Size([2, 384])
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        gguf_file: str | None = None,
        pooling: Pooling | None = None,
        layers: int | list[int] = -1,
        prompt: str | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        frozen: bool = True,
        dtype: str = "float32",
        max_tokens: int = 2048,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for option, value in (("max_length", max_length), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        loaded = load(model_name, pretrained, gguf_file, dtype, trust_remote_code)
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.pooling = choose_pooling(pooling, loaded.defaults.pooling, model_name)
        self.normalize = loaded.defaults.normalize if normalize is None else normalize
        self.prompt = prompt
        self.layers = _count_from_zero(layers, int(self.model.config.num_hidden_layers))
        self.max_length = self._find_max_length(max_length, loaded.defaults.max_length)
        self.frozen = frozen
        #: Stands for the model's configuration and tokenizer where keys are kept.
        self.computation = describe_computation(self.model, self.tokenizer)
        # changes roundings only, so it is none of the attributes that say what is computed
        self._max_tokens = max_tokens
        self._tokenize = Tokenization(self.tokenizer, prompt, self.max_length)
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        self._seen = self._cut = 0
        if frozen:
            self.model.requires_grad_(False)
        self.eval()
        with torch.no_grad():
            probe: Text = ("a", "a") if prompt is not None and "{pair}" in prompt else "a"
            self.num_features = int(self([probe]).shape[1])
        self._seen = 0
        self.train(not frozen)

    def forward(self, texts: Sequence[Text]) -> Tensor:
        """Encode texts.

        Args:
            texts: B texts, or B pairs of texts.

        Returns:
            Features ``(B, num_features)``, float32 or wider.

        Raises:
            ValueError: For texts of another type, and a text without any token.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts must be a list of at least one text or pair of texts, got {texts!r}.")
        rows, cut = self._tokenize(texts)
        self._seen, self._cut = self._seen + len(rows), self._cut + cut
        features, order = [], []
        # only ever switches gradients off: a surrounding no_grad stays in force for an encoder that is not frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            for group in groups_of_alike_length([len(row["input_ids"]) for row in rows], self._max_tokens):
                features.append(self._encode([rows[row] for row in group]))
                order += group
            restored = torch.tensor(order).argsort().to(features[0].device)
            return torch.cat(features)[restored]

    def report_truncation(self) -> None:
        """Warn of the texts that were cut since the last report, if any, with how many there were."""
        if self._cut:
            rank_zero_warn(
                f"{self._cut:,} of {self._seen:,} texts are longer than max_length={self.max_length} tokens and were "
                "cut. A larger max_length (--model.encoder.max_length) reads more of them, if the model can."
            )
        self._seen = self._cut = 0

    def input_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that texts pass through: those above the layers that are read are left out."""
        depth, top = int(self.model.config.num_hidden_layers), max(self.layers)
        stack = layer_stack(self.model, depth)
        if top == depth or stack is None:
            yield from self.model.parameters()
            return
        above = {id(parameter) for layer in stack[top:] for parameter in layer.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) in above:
                return  # and what comes after the layers, such as the last norm
            yield parameter

    def train(self, mode: bool = True) -> "TextEncoder":
        """Set the training mode; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def _encode(self, rows: list[Tokens]) -> Tensor:
        device = next(self.model.parameters()).device
        # always on the right, whatever the tokenizer prefers: positions then count from a text's first token
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        inputs = {
            name: nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill.get(name, 0)
            ).to(device)
            for name in rows[0]
            if name in self._accepted
        }
        mask = mask.to(device)
        depth = int(self.model.config.num_hidden_layers)
        only_last = self.layers == [depth]
        further: dict[str, Any] = {} if only_last else {"output_hidden_states": True}
        output = self.model(**inputs, attention_mask=mask.long(), **further)
        hidden = [output.last_hidden_state] if only_last else [output.hidden_states[layer] for layer in self.layers]
        pooled = [pool(states, mask, self.pooling) for states in hidden]
        if self.normalize:
            pooled = [functional.normalize(vectors, dim=-1) for vectors in pooled]
            return functional.normalize(torch.cat(pooled, 1), dim=-1) if len(pooled) > 1 else pooled[0]
        return torch.cat(pooled, 1)

    def _find_max_length(self, wanted: int | None, default: int | None) -> int | None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if wanted is None:
            known = [length for length in (default, positions(self.model, self.tokenizer)) if length is not None]
            return min(known, default=None)
        if isinstance(limit, int) and wanted > limit > 0:
            raise ValueError(f"max_length={wanted}, but the model has {limit} positions. Set it to {limit} or less.")
        return wanted


def _count_from_zero(layers: int | list[int], depth: int) -> list[int]:
    chosen = [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in chosen if not -depth - 1 <= layer <= depth]
    if wrong or not chosen or len({layer % (depth + 1) for layer in chosen}) < len(chosen):
        raise ValueError(
            f"layers={layers} must be different numbers from 0 (the embeddings) to {depth} (the last layer), or from "
            f"-{depth + 1} to -1."
        )
    return [layer % (depth + 1) for layer in chosen]
