"""DeepSeek-V2 and V3 in float64, written from their papers (arXiv:2405.04434, arXiv:2412.19437).

H heads, R rotated dimensions of a head, E experts.
"""

from __future__ import annotations

import math

import torch
from decoder import Decoder, half_turned
from torch import Tensor


class DeepseekDecoder(Decoder):
    def attention(self, x_TD: Tensor, i: int) -> Tensor:
        config, name = self.config, f"model.layers.{i}.self_attn."
        tokens, heads = len(x_TD), config["num_attention_heads"]
        plain, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"]:
            q = self.linear(
                self.latent_norm(self.linear(x_TD, name + "q_a_proj"), name + "q_a_layernorm"), name + "q_b_proj"
            )
        else:
            q = self.linear(x_TD, name + "q_proj")
        latent, shared_key = self.linear(x_TD, name + "kv_a_proj_with_mqa").split([config["kv_lora_rank"], rotated], -1)
        kv = self.linear(self.latent_norm(latent, name + "kv_a_layernorm"), name + "kv_b_proj").unflatten(
            -1, (heads, -1)
        )
        q = q.unflatten(-1, (heads, -1))
        cos, sin = self.angles(tokens, rotated)
        turned_q = self.turned(q[..., plain:], cos, sin)
        turned_key = self.turned(shared_key[:, None], cos, sin)[:, 0]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        out = []
        for head in range(heads):
            scores = q[:, head, :plain] @ kv[:, head, :plain].T + turned_q[:, head] @ turned_key.T
            weights = (scores * self.scale()).masked_fill(hidden, -math.inf).softmax(dim=-1)
            out.append(weights @ kv[:, head, plain:])
        return self.linear(torch.cat(out, dim=-1), name + "o_proj")

    def latent_norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * self.weights[name + ".weight"]

    def turned(self, z_THR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs (2j, 2j + 1) turned; V3's variant with `rope_interleave` false: (j, j + R / 2)."""
        if not self.config.get("rope_interleave", True):
            return half_turned(z_THR, cos, sin)
        a, b = z_THR[..., 0::2], z_THR[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    def scale(self) -> float:
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        growth = 0.1 * rope.get("mscale_all_dim", 0.0) * math.log(rope.get("factor", 1.0)) + 1  # YaRN's
        return growth**2 / math.sqrt(self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"])

    def routing(self, x_TD: Tensor, name: str) -> Tensor:
        """[T, E]: the weight of each expert. With a bias it is V3's router, else V2's."""
        config, bias_E = self.config, self.weights.get(name + "gate.e_score_correction_bias")
        logits_TE = self.linear(x_TD, name + "gate")
        scores_TE = logits_TE.softmax(dim=-1) if bias_E is None else logits_TE.sigmoid()
        weights_TE = torch.zeros_like(scores_TE)
        for token, scores_E in enumerate(scores_TE):
            worth, experts = (scores_E if bias_E is None else scores_E + bias_E).tolist(), range(len(scores_E))
            if bias_E is not None or config["topk_method"] == "group_limited_greedy":
                size, best = len(experts) // config["n_group"], 1 if bias_E is None else 2
                groups = [experts[first : first + size] for first in range(0, len(experts), size)]
                groups.sort(key=lambda group: -sum(sorted((worth[e] for e in group), reverse=True)[:best]))
                experts = [expert for group in groups[: config["topk_group"]] for expert in group]
            chosen = sorted(experts, key=lambda expert: -worth[expert])[: config["num_experts_per_tok"]]
            total = scores_E[chosen].sum() if bias_E is not None and config["norm_topk_prob"] else 1.0
            weights_TE[token, chosen] = scores_E[chosen] / total * config["routed_scaling_factor"]
        return weights_TE
