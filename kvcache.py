"""The cache of keys and values: a row for each answer, a slot for each token, and prompts held once for all answers that share them.

Writing needs no order: a row's token at position p goes to its own slot whatever the other rows do, so rows of any length live side by
side, and what a row leaves behind is overwritten before it can be seen. Attention here is two products and a softmax, because a
decoding step has a query or two a row and reads all it holds: what counts is that each key is read once.

Shapes: L layers, B rows, T tokens, G key/value heads, H query heads, C head width, M slots, P tokens of a prefix,
X = B * G, Q = T * H / G queries that read the same keys, N = Q * the rows of a prefix.

    python kvcache.py      # bytes a token for every config
"""

import copy

import torch
import torch.nn.functional as F

import cli


class KVCache:
    """Keys and values of all layers, (L, B, G, M, C) each; with drafting the MTP blocks are layers too.

    Row b's token at position p sits in slot p - first[b]; first[b] > 0 where the tokens before it are a shared prefix: `shared` lists
    (prefix, rows), a prefix being a KVCache of one row. bytes = 2 * L * B * G * M * C * size of an element.
    """

    def __init__(self, config, rows, slots, device, dtype=torch.float32, drafting=False):
        layers = config.n_layers + (config.mtp_depth if drafting else 0)
        shape = (layers, rows, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.first_B, self.shared = torch.zeros(rows, dtype=torch.int64, device=device), []
        self.groups, self.per_group = config.n_kv_heads, config.n_heads // config.n_kv_heads

    @property
    def bytes(self):
        return 2 * self.k.numel() * self.k.element_size()

    def rows(self, n):
        """The first n rows, on the same memory."""
        view = copy.copy(self)
        view.k, view.v, view.first_B = self.k[:, :n], self.v[:, :n], self.first_B[:n]
        return view

    def prefix(self, row, length):
        """A copy of one row's first slots as a KVCache of its own."""
        kept = copy.copy(self)
        kept.k, kept.v = (x[:, row : row + 1, :, :length].clone() for x in (self.k, self.v))
        return kept

    def write(self, row, source, source_row, length):
        """Copy the first slots of a row of another cache (or of this one) into a row."""
        self.k[:, row, :, :length] = source.k[:, source_row, :, :length]
        self.v[:, row, :, :length] = source.v[:, source_row, :, :length]

    def advance(self, positions_BT):
        """Choose the slots of the next tokens. Each will see the slots up to its own, so neither padding nor leftovers are ever seen."""
        B, T = positions_BT.shape
        self.slots_BT = positions_BT - self.first_B.unsqueeze(1)
        self.used = int(self.slots_BT.max()) + 1
        self.row_B1 = torch.arange(B, device=positions_BT.device).unsqueeze(1)
        self.bias_XQM = None  # plainly causal: every row begins at slot 0
        if self.used > T or self.shared:
            hidden_BTM = torch.arange(self.used, device=positions_BT.device) > self.slots_BT.unsqueeze(-1)
            wide = torch.promote_types(self.k.dtype, torch.float32)  # of scores and softmax: in bf16 they would lose most
            bias_BTM = self.k.new_zeros(hidden_BTM.shape, dtype=wide).masked_fill_(hidden_BTM, -torch.inf)
            self.bias_XQM = bias_BTM[:, None, None].expand(B, self.groups, self.per_group, T, -1).reshape(B * self.groups, -1, self.used)

    def attend(self, layer, q_BHTC, k_BGTC, v_BGTC):
        """Store keys and values, and return the attention of the queries to all their row holds, (B, H, T, C)."""
        self.k[layer][self.row_B1, :, self.slots_BT] = k_BGTC.transpose(1, 2).to(self.k.dtype)
        self.v[layer][self.row_B1, :, self.slots_BT] = v_BGTC.transpose(1, 2).to(self.v.dtype)
        if self.bias_XQM is None:
            return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=True)
        (B, H, T, C), G = q_BHTC.shape, self.groups
        q_XQC = q_BHTC.reshape(B * G, -1, C).to(self.bias_XQM.dtype) * C**-0.5  # heads that share keys are so many more queries
        k_XMC, v_XMC = (x[layer, :, :, : self.used].flatten(0, 1) for x in (self.k, self.v))
        scores_XQM = torch.baddbmm(self.bias_XQM, q_XQC, k_XMC.to(q_XQC.dtype).transpose(1, 2))
        if self.shared:
            y_BGQC = self._attend_with_prefixes(layer, q_XQC.view(B, G, -1, C), scores_XQM, v_XMC)
        else:
            y_BGQC = scores_XQM.softmax(-1).to(v_XMC.dtype) @ v_XMC
        return y_BGQC.view(B, H, T, C).to(q_BHTC.dtype)

    def _attend_with_prefixes(self, layer, q_BGQC, scores_XQM, v_XMC):
        """One softmax over prefix and own slots. The queries of all rows that share a prefix read it in one product."""
        B, G, Q, C = q_BGQC.shape
        longest = max(prefix.k.shape[3] for prefix, _ in self.shared)
        before_BGQP = q_BGQC.new_full((B, G, Q, longest), -torch.inf)
        for prefix, rows in self.shared:
            q_GNC = q_BGQC[rows].transpose(0, 1).reshape(G, -1, C)
            scores_GNP = torch.bmm(q_GNC, prefix.k[layer, 0].to(q_GNC.dtype).transpose(1, 2))
            before_BGQP[rows, :, :, : prefix.k.shape[3]] = scores_GNP.unflatten(1, (-1, Q)).transpose(0, 1)
        probs_BGQM = torch.cat((before_BGQP, scores_XQM.view(B, G, Q, -1)), -1).softmax(-1).to(v_XMC.dtype)
        y_BGQC = torch.bmm(probs_BGQM[..., longest:].flatten(0, 1), v_XMC).view(B, G, Q, C)
        for prefix, rows in self.shared:
            P = prefix.k.shape[3]
            probs_GNP = probs_BGQM[rows, :, :, :P].transpose(0, 1).reshape(G, -1, P)
            y_BGQC[rows] += torch.bmm(probs_GNP, prefix.v[layer, 0]).unflatten(1, (-1, Q)).transpose(0, 1)
        return y_BGQC


def main():
    from compass import CONFIGS

    cli.parse(__doc__)
    for name, c in CONFIGS.items():
        one = KVCache(c, 1, 1, "meta", torch.bfloat16).bytes
        print(f"{name:8} {one / 1024:7.1f} KiB a token in bf16, {one * c.max_seq_len / 1e9:8.3f} GB a row of {c.max_seq_len} tokens")


if __name__ == "__main__":
    cli.run(main)
