"""One transformer layer: the two maps from config type to module are the only dispatch."""

from __future__ import annotations

from torch import Tensor, nn

from pyllama.batch import Packed
from pyllama.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, MoEConfig
from pyllama.layers.attention import GQA
from pyllama.layers.ffn import MLP, MoE, Routing
from pyllama.layers.mla import MLA
from pyllama.layers.norm import RMSNorm
from pyllama.layers.rope import Rotation

ATTENTIONS: dict[type, type[GQA] | type[MLA]] = {GQAConfig: GQA, MLAConfig: MLA}
FFNS: dict[type, type[MLP] | type[MoE]] = {MLPConfig: MLP, MoEConfig: MoE}


class Layer(nn.Module):
    def __init__(self, config: LayerConfig, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, norm_eps)
        self.attention = ATTENTIONS[type(config.attention)](config.attention, hidden_size, norm_eps)  # type: ignore[arg-type]  # by the maps' keys
        self.ffn_norm = RMSNorm(hidden_size, norm_eps)
        self.ffn = FFNS[type(config.ffn)](config.ffn, hidden_size)  # type: ignore[arg-type]

    def forward(
        self,
        x_TD: Tensor,
        batch: Packed,
        rotation: Rotation | None,
        kv_cache: Tensor | None,
        with_logits: bool,
    ) -> tuple[Tensor, Routing | None]:
        """The residual stream after this layer (without gradients in place), and the routing where it has experts."""
        x_TD = self.attention(x_TD, self.attention_norm, batch, rotation, kv_cache, self.ffn.first_large_weight)
        return self.ffn(x_TD, self.ffn_norm, with_logits, batch.counters)
