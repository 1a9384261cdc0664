# SPDX-License-Identifier: Apache-2.0
"""LoRA+, LoRA-FA, Riemannian: groups, errors, three steps against published results (tests/data/optimizers.json)."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from peft import BdLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.optimizers._gram import regularised_inverses
from peft.optimizers.lorafa import LoraFAOptimizer

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "optimizers.json").read_text())
X = torch.tensor([[0, 1, 2], [3, 4, 6]])
PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.lin = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.norm(torch.tanh(self.lin(self.emb(x)))))


def adapted(targets=("lin", "out"), **options):
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **options))
    for i, (_, p) in enumerate(model.named_parameters()):
        p.data = (torch.arange(p.numel(), dtype=torch.float32) * 1.7 + i).sin().reshape(p.shape) * 0.4
    return model


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def check(model, key, atol):
    values = dict(model.named_parameters())
    for name, want in PUBLISHED[key].items():
        torch.testing.assert_close(
            values[PREFIX + name].detach().flatten(), torch.tensor(want), atol=atol, rtol=1e-5, msg=f"{key} {name}"
        )


def names_of(model, optimizer):
    names = {id(p): n.removeprefix(PREFIX) for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


# ---- LoRA+


def test_loraplus_steps():
    model = adapted(["emb", "lin", "out"])
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-3
    )
    train(model, optimizer)
    check(model, "loraplus", 2e-6)


def test_loraplus_groups():
    model = adapted(["emb", "lin", "out"], bias="lora_only", modules_to_save=["norm"])
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
        weight_decay=0.5,
        betas=(0.8, 0.9),
    )
    assert names_of(model, optimizer) == [
        ["lin.lora_A.default.weight", "out.lora_A.default.weight"],
        ["emb.lora_embedding_A.default", "emb.lora_embedding_B.default"],
        ["lin.lora_B.default.weight", "out.lora_B.default.weight"],
        [
            "lin.base_layer.bias",
            "norm.modules_to_save.default.weight",
            "norm.modules_to_save.default.bias",
            "out.base_layer.bias",
        ],
    ]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-6, 16e-3, 16e-3])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_loraplus_needs_lr_and_ratio():
    with pytest.raises(TypeError, match="loraplus_lr_ratio"):
        create_loraplus_optimizer(adapted(), torch.optim.AdamW, lr=1e-3)
    with pytest.raises(TypeError, match="'lr'"):
        create_loraplus_optimizer(adapted(), torch.optim.AdamW, loraplus_lr_ratio=2.0)
    with pytest.raises(ValueError, match="`loraplus_lr_ratio` must not be negative, got -1"):
        create_loraplus_optimizer(adapted(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=-1)


def test_loraplus_keeps_embeddings_out_of_8_bits(monkeypatch):
    """bitsandbytes' optimizers, told by their names, would quantise the states of embeddings too."""
    told = []
    manager = SimpleNamespace(register_module_override=lambda *what: told.append(what))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    model = adapted(["emb", "lin"])
    for cls in (torch.optim.AdamW, type("PagedAdamW8bit", (torch.optim.AdamW,), {})):
        create_loraplus_optimizer(model, cls, lr=1e-3, loraplus_lr_ratio=2.0)
    assert told == [(model.base_model.model.emb.base_layer, "weight", {"optim_bits": 32})]


# ---- LoRA-FA


def test_lorafa_steps():
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2, weight_decay=0.1)
    train(model, optimizer)
    check(model, "lorafa", 3e-3)  # the published gradients were multiplied in bfloat16


def test_lorafa_group_and_state():
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2)
    (group,) = optimizer.param_groups
    assert group["names"] == [n for n, _ in model.named_parameters()] and len(group["params"]) == 11
    scaled = {n.removeprefix(PREFIX) for n, s in zip(group["names"], group["scaling_factors"], strict=True) if s}
    assert scaled == set(PUBLISHED["lorafa"]) and group["scaling_factor"] == 1.5
    assert set(filter(None, group["scaling_factors"])) == {1.5}
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_B." in n for n in trainable) and len(trainable) == 2
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 1)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trainable)
    assert {k: sorted(v) for k, v in optimizer.state.items()} == {
        PREFIX + "lin.lora": ["exp_avg_B", "exp_avg_sq_B", "step"],
        PREFIX + "out.lora": ["exp_avg_B", "exp_avg_sq_B", "step"],
    }


def test_lorafa_projects_the_gradient():
    """With A A^T = I and scaling 1 nothing is projected, so that the first step is a plain Adam step."""
    A, B = nn.Parameter(torch.eye(2, 3), requires_grad=False), nn.Parameter(torch.zeros(4, 2))
    C, D = nn.Parameter(2 * torch.eye(2, 3), requires_grad=False), nn.Parameter(torch.zeros(4, 2))
    group = {
        "params": [A, B, C, D],
        "names": ["x.lora_A.a.weight", "x.lora_B.a.weight", "x.lora_A.b.weight", "x.lora_B.b.weight"],
        "scaling_factors": [1.0, 1.0, 0.5, 0.5],
    }
    optimizer = LoraFAOptimizer([group], lr=0.1, betas=(0.0, 0.0), eps=1.0, correct_bias=False)
    B.grad, D.grad = torch.ones(4, 2), torch.ones(4, 2)
    optimizer.step()
    torch.testing.assert_close(B.detach(), torch.full((4, 2), -0.1 * 1 / (1 + 1)))
    # (C C^T)^-1 = I / 4 and 1 / s^2 = 4 cancel
    torch.testing.assert_close(D.detach(), torch.full((4, 2), -0.1 * 1 / (1 + 1)))
    assert sorted(optimizer.state) == ["x.lora.a", "x.lora.b"]  # two adapters in one layer


