"""Losses that balance experts, against DeepSeek's code written out; loads counted, and biases moved by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pyllama.balance import batch_loss, new_loads, sequence_loss, switch_loss, update_correction_biases
from pyllama.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from pyllama.layers.ffn import Routing
from pyllama.model import Model

E, N, B, T = 6, 2, 3, 8
MOE = MoEConfig(E, N, 8)


def routing(seed: int, scoring: str = "softmax") -> tuple[Routing, Tensor]:
    """One layer's, of B sequences of T tokens, and its scores [B * T, E]."""
    logits = torch.randn(B * T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    return Routing(logits, scores.topk(N).indices.int()), scores


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_deepseeks_losses_are_those_of_its_papers(scoring: Any) -> None:
    """f_i = E / (N T) sum over t of [token t chose i], P_i = 1 / T sum over t of its score; each layer by itself."""
    layers = [routing(seed, scoring) for seed in (0, 1)]
    by_sequence = by_batch = 0.0
    for (_, experts), scores in layers:
        for b in range(B):
            rows = range(b * T, (b + 1) * T)
            for i in range(E):
                f = E / (N * T) * sum(i in experts[t] for t in rows)
                by_sequence += f * sum(scores[t, i].item() for t in rows) / T / B
        for i in range(E):
            f = E / (N * B * T) * sum(i in experts[t] for t in range(B * T))
            by_batch += f * scores[:, i].mean().item()
    config, routings = replace(MOE, scoring=scoring), [routing for routing, _ in layers]
    assert sequence_loss(routings, config, B, None).item() == pytest.approx(by_sequence, rel=1e-12)
    assert batch_loss(routings, config, B, None).item() == pytest.approx(by_batch, rel=1e-12)


def test_the_switch_loss_is_transformers() -> None:
    logits = [routing(seed)[0].logits for seed in (0, 1, 2)]
    expected = load_balancing_loss_func(tuple(logits), num_experts=E, top_k=N)
    torch.testing.assert_close(
        switch_loss([routing(seed)[0] for seed in (0, 1, 2)], MOE, B, None), expected, check_dtype=False
    )


@pytest.mark.parametrize("loss", [batch_loss, sequence_loss])
def test_even_loads_cost_one_a_layer(loss: Any) -> None:
    """And nothing costs more than all tokens at one expert: E."""
    even = Routing(torch.zeros(E, E), torch.stack([torch.arange(E), torch.arange(E).roll(1)], 1).int())
    assert loss([even, even], MOE, 1, None).item() == pytest.approx(2.0)
    one = Routing(torch.eye(E)[[0] * E] * 100, torch.zeros(E, 1, dtype=torch.int32))
    assert loss([one], replace(MOE, top_k=1), 1, None).item() == pytest.approx(E)


def tiny(**options: Any) -> Model:
    torch.manual_seed(0)
    attention = GQAConfig(2, 1, 8, RopeConfig(1e4, 8))
    ffns = [MLPConfig(16), MoEConfig(E, N, 8, **options), MoEConfig(E, N, 8, **options)]
    layers = tuple(LayerConfig(attention, ffn) for ffn in ffns)
    return Model(ModelConfig(29, 16, 64, 1e-5, False, layers)).double()


TOKEN_IDS = torch.randint(29, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["switch", "sequence", "batch"])
def test_the_configuration_names_the_loss(kind: Any) -> None:
    model = tiny(aux_loss=kind, aux_loss_coef=0.5)
    routings: list[Routing] = []
    for layer in model.layers[1:]:
        layer.ffn.register_forward_hook(lambda module, args, out: routings.append(out[1]))
    logits, loss, aux_loss = model(TOKEN_IDS, TOKEN_IDS)
    named = {"switch": switch_loss, "sequence": sequence_loss, "batch": batch_loss}[kind]
    torch.testing.assert_close(aux_loss, named(routings, MOE, B, None))
    cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKEN_IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, cross_entropy + 0.5 * aux_loss)
    with torch.no_grad():  # few tokens, whose router is another op
        few = model(TOKEN_IDS[:1, :5], TOKEN_IDS[:1, :5])
    torch.testing.assert_close(few.aux_loss, model(TOKEN_IDS[:1, :5], TOKEN_IDS[:1, :5]).aux_loss)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("tokens", [T, 5])
