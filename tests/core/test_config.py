"""Configurations as files and as classes: what a file says, what the caller says, and what happens on conflict."""

import json
import subprocess
import sys

import pytest

import peft
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PromptTuningConfig,
    TaskType,
)
from peft.registry import _records, register_peft_method


@pytest.fixture
def folder(tmp_path):
    def write(**values):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **values}))
        return tmp_path

    return write


def test_the_file_wins_and_only_the_class_own_options_fill_it_up(folder):
    path = folder()
    config = LoraConfig.from_pretrained(path, r=9, lora_alpha=33, task_type="CAUSAL_LM", revision="x", junk=1)
    assert (config.r, config.lora_alpha, config.task_type, config.revision) == (4, 33, None, None)
    assert PeftConfig.from_pretrained(path, task_type="CAUSAL_LM").task_type == "CAUSAL_LM"
    assert type(IA3Config.from_pretrained(path)) is LoraConfig  # the file's method, whoever asks


def test_a_newer_file_loads_with_a_warning_that_names_its_unknown_keys(folder):
    with pytest.warns(UserWarning, match=r"\['frob', 'zeta'\] for class LoraConfig.*newer version"):
        config = PeftConfig.from_pretrained(folder(zeta=1, frob=2, peft_version="9.9"))
    assert (config.r, config.peft_version) == (4, "9.9")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"peft_type": "lora"}, KeyError, "'lora'. Did you mean 'LORA'"),
        ({"peft_type": "LORRA"}, KeyError, "Did you mean 'LORA'"),
        (
            {"target_modules": "q", "layers_to_transform": [1]},
            ValueError,
            "cannot be used when `target_modules` is a str",
        ),
        ({"layers_pattern": "h"}, ValueError, "`layers_to_transform` must also be specified"),
        ({"target_parameters": "w"}, TypeError, "list of names"),
        ({"task_type": "CAUSAL_ML"}, ValueError, "Did you mean 'CAUSAL_LM'"),
    ],
)
def test_broken_files(folder, values, error, message):
    with pytest.raises(error) as caught:
        PeftConfig.from_pretrained(folder(**values))
    assert message in str(caught.value)


