# SPDX-License-Identifier: Apache-2.0
"""Prompt methods: the base class of their encoders, and the life of an encoder inside a PeftModel.

An encoder owns the trainable parts of one adapter and turns them into prompt rows [1 or batch, n, d]. Rows are either
put in front of the input embeddings (`produces = "embeds"`) or are the keys and values of virtual tokens of every layer
(`produces = "kv"`). It never sees the base model; `prompt_inputs.py` turns its output and the arguments of a call into
arguments of the base model.
"""

import contextlib
import re
import sys
import warnings
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from ..config import PromptLearningConfig, positive
from ..utils.peft_types import TaskType

PROMPT_KEY = "prompt_embeddings"


class Sizes(NamedTuple):
    """Sizes of a prompt, complete."""

    tokens: int
    width: int
    layers: int
    heads: int
    submodules: int

    @property
    def rows(self) -> int:
        return self.tokens * self.submodules


def sizes(config: PromptLearningConfig) -> Sizes:
    names = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
    return Sizes(*(positive(name, getattr(config, name)) for name in names))


class BasePromptEncoder(nn.Module):
    """Base of the encoders. A method overrides `forward`, and `export`/`load` if its file holds more than the rows."""

    embedding: Any  # nn.Embedding, or what looks like one

    produces: ClassVar[Literal["embeds", "kv"]] = "embeds"
    uses_word_embeddings: ClassVar[bool] = False
    # Encoder-decoders: rows [nv:] go in front of the decoder inputs. Otherwise they are in the file but never used.
    feeds_decoder: ClassVar[bool] = False
    # Arguments of the model call that `loss` takes. Only read when the method overrides `loss`.
    loss_arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def create(cls, config: PromptLearningConfig, word_embeddings: nn.Module | None = None) -> "BasePromptEncoder":
        return cls(config, word_embeddings) if cls.uses_word_embeddings else cls(config)

    @property
    def rows(self) -> int:
        """Number of rows: virtual tokens times the transformer submodules they are made for."""
        return self.embedding.num_embeddings

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the prompt for `indices` [1 or b, n] -> [1 or b, n, d]."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The method's own loss; `labels` [b, T] of the text, `logits` [b, n + T, vocab] with the prompt."""
        raise NotImplementedError(f"{type(self).__name__} does not implement loss")

    def settle(self, unit: nn.Module) -> None:
        """Change parameters before a forward, `unit` being the encoder or what wraps it: inside, they may be copies."""

    @classmethod
    def has_loss(cls) -> bool:
        return cls.loss is not BasePromptEncoder.loss

    # ---- files
    @torch.no_grad()
    def export(self) -> dict[str, torch.Tensor]:
        """What the file holds: the final rows, so that loading needs no re-parameterisation. On the CPU, detached."""
        training = self.training
        self.eval()  # a dropout mask must not end up in the file
        try:
            rows = self(torch.arange(self.rows, device=self.device).unsqueeze(0))[0]
        finally:
            self.train(training)
        return {PROMPT_KEY: rows.detach().cpu()}

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.embedding.load_state_dict({"weight": prompt_rows(state_dict)}, strict=True)

    # Published names of these steps, for callers: keys of prompts never hold the adapter's name.
    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: PromptLearningConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return model.prompt_encoder[adapter_name].export()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: PromptLearningConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return state_dict

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"\.{re.escape(adapter_name)}(?=$|\.[^.]*$)", "", key)

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.load(state_dict)


