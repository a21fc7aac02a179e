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


def read_config(
    values: dict[str, Any], ignore_config_keys: Iterable[str] = (), file: str = "config.json"
) -> tuple[ModelConfig, WeightTable]:
    """What a configuration describes: its model, and the table by which its weights are read.

    values: config.json's content. ignore_config_keys: keys that count as absent; of an object within it by
    their path, as in "rope_scaling.factor". file: the name that errors give the configuration.
    Raises ConfigError for an unknown architecture, and for keys that are unknown, unsupported or malformed.
    """
    values, dialect = hugging_face_config(values, ignore_config_keys, file)
    family = find_family(values, file)
    reader = Reader(values, file)
    refuse_own_code(reader)
    config = family.read(reader)
    scales = read_quantization(reader)
    reader.finish()
    table = (family if dialect is None else dialect).weights(config)
    return config, table if scales is None else replace(table, scales=scales)


def hugging_face_config(
    values: dict[str, Any], ignore_config_keys: Iterable[str] = (), file: str = "config.json"
) -> tuple[dict[str, Any], Dialect | None]:
    """The config.json of a family for one in its publisher's own keys, and its dialect; any other as it is, without
    the ignored keys."""
    if isinstance(ignore_config_keys, str):
        raise TypeError(f"ignore_config_keys must be a collection of keys, as in [{ignore_config_keys!r}]")
    values = _without(values, frozenset(ignore_config_keys))
    names = values.get("architectures") or []
    matching = [d for d in DIALECTS if d.keys <= values.keys() and names in ([], [d.architecture])]
    if not matching:
        return values, None
    dialect = max(matching, key=lambda dialect: len(dialect.keys))
    reader = Reader(values, file)
    translated = dialect.translate(reader)
    reader.finish()
    return translated, dialect


def _without(values: dict[str, Any], ignored: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """The values without the ignored keys; objects are entered only where one of their keys is ignored."""
    return {
        key: _without(value, ignored, f"{prefix}{key}.")
        if isinstance(value, dict) and any(path.startswith(f"{prefix}{key}.") for path in ignored)
        else value
        for key, value in values.items()
        if prefix + key not in ignored
    }


def find_family(values: dict[str, Any], file: str = "config.json") -> Family:
    """The family that config.json's "architectures" names; ConfigError where it is none of these."""
    names = values.get("architectures")
    family = FAMILIES.get(str(names[0])) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{file}: architectures = {names!r} is not known; known: {known}")
    return family