def test_patterns_keep_their_order_in_the_file(tmp_path):
    """The first key that matches counts; sorted, "fc" would come before "layers.1.fc"."""
    patterns = {"layers.1.fc": 2, "fc": 3}
    LoraConfig(rank_pattern=patterns).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert list(LoraConfig.from_pretrained(tmp_path).rank_pattern) == list(patterns)
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_a_file_without_a_method(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    assert LoraConfig.from_pretrained(tmp_path).r == 4
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "zeta": 1}')
    with pytest.raises(TypeError, match="peft_type"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("AdaLoraConfig", {"total_step": 9, "layer_replication": [[0, 1]]}, "does not support `layer_replication`"),
        ("AdaLoraConfig", {"total_step": 9, "deltaT": 0}, "`deltaT` should be a positive"),
        ("AdaLoraConfig", {"total_step": 9, "target_r": -1}, "`target_r` must not be negative, got -1"),
        ("AdaLoraConfig", {}, "`total_step` is None or not positive"),
        ("AdaLoraConfig", {"total_step": 9, "tinit": 5, "tfinal": 4}, "tinit=5, tfinal=4, total_step=9"),
        ("AdaLoraConfig", {"total_step": 9, "beta2": 1.0}, "in (0, 1), got 0.85 and 1.0"),
        ("AdamssConfig", {"num_subspaces": 0}, "`num_subspaces` should be a positive"),
        ("AdamssConfig", {"init_weights": "orthogonel"}, "Did you mean 'orthogonal'"),
        (
            "AdamssConfig",
            {"use_asa": True, "init_warmup": 9, "final_warmup": 9},
            "`init_warmup` (9) must be smaller than `final_warmup` (9)",
        ),
        ("BOFTConfig", {"init_weights": None}, "use one of True, False"),
        ("BOFTConfig", {"boft_block_size": -4}, "must be above 0, and not both: got boft_block_size=-4"),
        ("C3AConfig", {"target_modules": "q", "layers_pattern": "h"}, "`layers_pattern` cannot be used when"),
        ("C3AConfig", {"init_weights": "xavier"}, "Did you mean 'xavier_uniform'"),
        ("DeftConfig", {"r": 0}, "`r` should be a positive"),
        ("FourierFTConfig", {"random_loc_seed": None}, "`random_loc_seed` must be an integer"),
        ("GloraConfig", {"r": -1}, "`r` must not be negative, got -1"),
        ("GraloraConfig", {"hybrid_r": -1}, "`hybrid_r` must not be negative, got -1"),
        ("GraloraConfig", {"r": 5, "gralora_k": 2}, "got r=5 and gralora_k=2"),
        ("LilyConfig", {"num_B": 1}, "`num_B` must be at least 2, got 1"),
        ("LoKrConfig", {"init_weights": "licoris"}, "use one of True, False, lycoris, None. Did you mean 'lycoris'"),
        ("MissConfig", {"init_weights": "mimi"}, "use one of True, False, bat, mini. Did you mean 'mini'"),
        ("MissConfig", {"miss_dropout": -0.5}, "`miss_dropout` must be between 0 and 1, got -0.5"),
        ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "EXACT_TASK"}, "Did you mean 'EXACT_SOURCE_TASK'"),
        ("MultitaskPromptTuningConfig", {"num_tasks": None}, "`num_tasks` should be a positive"),
        ("PromptEncoderConfig", {"encoder_hidden_size": 0}, "`encoder_hidden_size` should be a positive"),
        ("ShadowConfig", {"shadow_num_hidden_layers": 0}, "`shadow_num_hidden_layers` should be a positive"),
        ("PolyConfig", {"poly_type": "polly"}, "use one of poly. Did you mean 'poly'"),
        ("PolyConfig", {"n_skills": 0}, "`n_skills` should be a positive"),
        ("OFTConfig", {"init_weights": None}, "use one of True, False"),
        ("OFTConfig", {"r": -2, "oft_block_size": 0}, "`r` must not be negative, got -2"),
        ("OFTConfig", {"r": 4}, "got r=4 and oft_block_size=32. To give r, pass oft_block_size=0 too"),
        ("OFTConfig", {"oft_block_size": 0}, "got r=0 and oft_block_size=0"),
        ("PeanutConfig", {"act_fn": "gelu_knew"}, "Did you mean 'gelu_new'"),
        ("OFTConfig", {"num_cayley_neumann_terms": 0}, "`num_cayley_neumann_terms` should be a positive"),
        ("PrefixTuningConfig", {"init_weights": "zeros"}, "use one of zero, None. Did you mean 'zero'"),
        ("PsoftConfig", {"use_cayley_neumann": True, "cayley_neumann_eps": 1.0}, "must be in (0, 1), got 1.0"),
        ("RoadConfig", {"group_size": 5}, "must be a positive even number, got 5"),
        ("SupertuningConfig", {"sparsity": 1.5}, "`sparsity` must be between 0 and 1, got 1.5"),
        ("SupertuningConfig", {"sparsity": 1.0}, "`sparsity` must be below 1"),
        ("SupertuningConfig", {"r": 2, "lora_dropout": 1.0}, "`lora_dropout` must be below 1"),
        ("SupertuningConfig", {"r": 0}, "`r` should be a positive"),
        ("TinyLoraConfig", {"init_weights": "unif"}, "use one of True, False, uniform. Did you mean 'uniform'"),
        (
            "UniLoraConfig",
            {"init_theta_d_bound": 0.0},
            "`init_theta_d_bound` should be a positive value but the value passed is 0.0",
        ),
        ("VBLoRAConfig", {"vector_length": 0}, "`vector_length` should be a positive"),
        ("VBLoRAConfig", {"topk": 3, "num_vectors": 2}, "`topk` (3) cannot be larger than `num_vectors` (2)"),
        ("WaveFTConfig", {"wavelet_family": "db11"}, "use one of db1, db2"),
    ],
)
def test_values_that_no_option_allows(cls, options, message):
    with pytest.raises(ValueError) as caught:
        getattr(peft, cls)(**options)
    assert message in str(caught.value)


def test_a_pattern_is_a_dict():
    with pytest.raises(TypeError, match="`rank_pattern` must be a dict .*, got 'q'"):
        peft.DeloraConfig(rank_pattern="q")


def test_a_layers_pattern_alone_where_it_was_always_accepted():
    for cls in (peft.C3AConfig, peft.GraloraConfig, peft.HiraConfig):
        assert cls(layers_pattern="h").layers_pattern == "h"


def test_names_and_flags():
    assert (len(TaskType), PeftType.LORA, TaskType.SEQ_CLS) == (6, "LORA", "SEQ_CLS")
    assert PromptTuningConfig(task_type="CAUSAL_LM").is_prompt_learning and not LoraConfig().is_prompt_learning
    assert "runtime_config" not in LoraConfig().to_dict() and LoraConfig(r=3) == LoraConfig(r=3)
    with pytest.raises(TypeError, match="'lora_aplha'. Did you mean 'lora_alpha'"):
        LoraConfig(lora_aplha=3)


