"""The self-check of all ops, and the operation counts that the fused layers promise."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peft.ops import checks, dora, low_rank
from peft.ops.dispatch import is_plain


def test_every_op_equals_its_plain_path():
    names = checks.run()
    assert {"low_rank.linear", "dora.dora_linear", "cayley.rotate", "circulant.multiply", "wavelet.multiply"} <= set(
        names
    )


class Count(TorchDispatchMode):
    free = ("view", "detach", "::t", "transpose", "expand", "slice", "select", "alias", "as_strided", "reshape")
    n = moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(word in func.name() for word in self.free):
            self.n += 1
            self.moved += sum(t.numel() * t.element_size() for t in (*args, out) if isinstance(t, torch.Tensor))
        return out


def step(fun, x, g):
    with Count() as count:
        fun(x).backward(g)
    return count


@pytest.mark.parametrize(("dtype", "extra"), [(torch.float32, 6), (torch.bfloat16, 10)])
def test_a_training_step_of_a_linear_layer(dtype, extra):
    """Base: one product each way. Adapter: two thin ones forward, four backward, casts of A, B and their gradients."""
    W = torch.randn(96, 64, dtype=dtype)
    A, B = torch.nn.Parameter(torch.randn(8, 64)), torch.nn.Parameter(torch.randn(96, 8))
    x, g = torch.randn(4, 256, 64).to(dtype).requires_grad_(), torch.randn(4, 256, 96).to(dtype)
    base = step(lambda x: F.linear(x, W), x, g)
    x.grad = None
    full = step(lambda x: low_rank.linear(x, W, None, (low_rank.Factors(A, B, 2.0),), True), x, g)
    assert base.n == 2
    assert full.n <= base.n + extra
    # forward: x, and y read and written; backward: g twice, x, and dx read and written
    wide = (4 * 64 + 4 * 96) * 1024 * x.element_size()
    assert full.moved <= base.moved + 1.1 * wide


def test_saved_bytes_of_dora():
    W = torch.randn(96, 64)
    A, B = torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    m, x, kept = torch.rand(96, requires_grad=True), torch.randn(1024, 64, requires_grad=True), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm = dora.dora_norm(W, A, B, 1.0)
        y = dora.dora_linear(x, W, None, low_rank.Factors(A, B), m, norm, True)
    total = sum(s.nbytes() for s in kept.values())
    own = sum(t.untyped_storage().nbytes() for t in (x, y, W, A, B, m))
    assert total <= own + (1024 * 8 + 4 * 96) * 4


def test_gradients_that_only_one_path_has_are_found():
    leaves = (torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    checks.compare(lambda a, b: 2 * a, leaves)  # neither has one for b
    with pytest.raises(AssertionError, match="one path gives no gradient where the other does"):
        checks.compare(lambda a, b: a + (b if is_plain() else b.detach()), leaves)
