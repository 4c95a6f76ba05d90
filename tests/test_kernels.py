"""Kernels: by hand, against float64 and the eager twins, interpreted, compiled for three GPUs without one, and their traffic counted."""

import os
import re
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import (
    fp8_grouped_matmul,
    fp8_matmul,
    int4_grouped_matmul,
    int4_matmul,
    permute,
    permute_reference,
    quantise_rows,
    unpermute,
    unpermute_reference,
)  # fmt: skip

CASES = [(7, 5, 4, 2), (1, 8, 3, 3), (33, 17, 8, 1), (64, 130, 6, 4), (2, 1500, 4, 2)]  # N, D, E, K; 1500: two programs a row


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


def check(dtype, tolerance, device="cpu"):
    for N, D, E, K in CASES:
        for hot in (False, True):
            index, grads = routing(N, E, K, hot).to(device), []
            for there, back in ((permute, unpermute), (permute_reference, unpermute_reference)):
                g = torch.Generator().manual_seed(D)
                x = torch.randn(N, D, generator=g).to(device, dtype).requires_grad_()
                w = torch.rand(N, K, generator=g).to(device).requires_grad_()
                x_sorted, row_of, counts = there(x, index, E)
                y = back(x_sorted * 2, row_of, w)
                y.backward(torch.randn(N, D, generator=g).to(device, dtype))
                grads.append((x_sorted, row_of, counts, y, x.grad, w.grad))
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_equals_eager_twin(dtype, tolerance):
    check(dtype, tolerance)


def test_a_sum_of_bf16_rows_is_made_in_fp32():
    y = torch.tensor([[256.0], [0.75], [0.75], [0.75]]).bfloat16()
    assert unpermute(y, torch.arange(4).unsqueeze(0), torch.ones(1, 4)).item() == 258  # 258.25; each sum rounded to bf16 gives 256


def test_gradcheck():
    index = routing(5, 4, 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, w):
        x_sorted, row_of, _ = permute(x, index, 4)
        return unpermute(x_sorted.square(), row_of, w)

    torch.autograd.gradcheck(there_and_back, (x, w))


COUNTS = [[5, 0, 70, 1], [0, 0, 130], [1], [0, 16, 0], [260]]  # rows of each expert: ragged, empty, hot, one; tiles of 16, 64, 128


