"""The model by itself: losses, gradients, RoPE tables and errors, against transformers and float64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pyllama.balance import new_loads, switch_loss
from pyllama.config import (
    GQAConfig,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from pyllama.layers.ffn import Routing
from pyllama.layers.rope import cos_sin_table
from pyllama.model import LMOutput, Model
from pyllama.sampling import SamplingParams
from pyllama.step import Decoding

ROPE = RopeConfig(theta=10000.0, dim=8)


ATTENTIONS = {
    "plain": GQAConfig(4, 2, 8, ROPE),
    "norm of heads": GQAConfig(4, 2, 8, ROPE, qk_norm="head"),
    "norm of all heads": GQAConfig(4, 2, 8, ROPE, qk_norm="whole", clip=0.9),
    "latent": MLAConfig(4, None, 10, 6, 4, ROPE, 0.3),
    "latent queries": MLAConfig(4, 12, 10, 6, 4, ROPE, 0.3, bias=True),
}
FFNS = {"dense": MLPConfig(24), "moe": MoEConfig(4, 2, 12, shared=MLPConfig(8), shared_gate=True, aux_loss_coef=0.1)}


def tiny(ffn: MLPConfig | MoEConfig, attention: str = "plain") -> Model:
    torch.manual_seed(0)
    layer = LayerConfig(ATTENTIONS[attention], ffn)
    return Model(ModelConfig(29, 16, 64, 1e-5, True, (layer, layer)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FFNS)
def test_every_gradient_is_the_numerical_one(ffn: str, attention: str) -> None:
    model = tiny(FFNS[ffn], attention).double()
    token_ids = torch.randint(0, 29, (2, 5))
    output = model(token_ids, token_ids)
    output.loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            direction = torch.randn_like(parameter)
            losses = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                losses.append(model(token_ids, token_ids).loss)
                parameter.sub_(direction, alpha=sign * 1e-6)
            numerical = (losses[0] - losses[1]) / 2e-6
            torch.testing.assert_close(numerical, (parameter.grad * direction).sum(), rtol=2e-3, atol=1e-6, msg=name)


def test_loss_is_shifted_and_skips_ignored_labels() -> None:
    model = tiny(FFNS["dense"])
    token_ids = torch.randint(0, 29, (2, 7))
    labels = token_ids.clone()
    labels[0, 3:] = -100
    output = model(token_ids, labels)
    assert isinstance(output, LMOutput)
    assert output.aux_loss is None
    log_probs = model(token_ids).double().log_softmax(-1)
    pairs = [(b, t) for b in range(2) for t in range(6) if not (b == 0 and t >= 2)]
    expected = -sum(log_probs[b, t, token_ids[b, t + 1]] for b, t in pairs) / len(pairs)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)


def test_load_balancing_loss_is_transformers() -> None:
    torch.manual_seed(1)
    logits = [torch.randn(9, 5), torch.randn(9, 5)]
    routings = [Routing(layer, layer.topk(2).indices.int()) for layer in logits]
    expected = load_balancing_loss_func(tuple(logits), num_experts=5, top_k=2)
    torch.testing.assert_close(switch_loss(routings, MoEConfig(5, 2, 8), 1, None), expected)


def test_loss_with_experts_is_cross_entropy_plus_weighted_balance() -> None:
    model = tiny(FFNS["moe"])
    token_ids = torch.randint(0, 29, (1, 8))
    logits, loss, aux_loss = model(token_ids, token_ids)
    cross_entropy = F.cross_entropy(logits[0, :-1], token_ids[0, 1:])
    torch.testing.assert_close(loss, cross_entropy + 0.1 * aux_loss)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "reference"),
    [
        (None, {"rope_type": "default"}),
        (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            Llama3Scaling(**LLAMA3, original_max_positions=128),
            {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 128},
        ),
        (
            YarnScaling(4.0, 256),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
        (
            YarnScaling(40.0, 300, beta_fast=16.0, beta_slow=2.0, truncate=False),
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 300,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        ),
    ],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_frequencies_are_transformers(
    scaling: RopeScaling | None, reference: dict[str, object], theta: float
) -> None:
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters={"rope_theta": theta, **reference})
    if scaling is None:
        frequencies = 1.0 / theta ** (torch.arange(0, 64, 2).float() / 64)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[str(reference["rope_type"])](config, torch.device("cpu"))
    table = cos_sin_table(RopeConfig(theta, 64, scaling=scaling), 1000, torch.device("cpu"))
    angles = torch.arange(1000).float()[:, None] * frequencies
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), -1), rtol=0, atol=1e-6)
    exact = [math.cos(p * f) for p, f in zip((1, 10, 999), frequencies[[0, 3, 31]].tolist(), strict=True)]
    assert table[[1, 10, 999], [0, 3, 31]].tolist() == pytest.approx(exact, abs=1e-4)


def test_long_rope_has_both_factors_of_each_position() -> None:
    short, long = [tuple(torch.linspace(1, last, 16).tolist()) for last in (1.5, 40.0)]
    rope = RopeConfig(10000.0, 32, scaling=LongRopeScaling(short, long, 4096), magnitude=1.25)
    table = cos_sin_table(rope, 9000, torch.device("cpu")).unflatten(0, (9000, 2))
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    parameters |= {"original_max_position_embeddings": 4096}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    for which, length in enumerate((4096, 4097)):
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
        angles = torch.arange(9000).float()[:, None] * frequencies
        expected = torch.cat((angles.cos(), angles.sin()), -1) * 1.25
        torch.testing.assert_close(table[:, which], expected, rtol=0, atol=1e-6)


def test_training_after_generation() -> None:
    model = tiny(FFNS["moe"])
    token_ids = torch.randint(0, 29, (1, 4))
    with torch.inference_mode():
        model(token_ids)
    model(token_ids, token_ids).loss.backward()


@pytest.mark.parametrize(
    ("token_ids", "labels", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            None,
            r"token_ids must be integers \[B, T\], got torch.int64 \[3\]",
        ),
        (torch.zeros(1, 3), None, r"got torch.float32 \[1, 3\]"),
        (torch.zeros(1, 3, dtype=torch.bool), None, r"got torch.bool \[1, 3\]"),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, 1, dtype=torch.int64),
            r"labels of \[2, 1\] have no token",
        ),
        (torch.zeros(1, 65, dtype=torch.int64), None, "65 tokens do not fit the context of 64"),
        (
            torch.zeros(1, 3, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int64),
            r"labels \[1, 2\] must have token_ids' shape \[1, 3\]",
        ),
    ],
)
def test_bad_input(token_ids: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(FFNS["dense"])(token_ids, labels)


class Launched(TorchDispatchMode):
    """Inside, operators are counted that compute something: not those that give a view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        taken, given = memory(args), memory(out)
        if function._schema.is_mutable or not given <= taken:
            self.counts[function.name().removeprefix("pyllama::")] += 1
        return out


