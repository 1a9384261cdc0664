"""Multitask prompt tuning: task factors and starts from a source checkpoint."""

import pytest
import torch
from safetensors.torch import save_file
from tests.models.prompt_models import IDS, adapted, base, close, config

import peft

SOURCE = {
    "prompt_embeddings": torch.arange(48.0).view(3, 16),
    "prefix_task_cols": torch.arange(6.0).view(2, 3, 1),
    "prefix_task_rows": torch.arange(32.0).view(2, 1, 16),
}


def test_prompt_of_each_task():
    model = adapted("llama", "multitask", "CAUSAL_LM", num_ranks=2)
    encoder = model.prompt_encoder["default"]
    got = model.get_prompt(2, task_ids=torch.tensor([1, 0]))
    for row, task in zip(got, (1, 0), strict=True):
        factors = encoder.prefix_task_cols[task] @ encoder.prefix_task_rows[task]
        close(row, encoder.embedding.weight * factors)
    assert torch.equal(model.get_prompt(3, task_ids=[1])[2], got[0])


def test_task_ids_are_checked():
    model = adapted("llama", "multitask", "CAUSAL_LM")
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="3 entries for a batch of 2"):
        model(input_ids=IDS, task_ids=torch.tensor([0, 1, 0]))
    with pytest.raises(IndexError):
        model(input_ids=IDS, task_ids=torch.tensor([0, 2]))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("init", "tasks", "cols"),
    [
        ("AVERAGE_SOURCE_TASKS", 1, SOURCE["prefix_task_cols"].mean(0, keepdim=True)),
        ("EXACT_SOURCE_TASK", 1, SOURCE["prefix_task_cols"][1:]),
        ("ONLY_SOURCE_SHARED", 3, None),
    ],
)
def test_source_checkpoints(init, tasks, cols, suffix, tmp_path):
    path = str(tmp_path / f"source.{suffix}")
    save_file(SOURCE, path) if suffix == "safetensors" else torch.save(SOURCE, path)
    options = {"prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 1, "num_tasks": tasks}
    model = peft.get_peft_model(base("llama"), config("multitask", "CAUSAL_LM", prompt_tuning_init=init, **options))
    encoder = model.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, SOURCE["prompt_embeddings"])
    assert encoder.prefix_task_cols.shape == (tasks, 3, 1)
    if cols is not None:
        assert torch.equal(encoder.prefix_task_cols, cols)
    else:
        assert 0 < encoder.prefix_task_cols.std() < 0.06


def test_source_is_not_needed_for_loading():
    options = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/gone.safetensors"}
    peft.get_peft_model(base("llama"), config("multitask", "CAUSAL_LM", inference_mode=True, num_tasks=1, **options))
    with pytest.raises(FileNotFoundError):
        peft.get_peft_model(base("llama"), config("multitask", "CAUSAL_LM", num_tasks=1, **options))
    with pytest.raises(ValueError, match="prompt_tuning_init_state_dict_path"):
        peft.get_peft_model(base("llama"), config("multitask", "CAUSAL_LM", prompt_tuning_init="EXACT_SOURCE_TASK"))


def test_decoder_part_of_encoder_decoders():
    model = adapted("t5", "multitask", "SEQ_2_SEQ_LM")
    labels, tasks = torch.tensor([[3, 4, 5], [6, 7, -100]]), torch.tensor([0, 1])
    out = model(input_ids=IDS, labels=labels, task_ids=tasks)
    assert out.logits.shape == (2, 3 + 3, 50)
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 3:].flatten(0, 1), labels.flatten()))
    shifted = torch.tensor([[0, 3, 4], [0, 6, 7]])
    given = model(input_ids=IDS, decoder_input_ids=shifted, task_ids=tasks)
    close(given.logits, out.logits)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(input_ids=IDS, task_ids=tasks)


def test_files_of_other_methods_are_named(tmp_path):
    adapted("llama", "prompt", "CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"lack \['prefix_task_cols', 'prefix_task_rows'\]: not a file of multitask"):
        peft.PeftModel.from_pretrained(base("llama"), tmp_path, config=config("multitask", "CAUSAL_LM"))
