# SPDX-License-Identifier: Apache-2.0
"""Loading an adapter: its first values are drawn only where the file does not bring them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.io.files import load_peft_weights
from peft.io.load import _with_nan

from .models import fill, ids, net

FILE = "adapter_model.safetensors"
B_KEY = "base_model.model.lin0.lora_B.weight"
A_KEY = "base_model.model.lin0.lora_A.weight"


def config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["lin0", "a"], **options})


@pytest.fixture
def folder(tmp_path):
    saved = get_peft_model(net(), config())
    fill(saved, "default")
    saved.save_pretrained(tmp_path)
    return tmp_path


def test_a_complete_file_leaves_the_random_state(folder):
    model = get_peft_model(net(), config())
    before = torch.get_rng_state()
    model.load_adapter(folder, "b")
    assert torch.equal(torch.get_rng_state(), before)
    stored, held = load_file(folder / FILE), get_peft_model_state_dict(model, adapter_name="b")
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[k], held[k]) for k in stored)
    held[A_KEY].zero_()  # memory of its own: the file stays
    assert stored[A_KEY].abs().sum() > 0 and torch.equal(load_file(folder / FILE)[A_KEY], stored[A_KEY])


@pytest.mark.parametrize("trainable", [False, True])
def test_what_a_file_lacks_is_drawn_as_for_a_new_adapter(folder, trainable):
    state = {k: v.clone() for k, v in load_file(folder / FILE).items()}  # the file is written again
    del state[B_KEY], state[A_KEY]
    save_file(state, folder / FILE)
    model, other = (get_peft_model(net(), config()) for _ in range(2))
    torch.manual_seed(3)
    other.add_adapter("b", config())
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="missing adapter keys") as warned:
        result = model.load_adapter(folder, "b", is_trainable=trainable)
    assert len([w for w in warned if "missing adapter keys" in str(w.message)]) == 1
    assert len(result.missing_keys) == 2
    new, fresh = (get_peft_model_state_dict(m, adapter_name="b") for m in (model, other))
    assert torch.equal(new[A_KEY], fresh[A_KEY]) and new[A_KEY].abs().sum() > 0
    assert torch.equal(new[B_KEY], torch.zeros_like(new[B_KEY]))
    key = "base_model.model.block.a.lora_A.weight"
    assert torch.equal(new[key], state[key])
    parameters = [p for n, p in model.named_parameters() if ".b." in n]
    assert len(parameters) == 4 and all(p.requires_grad == trainable for p in parameters)


def test_a_scheme_that_changes_the_base_changes_it_once(folder):
    """Files of such adapters belong to the changed base, whatever they lack."""
    pissa = {"init_lora_weights": "pissa"}
    get_peft_model(net(), config(**pissa)).save_pretrained(folder)
    state = {k: v.clone() for k, v in load_file(folder / FILE).items()}  # the file is written again
    del state[B_KEY]
    save_file(state, folder / FILE)
    model, other = (get_peft_model(net(), config(target_modules=["attn"])) for _ in range(2))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model.load_adapter(folder, "p")
    other.add_adapter("p", config(**pissa))
    loaded, added = (m.base_model.model.lin0.base_layer.weight for m in (model, other))
    assert torch.equal(loaded, added)
    assert not torch.equal(loaded, net().lin0.weight)


def test_variants_are_made_in_full(folder):
    saved = get_peft_model(net(), config(use_dora=True))
    saved.save_pretrained(folder)
    state = {k: v.clone() for k, v in load_file(folder / FILE).items()}  # the file is written again
    key = "base_model.model.lin0.lora_magnitude_vector"
    del state[key]
    save_file(state, folder / FILE)
    model = get_peft_model(net(), config(use_dora=True))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model.load_adapter(folder, "d")
    held = get_peft_model_state_dict(model, adapter_name="d")
    norm = model.base_model.model.lin0.base_layer.weight.norm(dim=1)
    torch.testing.assert_close(held[key].flatten(), norm)


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float32", "float16"), ("float64",), ("int64",)])
def test_files_of_one_and_of_several_types(tmp_path, dtypes):
    kinds = [getattr(torch, d) for d in dtypes]
    state = {f"t{i}": torch.arange(i * 3).view(i, 3).to(kinds[i % len(kinds)]) for i in range(6)}
    state["scalar"] = torch.tensor(7, dtype=kinds[0])
    save_file(state, tmp_path / FILE)
    found = load_peft_weights(tmp_path, device="cpu")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in state.items())
    assert (found.flat is None) == (dtypes not in [("float32",), ("bfloat16",)])


def test_nan_put_into_what_was_read(folder):
    state = load_peft_weights(folder, device="cpu")
    assert _with_nan(state) == []
    state[A_KEY] = torch.full_like(state[A_KEY], torch.nan)
    assert _with_nan(state) == [A_KEY]
    state[A_KEY] = load_file(folder / FILE)[A_KEY]
    state[B_KEY][0, 0] = torch.nan
    assert _with_nan(state) == [B_KEY]


def test_outputs_after_loading_are_those_of_the_saved_model(folder):
    torch.manual_seed(0)
    model = get_peft_model(net(), config())
    fill(model, "default")
    model.save_pretrained(folder)
    x = ids()
    model.load_adapter(folder, "b")
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        model.set_adapter("b")
        assert torch.equal(model(x), wanted)
