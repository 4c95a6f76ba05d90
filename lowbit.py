"""Numbers of 4 and 8 bits, and a Compass made of them: what quantize.py writes and generate.py runs (v2 §6.3; v3's FP8).

int4: whole numbers 0..15, two to a byte, with one scale and one zero for each group of inputs. fp8: e4m3 numbers with one scale for each
output; activations are rounded to e4m3 as well, with one scale for each token. Router, head, embedding, norms and MTP blocks are
ordinary tensors.

Shapes: E matrices in one tensor (a layer's experts; 1 for a plain linear layer), F outputs, D inputs, J = D / group, R rows sorted by
expert, N rows of one matrix.

    python lowbit.py      # a matrix rounded in both ways: bytes and error
"""

import torch
import torch.nn.functional as F
from torch import nn

import cli
from cli import InputError
from compass import Compass, CompassConfig
from kernels import count_assignments, dequantize_int4, fp8_grouped_matmul, int4_grouped_matmul, quantise_rows, unpack_int4
from moe import MoE

UNPACK = 64  # above so many rows of one matrix, dequantising it is cheaper than torch's int4 product on a CPU
# what torch asks before it hands bf16 products to oneDNN; on other CPUs (no AVX-512) its own take up to seven times as long as fp32's
FAST_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quantize_int4(weight, group_size, clip=1.0):
    """Asymmetric int4 with one scale and zero a group: w = (q - zero) * scale within scale / 2, where nothing is clipped.

    weight (..., out, in) -> qweight uint8 (..., out, in / 2), low nibble first; scales (numbers that bf16 holds) and zeros (whole, 0..15),
    both fp32 (..., out, in / group). clip multiplies each group's range, a number or (..., out, in / group). Raises InputError
    where the group does not divide the inputs or a weight is not finite.
    """
    if weight.shape[-1] % 2 or group_size < 1 or weight.shape[-1] % group_size:
        raise InputError(f"int4: groups of {group_size} do not divide {weight.shape[-1]} inputs, or these are odd")
    if not weight.isfinite().all():
        raise InputError("int4: the weight is not finite: the checkpoint is damaged or training diverged")
    grouped = weight.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1).clamp(max=0) * clip, grouped.amax(-1).clamp(min=0) * clip  # zero is always in range
    scales = torch.where(high > low, ((high - low) / 15).clamp(min=1e-30), 1.0).contiguous()
    # up to the next number that bf16 holds: they are stored in it, and one rounded down would cut the range
    scales = ((scales.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    zeros = (-low / scales).round()
    q = (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    return tuple(tensor.contiguous() for tensor in (q[..., 0::2] | q[..., 1::2] << 4, scales, zeros))  # of a transposed weight, too


def quantize_fp8(weight):
    """weight (..., out, in) -> (e4m3 (..., out, in), fp32 scale (..., out)), each output's largest weight at e4m3's 448.

    Raises InputError where a weight is not finite.
    """
    if not weight.isfinite().all():
        raise InputError("fp8: the weight is not finite: the checkpoint is damaged or training diverged")
    return quantise_rows(weight)


def dequantize_fp8(weight_fp8, scale):
    """weight_fp8 * scale, (..., out, in), fp32."""
    return weight_fp8.float() * scale.unsqueeze(-1)


def bf16_product(x_RD, weight_FD):
    """x times weight transposed, both bf16, on a CPU: in fp32 where bf16 is slow; one row by torch.mv, which reads twice as fast."""
    if len(x_RD) == 1:
        return (weight_FD @ x_RD[0])[None]
    return x_RD @ weight_FD.T if FAST_BF16 else x_RD.float() @ weight_FD.float().T


class LowBitLinear(nn.Module):
    """E quantized matrices. forward: x (R, D) sorted by expert with counts_E -> (R, F); without counts, where E is 1, any (N, ..., D).

    input_scale (E, D) bf16 multiplies each expert's rows first; None scales nothing.
    """

    def __init__(self, input_scale, **tensors):
        super().__init__()
        for name, tensor in (*tensors.items(), ("input_scale", input_scale)):
            self.register_buffer(name, tensor)

    def forward(self, x, counts_E=None):
        rows, scale = x.reshape(-1, x.shape[-1]).contiguous(), self.input_scale
        if counts_E is None:  # all rows are the one matrix's
            counts_E = torch.full((1,), len(rows), device=x.device)
        if scale is not None:
            scale = scale.repeat_interleave(counts_E, 0, output_size=len(rows)) if len(scale) > 1 else scale
            rows = rows * scale.to(x.dtype)
        return self.multiply(rows, counts_E).to(x.dtype).unflatten(0, x.shape[:-1])


class Int4Linear(LowBitLinear):
    """int4 matrices, W4A16: qweight (E, F, D/2) uint8, scales (E, F, J) bf16, zeros (E, F, J) uint8.

    On a GPU kernels.int4_grouped_matmul; on a CPU its eager twin, or after `pack` torch's int4 product in bf16, which reads half
    a byte a weight.
    """

    def __init__(self, qweight, scales, zeros, input_scale=None):
        super().__init__(input_scale, qweight=qweight, scales=scales, zeros=zeros)
        self.packed = None

    def pack(self):
        """Make torch's CPU layout beside ours (w = (q - 8) * scale + offset), where it takes such groups and widths."""
        D, self.group = 2 * self.qweight.shape[2], 2 * self.qweight.shape[2] // self.scales.shape[2]
        if self.group in (32, 64, 128, 256) and self.qweight.shape[1] % 16 == 0 and D % 32 == 0:
            offsets, convert = (8 - self.zeros.float()) * self.scales.float(), torch.ops.aten._convert_weight_to_int4pack_for_cpu
            tables = torch.stack((self.scales.float().mT, offsets.mT), -1).bfloat16()
            self.packed = [(convert(unpack_int4(q).int(), 2), table) for q, table in zip(self.qweight, tables, strict=True)]

    def _multiply_packed(self, x_ND, e):
        if len(x_ND) > UNPACK:
            return bf16_product(x_ND, dequantize_int4(self.qweight[e], self.scales[e], self.zeros[e]))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_ND, self.packed[e][0], self.group, self.packed[e][1])

    def multiply(self, rows, counts_E):
        if self.packed is None:
            return int4_grouped_matmul(rows, self.qweight, self.scales, self.zeros, counts_E)
        rows = rows.bfloat16()
        if len(self.packed) == 1:
            return self._multiply_packed(rows, 0)
        parts = enumerate(rows.split(counts_E.tolist()))
        return torch.cat([self._multiply_packed(x_ND, e) for e, x_ND in parts if len(x_ND)])


class FP8Linear(LowBitLinear):
    """e4m3 matrices, W8A8: weight_fp8 (E, F, D), weight_scale (E, F) fp32.

    kernels.fp8_grouped_matmul on a GPU, its eager twin on a CPU. `pack` widens the weights to bf16, which holds every e4m3 number, so
    the products stay those of fp8 and at most the sums are rounded to bf16: CPUs have no fp8 instruction.
    """

    def __init__(self, weight_fp8, weight_scale, input_scale=None):
        super().__init__(input_scale, weight_fp8=weight_fp8, weight_scale=weight_scale)

    def pack(self):
        self.weight_fp8 = self.weight_fp8.bfloat16()

    def multiply(self, rows, counts_E):
        if self.weight_fp8.dtype == torch.float8_e4m3fn:
            return fp8_grouped_matmul(rows, self.weight_fp8, self.weight_scale, counts_E)
        x_fp8_RD, scale_R = quantise_rows(rows)
        parts = enumerate(x_fp8_RD.bfloat16().split(counts_E.tolist()))
        y = torch.cat([bf16_product(x_ND, self.weight_fp8[e]) * self.weight_scale[e] for e, x_ND in parts if len(x_ND)])
        return y * scale_R.unsqueeze(-1)


class QuantizedMoE(MoE):
    """The MoE layer with its router and shared experts; gate_up and down, a LowBitLinear each, replace the routed experts' tensors."""

    def __init__(self, moe):
        nn.Module.__init__(self)
        self.top_k, self.n_experts, self.router, self.shared = moe.top_k, moe.n_experts, moe.router, moe.shared

    def all_are_read(self, N):
        return False  # quantized products take rows sorted by expert

    def experts(self, x_RD, counts_E):
        gate_RF, up_RF = self.gate_up(x_RD, counts_E).chunk(2, dim=-1)
        return self.down(F.silu(gate_RF) * up_RF, counts_E)

    def one_token(self, x_1D, weights_1K, index_1K):
        index_1K, order_1K = index_1K.sort()
        y_KD = self.experts(x_1D.repeat(self.top_k, 1), count_assignments(index_1K, self.n_experts))
        return weights_1K.gather(1, order_1K).to(y_KD.dtype) @ y_KD


def matrices(config):
    """{module name: (E, F, D)} of everything that is quantized."""
    c, sizes = config, {}
    for i in range(c.n_layers):
        attention, moe = f"blocks.{i}.attention", f"blocks.{i}.feed_forward"
        sizes[f"{attention}.qkv"] = (1, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.dim)
        sizes[f"{attention}.out"] = (1, c.dim, c.n_heads * c.head_dim)
        for name, E, width in ((moe, c.n_experts, c.expert_dim), (f"{moe}.shared", 1, c.n_shared * c.expert_dim)):
            if width:
                sizes[f"{name}.gate_up"], sizes[f"{name}.down"] = (E, 2 * width, c.dim), (E, c.dim, width)
    return sizes


def with_quantized(config, weights, tensors):
    """A Compass in eval mode: `weights` maps the names of `matrices` to Int4Linear or FP8Linear, `tensors` the other names to tensors."""
    with torch.device("meta"):
        model = Compass(config)
    for block in model.blocks:
        block.feed_forward = QuantizedMoE(block.feed_forward)
    for name, module in weights.items():
        model.set_submodule(name, module)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if wrong := shapes.keys() ^ tensors.keys():
        raise InputError(f"quantized checkpoint: tensor {min(wrong)} is missing or foreign")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise InputError(f"quantized checkpoint: tensor {name} has shape {tuple(tensor.shape)}, need {tuple(shapes[name])}")
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def load_quantized(state, device="cpu"):
    """The model of a checkpoint dict that quantize.py wrote, in eval mode, on a CPU packed. Raises InputError naming what does not fit."""
    config, tensors, weights = CompassConfig(**state["config"]), dict(state["model"]), {}
    for name, (E, out, inner) in matrices(config).items():
        found = {key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key.rpartition(".")[0] == name}
        groups = max([1, *found["scales"].shape[-1:]]) if "scales" in found else 1
        needed = {
            "qweight": (torch.uint8, (E, out, inner // 2)), "zeros": (torch.uint8, (E, out, groups)),
            "scales": (torch.bfloat16, (E, out, groups)),
            "weight_fp8": (torch.float8_e4m3fn, (E, out, inner)), "weight_scale": (torch.float32, (E, out)),
            "input_scale": (torch.bfloat16, (E, inner)),
        }  # fmt: skip
        kind, parts = (Int4Linear, {"qweight", "scales", "zeros"}) if "qweight" in found else (FP8Linear, {"weight_fp8", "weight_scale"})
        if set(found) - {"input_scale"} != parts or inner % groups:
            raise InputError(f"quantized checkpoint: {name} holds {', '.join(sorted(found)) or 'nothing'}")
        for key, tensor in found.items():
            (dtype, shape), what = needed[key], f"quantized checkpoint: tensor {name}.{key}"
            if tensor.shape != shape:
                raise InputError(f"{what} has shape {tuple(tensor.shape)}, need {shape}")
            if tensor.dtype != dtype:
                raise InputError(f"{what} is of {tensor.dtype}, need {dtype}")
            if key == "zeros" and tensor.max() > 15 or key.endswith(("scale", "scales")) and not tensor.isfinite().all():
                raise InputError(f"{what} holds what quantize.py never writes: a zero above 15, or a scale that is not finite")
        weights[name] = kind(**found)
    model = with_quantized(config, weights, {name: tensor.float() for name, tensor in tensors.items()}).to(device)
    if torch.device(device).type == "cpu":
        pack(model)
    return model


def pack(model):
    """Bring every quantized matrix into the form that is fastest on a CPU."""
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            module.pack()


def main():
    cli.parse(__doc__)
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for name, tensors, back in (
        ("int4, groups of 128", quantize_int4(weight, 128), dequantize_int4),
        ("int4, groups of 32", quantize_int4(weight, 32), dequantize_int4),
        ("fp8", quantize_fp8(weight), dequantize_fp8),
    ):
        error = (back(*tensors) - weight).norm() / weight.norm()
        print(f"{name}: {8 * tensors[0].nbytes / weight.numel():.0f} bits a weight and scales, error {100 * error:.2f} % of normal weights")


if __name__ == "__main__":
    cli.run(main)
