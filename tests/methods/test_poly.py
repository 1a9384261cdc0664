"""Poly: routing by task ids at every entrance, and the checks of its options."""

import pytest
import torch
from tests.models.prompt_models import IDS, base

import peft
from peft import PolyConfig


def model(task_type="CAUSAL_LM", name="llama", **kwargs):
    options = {"r": 2, "n_tasks": 3, "n_skills": 2, "target_modules": ["q_proj", "v_proj"], **kwargs}
    made = peft.get_peft_model(base(name), PolyConfig(task_type=task_type, **options)).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return made


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_splits", [1, 2])
def test_formula(n_splits):
    net = torch.nn.Sequential(torch.nn.Linear(6, 4))
    config = PolyConfig(target_modules=["0"], r=2, n_tasks=3, n_skills=2, n_splits=n_splits, init_weights=False)
    made = peft.get_peft_model(net, config).eval()
    layer = made.base_model.model[0]
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    assert A.shape == (n_splits, 2, 6 // n_splits, 2) and B.shape == (n_splits, 2, 2, 4 // n_splits)
    with torch.no_grad():
        layer.poly_router["default"].module_logits.copy_(torch.randn(3, 2 * n_splits))
    x, ids = torch.randn(3, 5, 6), torch.tensor([2, 0, 2])
    w = layer.poly_router["default"].module_logits.sigmoid().view(3, n_splits, 2)
    w = w / w.sum(-1, keepdim=True)
    rows = []
    for row, task in zip(x, ids.tolist(), strict=True):
        mixed_A = torch.cat([sum(w[task, q, s] * A[q, s] for s in range(2)) for q in range(n_splits)], 0)
        mixed_B = torch.cat([sum(w[task, q, s] * B[q, s] for s in range(2)) for q in range(n_splits)], 1)
        rows.append(layer.base_layer(row) + row @ mixed_A @ mixed_B / 2)
    close(made(x, task_ids=ids), torch.stack(rows))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_every_model_class_routes(task_type):
    made = model(task_type, "llama_cls" if task_type == "SEQ_CLS" else "llama")
    both = made(input_ids=IDS, task_ids=torch.tensor([0, 2]))[0]
    for row, task in enumerate((0, 2)):
        close(made(input_ids=IDS[row : row + 1], task_ids=[task])[0], both[row : row + 1])
    assert (made(input_ids=IDS, task_ids=[1, 2])[0][0] - both[0]).abs().max() > 1e-4


def test_tuner_forward_takes_ids():
    made = model()
    with torch.no_grad():
        expected = made(input_ids=IDS, task_ids=[0, 1]).logits
        close(made.base_model(input_ids=IDS, task_ids=torch.tensor([0, 1])).logits, expected)


def test_errors():
    made = model()
    with pytest.raises(ValueError, match="pass `task_ids`"):
        made(input_ids=IDS)
    with pytest.raises(ValueError, match="between 0 and n_tasks - 1 = 2"):
        made(input_ids=IDS, task_ids=[0, 3])
    with pytest.raises(ValueError, match="between 0"):
        made(input_ids=IDS, task_ids=[0, -1])
    with pytest.raises(RuntimeError, match="1 ids for a batch of 2"):
        made(input_ids=IDS, task_ids=[0])
    with pytest.raises(ValueError, match="poly_type"):
        model(poly_type="other")
    with pytest.raises(ValueError, match="`r`"):
        model(r=0)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: n_splits=3"):
        model(n_splits=3)


def test_a_single_task_needs_no_ids():
    made = model(n_tasks=1)
    close(made(input_ids=IDS).logits, made(input_ids=IDS, task_ids=[0, 0]).logits)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beam_search_repeats_ids(name):
    """Upstream fails here. The encoder of T5 sees each sample once, the decoder once a beam."""
    seq2seq = name == "t5"
    targets = ["q", "v"] if seq2seq else ["q_proj", "v_proj"]
    made = model("SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", name, target_modules=targets)
    ids = IDS.clip(min=3)
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    both = made.generate(input_ids=ids, task_ids=torch.tensor([0, 2]), **options)
    for row, task in enumerate((0, 2)):
        alone = made.generate(input_ids=ids[row : row + 1], task_ids=torch.tensor([task]), **options)
        assert torch.equal(alone[0], both[row])


def test_gradient_checkpointing_keeps_the_ids():
    """Upstream raises in backward: the ids are gone when layers are recomputed."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        made = model().train()
        if checkpointing:
            made.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        made(input_ids=IDS, labels=IDS, task_ids=[0, 2]).loss.backward()
        grads.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 12
    for name, grad in grads[0].items():
        close(grads[1][name], grad)


def test_mixed_batch_takes_the_ids_of_its_rows():
    made = model()
    made.add_adapter(
        "other",
        PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=2, init_weights=False, target_modules=["q_proj"]),
    )
    mixed = made(input_ids=IDS, task_ids=[0, 2], adapter_names=["default", "other"]).logits
    close(mixed[:1], made(input_ids=IDS[:1], task_ids=[0]).logits)
    made.set_adapter("other")
    made.eval()
    close(mixed[1:], made(input_ids=IDS[1:], task_ids=[2]).logits)


def test_base_output_is_not_changed_in_place():
    made, kept = model(n_tasks=1), []
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda m, args, out: kept.append((out, out.clone())))
    made(input_ids=IDS)
    assert torch.equal(*kept[0])


def test_generation_of_the_tuner_takes_ids():
    made = model()
    options = {"input_ids": IDS.clip(min=3), "max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    want = made.generate(**options, task_ids=[0, 2])
    assert torch.equal(made.base_model.generate(**options, task_ids=[0, 2]), want)
    with pytest.raises(ValueError, match="pass `task_ids`"):  # they were for that call
        made.base_model(input_ids=IDS)
