"""Methods that need several passes, callbacks or data, from the first call to the saved adapter, on tasks that they
learn: AdaLoRA, AdaMSS, EVA, CorDA, LoRA-GA, Arrow, cartridges. X-LoRA's is in test_xlora.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.methods.test_training import Decoder, evaluate
from tqdm import tqdm

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, CordaConfig, EvaConfig, LoraGAConfig

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORLD = Decoder()


def rows() -> dict[str, torch.Tensor]:
    return WORLD._made()[1]


def losses(model: Any, steps: int = 20, lr: float = 1e-2, loss: Any = WORLD.loss, after: Any = None) -> tuple:
    """Loss in evaluation mode before and after the steps."""
    before = float(evaluate(loss, model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in tqdm(range(steps), desc=type(model.base_model).__name__):
        optimizer.zero_grad()
        loss(model.train()).backward()
        optimizer.step()
        if after is not None:
            after(step)
    return before, float(evaluate(loss, model))


def reloads(model: Any, folder: Path, base: Any) -> None:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(evaluate(WORLD.outputs, again), evaluate(WORLD.outputs, model), rtol=1e-4, atol=1e-4)


def test_adalora_spends_its_budget_and_learns(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=4, tfinal=6, deltaT=2, total_step=24, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(WORLD.base(), config)
    before, after = losses(model, 24, after=model.base_model.update_and_allocate)
    assert after < 0.8 * before
    kept = {k: sum(v) for k, v in model.peft_config["default"].rank_pattern.items()}
    assert sum(kept.values()) == 2 * len(kept) and len(set(kept.values())) > 1
    reloads(model, tmp_path, WORLD.base())


def test_adamss_in_the_trainer_with_its_callback(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from peft.tuners.adamss.asa_callback import AdamssAsaCallback

    config = peft.AdamssConfig(
        r=24, num_subspaces=4, subspace_rank=2, target_modules=TARGETS, use_asa=True, asa_target_subspaces=20,
        init_warmup=2, final_warmup=20, mask_interval=6, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(WORLD.base(), config)
    before, count = float(evaluate(WORLD.loss, model)), sum(p.requires_grad for p in model.parameters())
    options = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=24, learning_rate=3e-2, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{k: v[i] for k, v in rows().items()} for i in range(8)]
    transformers.Trainer(model, options, train_dataset=data, callbacks=[AdamssAsaCallback()]).train()
    assert float(evaluate(WORLD.loss, model)) < 0.9 * before
    assert 0 < sum(p.requires_grad for p in model.parameters()) <= 2 * 20 < count
    reloads(model, tmp_path, WORLD.base())


def lora(scheme: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=scheme, task_type="CAUSAL_LM", **options)


def test_eva_starts_from_activations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = get_peft_model(WORLD.base(), lora("eva", eva_config=EvaConfig(rho=2.0)))
    peft.initialize_lora_eva_weights(model, [rows()] * 4)
    assert "EVA: converged layers" in capsys.readouterr().err
    ranks = {m.r["default"] for m in model.base_model.layers()}
    assert len(ranks) > 1  # redistributed by what the data explain
    before, after = losses(model)
    assert before == pytest.approx(float(evaluate(WORLD.loss, WORLD.base())), rel=1e-5) and after < 0.8 * before
    reloads(model, tmp_path, WORLD.base())


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_from_covariances(tmp_path: Path, capsys: pytest.CaptureFixture, method: str) -> None:
    base = WORLD.base()
    config = lora("corda", corda_config=CordaConfig(corda_method=method, verbose=True))

    def run_model() -> None:
        for row in rows()["input_ids"]:
            base(input_ids=row[row != 0][None])

    peft.tuners.lora.corda.preprocess_corda(base, config, run_model=run_model)
    assert "CorDA" in capsys.readouterr().err
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "corda"
    before, after = losses(model, lr=3e-3)
    assert before == pytest.approx(float(evaluate(WORLD.loss, WORLD.base())), rel=1e-3) and after < 0.8 * before
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "initial")
    again = PeftModel.from_pretrained(WORLD.base(), tmp_path)  # a plain LoRA of the unchanged base
    assert float(evaluate(WORLD.loss, again)) == pytest.approx(after, rel=1e-3)


def test_lora_ga_starts_from_gradients_and_learns_faster(tmp_path: Path) -> None:
    base = WORLD.base()
    config = lora("lora_ga", lora_ga_config=LoraGAConfig())
    peft.preprocess_loraga(base, config, lambda: WORLD.loss(base).backward())
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    plain = get_peft_model(WORLD.base(), lora(True))  # type: ignore[arg-type]
    (before, after), (_, usual) = (losses(m, 5, 3e-3) for m in (model, plain))
    assert before == pytest.approx(float(evaluate(WORLD.loss, WORLD.base())), rel=1e-3)
    assert after < 0.9 * before and after < usual


def test_arrow_sends_tokens_to_the_expert_that_knows_them(tmp_path: Path) -> None:
    """Expert 0 counts up in the first alphabet, expert 1 down in the second; nothing says so but the inputs."""
    sizes = {**Decoder.SIZES, "vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "attention_bias": False}
    generator = torch.Generator().manual_seed(1)

    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.2)).eval()

    def draw(task: int) -> torch.Tensor:
        start, step = torch.randint(0, 12, (16, 1), generator=generator), (1, -1)[task]
        return (start + step * torch.arange(8)) % 12 + 12 * task

    def loss(model: Any, task: int) -> torch.Tensor:
        ids = draw(task)
        return model(input_ids=ids, labels=ids).loss

    paths, wrong = [], []
    for task in (0, 1):
        expert = get_peft_model(base(), LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
        losses(expert, 60, 1e-2, lambda m, task=task: loss(m, task))
        expert.save_pretrained(tmp_path / str(task))
        paths.append(str(tmp_path / str(task)))
        wrong.append(float(evaluate(loss, expert, task=1 - task)))
    model = peft.create_arrow_model(base(), paths, ArrowConfig(top_k=1, rng_seed=0))
    for task in (0, 1):
        routed, untrained = (float(evaluate(loss, m, task=task)) for m in (model, base()))
        print(task, routed, untrained, wrong)  # noqa: T201
        assert routed < 0.7 * untrained and routed < 0.7 * wrong[1 - task]


def test_cartridge_distils_a_text(tmp_path: Path) -> None:
    """The rows start as the cache of the text's first tokens and learn to answer as the model does that reads all."""
    base = WORLD.base()
    frozen = {k: v.clone() for k, v in base.state_dict().items()}
    context, questions = rows()["input_ids"][:1], rows()["input_ids"][1:]
    context = context[:, : int((context != 0).sum())]
    with torch.no_grad():
        read = torch.cat([context.expand(len(questions), -1), questions], 1)
        teacher = base(input_ids=read).logits[:, context.shape[1] :].log_softmax(-1)
    mask = questions != 0

    def distance(model: Any) -> torch.Tensor:
        student = model(input_ids=questions).logits.log_softmax(-1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)[mask].mean()

    torch.manual_seed(0)
    config = peft.CartridgeConfig(num_virtual_tokens=6, num_frozen_tokens=1, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    cache = base(input_ids=context[:, :6], use_cache=True).past_key_values
    first = peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    before, after = losses(model, 40, 1e-2, distance)
    print(before, after)  # noqa: T201
    assert after < 0.5 * before
    learned = model.get_prompt_embedding_to_save("default")
    assert torch.equal(learned[0], first[0]) and not torch.equal(learned[1:], first[1:])
    assert all(torch.equal(v, frozen[k]) for k, v in model.get_base_model().state_dict().items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(WORLD.base(), tmp_path)
    assert float(evaluate(distance, again)) == pytest.approx(after, rel=1e-5)
