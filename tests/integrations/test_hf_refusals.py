"""What pyllama's attention and experts do not compute is refused in transformers, by name and with the way out."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import COMMON, CONFIGS, LATENT, model_of, padding, tokens, use
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.masking_utils import create_causal_mask

from pyllama.integrations.transformers import Sequences, attention_forward, experts_forward, sequences_of


def run_llama(**inputs: Any) -> None:
    model = model_of(CONFIGS["llama"])
    use(model, "pyllama")
    model(tokens(3, 11), **inputs)


def run_config(config: PreTrainedConfig, auto: type = AutoModelForCausalLM, experts: str = "eager") -> None:
    model = auto.from_config(config, attn_implementation="pyllama")
    if experts != "eager":
        model.set_attn_implementation("eager")
        model.set_experts_implementation(experts)
    model(tokens(2, 9))


def run_attention(module: nn.Module | None = None, **options: Any) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    attention_forward(module or nn.Module(), q, k, k, options.pop("attention_mask", None), **options)


def run_dropout() -> None:
    model = model_of(LlamaConfig(**COMMON, attention_dropout=0.1)).train()
    use(model, "pyllama")
    model(tokens(2, 9))


def run_masks(**functions: Any) -> None:
    model = model_of(CONFIGS["llama"])
    use(model, "pyllama")
    create_causal_mask(model.config, torch.zeros(2, 5, 32), None, None, **functions)


def run_mask_of_other_rows() -> None:
    model = model_of(CONFIGS["llama"])
    use(model, "pyllama")
    mask = create_causal_mask(model.config, torch.zeros(3, 5, 32), None, None)
    run_attention(attention_mask=mask)


def run_window_over_holes() -> None:
    model, mask = model_of(CONFIGS["mistral"]), padding(11, (0, 11))
    mask[0, 5] = 0
    use(model, "pyllama")
    model(tokens(1, 11), attention_mask=mask)


def run_experts(**attributes: object) -> None:
    experts = model_of(CONFIGS["mixtral"]).model.layers[0].mlp.experts
    for name, value in attributes.items():
        setattr(experts, name, value)
    chosen = torch.tensor([[0, 1], [3, 2]])
    experts_forward(experts, torch.randn(2, 32, dtype=torch.float64), chosen, torch.rand(2, 2))


SMALL = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
SINKS = GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
CHUNKS = Llama4TextConfig(**COMMON, num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=48)
ELSEWHERE = {"position_bias": torch.zeros(1), "head_mask": torch.ones(4), "indices": torch.zeros(1), "cache": object()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (run_dropout, r"dropout \(0.1\) is not supported; use attention_dropout=0 in the model's config"),
        (lambda: run_config(Gemma2Config(**COMMON)), r"softcap \(a cap on scores\) is not supported; use attn_imp"),
        (lambda: run_config(SINKS), r"s_aux \(attention sinks\) is not supported"),
        (
            lambda: run_config(CHUNKS),
            "a mask made of and_masks, chunked_overlay, causal_mask_function is not supported",
        ),
        (lambda: run_config(BertConfig(**SMALL), AutoModel), "bidirectional_mask_function is not supported"),
        (lambda: run_attention(is_causal=False), "attention that is not causal is not supported"),
        *((lambda n=n, v=v: run_attention(**{n: v}), rf"{n} \(.* is not supported") for n, v in ELSEWHERE.items()),
        (lambda: run_attention(output_attentions=True), r"output_attentions \(the attention weights .*\"eager\""),
        (
            lambda: run_llama(attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.bool)),
            r"an attention_mask of shape \[3, 1, 11, 11\] is not supported; use a mask of padding, \[batch, tokens\]",
        ),
        (lambda: run_attention(attention_mask=torch.ones(2, 5)), r"an attention_mask of shape \[2, 5\] is not"),
        (
            lambda: run_masks(or_mask_function=lambda b, h, q, k: k < 2),
            "or_masks, causal_mask_function, the function <lambda> is",
        ),
        (lambda: run_masks(and_mask_function=lambda b, h, q, k: k < 2), "a mask made of .* is not supported"),
        (
            lambda: run_masks(block_sequence_ids=torch.zeros(2, 5, dtype=torch.long)),
            "a mask made of or_masks, causal_mask_function, blockwise_overlay is not supported",
        ),
        (
            run_mask_of_other_rows,
            "the mask is for 3 rows of 5 queries and 5 keys, but query and key have 2 rows of 5 and 5",
        ),
        (run_window_over_holes, "a window over padding between tokens is not supported"),
        *(
            (
                lambda w=w: run_config(MistralConfig(**COMMON, sliding_window=w)),
                f"a sliding_window of {w} is not supported; use sliding_window=None in the model's config",
            )
            for w in (0, -1)
        ),
        (lambda: run_attention(sliding_window=0), "a sliding_window of 0 is not supported"),
        (
            lambda: run_attention(cu_seq_lens_q=torch.tensor([0, 5, 10])),
            "cu_seq_lens_q and cu_seq_lens_k must come together",
        ),
        (
            lambda: run_llama(
                attention_mask=padding(11, (0, 11), (2, 11), (0, 11)),
                cu_seq_lens_q=torch.tensor([0, 33]),
                cu_seq_lens_k=torch.tensor([0, 33]),
            ),
            "a batch both packed and padded is not supported; use either cu_seq_lens or an attention_mask",
        ),
        (
            lambda: run_attention(cu_seq_lens_q=torch.tensor([0, 5]), cu_seq_lens_k=torch.tensor([0, 5])),
            "cu_seqlens_q must rise from 0 to 10",
        ),
        (
            lambda: run_config(SINKS, experts="pyllama"),
            'GptOssExperts with has_bias = True is not supported; use experts_implementation="grouped_mm"',
        ),
        (
            lambda: run_config(MixtralConfig(**COMMON, num_local_experts=4, hidden_act="gelu"), experts="pyllama"),
            "MixtralExperts with the activation GELUActivation is not supported",
        ),
        (lambda: run_experts(is_transposed=True), "MixtralExperts with is_transposed = True"),
        (lambda: run_experts(is_concatenated=False), "MixtralExperts with is_concatenated = False"),
        (lambda: run_experts(has_gate=False), "MixtralExperts with has_gate = False"),
        (lambda: run_experts(has_post_expert_norm=True), "MixtralExperts with has_post_expert_norm = True"),
        (lambda: run_experts(_is_expert_parallel=True), "MixtralExperts with _is_expert_parallel = True"),
        (lambda: run_experts(num_experts=3), "indices has expert 3, but must be in 0 to 2"),
    ],
)
def test_refusals(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


INDEXED = {**LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
DECODER = {"vocab_size": 61, "d_model": 32, "attention_dropout": 0.0}
READERS = {
    "deepseek_v32": {**INDEXED, "n_group": 2, "topk_group": 1},
    "glm_moe_dsa": {**INDEXED, "n_group": 2, "topk_group": 1},
    "axk2": INDEXED,
    "hy_v4": INDEXED,
    "doge": COMMON,
    "xglm": {**DECODER, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4},
    "trocr": {**DECODER, "decoder_ffn_dim": 48, "decoder_layers": 1, "decoder_attention_heads": 4},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 1, "n_head": 4},
}


@pytest.mark.parametrize("family", READERS)
def test_models_that_read_their_mask_are_refused(family: str) -> None:
    """They index it, add to it, or ask for its dtype or size, instead of giving it to the attention."""
    config = AutoConfig.for_model(family, **READERS[family])
    refusal = 'pyllama\'s .* a model that reads its attention mask is not supported; use attn_implementation="eager"'
    with pytest.raises((ValueError, AttributeError), match=refusal):
        run_config(config)


def sequences() -> Sequences:
    return sequences_of(2, 5, 5, attention_mask=padding(5, (2, 5), (0, 5)).bool())


def test_a_mask_stays_an_object_like_others() -> None:
    mask = sequences()
    assert not hasattr(mask, "dtype")
    assert getattr(mask, "size", None) is None
    for same in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert same.shape == (2, 5, 5)
        assert torch.equal(same.cu_seqlens_k, mask.cu_seqlens_k)
        assert torch.equal(same.order_k, mask.order_k)
    with pytest.raises(AttributeError, match="reads its attention mask"):
        mask.dtype  # noqa: B018
    for touch in (lambda: mask[:, 0], lambda: mask + 1, lambda: torch.ones(1) + mask):
        with pytest.raises(ValueError, match="reads its attention mask"):
            touch()


def test_attributes_of_a_mask_in_a_compiled_function() -> None:
    def shifted(x: Tensor, mask: Sequences) -> Tensor:
        return x + mask.shape[1] + mask.ndim if not hasattr(mask, "dtype") else x

    mask = sequences()
    compiled = torch.compile(shifted, backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(1), mask).item() == 9


@pytest.mark.parametrize("model", ["deepseek_v4.DeepseekV4", "minimax_m3_vl.MiniMaxM3VL"])
def test_experts_with_a_gate_of_their_own_are_refused(model: str) -> None:
    """MiniMax's have no act_fn besides."""
    family, kind = model.split(".")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = {"hidden_size": 8, "num_local_experts": 2, "intermediate_size": 4, "moe_intermediate_size": 4}
    config = SimpleNamespace(**sizes, hidden_act="silu", swiglu_limit=7.0, swiglu_alpha=1.7)
    experts = getattr(module, f"{kind}Experts")(config)
    with pytest.raises(ValueError, match=rf"a gate of its own, {kind}Experts\._apply_gate, is not supported"):
        experts_forward(experts, torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


def test_pyllama_does_not_import_transformers() -> None:
    code = "import sys, pyllama, pyllama.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout + done.stderr == "False\n"


def without_transformers(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "transformers", None)


def without_experts(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("transformers.integrations.moe.ExpertsInterface")


def with_its_own_experts(patch: pytest.MonkeyPatch) -> None:
    patch.delattr("transformers.modeling_utils.ALL_EXPERTS_FUNCTIONS")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (without_transformers, "import of transformers halted"),
        (without_experts, "cannot import name 'ExpertsInterface'"),
        (with_its_own_experts, "takes no experts but its own"),
    ],
)
def test_a_transformers_that_does_not_serve(
    change: Callable[[pytest.MonkeyPatch], None], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pyllama.integrations.transformers")
    change(monkeypatch)
    with pytest.raises(ImportError) as raised:
        import_module("pyllama.integrations.transformers")
    said = str(raised.value)
    assert said.startswith("pyllama.integrations.transformers needs transformers 5.7 or newer (")
    assert cause in said
    assert said.endswith("pip install -U transformers")
