"""permute/unpermute: by hand, against the eager twins, and the Triton kernels in the interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import permute, permute_reference, unpermute, unpermute_reference

CASES = [(7, 5, 4, 2), (1, 8, 3, 3), (33, 17, 8, 1), (64, 130, 6, 4)]  # N, D, E, K


def routing(N, E, K, hot=False):
    if hot:  # every token takes the same experts; the others stay empty
        return torch.arange(K).expand(N, K).contiguous()
    return torch.rand(N, E, generator=torch.Generator().manual_seed(N)).topk(K).indices


def test_by_hand():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    x_sorted, row_of, counts = permute(x, torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert x_sorted.flatten().tolist() == [1, 2, 2, 3, 1, 3]  # expert 0: 1 2; expert 1: 2 3; expert 2: 1 3
    assert row_of.tolist() == [[4, 0], [1, 2], [5, 3]] and counts.tolist() == [2, 2, 2, 0]
    y = unpermute(x_sorted, row_of, torch.tensor([[0.5, 0.5], [1.0, 2.0], [0.0, 1.0]]))
    assert y.flatten().tolist() == [1, 6, 3]


def check(dtype=torch.float32, tolerance=0.0):
    for N, D, E, K in CASES:
        for hot in (False, True):
            index, grads = routing(N, E, K, hot), []
            for there, back in ((permute, unpermute), (permute_reference, unpermute_reference)):
                g = torch.Generator().manual_seed(D)
                x = torch.randn(N, D, generator=g).to(dtype).requires_grad_()
                w = torch.rand(N, K, generator=g).requires_grad_()
                x_sorted, row_of, counts = there(x, index, E)
                y = back(x_sorted * 2, row_of, w)
                y.backward(torch.randn(N, D, generator=g).to(dtype))
                grads.append((x_sorted, row_of, counts, y, x.grad, w.grad))
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_equals_eager_twin(dtype, tolerance):
    check(dtype, tolerance)


def test_gradcheck():
    index = routing(5, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, w):
        x_sorted, row_of, _ = permute(x, index, 4)
        return unpermute(x_sorted.square(), row_of, w)

    torch.autograd.gradcheck(there_and_back, (x, w))


def test_triton_in_the_interpreter():
    code = (
        "import torch, kernels, tests.test_kernels as t\n"
        "assert kernels.use_triton(torch.zeros(1))\n"
        "t.check(torch.float32, 1e-5); t.check(torch.bfloat16, 5e-2); print('interpreted')"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "interpreted", result.stderr
