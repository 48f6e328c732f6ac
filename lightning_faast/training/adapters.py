"""How an encoder takes part in training by backpropagation."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of those of one, two and three dimensions

from lightning_faast.data.extras import require

#: Names of an attention's linear layers: timm, then transformers.
_ATTENTION_LINEARS = (
    *("qkv", "q", "k", "v", "proj"),
    *("query", "key", "value", "q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
    *("q_lin", "k_lin", "v_lin", "out_lin", "c_attn", "c_proj", "o"),
    *("query_proj", "key_proj", "value_proj", "qkv_proj", "query_key_value", "Wqkv", "Wo"),
)


def is_frozen(part: nn.Module) -> bool:
    """Whether no parameter requires a gradient."""
    return not any(parameter.requires_grad for parameter in part.parameters())


class Adapter:
    """What :class:`~lightning_faast.FaastModule` does to its encoder before training.

    This one leaves the encoder as it is: what requires a gradient is trained. Subclasses change it, in place, so that
    its attributes (``num_features``, ``data_config``) stay where they are.
    """

    def adapt(self, encoder: nn.Module) -> nn.Module:
        """Prepare the encoder, once, and return it."""
        return encoder

    def parameter_groups(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """Group the encoder's trained parameters for the optimizer.

        A group's ``lr_scale`` multiplies the optimizer's learning rate; other entries are options of the optimizer.
        """
        return [{"params": [parameter for parameter in encoder.parameters() if parameter.requires_grad]}]

    def stays_in_eval_mode(self, part: nn.Module) -> bool:
        """Whether a part of the encoder is in eval mode during training: here, one that has state and trains none."""
        return is_frozen(part) and bool(part.state_dict(keep_vars=True))

    def check_gradients(self, encoder: nn.Module) -> None:
        """Look at the gradients of the first step, for what can only be known then."""


class FullFinetuning(Adapter):
    """Train every parameter that inputs pass through, those of early layers at lower learning rates.

    Layer l of L trains at ``lr_scale * layer_decay ** (L - 1 - l)`` times the optimizer's rate, the head at that rate
    itself. Weight decay is the optimizer's own; biases, norms and what the model names (position embeddings) get none.

    For a timm model the layers are timm's (``timm.optim.param_groups_layer_decay``). For any other encoder they are the
    entries of its longest ``nn.ModuleList`` or ``nn.Sequential``; what is registered before it belongs to the first
    of them and what comes after it to the last.

    Args:
        layer_decay: Of the learning rate from one layer to the one before it, in (0, 1]; 1 trains all alike.
        lr_scale: The last layer's rate, relative to the head's, which starts from nothing.
        keep_statistics: Whether BatchNorm normalizes by the statistics of its pretraining, as when it predicts. Those
            of small batches, and of few of them, are worse.

    Raises:
        ValueError: Where an option is out of its range, ``layer_decay`` is below 1 for an encoder without layers, and
            for an encoder without parameters.

    Example:
        >>> from lightning_faast.encoders import VisionEncoder
        >>> adapter = FullFinetuning(layer_decay=0.5)
        >>> encoder = adapter.adapt(VisionEncoder("test_vit", pretrained=False))
        >>> sorted({group["lr_scale"] for group in adapter.parameter_groups(encoder)})[-3:]
        [0.25, 0.5, 1.0]
    """

    def __init__(self, layer_decay: float = 0.75, lr_scale: float = 1.0, keep_statistics: bool = True) -> None:
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1.")
        self.layer_decay = layer_decay
        self.lr_scale = _positive(lr_scale)
        self.keep_statistics = keep_statistics

    def adapt(self, encoder: nn.Module) -> nn.Module:
        """Let every parameter be trained that inputs pass through."""
        parameters = _input_parameters(encoder)
        if not parameters:
            raise ValueError(
                f"the encoder {_describe(encoder)} has no parameters: there is nothing to fine-tune. Train its head "
                "alone, without an adapter (--model.adapter=null)."
            )
        _unfreeze(encoder)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return encoder

    def parameter_groups(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """Group the parameters by layer, and within it by whether they decay."""
        groups = self._layers(encoder)
        return [group | {"lr_scale": self.lr_scale * group["lr_scale"]} for group in groups]

    def stays_in_eval_mode(self, part: nn.Module) -> bool:
        """As of any adapter, and BatchNorm that keeps its statistics."""
        return super().stays_in_eval_mode(part) or (self.keep_statistics and isinstance(part, _BatchNorm))

    def _layers(self, encoder: nn.Module) -> list[dict[str, Any]]:
        model: Any = next((part for part in encoder.modules() if hasattr(part, "group_matcher")), None)
        if model is None:
            return self._generic_layers(encoder)
        from timm.optim import param_groups_layer_decay  # timm takes a second to import

        groups = param_groups_layer_decay(
            model,
            weight_decay=None,  # left out below: the optimizer's own
            no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
            layer_decay=self.layer_decay,
        )
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        around = [p for p in encoder.parameters() if p.requires_grad and id(p) not in grouped]
        groups = [{name: value for name, value in group.items() if value is not None} for group in groups]
        return [*groups, {"params": around, "lr_scale": 1.0}] if around else groups

    def _generic_layers(self, encoder: nn.Module) -> list[dict[str, Any]]:
        stacks = [
            (name, part)
            for name, part in encoder.named_modules()
            if isinstance(part, nn.ModuleList | nn.Sequential) and any(p.requires_grad for p in part.parameters())
        ]
        path, stack = max(stacks, key=lambda named: len(named[1]), default=("", nn.ModuleList()))
        # those above the layer that is read are not trained
        layers = [name for name, layer in stack.named_children() if not is_frozen(layer)]
        if len(layers) < 2 and self.layer_decay < 1:
            raise ValueError(
                f"layer_decay={self.layer_decay}, but the encoder {_describe(encoder)} has no nn.ModuleList or "
                "nn.Sequential whose entries could be its layers. Set layer_decay=1 "
                "(--model.adapter.layer_decay=1)."
            )
        prefix, last = f"{path}." if path else "", max(len(layers) - 1, 0)
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        outside = 0
        for name, parameter in encoder.named_parameters():
            if not parameter.requires_grad:
                continue
            if layers and name.startswith(prefix):
                layer, outside = layers.index(name.removeprefix(prefix).split(".")[0]), last
            else:
                layer = outside
            decay = {} if parameter.ndim > 1 else {"weight_decay": 0.0}
            group = {"params": [], "lr_scale": self.layer_decay ** (last - layer), **decay}
            groups.setdefault((layer, bool(decay)), group)["params"].append(parameter)
        return list(groups.values())


class Lora(Adapter):
    """Train low-rank updates of the encoder's attention layers (LoRA, by peft) and keep its own weights.

    A layer W becomes ``W + alpha / r * B A`` with A [r, in] random and B [out, r] zero at the start. Norms and their
    statistics stay as they are.

    Args:
        r: Rank of the updates.
        alpha: Their weight, relative to ``r``.
        dropout: On the input of A.
        target_modules: Names, or ends of names, of the layers; ``None`` for the linear layers of every attention, as
            timm and transformers name them.
        lr_scale: The rate of the updates, relative to the head's.

    Raises:
        ImportError: Where peft is not installed.
        ValueError: Where the encoder has no attention and ``target_modules`` says nothing; in the first step of
            training, where an update has no effect.

    Example:
        >>> from lightning_faast.encoders import VisionEncoder
        >>> encoder = Lora(r=2).adapt(VisionEncoder("test_vit", pretrained=False))
        >>> sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
        4608
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        if r < 1:
            raise ValueError(f"r={r} must be at least 1.")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.lr_scale = _positive(lr_scale)

    def adapt(self, encoder: nn.Module) -> nn.Module:
        """Put the updates beside the layers and freeze everything else."""
        peft = require("peft", "lora")
        found = attention_linears(encoder)
        targets = self.target_modules or list(found)
        if not targets:
            raise ValueError(
                f"LoRA updates attention layers, and the encoder {_describe(encoder)} has none (looked for linear "
                f"layers named {', '.join(_ATTENTION_LINEARS)} inside a module named *attn* or *attention*). "
                "Name the layers with Lora(target_modules=[...]) (--model.adapter.target_modules=[...]), or choose "
                "another method."
            )
        _unfreeze(encoder)
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=any(_is_conv1d(layer) for layer in found.values()),
        )
        adapted: nn.Module = peft.inject_adapter_in_model(config, encoder)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        rank_zero_info(f"LoRA: {trained:,} parameters trained in {_describe(encoder)}.")
        return adapted

    def parameter_groups(self, encoder: nn.Module) -> list[dict[str, Any]]:
        """One group: the updates."""
        return [group | {"lr_scale": self.lr_scale} for group in super().parameter_groups(encoder)]

    def check_gradients(self, encoder: nn.Module) -> None:
        """Refuse updates that take no part.

        Raises:
            ValueError: Where the encoder computes with a layer's weight without calling the layer.
        """
        idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in idle))
        if layers:
            raise ValueError(
                f"LoRA has no effect on {', '.join(layers)}: the encoder {_describe(encoder)} does not call these "
                "layers, or uses their weights without calling them. Name the others with Lora(target_modules=[...]) "
                "(--model.adapter.target_modules=[...]), or choose another method."
            )


