# SPDX-License-Identifier: Apache-2.0
"""A shadow network on its own: head(projection(network(inputs)))."""

import copy as copying
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from . import backbone as networks
from .model import causal_loss, classification_loss, pooled


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """A small causal language model or classifier. State: `backbone.*`, `shadow_hidden_projection.*`, `head.*`."""

    base_model_prefix = "backbone"
    _no_split_modules: list[str] = []
    # the network has been checked already
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: Any,
        backbone: nn.Module,
        projection: nn.Module,
        head: nn.Module,
        embeddings: nn.Module | None = None,
        is_classifier: bool = False,
    ):
        super().__init__(config)
        self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
        self.is_classifier = is_classifier
        self.shared_embeddings = (embeddings,)  # in a tuple: it belongs to the base model
        self.all_tied_weights_keys = {}

    def get_input_embeddings(self) -> Any:
        return self.shared_embeddings[0] or self.backbone.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        return None if self.is_classifier else self.head

    def _init_weights(self, module: nn.Module) -> None:
        """The weights are trained."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        if self.shared_embeddings[0] is not None and inputs_embeds is None:
            inputs_embeds = self.shared_embeddings[0](input_ids)
        call: dict[str, Any] = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        call |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        out = self.backbone(**call, use_cache=use_cache, **kwargs)
        hidden = self.shadow_hidden_projection(out[0])
        cache = getattr(out, "past_key_values", None)
        if self.is_classifier:
            logits = pooled(self.head(hidden), input_ids, self.config)
            loss = None if labels is None else classification_loss(logits, labels)
            return SequenceClassifierOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None if labels is None else causal_loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]


def detach(tuner: Any, name: str, copy: bool) -> DetachedShadowModel:
    """See `ShadowModel.unload_shadow`."""
    cfg, decoder = tuner.peft_config[name], tuner.decoder
    network, projection = tuner.shadow_backbone[name], tuner.shadow_projection[name]
    is_classifier = name in tuner.shadow_head
    head = tuner.shadow_head[name] if is_classifier else tuner.model.get_output_embeddings()
    embeddings = decoder.get_input_embeddings() if networks.shares_embeddings(cfg, decoder, network) else None
    if head is None:
        raise ValueError(f"{type(tuner.model).__name__} has no output embeddings that the shadow network could use.")
    if copy:
        network, projection, head, embeddings = copying.deepcopy((network, projection, head, embeddings))
        if embeddings is not None:
            if hasattr(decoder, "embed_tokens"):  # the place was deleted
                network.embed_tokens = embeddings
            else:
                network.set_input_embeddings(embeddings)
            embeddings = None
    return DetachedShadowModel(
        copying.deepcopy(network.config), network, projection, head, embeddings, is_classifier
    ).train(network.training)
