"""VB-LoRA: compact files, and what is counted as saved."""

import pytest
import torch
from tests.methods.bases import base, inputs
from tests.methods.test_pitfalls import adapted, agrees_with_merging

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import vblora

BOTH = {"target_modules": ["lin0", "lin1"]}


def compact(**options) -> peft.VBLoRAConfig:
    return peft.VBLoRAConfig(
        **{**BOTH, "r": 2, "num_vectors": 8, "vector_length": 4, "save_only_topk_weights": True} | options
    )


@pytest.mark.parametrize(("topk", "gap"), [(1, 1), (2, 1), (3, 1), (3, 60)])
def test_compact_files_of_vblora(tmp_path, topk, gap):
    """The last weight is what the stored ones lack to 1. Below a gap it is nothing, and rounding takes some above 1."""
    model, x = adapted(compact(topk=topk)), inputs("Linear")
    for layer in model.base_model.layers():
        for logits in (layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]):
            logits.data[..., 2:] -= gap
    want = model(x)
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    stem = "base_model.model.lin0.vblora_logits_A_topk_"
    assert state[stem + "indices"].shape == (2, 4, topk) and state[stem + "indices"].dtype == torch.uint8
    assert state[stem + "weights"].shape == (2, 4, topk - 1)
    assert not any(k.endswith(("logits_A", "logits_B")) for k in state)
    loaded = PeftModel.from_pretrained(base("Linear"), tmp_path)
    torch.testing.assert_close(loaded(x), want, rtol=1e-4, atol=1e-5)
    agrees_with_merging(loaded, x)
    loaded.train()
    with pytest.raises(RuntimeError, match="infinity values in VB-LoRA logits"):
        loaded(x)
    full = get_peft_model_state_dict(adapted(compact(topk=topk, save_only_topk_weights=False)))
    set_peft_model_state_dict(loaded, full)
    loaded(x)  # logits of a full file can be trained


@pytest.mark.parametrize(
    ("count", "size", "dtype"), [(255, 1, "uint8"), (256, 2, "int16"), (2**15, 4, "int32"), (2**31, 8, "int64")]
)
def test_indices_of_vblora_take_few_bytes(count, size, dtype):
    found = vblora._index_dtype(count)
    assert (found, found.itemsize) == (getattr(torch, dtype), size)


def test_vblora_counts_what_is_saved(capsys):
    model = get_peft_model(base("Linear"), compact(topk=3, save_only_topk_weights=False, bias="all"))
    logits, bank, biases = 2 * (2 * (16 + 24) // 4) * 8, 8 * 4, 16 + 24
    assert model.base_model.get_nb_savable_parameters() == (bank + logits, biases)
    model.peft_config["default"].save_only_topk_weights = True
    small = bank + logits // 8 * 2 + logits // 8 * 3 / 4  # two weights, three bytes
    assert model.base_model.get_nb_savable_parameters() == (int(small), biases)
    model.base_model.print_savable_parameters()
    assert capsys.readouterr().out == (
        f"VB-LoRA params to-be-saved (float32-equivalent): {int(small):,d} || "
        f"total params to-be-saved: {int(small) + biases:,d}\n"
    )
