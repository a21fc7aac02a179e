"""From a folder or a Hub id to a model that is ready to run: `pyllama.load`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch.overrides import TorchFunctionMode

from pyllama import _C
from pyllama.architectures import hugging_face_config, read_config
from pyllama.architectures.reader import ConfigError, read_json
from pyllama.cache import free_memory
from pyllama.checkpoint import MODEL_DTYPES, Checkpoint, parse_dtype
from pyllama.config import ModelConfig, MoEConfig
from pyllama.files import CheckpointError, expanded
from pyllama.model import Model
from pyllama.ops.registry import OPS, implementation
from pyllama.progress import progress_bar
from pyllama.save import Origin
from pyllama.tokenizer import Tokenizer
from pyllama.transfer import copy_weights, mapped_weights
from pyllama.weights import WeightTable, check_tied, plan

CONFIG_FILES = ["*.json", "*.jinja"]
# The first of these patterns that a repository has files for; further ones are the same weights again.
WEIGHT_FILES = ["model*.safetensors", "*.safetensors", "pytorch_model*.bin", "consolidated.*.pth", "*.bin", "*.pt*"]
OTHER_FILES = ["*/*"]  # whatever lies in folders


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ignore_config_keys: Iterable[str] = (),
) -> Model:
    """Loads a checkpoint in Hugging Face's layout (config.json, weights, tokenizer.json) or Meta's (params.json).

    Weights are *.safetensors, or else files of torch.save (*.bin, *.pth, *.pt) that hold nothing but tensors.

    source: a folder, a Hub id ("mistralai/Mistral-7B-v0.1", downloaded once), or "demo", the little model
    that comes with the package. device: None is the GPU where there is one, else the CPU. dtype: "float32",
    "bfloat16", "float16" or "float64"; None is the checkpoint's own on a GPU, and float32 on a CPU, where it
    is the fastest, unless only the checkpoint's own fits the free memory. ignore_config_keys: keys of
    config.json to treat as absent; the error that refuses a key says so where it may help.

    On a CPU, weights that a safetensors file holds as they are wanted are mapped, not copied: what is written to them
    stays in memory, but until the model is gone its files must not be cut or written to (replacing them is fine).

    Returns the model for inference (`eval()`), with its tokenizer (None where the checkpoint has none) and
    all its EOS ids. Raises FileNotFoundError for a source that is not there, ConfigError for a configuration
    that is not understood, CheckpointError for damaged files and for tensors that are not the model's (both
    are ValueErrors), MemoryError when the weights do not fit.
    """
    target = target_device(device)
    chosen = parse_dtype(dtype)
    check_kernels_take(chosen, target)
    folder = find_folder(source, ignore_config_keys)
    values, config, table = read_folder(folder, ignore_config_keys)
    model = _load_weights(folder, config, table, target, chosen)
    model.origin = Origin(values, folder.resolve())
    model.tokenizer = Tokenizer.from_folder(folder)
    model.eos_token_ids = _eos_token_ids(folder, model.tokenizer)
    return model.eval()


def find_folder(source: str | Path, ignore_config_keys: Iterable[str]) -> Path:
    """The checkpoint's folder, downloaded where `source` is a Hub id; not if its config.json cannot be read."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    folder = download(str(source), CONFIG_FILES)
    if (folder / "config.json").is_file():
        read_folder(folder, ignore_config_keys)
    return _download_weights(str(source))


def read_folder(folder: Path, ignore_config_keys: Iterable[str]) -> tuple[dict[str, Any], ModelConfig, WeightTable]:
    """The folder's configuration as a family's config.json would have it, the model, the table of its tensors."""
    given, file = _config_values(folder)
    try:
        values, _ = hugging_face_config(given, ignore_config_keys, file)
        return values, *read_config(given, ignore_config_keys, file)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def _config_values(folder: Path) -> tuple[dict[str, Any], str]:
    """What config.json says, or without one Meta's params.json; and which of them it was."""
    values = read_json(folder / "config.json")
    if values is not None:
        return values, "config.json"
    values = read_json(folder / "params.json")
    if values is None:
        raise FileNotFoundError(
            f"{folder} has no config.json, so it is not a checkpoint in Hugging Face's layout, and no params.json, "
            "so it is not one in Meta's"
        )
    if values.get("vocab_size", -1) == -1:  # Llama 1 and 2 leave it to their tokenizer
        with Checkpoint.open(folder, headers_only=True) as checkpoint:
            embedding = checkpoint.tensors.get("tok_embeddings.weight")
        if embedding is not None:  # in pieces of dimensions; those of tokens came with Llama 3, which says the size
            values["vocab_size"] = embedding.shape[0]
    return values, "params.json"


