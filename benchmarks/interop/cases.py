"""The cases of the exchange: every golden case that writes one adapter, and more options than those have."""

import json
from collections.abc import Iterator
from pathlib import Path

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = {"modules_to_save": ["lm_head"]}
LAYER = {"layers_to_transform": [1], "layers_pattern": "layers"}

CONV1D = [
    ("FOURIERFT", "FourierFTConfig", {"n_frequency": 30, "fan_in_fan_out": True}),
    ("WAVEFT", "WaveFTConfig", {"n_frequency": 30, "fan_in_fan_out": True}),
    ("VERA", "VeraConfig", {"r": 4, "fan_in_fan_out": True}),
    ("RANDLORA", "RandLoraConfig", {"r": 6, "fan_in_fan_out": True}),
    ("IA3", "IA3Config", {"feedforward_modules": [], "fan_in_fan_out": True}),
    ("GRALORA", "GraloraConfig", {"r": 4, "fan_in_fan_out": True}),
    ("HIRA", "HiraConfig", {"r": 4, "fan_in_fan_out": True}),
    ("VBLORA", "VBLoRAConfig", {"r": 2, "num_vectors": 12, "vector_length": 8, "fan_in_fan_out": True}),
    ("UNILORA", "UniLoraConfig", {"r": 2, "theta_d_length": 32, "fan_in_fan_out": True}),
    ("TINYLORA", "TinyLoraConfig", {"u": 6, "fan_in_fan_out": True}),
    ("PVERA", "PveraConfig", {"r": 4, "fan_in_fan_out": True}),
    ("ADALORA", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "fan_in_fan_out": True}),
    ("FROD", "FrodConfig", {"sparse_rate": 0.05, "progressbar": False, "fan_in_fan_out": True}),
]

