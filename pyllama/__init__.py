"""LLM inference with hand-written CUDA kernels: LLaMA and MoE models, and their ops one by one.

>>> model = pyllama.load("demo")
>>> print(pyllama.generate(model, "If the file"))
"""

from importlib.metadata import version

from pyllama.config import ModelConfig
from pyllama.generation import generate, stream
from pyllama.loader import load
from pyllama.model import LMOutput, Model
from pyllama.ops.registry import eager
from pyllama.sampling import SamplingParams
from pyllama.text import Chunk, Completion

__version__ = version("pyllama")
__all__ = [
    "Chunk",
    "Completion",
    "LMOutput",
    "Model",
    "ModelConfig",
    "SamplingParams",
    "eager",
    "generate",
    "load",
    "stream",
]
