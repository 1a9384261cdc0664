# SPDX-License-Identifier: Apache-2.0
"""AutoPeftModel*: base model and adapter from the folder of the adapter."""

import json
from pathlib import Path

import pytest
import torch

import peft
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
)
from peft.helpers import check_if_peft_model

from .prompt_models import tokenizer

transformers = pytest.importorskip("transformers")
IDS = torch.arange(6)[None]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, vocab_size=20
    )
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def base_of(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def save(base_folder, folder, task):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(target_modules=["q_proj"], task_type=task, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


def test_with_task(base_folder, tmp_path):
    saved = save(base_folder, tmp_path, "CAUSAL_LM")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "PeftModelForCausalLM" and isinstance(model, peft.PeftModelForCausalLM)
    assert torch.allclose(model(IDS).logits, saved(IDS).logits, atol=1e-6)
    named = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, adapter_name="x", is_trainable=True, dtype=torch.bfloat16
    )
    assert named.active_adapter == "x" and named.dtype == torch.bfloat16
    assert any(p.requires_grad for p in named.parameters())
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModel()


def test_without_task(base_folder, tmp_path):
    saved = save(base_folder, tmp_path, None)
    model = AutoPeftModel.from_pretrained(tmp_path)
    assert type(model) is peft.PeftModel
    assert torch.allclose(model(IDS).logits, saved(IDS).logits, atol=1e-6)
    assert type(AutoPeftModelForCausalLM.from_pretrained(tmp_path)).__name__ == "PeftModelForCausalLM"
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "auto_mapping": None}))
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        AutoPeftModel.from_pretrained(tmp_path)
    for library in ("os", "transformers_evil", "mylib.models"):
        mapping = {"base_model_class": "system", "parent_library": library}
        file.write_text(json.dumps({**values, "auto_mapping": mapping}))
        with pytest.raises(ValueError, match="import_allowlist"):
            AutoPeftModel.from_pretrained(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="mylib"):
        AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["mylib"])


def test_vocabulary_grows_with_the_saved_tokenizer(base_folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(23)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    base.resize_token_embeddings(23)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"])
    saved = get_peft_model(base, config).eval()
    saved.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == 23
    assert torch.allclose(model(IDS).logits, saved(IDS).logits, atol=1e-5)


def test_classes():
    for name in ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto = getattr(peft, f"AutoPeftModelFor{name}")
        assert auto._target_class is getattr(transformers, f"AutoModelFor{name}")
        assert auto._target_peft_class is getattr(peft, f"PeftModelFor{name}")
    assert AutoPeftModel._target_class is None and AutoPeftModel._target_peft_class is peft.PeftModel
    assert peft.AutoPeftModelForFeatureExtraction._target_class is transformers.AutoModel


def test_check_if_peft_model(base_folder, tmp_path):
    save(base_folder, tmp_path, None)
    assert check_if_peft_model(tmp_path) and not check_if_peft_model(base_folder)


@pytest.mark.parametrize("there", [True, False])
def test_tokenizer_of_a_repository(base_folder, tmp_path, monkeypatch, there):
    """It is found in a sub-folder, and in the cache when offline."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    if there:
        base.resize_token_embeddings(23)
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    snapshot = tmp_path / "models--org--thing" / "snapshots" / "abc"
    (tmp_path / "models--org--thing" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--thing" / "refs" / "main").write_text("abc")
    tuned.save_pretrained(snapshot / "sub", save_embedding_layers=there)
    if there:
        made = tokenizer(snapshot)
        for file in Path(made).iterdir():
            file.rename(snapshot / "sub" / file.name)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: range(23))
    found = AutoPeftModelForCausalLM
    monkeypatch.setattr(found._target_class, "from_pretrained", classmethod(lambda *a, **k: base_of(base_folder)))
    model = found.from_pretrained("org/thing", subfolder="sub", cache_dir=tmp_path, local_files_only=True)
    assert model.get_input_embeddings().weight.shape[0] == (23 if there else 20)
