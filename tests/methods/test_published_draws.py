"""What the published library (0.21.2) draws, and in which order: numbers measured there with the same seeds. The golden
cases cover the default initialisations; here are the others, and dropouts.
"""

import pytest
import torch
from tests.methods.bases import base, inputs
from tests.versions import since

import peft

RANDOM = {"target_modules": ["lin0"], "init_weights": False}


def squares(model) -> list[float]:
    return [float(p.detach().double().square().sum()) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("config", "sizes", "following"), [
    (peft.GloraConfig(r=2, **RANDOM), [8.4728, 0.6095, 7.9477, 0.7446, 5.5081, 0.0757, 0.0002, 0.0007], 0.20204),
    (peft.LilyConfig(r=2, **RANDOM), [0.7456, 1.2721, 0.1865], 0.68136),
    (peft.AdamssConfig(r=8, num_subspaces=3, **RANDOM), [1.0, 1.0, 1.0, 0.0004, 0.0008, 0.0003], 0.74966),
], ids=lambda c: getattr(c, "peft_type", ""))  # fmt: skip
def test_random_starts(config, sizes, following):
    model = base("Linear")
    torch.manual_seed(0)
    assert squares(peft.get_peft_model(model, config)) == pytest.approx(sizes, abs=1e-4)
    assert torch.rand(1).item() == pytest.approx(following, abs=1e-5)


@pytest.mark.parametrize(("dynamic", "ranks", "following"), [(False, [7, 7, 8], 0.49628), (True, [5, 6, 7], 0.01417)])
def test_adamss_clusters_have_the_rank_asked_for(dynamic, ranks, following):
    pytest.importorskip("sklearn")
    config = peft.AdamssConfig(target_modules=["lin0"], r=8, num_subspaces=3, subspace_rank=8, use_dynamic_rank=dynamic)
    model = base("Linear")
    torch.manual_seed(0)
    layer = peft.get_peft_model(model, config).base_model.layers()[0]
    assert [len(a) for a in layer.adamss_A["default"]] == ranks
    assert torch.rand(1).item() == pytest.approx(following, abs=1e-5)
    for a in layer.adamss_A["default"]:
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)))


@since("torch", "2.13", "draws masks in this order")
@pytest.mark.parametrize(("config", "size", "following"), [
    (peft.GraloraConfig(r=4, hybrid_r=2, gralora_dropout=0.5, **RANDOM), 78.073, 0.2098),
    (peft.BOFTConfig(boft_dropout=0.5, **RANDOM), 25.525, 0.9201),
], ids=lambda c: getattr(c, "peft_type", ""))  # fmt: skip
def test_dropouts(config, size, following):
    model = base("Linear")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).train()
    torch.manual_seed(5)
    assert float(model(inputs("Linear")).detach().double().square().sum()) == pytest.approx(size, abs=2e-3)
    assert torch.rand(1).item() == pytest.approx(following, abs=1e-5)
