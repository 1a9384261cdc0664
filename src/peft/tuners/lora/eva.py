# SPDX-License-Identifier: Apache-2.0
"""EVA: Explained Variance Adaptation (arXiv 2410.07170). A holds the leading right singular vectors of each layer's
inputs.

An incremental PCA follows the inputs batch by batch until the components stop turning; the rank budget goes to the
components that explain most variance over all layers.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...config import nearest
from ...core.layer import AdapterLayer
from ...core.match import pattern_value
from ...utils.incremental_pca import IncrementalPCA
from . import data_init
from .config import LoraConfig
from .layer import LoraLayer

_SEED, _ITERATIONS = 42, 4  # of the randomised SVD
_MOST_RHO = 1000
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
    previous: torch.Tensor | None = None
    converged: torch.Tensor | None = None  # by component
    ratios: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def fit(self, rows: torch.Tensor) -> bool:
        """False when the batch has too few rows."""
        if rows.shape[0] < self.components:
            return False
        if self.pca is None:
            self.pca = IncrementalPCA(
                n_components=self.components, copy=True, lowrank=True, lowrank_q=2 * self.components,
                lowrank_niter=_ITERATIONS,
                lowrank_seed=_SEED,
            )  # fmt: skip
        self.previous = getattr(self.pca, "components_", None)
        self.pca.partial_fit(rows.float())
        self.ratios = self.pca.explained_variance_ratio_.cpu()  # type: ignore[union-attr]
        return True

    def update(self, tau: float) -> None:
        assert self.pca is not None
        now: Any = self.pca.components_
        if self.previous is None:
            self.converged = torch.zeros(len(now), dtype=torch.bool)
        else:
            self.converged = (torch.nn.functional.cosine_similarity(now, self.previous, dim=1).abs() >= tau).cpu()


class _Decomposition:
    """One run of `get_eva_state_dict`."""

    def __init__(self, layers: dict[str, nn.Module], cfg: Any, prepare: dict[str, LayerInputs | None], gather: bool):
        self.layers, self.cfg, self.options, self.prepare, self.gather = layers, cfg, cfg.eva_config, prepare, gather
        self.ranks = {n: pattern_value(cfg.rank_pattern, _plain_name(n), cfg.r) for n in layers}
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
        x = args[0].detach()
        rows = x if function is None else function(args, self.model_input, name)
        rows = rows.reshape(-1, rows.shape[-1])
        return _gathered(rows) if self.gather else rows

    def find_groups(self, run: Callable[[], Any]) -> None:
        """Layers whose inputs are equal share one PCA."""
        seen: dict[Any, list[str]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple) -> None:
                x = self._rows(name, args)
                wide = x.double()
                key = (
                    tuple(x.shape),
                    float(wide.sum()),
                    float(wide.square().sum()),
                    float(wide.abs().max()) if x.numel() else 0.0,
                )
                seen.setdefault(key, []).append(name)

            return hook

        self._run(run, {n: watch(n) for n in self.layers})
        self.groups = [_Group(names, max(self.wanted[n] for n in names)) for names in seen.values()]
        if unused := set(self.layers) - {n for g in self.groups for n in g.names}:
            raise ValueError(
                f"The forward pass never called {sorted(unused)[0]!r}: EVA needs data for every target module."
            )

    def step(self, run: Callable[[], Any]) -> None:
        """One batch: fit the groups that are not done, then share out the ranks."""
        fitted: list[_Group] = []

        def watch(group: _Group) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple) -> None:
                rows = self._rows(group.names[0], args)
                if group.fit(rows):
                    fitted.append(group)
                elif group.names[0] not in self.short:
                    self.short.add(group.names[0])
                    print(
                        f"skipping SVD for {group.names[0]}: {rows.shape[0]} rows are fewer than the "
                        f"{group.components} components"
                    )

            return hook

        self._run(run, {g.names[0]: watch(g) for g in self.groups if not self.done(g)})
        for group in fitted:
            group.update(self.options.tau)
        self.budget()

    def _run(self, run: Callable[[], Any], watchers: dict[str, Callable[..., None]]) -> None:
        handles = [self.layers[n].register_forward_pre_hook(w) for n, w in watchers.items()]
        with data_init.hooks(handles):
            run()

    def budget(self) -> None:
        """Give the sum of all ranks to the components with the largest explained variance."""
        if self.options.rho == 1.0 or any(g.pca is None for g in self.groups):
            return
        ratio_of = {name: group.ratios[: self.wanted[name]] for group in self.groups for name in group.names}
        owners = [name for name in self.layers for _ in ratio_of[name]]
        ratios = torch.cat([ratio_of[name] for name in self.layers])
        total = sum(pattern_value(self.cfg.rank_pattern, _plain_name(n), self.cfg.r) for n in self.layers)
        # layers that share an input tie; the earlier one wins
        chosen = ratios.sort(descending=True, stable=True).indices[:total].tolist()
        self.ranks = dict.fromkeys(self.layers, 0)
        for i in chosen:
            self.ranks[owners[i]] += 1

    def done(self, group: _Group) -> bool:
        if group.converged is None:
            return False
        return bool(group.converged[: max(self.ranks[n] for n in group.names)].all())

    def result(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for group in self.groups:
            assert group.pca is not None
            for name in group.names:
                A: Any = group.pca.components_[: self.ranks[name]]  # type: ignore[index]
                if self.options.whiten:
                    A = A / group.pca.singular_values_[: len(A), None].sqrt()  # type: ignore[index]
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
    return name.removeprefix("base_model.model.")


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Linear LoRA layers that hold the adapter, by their name in `model`."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    return {n: m for n, m in found if adapter_name in m and m.kind.is_linear}


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    switches = {id(m.switch): m.switch for m in model.modules() if isinstance(m, AdapterLayer)}
    before = [(s, s.key) for s in switches.values()]
    for switch, _ in before:
        switch.set_disabled(True)
    try:
        yield
    finally:
        for switch, key in before:
            switch.key = key


def _functions(prepare: Any, names: Iterable[str]) -> dict[str, LayerInputs | None]:
    """The function of each layer: one for all, or {name: function} with the default for the others."""
    names = list(names)
    if not isinstance(prepare, Mapping):
        return dict.fromkeys(names, prepare)
    known = {_plain_name(n) for n in names}
    if unknown := [n for n in prepare if _plain_name(n) not in known]:
        raise ValueError(
            f"`prepare_layer_inputs_fn` names {unknown[0]!r}, which is no target module.{nearest(unknown[0], names)}"
        )
    given = {_plain_name(n): f for n, f in prepare.items()}
    return {n: given.get(_plain_name(n), prepare_layer_inputs_fn_language_modeling) for n in names}


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
    wrapped = _lora_layers(model, adapter_name)
    if peft_config is None:
        peft_config = getattr(model, "peft_config", {}).get(adapter_name)
        if peft_config is None:
            raise ValueError("`peft_config` is required: the model holds no adapter of that name.")
    cfg: Any = peft_config
    if cfg.eva_config is None:
        raise ValueError("`eva_config` must be given in the LoraConfig (init_lora_weights='eva').")
    layers: dict[str, nn.Module] = dict(wrapped) or data_init.target_layers(model, cfg)
    if not layers:
        raise ValueError("No linear layer of the model is targeted, EVA has nothing to do.")
    run_ = _Decomposition(layers, cfg, _functions(prepare_layer_inputs_fn, layers), gather_distributed_inputs)
    device = next(model.parameters()).device
    call = forward_fn or forward_fn_dict

    def use(batch: Any) -> Callable[[], Any]:
        batch = _to_device(batch, device)
        run_.model_input = prepare_model_inputs_fn(batch, cfg) if prepare_model_inputs_fn is not None else batch
        return lambda: call(model, batch)

    with data_init.mode(model, False), _adapters_off(model):
        batches = _endless(dataloader)
        run_.find_groups(use(next(batches)))
        _iterate(run_, batches, use, show_progress_bar)
    return run_.result()


def _endless(dataloader: Iterable) -> Iterator[Any]:
    """The batches again and again; the first one twice, since it only shows which inputs are equal."""
    first = next(iter(dataloader), None)
    if first is None:
        raise ValueError("The dataloader is empty.")
    yield first
    yield from itertools.chain.from_iterable(itertools.repeat(dataloader))


def _iterate(run: _Decomposition, batches: Iterator[Any], use: Callable[[Any], Callable[[], Any]], show: bool) -> None:
    bar = data_init.progress(range(len(run.layers)), "EVA: converged layers", show)
    update = getattr(bar, "update", lambda n: None)
    finished = fruitless = 0
    for batch in batches:
        before = len(run.short)
        run.step(use(batch))
        fruitless = 0 if any(g.pca is not None for g in run.groups) or before != len(run.short) else fruitless + 1
        if fruitless > 1000:
            raise ValueError(
                "All batches have fewer rows than EVA needs components. Use larger batches, or lower r or rho."
            )
        done = sum(len(g.names) for g in run.groups if run.done(g))
        update(done - finished)
        finished = done
        if done == len(run.layers):
            break
    getattr(bar, "close", lambda: None)()


def __getattr__(name: str) -> Any:
    if name == "initialize_lora_eva_weights":  # published here; it builds on this module
        from .eva_load import initialize_lora_eva_weights

        return initialize_lora_eva_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
