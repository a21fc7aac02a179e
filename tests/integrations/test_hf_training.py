"""Training by transformers and PEFT with pyllama's attention and experts: the losses that theirs give, step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CONFIGS, REFERENCE, model_of, tokens, use
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

STEPS = 6
TEXTS = [tokens(3 + 7 * i % 11, seed=i).tolist() for i in range(24)]  # of 3 to 13 tokens


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """On the right, as for training."""
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, filler: int) -> Tensor:
        return torch.tensor([example[name] + [filler] * (longest - len(example[name])) for example in examples])

    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: rows(name, filler) for name, filler in fillers.items()}


def of_one_length(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """So that nothing is compiled twice."""
    return {name: rows[:-1] for name, rows in padded([*examples, dict.fromkeys(examples[0], [1] * 13)]).items()}


COLLATORS = {
    "padded": padded,
    "packed": DataCollatorWithFlattening(),
    "packed and counted": DataCollatorWithFlattening(return_flash_attn_kwargs=True),
}


def losses(model: Any, folder: Path, collate: Any, steps: int = STEPS, **options: Any) -> list[float]:
    """Before training, of each step, and after."""
    examples = [{"input_ids": text, "labels": text, "attention_mask": [1] * len(text)} for text in TEXTS]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=steps,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples, eval_dataset=examples)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(curve) == steps
    return [before, *curve, trainer.evaluate()["eval_loss"]]


def both(model: PreTrainedModel, folder: Path, collate: Any, **options: Any) -> tuple[list[float], list[float]]:
    curves = []
    for attention in ("pyllama", "eager"):
        trained = copy.deepcopy(model)
        use(trained, attention)
        curves.append(losses(trained, folder, collate, **options))
    return curves[0], curves[1]


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(collator: str, checkpointing: bool, tmp_path: Path) -> None:
    model = model_of(CONFIGS["mixtral"], torch.float32)
    found, expected = both(model, tmp_path, COLLATORS[collator], gradient_checkpointing=checkpointing)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.99 * found[0]


def test_trainer_with_autocast(tmp_path: Path) -> None:
    model = model_of(CONFIGS["mixtral"], torch.float32)
    found, expected = both(model, tmp_path, padded, bf16=True)
    assert found == pytest.approx(expected, rel=0.02)


def test_trainer_with_a_compiled_model(tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama"], torch.float32)
    use(model, "pyllama")
    expected = losses(copy.deepcopy(model), tmp_path, of_one_length, steps=2)
    torch._dynamo.reset()
    found = losses(model, tmp_path, of_one_length, steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    assert found == pytest.approx(expected, rel=1e-5)


TARGETS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora(targets: str, tmp_path: Path) -> None:
    curves = []
    for attention in ("pyllama", "eager"):
        model = model_of(CONFIGS["mixtral"], torch.float32)
        use(model, attention)
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS[targets]))
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora" in name for name in trained)
        curves.append(losses(adapted, tmp_path, padded))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_loaded_by_name(tmp_path: Path) -> None:
    model = model_of(CONFIGS["qwen3_moe"])
    model.save_pretrained(tmp_path)
    names = {"attn_implementation": "pyllama", "experts_implementation": "pyllama"}
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64, **names)
    assert loaded.config._attn_implementation == loaded.config._experts_implementation == "pyllama"
    use(model, REFERENCE)
    ids = tokens(2, 9)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