def test_writing_and_reading_one_by_one(folder, tmp_path):
    with pytest.warns(UserWarning, match="runtime_config in the configuration file is ignored"):
        assert not PeftConfig.from_pretrained(folder(runtime_config={"ephemeral_gpu_offload": True})).inference_mode
    assert PeftConfig._get_peft_type(tmp_path.parent, subfolder=tmp_path.name) == "LORA"
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at"):
        PeftConfig._get_peft_type(str(tmp_path / "nothing"))
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        LoraConfig().save_pretrained(tmp_path / "adapter_config.json")
    LoraConfig().save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Net"}, other=1)
    assert LoraConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "Net"}


def test_a_regex_with_layers_where_it_was_always_accepted():
    with pytest.warns(UserWarning, match="`layers_to_transform` cannot be used when .* It has no effect"):
        assert peft.VeraConfig(target_modules="q", layers_to_transform=[1]).layers_to_transform == [1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("lora_", ValueError, "without the underscore at the end: 'lora_'"),
        ("Lora", ValueError, "must be in lower case, got 'Lora'"),
        ("lorra", ValueError, "Unknown method 'lorra': add it to the PeftType enum first. Did you mean 'LORA'"),
        ("lora", KeyError, "'lora' is already registered, by LoraModel"),
    ],
)
def test_methods_that_cannot_be_registered(name, error, message):
    PEFT_TYPE_TO_CONFIG_MAPPING["LORA"]  # noqa: B018  # loads it
    with pytest.raises(error, match=message):
        register_peft_method(name=name, config_cls=LoraConfig, model_cls=object)


def test_a_method_has_one_prefix(monkeypatch):
    monkeypatch.delitem(_records, PeftType.LORA)
    with pytest.raises(ValueError, match="Inconsistent prefixes for 'lora': 'lora_' on LoraModel, 'other_' given"):
        register_peft_method(name="lora", config_cls=LoraConfig, model_cls=peft.LoraModel, prefix="other_")


def test_methods_are_imported_one_by_one():
    """A file of one method does not load the others; each lives in the module with its name."""
    code = "import sys; from peft.registry import method, methods; print(method('VERA').config.__name__)"
    code += "; print('peft.tuners.poly' in sys.modules, len(methods()), [*methods()][0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["VeraConfig", "False", str(len(PeftType)), "PeftType.PROMPT_TUNING"]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("AdaLoraConfig", {"total_step": 9, "r": 4}, "`r` is not used in AdaLora .* use `init_r` instead"),
        ("SupertuningConfig", {"save_precomputed_indices": False}, "positions are recomputed from the base weights"),
        ("PsoftConfig", {"psoft_svd_lowrank_niter": 3}, "only has an effect with psoft_svd='lowrank'"),
        ("PsoftConfig", {"cayley_neumann_eps": 0.5}, "only have an effect with use_cayley_neumann=True"),
        ("ShiraConfig", {"mask_type": "mine"}, "supply your own masking function"),
        ("TinyLoraConfig", {"save_projection": False}, "drawn again from projection_seed"),
        ("VeraConfig", {"save_projection": False}, "not save vera_A and vera_B"),
        ("XLoraConfig", {"enable_softmax_topk": True, "enable_softmax": False}, "one more softmax over all experts"),
        ("XLoraConfig", {"enable_softmax_topk": True, "top_k_lora": 1}, "goes through two softmaxes"),
        ("XLoraConfig", {"top_k_lora": 0}, "`top_k_lora` should be at least 1, got 0"),
    ],
)
def test_options_that_go_badly_together(cls, options, message):
    given = {"hidden_size": 8, "adapters": {"a": "b"}} if cls == "XLoraConfig" else {}
    with pytest.warns(UserWarning, match=message) as caught:
        getattr(peft, cls)(**given, **options)
    assert [w.filename for w in caught] == [__file__]  # the line of the user's call


@pytest.mark.parametrize("values", [{"peft_version": "0.17.1"}, {}], ids=["old", "unknown"])
def test_files_of_old_oft_versions(folder, values):
    with pytest.raises(ValueError, match="OFT has been updated since PEFT 0.14.0"):
        PeftConfig.from_pretrained(folder(peft_type="OFT", **values))
    path = folder(peft_type="OFT", r=0, oft_block_size=4, use_cayley_neumann=True, **values)
    with pytest.warns(UserWarning, match="trained with PEFT < 0.18.0 may give slightly other outputs"):
        PeftConfig.from_pretrained(path)