def memory(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


DENSE = {"norm_linear": 1, "decode_attention_": 1, "linear_add_": 2, "norm_swiglu": 1}
MOE = {
    "norm_linear": 1,
    "decode_attention_": 1,
    "linear_add_": 1,
    "norm_gate": 1,
    "experts_swiglu": 1,
    "experts_add_": 1,
}


SHARED = MOE | {"norm_swiglu": 1, "linear_add_": 2}


@pytest.mark.parametrize(
    ("ffn", "expected"),
    [(MLPConfig(24), DENSE), (MoEConfig(4, 2, 12), MOE), (MoEConfig(4, 2, 12, shared=MLPConfig(8)), SHARED)],
    ids=["dense", "experts", "shared"],
)
@pytest.mark.parametrize("sequences", [1, 16])
def test_a_step_of_decoding_is_few_kernels(
    ffn: MLPConfig | MoEConfig, expected: dict[str, int], sequences: int
) -> None:
    """Five of a dense layer, six of one with experts, eight with a shared one too; nothing is between them, so that
    each may overlap the next."""
    model = tiny(ffn)
    prompts = [[1 + i, 2, 3] for i in range(sequences)]
    decoding = Decoding(model, prompts, [9] * sequences, SamplingParams(max_new_tokens=9))
    for _ in range(2):
        decoding.step()
    with Launched() as launched:
        decoding.step()
    layers = len(model.layers)
    whole = Counter({op: count * layers for op, count in expected.items()})
    whole += Counter({"advance_": 1, "embedding": 1, "norm_argmax_": 1})  # the last is head and choice
    whole += Counter({"aten::to.dtype_layout": 1})  # to the host
    assert launched.counts == whole


@pytest.mark.parametrize("attention", ["plain", "latent"])
@pytest.mark.parametrize("ffn", FFNS)
def test_layers_computed_twice_give_the_same_gradients(ffn: str, attention: str) -> None:
    """Bit for bit; and autograd keeps less for them."""
    model = tiny(FFNS[ffn], attention)
    token_ids = torch.randint(0, 29, (2, 40))
    found, kept = [], []
    for again in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            output = model(token_ids, token_ids, activation_checkpointing=again)
        output.loss.backward()
        found.append([output.loss, *(parameter.grad.clone() for parameter in model.parameters())])
        kept.append(sum(sizes))
        model.zero_grad()
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("attention", ["plain", "latent queries"])
@pytest.mark.parametrize("ffn", FFNS)
def test_compiled_training_is_the_same(ffn: str, attention: str) -> None:
    """One graph, forward and backward, with what the experts' loads are counted in."""
    model = tiny(FFNS[ffn], attention).double()
    token_ids = torch.randint(0, 29, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for one in (model, compiled):
        loads = None if ffn == "dense" else new_loads(model.config)
        output = one(token_ids, token_ids, loads=loads)
        output.loss.backward()
        found.append([output.loss, *(parameter.grad for parameter in model.parameters()), loads])
        model.zero_grad(set_to_none=True)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12)


def test_batches_in_parts_have_the_loss_of_the_whole() -> None:
    """Parts with unlike numbers of labels, one of them with none, divided by the number in all."""
    model = tiny(FFNS["dense"]).double()
    token_ids = torch.randint(0, 29, (3, 9))
    labels = token_ids.clone().to(torch.int32)
    labels[0, 2:] = labels[1] = -100
    whole = model(token_ids, labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = sum(model(ids[None], one[None], num_labels=count).loss for ids, one in zip(token_ids, labels, strict=True))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FFNS)
def test_training_under_autocast(ffn: str, attention: str) -> None:
    """float32 weights, products in bfloat16 or so: near what there is without."""
    model = tiny(FFNS[ffn], attention)
    token_ids = torch.randint(0, 29, (2, 20))
    expected = model(token_ids, token_ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(token_ids, token_ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0, check_dtype=False)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_is_dropped_without_gradients() -> None:
    """A model in training generates as one that is not."""
    layer = LayerConfig(replace(ATTENTIONS["plain"], dropout=0.5, out_dropout=0.5), MLPConfig(24, dropout=0.5))
    model = Model(ModelConfig(29, 16, 64, 1e-5, True, (layer, layer))).train()
    token_ids = torch.randint(0, 29, (1, 30))
    dropped = [model(token_ids) for _ in range(2)]
    assert not torch.equal(*dropped)
    with torch.no_grad():
        found = [model(token_ids), model.eval()(token_ids)]
    assert torch.equal(*found)


def test_dropout_with_layers_computed_twice_drops_the_same() -> None:
    layer = LayerConfig(replace(ATTENTIONS["plain"], dropout=0.3, out_dropout=0.3), MLPConfig(24, dropout=0.3))
    model = Model(ModelConfig(29, 16, 64, 1e-5, True, (layer, layer))).train()
    token_ids = torch.randint(0, 29, (2, 30))
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        loss = model(token_ids, token_ids, activation_checkpointing=again).loss
        found.append([loss, *torch.autograd.grad(loss, model.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
