# SPDX-License-Identifier: Apache-2.0
"""Modules and tensors made in bulk are those that torch would have made."""

import pytest
import torch
from torch import nn

from peft.core import kinds
from peft.core.modules import awaiting_values, kaiming
from peft.utils.integrations import init_empty_weights


@pytest.mark.parametrize(("n_in", "n_out", "bias"), [(5, 3, False), (3, 7, True), (1, 1, True)])
def test_linear_layers_made_in_bulk_are_those_of_torch(n_in, n_out, bias):
    torch.manual_seed(0)
    made, state = kinds.linear(n_in, n_out, bias), torch.get_rng_state()
    torch.manual_seed(0)
    wanted = nn.Linear(n_in, n_out, bias=bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(made).keys() == vars(wanted).keys() and repr(made) == repr(wanted)
    assert list(made.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), wanted.parameters(), strict=True))
    assert all(p.requires_grad for p in made.parameters())


def test_linear_layers_made_in_bulk_heed_contexts():
    """What patches torch's own constructors (accelerate, DeepSpeed) or sets a device takes part."""
    with torch.device("meta"):
        assert kinds.linear(2, 3, bias=True).bias.is_meta
    with init_empty_weights():
        assert kinds.linear(2, 3).weight.is_meta
    before = torch.get_rng_state()
    with awaiting_values():
        kinds.linear(2, 3, bias=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 2), (0, 3)])
def test_kaiming_draws_as_torch_does(shape):
    torch.manual_seed(0)
    made = kaiming(*shape)
    torch.manual_seed(0)
    assert torch.equal(made, nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))
