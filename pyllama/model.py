"""The model: embedding, layers, norm, head. T tokens, B sequences, D hidden size, V vocabulary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyllama.balance import check_loads, count_, load_balancing_loss
from pyllama.batch import Batch, Packed
from pyllama.cache import PagedCache
from pyllama.config import ModelConfig, RopeConfig
from pyllama.layers.ffn import Routing
from pyllama.layers.layer import Layer
from pyllama.layers.linear import Linear, normed_argmax_, normed_product
from pyllama.layers.norm import RMSNorm
from pyllama.layers.rope import Rotation, cos_sin_table, table_rows
from pyllama.ops.embedding import embedding
from pyllama.ops.registry import cast, compute_dtype
from pyllama.save import Origin, save_model

if TYPE_CHECKING:
    from pyllama.tokenizer import Tokenizer


class LMOutput(NamedTuple):
    """What `model(token_ids, labels)` returns."""

    logits: Tensor  # [B, T, V]
    loss: Tensor  # cross entropy per predicted token, plus the weighted load-balancing loss
    aux_loss: Tensor | None  # the load-balancing loss, unweighted; None without MoE layers


class Model(nn.Module):
    """A language model as its `ModelConfig` says.

    `model(token_ids)` computes whole sequences and has gradients; `model.run` continues sequences over a
    paged cache and is for inference. The loader sets `tokenizer`, `eos_token_ids` and `origin`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.eos_token_ids: frozenset[int] = frozenset()
        self.origin: Origin | None = None  # what `save` writes beside the weights
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(layer, config.hidden_size, config.norm_eps) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        ropes = [layer.attention.rope for layer in config.layers]
        self._ropes = list(dict.fromkeys(ropes))  # most models have one
        self._rope_of = [self._ropes.index(rope) for rope in ropes]  # of each layer
        # Positions and table of each RoPE, derived from the config, grown as contexts need it.
        self._tables: dict[RopeConfig, tuple[int, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(
        self,
        token_ids: Tensor,
        labels: Tensor | None = None,
        *,
        num_labels: Tensor | float | None = None,
        loads: Tensor | None = None,
        balance_group: dist.ProcessGroup | None = None,
        activation_checkpointing: bool = False,
    ) -> Tensor | LMOutput:
        """Logits of whole sequences, and the training loss where `labels` are given.

        token_ids: integers [B, T]; labels: the same shape, the token ids themselves (they are shifted here),
        -100 where a token is not to be predicted. num_labels: what the sum over predicted tokens is divided by, for
        batches that come in parts (in data-parallel training: the mean number of a process); None: their number here.
        loads: int64 [M, B or 1, E], to which the experts' tokens are added (`balance.new_loads`). balance_group:
        processes whose experts' loads count together in the load-balancing loss. Padding counts in both, wherever
        labels are -100: pack sequences rather. activation_checkpointing: backward computes each layer again instead of
        keeping what is inside it. Returns logits [B, T, V], or an `LMOutput`. Dropout, where the configuration has
        some, is of `train()` and of passes with gradients alone.
        Raises ValueError for another shape or dtype, for more tokens than the context, for labels of no token.
        """
        if token_ids.ndim != 2 or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
            raise ValueError(f"token_ids must be integers [B, T], got {token_ids.dtype} {list(token_ids.shape)}")
        sequences, tokens = token_ids.shape
        if tokens > self.config.max_positions:
            raise ValueError(f"{tokens} tokens do not fit the context of {self.config.max_positions}")
        if labels is not None and labels.shape != token_ids.shape:
            raise ValueError(f"labels {list(labels.shape)} must have token_ids' shape {list(token_ids.shape)}")
        if labels is not None and (sequences == 0 or tokens < 2):
            raise ValueError(f"labels of {list(labels.shape)} have no token to predict: 2 tokens a sequence are needed")
        if loads is not None:
            check_loads(loads, self.config, sequences, token_ids.device)
        batch = Packed.rectangle(sequences, tokens, token_ids.device)
        flat_T = token_ids.flatten().to(torch.int64)
        x_TD, routings = self._hidden(flat_T, batch, None, loads, labels is not None, activation_checkpointing)
        logits = self._logits(x_TD).unflatten(0, (sequences, tokens))
        if labels is None:
            return logits
        next_labels = F.pad(labels[:, 1:].to(torch.int64), (0, 1), value=-100).flatten()  # logits stay whole: no copy
        flat = cast(logits.flatten(0, 1), compute_dtype(logits))
        loss = F.cross_entropy(flat, next_labels, reduction="mean" if num_labels is None else "sum")
        if num_labels is not None:
            loss = loss / num_labels
        aux_loss, coefficient = load_balancing_loss(routings, self.config, sequences, balance_group)
        return LMOutput(logits, loss if aux_loss is None else loss + coefficient * aux_loss, aux_loss)

    def run(self, token_ids: Tensor, batch: Batch, cache: PagedCache, loads: Tensor | None = None) -> Tensor:
        """Computes new tokens of cached sequences: integers [T] -> logits [B, V] of each one's last token.

        loads: as in `forward`, here and in `run_greedily`.
        """
        x_TD, _ = self._hidden(token_ids, batch, cache, loads)
        # With one token a sequence (decoding) every token is its sequence's last.
        one_each = batch.max_seqlen == 1 and len(x_TD) == len(batch.seq_lens)
        return self._logits(x_TD if one_each else x_TD[batch.cu_seqlens[1:] - 1])

    def run_greedily(self, token_ids: Tensor, batch: Batch, cache: PagedCache, loads: Tensor | None = None) -> None:
        """Computes one new token of each cached sequence, int64 [B], which its likeliest next one replaces in place."""
        x_BD, _ = self._hidden(token_ids, batch, cache, loads)
        normed_argmax_(token_ids, x_BD, self.norm, self._head_weight, batch.counters)

    def save(
        self, folder: str | Path, dtype: torch.dtype | str | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Writes the model as a checkpoint in Hugging Face's layout, which `pyllama.load` and transformers read.

        folder: is made, and must be empty if it is there; what is written appears in it when all is done. dtype,
        max_shard_size: as in `pyllama convert`. The tokenizer's files are copied from where the model was loaded.
        Of a model that FSDP2 has sharded, every process must call it, and the first one writes; of any other model one
        process alone. Raises ValueError for a model that was not loaded and has no `origin`, FileExistsError where
        something is in the folder, FileNotFoundError where the one it was loaded from is gone, OSError where the disk
        has no room, and RuntimeError in the processes that do not write where the one that does cannot.
        """
        for module in self.modules():
            if reshard := getattr(module, "reshard", None):  # FSDP2's: or parameters may be whole, and not the trained
                reshard()
        # torch.compile and checkpoint_wrapper put a level of their own around a layer.
        parameters = {
            re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module)\.", "", name): p for name, p in self.named_parameters()
        }
        save_model(self.config, parameters, self.origin, folder, dtype, max_shard_size)

    def _hidden(
        self,
        token_ids: Tensor,
        batch: Packed,
        cache: PagedCache | None,
        loads: Tensor | None = None,
        with_logits: bool = False,
        activation_checkpointing: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """The residual stream [T, D] after all layers, and their routings if logits or loads are asked for."""
        x_TD = embedding(self.embedding.weight, token_ids)
        routings: list[Routing] = []
        rotations = [self._rotation(rope, batch) for rope in self._ropes]
        for i, layer in enumerate(self.layers):
            kv_cache = None if cache is None else cache.layers[i]
            arguments = x_TD, batch, rotations[self._rope_of[i]], kv_cache, with_logits
            x_TD, routing = (
                checkpoint(layer, *arguments, use_reentrant=False) if activation_checkpointing else layer(*arguments)
            )
            if routing is not None and (with_logits or loads is not None):
                routings.append(routing)
        if loads is not None:
            count_(loads, torch.stack([routing.experts for routing in routings]), batch.sequences)
        return x_TD, routings

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _logits(self, x_TD: Tensor) -> Tensor:
        return normed_product(x_TD, self.norm, self._head_weight)

    def _rotation(self, rope: RopeConfig | None, batch: Packed) -> Rotation | None:
        """With a table of at least the batch's positions: a power of two, so that it seldom grows."""
        if rope is None:
            return None
        positions, table = self._tables.get(rope, (0, None))
        if table is None or positions < batch.max_positions or table.device != self.device:
            positions = 1 << max(batch.max_positions - 1, 255).bit_length()
            with torch.inference_mode(False):  # training may come after and use the same table
                table = cos_sin_table(rope, positions, self.device)
            self._tables[rope] = positions, table
        return Rotation(table, table_rows(rope, batch))
