"""The families of checkpoints that are read, as data: how a config.json becomes a `ModelConfig`, and which
tensors become which parameters. Each module of this folder that defines `FAMILY` is one."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from pyllama.architectures.common import Family
from pyllama.architectures.reader import ConfigError, Reader
from pyllama.config import ModelConfig

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FAMILIES: dict[str, Family] = {
    architecture: module.FAMILY
    for module in _modules
    if hasattr(module, "FAMILY")
    for architecture in module.FAMILY.architectures
}


def read_config(values: dict[str, Any], ignore_config_keys: Iterable[str] = ()) -> tuple[ModelConfig, Family]:
    """What a config.json describes: its model, and the family that reads its weights.

    values: config.json's content. ignore_config_keys: keys that count as absent; of an object within it by
    their path, as in "rope_scaling.factor".
    Raises ConfigError for an unknown architecture, and for keys that are unknown, unsupported or malformed.
    """
    if isinstance(ignore_config_keys, str):
        raise TypeError(f"ignore_config_keys must be a collection of keys, as in [{ignore_config_keys!r}]")
    names = values.get("architectures")
    family = FAMILIES.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"config.json: architectures = {names!r} is not known; known: {known}")
    reader = Reader(values, ignore_config_keys)
    config = family.read(reader)
    reader.finish()
    return config, family