def prompt_rows(state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    if PROMPT_KEY not in state_dict:
        raise KeyError(
            f"The adapter weights lack {PROMPT_KEY!r}, they hold {sorted(state_dict)[:5]}: not a prompt method?"
        )
    return state_dict[PROMPT_KEY]


def word_vectors(word_embeddings: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the word embeddings make of `ids`, as new float32 data (gathered first under DeepSpeed ZeRO-3)."""
    from ..utils.integrations import gather_params_ctx

    weight = word_embeddings.weight
    with gather_params_ctx([weight]):
        if wrong := [i for i in ids.flatten().tolist() if not 0 <= i < len(weight)]:
            raise IndexError(f"Token ids {wrong[:5]} are not in the vocabulary of the model, 0 to {len(weight) - 1}.")
        return word_embeddings(ids.to(weight.device)).detach().to(torch.float32, copy=True)


# ---- configuration
# What models call these sizes.
_WIDTH = "hidden_size n_embd d_model dim"
_HEADS = "num_attention_heads n_head num_heads encoder_attention_heads n_heads"


def prepare_prompt_config(config: PromptLearningConfig, model_config: Any) -> PromptLearningConfig:
    """Fill what the base model decides (layers, widths, heads) into `config`, in place; values set by the user stay."""
    values = _as_dict(model_config)
    if values.get("text_config") is not None:
        values = _as_dict(values["text_config"])
    if config.num_layers is None:
        names = "num_hidden_layers num_layers n_layer n_layers"
        config.num_layers = getattr(model_config, "num_hidden_layers", None) or _first(values, "num_layers", names)
    if config.token_dim is None:
        config.token_dim = _first(values, "token_dim", _WIDTH)
    if config.num_attention_heads is None:
        config.num_attention_heads = _first(values, "num_attention_heads", _HEADS)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if _encoder_class(config).produces == "kv" and values.get("num_key_value_heads") is not None:
        # The cache of grouped-query models is narrower than the hidden states: these two always describe the cache.
        head_dim, heads = _cache_shape(config, values)
        config.token_dim, config.num_attention_heads = head_dim * heads, heads
    if getattr(config, "encoder_hidden_size", None) is None:
        # Also on configurations without that field: other code reads it from any prompt configuration.
        vars(config)["encoder_hidden_size"] = config.token_dim
    return config


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))


def _first(values: dict[str, Any], field: str, names: str, default: Any = None) -> Any:
    found = next((values[n] for n in names.split() if values.get(n) is not None), default)
    if found is not None:
        return found
    raise ValueError(
        f"Please specify `{field}` in the prompt configuration: the model configuration has none of "
        f"{', '.join(names.split())}."
    )


def _cache_shape(config: PromptLearningConfig, values: dict[str, Any]) -> tuple[int, int]:
    """(head_dim, key/value heads) that the prefix is made for; the widest layer's when layers differ."""
    heads, head_dim = values["num_key_value_heads"], values.get("head_dim")
    if values.get("global_head_dim") is not None:
        return values["global_head_dim"], values.get("num_global_key_value_heads") or heads
    if head_dim is None:
        width = _first(values, "token_dim", _WIDTH, config.token_dim)
        head_dim = width // _first(values, "num_attention_heads", _HEADS, config.num_attention_heads)
    overrides = values.get("per_layer_config") or ()
    layers = [_as_dict(layer) for layer in (overrides.values() if isinstance(overrides, dict) else overrides)]
    own = [(v["head_dim"], v.get("num_key_value_heads") or heads) for v in layers if v.get("head_dim") is not None]
    return max([(head_dim, heads), *own], key=lambda shape: shape[0])


def _encoder_class(config: PromptLearningConfig) -> type[BasePromptEncoder]:
    from ..registry import method_of

    return method_of(config).tuner


# ---- encoders of a PeftModel
def setup_prompt_encoder(peft_model: Any, adapter_name: str, config: PromptLearningConfig) -> None:
    """Complete `config`, freeze the base model, and create the encoder and tokens of `adapter_name`."""
    base = peft_model.base_model
    prepare_prompt_config(config, base.config)
    encoder_class = _encoder_class(config)
    if encoder_class.produces == "kv" and is_checkpointing(base):
        name = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{name} does not work with gradient checkpointing: it drops the cache that holds the prefix.")
    _find_backbone(peft_model)
    words: Any = find_word_embeddings(peft_model)
    encoder = encoder_class.create(config, words)
    device = base.device if getattr(base, "device", None) is not None else words.weight.device
    if device.type != "meta":
        encoder = encoder.to(device)
    if "prompt_encoder" not in peft_model._modules:
        # Once: later on the base model also holds the heads that earlier adapters train.
        base.requires_grad_(False)
        peft_model.prompt_encoder = nn.ModuleDict()
        peft_model.prompt_tokens = {}
    peft_model.prompt_encoder[adapter_name] = encoder
    peft_model.prompt_tokens[adapter_name] = torch.arange(sizes(config).rows)
    # An alias: kept out of the module tree, so that the weights do not appear twice in the state dict.
    vars(peft_model)["word_embeddings"] = words


def is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _find_backbone(peft_model: Any) -> None:
    """Name the child that is the transformer itself, if the base model is a head around one."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    for name, child in peft_model.base_model.named_children():
        if isinstance(child, pretrained):
            vars(peft_model)["transformer_backbone_name"] = name
            return


def find_word_embeddings(peft_model: Any) -> nn.Module:
    """The module that embeds token ids; looked up on each use, since resizing the vocabulary replaces it."""
    base = peft_model.base_model
    if callable(getattr(base, "get_input_embeddings", None)):
        with contextlib.suppress(NotImplementedError):
            if (words := base.get_input_embeddings()) is not None:
                return words
    values = _as_dict(base.config)
    vocab = values.get("vocab_size") or _as_dict(values.get("text_config") or {}).get("vocab_size")
    for name, parameter in base.named_parameters():
        if tuple(getattr(parameter, "ds_shape", parameter.shape))[:1] == (vocab,):
            return base.get_submodule(name.rpartition(".")[0])
    raise ValueError(
        f"Found no word embeddings in {type(base).__name__}: it has neither get_input_embeddings() nor a "
        f"parameter with {vocab} rows, the vocab_size of its configuration."
    )


def delete_prompt_adapter(peft_model: Any, adapter_name: str) -> None:
    """Remove configuration, encoder and tokens; the first remaining adapter becomes active if this one was."""
    del peft_model.peft_config[adapter_name]
    del peft_model.prompt_encoder[adapter_name]
    del peft_model.prompt_tokens[adapter_name]
    if peft_model.active_adapter != adapter_name:
        return
    remaining = list(peft_model.peft_config)
    if remaining:
        warnings.warn(
            f"Adapter {adapter_name!r} was active and is now deleted. Setting the active adapter to {remaining[0]!r}.",
            stacklevel=3,
        )
    peft_model.active_adapter = remaining[0] if remaining else []


def active_encoder(peft_model: Any) -> BasePromptEncoder | None:
    """The encoder in use; None for other methods, while disabled, and after the last adapter was deleted."""
    if not peft_model._is_prompt_learning or peft_model._adapters_disabled or not peft_model.active_adapter:
        return None
    return peft_model.prompt_encoder[peft_model.active_adapter]
