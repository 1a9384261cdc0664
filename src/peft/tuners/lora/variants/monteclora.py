# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA: Bayesian reparameterisation of LoRA (arXiv 2411.04358).

In training A becomes A + Σ_n w_n·noise_n, with weights w from a (logistic-normal) Dirichlet posterior and noise of a
Wishart-drawn variance; in evaluation the adapter is plain LoRA.
"""

from typing import Any

import torch
from torch import nn

from ....core.slots import Slot
from ....ops.low_rank import Factors
from .base import LoraVariant

SAMPLER = Slot("lora_monteclora_sampler", nn.ModuleDict, "trainable", saved=True)


class Sampler(nn.Module):
    """Draws the noise of one adapter. std_prior [r] and expert_weights_prior [N] are trained."""

    gaussian_var_prior: torch.Tensor  # [r, r], diagonal
    expert_weights: torch.Tensor  # [N]

    def __init__(self, r: int, n_in: int, options: Any):
        super().__init__()
        n = options.num_samples
        self.r, self.in_features, self.num_samples = r, n_in, n
        self.sample_scaler, self.dirichlet_prior = options.sample_scaler, options.dirichlet_prior
        self.use_entropy, self.kl_loss_weight = options.use_entropy, options.kl_loss_weight
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(n))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.ones(n) / n)
        self._live: tuple[torch.Tensor, torch.Tensor] | None = None  # v, w of the last draw, for the loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # a graph can't be copied

    def noise(self) -> torch.Tensor:
        """Σ_n w_n·noise_n as an addition to A, [r, in]."""
        v, w = self._variance(), self._weights()
        Z = torch.randn(self.num_samples, self.in_features, self.r, device=v.device, dtype=v.dtype)
        self._live = (v, w)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(v))
            self.expert_weights.copy_(w)
        noise = torch.einsum("n,nir->ri", w, Z) * v.sqrt()[:, None] * self.sample_scaler
        # entries that are not finite act as no noise; a branch on data would break the graph of torch.compile
        return torch.nan_to_num(noise, nan=0.0, posinf=0.0, neginf=0.0)

    def _variance(self) -> torch.Tensor:
        """diag(S Ω Sᵀ) with S = diag(exp(std_prior)), Ω Wishart with r degrees of freedom by Bartlett's
        decomposition.
        """
        r, device = self.r, self.std_prior.device
        chi = torch.distributions.Chi2(torch.arange(r, 0, -1, device=device, dtype=torch.float32)).sample()
        L = torch.tril(torch.randn(r, r, device=device), -1) + torch.diag(chi.sqrt())
        omega = L.square().sum(1).to(self.std_prior.dtype)  # diagonal of L Lᵀ
        return (torch.exp(2 * self.std_prior) * omega).clamp(min=1e-3)

    def _weights(self) -> torch.Tensor:
        n, alpha = self.num_samples, torch.exp(self.expert_weights_prior).clamp(min=1e-6)
        mu = alpha.log() - alpha.log().mean()
        d = ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp(min=1e-6)
        return torch.softmax((d + 1e-6).sqrt() * torch.randn_like(alpha) + mu, dim=0)

    def loss(self) -> torch.Tensor:
        """kl_loss_weight·(KL_dirichlet + KL_wishart + KL_gauss), plus Σ w² with use_entropy."""
        v, w = self._live or (torch.diagonal(self.gaussian_var_prior), self.expert_weights)
        a2 = torch.exp(self.expert_weights_prior)
        a1 = torch.full_like(a2, self.dirichlet_prior)
        dirichlet = torch.lgamma(a2.sum()) - torch.lgamma(a1.sum()) + (torch.lgamma(a2) - torch.lgamma(a1)).sum()
        dirichlet = dirichlet + ((a2 - a1) * (torch.digamma(a2) - torch.digamma(a2.sum()))).sum()
        log_u = 2 * self.std_prior
        wishart = 0.5 * (-self.r * log_u.sum() + self.r * torch.exp(log_u).sum() - self.r**2)
        full = torch.diag(v).clamp(min=1e-6)
        gauss = self.num_samples * 0.5 * (torch.trace(full) - torch.trace(full.log()) - self.r)
        total = self.kl_loss_weight * (dirichlet + wishart + gauss)
        return total + w.square().sum() if self.use_entropy else total


def _advance_generator(r: int, n_in: int, options: Any) -> None:
    """The published method fills a buffer with noise here; noise is drawn when needed now, but seeded models
    stay the same.
    """
    buffer, n = options.buffer_size, options.num_samples
    for count in (buffer * n * n_in * r, buffer * n):
        chunk = torch.empty(min(count, 1 << 20))
        while count >= 2 * len(chunk):  # normal_ takes the same numbers in blocks of 16
            chunk.normal_()
            count -= len(chunk)
        torch.randn(count)
    wishart = torch.distributions.Wishart(
        df=torch.tensor(float(r)), covariance_matrix=torch.eye(r), validate_args=False
    )
    for _ in range(buffer):
        wishart._bartlett_sampling(torch.Size())


class MonteCLora(LoraVariant):
    name = "MonteCLoRA"
    slots = (SAMPLER,)

    def __init__(self, cfg: Any):
        self.options = cfg.monteclora_config

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        layer.lora_monteclora_sampler[name] = Sampler(cfg.r, layer.in_features, self.options)
        if torch.empty(0).device.type == "cpu":
            _advance_generator(cfg.r, layer.in_features, self.options)

    def factors(self, layer: Any, name: str) -> Factors:
        f = layer.plain_factors(name)
        if not layer.training:
            return f
        return f._replace(A=f.A + layer.lora_monteclora_sampler[name].noise().to(f.A.dtype))

    def static_factors(self, layer: Any, name: str) -> Factors:
        return layer.plain_factors(name)
