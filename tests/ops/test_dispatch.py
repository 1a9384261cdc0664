import threading

import pytest
import torch
from tests.versions import since

from peft.ops import checks, is_plain, plain, use_plain


def test_context_is_per_thread_and_nests():
    seen = {}
    with plain():
        assert is_plain()
        with plain():
            assert is_plain()
        assert is_plain()
        thread = threading.Thread(target=lambda: seen.setdefault("other", is_plain()))
        thread.start()
        thread.join()
    assert not is_plain()
    assert seen == {"other": False}
    with pytest.raises(KeyError), plain():
        raise KeyError
    assert not is_plain()


def test_process_wide():
    seen = {}
    use_plain()
    use_plain()
    try:
        thread = threading.Thread(target=lambda: seen.setdefault("other", is_plain()))
        thread.start()
        thread.join()
    finally:
        use_plain(False)
    assert seen == {"other": True}
    assert not is_plain()


@since("torch", "2.7", "guards on thread locals")
def test_switch_is_compiled_and_guarded():
    torch._dynamo.reset()
    fun = torch.compile(lambda x: x + 1 if is_plain() else x - 1, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert fun(x) == -1
    with plain():
        assert fun(x) == 1
    assert fun(x) == -1


def test_comparison_finds_a_wrong_value_and_a_wrong_gradient():
    x = torch.randn(3, requires_grad=True)
    checks.compare(lambda x: x * 2, (x,))
    with pytest.raises(AssertionError):
        checks.compare(lambda x: x * (2 if is_plain() else 3), (x,))
    with pytest.raises(AssertionError):
        checks.compare(lambda x: x * 2 if is_plain() else (x * 2).detach() + 0 * x, (x,))


def test_every_listed_op_is_checked(monkeypatch):
    cases = lambda: [(torch.randn(3, requires_grad=True),)]  # noqa: E731
    monkeypatch.setitem(checks.OPS, "test_op", (torch.sin, cases))
    assert "test_op" in checks.run()
    monkeypatch.setitem(checks.OPS, "test_op", (lambda x: x * (2 if is_plain() else 3), cases))
    with pytest.raises(AssertionError):
        checks.run()
