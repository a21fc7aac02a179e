"""topk_gate against a router written as loops over tokens, groups and experts, and against transformers' routers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_close, numpy, refused, refused_by_kernels
from torch import Tensor

from pyllama.ops.topk_gate import topk_gate


def examples(dtype: torch.dtype) -> Iterator[tuple]:
    yield torch.randn(5, 8, dtype=dtype), 2
    bias = torch.randn(8, dtype=dtype)
    yield torch.randn(5, 8, dtype=dtype), 2, bias, "sigmoid", (4, 2, 2), True, 2.5


def reference(
    logits: np.ndarray,
    top_k: int,
    bias: np.ndarray | None = None,
    scoring: str = "softmax",
    groups: tuple[int, int, int] = (1, 1, 1),
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    T, E = logits.shape
    num_groups, top_groups, group_top_k = groups
    size = E // num_groups
    weights, indices = np.zeros((T, top_k)), np.zeros((T, top_k), dtype=np.int32)
    for t in range(T):
        if scoring == "softmax":
            scores = np.exp(logits[t] - logits[t].max())
            scores /= scores.sum()
        else:
            scores = 1 / (1 + np.exp(-logits[t]))
        choice = scores if bias is None else scores + bias
        worth = [sum(sorted(choice[g * size : (g + 1) * size], reverse=True)[:group_top_k]) for g in range(num_groups)]
        best_groups = sorted(range(num_groups), key=lambda g: -worth[g])[:top_groups]
        experts = sorted(e for g in best_groups for e in range(g * size, (g + 1) * size))
        best = sorted(experts, key=lambda e: -choice[e])[:top_k]  # sorted is stable: the lower index first
        indices[t], weights[t] = best, scores[best]
        if renormalize:
            weights[t] /= weights[t].sum() + 1e-20
    return weights * scale, indices


ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2},
    "plain": {"top_k": 4, "renormalize": False},
    "one": {"top_k": 1},
    "all": {"top_k": 32},
    "deepseek-v2": {"top_k": 6, "groups": (8, 3, 1), "renormalize": False, "scale": 16.0},
    "deepseek-v3": {
        "top_k": 8,
        "bias": True,
        "scoring": "sigmoid",
        "groups": (8, 4, 2),
        "scale": 2.5,
    },
    "sigmoid": {"top_k": 3, "scoring": "sigmoid"},
    "softmax-bias": {"top_k": 3, "bias": True},
    "groups-of-one": {"top_k": 5, "groups": (32, 7, 1)},
}


@pytest.mark.parametrize("T", [0, 1, 37])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_formula(router: dict[str, Any], T: int, dtype: torch.dtype, device: str) -> None:
    E = 32
    logits = 2 * torch.randn(T, E, dtype=dtype, device=device)
    bias = 0.3 * torch.randn(E, device=device) if router.get("bias") else None
    options = router | {"bias": bias}
    weights, indices = topk_gate(logits, **options)
    expected, chosen = reference(numpy(logits), **options | {"bias": None if bias is None else numpy(bias)})
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert indices.dtype == torch.int32
    assert weights.is_contiguous()
    assert indices.is_contiguous()
    assert indices.tolist() == chosen.tolist()
    assert_close(weights, expected)


@pytest.mark.parametrize(
    ("E", "top_k", "num_groups"),
    [(1, 1, 1), (6, 2, 1), (33, 5, 1), (160, 6, 8), (72, 3, 8), (384, 8, 1), (512, 32, 1), (512, 8, 32), (256, 8, 8)],
)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_numbers_of_experts(E: int, top_k: int, num_groups: int, scoring: str, device: str) -> None:
    """Also such as do not spread evenly over a warp."""
    options = {"scoring": scoring, "groups": (num_groups, (num_groups + 1) // 2, min(2, E // num_groups))}
    logits = 2 * torch.randn(9, E, device=device)
    weights, indices = topk_gate(logits, top_k, 0.1 * torch.ones(E, device=device), **options)
    expected, chosen = reference(numpy(logits), top_k, np.full(E, 0.1), **options)
    assert indices.tolist() == chosen.tolist()
    assert_close(weights, expected)


def test_bias_shifts_the_choice_only(device: str) -> None:
    logits, bias = torch.zeros(1, 4, device=device), torch.tensor([0.0, 3.0, -3.0, 2.0], device=device)
    weights, indices = topk_gate(logits, 2, bias, "sigmoid", renormalize=False)
    assert indices.tolist() == [[1, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_index(groups: int, device: str) -> None:
    logits = torch.zeros(3, 64, device=device)
    logits[1, 10:] = 1.0
    logits[2, 63] = 1.0
    _, indices = topk_gate(logits, 4, groups=(groups, (groups + 1) // 2, 1))
    assert indices[0].tolist() == [0, 1, 2, 3]
    assert indices[1].tolist() == [10, 11, 12, 13]
    assert indices[2].tolist() == [63, 0, 1, 2]


def test_experts_outside_the_groups_are_never_chosen(device: str) -> None:
    """With negative choices, masking by 0 (as some routers do) would prefer a masked expert."""
    logits, bias = torch.randn(50, 16, device=device), torch.full((16,), -5.0, device=device)
    _, indices = topk_gate(logits, 4, bias, "sigmoid", (4, 1, 1))
    assert (indices // 4 == indices[:, :1] // 4).all()


def test_weights_of_vanishing_scores(device: str) -> None:
    """The sum of scores underflows: weights are 0, not NaN."""
    weights, _ = topk_gate(torch.full((1, 4), -200.0, device=device), 2, scoring="sigmoid")
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_logits_that_are_no_numbers_still_choose_experts(scoring: str, device: str) -> None:
    """The products after the router read experts' weights by these indices."""
    logits = torch.full((3, 16), float("nan"), device=device)
    logits[1], logits[2, 1:] = -torch.inf, 0.0
    _, indices = topk_gate(logits, 6, None, scoring, (4, 2, 1))
    for chosen in indices.tolist():
        assert len(set(chosen)) == 6
        assert all(0 <= expert < 16 for expert in chosen)


