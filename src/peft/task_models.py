# SPDX-License-Identifier: Apache-2.0
"""The PeftModel of each task, as declarations: names of the heads, and the rule by which a prompt changes the inputs.

A head is trained in full: it enters `modules_to_save` once, before anything is injected, so it is never a target.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn

from .config import PeftConfig
from .core.prompt import active_encoder
from .peft_model import PeftModel
from .prompt_inputs import (
    InputRule,
    generation_inputs,
    prepare_generation,
    prepare_seq2seq_generation,
    prompt_forward,
)
from .utils.peft_types import TaskType


def add_heads(config: PeftConfig, heads: tuple[str, ...]) -> None:
    """Enter the task's heads into `modules_to_save`, unless they are there."""
    if not heads or "modules_to_save" not in {f.name for f in fields(config)}:
        return
    present = getattr(config, "modules_to_save", None)
    listed = [present] if isinstance(present, str) else list(present or ())
    vars(config)["modules_to_save"] = listed + [head for head in heads if head not in listed]


class TaskModel(PeftModel):
    """Shared by the task classes; a subclass declares `heads` and `rule` and gives `forward` its task's arguments."""

    heads: ClassVar[tuple[str, ...]] = ()
    rule: ClassVar[InputRule] = InputRule()

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        add_heads(peft_config, self.heads)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if self.heads and self._is_prompt_learning:
            # Name of the head in the base model, e.g. "classifier".
            names = (name for name, _ in self.base_model.named_children() if any(head in name for head in self.heads))
            self.cls_layer_name = next(names, None)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, with the task's heads among the modules it trains in full."""
        add_heads(peft_config, self.heads)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def _run(self, kwargs: dict[str, Any], **named: Any) -> Any:
        """Forward with the arguments that were given: with the prompt, or through the layers of the other methods."""
        call = {name: value for name, value in named.items() if value is not None}
        call.update(kwargs)
        with self._adapter_call((), call) as (_, call):
            if active_encoder(self) is not None:
                return prompt_forward(self, self.rule, call)
            if self._is_prompt_learning:
                call = _without_prompt_arguments(self, call)
            return self.base_model(**call)


def _without_prompt_arguments(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What is left for the base model while the prompt is off."""
    own = {"task_ids"}.union(*(encoder.loss_arguments for encoder in model.prompt_encoder.values()))
    return {name: value for name, value in call.items() if name not in own}


class GeneratingModel(TaskModel):
    """Tasks with `generate`."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation: Callable[..., dict[str, Any]] | None = getattr(
            self.get_base_model(), "prepare_inputs_for_generation", None
        )

    def _share_generation_config(self) -> None:
        """A generation_config set on this wrapper holds for the base model."""
        config = vars(self).get("generation_config")
        if config is not None:
            self.get_base_model().generation_config = config

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one generation step. `generate` of transformers reads the names of these parameters."""
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return prepare_generation(self, args, kwargs, task_ids)


class PeftModelForCausalLM(GeneratingModel):
    """Causal language models."""

    rule = InputRule(token_labels=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters; embedding prompts add their tokens to the logits."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters."""
        self._share_generation_config()
        encoder = active_encoder(self)
        if encoder is None:
            if self._is_prompt_learning:
                return self.base_model.generate(*args, **_without_prompt_arguments(self, kwargs))
            return super().generate(*args, **kwargs)
        if kwargs.get("task_ids") is not None:
            names = ("inputs", "input_ids", "inputs_embeds")
            rows = args[0] if args else next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
            kwargs["task_ids"] = _one_task_a_row(kwargs["task_ids"], rows)
        with generation_inputs(self):
            return self.base_model.generate(*args, **kwargs)


def _one_task_a_row(task_ids: Any, rows: torch.Tensor | None) -> torch.Tensor:
    """Task ids [b]: `generate` repeats tensors for beams along the first dimension."""
    task_ids = torch.as_tensor(task_ids).reshape(-1)
    if rows is not None and len(task_ids) == 1:
        return task_ids.expand(rows.shape[0]).to(rows.device)
    return task_ids


class PeftModelForSeq2SeqLM(GeneratingModel):
    """Encoder-decoder language models."""

    rule = InputRule(token_labels=True, encoder_decoder=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters; embedding prompts go in front of the encoder inputs."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters; keyword arguments only."""
        self._share_generation_config()
        encoder = active_encoder(self)
        if encoder is None:
            if self._is_prompt_learning:
                return self.base_model.generate(**_without_prompt_arguments(self, kwargs))
            return super().generate(**kwargs)
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("input_ids must be provided for Peft model generation.")
        if encoder.produces == "embeds":
            return self.base_model.generate(**prepare_seq2seq_generation(self, encoder, kwargs))
        with generation_inputs(self):
            return self.base_model.generate(**kwargs)


class PeftModelForSequenceClassification(TaskModel):
    """Classification of sequences."""

    heads = ("classifier", "score")
    rule = InputRule(token_types=True, pools=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )


class PeftModelForTokenClassification(TaskModel):
    """Classification of tokens; embedding prompts add their tokens to the logits."""

    heads = ("classifier", "score")
    rule = InputRule(token_labels=True, token_types=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )


class PeftModelForQuestionAnswering(TaskModel):
    """Extraction of answers. Embedding prompts add their tokens to the logits; positions given as labels count them."""

    heads = ("qa_outputs",)
    rule = InputRule(token_types=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )


class PeftModelForFeatureExtraction(TaskModel):
    """Hidden states; embedding prompts add their tokens to them."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Forward of the base model with the active adapters."""
        return self._run(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            task_ids=task_ids,
        )


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
