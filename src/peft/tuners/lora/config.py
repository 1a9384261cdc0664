# SPDX-License-Identifier: Apache-2.0
"""Options of LoRA (arXiv 2106.09685), of its initialisations and of its variants."""

import functools
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ...config import (
    Checked,
    PeftConfig,
    biases,
    excludes,
    fan_in_fan_out,
    layer_names,
    layer_range,
    option,
    saves,
    targets,
)


@dataclass
class LoraRuntimeConfig:
    """Options of the running process; never saved."""

    ephemeral_gpu_offload: bool = option(
        False, "Decompose base weights (PiSSA, OLoRA ...) on the accelerator although they are on the CPU."
    )


@dataclass
class LoftQConfig:
    """LoftQ, arXiv 2310.08659."""

    loftq_bits: int = option(4, "Bits of the quantised weight: 4 or 8.")
    loftq_iter: int = option(1, "Alternating iterations.")


@dataclass
class EvaConfig(Checked):
    """EVA, arXiv 2410.07170."""

    rho: float = option(2.0, "Largest rank of a layer as a multiple of r; 1 gives all layers the same rank.")
    tau: float = option(0.99, "Cosine similarity above which a component has converged.")
    use_label_mask: bool = option(True, "Leave out tokens whose label is label_mask_value.")
    label_mask_value: int = option(-100, "Label of tokens that are left out.")
    whiten: bool = option(False, "Divide components by their singular value.")
    adjust_scaling_factors: bool = option(True, "Keep the scaling of layers whose rank changes.")

    _shares = ("tau",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}.")


@dataclass
class CordaConfig(Checked):
    """CorDA, arXiv 2406.05223."""

    cache_file: str | None = option(None, "File to keep the decompositions in.")
    covariance_file: str | None = option(None, "File to keep the covariance matrices in.")
    corda_method: Literal["ipm", "kpm"] = option("ipm", "'ipm' learns along the largest components, 'kpm' keeps them.")
    verbose: bool = option(False, "Print the progress.")
    use_float16_for_covariance: bool = option(False, "Accumulate covariances in float16.")
    prune_temporary_fields: bool = option(True, "Remove covariances from the modules once they are used.")
    _choices = ("corda_method",)


