"""What the families of Qwen share."""

from __future__ import annotations

from collections.abc import Callable

from pyllama.architectures.common import read_windows
from pyllama.architectures.reader import Reader
from pyllama.config import GQAConfig


def read_qwen_windows(
    reader: Reader, attention: GQAConfig, layers: int, slides: Callable[[int, int], bool]
) -> list[GQAConfig]:
    """Each layer's attention, with a window where `use_sliding_window` is on; else `sliding_window` has no meaning.

    slides: whether a layer has it, by its index and `max_window_layers`, where no `layer_types` are given.
    """
    bound = reader.integer("max_window_layers", default=28, zero=True)
    if reader.boolean("use_sliding_window", default=False):
        window = reader.integer("sliding_window", default=4096, null=None)
        return read_windows(reader, attention, layers, window, lambda layer: slides(layer, bound))
    reader.anything("sliding_window")
    if "sliding_attention" in (reader.strings("layer_types", ("sliding_attention", "full_attention"), layers) or ()):
        raise reader.refusal("layer_types", "use_sliding_window is not true")
    return [attention] * layers
