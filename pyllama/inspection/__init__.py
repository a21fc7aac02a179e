"""`pyllama inspect`: what a checkpoint consists of, from its headers and its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyllama.architectures.reader import ConfigError
from pyllama.bench.work import active_parameters, token_flops
from pyllama.cache import PAGE_SIZE, bytes_per_page
from pyllama.checkpoint import DTYPES, Checkpoint
from pyllama.config import GQAConfig
from pyllama.files import CheckpointError
from pyllama.inspection.headers import open_headers
from pyllama.inspection.structure import Run, structure_of
from pyllama.inspection.tree import Node, tree_of
from pyllama.loader import empty_model, read_folder
from pyllama.weights import plan


@dataclass(frozen=True)
class ModelFacts:
    """What follows from the configuration of a model that pyllama runs."""

    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    dtype: str  # of most of the weights
    parameters: int  # that it computes with
    active_parameters: int  # of them, those that serve one token: all but the experts that it does not choose
    embedding_parameters: int
    tied: bool  # the head is the embedding
    cache_bytes_per_token: int  # in `dtype`
    flops_per_token: int  # of a new token, in products with weights, the head's included
    flops_per_token_seen: int  # and in attention, for each token that it sees
    windows: int  # layers that see no further than a window
    structure: tuple[Run, ...]  # all layers, in order


@dataclass(frozen=True)
class Inspection:
    source: str
    files: int
    tensors: int
    dtypes: dict[str, int]  # bytes by data type
    root: Node
    model: ModelFacts | None
    problem: str | None  # why there are no facts of a model


def inspect(source: str | Path, ignore_config_keys: Iterable[str] = ()) -> Inspection:
    """Reads headers and configuration of a checkpoint; no weights.

    source: a folder, a file of weights (*.safetensors, or *.bin, *.pth, *.pt that hold nothing but tensors), a Hub id
    (of a repository with safetensors, of whose weights the headers alone are fetched), or "demo". It need not be a
    model that pyllama runs. Tensors that share memory in a file of torch.save count each; of files for each rank every
    piece counts. ignore_config_keys: as in `load`. Raises FileNotFoundError and CheckpointError as `load` does.
    """
    folder, checkpoint = open_headers(source)
    tensors = checkpoint.tensors
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.bytes
    model, problem = None, None
    try:
        model = _facts(folder, checkpoint, ignore_config_keys)
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        problem = str(error)
    files = {file for info in tensors.values() for file in info.files}
    return Inspection(str(source), len(files), len(tensors), dtypes, tree_of(tensors), model, problem)


def _facts(folder: Path, checkpoint: Checkpoint, ignore_config_keys: Iterable[str]) -> ModelFacts:
    _, config, table = read_folder(folder, ignore_config_keys)
    model = empty_model(config, len(checkpoint.tensors))
    parameters = dict(model.named_parameters())
    plan(table, {name: parameter.shape for name, parameter in parameters.items()}, checkpoint.tensors)
    dtype = checkpoint.dtype
    per_token, per_token_seen = token_flops(model)
    attentions = [layer.attention for layer in config.layers]
    return ModelFacts(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=len(config.layers),
        max_positions=config.max_positions,
        dtype=next(name for name, known in DTYPES.items() if known == dtype),
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        active_parameters=round(active_parameters(model)),
        embedding_parameters=model.embedding.weight.numel(),
        tied=config.tie_embeddings,
        cache_bytes_per_token=bytes_per_page(config, dtype) // PAGE_SIZE,
        flops_per_token=per_token,
        flops_per_token_seen=per_token_seen,
        windows=sum(isinstance(a, GQAConfig) and a.window is not None for a in attentions),
        structure=structure_of(model),
    )