def _load_weights(
    folder: Path, config: ModelConfig, table: WeightTable, device: torch.device, dtype: torch.dtype | None
) -> Model:
    with Checkpoint.open(folder) as checkpoint:
        model = empty_model(config, len(checkpoint.tensors))
        parameters = dict(model.named_parameters())
        parts = plan(table, {n: p.shape for n, p in parameters.items()}, checkpoint.tensors)
        count = sum(parameter.numel() for parameter in parameters.values())
        dtype = _fitting_dtype(dtype, checkpoint.dtype, count, device)
        check_kernels_take(dtype, device)
        check_tied(table, parts, checkpoint)
        dtypes = parameter_dtypes(model, dtype)
        mapped = mapped_weights(parts, dtypes, checkpoint) if device.type == "cpu" else {}
        # Memory is reserved here but taken only as tensors arrive in it, so nothing is held twice.
        rest = [name for name in parameters if name not in mapped]
        rest_parts = {n: parts[n] for n in rest}
        total = sum(checkpoint.tensors[part.tensor].bytes for found in rest_parts.values() for part in found)
        try:
            copied = {n: torch.empty(parameters[n].shape, dtype=dtypes[n], device=device) for n in rest}
            with progress_bar("loading", total) as advance:
                copy_weights(rest_parts, copied, checkpoint, advance)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{count:,} parameters in {dtype} need {_gigabytes(count * dtype.itemsize)}, and what converting them "
                f"takes beside is not free on {device}; load them in another dtype or on another device"
            ) from error
    model.load_state_dict(copied | mapped, assign=True)
    return model


def parameter_dtypes(model: Model, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of a model that is loaded in `dtype`. What no gradient trains decides who is chosen (correction biases), and
    stays float32."""
    wider = max(dtype, torch.float32, key=_size)
    return {name: dtype if parameter.requires_grad else wider for name, parameter in model.named_parameters()}


def check_tensors(config: ModelConfig, tensors: int) -> None:
    """Holds a model's size against how many tensors its files have."""
    experts = sum(layer.ffn.num_experts for layer in config.layers if isinstance(layer.ffn, MoEConfig))
    if len(config.layers) + experts > tensors:  # each is one tensor at least
        raise CheckpointError(
            f"config.json describes {len(config.layers)} layers and in them {experts} experts, "
            f"but the files hold only {tensors} tensors"
        )


def empty_model(config: ModelConfig, tensors: int) -> Model:
    """The model without memory. A mistaken size must not take minutes, so it is held against the files first."""
    check_tensors(config, tensors)
    try:
        with torch.device("meta"), _NoRandomWeights():
            return Model(config)
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise ConfigError(f"config.json describes a tensor too large for any memory: {error}") from error


class _NoRandomWeights(TorchFunctionMode):
    """Skips the random initialisation of modules: on `meta` it does nothing, after seconds of imports."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def _eos_token_ids(folder: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Every EOS id that the checkpoint's files name; each of them ends a text."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        values = read_json(folder / name) or {}
        ids = values.get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if any(type(token) is not int or token < 0 for token in ids):
            raise ConfigError(f"{folder / name}: eos_token_id must be a token id or a list of them, got {ids!r}")
        found.update(ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)


def local_folder(source: str | Path) -> Path | None:
    """The folder that `source` names; None where it can only be a Hub id."""
    if source == "demo":
        return Path(str(files("pyllama") / "demo"))
    if source == "":
        raise FileNotFoundError("source is empty; give a folder, a Hub id or 'demo'")
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{source} is a file; give the folder that holds config.json and the weights")
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise FileNotFoundError(f"there is no folder {source} (and a Hub id has the form owner/name)")
    return None


def download(repo: str, patterns: list[str]) -> Path:
    """The folder that has those files of a Hub repository. Raises FileNotFoundError where it is not to be had."""
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=OTHER_FILES))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo} is a gated repository: ask for access on its page of the Hugging Face Hub, then log in "
            "here (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is neither a folder {repo} nor a repository of this name on the Hugging Face Hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"there is no folder {repo}, and the Hugging Face Hub cannot be reached for a repository of this name; "
            f"offline, give a folder that holds the checkpoint ({reason})"
        ) from error


def _download_weights(repo: str) -> Path:
    for pattern in WEIGHT_FILES:
        folder = download(repo, [*CONFIG_FILES, pattern])
        if any(folder.glob(pattern)):
            break
    return folder


def parse_device(device: torch.device | str) -> torch.device:
    """A device that models run on, whether it is here or not. Raises ValueError for any other."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a CPU or a CUDA device, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {chosen}")
    return chosen


