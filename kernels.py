"""Moving tokens to their experts and back: the memcpy operator of Compass-v3, in Triton and in plain PyTorch.

`permute` copies every token's row to its K experts' places in expert order; `unpermute` brings the K
results back as one weighted sum. Each input row is read once and each output row written once; there are
no atomics, so results are deterministic, and both backward passes are the same two movements again.
Every kernel stands beside its eager twin (`*_reference`); dispatch is by device, and
TRITON_INTERPRET=1 runs the Triton code on a CPU.

Shapes: N tokens, K experts per token, R = N*K copies, E experts, D features.

    python kernels.py                       # laptop: checks the pair and prints its times
    TRITON_INTERPRET=1 python kernels.py    # the Triton kernels, interpreted
"""

import os
import time

import torch

import cli

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton wheel for this system: the eager twins serve
    triton = None


def use_triton(x):
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def sort_by_expert(expert_index_NK, num_experts):
    """Stable sort of the R = N*K assignments by expert: (order_R, row_of_NK, counts_E), all int64.

    order_R[r] is the flat assignment n*K + k that lands in row r; row_of is its inverse.
    """
    flat_R = expert_index_NK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    row_of_R = torch.empty_like(order_R)
    row_of_R[order_R] = torch.arange(flat_R.numel(), device=flat_R.device)
    counts_E = torch.bincount(flat_R, minlength=num_experts)
    return order_R, row_of_R.view_as(expert_index_NK), counts_E


