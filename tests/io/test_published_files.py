"""Files that differ from what the configuration or the shared state suggests: AdaMSS' rows, Lily's copies, HiRA's
ranks, BOFT's factors.
"""

import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import PeftModel
from peft.tuners import lily
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 40), nn.Linear(40, 16)).to(dtype)


def adapted(config, size: float = 0.05) -> PeftModel:
    torch.manual_seed(5)
    model = peft.get_peft_model(net(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape)
    return model


def effect(model: PeftModel, dtype: torch.dtype) -> torch.Tensor:
    return (model(X.to(dtype)) - net(dtype)(X.to(dtype))).float()


# ---- AdaMSS
ADAMSS = {"target_modules": ["0", "1", "2", "3"], "r": 12, "num_subspaces": 6, "subspace_rank": 2}


@pytest.mark.parametrize("options", [{}, {"use_dynamic_rank": True, "subspace_rank": 4, "svd_threshold": 0.5}])
def test_adamss_in_half_precision_keeps_its_rows(tmp_path, options):
    model = adapted(peft.AdamssConfig(**ADAMSS | options), size=0.3)
    model.save_pretrained(tmp_path)
    want = effect(model, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path, adapter_name="x")
    layers, before = again.base_model.named_layers(), model.base_model.named_layers()
    assert all(torch.equal(m.labels["x"], before[k].labels["default"]) for k, m in layers.items())
    assert (effect(again, torch.bfloat16) - want).norm() < 0.05 * want.norm()
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(net(), tmp_path / "again" / "x")
    torch.testing.assert_close(effect(third, torch.float32), want, rtol=1e-4, atol=1e-4)
    copied = peft.get_peft_model(net(torch.bfloat16), model.peft_config["default"])
    peft.set_peft_model_state_dict(copied, peft.get_peft_model_state_dict(model))
    assert (effect(copied, torch.bfloat16) - want).norm() < 0.05 * want.norm()


def test_adamss_without_the_rows_finds_the_clusters_again(tmp_path):
    model = adapted(peft.AdamssConfig(**ADAMSS))
    model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": "pt"})  # as published
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), model(X))
    torch.manual_seed(0)
    weights = {k: v + 1e-8 for k, v in net().state_dict().items()}
    base = net().double()
    base.load_state_dict(weights)
    with pytest.warns(UserWarning, match="does not say which rows"):
        PeftModel.from_pretrained(base, tmp_path)


# ---- Lily
LILY = {"target_modules": ".*", "r": 4, "stride_A": 2}


def test_lily_writes_large_shared_tensors_once(tmp_path, monkeypatch):
    model = adapted(peft.LilyConfig(**LILY))
    model.save_pretrained(tmp_path / "small")
    monkeypatch.setattr(lily, "COPIES_UP_TO", 0)
    model.save_pretrained(tmp_path / "large")
    small, large = (load_file(tmp_path / name / WEIGHTS) for name in ("small", "large"))
    assert len(small) == 4 * 3 and len(large) == 4 + 2 + 2  # routers; two shapes, each a pair of neighbours
    for name in ("small", "large"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = PeftModel.from_pretrained(net(), tmp_path / name)
        assert torch.equal(again(X), model(X))
        assert len({id(m.lily_B["default"]) for m in again.base_model.layers()}) == 2


def test_lily_files_whose_copies_differ_are_not_shared(tmp_path):
    """The published library does not share in adapters that are not a model's first."""
    model = adapted(peft.LilyConfig(**LILY))
    for layer in model.base_model.layers():
        for held in (layer.lily_A, layer.lily_B):
            held["default"] = nn.Linear(*held["default"].weight.T.shape, bias=False)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low, is_trainable=True).eval()
        assert torch.equal(again(X), model(X))
        assert sum(p.requires_grad for p in again.parameters()) == 12


# ---- options the published library ignores
def test_hira_files_that_ignore_the_rank_pattern(tmp_path):
    config = peft.HiraConfig(target_modules=["0", "1"], r=4)
    model = adapted(config)
    model.save_pretrained(tmp_path)
    config.rank_pattern = {"0": 2}
    config.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert again.base_model.model[0].r["default"] == 4
    config.r = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_boft_files_with_one_factor(tmp_path):
    config = peft.BOFTConfig(target_modules=["0", "1"], boft_block_size=4)
    model = adapted(config)
    model.save_pretrained(tmp_path)
    config.boft_n_butterfly_factor = 2
    config.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(X), model(X))


def test_other_methods_write_no_text(tmp_path):
    adapted(peft.LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
