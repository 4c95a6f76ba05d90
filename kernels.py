"""Moving tokens to their experts and back: the memcpy operator of Compass-v3, in Triton and in plain PyTorch.

`permute` copies every token's row to its K experts' places in expert order; `unpermute` brings the K results back as one weighted sum. Each
input row is read once and each output row written once; there are no atomics, so results are deterministic, and both backward passes are
the same two movements again. Every kernel stands beside its eager twin (`*_reference`); dispatch is by device, and TRITON_INTERPRET=1 runs
the Triton code on a CPU.

Shapes: N tokens, K experts per token, R = N*K copies, E experts, D features in, F features out.

    python kernels.py                       # laptop: checks the pair and prints its times
    TRITON_INTERPRET=1 python kernels.py    # the Triton kernels, interpreted
"""

import math
import os
import time

import torch

import cli
from cli import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton wheel for this system: the eager twins serve
    triton = None


def use_triton(x):
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def inverse(order_R):
    """The inverse of a permutation."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def count_assignments(expert_index, num_experts):
    """How many assignments each expert has, (E,) int64; torch.bincount would wait for a GPU and has no size under fake tensors."""
    flat_R = expert_index.reshape(-1)
    return flat_R.new_zeros(num_experts).scatter_add_(0, flat_R, torch.ones_like(flat_R))


def sort_by_expert(expert_index_NK, num_experts):
    """Stable sort of the R = N*K assignments by expert: (order_R, row_of_NK, counts_E), all int64.

    order_R[r] is the flat assignment n*K + k that lands in row r; row_of, in the shape of the index, is its inverse.
    """
    flat_R = expert_index_NK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    return order_R, inverse(order_R).view_as(expert_index_NK), count_assignments(flat_R, num_experts)


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


def _launch(kernel, N, D, *arguments):
    """Run a kernel over N rows and blocks of their D columns."""
    block = min(1024, triton.next_power_of_2(D))
    if N:
        kernel[N, triton.cdiv(D, block)](*arguments, BLOCK=block)


def gather_rows(y_RD, row_of_NK, weights_NK=None):
    """out_ND[n] = sum_k weights[n, k] * y[row_of[n, k]], summed in fp32 (on a CPU in fp64 where y is); weights None means ones."""
    (N, K), D = row_of_NK.shape, y_RD.shape[1]
    if use_triton(y_RD):
        out_ND = y_RD.new_empty(N, D)
        weights = row_of_NK if weights_NK is None else weights_NK.contiguous()
        _launch(gather_kernel, N, D, y_RD.contiguous(), row_of_NK, weights, out_ND, D, K, weights_NK is not None)
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
    def forward(ctx, x_ND, order_R, row_of_NK):
        ctx.save_for_backward(row_of_NK)
        (N, K), D = row_of_NK.shape, x_ND.shape[1]
        if not use_triton(x_ND):
            return x_ND.index_select(0, order_R // K)  # on a CPU writing in order beats reading in order
        out_RD = x_ND.new_empty(N * K, D)
        _launch(scatter_kernel, N, D, x_ND.contiguous(), row_of_NK, out_RD, D, K)
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        return gather_rows(grad_RD, *ctx.saved_tensors), None, None


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, from_R, to_R):
        ctx.save_for_backward(to_R)
        return x_RD.index_select(0, from_R)

    @staticmethod
    def backward(ctx, grad_RD):
        return grad_RD.index_select(0, *ctx.saved_tensors), None, None


def move_rows(x_RD, from_R, to_R):
    """out_RD[r] = x[from[r]] for a permutation and its inverse `to`: a copy each way, where autograd's own backward would add."""
    return _MoveRows.apply(x_RD, from_R, to_R)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, row_of_NK, weights_NK):
        ctx.save_for_backward(y_RD, row_of_NK, weights_NK)
        return gather_rows(y_RD, row_of_NK, weights_NK)

    @staticmethod
    def backward(ctx, grad_ND):
        y_RD, row_of_NK, weights_NK = ctx.saved_tensors
        (N, K), D = row_of_NK.shape, y_RD.shape[1]
        if not use_triton(y_RD):
            copy_R = inverse(row_of_NK.flatten())  # copy_R[r] = n*K + k of the copy in row r
            grad_RD = grad_ND.index_select(0, copy_R // K)
            dw_NK = (grad_RD * y_RD).sum(1)[row_of_NK].to(weights_NK.dtype)
            return grad_RD.mul_(weights_NK.flatten()[copy_R].unsqueeze(1)), None, dw_NK
        dy_RD, dw_NK = torch.empty_like(y_RD), torch.empty_like(weights_NK)
        if N:
            gather_backward_kernel[(N,)](
                grad_ND.contiguous(), y_RD, row_of_NK, weights_NK, dy_RD, dw_NK, D, K, BLOCK=triton.next_power_of_2(D)
            )  # fmt: skip
        return dy_RD, None, dw_NK


def permute(x_ND, expert_index_NK, num_experts):
    """Copy each token to its K experts' places, in expert order (v3: the memcpy operator).

    Returns x_sorted_RD; row_of_NK (int64), the row of token n's k-th copy; counts_E (int64), rows per
    expert. The order is stable: within an expert, tokens keep their order.
    """
    order_R, row_of_NK, counts_E = sort_by_expert(expert_index_NK, num_experts)
    return _Permute.apply(x_ND, order_R, row_of_NK), row_of_NK, counts_E


def unpermute(y_sorted_RD, row_of_NK, weights_NK):
    """y_ND[n] = sum_k weights[n, k] * y_sorted[row_of[n, k]], accumulated in fp32, in y_sorted's dtype."""
    return _Unpermute.apply(y_sorted_RD.contiguous(), row_of_NK.contiguous(), weights_NK.contiguous())


# Matrix products with quantised weights. Each takes rows sorted by expert and one weight matrix per expert; a plain linear layer is
# the case of one expert. Rows are cut into tiles of BM; which expert a tile belongs to is worked out on the device, without waiting for it.


def unpack_int4(qweight):
    """uint8 (..., in / 2), low nibble first, to integers 0..15 (..., in)."""
    return torch.stack((qweight & 15, qweight >> 4), -1).flatten(-2)


def dequantize_int4(qweight, scales, zeros):
    """(q - zero) * scale, (..., out, in) in the scales' dtype; scales and zeros (..., out, in / group)."""
    q = unpack_int4(qweight).to(scales.dtype).unflatten(-1, (scales.shape[-1], -1))
    return ((q - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)


def int4_grouped_matmul_reference(x_RD, qweight, scales, zeros, counts_E):
    """Eager twin of `int4_grouped_matmul`, expert by expert."""
    parts = zip(x_RD.split(counts_E.tolist()), qweight, scales, zeros, strict=True)
    return torch.cat([int4_matmul_reference(*part) for part in parts])


def int4_matmul_reference(x, qweight, scales, zeros):
    """Eager twin of `int4_matmul`: dequantise, then multiply."""
    return x @ dequantize_int4(qweight, scales.float(), zeros.float()).to(x.dtype).T


def quantise_rows_reference(x):
    """Eager twin of `quantise_rows`."""
    largest = x.detach().abs().amax(-1).float()
    scale = torch.where(largest > 0, largest / 448.0, 1.0)  # the largest number of e4m3
    return (x.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).contiguous(), scale


def fp8_grouped_matmul_reference(x_RD, weight_fp8, weight_scale, counts_E):
    """Eager twin of `fp8_grouped_matmul`, expert by expert: the same rounding, the products in fp32."""
    parts = zip(x_RD.split(counts_E.tolist()), weight_fp8, weight_scale, strict=True)
    return torch.cat([fp8_matmul_reference(*part) for part in parts])


def fp8_matmul_reference(x, weight_fp8, weight_scale):
    """Eager twin of `fp8_matmul`."""
    x_fp8, scale = quantise_rows_reference(x)
    return (x_fp8.float() @ weight_fp8.float().T * weight_scale.float() * scale.unsqueeze(-1)).to(x.dtype)


if triton is not None:

    @triton.jit
    def quantise_kernel(x, out, scales, D, BLOCK: tl.constexpr):
        """out[r] = x[r] / scales[r] in e4m3, scales[r] = max |x[r]| / 448; grid (R,). The second reading of a row comes from the cache."""
        r, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            row = tl.load(x + r * D + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(row))
        largest = tl.max(largest)
        scale = tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0)
        tl.store(scales + r, scale)
        for start in range(0, D, BLOCK):
            row = tl.load(x + r * D + start + d, mask=start + d < D, other=0.0).to(tl.float32)
            tl.store(out + r * D + start + d, tl.div_rn(row, scale).to(out.dtype.element_ty), mask=start + d < D)

    @triton.jit
    def tile_of(counts, E, BM: tl.constexpr, EXPERTS: tl.constexpr):
        """(expert, first row, number of rows) of row tile program_id(1); the number is at most 0 past the last tile. EXPERTS: E, padded."""
        tile, e = tl.program_id(1), tl.arange(0, EXPERTS)
        count_E = tl.load(counts + e, mask=e < E, other=0).to(tl.int64)
        tiles_E = (count_E + BM - 1) // BM
        expert = tl.sum((tl.cumsum(tiles_E) <= tile).to(tl.int64))
        start = (tile - tl.sum(tl.where(e < expert, tiles_E, 0))) * BM  # within the expert's rows
        first = tl.sum(tl.where(e < expert, count_E, 0)) + start
        return expert, first, tl.minimum(tl.sum(tl.where(e == expert, count_E, 0)) - start, BM)

    @triton.jit
    def int4_kernel(
        x, qweight, scales, zeros, out, counts, E, F, D,
        GROUP: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """out[tile rows, f] = x @ weight.T; grid (F / BF, T), so that an expert's matrix stays in the cache while its rows pass.

        x (R, 2, D / 2): each row's even inputs, then its odd ones, as the low and high nibbles want them. q - zero is whole and exact in
        bf16; the scale multiplies each group's sum. Weights are the left operand: the tensor cores want at least 64 rows there and take
        16 on the right. WIDE: multiply in fp32, for the interpreter, whose bf16 is wrong.
        """
        expert, first, rows = tile_of(counts, E, BM, EXPERTS)
        if rows <= 0:
            return
        m, f, k = tl.arange(0, BM), tl.program_id(0) * BF + tl.arange(0, BF), tl.arange(0, BD // 2)
        channel = expert * F + f
        even_at = x + (first + m)[:, None] * D + k[None, :]
        q_at = qweight + channel[:, None] * (D // 2) + k[None, :]
        total = tl.zeros((BF, BM), tl.float32)
        for d in range(0, D // 2, BD // 2):
            even = tl.load(even_at + d, mask=m[:, None] < rows, other=0.0)
            odd = tl.load(even_at + D // 2 + d, mask=m[:, None] < rows, other=0.0)
            q = tl.load(q_at + d, mask=f[:, None] < F, other=0)
            at = channel * (D // GROUP) + 2 * d // GROUP
            scale = tl.load(scales + at, mask=f < F, other=0.0).to(tl.float32)
            zero = tl.load(zeros + at, mask=f < F, other=0.0)
            if WIDE:
                even, odd = even.to(tl.float32), odd.to(tl.float32)
            low = (q & 15).to(even.dtype) - zero.to(even.dtype)[:, None]
            high = (q >> 4).to(even.dtype) - zero.to(even.dtype)[:, None]
            part = tl.dot(low, tl.trans(even), input_precision="ieee")  # fp32 rows: no tf32
            total += tl.dot(high, tl.trans(odd), part, input_precision="ieee") * scale[:, None]
        at = out + (first + m)[:, None] * F + f[None, :]
        tl.store(at, tl.trans(total).to(out.dtype.element_ty), mask=(m[:, None] < rows) & (f[None, :] < F))

    @triton.jit
    def fp8_kernel(
        x, x_scale, weight, weight_scale, out, counts, E, F, D,
        EXPERTS: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """out[tile rows, f] = (x @ weight.T) * x_scale * weight_scale, fp8 operands; grid (F / BF, T). sm_90 sums fp8 products in fewer
        bits than fp32: after every 128 inputs the sum goes into one of fp32."""
        IMPRECISE: tl.constexpr = 128 if BD > 128 else BD
        expert, first, rows = tile_of(counts, E, BM, EXPERTS)
        if rows <= 0:
            return
        m, f, k = tl.arange(0, BM), tl.program_id(0) * BF + tl.arange(0, BF), tl.arange(0, BD)
        channel = expert * F + f
        x_at, w_at = x + (first + m)[:, None] * D + k[None, :], weight + channel[:, None] * D + k[None, :]
        total = tl.zeros((BF, BM), tl.float32)
        for d in range(0, D, BD):
            a_MD = tl.load(x_at + d, mask=(m[:, None] < rows) & (d + k[None, :] < D), other=0.0)
            w_FD = tl.load(w_at + d, mask=(f[:, None] < F) & (d + k[None, :] < D), other=0.0)
            if WIDE:
                total += tl.dot(w_FD.to(tl.float32), tl.trans(a_MD.to(tl.float32)))
            else:
                total = tl.dot(w_FD, tl.trans(a_MD), total, max_num_imprecise_acc=IMPRECISE)
        total *= tl.load(x_scale + first + m, mask=m < rows, other=0.0)[None, :]
        total *= tl.load(weight_scale + channel, mask=f < F, other=0.0)[:, None]
        at = out + (first + m)[:, None] * F + f[None, :]
        tl.store(at, tl.trans(total).to(out.dtype.element_ty), mask=(m[:, None] < rows) & (f[None, :] < F))

    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
    # By rows per tile: (BF, BD, warps, stages) without spills and within the shared memory of sm_80 (163 kB; fp8: sm_90, 227 kB).
    INT4_TILES = {
        16: ((64, 128, 4, 4), (128, 128, 4, 3)),
        64: ((64, 128, 4, 4), (128, 128, 8, 3)),
        128: ((64, 64, 8, 3), (128, 64, 8, 3)),
    }
    FP8_TILES = {
        16: ((64, 256, 4, 4), (64, 128, 4, 4)),
        64: ((64, 128, 4, 4), (128, 128, 8, 3)),
        128: ((128, 128, 8, 4), (128, 128, 8, 3)),
    }

    def _tuned(kernel, tiles):
        configs = [triton.Config({"BF": bf, "BD": bd}, num_warps=warps, num_stages=stages) for bf, bd, warps, stages in tiles]
        return triton.autotune(configs[:1] if INTERPRETED else configs, ["E", "F", "D"])(kernel)

    tuned_int4 = {bm: _tuned(int4_kernel, tiles) for bm, tiles in INT4_TILES.items()}
    tuned_fp8 = {bm: _tuned(fp8_kernel, tiles) for bm, tiles in FP8_TILES.items()}


def _multiply(kernel, rows, weights, counts_E, out_RF, D, bm, **constants):
    """Launch a product's kernel over all tiles of bm rows (at most R // bm + E) and all blocks of outputs."""
    (R, F), E = out_RF.shape, len(counts_E)
    if len(weights[0]) != E or not all(tensor.is_contiguous() for tensor in (*weights, counts_E)):
        raise InputError(f"{E} counts for {len(weights[0])} matrices, or a quantized weight that is not contiguous")
    grid = lambda meta: (triton.cdiv(F, meta["BF"]), R // bm + E)  # noqa: E731
    kernel[grid](*rows, *weights, out_RF, counts_E, E, F, D, EXPERTS=triton.next_power_of_2(E), BM=bm, WIDE=INTERPRETED, **constants)
    return out_RF


def fp8_in_triton(x):
    """GPUs before sm_89 have no fp8: the eager twins serve them."""
    return use_triton(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9))


def quantise_rows(x):
    """fp8 with one scale a row: x (..., D) -> (x_fp8 (..., D) e4m3, scale (...) fp32), x = x_fp8 * scale. A row of zeros has scale 1."""
    if not fp8_in_triton(x):
        return quantise_rows_reference(x)
    x, D = x.detach().contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float32 if INTERPRETED else torch.float8_e4m3fn)  # the interpreter rounds fp8 wrongly
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        quantise_kernel[(scale.numel(),)](x, out, scale, D, BLOCK=min(2048, triton.next_power_of_2(D)))
    return out.to(torch.float8_e4m3fn), scale


def rows_per_tile(rows, experts):
    """16 rows where an expert has few tokens (decoding), else 64 or 128."""
    return 16 if rows <= 16 * experts else 64 if rows <= 256 * experts else 128


def int4_grouped_matmul(x_RD, qweight, scales, zeros, counts_E):
    """W4A16: counts_E[e] rows of x times expert e's weight, transposed -> (R, out) in x's dtype.

    x_RD: fp16, bf16 or fp32, sorted by expert; qweight (E, out, in / 2) uint8, low nibble first; scales, zeros (E, out, in / group).
    The kernel takes groups of a multiple of 32; of 128 they have tuned tiles. Raises InputError where shapes do not fit.
    """
    (E, F, half), D = qweight.shape, x_RD.shape[1]
    if 2 * half != D or scales.shape != zeros.shape or scales.shape[:2] != (E, F) or D % scales.shape[2]:
        raise InputError(f"int4: x {tuple(x_RD.shape)}, qweight {tuple(qweight.shape)}, scales {tuple(scales.shape)} do not fit")
    group, R = D // scales.shape[2], x_RD.shape[0]
    if group % 32 or not use_triton(x_RD):
        return int4_grouped_matmul_reference(x_RD, qweight, scales, zeros, counts_E)
    bm = rows_per_tile(R, E)
    if group % 128 == 0:
        kernel, constants = tuned_int4[bm], {}
    else:  # a step must stay inside a group; 128 rows would spill registers
        bm, kernel, constants = min(bm, 64), int4_kernel, {"BF": 64, "BD": math.gcd(group, 64)}
    even_odd_R2H = x_RD.unflatten(1, (half, 2)).transpose(1, 2).contiguous()
    return _multiply(kernel, [even_odd_R2H], [qweight, scales, zeros], counts_E, x_RD.new_empty(R, F), D, bm, GROUP=group, **constants)


def fp8_grouped_matmul(x_RD, weight_fp8, weight_scale, counts_E):
    """W8A8: counts_E[e] rows of x, quantised per token, times expert e's fp8 weight, transposed -> (R, out) in x's dtype.

    weight_fp8 (E, out, in) e4m3; weight_scale (E, out) fp32.
    """
    (E, F, D), R = weight_fp8.shape, x_RD.shape[0]
    if x_RD.shape[1] != D or weight_scale.shape != (E, F):
        raise InputError(f"fp8: x {tuple(x_RD.shape)}, weight {tuple(weight_fp8.shape)}, scale {tuple(weight_scale.shape)} do not fit")
    if not fp8_in_triton(x_RD):
        return fp8_grouped_matmul_reference(x_RD, weight_fp8, weight_scale, counts_E)
    bm = rows_per_tile(R, E)
    return _multiply(tuned_fp8[bm], quantise_rows(x_RD), [weight_fp8, weight_scale], counts_E, x_RD.new_empty(R, F), D, bm)


def int4_matmul(x, qweight, scales, zeros):
    """x (N, ..., in) times the transpose of an int4 weight (out, in / 2) with scales and zeros (out, in / group) -> (N, ..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    counts = torch.full((1,), len(rows), device=x.device)
    return int4_grouped_matmul(rows, qweight[None], scales[None], zeros[None], counts).unflatten(0, x.shape[:-1])


def fp8_matmul(x, weight_fp8, weight_scale):
    """x (N, ..., in) times the transpose of an fp8 weight (out, in) with one scale a row (out,) -> (N, ..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    counts = torch.full((1,), len(rows), device=x.device)
    return fp8_grouped_matmul(rows, weight_fp8[None], weight_scale[None], counts).unflatten(0, x.shape[:-1])


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
        for _ in range(2):  # the first time compiles, and wakes the caches
            start = time.perf_counter()
            x_sorted_RD, row_of_NK, _ = there(x_ND, index_NK, E)
            results[name] = back(x_sorted_RD, row_of_NK, weights_NK)
            results[name][0, 0].item()  # waits for a GPU
        print(f"{name}: {1e3 * (time.perf_counter() - start):.2f} ms for N={N} D={D} E={E} K={K} on {device}")
    print(f"largest difference {(results['ours'] - results['eager twin']).abs().max().item():.1e}")


if __name__ == "__main__":
    cli.run(main)