def permute_reference(x_ND, expert_index_NK, num_experts):
    """Eager twin of `permute`, differentiated by autograd."""
    order_R, row_of_NK, counts_E = sort_by_expert(expert_index_NK, num_experts)
    return x_ND[order_R // expert_index_NK.shape[1]], row_of_NK, counts_E


def unpermute_reference(y_sorted_RD, row_of_NK, weights_NK):
    """Eager twin of `unpermute`, differentiated by autograd."""
    y_NKD = y_sorted_RD[row_of_NK].to(torch.promote_types(y_sorted_RD.dtype, torch.float32))
    return (y_NKD * weights_NK.to(y_NKD.dtype).unsqueeze(-1)).sum(1).to(y_sorted_RD.dtype)


if triton is not None:

    @triton.jit
    def scatter_kernel(x, row_of, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
        """out[row_of[n, k]] = x[n] for every k; grid (N, D / BLOCK). The row is read once."""
        n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(x + n * D + d, mask=d < D)
        for k in tl.static_range(K):
            tl.store(out + tl.load(row_of + n * K + k) * D + d, row, mask=d < D)

    @triton.jit
    def gather_kernel(y, row_of, weights, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
        """out[n] = sum_k weights[n, k] * y[row_of[n, k]] in fp32; grid (N, D / BLOCK). Each copy is read once."""
        n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            copy = tl.load(y + tl.load(row_of + n * K + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
            if WEIGHTED:
                copy *= tl.load(weights + n * K + k).to(tl.float32)
            total += copy
        tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)

    @triton.jit
    def gather_backward_kernel(g, y, row_of, weights, dy, dw, D, K: tl.constexpr, BLOCK: tl.constexpr):
        """dy[row_of[n, k]] = weights[n, k] * g[n]; dw[n, k] = <g[n], y[row_of[n, k]]>; grid (N,)."""
        n = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK)
        grad = tl.load(g + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            row = tl.load(row_of + n * K + k) * D + d
            copy = tl.load(y + row, mask=d < D, other=0.0).to(tl.float32)
            tl.store(dw + n * K + k, tl.sum(grad * copy))
            weighted = grad * tl.load(weights + n * K + k).to(tl.float32)
            tl.store(dy + row, weighted.to(dy.dtype.element_ty), mask=d < D)


def _grid(N, D):
    block = min(1024, triton.next_power_of_2(D))
    return (N, triton.cdiv(D, block)), block


def scatter_rows(x_ND, row_of_NK):
    """out_RD[row_of[n, k]] = x[n]."""
    (N, K), D = row_of_NK.shape, x_ND.shape[1]
    out_RD = x_ND.new_empty(N * K, D)
    if use_triton(x_ND):
        grid, block = _grid(N, D)
        if N:
            scatter_kernel[grid](x_ND.contiguous(), row_of_NK, out_RD, D, K, BLOCK=block)
        return out_RD
    for k in range(K):
        out_RD[row_of_NK[:, k]] = x_ND
    return out_RD


def gather_rows(y_RD, row_of_NK, weights_NK=None):
    """out_ND[n] = sum_k weights[n, k] * y[row_of[n, k]], summed in at least fp32; weights None means ones."""
    (N, K), D = row_of_NK.shape, y_RD.shape[1]
    if use_triton(y_RD):
        out_ND = y_RD.new_empty(N, D)
        grid, block = _grid(N, D)
        weights = row_of_NK if weights_NK is None else weights_NK.contiguous()
        if N:
            gather_kernel[grid](y_RD.contiguous(), row_of_NK, weights, out_ND, D, K, weights_NK is not None, BLOCK=block)
        return out_ND
    total_ND = torch.zeros(N, D, dtype=torch.promote_types(y_RD.dtype, torch.float32), device=y_RD.device)
    for k in range(K):
        copy_ND = y_RD.index_select(0, row_of_NK[:, k]).to(total_ND.dtype)
        if weights_NK is None:
            total_ND += copy_ND
        else:
            total_ND.addcmul_(copy_ND, weights_NK[:, k : k + 1].to(total_ND.dtype))
    return total_ND.to(y_RD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, row_of_NK):
        ctx.save_for_backward(row_of_NK)
        return scatter_rows(x_ND, row_of_NK)

    @staticmethod
    def backward(ctx, grad_RD):
        return gather_rows(grad_RD, *ctx.saved_tensors), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, row_of_NK, weights_NK):
        ctx.save_for_backward(y_RD, row_of_NK, weights_NK)
        return gather_rows(y_RD, row_of_NK, weights_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        y_RD, row_of_NK, weights_NK = ctx.saved_tensors
        (N, K), D = row_of_NK.shape, y_RD.shape[1]
        dy_RD, dw_NK = torch.empty_like(y_RD), torch.empty_like(weights_NK)
        if use_triton(y_RD):
            if N:
                gather_backward_kernel[(N,)](
                    grad_ND.contiguous(), y_RD, row_of_NK, weights_NK, dy_RD, dw_NK, D, K,
                    BLOCK=triton.next_power_of_2(D),
                )  # fmt: skip
            return dy_RD, None, dw_NK
        for k in range(K):
            row_N = row_of_NK[:, k]
            dw_NK[:, k] = (y_RD.index_select(0, row_N) * grad_ND).sum(1)
            dy_RD[row_N] = grad_ND * weights_NK[:, k : k + 1].to(grad_ND.dtype)
        return dy_RD, None, dw_NK


def permute(x_ND, expert_index_NK, num_experts):
    """Copy each token to its K experts' places, in expert order (v3: the memcpy operator).

    Returns x_sorted_RD; row_of_NK (int64), the row of token n's k-th copy; counts_E (int64), rows per
    expert. The order is stable: within an expert, tokens keep their order.
    """
    _, row_of_NK, counts_E = sort_by_expert(expert_index_NK, num_experts)
    return _Permute.apply(x_ND, row_of_NK), row_of_NK, counts_E


def unpermute(y_sorted_RD, row_of_NK, weights_NK):
    """y_ND[n] = sum_k weights[n, k] * y_sorted[row_of[n, k]], accumulated in fp32, in y_sorted's dtype."""
    return _Unpermute.apply(y_sorted_RD.contiguous(), row_of_NK, weights_NK.contiguous())


def main():
    cli.parse(__doc__)
    generator = torch.Generator().manual_seed(0)
    N, D, E, K = 4096, 256, 16, 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_ND = torch.randn(N, D, generator=generator).to(device)
    index_NK = torch.rand(N, E, generator=generator).topk(K).indices.to(device)
    weights_NK = torch.rand(N, K, generator=generator).to(device)
    pairs = {"eager twin": (permute_reference, unpermute_reference), "ours": (permute, unpermute)}
    results = {}
    for name, (there, back) in pairs.items():
        start = time.perf_counter()
        x_sorted_RD, row_of_NK, _ = there(x_ND, index_NK, E)
        results[name] = back(x_sorted_RD, row_of_NK, weights_NK)
        print(f"{name}: {1e3 * (time.perf_counter() - start):.2f} ms for N={N} D={D} E={E} K={K} on {device}")
    print(f"largest difference {(results['ours'] - results['eager twin']).abs().max().item():.1e}")


if __name__ == "__main__":
    cli.run(main)