# golden case that gives base, inputs and defaults -> options of further cases ("base" and "inputs" replace the case's)
EXTRA: dict[str, list[dict]] = {
    "lora_llama": [
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5, **HEAD},
        {"target_modules": ALL, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "down_proj": 1}, "r": 2},
        {"use_dora": True, "use_rslora": True, "target_modules": ALL, "rank_pattern": {"gate_proj": 2}},
        {"lora_bias": True, "base": "llama_bias", "bias": "lora_only"},
        {"target_modules": ["embed_tokens", "lm_head"], "base": "llama_tied"},
        {"modules_to_save": ["embed_tokens"], "base": "llama_tied", "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [1, 7], "lm_head": [2]}},
        {"how": "arrow", "r": 1},
        {"target_parameters": ["q_proj.weight", "mlp.down_proj.weight"], "target_modules": []},
        {"layer_replication": [[0, 2], [0, 1]], "rank_pattern": {"layers.2.self_attn.q_proj": 2}},
    ],
    "lora_gpt2": [
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["wte"]},
        {"how": "arrow", "r": 1, "target_modules": ["c_attn"]},
    ],
    "lora_conv1d": [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"conv1": 1}}],
    "lora_conv2d": [{"lora_bias": True}, {"bias": "all"}],
    "lora_conv3d": [{"use_dora": True}],
    "lora_mha": [{"target_modules": ["mha"], "use_rslora": True, "modules_to_save": ["lin1"]}],
    "lora_mlp": [
        {"bias": "lora_only", "use_rslora": True, "alpha_pattern": {"lin1": 9}},
        {"use_dora": True, "modules_to_save": ["lin2"]},
        {"init_lora_weights": "orthogonal", "r": 4},
    ],
    "lora_bdlora": [
        {
            "r": 6,
            "use_bdlora": {
                "__class__": "BdLoraConfig",
                "nblocks": 2,
                "target_modules_bd_b": ["q_proj"],
                "target_modules_bd_a": ["o_proj"],
            },
        }
    ],
    "lora_alora": [{"target_modules": ALL, "use_rslora": True}],
    "lora_kasa": [{"target_modules": ["lin1"], "r": 2}],
    "lora_velora": [{"velora_config": {"__class__": "VeloraConfig", "init_type": "random", "num_groups": 2}}],
    "lora_gpt2_default": [
        {"class": name, "method": method, "task_type": "CAUSAL_LM", "target_modules": ["c_attn"], **options}
        for method, name, options in CONV1D
    ],
    "adalora_llama": [{"use_rslora": True, "target_modules": ALL}, {"rank_pattern": None, "init_r": 6, **HEAD}],
    "adamss_llama": [
        {"use_dynamic_rank": True, "subspace_rank": 3},
        {"init_weights": None, "base": "llama_bias"},
        {"random_seed": 3, **HEAD},
    ],
    "adaption_prompt_llama": [{"adapter_layers": 1, "adapter_len": 2}],
    "beft_llama": [{"base": "llama_bias", "target_modules": ["q_proj", "down_proj"], **HEAD}],
    "boft_llama": [
        {"boft_block_size": 8, "boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "o_proj"]},
        {"boft_block_size": 0, "boft_block_num": 8, "target_modules": ALL, "bias": "all"},
    ],
    "boft_conv2d": [{"boft_block_size": 3, "boft_n_butterfly_factor": 1}],
    "c3a_llama": [{"block_size_pattern": {"o_proj": 16}}, {"init_weights": False, **LAYER}],
    "cartridge_llama": [{"num_frozen_tokens": 0}],
    "cpt_llama": [{"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}],
    "deft_llama": [
        {"decomposition_method": "qr"},
        {"para": True},
        {"alpha": 9, "init_scale": 0.5, "target_modules": ALL},
    ],
    "delora_llama": [
        {"rank_pattern": {"q_proj": 2}, "lambda_pattern": {"v_proj": 3}, "bias": "delora_only", "base": "llama_bias"}
    ],
    "fourierft_llama": [
        {"random_loc_seed": 5, "n_frequency_pattern": {"q_proj": 9}},
        {"init_weights": True, "scaling": 10.0, **LAYER},
    ],
    "frod_llama": [{"sparse_rate": 0.1, "target_modules": ["q_proj", "o_proj"]}, {"save_projection": False}],
    "glora_llama": [
        {"config_A_B": "none", "config_C": "none", "config_D_E": "vector", "base": "llama_bias"},
        {"config_A_B": "vector", "config_C": "lora", "config_D_E": "none"},
        {"base": "llama_bias", "config_D_E": "constant"},
    ],
    "gralora_llama": [{"gralora_k": 4, "r": 8}, {"hybrid_r": 3, "target_modules": ["q_proj", "gate_proj"]}],
    "hira_llama": [{"rank_pattern": {"q_proj": 2}, "target_modules": ALL}],
    "hra_llama": [
        {"apply_GS": True, "r": 6},
        {"r": 2, "init_weights": False, "bias": "hra_only", "base": "llama_bias"},
    ],
    "ia3_llama": [{"target_modules": ALL, "feedforward_modules": ["gate_proj", "down_proj"], "base": "llama_bias"}],
    "ia3_mlp": [{"feedforward_modules": [], "modules_to_save": ["lin2"]}],
    "lily_llama": [
        {"target_modules": ["q_proj", "o_proj", "v_proj"], "stride_A": 1, "num_B": 3},
        {"target_modules": ".*(q|o)_proj", "stride_A": 3},
        {"r": 2048, "num_B": 4, "sigma": 0.01},  # above a MiB of repeated tensors
    ],
    "ln_tuning_llama": [{"target_modules": ["q_proj", "norm"]}],
    "loha_llama": [{"alpha_pattern": {"q_proj": 1}, "rank_pattern": {"v_proj": 4}, "target_modules": ALL}],
    "loha_conv2d": [{"use_effective_conv2d": False}],
    "lokr_llama": [
        {"decompose_factor": 4, "target_modules": ALL},
        {"decompose_both": True, "r": 1, "rank_pattern": {"q_proj": 2}},
    ],
    "lokr_conv2d": [{"use_effective_conv2d": False, "decompose_both": True}],
    "miss_llama": [
        {"init_weights": "bat", "r": 8},
        {"init_weights": "mini", "mini_r": 4, "r": 8},
        {"r": 5, "target_modules": ALL},
    ],
    "multitask_prompt_tuning_llama": [{"num_ranks": 1}],
    "oft_llama": [
        {"oft_block_size": 4, "coft": True, "eps": 0.01},
        {"oft_block_size": 0, "r": 4, "block_share": True, "target_modules": ALL},
        {"num_cayley_neumann_terms": 3, "use_cayley_neumann": True, "bias": "oft_only", "base": "llama_bias"},
    ],
    "osf_llama": [
        {"effective_rank": 8, "rank_pattern": {"q_proj": 4}},
        {"effective_rank": None, "target_svd_config": None},
    ],
    "p_tuning_llama": [{"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}],
    "peanut_llama": [{"depth": 2, "act_fn": "tanh"}, {"depth": 0, "act_fn": "sigmoid", "target_modules": ALL}],
    "poly_llama": [{"n_splits": 4, "n_skills": 2, "target_modules": ALL}],
    "prefix_tuning_llama": [{"prefix_projection": True, "encoder_hidden_size": 12}],
    "prompt_tuning_llama": [{"num_virtual_tokens": 9}],
    "psoft_llama": [
        {"psoft_orth": False, "psoft_mag_b": False},
        {"psoft_svd": "lowrank", "use_cayley_neumann": True, "cayley_neumann_eps": 0.9},
        {"psoft_mag_a": False, "psoft_mag_b": False, "target_modules": ALL},
    ],
    "pvera_llama": [
        {"save_projection": False, "projection_prng_key": 4},
        {"d_initial": 0.7, "bias": "pvera_only", "base": "llama_bias"},
    ],
    "randlora_llama": [
        {"very_sparse": True, "target_modules": ALL},
        {"save_projection": False},
        {"sparse": True, "projection_prng_key": 2},
    ],
    "road_llama": [{"variant": "road_2"}, {"variant": "road_4", "group_size": 4, "target_modules": ALL}],
    "shadow_llama": [
        {"shadow_num_hidden_layers": 1, "update_hidden_size": 5},
        {"shadow_alpha": 0.5, "share_embeddings": False},
    ],
    "shira_llama": [{"random_seed": 3, "r": 4}, {"r": 1, "target_modules": ALL}],
    "supertuning_llama": [{"select_top": False}, {"r": 2, "lora_alpha": 4.0, "save_precomputed_indices": False}],
    "tinylora_llama": [{"weight_tying": 0.5, "target_modules": ALL}, {"save_projection": False, "projection_seed": 3}],
    "trainable_tokens_llama": [{"target_modules": ["embed_tokens"], "token_indices": [33]}],
    "unilora_llama": [{"save_indices": True}, {"proj_seed": 9, "target_modules": ALL}],
    "vblora_llama": [{"save_only_topk_weights": True}, {"topk": 3, "target_modules": ["q_proj", "o_proj"]}],
    "vera_llama": [
        {"save_projection": False, "projection_prng_key": 5},
        {"target_modules": ALL, "bias": "vera_only", "base": "llama_bias"},
    ],
    "waveft_llama": [
        {"wavelet_family": "sym4"},
        {"use_idwt": False, "random_loc_seed": 5},
        {"proportional_parameters": True, "n_frequency_pattern": {"q_proj": 9}, "target_modules": ALL},
    ],
    "xlora_llama": [
        {"layerwise_scalings": True, "top_k_lora": 1},
        {"enable_softmax_topk": True, "top_k_lora": 1, "xlora_depth": 3, "xlora_size": 8},
    ],
}


def cases(golden: Path, containing: str = "") -> Iterator[dict]:
    """Dictionaries with name, method, like (the golden case), how, change (of the golden case's record)."""
    for folder in sorted((golden / "cases").iterdir()):
        spec = json.loads((folder / "case.json").read_text())
        kind = spec.get("kind", "single")
        usual = "xlora" if kind == "xlora" else "plain"
        if kind in ("single", "xlora"):
            yield from _wanted(containing, spec["method"], folder.name, folder.name, usual, {})
        for i, options in enumerate(EXTRA.get(folder.name, ())):
            options, change = dict(options), {}
            how = options.pop("how", usual)
            for key in ("sigma", "base", "inputs", "outputs"):
                if key in options:
                    change[key] = options.pop(key)
            if "class" in options:  # another method on this base
                change["tolerances"] = {"load": 5e-5}
                method, change["config"] = options.pop("method"), {"class": options.pop("class"), "kwargs": options}
            else:
                method, kwargs = spec["method"], {**spec["config"]["kwargs"], **options}
                change["config"] = {"class": spec["config"]["class"], "kwargs": kwargs}
            yield from _wanted(containing, method, f"{folder.name}+{i}", folder.name, how, change)


def _wanted(containing: str, method: str, name: str, like: str, how: str, change: dict) -> Iterator[dict]:
    if containing in name:
        yield {"name": name, "method": method, "like": like, "how": how, "change": change}
