"""The headers of a checkpoint's files, wherever it is."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from pyllama.checkpoint import Checkpoint, Source, TensorInfo, check_header, read_nothing
from pyllama.files import CheckpointError, expanded, few, printable
from pyllama.loader import download, local_folder


def open_headers(source: str | Path) -> tuple[Path, Checkpoint]:
    """The folder with the configuration, and the checkpoint, of which nothing can be read.

    source: as for `inspect`. Raises FileNotFoundError and CheckpointError as `load` does.
    """
    path = expanded(source)
    if path.is_file():
        return path.parent, _headers(path)
    if (local := local_folder(source)) is not None:
        return local, _headers(local)
    folder = download(str(source), ["config.json", "params.json"])
    try:
        return folder, _headers(folder)  # where `load` has downloaded it
    except CheckpointError:
        return folder, _headers_of_hub(str(source), folder)


def _headers(path: Path) -> Checkpoint:
    with Checkpoint.open(path, headers_only=True) as checkpoint:
        return checkpoint


def _headers_of_hub(repo: str, folder: Path) -> Checkpoint:
    try:
        metadata = get_safetensors_metadata(repo)
        files: dict[str, Source] = {}
        tensors: dict[str, TensorInfo] = {}
        for file, content in metadata.files_metadata.items():
            header = {name: vars(info) for name, info in content.tensors.items()}
            check_header(header, None)
            if twice := header.keys() & tensors.keys():
                raise ValueError(f"{few(twice)} in {file} and in another file")
            tensors |= {n: TensorInfo((file,), tuple(info["shape"]), info["dtype"]) for n, info in header.items()}
            starts = {name: info["data_offsets"][0] for name, info in header.items()}  # in what follows the header
            files[file] = Source(folder / file, {}, read_nothing, offsets=starts)
    except NotASafetensorsRepoError as error:
        raise FileNotFoundError(
            f"{repo} has no model.safetensors and no index of such files, whose headers could be fetched alone: "
            "download its weights and give the folder"
        ) from error
    except (SafetensorsParsingError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the headers of {repo} are damaged: {printable(str(error))}") from error
    except Exception as error:  # of the network, whose libraries share no other class
        raise FileNotFoundError(f"the headers of {repo} cannot be fetched: {' '.join(str(error).split())}") from error
    return Checkpoint(folder, files, tensors)
