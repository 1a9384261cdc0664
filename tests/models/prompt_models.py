"""Tiny transformers models and prompt configurations, seeded, for the tests of the prompt methods."""

import copy
import functools
import warnings

import torch

import peft

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENGTH = 7
IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [3, 4, 5, 6, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@functools.cache
def _made(name: str):
    import transformers as t

    llama = t.LlamaConfig(**_SIZES, **_TOKENS, num_key_value_heads=2, num_labels=3)
    bert = t.BertConfig(**_SIZES, num_labels=3)
    makers = {
        "llama": lambda: t.LlamaForCausalLM(llama),
        "llama_cls": lambda: t.LlamaForSequenceClassification(llama),
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**_SIZES, **_TOKENS, num_key_value_heads=2, sliding_window=4)
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**_SIZES, **_TOKENS, num_key_value_heads=2, head_dim=8, sliding_window=4)
        ),
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, **_TOKENS)
        ),
        "gpt2_tok": lambda: t.GPT2ForTokenClassification(
            t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, num_labels=3, **_TOKENS)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=50,
                d_model=16,
                d_kv=4,
                d_ff=32,
                num_layers=2,
                num_heads=4,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
        "bert_cls": lambda: t.BertForSequenceClassification(bert),
        "bert_tok": lambda: t.BertForTokenClassification(bert),
        "bert_qa": lambda: t.BertForQuestionAnswering(t.BertConfig(**_SIZES)),
        "bert": lambda: t.BertModel(bert),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=2, n_heads=4, num_labels=3)
        ),
    }
    torch.manual_seed(0)
    model = makers[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def base(name: str):
    return copy.deepcopy(_made(name))


def config(method: str, task: str, **kwargs):
    nv = {} if method == "cpt" else {"num_virtual_tokens": 3}
    classes = {
        "prompt": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
        "multitask": peft.MultitaskPromptTuningConfig,
        "cpt": peft.CPTConfig,
        "cartridge": peft.CartridgeConfig,
    }
    extra = {
        "multitask": {"num_tasks": 2},
        "cpt": {"cpt_token_ids": [4, 5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    }
    return classes[method](task_type=task, **{**nv, **extra.get(method, {}), **kwargs})


def adapted(name: str, method: str, task: str, seed: int = 1, **kwargs):
    """A model in eval mode with random values in every trainable parameter of the prompt."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(name), config(method, task, **kwargs)).eval()
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def tokenizer(folder) -> str:
    """Path of a saved tokenizer of words: a, b, c, d are 5, 6, 7, 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 5, "b": 6, "c": 7, "d": 8}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")
