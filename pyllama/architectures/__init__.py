"""The families of checkpoints that are read, as data: how a config.json becomes a `ModelConfig`, and which
tensors become which parameters. Each module of this folder that defines `FAMILY` is one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from pyllama.architectures.common import Dialect, Family, read_quantization, refuse_own_code
from pyllama.architectures.reader import ConfigError, Reader
from pyllama.config import ModelConfig
from pyllama.weights import WeightTable

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FAMILIES: dict[str, Family] = {
    architecture: module.FAMILY
    for module in _modules
    if hasattr(module, "FAMILY")
    for architecture in module.FAMILY.architectures
}
DIALECTS: list[Dialect] = [module.DIALECT for module in _modules if hasattr(module, "DIALECT")]


def read_config(values: dict[str, Any], ignore_config_keys: Iterable[str] = ()) -> tuple[ModelConfig, WeightTable]:
    """What a config.json describes: its model, and the table by which its weights are read.

    values: config.json's content. ignore_config_keys: keys that count as absent; of an object within it by
    their path, as in "rope_scaling.factor".
    Raises ConfigError for an unknown architecture, and for keys that are unknown, unsupported or malformed.
    """
    values, dialect = hugging_face_config(values, ignore_config_keys)
    family = _family(values)
    reader = Reader(values, ignore_config_keys)
    refuse_own_code(reader)
    config = family.read(reader)
    scales = read_quantization(reader)
    reader.finish()
    table = (family if dialect is None else dialect).weights(config)
    return config, table if scales is None else replace(table, scales=scales)


def hugging_face_config(
    values: dict[str, Any], ignore_config_keys: Iterable[str] = ()
) -> tuple[dict[str, Any], Dialect | None]:
    """The config.json of a family for one in its publisher's own keys, and its dialect; any other as it is."""
    if isinstance(ignore_config_keys, str):
        raise TypeError(f"ignore_config_keys must be a collection of keys, as in [{ignore_config_keys!r}]")
    if values.get("architectures"):
        return values, None
    dialect = next((dialect for dialect in DIALECTS if dialect.keys <= values.keys()), None)
    if dialect is None:
        return values, None
    reader = Reader(values, ignore_config_keys)
    translated = dialect.translate(reader)
    reader.finish()
    return translated, dialect


def _family(values: dict[str, Any]) -> Family:
    names = values.get("architectures")
    family = FAMILIES.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"config.json: architectures = {names!r} is not known; known: {known}")
    return family
