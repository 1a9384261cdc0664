# SPDX-License-Identifier: Apache-2.0
"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (AAAI 2026, DOI 10.1609/aaai.v40i31.39813).

W' = U (S + diag λ) Vᵀ: V is one basis shared by the layers of a category, U its counterpart for each layer; λ and the
entries of the sparse matrix S are trained. With the starting λ and S = 0, W' = W.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout
from ..core.modules import making_on_meta
from ..core.slots import Aux, BufferDict, Shared, Trainable
from ..core.tuner import TunerModel
from ..ops import sparse
from ..registry import register_method


@dataclass
class FrodConfig(PeftConfig):
    """Options of FRoD."""

    target_modules: list[str] | set[str] | str | None = targets()
    projection_prng_key: int = option(0, "Seed of the sparse pattern.")
    save_projection: bool = option(True, "Store the bases and the pattern.")
    frod_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("frod_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at the base model.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    sparse_rate: float = option(0.01, "Share of trained off-diagonal entries.")
    regularization_alpha: float = option(0.001, "Ridge of the joint decomposition.")
    progressbar: bool = option(True, "Show the progress of the decompositions.")
    runtime_offload_base_weight: bool = option(False, "Has no effect here: base weights are not copied.")
    _regex_with_layers = "warn"
    _shares = ("sparse_rate",)


class FrodLayer(AdapterLayer):
    """A weight written in a shared basis."""

    frod_lambda_l: Trainable[nn.ParameterDict]  # [in]
    frod_lambda_s_values: Trainable[nn.ParameterDict]  # [n]
    frod_U: Aux[BufferDict]  # [out, in]
    frod_V: Shared[nn.ModuleDict]  # adapter -> category -> [in, in]
    frod_s_indices: Shared[nn.ModuleDict]  # adapter -> category -> [2, n]
    frod_s_size: Shared[nn.ModuleDict]  # adapter -> category -> [2]
    frod_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    category: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    prefer_weight_path = True
    input_dropout = "frod_dropout"
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        c = self.category[name] = cfg.category
        self.r[name], self.frod_dropout[name] = self.out_features, dropout(cfg.frod_dropout)
        self.frod_U[name], scale = self.counterpart(self.frod_V[name][c])  # type: ignore[index]
        values = torch.zeros(self.frod_s_indices[name][c].shape[1])  # type: ignore[index]
        scale = torch.empty(self.in_features) if making_on_meta() else scale.float()
        if not cfg.init_weights:
            values, scale = nn.init.normal_(values, 0.0, 0.1), scale + 0.1 * torch.randn(self.in_features)
        self.frod_lambda_l[name], self.frod_lambda_s_values[name] = nn.Parameter(scale), nn.Parameter(values)

    @torch.no_grad()
    def counterpart(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(U [out, in], λ [in]) with U diag(λ) Vᵀ = W and unit columns of U."""
        W = self.base_weight()
        if W.device.type == "meta":
            return W, W.new_ones(self.in_features)
        w, v = W.double().cpu(), V.double().cpu()
        try:
            B = torch.linalg.solve(v, w.T).T
        except torch.linalg.LinAlgError:  # type: ignore
            B = w @ torch.linalg.pinv(v, rtol=1e-6).T
        scale = B.norm(dim=0)
        U = torch.where(scale > 1e-12, B / scale.clamp(min=1e-12), torch.zeros_like(B))
        return U.to(W), scale.to(W)

    def _basis(self, name: str) -> Any:
        """λ [in], values [n], their rows and columns, U [out, in], V [in, in]: the weight is U core Vᵀ with
        core = diag(λ) + values at off-diagonal positions.
        """
        lam, values, c = self.frod_lambda_l[name], self.frod_lambda_s_values[name], self.category[name]
        rows, cols = self.frod_s_indices[name][c].to(lam.device)  # type: ignore[index]
        return lam, values, rows, cols, self.frod_U[name].to(lam), self.frod_V[name][c].to(lam)  # type: ignore[index]

    def delta_weight(self, name: str) -> torch.Tensor:
        lam, values, rows, cols, U, V = self._basis(name)
        return times_core(U, lam, values, rows, cols) @ V.T - self.base_weight()

    def _adapt_weight(self, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """Two thin products in place of the base product where that is less than making the weight: in training
        3 T in² against 2 out in² and the dense gradient's T in out.
        """
        count, n = x.numel() // x.shape[-1], self.in_features
        if len(names) != 1 or 3 * count * n >= self.out_features * (count + 2 * n):
            return super()._adapt_weight(names, x)
        lam, values, rows, cols, U, V = self._basis(names[0])
        h = x @ times_core(V, lam, values, cols, rows)  # V coreᵀ
        return nn.functional.linear(h, U, self.base_bias())


def times_core(U: torch.Tensor, lam: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor):
    """U core [out, in], of which only U and the parameters are kept."""
    return torch.addcmul(sparse.multiply(U, values, cols, rows, U.shape[1]), U, lam)


def category(key: str) -> str:
    """Layers of one category share a basis: "model.layers.0.self_attn.q_proj" -> "self_attn_q_proj"."""
    parts = key.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and len(parts) > 2 and parts[-3] == "attention":
        return "attention_output"
    return "_".join(parts[-2:])


def layer_index(key: str, default: int) -> int:
    parts = key.split(".")
    after = [parts[i + 1] for i, p in enumerate(parts[:-1]) if p == "layers" and parts[i + 1].isdigit()]
    numbers = after or [p for p in parts if p.isdigit()]
    return int(numbers[0]) if numbers else default


@torch.no_grad()
def joint_basis(matrices: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """V [in, in] shared by matrices [out_l, in]: a ridge-regularised joint decomposition."""
    stacked = torch.cat([m.float().cpu() for m in matrices])
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked)[2].T.contiguous()
    Q, R = torch.linalg.qr(stacked)
    eye = torch.eye(R.shape[0])
    slices = Q.split([m.shape[0] for m in matrices])
    mean = torch.stack([torch.linalg.inv(q.T @ q + alpha * eye) for q in slices]).mean(0)
    return R.T @ torch.linalg.eigh(mean)[1]


def sparse_pattern(width: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """[2, n] off-diagonal positions, drawn without repetition; part of the file format."""
    off = width * width - width
    count = min(int(width * width * rate), off)
    count = max(count, 1) if rate > 0 else count
    chosen = torch.randperm(off, generator=generator, device="cpu")[:count]
    rows, rest = chosen // (width - 1), chosen % (width - 1)
    return torch.stack([rows, rest + (rest >= rows).long()])  # the diagonal is skipped in each row


@register_method("frod", config=FrodConfig)
class FrodModel(TunerModel):
    layer_cls = FrodLayer
    uses_shared_state = True
    unsupported_error = TypeError
    example = {"sparse_rate": 0.05, "progressbar": False}

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        from tqdm import tqdm

        groups: dict[str, list[tuple[int, AdapterLayer | nn.Module]]] = {}
        for i, (key, module) in enumerate(targets.items()):
            groups.setdefault(category(key), []).append((layer_index(key, i), module))
        V, indices, size = stores = [BufferDict(persistent=cfg.save_projection) for _ in range(3)]
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        for c in tqdm(sorted(groups), desc="FRoD: shared bases", disable=not cfg.progressbar):
            layers = [self.layer_cls.wrap(m, self.switch) for _, m in sorted(groups[c], key=lambda item: item[0])]
            matrices = [layer.base_weight().detach() for layer in layers]
            widths = {m.shape[1] for m in matrices}
            if len(widths) > 1:
                raise ValueError(
                    f"FRoD shares one basis among the layers of category {c!r}, but their input widths differ: "
                    f"{sorted(widths)}."
                )
            width = widths.pop()
            meta = matrices[0].is_meta
            basis = torch.zeros(width, width, device="cpu") if meta else joint_basis(matrices, cfg.regularization_alpha)
            V[c] = basis.to(matrices[0].dtype)
            indices[c] = sparse_pattern(width, cfg.sparse_rate, generator)
            size[c] = torch.tensor([width, width], device="cpu")
        self.frod_V[name], self.frod_s_indices[name], self.frod_s_size[name] = stores

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        return cfg.with_values(category=category(key))

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layers' U belongs to the basis of the file, not to one derived again from the base weights."""
        found = {k.rsplit(".", 1)[-1]: v for k, v in state.items() if ".frod_V." in f".{k}"}
        cfg = self.peft_config[name]
        if cfg.save_projection and not found:
            raise ValueError(
                "Specified to load frod_V from state dictionary however it was not present! Set "
                "save_projection=False to derive it again."
            )
        if not found:
            warnings.warn(
                "The file holds no bases: they were derived again from the base weights, which must be "
                "exactly those of the training.",
                stacklevel=2,
            )
        for layer in self.holders(name).values():
            V = found.get(layer.category[name])
            if V is not None and V.shape == (layer.in_features, layer.in_features):  # others are named as misfits next
                layer.frod_U[name] = layer.counterpart(V)[0].to(layer.frod_U[name])
        return state