def int4_case(counts, D, F, group, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    E = len(counts)
    x = torch.randn(sum(counts), D, generator=g).to(dtype)
    qweight = torch.randint(0, 256, (E, F, D // 2), generator=g, dtype=torch.uint8)
    scales = (torch.rand(E, F, D // group, generator=g) / 8).to(dtype)
    zeros = torch.randint(0, 16, (E, F, D // group), generator=g).to(dtype)
    return x, qweight, scales, zeros, torch.tensor(counts)


def int4_exact(x, qweight, scales, zeros, counts):
    """One weight after the other in float64, written out from the definition of the layout."""
    rows, start = [], 0
    for e, count in enumerate(counts.tolist()):
        w = torch.empty(qweight.shape[1], x.shape[1], dtype=torch.float64)
        for i in range(x.shape[1]):
            q = (qweight[e, :, i // 2] >> (4 * (i % 2))) & 15
            group = i // (x.shape[1] // scales.shape[2])
            w[:, i] = (q.double() - zeros[e, :, group].double()) * scales[e, :, group].double()
        rows.append(x[start : start + count].double() @ w.T)
        start += count
    return torch.cat(rows)


def check_gemms(dtype, int4_tolerance, fp8_tolerance, device="cpu"):
    """Both products against float64 on the CPU, on every ragged batch; tolerances are shares of the largest result."""
    for counts in COUNTS:
        for D, F, group in ((64, 24, 32), (64, 24, 8), (128, 70, 64), (256, 130, 128), (192, 40, 96)):
            case = int4_case(counts, D, F, group, dtype)
            exact = int4_exact(*case)
            y = int4_grouped_matmul(*(tensor.to(device) for tensor in case)).cpu()
            assert y.dtype == dtype and (y.double() - exact).abs().max() <= int4_tolerance * exact.abs().max()
            x, counts_E = case[0], case[-1]
            weight = torch.randn(len(counts), F, D, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
            scale = torch.rand(len(counts), F, generator=torch.Generator().manual_seed(2))
            x_fp8, x_scale = quantise_rows(x)
            parts = zip(x_fp8.double().split(counts), weight.double(), scale.double(), strict=True)
            exact = torch.cat([part @ w.T * s for part, w, s in parts]) * x_scale.double().unsqueeze(-1)
            y = fp8_grouped_matmul(*(tensor.to(device) for tensor in (x, weight, scale, counts_E))).cpu()
            assert y.dtype == dtype and (y.double() - exact).abs().max() <= fp8_tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_quantised_products_equal_float64(dtype, tolerance):
    check_gemms(dtype, tolerance, tolerance)


def test_plain_linear_is_the_case_of_one_expert():
    x, qweight, scales, zeros, counts = int4_case([6], 64, 10, 32, torch.float32)
    both = int4_matmul(x.view(2, 3, 64), qweight[0], scales[0], zeros[0])
    exact = int4_exact(x, qweight, scales, zeros, counts)
    assert both.shape == (2, 3, 10) and (both.view(6, 10).double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    weight, scale = torch.randn(10, 64).to(torch.float8_e4m3fn), torch.rand(10)
    x_fp8, x_scale = quantise_rows(x)
    exact = (x_fp8.double() * x_scale.double()[:, None]) @ (weight.double() * scale.double()[:, None]).T
    assert (fp8_matmul(x, weight, scale).double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def check_rows(device="cpu"):
    """quantise_rows equals its eager twin on a CPU to the last bit (on a GPU torch divides by a number in two roundings)."""
    for shape in ((5, 64), (3, 7, 100), (2, 5000), (0, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            x[:1] = 0
            for ours, twin in zip(quantise_rows(x.to(device)), kernels.quantise_rows_reference(x), strict=True):
                assert ours.shape == twin.shape and torch.equal(ours.float().cpu(), twin.float())


def test_quantised_rows():
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e6, 0.0, 3.0])[:, None]
    x_fp8, scale = quantise_rows(x)
    back = x_fp8.float() * scale[:, None]
    assert ((back - x).abs() <= x.abs() / 16 + scale[:, None] * 2**-9).all() and scale[3] == 1  # 3 bits of mantissa
    assert x_fp8.float().abs().amax(-1)[:3].tolist() == [448.0] * 3


def test_what_does_not_fit_is_named():
    x, qweight, scales, zeros, counts = int4_case([6], 64, 10, 32, torch.float32)
    with pytest.raises(ValueError, match=r"int4: x \(6, 32\), qweight \(1, 10, 32\)"):
        int4_grouped_matmul(x[:, :32], qweight, scales, zeros, counts)
    with pytest.raises(ValueError, match=r"fp8: x \(6, 64\), weight \(1, 10, 32\)"):
        fp8_grouped_matmul(x, torch.zeros(1, 10, 32).to(torch.float8_e4m3fn), torch.ones(1, 10), counts)


def interpreted(code):
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_triton_in_the_interpreter():
    code = (
        "import torch, kernels, tests.test_kernels as t\n"
        "assert kernels.use_triton(torch.zeros(1))\n"
        "t.check(torch.float32, 1e-5); t.check(torch.bfloat16, 5e-2); print('interpreted')"
    )
    assert interpreted(code) == "interpreted"


def test_triton_gemms_in_the_interpreter():
    """Also that weights with other strides than their shape's, and counts of other experts, are refused, not read wrongly."""
    code = (
        "import torch, kernels, tests.test_kernels as t\n"
        "t.check_rows(); t.check_gemms(torch.float32, 1e-5, 1e-5); t.check_gemms(torch.bfloat16, 2e-2, 2e-2)\n"
        "x, q, s, z, counts = t.int4_case([6], 64, 64, 32, torch.float32)\n"
        "for arguments in ((x, q.mT.contiguous().mT, s, z, counts), (x, q, s, z, torch.tensor([5, 1]))):\n"
        "    try: kernels.int4_grouped_matmul(*arguments)\n"
        "    except ValueError as error: print(error)\n"
    )
    assert interpreted(code).splitlines() == [f"{n} counts for 1 matrices, or a quantized weight that is not contiguous" for n in (1, 2)]


def test_traffic_is_the_minimum():
    """Elements that the interpreted kernels load and store, counted; at least: x once and its R copies; the copies and y once; and in the
    backward pass of the second y's gradient once, the copies, and their gradients."""
    code = """
import sys
import numpy as np, torch, triton, kernels
from triton.runtime import interpreter
from tests.test_kernels import routing

moved = [0, 0]
def counting(name, slot):
    plain = getattr(interpreter.InterpreterBuilder, name)
    def counted(self, ptrs, *rest):
        mask = rest[0] if slot == 0 else rest[1]
        width = ptrs.dtype.element_ty.primitive_bitwidth // 8
        moved[slot] += int(np.sum(mask.data)) * width
        return plain(self, ptrs, *rest)
    setattr(interpreter.InterpreterBuilder, name, counted)
counting("create_masked_load", 0)
counting("create_masked_store", 1)
N, D, E, K = 64, 256, 8, 4
x, w = torch.randn(N, D), torch.rand(N, K)
x_sorted, row_of, counts = kernels.permute(x, routing(N, E, K), E)
least = 4 * (N * D + N * K * D)
print(sum(moved) / least)
moved[:] = [0, 0]
y = kernels.unpermute(x_sorted.requires_grad_(), row_of, w)
print(sum(moved) / least)
moved[:] = [0, 0]
y.backward(torch.ones_like(y))
print(sum(moved) / (least + 4 * N * K * D))
"""
    ratios = list(map(float, interpreted(code).split()))
    assert len(ratios) == 3 and all(1.0 <= ratio <= 1.1 for ratio in ratios)


BIN = os.path.join(os.path.dirname(kernels.triton.__file__), "backends", "nvidia", "bin")


def compiled(kernel, types, constants, arch, **options):
    """(resource usage, machine code) of a kernel compiled for a GPU that need not be there."""
    import tempfile

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, t) in enumerate(signature.items()) if t[0] == "*" or name in "DF"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    binary = kernels.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool, flags = os.path.join(BIN, "cuobjdump"), ("--dump-resource-usage", "-sass")
        return [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout for flag in flags]


def no_spills(usage):
    return "STACK:0 " in usage and "LOCAL:0 " in usage


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_permute_compiles_to_wide_accesses(arch):
    rows = dict.fromkeys(("x", "y", "g", "dy", "out"), "*bf16") | {"dw": "*fp32", "row_of": "*i64", "weights": "*fp32", "D": "i32"}
    for kernel, constants in (
        (kernels.scatter_kernel, {"K": 4, "BLOCK": 1024}),
        (kernels.gather_kernel, {"K": 4, "WEIGHTED": True, "BLOCK": 1024}),
        (kernels.gather_backward_kernel, {"K": 4, "BLOCK": 4096}),
    ):
        usage, code = compiled(kernel, rows, constants, arch)
        assert no_spills(usage), usage
        assert re.search(r"LDG\.E(\.\w+)*\.128", code) and re.search(r"STG\.E(\.\w+)*\.128", code), kernel
        assert not re.search(r"(LDG|STG)\.E(\.\w+)*\.[US]16", code), kernel  # no element of a row alone


SIZES = {"out": "*bf16", "counts": "*i64", "E": "i32", "F": "i32", "D": "i32"}
INT4 = {"x": "*bf16", "qweight": "*u8", "scales": "*bf16", "zeros": "*u8", **SIZES}
FP8 = {"x": "*fp8e4nv", "x_scale": "*fp32", "weight": "*fp8e4nv", "weight_scale": "*fp32", **SIZES}


@pytest.mark.parametrize("arch,int4,fp8", [(80, r"\bHMMA", None), (90, r"\bHGMMA", r"\bQGMMA"), (100, r"\bUTCHMMA", r"\bUTCQMMA")])
def test_gemms_use_the_tensor_cores(arch, int4, fp8):
    """Every tile that the tuner may choose: no spill, 16-byte copies to shared memory or TMA, the tensor-core instruction."""
    kinds = [(kernels.int4_kernel, INT4, {"GROUP": 128}, kernels.INT4_TILES, int4)]
    if fp8:
        kinds.append((kernels.fp8_kernel, FP8, {}, kernels.FP8_TILES, fp8))
    for kernel, types, more, all_tiles, instruction in kinds:
        for bm, (bf, bd, warps, stages) in ((rows, tile) for rows, tiles in all_tiles.items() for tile in tiles):
            constants = {**more, "EXPERTS": 64, "BM": bm, "BF": bf, "BD": bd, "WIDE": False}
            usage, code = compiled(kernel, types, constants, arch, num_warps=warps, num_stages=stages)
            assert no_spills(usage), (kernel, bm, bf, usage)
            assert re.search(instruction, code), (kernel, bm, bf)
            assert re.search(r"LDGSTS\.E(\.\w+)*\.128|UTMALDG", code), (kernel, bm, bf)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_is_not_tuned_compiles_without_spills(arch):
    """int4 with groups other than 128, and the rounding of rows to fp8 where GPUs have it."""
    for group, bm in ((32, 16), (32, 64), (64, 16), (64, 64)):
        constants = {"GROUP": group, "EXPERTS": 64, "BM": bm, "BF": 64, "BD": group, "WIDE": False}
        usage, code = compiled(kernels.int4_kernel, INT4, constants, arch)
        assert no_spills(usage) and re.search(r"MMA", code), (group, bm, usage)
    if arch > 80:
        types = {"x": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", "D": "i32"}
        usage, code = compiled(kernels.quantise_kernel, types, {"BLOCK": 2048}, arch)
        assert no_spills(usage) and re.search(r"LDG\.E(\.\w+)*\.128", code), usage


def test_rows_moved_and_back_and_their_gradient():
    g = torch.Generator().manual_seed(0)
    x, there = torch.randn(7, 3, generator=g, requires_grad=True), torch.randperm(7, generator=g)
    back = torch.argsort(there)
    moved = kernels.move_rows(x, there, back)
    assert torch.equal(moved, x[there]) and torch.equal(kernels.move_rows(moved, back, there), x)
    weights = torch.randn(7, 3, generator=g)
    (ours,) = torch.autograd.grad((moved * weights).sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad((x[there] * weights).sum(), x)
    assert torch.equal(ours, theirs)


def test_assignments_are_counted_as_bincount_does():
    index_NK = torch.randint(0, 5, (40, 3), generator=torch.Generator().manual_seed(0))
    counts = kernels.count_assignments(index_NK, 7)
    assert torch.equal(counts, torch.bincount(index_NK.flatten(), minlength=7)) and counts.dtype == torch.int64
