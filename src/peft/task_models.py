# SPDX-License-Identifier: Apache-2.0
"""The PeftModel of each task, as declarations: names of the heads, and the rule by which a prompt changes the inputs.

A head is trained in full: it enters `modules_to_save` once, before anything is injected, so it is never a target.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn

from .adapter_call import AdapterCall
from .config import PeftConfig
from .core.prompt import BasePromptEncoder, active_encoder
from .peft_model import PeftModel
from .prompt_inputs import InputRule, prepare_generation, prepare_seq2seq_generation, prompt_forward, shadowed
from .utils.peft_types import TaskType


def add_heads(config: PeftConfig, heads: tuple[str, ...]) -> None:
    """Enter the task's heads into `modules_to_save`, unless they are there."""
    if not heads or "modules_to_save" not in {f.name for f in fields(config)}:
        return
    present = getattr(config, "modules_to_save", None)
    listed = [present] if isinstance(present, str) else list(present or ())
    vars(config)["modules_to_save"] = listed + [head for head in heads if head not in listed]


def task_forward(own: str) -> Callable[..., Any]:
    """The forward of a task: its own arguments and those of every task, all optional, as its signature says."""
    names = [*own.split(), "output_attentions", "output_hidden_states", "return_dict", "task_ids"]

    def forward(self: "TaskModel", *args: Any, **kwargs: Any) -> Any:
        """Forward of the base model with the active adapters; embedding prompts add their tokens to its outputs."""
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in given for name in kwargs):
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(names)}, each once; got {len(args)} arguments by position and "
                f"{', '.join(kwargs) or 'none'} by name."
            )
        given |= kwargs
        return self._run({name: value for name, value in given.items() if value is not None or name not in names})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind), *(inspect.Parameter(name, kind, default=None) for name in names)]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


class TaskModel(PeftModel):
    """Shared by the task classes; a subclass declares `heads`, `rule` and the arguments of its `forward`."""

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

    def _run(self, call: dict[str, Any]) -> Any:
        """Forward with the prompt, or through the layers of the other methods."""
        with AdapterCall(self, (), call) as (_, call):
            if active_encoder(self) is not None:
                return prompt_forward(self, self.rule, call)
            return self.base_model(**self._without_prompt_arguments(call))

    def _without_prompt_arguments(self, call: dict[str, Any]) -> dict[str, Any]:
        """What is left for the base model while the prompt is off."""
        if not self._is_prompt_learning:
            return call
        own = {"task_ids"}.union(*(encoder.loss_arguments for encoder in self.prompt_encoder.values()))
        return {name: value for name, value in call.items() if name not in own}


class GeneratingModel(TaskModel):
    """Tasks with `generate`."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation: Callable[..., dict[str, Any]] | None = getattr(
            self.get_base_model(), "prepare_inputs_for_generation", None
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters."""
        if (config := vars(self).get("generation_config")) is not None:  # set on this wrapper, meant for the base model
            self.get_base_model().generation_config = config
        encoder = active_encoder(self)
        if encoder is None:
            return super().generate(*args, **self._without_prompt_arguments(kwargs))
        return self._generate_with_prompt(encoder, *args, **kwargs)

    def _generate_with_prompt(self, encoder: BasePromptEncoder, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` builds the inputs of each step here."""
        with shadowed(self.base_model, "prepare_inputs_for_generation", self.prepare_inputs_for_generation):
            return self.base_model.generate(*args, **kwargs)

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
    forward = task_forward("input_ids attention_mask inputs_embeds labels")

    def _generate_with_prompt(self, encoder: BasePromptEncoder, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("task_ids") is not None:
            # One for each sample: `generate` repeats tensors for beams along the first dimension.
            ids = torch.as_tensor(kwargs["task_ids"]).reshape(-1)
            names = ("inputs", "input_ids", "inputs_embeds")
            rows = args[0] if args else next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
            kwargs["task_ids"] = ids if rows is None or len(ids) != 1 else ids.expand(len(rows)).to(rows.device)
        return super()._generate_with_prompt(encoder, *args, **kwargs)


class PeftModelForSeq2SeqLM(GeneratingModel):
    """Encoder-decoder language models; embedding prompts go in front of the encoder inputs."""

    rule = InputRule(token_labels=True, encoder_decoder=True)
    forward = task_forward(
        "input_ids attention_mask inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels"
    )

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters; keyword arguments only."""
        return super().generate(**kwargs)

    def _generate_with_prompt(self, encoder: BasePromptEncoder, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("input_ids must be provided for Peft model generation.")
        if encoder.produces == "embeds":
            return self.base_model.generate(**prepare_seq2seq_generation(self, encoder, kwargs))
        return super()._generate_with_prompt(encoder, **kwargs)


class PeftModelForSequenceClassification(TaskModel):
    """Classification of sequences."""

    heads = ("classifier", "score")
    rule = InputRule(token_types=True, pools=True)
    forward = task_forward("input_ids attention_mask inputs_embeds labels")


class PeftModelForTokenClassification(TaskModel):
    """Classification of tokens."""

    heads = ("classifier", "score")
    rule = InputRule(token_labels=True, token_types=True)
    forward = task_forward("input_ids attention_mask inputs_embeds labels")


class PeftModelForQuestionAnswering(TaskModel):
    """Extraction of answers; positions given as labels count the tokens of embedding prompts."""

    heads = ("qa_outputs",)
    rule = InputRule(token_types=True)
    forward = task_forward(
        "input_ids attention_mask token_type_ids position_ids inputs_embeds start_positions end_positions"
    )


class PeftModelForFeatureExtraction(TaskModel):
    """Hidden states."""

    forward = task_forward("input_ids attention_mask inputs_embeds")


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
