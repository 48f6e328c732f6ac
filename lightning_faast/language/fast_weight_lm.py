"""FastWeightLM: a causal language model that learns from text in one forward pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_faast.associative import Learner
from lightning_faast.associative.files import save_tensors
from lightning_faast.language import architecture
from lightning_faast.language.adaptations import build, named
from lightning_faast.language.learner import HiddenLearner
from lightning_faast.language.pairs import IGNORED, pair_labels
from lightning_faast.language.taps import Tap

_FORMAT = "lightning_faast.language.v1"
#: The attribute by which a model knows that it is adapted.
_OWNER = "_fast_weight_lm"
#: First elements of parameters may differ by so much, relatively: the rounding of half precision.
_SAME_MODEL = 2e-2


class FastWeightLM(nn.Module):
    """Fast weights inside a causal language model of transformers, through hooks: no file of the model changes.

    With no further argument the output layer learns, exactly and in one pass, by the ``residual`` rule, which needs no
    training beforehand: :class:`~lightning_faast.language.ResidualFastWeights`. :meth:`learn` takes text in,
    the next prediction solves, and the model answers with what it learned; :meth:`detach` gives it back bit for bit.

    One model may have several adaptations, made by :meth:`add` and switched by :meth:`use`.

    Args:
        model: ``AutoModelForCausalLM``; Llama, SmolLM, Qwen2, Qwen3, GPT-2, GPT-NeoX, Gemma, Mistral and OPT are known,
            others say what is missing. Compiled models are compiled again where an adaptation comes or goes.
        layer: ``"output"`` or ``"middle"``.
        mode: Of the output layer: ``"residual"`` (ours, exact), ``"embedding"`` (the paper's values, exact),
            ``"chunked"`` (the paper's) or ``"knn_lm"`` (nearest neighbors). The middle layer is the paper's.
        layers: Path of the decoder layers, for a family that is not known.
        **options: Of the layer: :class:`ResidualFastWeights`, :class:`EmbeddingFastWeights`,
            :class:`ChunkedFastWeights`, :class:`KNNLM` or :class:`MiddleFastWeights`. ``over`` of ``knn_lm`` is the
            mode, or the options, of an output layer beneath it. ``key_layers=[...]`` adds the outputs of decoder
            layers to the keys of ``residual``; ``at`` is the decoder layer of ``middle``.

    Attributes:
        model: The model as given.
        adaptations: Name -> layer of fast weights.
        active: Name of the adaptation in use, or None.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast.language import FastWeightLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> text = torch.arange(40).repeat(16, 2)
        >>> lm = FastWeightLM(model)
        >>> before = lm(text, labels=text).loss
        >>> after = lm.learn(text)(text, labels=text).loss
        >>> bool(after < before), lm.generate(text[:1, :10], max_new_tokens=5, do_sample=False).shape
        (True, torch.Size([1, 15]))
        >>> model = lm.detach()
    """

    def __init__(
        self, model: Any, layer: str = "output", mode: str | None = None, *, layers: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.model = model
        if getattr(self._eager, _OWNER, None) is not None:
            raise ValueError(
                "This model is adapted already. Add another adaptation to its FastWeightLM (add(name), use(name)), or "
                "detach() that first."
            )
        self._output = architecture.output_layer(model)
        self._layers_path = layers
        self._positions = architecture.max_positions(model)
        self._default = {"layer": layer, "mode": mode, **options}
        self._options: dict[str, dict[str, Any]] = {}
        self._taps: dict[str, Tap] = {}
        self._stale: set[str] = set()
        self.adaptations = nn.ModuleDict()
        self.active: str | None = None
        self.add("default")
        object.__setattr__(self._eager, _OWNER, True)
        self.use("default")

    @property
    def _eager(self) -> Any:
        return architecture.eager(self.model)

    # ------------------------------------------------------------------ adaptations

    def add(self, name: str, **options: Any) -> Learner:
        """Add an adaptation, empty; :meth:`use` switches to it.

        Args:
            name: Without dots.
            **options: As of the class; what is not given is as in the first.

        Returns:
            Its layer of fast weights.
        """
        if name in self.adaptations:
            raise ValueError(f"There is an adaptation {name!r} already: {', '.join(self.adaptations)}.")
        other = {"layer", "mode"} & options.keys()  # options of another layer mean nothing to this one
        options = named({**({} if other else self._default), **options})
        learner, tap = build(self._eager, self._output, self._layers_path, options)
        self.adaptations[name] = learner.train(self._eager.training)
        self._options[name], self._taps[name] = options, tap
        return learner

    def use(self, name: str | None) -> FastWeightLM:
        """Switch to an adaptation, or with None to the model without any. Returns itself."""
        if name is not None and name not in self.adaptations:
            raise KeyError(
                f"There is no adaptation {name!r}; there are {', '.join(self.adaptations)}. add(name) makes one."
            )
        if name != self.active:
            if self.active is not None:
                self._taps[self.active].remove()
            self.active = name
            if name is not None:
                self._taps[name].attach()
            self._compile_again()
        return self

    @property
    def learner(self) -> Any:
        """The layer of the adaptation in use.

        Raises:
            RuntimeError: Where none is.
        """
        if self.active is None:
            raise RuntimeError("No adaptation is in use: call use(name) first.")
        return self.adaptations[self.active]

    @property
    def _tap(self) -> Tap:
        """What connects the layer of the adaptation in use; as :attr:`learner`."""
        _ = self.learner
        return self._taps[str(self.active)]

    def _compile_again(self) -> None:
        """Compiled code does not see hooks that come or go."""
        compiled = self.model is not self._eager and hasattr(self.model, "_orig_mod")
        if compiled or any(getattr(m, "_compiled_call_impl", None) is not None for m in self._eager.modules()):
            torch.compiler.reset()

    # ------------------------------------------------------------------ learning

    def learn(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> FastWeightLM:
        """Take in text by one forward pass; may be called again and again. The next prediction solves.

        Args:
            input_ids: Token ids [B, T], T at most the model's positions.
            attention_mask: [B, T], 1 for tokens and 0 for padding, on either side.
            labels: [B, T], where not every token is to be learned: -100 for those that are not. Not shifted.

        Returns:
            Itself.

        Raises:
            ValueError: For no or too many positions, tokens that the model does not have, nothing to learn, NaN hidden
                states. Model and sums are then as they were (on devices other than the CPU, tokens, masks and states
                are looked at later: by the next solve).
        """
        self._check_tokens(input_ids, "input_ids")
        labels = pair_labels(input_ids, attention_mask, labels)
        if labels.device.type == "cpu" and not bool((labels != IGNORED).any()):
            raise ValueError(
                "There is nothing to learn: no token that counts has one before it. Check attention_mask and labels "
                f"(-100 is left out) of input_ids {tuple(input_ids.shape)}."
            )
        return self.learn_keys(self.keys(input_ids, attention_mask), labels)

    def learn_keys(self, keys: Tensor, labels: Tensor) -> FastWeightLM:
        """Take in hidden states that :meth:`watching` gave [B, T, k], with labels [B, T] as in :meth:`learn`."""
        self.learner.update(keys, labels)
        self._stale.add(str(self.active))
        return self

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """While open, the keys [B, T, k] of every call are appended to the list: what was predicted can be learned."""
        self._ready()
        with self._tap.watching() as watched:
            yield watched

    @contextmanager
    def temporarily(self) -> Iterator[FastWeightLM]:
        """While open the adaptation in use may learn; afterwards it is as it was, bit for bit, also after an error."""
        learner, name = self.learner, str(self.active)
        stale = name in self._stale
        learned = {key: t.clone() for key, t in learner.learned_state().items()}
        solved = {key: t.clone() for key, t in learner.state_dict().items()}
        solution = learner.solution
        try:
            yield self
        finally:
            learner.reset()
            learner.load_learned_state(learned)
            learner.load_state_dict(solved)
            learner.solution = solution
            (self._stale.add if stale else self._stale.discard)(name)

    def _check_tokens(self, input_ids: Tensor, name: str) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"{name} must be token ids [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}.")
        length = input_ids.shape[1]
        if not input_ids.numel():
            raise ValueError(f"{name} is empty: {tuple(input_ids.shape)}.")
        if self._positions is not None and length > self._positions:
            raise ValueError(
                f"{name} has {length} positions, and the model was made for {self._positions}. Cut the text into "
                f"windows: lightning_faast.language.windows(input_ids, {self._positions})."
            )
        rows = self._eager.get_input_embeddings().weight.shape[0]
        if input_ids.device.type == "cpu":
            low, high = (int(t) for t in torch.aminmax(input_ids))
            if low < 0 or high >= rows:
                raise ValueError(
                    f"{name} holds {low if low < 0 else high}, and the model has {rows} tokens. Use the model's own "
                    "tokenizer, or resize_token_embeddings."
                )

    @torch.no_grad()
    def keys(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, k] of the layer in use, of the model as it is without fast weights."""
        device = architecture.input_device(self._eager)
        inputs = {"input_ids": input_ids.to(device), "use_cache": False}
        if attention_mask is not None:
            inputs["attention_mask"] = mask = attention_mask.to(device)
            if "position_ids" in architecture.arguments(self._eager):  # padding on the left does not count
                inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        tap = self._tap
        with architecture.evaluating(self._eager), tap.reading() as read:
            architecture.run(self._eager, **inputs)
        if len(read) != 1:
            raise RuntimeError(f"The layer was run {len(read)} times in one forward pass; it must run exactly once.")
        return read[0]

    def solve(self) -> Any:
        """Solve now what was learned; otherwise the next prediction does. Returns the layer's solution."""
        solution = self.learner.solve()
        self._stale.discard(str(self.active))
        return solution

    def reset(self) -> FastWeightLM:
        """Forget everything the adaptation in use has learned: the model predicts as it did. Returns itself."""
        learner = self.learner
        learner.reset()
        learner.forget()
        self._stale.discard(str(self.active))
        return self

    def merge(self, other: str | FastWeightLM) -> FastWeightLM:
        """Take in what another adaptation has learned. Returns itself.

        Args:
            other: Name of an adaptation, or a FastWeightLM of the same model, whose adaptation in use is meant.
        """
        return self._combine(other, lambda mine, theirs: mine.merge(theirs))

    def subtract(self, other: str | FastWeightLM) -> FastWeightLM:
        """Forget what another adaptation has learned, all of which this one has learned too; as :meth:`merge`."""
        return self._combine(other, lambda mine, theirs: mine.subtract(theirs))

    def _combine(self, other: str | FastWeightLM, combine: Callable[[Any, Any], None]) -> FastWeightLM:
        if isinstance(other, FastWeightLM):
            refuse_other_model(_fingerprint(self._eager), _fingerprint(other._eager))
            theirs = other.learner
        elif other in self.adaptations:
            theirs = self.adaptations[other]
        else:
            raise KeyError(f"There is no adaptation {other!r}; there are {', '.join(self.adaptations)}.")
        if type(theirs) is not type(self.learner):
            raise ValueError(f"A {type(theirs).__name__} cannot be combined with a {type(self.learner).__name__}.")
        combine(self.learner, theirs)
        if self.learner.rows:
            self._stale.add(str(self.active))
            return self
        return self.reset()  # everything was forgotten

    # ------------------------------------------------------------------ predicting

    def _ready(self) -> None:
        if self.active in self._stale:
            self.solve()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, with the adaptation in use; ``labels`` give its loss."""
        self._ready()
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, with the adaptation in use: greedy, sampling, beams, with its KV cache."""
        self._ready()
        return self.model.generate(*args, **kwargs)

    # ------------------------------------------------------------------ leaving

    def detach(self) -> Any:
        """Take all hooks off and return the model, bit for bit as it was."""
        self.use(None)
        if getattr(self._eager, _OWNER, None) is not None:
            object.__delattr__(self._eager, _OWNER)
        return self.model

    def __enter__(self) -> FastWeightLM:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.detach()

    # ------------------------------------------------------------------ state

    def save(self, path: str | os.PathLike[str], learning: bool = True) -> Path:
        """Write the adaptation in use to a safetensors file, whole or not at all; the model is not in it.

        Args:
            path: The file.
            learning: Whether learning can go on from it; without, it holds only what a prediction reads.

        Returns:
            The path.
        """
        self._ready()
        learner = self.learner
        tensors = {f"solved.{name}": t for name, t in learner.state_dict().items()}
        if learning:
            tensors |= {f"learned.{name}": t for name, t in learner.learned_state().items()}
        tensors["model"] = _fingerprint(self._eager)
        options, objects = _plain(self._options[str(self.active)])
        config = {"options": options, "objects": objects}
        return save_tensors(tensors, path, {"format": _FORMAT, "config": json.dumps(config)})

    def load(self, path: str | os.PathLike[str]) -> FastWeightLM:
        """Read an adaptation written by :meth:`save` into the one in use. Returns itself.

        Raises:
            FileNotFoundError: Where there is no such file.
            ValueError: For a damaged file, one of another model, or one of another kind of layer.
        """
        tensors, config = _read(path)
        refuse_other_model(_fingerprint(self._eager), tensors["model"])
        mine, theirs = self._options[str(self.active)], config["options"]
        kinds = [(o["layer"], o["mode"]) for o in (mine, theirs)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{path} holds an adaptation (layer, mode) = {kinds[1]}, and this one is {kinds[0]}.")
        parts: dict[str, dict[str, Tensor]] = {"solved": {}, "learned": {}}
        for name, t in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = t
        learner = self.learner
        shapes, given = (_shapes(state, learner) for state in (learner.state_dict(), parts["solved"]))
        if shapes != given:
            raise ValueError(f"{path} was written with other options: {theirs}, and this adaptation has {mine}.")
        learner.reset()
        if parts["learned"]:
            learner.load_learned_state(parts["learned"])
        learner.load_state_dict(parts["solved"])
        self._stale.discard(str(self.active))
        return self

    @classmethod
    def from_file(cls, model: Any, path: str | os.PathLike[str], **options: Any) -> FastWeightLM:
        """A FastWeightLM with the options and the state of a file.

        Args:
            model: The model it was learned with.
            path: Written by :meth:`save`.
            **options: In place of those in the file, and those that are objects (``regularization``), which no file
                holds.
        """
        config = _read(path)[1]
        missing = [f"{name}={value}" for name, value in config["objects"].items() if name not in options]
        if missing:
            raise ValueError(
                f"{path} was written with objects among its options; give them again: {', '.join(missing)}."
            )
        lm = cls(model, **{**config["options"], **options})
        try:
            return lm.load(path)
        except BaseException:
            lm.detach()
            raise

    # ------------------------------------------------------------------ reporting

    @property
    def bytes_to_predict(self) -> int:
        """Bytes of what a prediction reads beside the model."""
        return self.learner.bytes_to_predict

    @property
    def bytes_to_update(self) -> int:
        """Bytes of what learning on needs beside the model."""
        return self.learner.bytes_to_update

    @property
    def tokens(self) -> int:
        """Next-token pairs learned since the last reset."""
        return self.learner.rows

    def figures(self) -> dict[str, float]:
        """Figures of the last solve by the names under which they are logged."""
        self._ready()
        return self.learner.figures()

    def summary(self) -> str:
        """What the last solve found: one line."""
        self._ready()
        return self.learner.summary()


def _shapes(state: dict[str, Tensor], learner: HiddenLearner) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape[name in learner.row_tensors :]) for name, t in state.items()}


def _fingerprint(model: nn.Module) -> Tensor:
    """The first element of every floating-point parameter, [p] float32: enough to tell one model from another."""
    first = [p.detach().flatten()[:1] for p in model.parameters() if p.is_floating_point() and p.numel()]
    return torch.cat([p.to(device="cpu", dtype=torch.float32) for p in first])


def refuse_other_model(mine: Tensor, theirs: Tensor) -> None:
    """Refuse first elements of weights that are not those of this model.

    Raises:
        ValueError: Where they differ by more than the rounding of half precision.
    """
    theirs = theirs.to(mine)
    scale = mine.abs().mean() if mine.numel() else 0.0
    if mine.shape != theirs.shape or bool(((mine - theirs).abs() > _SAME_MODEL * (scale + theirs.abs())).any()):
        raise ValueError(
            "The adaptation was learned with another model: statistics mean something only with the weights they were "
            "taken at. Load that model, or learn again."
        )


def _plain(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Options as JSON has them, and the names of those that it cannot hold, with what they were."""
    plain: dict[str, Any] = {}
    objects: dict[str, str] = {}
    for name, value in options.items():
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        try:
            plain[name] = json.loads(json.dumps(value))
        except TypeError:
            objects[name] = repr(value)
    return plain, objects


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No adaptation file at {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}. Write it again.") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no adaptation of a language model (format {metadata.get('format')!r}).")
    return tensors, json.loads(metadata["config"])