def attention_linears(encoder: nn.Module) -> dict[str, nn.Module]:
    """Find the linear layers of every attention in an encoder, by their names, as timm and transformers give them.

    Left out are layers whose weight the attention reads without calling them, so that an update would have no effect:
    those of ``nn.MultiheadAttention``, and timm's ``qkv`` where query and value have biases of their own. So is the
    text tower of a CLIP encoder.
    """
    reached = {id(parameter) for parameter in _input_parameters(encoder)}
    found = {}
    for name, layer in encoder.named_modules():
        path, _, leaf = name.rpartition(".")
        inside = "attn" in path.lower() or "attention" in path.lower()
        # exactly: what nn.MultiheadAttention holds is a subclass
        if not inside or leaf not in _ATTENTION_LINEARS or not (type(layer) is nn.Linear or _is_conv1d(layer)):
            continue
        if leaf == "qkv" and getattr(encoder.get_submodule(path), "q_bias", None) is not None:
            continue
        if id(layer.weight) in reached:
            found[name] = layer
    return found


def _input_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """All parameters, or those that an encoder says its inputs pass through.

    Of a CLIP model they are those of the image tower, as the text tower gives values and is not trained.
    """
    part: Any = next((part for part in encoder.modules() if hasattr(part, "input_parameters")), None)
    return list(encoder.parameters() if part is None else part.input_parameters())


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' linear layer with a transposed weight, without importing transformers."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _unfreeze(encoder: nn.Module) -> None:
    """Undo what an encoder of this package does to stay frozen: it cuts gradients off and stays in eval mode."""
    if hasattr(encoder, "frozen"):
        encoder.frozen = False  # type: ignore[assignment]
    encoder.train()


def _positive(lr_scale: float) -> float:
    if not lr_scale > 0:
        raise ValueError(f"lr_scale={lr_scale} must be positive.")
    return lr_scale


def _describe(encoder: nn.Module) -> str:
    model = getattr(encoder, "model", None)
    return type(encoder).__name__ + (f"({type(model).__name__})" if isinstance(model, nn.Module) else "")
