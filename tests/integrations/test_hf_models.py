"""pyllama's attention and experts in transformers' models, against transformers' own: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import COMMON, CONFIGS, DENSE, REFERENCE, WINDOWED, assert_same, model_of, outcome, padding, tokens, use
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig

ALL = torch.ones(3, 11, dtype=torch.bool)
PADDED = padding(11, (4, 11), (0, 8), (0, 11))  # left, right, none
BOTH_ENDS = padding(11, (3, 9), (1, 11), (10, 11))
HOLES = PADDED.clone()
HOLES[2, 5:7] = 0
POSITIONS = torch.tensor([[*range(4), *range(1), *range(6)]])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("reference", [REFERENCE, "eager"])
def test_whole_rows(family: str, reference: str) -> None:
    model = model_of(CONFIGS[family])
    expected, found = (outcome(model, name, ALL, input_ids=tokens(3, 11)) for name in (reference, "pyllama"))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("family", "mask"),
    [
        pytest.param(family, mask, id=f"{family}, {name}")
        for family in CONFIGS
        for name, mask in {"one end": PADDED, "both ends": BOTH_ENDS, "holes": HOLES}.items()
        if family not in WINDOWED or mask is not HOLES  # which is refused
    ],
)
def test_padded_rows(family: str, mask: Tensor) -> None:
    model = model_of(CONFIGS[family])
    inputs = {"input_ids": tokens(3, 11), "attention_mask": mask}
    assert_same(*(outcome(model, name, mask.bool(), **inputs) for name in ("pyllama", REFERENCE)))


@pytest.mark.parametrize("family", [*DENSE, "mixtral", "deepseek_v3"])
def test_padding_is_seen_by_nobody(family: str) -> None:
    model, ids = model_of(CONFIGS[family]), tokens(3, 11)
    other = torch.where(PADDED.bool(), ids, tokens(3, 11, seed=2))
    assert not torch.equal(ids, other)
    expected, found = (
        outcome(model, "pyllama", PADDED.bool(), input_ids=x, attention_mask=PADDED) for x in (ids, other)
    )
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(
        found["model.layers.0.self_attn.o_proj.weight"], expected["model.layers.0.self_attn.o_proj.weight"]
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize("told_by", ["positions", "cu_seq_lens"])
def test_packed_rows(family: str, told_by: str) -> None:
    """Against each sequence on its own."""
    model, ids = model_of(CONFIGS[family]), tokens(1, 11)
    inputs = {"position_ids": POSITIONS, "use_cache": False}
    if told_by == "cu_seq_lens":
        bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int64)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    found = outcome(model, "pyllama", ALL[:1], input_ids=ids, **inputs)
    use(model, REFERENCE)
    model.zero_grad()
    logits = torch.cat([model(part).logits[0] for part in ids.split([4, 1, 6], dim=1)])
    logits.sin().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_same(found, {"logits": logits.detach(), **expected})


def test_positions_of_a_packed_row_are_read_once() -> None:
    """Not once a layer, as each read is a synchronisation on a GPU."""
    model = model_of(CONFIGS["llama"])
    use(model, "pyllama")
    with Calls("aten::nonzero") as reads:
        model(tokens(1, 11), position_ids=POSITIONS, use_cache=False)
    assert len(reads.arguments) == 1


class Calls(TorchDispatchMode):
    """What an op was called with."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.arguments = op, list[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name == self.op:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_packed_one_by_one(family: str) -> None:
    model, ids = model_of(CONFIGS[family]), tokens(2, 11)
    position_ids = torch.stack([POSITIONS[0], torch.arange(11)])
    inputs = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    assert_same(*(outcome(model, name, ALL[:2], **inputs) for name in ("pyllama", REFERENCE)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("more", [{"use_cache": False}, {}, {"use_cache": False, "attention_mask": PADDED[2:]}])
@pytest.mark.parametrize(
    "positions",
    [
        POSITIONS[0].tolist(),
        [*range(7, 18)],
        [0, *range(10)],
        [0] * 11,
        [1, 1, 1, 0, *range(1, 8)],
        [*range(5, 9), *range(3, 10)],
        [*range(11)][::-1],
    ],
    ids=str,
)
def test_positions_split_a_row_where_they_do_for_sdpa(family: str, more: dict[str, Any], positions: list[int]) -> None:
    """At every step but 1, if there is neither a cache, as there is by default, nor a mask of padding."""
    inputs = {"input_ids": tokens(1, 11), "position_ids": torch.tensor([positions]), **more}
    model = model_of(CONFIGS[family])
    assert_same(*(outcome(model, name, ALL[:1], **inputs) for name in ("pyllama", REFERENCE)))


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_laid_end_to_end_and_counted(rows: int) -> None:
    """Sequences may go from one batch row to the next, as for flash attention."""
    model, ids = model_of(CONFIGS["llama"]), tokens(1, 12)
    position_ids, bounds = torch.tensor([[*range(8), *range(4)]]), torch.tensor([0, 8, 12], dtype=torch.int32)
    inputs = {"position_ids": position_ids.view(rows, -1), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    counted = torch.ones(rows, 12 // rows, dtype=torch.bool)
    with Calls("pyllama::attention") as calls:
        found = outcome(model, "pyllama", counted, input_ids=ids.view(rows, -1), **inputs)
    assert all(longest >= 8 for arguments in calls.arguments for longest in arguments[5:7])
    whole = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    assert_same(found, outcome(model, REFERENCE, torch.ones(1, 12, dtype=torch.bool), **whole))


def test_a_window_that_reaches_over_all_padding() -> None:
    model = model_of(MistralConfig(**COMMON, sliding_window=11))
    inputs = {"input_ids": tokens(3, 11), "attention_mask": HOLES}
    assert_same(*(outcome(model, name, HOLES.bool(), **inputs) for name in ("pyllama", REFERENCE)))


def test_scale() -> None:
    model = model_of(CONFIGS["llama"])
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.1
    inputs = {"input_ids": tokens(3, 11), "attention_mask": PADDED}
    assert_same(*(outcome(model, name, PADDED.bool(), **inputs) for name in ("pyllama", REFERENCE)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_types(family: str, dtype: torch.dtype) -> None:
    """No farther from float64 than transformers' own attention and experts are."""
    ids, exact = tokens(3, 11), model_of(CONFIGS[family]).to(dtype).to(torch.float64)
    expected = outcome(exact, REFERENCE, PADDED.bool(), input_ids=ids, attention_mask=PADDED)
    model = model_of(CONFIGS[family]).to(dtype)
    inputs = {"input_ids": ids, "attention_mask": PADDED}
    theirs, ours = (outcome(model, name, PADDED.bool(), **inputs) for name in (REFERENCE, "pyllama"))

    def errors(found: dict[str, Tensor]) -> float:
        return sum((found[name] - expected[name]).norm() / expected[name].norm() for name in expected) / len(expected)

    assert ours["logits"].dtype is dtype
    assert errors(ours) <= 1.25 * errors(theirs)


@pytest.mark.parametrize("family", ["mixtral", "mistral"])
def test_autocast(family: str) -> None:
    model = model_of(CONFIGS[family], torch.float32)
    inputs = {"input_ids": tokens(3, 11), "attention_mask": PADDED}
    exact = outcome(model, REFERENCE, PADDED.bool(), **inputs)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (outcome(model, name, PADDED.bool(), **inputs)["logits"] for name in (REFERENCE, "pyllama"))
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


def test_experts_under_autocast_are_computed_in_its_type() -> None:
    experts = model_of(CONFIGS["mixtral"], torch.float32).model.layers[0].mlp.experts
    experts.config._experts_implementation = "pyllama"
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 1], [3, 2], [1, 2], [0, 3], [2, 1]])
    weights = torch.rand(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(x, chosen, weights)
    assert found.dtype is torch.float32
    assert torch.equal(found, experts.bfloat16()(x.bfloat16(), chosen, weights).float())


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(family: str, reentrant: bool) -> None:
    model = model_of(CONFIGS[family]).train()
    inputs = {"input_ids": tokens(3, 11), "attention_mask": PADDED, "use_cache": False}
    expected = outcome(model, "pyllama", PADDED.bool(), **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(outcome(model, "pyllama", PADDED.bool(), **inputs), expected, tolerance=1e-12)


def test_compiled() -> None:
    model = model_of(CONFIGS["mixtral"])
    for inputs, counted in (
        ({"input_ids": tokens(3, 11), "attention_mask": PADDED}, PADDED.bool()),
        ({"input_ids": tokens(1, 11), "position_ids": POSITIONS}, ALL[:1]),
    ):
        expected = outcome(model, "pyllama", counted, use_cache=False, **inputs)
        torch._dynamo.reset()
        model.forward = torch.compile(type(model).forward.__get__(model), backend="aot_eager")
        assert_same(outcome(model, "pyllama", counted, use_cache=False, **inputs), expected, tolerance=1e-12)
        del model.forward


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_nothing_is_read_of_whole_rows(family: str) -> None:
    """On fake tensors every read of a value is an error, as it is a synchronisation on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(CONFIGS[family])
        use(model, "pyllama")
        first = model(torch.ones(3, 11, dtype=torch.long), use_cache=True)
        second = model(torch.ones(3, 1, dtype=torch.long), past_key_values=first.past_key_values)
    assert second.logits.shape == (3, 1, 61)