def agrees(router: torch.nn.Module, E: int, D: int, **options: Any) -> None:
    """`router` of transformers gives the same weights to the same experts."""
    router = router.double()
    with torch.no_grad():
        router.weight.normal_()
    hidden = torch.randn(40, D, dtype=torch.float64)
    logits, expected, chosen = router(hidden)
    weights, indices = topk_gate(logits.detach(), **options)
    spread = [torch.zeros(40, E, dtype=torch.float64) for _ in range(2)]
    spread[0].scatter_(1, chosen, expected.detach().double())
    spread[1].scatter_(1, indices.long(), weights.double())
    torch.testing.assert_close(spread[1], spread[0], rtol=1e-5, atol=1e-6)  # they compute in float32


def test_agrees_with_transformers() -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

    E, D = 32, 16
    config = SimpleNamespace(
        num_experts_per_tok=4,
        num_local_experts=E,
        num_experts=E,
        n_routed_experts=E,
        hidden_size=D,
        norm_topk_prob=False,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.5,
    )
    agrees(MixtralTopKRouter(config), E, D, top_k=4)
    agrees(Qwen2MoeTopKRouter(config), E, D, top_k=4, renormalize=False)
    v2 = DeepseekV2TopkRouter(config)
    agrees(v2, E, D, top_k=4, groups=(8, 3, 1), renormalize=False, scale=2.5)
    v3 = DeepseekV3TopkRouter(SimpleNamespace(**vars(config) | {"norm_topk_prob": True}))
    bias = v3.e_score_correction_bias.normal_(std=0.2)
    options = {"scoring": "sigmoid", "groups": (8, 3, 2), "scale": 2.5}
    agrees(v3, E, D, top_k=4, bias=bias, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k is 9"),
        ({"top_k": 5, "groups": (4, 2, 1)}, "top_k is 5.* 4"),
        ({"top_k": 1, "scoring": "relu"}, "scoring is .*relu"),
        ({"top_k": 1, "groups": (3, 1, 1)}, r"groups\[0\] is 3.* E = 8"),
        ({"top_k": 1, "groups": (4, 5, 1)}, r"groups\[1\] is 5"),
        ({"top_k": 1, "groups": (4, 2, 3)}, r"groups\[2\] 3"),
        ({"top_k": 1, "groups": (4, 2)}, "groups has 2 numbers, but must have 3"),
        ({"top_k": 1, "bias": torch.zeros(9)}, r"bias of shape \[9\] has E = 9, but logits has E = 8"),
    ],
)
def test_arguments(options: dict[str, Any], message: str, device: str) -> None:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    with refused("topk_gate: .*" + message):
        topk_gate(torch.randn(2, 8, device=device), **moved)


def test_what_kernels_do_not_take(device: str) -> None:
    logits = torch.randn(2, 513, device=device)
    with refused_by_kernels("topk_gate", device, "E, the number of experts, is 513, but must be at most 512"):
        topk_gate(logits, 2)
    with refused_by_kernels("topk_gate", device, r"groups\[0\] is 3, but must be 1, 2, 4, 8, 16 or 32"):
        topk_gate(logits[:, :9].contiguous(), 2, groups=(3, 1, 1))
    with refused_by_kernels("topk_gate", device, "top_k is 33, but must be at most 32"):
        topk_gate(logits[:, :64].contiguous(), 33)
    with refused_by_kernels("topk_gate", device, "bias must have float32"):
        topk_gate(logits[:, :4].contiguous(), 1, torch.zeros(4, dtype=torch.float64, device=device))
    with refused_by_kernels("topk_gate", device, "logits must be contiguous"):
        topk_gate(logits[:, :64], 3)