def test_loads_are_counted(gradients: bool, tokens: int) -> None:
    """Of each sequence, and of all together; added to what is there, once even where layers are computed twice."""
    model = tiny()
    chosen: list[Tensor] = []
    for layer in model.layers[1:]:
        layer.ffn.register_forward_hook(lambda module, args, out: chosen.append(out[1].experts))
    loads, together = new_loads(model.config, B), new_loads(model.config)
    ids = TOKEN_IDS[:, :tokens]
    with torch.set_grad_enabled(gradients):
        model(ids, loads=loads)
        model(ids[:1], loads=together)
        if gradients:
            output = model(ids[1:], ids[1:], loads=together, activation_checkpointing=True)
            first, second = chosen[:2]
            output.loss.backward()
        else:
            model(ids[1:], loads=together)
            first, second = chosen[:2]
    expected = torch.tensor(
        [
            [
                [sum(e in row for row in layer[b * tokens : (b + 1) * tokens].tolist()) for e in range(E)]
                for b in range(B)
            ]
            for layer in (first, second)
        ]
    )
    assert torch.equal(loads, expected)
    assert torch.equal(together, expected.sum(1, keepdim=True))
    assert torch.equal(loads.sum(2), torch.full((2, B), N * tokens))


def test_loads_of_another_shape_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"loads must be int64 \[M, B, E\] = \[2, 3, 6\] on cpu, or \[2, 1, 6\]"):
        model(TOKEN_IDS, loads=torch.zeros(2, 2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch.float32 \[2, 3, 6\]"):
        model(TOKEN_IDS, loads=torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match=r"got torch.int64 \[2, 3, 6\] on meta"):  # nobody would see what is counted
        model(TOKEN_IDS, loads=new_loads(model.config, B, "meta"))
    unlike = replace(model.config.layers[2], ffn=replace(MOE, num_experts=4))
    with pytest.raises(ValueError, match="layers with unlike experts have no load-balancing loss or loads in common"):
        new_loads(replace(model.config, layers=(*model.config.layers, unlike)))
    dense = Model(replace(model.config, layers=model.config.layers[:1]))
    with pytest.raises(ValueError, match="the model has no experts, so no loads can be counted"):
        dense(TOKEN_IDS, loads=torch.zeros(0, 3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="no experts"):
        new_loads(dense.config)


def test_biases_move_towards_experts_with_few_tokens() -> None:
    """By `rate`, whatever the difference; not for an expert that has the mean. No weight depends on it."""
    model = tiny(correction_bias=True)
    loads = new_loads(model.config, 2)
    loads[0] = torch.tensor([[9, 1, 5, 5, 6, 4], [0, 0, 0, 0, 0, 0]])
    loads[1] = torch.tensor([[3, 0, 0, 0, 0, 0], [0, 3, 3, 3, 3, 3]])
    update_correction_biases(model, loads, rate=0.01)
    update_correction_biases(model, loads, rate=0.001)
    step = 0.011
    expected = [[-step, step, 0, 0, -step, step], [0] * 6]
    for layer, bias in zip(model.layers[1:], expected, strict=True):
        assert layer.ffn.correction_bias.tolist() == pytest.approx(bias)


def test_biases_even_out_loads() -> None:
    """A router that always prefers the same experts is overruled, without a gradient."""
    model = tiny(correction_bias=True, scoring="sigmoid")
    with torch.no_grad():
        model.layers[1].ffn.router.weight[0] *= 8
    spread = []
    for _ in range(60):
        loads = new_loads(model.config)
        with torch.no_grad():
            model(TOKEN_IDS, loads=loads)
        update_correction_biases(model, loads, rate=0.03)
        spread.append((loads.double().std(-1) / loads.double().mean(-1)).max().item())
    assert sum(spread[-20:]) / 20 < 0.6 * spread[0]


def test_what_cannot_be_updated() -> None:
    loads = new_loads(tiny().config)
    with pytest.raises(ValueError, match="no correction biases"):
        update_correction_biases(tiny(), loads)
    with pytest.raises(ValueError, match="loads have no tokens"):
        update_correction_biases(tiny(correction_bias=True), loads)
    with pytest.raises(ValueError, match="correction biases are coarser than float32"):
        update_correction_biases(tiny(correction_bias=True).bfloat16(), loads + 1)
    with pytest.raises(ValueError, match=r"loads must be \[M, B, E\] = \[2, 'B', 6\], got \[2, 6\]"):
        update_correction_biases(tiny(correction_bias=True), loads[:, 0])
