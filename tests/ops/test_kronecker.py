import pytest
import torch

from peft.ops import kronecker, plain


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 4)])
def test_equals_the_dense_product_in_value_and_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    x, w1, w2 = draw(*shape, 12), draw(2, 3), draw(5, 4)
    y = kronecker.apply(x, w1, w2)
    expected = x @ torch.kron(w1, w2).T
    torch.testing.assert_close(y, expected)
    weight = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), (x, w1, w2)),
        torch.autograd.grad((expected * weight).sum(), (x, w1, w2)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with plain():
        torch.testing.assert_close(kronecker.apply(x, w1, w2), expected)


def test_gradcheck_twice():
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (2, 3), (4, 2))]
    assert torch.autograd.gradcheck(kronecker.apply, args)
    assert torch.autograd.gradgradcheck(kronecker.apply, args)


def test_keeps_the_input_alone():
    x, w1, w2 = (
        torch.randn(64, 12, requires_grad=True),
        torch.randn(2, 3, requires_grad=True),
        torch.randn(5, 4, requires_grad=True),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kronecker.apply(x, w1, w2)
    assert sum(t.numel() for t in {t.data_ptr(): t for t in kept}.values()) == x.numel() + w1.numel() + w2.numel()
