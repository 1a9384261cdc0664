# SPDX-License-Identifier: Apache-2.0
"""EVA: Explained Variance Adaptation (arXiv 2410.07170). A holds the leading right singular vectors of each layer's
inputs.

An incremental PCA follows the inputs batch by batch until the components stop turning; the rank budget goes to the
components that explain most variance over all layers.
"""

import contextlib
import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...config import nearest
from ...core.layer import AdapterLayer
from ...core.match import pattern_value
from ...core.tuner import TunerModel
from ...utils.incremental_pca import IncrementalPCA
from . import data_init
from .config import LoraConfig
from .layer import LoraLayer

_SEED, _ITERATIONS = 42, 4  # of the randomised SVD
_MOST_RHO = 1000
_MOST_FRUITLESS = 1000  # batches that are all too small
LayerInputs = Callable[[Any, Any, str], torch.Tensor]


# ---- what a batch means
def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Any:
    """Indices of the tokens that count: attended to, and with a label if `use_label_mask`. None: all."""
    if not isinstance(model_input, Mapping):
        raise ValueError(
            "The default `prepare_model_inputs_fn` needs batches that are dicts; pass your own function for others."
        )
    options: Any = peft_config.eva_config
    mask = model_input.get("attention_mask")
    if mask is None:
        ids = model_input.get("input_ids")
        if ids is None:
            return None
        mask = torch.ones_like(ids)
    mask = mask.bool()
    labels = model_input.get("labels")
    if options.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    """Rows of a layer's input [batch, T, in] at the indices that count, [rows, in]."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if model_input is None or x.dim() < 3:
        return x.reshape(-1, x.shape[-1])
    rows = model_input.to(x.device)
    return x[tuple(rows.T)]


def forward_fn_dict(model: nn.Module, model_input: Any) -> Any:
    """Default way to call the model."""
    return model(**model_input)


# ---- the decomposition
@dataclass
class _Group:
    """Layers with the same input: one PCA."""

    names: list[str]
    components: int
    pca: IncrementalPCA | None = None
    converged: torch.Tensor | None = None  # by component
    ratios: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def fit(self, rows: torch.Tensor, tau: float) -> None:
        if self.pca is None:
            self.pca = IncrementalPCA(self.components, lowrank=True, lowrank_niter=_ITERATIONS, lowrank_seed=_SEED)
        before = getattr(self.pca, "components_", None)
        now = self.pca.partial_fit(rows.float()).components_
        self.ratios = self.pca.explained_variance_ratio_.cpu()
        if before is None:
            self.converged = torch.zeros(len(now), dtype=torch.bool)
        else:
            self.converged = (torch.nn.functional.cosine_similarity(now, before, dim=1).abs() >= tau).cpu()


class _Decomposition:
    """One run of `get_eva_state_dict`."""

    def __init__(self, layers: dict[str, nn.Module], cfg: Any, prepare: dict[str, LayerInputs | None], gather: bool):
        self.layers, self.options, self.prepare, self.gather = layers, cfg.eva_config, prepare, gather
        self.ranks = {n: pattern_value(cfg.rank_pattern, _plain_name(n), cfg.r) for n in layers}
        self.total = sum(self.ranks.values())
        self.wanted = {n: self._components(n) for n in layers}
        self.groups: list[_Group] = []
        self.model_input: Any = None
        self.short: set[str] = set()

    def _components(self, name: str) -> int:
        r, n_in = self.ranks[name], self.layers[name].in_features
        rho = self.options.rho
        if rho > _MOST_RHO:
            rho = max(1, max(layer.in_features for layer in self.layers.values()) // r)  # type: ignore[type-var, operator]
        return min(max(r, round(r * rho)), n_in)  # type: ignore[type-var]

    def _rows(self, name: str, args: tuple) -> torch.Tensor:
        function = self.prepare[name]
        rows = args[0].detach() if function is None else function(args, self.model_input, name)
        rows = rows.reshape(-1, rows.shape[-1])
        return _gathered(rows) if self.gather else rows

    def find_groups(self, run: Callable[[], Any]) -> None:
        """Layers whose inputs are equal share one PCA."""
        seen: dict[Any, list[str]] = defaultdict(list)

        def note(name: str, module: nn.Module, args: tuple) -> None:
            x = self._rows(name, args).double()
            seen[(*x.shape, float(x.sum()), float(x.square().sum()), float(x.abs().sum()))].append(name)

        self._run(run, {n: functools.partial(note, n) for n in self.layers})
        self.groups = [_Group(names, max(self.wanted[n] for n in names)) for names in seen.values()]
        if unused := set(self.layers) - {n for g in self.groups for n in g.names}:
            raise ValueError(
                f"The forward pass never called {sorted(unused)[0]!r}: EVA needs data for every target module."
            )

    def step(self, run: Callable[[], Any]) -> None:
        """One batch: fit the groups that are not done, then share out the ranks."""
        self._run(run, {g.names[0]: functools.partial(self._fit, g) for g in self.groups if not self.done(g)})
        if self.options.rho != 1.0 and all(g.pca is not None for g in self.groups):
            self._share_ranks()

    def _fit(self, group: _Group, module: nn.Module, args: tuple) -> None:
        name = group.names[0]
        rows = self._rows(name, args)
        if len(rows) >= group.components:
            group.fit(rows, self.options.tau)
        elif name not in self.short:
            self.short.add(name)
            print(f"skipping SVD for {name}: {len(rows)} rows are fewer than the {group.components} components")

    def _run(self, run: Callable[[], Any], watchers: dict[str, Callable[..., None]]) -> None:
        with contextlib.ExitStack() as hooks:
            for name, watcher in watchers.items():
                hooks.enter_context(self.layers[name].register_forward_pre_hook(watcher))
            run()

    def _share_ranks(self) -> None:
        """Give the sum of all ranks to the components with the largest explained variance."""
        ratio_of = {name: group.ratios[: self.wanted[name]] for group in self.groups for name in group.names}
        owners = [name for name in self.layers for _ in ratio_of[name]]
        ratios = torch.cat([ratio_of[name] for name in self.layers])
        # layers that share an input tie; the earlier one wins
        chosen = ratios.sort(descending=True, stable=True).indices[: self.total].tolist()
        counts = Counter(owners[i] for i in chosen)
        self.ranks = {name: counts[name] for name in self.layers}

    def done(self, group: _Group) -> bool:
        if group.converged is None:
            return False
        return bool(group.converged[: max(self.ranks[n] for n in group.names)].all())

    def result(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for group in self.groups:
            assert group.pca is not None
            for name in group.names:
                A = group.pca.components_[: self.ranks[name]]
                if self.options.whiten:
                    A = A / group.pca.singular_values_[: len(A), None].sqrt()
                found[name] = A.to(torch.float32, copy=True).contiguous()
        return {n: found[n] for n in self.layers}


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Linear LoRA layers that hold the adapter, by their name in `model`."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    return {n: m for n, m in found if adapter_name in m and m.kind.is_linear}


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    before = {m.switch: m.switch.key for m in model.modules() if isinstance(m, AdapterLayer)}
    for switch in before:
        switch.set_disabled(True)
    try:
        yield
    finally:
        for switch, key in before.items():
            switch.key = key


def _functions(prepare: Any, names: Iterable[str]) -> dict[str, LayerInputs | None]:
    """The function of each layer: one for all, or {name: function} with the default for the others."""
    if not isinstance(prepare, Mapping):
        return dict.fromkeys(names, prepare)
    plain = {n: _plain_name(n) for n in names}
    if unknown := [n for n in prepare if _plain_name(n) not in plain.values()]:
        raise ValueError(
            f"`prepare_layer_inputs_fn` names {unknown[0]!r}, which is no target module.{nearest(unknown[0], plain)}"
        )
    given = {_plain_name(n): f for n, f in prepare.items()}
    return {n: given.get(p, prepare_layer_inputs_fn_language_modeling) for n, p in plain.items()}


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to_device(v, device) for k, v in batch.items()}
    return type(batch)(_to_device(v, device) for v in batch) if isinstance(batch, (list, tuple)) else batch


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """{module name: leading components of its inputs, [rank, in]}, for a LoRA model or (with a config) the base model.

    `prepare_model_inputs_fn(batch, config)` makes what `prepare_layer_inputs_fn(layer input, that, layer name)` gets,
    which returns the rows that count. Layers with rank 0 have no use for an adapter.
    """
    cfg: Any = peft_config or getattr(model, "peft_config", {}).get(adapter_name)
    if cfg is None:
        raise ValueError("`peft_config` is required: the model holds no adapter of that name.")
    if cfg.eva_config is None:
        raise ValueError("`eva_config` must be given in the LoraConfig (init_lora_weights='eva').")
    layers: dict[str, nn.Module] = {**_lora_layers(model, adapter_name)} or data_init.target_layers(model, cfg)
    if not layers:
        raise ValueError("No linear layer of the model is targeted, EVA has nothing to do.")
    run = _Decomposition(layers, cfg, _functions(prepare_layer_inputs_fn, layers), gather_distributed_inputs)
    device = next(model.parameters()).device
    call = forward_fn or forward_fn_dict

    def use(batch: Any) -> Callable[[], Any]:
        batch = _to_device(batch, device)
        run.model_input = prepare_model_inputs_fn(batch, cfg) if prepare_model_inputs_fn is not None else batch
        return lambda: call(model, batch)

    with data_init.mode(model, False), _adapters_off(model):
        run.find_groups(use(next(_endless(dataloader))))
        with tqdm(total=len(layers), desc="EVA: converged layers", disable=not show_progress_bar) as bar:
            _iterate(run, map(use, _endless(dataloader)), bar)
    return run.result()


def _endless(dataloader: Iterable) -> Iterator[Any]:
    """The batches again and again."""
    while True:
        batch = None
        for batch in dataloader:
            yield batch
        if batch is None:
            raise ValueError("The dataloader is empty. EVA goes through it several times: an iterator does not do.")


def _iterate(run: _Decomposition, batches: Iterator[Callable[[], Any]], bar: Any) -> None:
    fruitless = 0
    for batch in batches:
        run.step(batch)
        unfitted = next((g for g in run.groups if g.pca is None), None)
        fruitless += unfitted is not None
        if unfitted is not None and fruitless > _MOST_FRUITLESS:
            raise ValueError(
                f"All batches have fewer rows than the {unfitted.components} components that EVA needs for "
                f"{_plain_name(unfitted.names[0])!r}. Use larger batches, or lower r or rho."
            )
        done = sum(len(g.names) for g in run.groups if run.done(g))
        bar.update(done - bar.n)
        if done == len(run.layers):
            break


# ---- the components in a model
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise a LoRA adapter by EVA, from data or from a result of `get_eva_state_dict`.

    Layers get the ranks found; those of rank 0 lose the adapter. The configuration is updated accordingly.
    """
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, TunerModel):
        raise ValueError("model must be a PeftModel (made by get_peft_model)")
    if len(tuner.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter.")
    cfg: Any = tuner.peft_config.get(adapter_name)
    if cfg is None:
        raise ValueError(f"Adapter {adapter_name!r} does not exist; there are {sorted(tuner.peft_config)}.")
    if cfg.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        functions = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        eva_state_dict = get_eva_state_dict(
            model, dataloader, cfg, *functions, adapter_name, gather_distributed_inputs, show_progress_bar
        )
    _load(model, tuner, adapter_name, cfg, eva_state_dict)


@torch.no_grad()
def _load(model: nn.Module, tuner: TunerModel, name: str, cfg: Any, state: dict[str, torch.Tensor]) -> None:
    found = {_plain_name(k): v for k, v in state.items()}
    missing, kept = [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, layer in _lora_layers(model, name).items():
        plain, r, alpha = _plain_name(key), layer.r[name], layer.lora_alpha[name]
        if plain not in found:
            missing.append(plain)
            layer.update_layer(name, cfg.with_values(r=r, lora_alpha=alpha, init_lora_weights=True))
            kept.append(plain)
            continue
        A = found[plain]
        if len(A) == 0:
            _remove(model, key, layer, name)
            continue
        if len(A) != r:
            if cfg.eva_config.adjust_scaling_factors:
                alpha *= len(A) / r
            r, old = len(A), layer.factor_tensors(name)[0]
            layer.update_layer(name, cfg.with_values(r=r, lora_alpha=alpha))
            for parameter in layer.parameters_of(name):
                parameter.data = parameter.data.to(old.dtype)
                parameter.requires_grad_(old.requires_grad)
        if r != cfg.r:
            ranks[plain] = r
        if alpha != cfg.lora_alpha:
            alphas[plain] = alpha
        parameter, B = layer.factor_tensors(name)
        layer.set_factors(name, A.to(parameter.device, parameter.dtype), B)
        kept.append(plain)
    if missing:
        warnings.warn(
            f"The EVA state dict has no entry for {missing}: these layers get the default initialization.", stacklevel=4
        )
    tuner.forget_layers()
    others = {k: m for k, m in tuner.named_layers().items() if isinstance(m, LoraLayer) and name in m}
    cfg.target_modules = kept + [k for k, m in others.items() if not m.kind.is_linear]
    cfg.rank_pattern, cfg.alpha_pattern = ranks, alphas


def _remove(model: nn.Module, key: str, layer: LoraLayer, name: str) -> None:
    """Take the adapter off a layer; the layer goes too if it was the last one."""
    layer.drop(name)
    if not layer.adapter_names:
        model.set_submodule(key, layer.base_layer)
