"""A Lightning module of a causal language model: with fast weights, trained, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_faast.associative import Learner
from lightning_faast.language import architecture
from lightning_faast.language.fast_weight_lm import FastWeightLM, refuse_other_model
from lightning_faast.language.metrics import TokenMetrics
from lightning_faast.language.pairs import IGNORED
from lightning_faast.language.pretrained import Dtype, load_model, load_tokenizer
from lightning_faast.language.scoring import TokenScores, score_logits
from lightning_faast.training.adapters import Adapter
from lightning_faast.training.module import TrainableModule
from lightning_faast.training.schedules import WarmupCosine

# Tells, in a checkpoint, the model whose weights are not in it.
_MODEL_KEY = "lightning_faast.language_model"


class LanguageModule(TrainableModule):
    """Predict the next token with a causal language model of transformers.

    With fast weights (the default) and a :class:`~lightning_faast.FaastCallback` in the trainer, the text is learned in
    one pass. With ``fast_weights=False`` and an ``adapter`` the model trains by backpropagation with the cross entropy
    of the next token; without both it is measured as it is.

    Batches are dicts of ``input_ids`` [B, T] and ``labels`` [B, T] (not shifted, -100 is left out), as
    :class:`~lightning_faast.data.LanguageDataModule` makes them; with ``bytes`` [B], those of the text of the labels,
    bits a byte are known. Sequences are padded on the right.

    Validation and test log ``loss`` (nats a token), ``perplexity``, ``accuracy`` (of the next token) and
    ``bits_per_byte``, as ``val/…`` and ``test/…``.

    A checkpoint holds what was learned: the fast weights, or what the adapter trains. The frozen weights of the model
    are not in it; they come from ``model_name`` again, and another model is refused.

    Args:
        model_name: A causal language model on the hub, or a folder.
        fast_weights: Options of :class:`~lightning_faast.language.FastWeightLM`, such as ``{"passes": 3}``; True for
            its defaults, False for none.
        adapter: How the model takes part in training: :class:`~lightning_faast.training.FullFinetuning` or
            :class:`~lightning_faast.training.Lora`; ``None`` leaves it as it is.
        optimizer: Called with groups of the parameters that require a gradient.
        lr_scheduler: Called with the optimizer, stepped once an epoch; a
            :class:`~lightning_faast.training.WarmupCosine` is stepped after every batch.
        gguf_file: Name of a GGUF file at ``model_name``, which is de-quantized.
        dtype: In which numbers the weights are held; ``"auto"`` is as they were saved. Statistics are float64 anyway.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: For fast weights beside an adapter, and what FastWeightLM refuses.
        ConnectionError: Where the model is on the hub and cannot be downloaded.

    Example:
        >>> import tempfile, torch
        >>> from lightning.pytorch import Trainer
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_faast import FaastCallback
        >>> from lightning_faast.language import LanguageModule
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(folder)
        >>> text = torch.arange(40).repeat(16, 2)
        >>> batches = torch.utils.data.DataLoader([{"input_ids": t, "labels": t} for t in text], batch_size=4)
        >>> module = LanguageModule(folder)
        >>> options = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        >>> quiet = dict.fromkeys(options, False)
        >>> trainer = Trainer(callbacks=[FaastCallback()], accelerator="cpu", **quiet)
        >>> before = trainer.test(module, batches, verbose=False)[0]
        >>> trainer.fit(module, batches)
        >>> after = trainer.test(module, batches, verbose=False)[0]
        >>> after["test/perplexity"] < before["test/perplexity"]
        True
    """

    #: The figure with which ``fit`` ends.
    headline = "perplexity"

    def __init__(
        self,
        model_name: str,
        fast_weights: dict[str, Any] | bool = True,
        adapter: Adapter | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | WarmupCosine | None = None,
        gguf_file: str | None = None,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, adapter)
        if fast_weights is not False and adapter is not None:
            raise ValueError(
                "fast_weights beside an adapter: fast weights are solved and an adapter trains. Set "
                "fast_weights=False (--model.fast_weights=false) or adapter=None."
            )
        self.model_name = model_name
        self.gguf_file = gguf_file
        self.trust_remote_code = trust_remote_code
        model = load_model(model_name, gguf_file, dtype, trust_remote_code)
        model.requires_grad_(False)
        self.has_fast_weights = fast_weights is not False
        self.network: nn.Module
        if self.has_fast_weights:
            self.network = FastWeightLM(model, **(fast_weights if isinstance(fast_weights, dict) else {}))
        else:
            self.network = self.adapter.adapt(model) if adapter is not None else model
        self.val_metrics, self.test_metrics = TokenMetrics(), TokenMetrics()
        self._tokenizer: Any = None
        self.set_pretrained_mode()

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self.network.model if self.has_fast_weights else self.network

    @property
    def pretrained(self) -> nn.Module:
        """The model."""
        return self.model

    @property
    def head(self) -> nn.Module:
        """What learns: the layer of fast weights, or else the model's output layer."""
        if isinstance(self.network, FastWeightLM):
            return self.network.learner
        return self.model.get_output_embeddings()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model_name, self.gguf_file, self.trust_remote_code)
        return self._tokenizer

    def own_parameters(self) -> list[nn.Parameter]:
        """None: fast weights are solved."""
        return []

    def nothing_to_optimize(self) -> str:
        """As with fast weights and no FaastCallback."""
        return (
            "no parameter of the language model requires a gradient. Add FaastCallback() to the trainer's callbacks to "
            "learn in one pass (on the command line: no --method=null), or train with fast_weights=False and an "
            "adapter, as configs/methods/language/lora.yaml does."
        )

    def setup(self, stage: str) -> None:
        """Refuse windows that are longer than the model's positions.

        Raises:
            ValueError: Saying how many positions there are.
        """
        window = getattr(getattr(self.trainer, "datamodule", None), "window", None)
        positions = architecture.max_positions(self.model)
        if window is not None and positions is not None and window > positions:
            raise ValueError(
                f"window={window}, and the model was made for {positions} positions. Set window to at most that "
                f"(--data.window={positions})."
            )

    # ------------------------------------------------------------------ learning

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        """Show a batch to the fast weights, which FaastCallback watches; or give its loss where the model trains."""
        if isinstance(self.network, FastWeightLM):
            self.head(self.network.keys(batch["input_ids"]))
            return None
        loss: Tensor = self(batch["input_ids"], labels=batch["labels"]).loss
        self.log("train/loss", loss, batch_size=len(batch["labels"]))
        return loss

    # ------------------------------------------------------------------ predicting

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """What the model gives for token ids [B, T]: ``logits`` [B, T, V], and ``loss`` where ``labels`` are given."""
        return self.network(input_ids=input_ids, use_cache=False, **options)

    def score(self, batch: Mapping[str, Tensor]) -> TokenScores:
        """What the model says of the labels of a batch; those at the first place of a sequence are left out."""
        labels = batch["labels"][:, 1:]
        counted = (labels != IGNORED).any(0).nonzero()[:, 0]
        first = int(counted[0]) if len(counted) else 0
        options = {}
        if first and "logits_to_keep" in architecture.arguments(architecture.eager(self.model)):
            options["logits_to_keep"] = labels.shape[1] + 1 - first  # context needs no product with the vocabulary
        logits = self(batch["input_ids"], **options).logits[:, :-1]
        return score_logits(logits, labels[:, labels.shape[1] - logits.shape[1] :])

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the ``val/…`` metrics."""
        self.val_metrics.update(self.score(batch), batch.get("bytes"))

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the ``test/…`` metrics, and give what was said of its tokens, as :meth:`predict_step`."""
        scores = self.score(batch)
        self.test_metrics.update(scores, batch.get("bytes"))
        return dict(vars(scores))

    def on_validation_epoch_end(self) -> None:
        """Log the ``val/…`` metrics."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the ``test/…`` metrics."""
        self._log_metrics("test", self.test_metrics)

    def _log_metrics(self, stage: str, metrics: TokenMetrics) -> None:
        # computed here, since a metric of several figures cannot be logged as it is; it sums over processes itself
        figures = {f"{stage}/{name}": value.float() for name, value in metrics.compute().items()}
        self.log_dict(figures, sync_dist=True)  # the same on every process
        metrics.reset()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Answer ``label``, ``predicted``, ``confidence`` and ``log_likelihood``, all [n], of the batch's labels."""
        return dict(vars(self.score(batch)))

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """The ``generate`` of transformers, with what was learned."""
        generated: Tensor = self.network.generate(input_ids, **options)  # type: ignore[operator]
        return generated

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights of the model."""
        frozen = self._frozen()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}
        checkpoint[_MODEL_KEY] = _first_elements(frozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen weights of the model back.

        Raises:
            ValueError: Where the checkpoint was written with another model.
        """
        frozen = self._frozen()
        if frozen and _MODEL_KEY in checkpoint:  # a model that is trained as a whole is in it as a whole
            refuse_other_model(_first_elements(frozen), checkpoint[_MODEL_KEY])
        checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}

    def _frozen(self) -> dict[str, Tensor]:
        """The part of the state that the model brought along and that nothing changes."""
        learners = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, Learner))
        state = self.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in state.items() if not t.requires_grad and not n.startswith(learners)}


def _first_elements(state: Mapping[str, Tensor]) -> Tensor:
    """The first element of every tensor, float32: enough to tell one model from another."""
    first = [t.flatten()[:1].to("cpu", torch.float32) for _, t in sorted(state.items()) if t.numel()]
    return torch.cat([*first, torch.empty(0)])