def test_lorafa_with_two_adapters_and_other_parameters():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["lin", "out"]))
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.requires_grad_(True)
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 2)
    changed = {n.removeprefix(PREFIX) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {
        *("lin.lora_B.default.weight", "out.lora_B.default.weight", "lin.base_layer.bias", "out.base_layer.bias")
    }


def test_lorafa_closure_gives_the_gradients_and_the_loss():
    models = [adapted(), adapted()]
    one, two = (create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2) for model in models)
    train(models[0], one, 1)

    def closure():
        loss = models[1](X).square().mean()
        loss.backward()
        return loss

    expected = models[1](X).square().mean()
    torch.testing.assert_close(two.step(closure), expected)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_lorafa_has_no_projection_for_convolutions():
    model = get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 2)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1e-2)
    model(torch.randn(1, 3, 5)).sum().backward()
    with pytest.raises(ValueError, match=r"base_model\.model\.0 has a factor of shape torch\.Size\(\[2, 3, 2\]\)"):
        optimizer.step()


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}])
def test_lorafa_bad_options(bad):
    with pytest.raises(ValueError, match="Invalid"):
        LoraFAOptimizer([nn.Parameter(torch.ones(2))], **bad)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"r": 0}])
def test_lorafa_bad_arguments(bad):
    with pytest.raises(ValueError, match="Invalid learning rate: -1|`r` should be a positive"):
        create_lorafa_optimizer(adapted(), **{"r": 2, "lora_alpha": 4, "lr": 1e-3, **bad})


def test_lorafa_group_without_scalings():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(KeyError, match="scaling_factors"):
        LoraFAOptimizer([{"params": [p], "names": ["a"]}]).step()
    optimizer = LoraFAOptimizer([{"params": [p], "names": ["a"], "scaling_factor": 1.0}])
    with pytest.warns(FutureWarning, match="scaling_factor"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.998), atol=1e-5, rtol=0)


def test_lorafa_use_rslora():
    with pytest.raises(ValueError, match="use_rslora=True"):
        create_lorafa_optimizer(adapted(), r=2, lora_alpha=3, lr=1e-2, use_rslora=True)
    with pytest.warns(FutureWarning, match="use_rslora"):
        create_lorafa_optimizer(adapted(), r=2, lora_alpha=3, lr=1e-2, use_rslora=False)


# ---- Riemannian


@pytest.mark.parametrize(
    ("key", "cls", "options"),
    [
        ("riemannian_sgd", torch.optim.SGD, {}),
        ("riemannian_adamw", torch.optim.AdamW, {"reg": 0.1, "weight_decay": 0.3}),
    ],
)
def test_riemannian_steps(key, cls, options):
    model = adapted()
    optimizer = create_riemannian_optimizer(model, cls, lr=1e-2, **options)
    assert isinstance(optimizer, cls) and type(optimizer).__name__ == "RiemannianPreconditionedOptimizer"
    train(model, optimizer)
    check(model, key, 5e-6)


def test_riemannian_skips_a_missing_gradient():
    model = adapted(["lin"])
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0)
    params = dict(model.named_parameters())
    A, B = params[PREFIX + "lin.lora_A.default.weight"], params[PREFIX + "lin.lora_B.default.weight"]
    old_a, old_b = A.detach().clone(), B.detach().clone()
    B.grad = torch.ones_like(B)
    optimizer.step()
    assert torch.equal(A, old_a)
    want = old_b - torch.ones_like(B) @ torch.linalg.inv(old_a @ old_a.T + 1e-2 * torch.eye(2))
    torch.testing.assert_close(B.detach(), want, atol=1e-5, rtol=1e-5)


def test_riemannian_errors():
    for cls in (dict, 3):
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
            create_riemannian_optimizer(adapted(), cls, lr=0.1)
    with pytest.raises(ValueError, match="LBFGS requires a closure"):
        create_riemannian_optimizer(adapted(), torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ValueError, match="did not find any trainable"):
        create_riemannian_optimizer(adapted(["emb"]), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="does not support closures"):
        create_riemannian_optimizer(adapted(), torch.optim.SGD, lr=0.1).step(lambda: 1.0)


def test_gram_inverses_of_mixed_sizes():
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(r, 9, generator=g) for r in (2, 4, 2)] + [torch.zeros(3, 9)]
    for F, inverse in zip(factors, regularised_inverses(factors, 0.1), strict=True):
        want = torch.linalg.inv(F @ F.T + 0.1 * torch.eye(F.shape[0]))
        torch.testing.assert_close(inverse, want, atol=1e-4, rtol=1e-4)


def test_block_diagonal_factors_are_refused():
    blocks = BdLoraConfig(["lin"], nblocks=2, match_strict=False)
    for make, options in (
        (create_lorafa_optimizer, {"r": 2, "lora_alpha": 3}),
        (create_riemannian_optimizer, {"optimizer_cls": torch.optim.SGD}),
    ):
        model = adapted(use_bdlora=blocks)
        with pytest.raises(
            ValueError, match=r"needs dense factors, but 'base_model.model.lin.lora_A.default' is block"
        ):
            make(model, lr=1e-2, **options)
        assert all(p.requires_grad for p in model.base_model.model.lin.parameters_of("default"))
