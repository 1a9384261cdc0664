"""CPT: projection, gradients, loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.models.prompt_models import IDS, adapted, base, close, config

import peft
from peft import CPTConfig

ROLES = [1, 2, 3, 4, 5, 6, 7, 8, 0]
TOKENS = {"cpt_token_ids": [4, 5, 6, 7, 8, 9, 10, 11, 12], "cpt_tokens_type_mask": ROLES}


def made(**kwargs):
    return adapted("llama", "cpt", "CAUSAL_LM", **{**TOKENS, "cpt_mask": [1] * 9, **kwargs})


def test_configuration():
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        CPTConfig()
    with pytest.raises(ValueError, match="same length"):
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1])
    for wrong in ({"opt_weighted_loss_type": "decai"}, {"opt_projection_epsilon": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CPTConfig(task_type="CAUSAL_LM", **wrong)
    with pytest.raises(IndexError, match=r"Token ids \[99\] are not in the vocabulary"):
        peft.get_peft_model(base("llama"), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 99]))
    done = CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=9, token_dim=3)
    assert (done.num_virtual_tokens, done.token_dim, done.cpt_token_ids) == (1, None, [0])
    assert done.is_prompt_learning


def test_prompt_starts_as_the_examples():
    model = peft.get_peft_model(base("llama"), config("cpt", "CAUSAL_LM", **TOKENS, cpt_mask=[1] * 9))
    close(model.get_prompt(1)[0], base("llama").get_input_embeddings().weight[4:13])


def test_rows_stay_in_their_balls():
    model = made(opt_projection_epsilon=2.0, opt_projection_format_epsilon=0.5)
    encoder = model.prompt_encoder["default"]
    before = encoder.delta_embedding.weight.detach().clone()
    model(input_ids=IDS)
    norms = encoder.delta_embedding.weight.norm(dim=1)
    scale = math.sqrt(16 / 2048)
    radii = [{1: 0.5, 2: 2.0, 3: 0.5}.get(code % 4, 0) * scale for code in ROLES]
    close(norms, torch.tensor(radii), 1e-6)
    close(encoder.get_projection(), encoder.delta_embedding.weight, 1e-7)
    assert made(cpt_tokens_type_mask=[-1] * 9).prompt_encoder["default"].get_epsilon().max() < 1e-6  # no role
    small = before * 1e-4
    encoder.delta_embedding.weight.data.copy_(small)
    close(encoder.get_projection()[:3], small[:3], 1e-9)


def test_labels_and_tokens_without_a_role_get_no_gradient():
    model = made(opt_projection_epsilon=5.0).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    size = model.prompt_encoder["default"].delta_embedding.weight.grad.abs().sum(1)
    assert [bool(s > 0) for s in size] == [code % 4 != 0 for code in ROLES]
    assert model.prompt_encoder["default"].embedding.weight.grad is None


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("name", ["default", "other"])
def test_loss(decay, name):
    options = {} if decay is None else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    model = made(**options)
    if name == "other":
        model.add_adapter("other", config("cpt", "CAUSAL_LM", **TOKENS, cpt_mask=[1] * 9, **options))
        model.set_adapter("other")
        model.delete_adapter("default")
    roles = torch.tensor([[0, 0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 6, 7, 8]])
    given = roles.clone()
    out = model(input_ids=IDS, labels=IDS, input_type_mask=roles)
    assert torch.equal(roles, given)
    total, count = 0.0, 0
    for row in range(2):
        codes = ROLES + [c + 8 if c else 0 for c in given[row].tolist()]
        labels = TOKENS["cpt_token_ids"] + IDS[row].tolist()
        kinds = sorted({c for c in codes if c and c % 4 == 0})
        for i in range(1, len(codes)):
            if codes[i] and codes[i] % 4 == 0:
                weight = 1.0 if decay is None else decay ** (len(kinds) - 1 - kinds.index(codes[i]))
                total += weight * F.cross_entropy(out.logits[row, i - 1], torch.tensor(labels[i]))
                count += 1
    close(out.loss, total / count)
    everything = model(input_ids=IDS, labels=IDS).loss
    close(model(input_ids=IDS, labels=IDS, input_type_mask=torch.full_like(IDS, 4)).loss, everything)
    as_tuple = model(input_ids=IDS, labels=IDS, return_dict=False)
    close(as_tuple[0], everything)
    assert as_tuple[1].shape == out.logits.shape


def test_loading_folds_delta_into_the_rows():
    model = made()
    want = model.get_prompt(1)
    other = made(seed=5)
    other.prompt_encoder["default"].load(model.prompt_encoder["default"].export())
    close(other.get_prompt(1), want, 1e-6)
    assert other.prompt_encoder["default"].delta_embedding.weight.abs().max() == 0
