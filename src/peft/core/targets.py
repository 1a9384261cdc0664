# SPDX-License-Identifier: Apache-2.0
"""Default target modules per model family: one table, the methods list only their differences.

`_LORA` is the reference. A value is a space-separated list of module names, or a `Pattern`: a regular expression
matched against whole module names. The dicts handed out are kept, so an entry that a user adds is found from then on.
"""

import functools

Targets = list[str] | str


class Pattern(str):
    """A regular expression instead of a list of names."""


# fmt: off
_LORA: dict[str, str] = {
    "t5": "q v", "mt5": "q v", "bart": "q_proj v_proj", "gpt2": "c_attn", "bloom": "query_key_value",
    "blip-2": "q v q_proj v_proj", "opt": "q_proj v_proj", "gptj": "q_proj v_proj", "gpt_neox": "query_key_value",
    "gpt_neo": "q_proj v_proj", "bert": "query value", "roberta": "query value", "xlm-roberta": "query value",
    "electra": "query value", "deberta-v2": "query_proj value_proj", "deberta": "in_proj", "layoutlm": "query value",
    "llama": "q_proj v_proj", "llama4": "q_proj v_proj", "chatglm": "query_key_value", "gpt_bigcode": "c_attn",
    "mpt": "Wqkv", "RefinedWebModel": "query_key_value", "RefinedWeb": "query_key_value",
    "falcon": "query_key_value", "btlm": "c_proj c_attn", "codegen": "qkv_proj", "mistral": "q_proj v_proj",
    "mixtral": "q_proj v_proj", "stablelm": "q_proj v_proj", "phi": "q_proj v_proj fc1 fc2",
    "gemma": "q_proj v_proj", "gemma2": "q_proj v_proj", "gemma3_text": "q_proj v_proj",
    "gemma4": Pattern(r".*language_model\..*\.(q_proj|v_proj)"), "qwen2": "q_proj v_proj", "qwen3": "q_proj v_proj",
    "nemotron_h": "q_proj k_proj v_proj o_proj", "rwkv": "key value receptance output",
    "rwkv7": "r_proj k_proj v_proj o_proj key value",
}
_DECODER_NORMS = "input_layernorm post_attention_layernorm norm"
_GEMMA_NORMS = (
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm"
)
_LNTUNING: dict[str, str] = {
    "llama": _DECODER_NORMS, "mistral": _DECODER_NORMS, "gemma": _DECODER_NORMS,
    "gemma2": _GEMMA_NORMS, "gemma3_text": _GEMMA_NORMS,
    "bloom": "input_layernorm post_attention_layernorm ln_f",
    "falcon": "input_layernorm post_attention_layernorm ln_f",
    "llava": f"multi_modal_projector {_DECODER_NORMS} embed_tokens lm_head", "phi": "input_layernorm final_layernorm",
    "t5": "layer_norm final_layer_norm", "mt5": "layer_norm final_layer_norm",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
    "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm",
    "gpt2": "ln_1 ln_2 ln_f", "gptj": "ln_1 ln_f",
    "qwen2": "post_attention_layernorm", "qwen3": "post_attention_layernorm",
}
# Attention projections rescaled by (IA)3, then the feed-forward module, which is always the last one.
_IA3: dict[str, str] = {
    "t5": "k v wo", "mt5": "k v wi_1", "gpt2": "c_attn mlp.c_proj", "bloom": "query_key_value mlp.dense_4h_to_h",
    "roberta": "key value output.dense", "opt": "q_proj k_proj fc2", "gptj": "q_proj v_proj fc_out",
    "gpt_neox": "query_key_value dense_4h_to_h", "gpt_neo": "q_proj v_proj c_proj", "bart": "q_proj v_proj fc2",
    "gpt_bigcode": "c_attn mlp.c_proj", "llama": "k_proj v_proj down_proj", "llama4": "q_proj v_proj down_proj",
    "mistral": "k_proj v_proj down_proj", "mixtral": "k_proj v_proj w2", "bert": "key value output.dense",
    "deberta-v2": "key_proj value_proj output.dense", "deberta": "in_proj output.dense",
    "RefinedWebModel": "query_key_value dense_4h_to_h", "RefinedWeb": "query_key_value dense_4h_to_h",
    "falcon": "query_key_value dense_4h_to_h", "phi": "q_proj v_proj fc2", "gemma": "q_proj v_proj down_proj",
    "gemma2": "q_proj v_proj down_proj", "gemma3_text": "q_proj v_proj down_proj",
    "qwen2": "q_proj v_proj down_proj", "qwen3": "q_proj v_proj down_proj",
}
_DECODER_LINEARS = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
_OSF: dict[str, str] = {
    **dict.fromkeys(
        ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi"),
        _DECODER_LINEARS,
    ),
    "gpt2": "c_attn c_proj", "gpt_bigcode": "c_attn c_proj", "bloom": "query_key_value dense_4h_to_h",
    "gpt_neox": "query_key_value dense_4h_to_h", "falcon": "query_key_value dense_4h_to_h",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2", "gptj": "q_proj k_proj v_proj out_proj fc_in fc_out",
}
_BEFT: dict[str, str] = {
    "t5": "v", "mt5": "v", "bert": "value", "roberta": "value", "deberta-v2": "value_proj",
    **dict.fromkeys(
        ("opt", "gptj", "gpt_neo", "bart", "llama", "llama4", "mistral", "mixtral", "phi", "gemma", "gemma2",
         "gemma3_text", "qwen2", "qwen3"),
        "v_proj",
    ),
}
# Families of the reference table that the early, wide tables do not cover.
_NOT_IN_ADALORA = (
    "blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral mixtral "
    "stablelm phi rwkv rwkv7"
)
_ADALORA: dict[str, str | None] = {
    **dict.fromkeys(_NOT_IN_ADALORA.split()),
    "t5": "q k v o wi wo", "mt5": "q k v o wi_0 wi_1 wo", "bart": "q_proj k_proj v_proj out_proj fc1 fc2",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2", "deberta-v2": "query_proj key_proj value_proj dense",
}
_MLP_GPT2: dict[str, str | None] = {"gpt2": "mlp.c_proj", "gpt_bigcode": "mlp.c_proj"}
_ATTENTION_PHI: dict[str, str | None] = {"phi": "q_proj v_proj"}

