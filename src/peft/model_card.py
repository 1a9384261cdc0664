# SPDX-License-Identifier: Apache-2.0
"""The README.md written next to an adapter: tags, base model, quantisation settings, versions."""

import sys
from pathlib import Path
from typing import Any

from .core.tuner import TunerModel
from .utils.peft_types import PeftType
from .version import __version__


def specific_tags(model: Any) -> list[str]:
    """Tags that follow from the model: its library, the method, the base model."""
    tags = []
    transformers = sys.modules.get("transformers")
    base = model.get_base_model()
    if transformers is not None and isinstance(base, transformers.PreTrainedModel):
        tags.append("transformers")
    if any(c.peft_type == PeftType.LORA for c in model.peft_config.values()):
        tags.append("lora")
    name = getattr(base, "name_or_path", None)
    if isinstance(name, str) and name:
        tags.append(f"base_model:adapter:{name}")
    return tags


def create_or_update_model_card(model: Any, output_dir: str | Path) -> None:
    """Write `output_dir/README.md`; of an existing one the text and its own tags stay."""
    from huggingface_hub import ModelCard, ModelCardData

    from .io.files import write_text_atomic

    path = Path(output_dir) / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    data: Any = card.data
    data["library_name"] = "peft"
    own = [*(getattr(model, "model_tags", None) or []), *(data.get("tags") or [])]
    tags = {tag for tag in own if not str(tag).startswith("base_model:adapter:")}
    data["tags"] = sorted(tags | set(specific_tags(model)))
    config = TunerModel.get_model_config(model.get_base_model())
    if config.get("_name_or_path"):
        data["base_model"] = config["_name_or_path"]
    if data.get("pipeline_tag") is None and type(model).__name__ == "PeftModelForCausalLM":
        data["pipeline_tag"] = "text-generation"
    lines = card.text.splitlines()
    _add_quantization(lines, config.get("quantization_config"))
    _add(lines, "### Framework versions", f"- PEFT {__version__}")
    card.text = "\n".join(lines)
    write_text_atomic(path, str(card))


def _add_quantization(lines: list[str], config: Any) -> None:
    if config is None:
        return
    values = config if isinstance(config, dict) else config.to_dict()
    method = values.get("quant_method")
    title = f"The following `{getattr(method, 'value', method)}` quantization config was used during training:"
    _add(lines, "## Training procedure", title, *(f"- {name}: {value}" for name, value in values.items()), "")


def _add(lines: list[str], heading: str, first: str, *more: str) -> None:
    """Put new lines below `heading`, which is appended where it is missing; nothing if the first is there already."""
    if first in lines:
        return
    if heading not in lines:
        lines += [heading, ""]
    place = lines.index(heading) + 2
    lines[place:place] = [first, *more]