@dataclass
class LoraGAConfig(Checked):
    """LoRA-GA, arXiv 2407.05000."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option(
        "ArB2r", "Which singular vectors of the gradient A and B get."
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = option("stable", "How the factors are scaled.")
    stable_gamma: int = option(16, "Divisor of the scale 'stable'.")
    _choices = ("direction", "scale")
    _positive = ("stable_gamma",)


@dataclass
class VeloraConfig(Checked):
    """VeLoRA, arXiv 2405.17991."""

    num_groups: int = option(64, "Groups an input is cut into.")
    scale: float = option(1.0, "Factor on the reconstructed input.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = option(
        "batch_average", "Where the projection comes from."
    )
    _choices = ("init_type",)
    _positive = ("num_groups", "scale")


@dataclass
class MontecloraConfig(Checked):
    """MonteCLoRA, arXiv 2411.04358."""

    num_samples: int = option(8, "Samples of the mixture.")
    use_entropy: bool = option(False, "Add the entropy of the mixture weights to the loss.")
    dirichlet_prior: float = option(0.1, "Concentration of the Dirichlet prior.")
    sample_scaler: float = option(1e-4, "Factor on the noise.")
    kl_loss_weight: float = option(1e-5, "Weight of the KL terms of the loss.")
    buffer_size: int = option(150, "Noise draws that were kept in memory; noise is drawn when needed now.")
    _positive = ("num_samples", "dirichlet_prior", "buffer_size")


@dataclass
class BdLoraConfig(Checked):
    """BD-LoRA, arXiv 2510.23346."""

    target_modules_bd_a: list[str] | None = option(None, "Modules (parts of their names) whose A is block-diagonal.")
    target_modules_bd_b: list[str] | None = option(None, "Modules (parts of their names) whose B is block-diagonal.")
    nblocks: int = option(1, "Number of blocks.")
    match_strict: bool = option(True, "Every adapted module must be in one of the lists.")
    _positive = ("nblocks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"`target_modules_bd_a` and `target_modules_bd_b` have common entries: {sorted(both)}.")


@dataclass
class ArrowConfig(Checked):
    """Arrow routing, arXiv 2405.11157."""

    top_k: int = option(3, "Experts used for a token.")
    router_temperature: float = option(1.0, "Temperature of the softmax over experts.")
    use_gks: bool = option(False, "Subtract the mean of the general experts (GenKnowSub).")
    rng_seed: int | None = option(
        None, "Without effect: prototypes are computed exactly, not by a seeded power iteration."
    )
    task_adapter_names: list[str] | None = field(default=None, init=False, repr=False)
    gks_adapter_names: list[str] = field(default_factory=list, init=False, repr=False)
    _positive = ("top_k", "router_temperature")


@dataclass
class KasaConfig(Checked):
    """KaSA, arXiv 2412.06071."""

    beta: float = option(1e-4, "Weight of the penalty on the knowledge-aware singular values.")
    gamma: float = option(1e-3, "Weight of the orthogonality penalty.")
    _not_negative = ("beta", "gamma")


Scheme = Literal[
    "gaussian", "eva", "olora", "pissa", "pissa_niter_[number of iters]", "corda", "loftq", "orthogonal", "lora_ga",
    "mica",
]  # fmt: skip


@dataclass
class LoraConfig(PeftConfig):
    """Options of LoRA. https://arxiv.org/abs/2106.09685

    `rank_pattern` and `alpha_pattern` keys are regexes that match the end of a module's name at a dot.
    """

    r: int = option(8, "Rank of the update matrices.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    lora_alpha: int = option(8, "Numerator of the scaling: alpha / r, or alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = option(0.0, "Dropout on the input of A.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: Literal["none", "all", "lora_only"] = biases("lora_only")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead of alpha / r. https://arxiv.org/abs/2312.03732")
    modules_to_save: list[str] | None = saves()
    init_lora_weights: bool | Scheme = option(
        True,
        "True (A uniform, B zero: no change at first), False (both random), or the name of a scheme: gaussian, "
        "orthogonal, pissa, pissa_niter_N, olora, loftq, mica, eva, corda, lora_ga.",
        lora_variants=["mica"],
    )
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    rank_pattern: dict | None = option(factory=dict, help="Ranks of modules that differ from r: {name or regex: rank}.")
    alpha_pattern: dict | None = option(
        factory=dict, help="Alphas of modules that differ from lora_alpha: {name or regex: alpha}."
    )
    megatron_config: dict | None = option(
        None, "TransformerConfig arguments of Megatron, for its parallel linear layers."
    )
    megatron_core: str | None = option("megatron.core", "Module that the parallel linear layers come from.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Embedding rows to train besides: indices (input embedding), or {module name: indices}."
    )
    loftq_config: LoftQConfig | dict = option(factory=dict, help="Options of the initialisation 'loftq'.")
    eva_config: EvaConfig | None = option(None, "Options of the initialisation 'eva'.")
    corda_config: CordaConfig | None = option(None, "Options of the initialisation 'corda'.")
    lora_ga_config: LoraGAConfig | None = option(None, "Options of the initialisation 'lora_ga'.")
    use_dora: bool = option(
        False, "Train the norm of each row separately (DoRA). https://arxiv.org/abs/2402.09353", is_lora_variant=True
    )
    velora_config: VeloraConfig | None = option(
        None, "VeLoRA: keep rank-1 projections of inputs for backward.", is_lora_variant=True
    )
    alora_invocation_tokens: list[int] | None = option(
        None, "aLoRA: the adapter acts from the last occurrence of these tokens on (CAUSAL_LM).", is_lora_variant=True
    )
    use_qalora: bool = option(False, "QA-LoRA: pool inputs over quantisation groups (GPTQ layers only).")
    qalora_group_size: int = option(16, "Group size of QA-LoRA.")
    monteclora_config: MontecloraConfig | None = option(
        None, "MonteCLoRA: noisy mixture of A in training.", is_lora_variant=True
    )
    layer_replication: list[tuple[int, int]] | None = option(
        None, "Rebuild the stack of layers from these [start, end) ranges; copies share their base weights."
    )
    runtime_config: LoraRuntimeConfig = option(
        factory=LoraRuntimeConfig, help="Options of the running process; never saved."
    )
    lora_bias: bool = option(False, "B has a bias.")
    target_parameters: list[str] | None = option(
        None, "Raw parameters (2-D, or experts in 3-D) to adapt: names or dotted suffixes."
    )
    use_bdlora: BdLoraConfig | None = option(None, "BD-LoRA: block-diagonal factors.", is_lora_variant=True)
    arrow_config: ArrowConfig | None = option(None, "Arrow: route tokens to experts.", is_lora_variant=True)
    kasa_config: KasaConfig | None = option(
        None, "KaSA: drop the smallest singular values of the base.", is_lora_variant=True
    )
    ensure_weight_tying: bool = option(False, "Tie the adapters of layers whose base weights are tied.")

    # Field -> class of its sub-configuration.
    _sub_configs: ClassVar[dict[str, type]] = {
        "eva_config": EvaConfig, "corda_config": CordaConfig, "lora_ga_config": LoraGAConfig,
        "velora_config": VeloraConfig,
        "monteclora_config": MontecloraConfig, "use_bdlora": BdLoraConfig, "arrow_config": ArrowConfig,
        "kasa_config": KasaConfig,
        "runtime_config": LoraRuntimeConfig,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensure_weight_tying:
            self.modules_to_tie = None
            self.target_modules_to_tie = None
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of names of parameters, not a string.")
        for name, cls in self._sub_configs.items():
            setattr(self, name, _sub_config(name, cls, getattr(self, name)))
        if self.runtime_config is None:
            self.runtime_config = LoraRuntimeConfig()
        self._check_init()
        self._check_variants()
        self._custom_modules: dict[type, type] | None = None

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = vars(self.loftq_config).copy()
        if not isinstance(self.loftq_config or {}, dict):
            raise TypeError(f"`loftq_config` must be a LoftQConfig or a dict, got {type(self.loftq_config).__name__}.")
        if init == "loftq" and not self.loftq_config:
            raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        for scheme in ("loftq", "eva", "corda"):
            name = f"{scheme}_config"
            if init == scheme and not getattr(self, name):
                warnings.warn(
                    f"`init_lora_weights` is {scheme!r} but `{name}` is not specified. Using the default.", stacklevel=4
                )
                setattr(self, name, self._sub_configs[name]())
            elif init != scheme and getattr(self, name):
                warnings.warn(
                    f"`{name}` specified but will be ignored when `init_lora_weights` is {init!r}.", stacklevel=4
                )
        if self.loftq_config and init != "loftq":
            self.loftq_config = {}
        if self.lora_bias and init not in (True, False):
            raise ValueError(
                f"The argument lora_bias=True is only supported with init_lora_weights=True or False, got {init!r}."
            )
        changes_base = isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "lora_ga"))
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and changes_base:
            warnings.warn(
                f"use_rslora together with rank_pattern or alpha_pattern and init_lora_weights={init!r}: the adapter "
                "cannot be converted to one for the unchanged base model later.",
                stacklevel=4,
            )

    def _check_variants(self) -> None:
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.use_dora and self.lora_bias:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn(
                "`alora_invocation_tokens` works with task_type CAUSAL_LM only; elsewhere the adapter stays off.",
                stacklevel=4,
            )

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("runtime_config", None)
        return values

    @classmethod
    def active_variants(cls, config: Any) -> tuple[str, ...]:
        """Names of the variant fields that are on in `config`, "init_lora_weights" for schemes that are variants."""
        values = vars(config)
        found = [name for name in _variant_fields(type(config)) if values[name]]
        init = config.init_lora_weights
        return (*found, "init_lora_weights") if isinstance(init, str) and init.lower() == "mica" else tuple(found)

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Experimental: LoRA classes for types of layers that the library does not know, {layer type: class}."""
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


@functools.cache
def _variant_fields(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.metadata.get("is_lora_variant"))


def _sub_config(name: str, cls: type, value: Any) -> Any:
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be a {cls.__name__} or a dict, got {type(value).__name__}.")
    known = {f.name: f.init for f in fields(cls)}
    made = cls(**{k: v for k, v in value.items() if known.get(k, True)})
    for key, init in known.items():
        if not init and key in value:
            setattr(made, key, value[key])
    return made