def target_device(device: torch.device | str | None) -> torch.device:
    """The device to load onto. Says once where ops have no kernel for it, and so will be slow."""
    chosen = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, but torch {torch.__version__} finds no CUDA GPU; use device='cpu'")
    major, minor = torch.cuda.get_device_capability(chosen)
    if not _C.supports(major, minor):
        _C.disable("CUDA")  # for every GPU of the process, as `pyllama.eager()` does
    eager = [name for name in OPS if implementation(name, chosen) == "eager"]
    if eager:
        warnings.warn(
            f"{len(eager)} of {len(OPS)} ops have no kernel for this GPU (sm_{major}{minor}) in this build "
            f"({', '.join(_C.architectures) or 'none'}) and run eagerly for this process, slower; "
            "`pyllama doctor` lists them",
            stacklevel=3,
        )
    return chosen


def check_kernels_take(dtype: torch.dtype | None, device: torch.device) -> None:
    """The compiled kernels refuse float64, so a model of that type could not run beside them."""
    if dtype == torch.float64 and device.type == "cuda" and any(implementation(op, device) == "cuda" for op in OPS):
        raise ValueError(
            "the CUDA kernels do not take float64: use dtype='float32', or load and run inside `with pyllama.eager():`"
        )


def configured_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """What config.json says of its weights; bfloat16, where that is none that they may have."""
    return MODEL_DTYPES.get(str(values.get("torch_dtype", values.get("dtype"))), torch.bfloat16)


def _fitting_dtype(dtype: torch.dtype | None, own: torch.dtype, parameters: int, device: torch.device) -> torch.dtype:
    """The data type to load in: the one asked for, or as `load` says. MemoryError when it does not fit."""
    free = free_memory(device)
    wanted = dtype or _suitable(own, device)
    dtype = dtype or default_dtype(own, parameters, device, free)
    if dtype != wanted:
        warnings.warn(
            f"weights in {wanted} need {_gigabytes(parameters * wanted.itemsize)}, {_gigabytes(free)} are "
            f"free: loading them as {dtype}, slower on a CPU",
            stacklevel=4,
        )
    if parameters * dtype.itemsize > free:
        raise MemoryError(
            f"{parameters:,} parameters in {dtype} need {_gigabytes(parameters * dtype.itemsize)}, and "
            f"{_gigabytes(free)} are free on {device}"
        )
    return dtype


def default_dtype(own: torch.dtype, parameters: int, device: torch.device, free: float) -> torch.dtype:
    """What suits the device, unless only the checkpoint's own type fits so many free bytes."""
    dtype = _suitable(own, device)
    return own if parameters * dtype.itemsize > free >= parameters * own.itemsize else dtype


def _suitable(own: torch.dtype, device: torch.device) -> torch.dtype:
    return own if device.type == "cuda" else max(own, torch.float32, key=_size)


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
