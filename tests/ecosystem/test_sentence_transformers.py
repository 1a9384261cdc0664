"""sentence-transformers: adapters on a tiny BERT, trained, saved and loaded again, offline."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the `ecosystem` extra (sentence-transformers)")

from sentence_transformers import CrossEncoder, SentenceTransformer, models  # noqa: E402
from tests.versions import since  # noqa: E402
from tokenizers import Tokenizer, pre_tokenizers, processors  # noqa: E402
from tokenizers import models as token_models  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import peft  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "cat", "dog", "kitten", "puppy", "car", "truck"]
WORDS += ["sleeps", "runs", "drives"]
TEXTS = ["the cat sleeps", "a dog runs", "the truck drives"]


def backbone(folder: Path, cls: type = BertModel, **more: Any) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = cls(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, **more))
    model.save_pretrained(folder)
    raw = Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=32, **special).save_pretrained(folder)
    return str(folder)


def encoder(folder: Path) -> SentenceTransformer:
    transformer = models.Transformer(backbone(folder))
    return SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu")


def config(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **more})


def train(model: SentenceTransformer, steps: int = 12) -> list[float]:
    """Pulls (cat, kitten) and (dog, puppy) together, in the plain way."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    left, right = ["the cat", "a dog", "the car"], ["the kitten", "a puppy", "the truck"]
    losses = []
    model.train()
    torch.manual_seed(3)
    for _ in range(steps):
        a, b = (
            torch.nn.functional.normalize(model(model.tokenize(x))["sentence_embedding"], dim=-1) for x in (left, right)
        )
        loss = torch.nn.functional.cross_entropy(a @ b.T * 10, torch.arange(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_add_train_save_reload(tmp_path: Path) -> None:
    model = encoder(tmp_path / "base")
    before = torch.tensor(model.encode(TEXTS))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.add_adapter(config())
    assert torch.equal(torch.tensor(model.encode(TEXTS)), before)  # a new adapter changes nothing
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0], losses
    trained = torch.tensor(model.encode(TEXTS))
    assert (trained - before).abs().max() > 1e-3
    now = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(now[k], v) for k, v in weights.items())

    model.save(str(tmp_path / "out"))
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))
    assert not list((tmp_path / "out").rglob("model.safetensors"))
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert torch.equal(torch.tensor(again.encode(TEXTS)), trained)
    assert any(isinstance(m, BaseTunerLayer) for m in again.modules())

    again.disable_adapters()
    assert torch.equal(torch.tensor(again.encode(TEXTS)), before)
    again.enable_adapters()
    assert torch.equal(torch.tensor(again.encode(TEXTS)), trained)


def test_adapters_are_switched_and_deleted(tmp_path: Path) -> None:
    model = encoder(tmp_path / "base")
    before = torch.tensor(model.encode(TEXTS))
    for name in ("one", "two"):
        model.add_adapter(config(init_lora_weights=False), name)
    assert model.active_adapters() == ["two"]
    two = torch.tensor(model.encode(TEXTS))
    model.set_adapter("one")
    one = torch.tensor(model.encode(TEXTS))
    assert (one - two).abs().max() > 1e-4
    assert (one - before).abs().max() > 1e-4
    state = model.get_adapter_state_dict("two")
    assert len(state) == 8
    assert not any("two" in key for key in state)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(torch.tensor(model.encode(TEXTS)), two)


def test_a_wrapped_backbone_is_merged(tmp_path: Path) -> None:
    model = encoder(tmp_path / "base")
    inner = peft.get_peft_model(model[0].auto_model, config(init_lora_weights=False, task_type="FEATURE_EXTRACTION"))
    model[0].auto_model = inner
    adapted = torch.tensor(model.encode(TEXTS))
    model[0].auto_model = inner.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), adapted, rtol=0, atol=1e-5)


@since("transformers", "5.18", "trained heads of native adapters")
def test_cross_encoder_with_a_trained_head(tmp_path: Path) -> None:
    path = backbone(tmp_path / "base", BertForSequenceClassification, num_labels=1)
    model = CrossEncoder(path, device="cpu", num_labels=1)
    pairs = [("the cat", "the kitten"), ("the cat", "the truck")]
    before = torch.tensor(model.predict(pairs))
    model.model.add_adapter(config(modules_to_save=["classifier"], task_type="SEQ_CLS", init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=3e-2)
    batch = model.tokenizer([p[0] for p in pairs], [p[1] for p in pairs], padding=True, return_tensors="pt")
    losses = []
    for _ in range(30):
        logits = model.model(**batch).logits.squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    model.model.eval()
    trained = torch.tensor(model.predict(pairs))
    assert (trained - before).abs().max() > 1e-2
    head = model.model.classifier
    assert isinstance(head.original_module, torch.nn.Linear)
    assert all(isinstance(m, torch.nn.Linear) for m in head.modules_to_save.values())
    model.save_pretrained(str(tmp_path / "out"))
    again = CrossEncoder(str(tmp_path / "out"), device="cpu", num_labels=1)
    torch.testing.assert_close(torch.tensor(again.predict(pairs)), trained, rtol=1e-6, atol=1e-6)