# Differences from the reference table; None removes a family.
_DIFFERENCES: dict[str, dict[str, str | None]] = {
    "adalora": {**_ADALORA, "roberta": "query key value dense"},
    "adamss": {"vit": "query value"},
    "boft": {}, "c3a": _MLP_GPT2, "deft": {}, "delora": {}, "fourierft": _MLP_GPT2,
    "frod": {**_ATTENTION_PHI, "vit": "query value"},
    "glora": {}, "gralora": {}, "hira": {}, "hra": {}, "lily": {}, "loha": {}, "lokr": {}, "lora": {}, "miss": {},
    "oft": {}, "peanut": {}, "poly": {}, "psoft": {},
    "pvera": {**_ATTENTION_PHI, "dinov2": "query value"},
    "randlora": {}, "road": {}, "shira": _ATTENTION_PHI, "supertuning": {}, "tinylora": {}, "unilora": {},
    "vblora": _ADALORA, "vera": _ATTENTION_PHI,
    "waveft": {**_MLP_GPT2, "btlm": None, "rwkv": None, "rwkv7": None},
}
# fmt: on
_OWN = {"beft": _BEFT, "ia3": _IA3, "lntuning": _LNTUNING, "osf": _OSF}
_PUBLISHED = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"


def _value(targets: str) -> Targets:
    return str(targets) if isinstance(targets, Pattern) else targets.split()


@functools.cache
def target_table(name: str) -> dict[str, Targets]:
    """The table of a method: model type -> list of module names or regular expression. The same dict at every call."""
    if name == "ia3_feedforward":
        # mt5 rescales an input projection of the feed-forward block, as its output.
        return {family: [] if family == "mt5" else v.split()[-1:] for family, v in _IA3.items()}
    if name in _OWN:
        return {family: _value(v) for family, v in _OWN[name].items()}
    if name not in _DIFFERENCES:
        raise KeyError(f"No table of default target modules is called {name!r}; there are {', '.join(table_names())}.")
    return {family: _value(v) for family, v in {**_LORA, **_DIFFERENCES[name]}.items() if v is not None}


def table_names() -> tuple[str, ...]:
    return tuple(sorted([*_DIFFERENCES, *_OWN, "ia3_feedforward"]))


def default_targets(table: str, model_type: str) -> set[str] | str | None:
    """Default targets of a model family: a set of names, a regular expression, or None for an unknown family."""
    targets = target_table(table).get(model_type)
    return targets if targets is None or isinstance(targets, str) else set(targets)


def table_of_method(peft_type: str) -> str | None:
    """The table used when a config of this method has `target_modules=None`; None for methods without one."""
    name = str(getattr(peft_type, "value", peft_type)).lower().replace("ln_tuning", "lntuning")
    return name if name in table_names() else None


def published_names() -> dict[str, str]:
    """Published constant name -> table name."""
    names = {_PUBLISHED.format(name.upper()): name for name in table_names() if name != "ia3_feedforward"}
    names["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"] = "ia3_feedforward"
    return names
