"""TRL's GRPOTrainer on a fixed replay batch: everything but where the batch comes from is TRL's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.training_step import Meter, Replay


def run(model: PreTrainedModel, replay: Replay, meter: Meter, micro: int) -> None:
    """Steps of VESPO until the meter has enough, a step being the whole batch in micro-batches of `micro` sequences.

    The learning rate is zero and the optimizer has no state, so that every step is the same. The trainer draws anew
    which sequences come together, which changes neither the gradient nor the width they are padded to.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    batch = _padded(replay, model.device)
    size, longest = batch["completion_ids"].shape
    losses: list[Tensor] = []

    class ReplayTrainer(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return dict(batch)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with meter.part():
                losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

        def _clip_grad_norm(self, *args: Any) -> Tensor:
            with meter.part():
                norm: Tensor = super()._clip_grad_norm(*args)
            meter.finish(float(sum(losses)), float(norm))
            losses.clear()
            return norm

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = meter.enough

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=cpu,
            bf16=not cpu,
            fp16=False,
            loss_type="vespo",
            importance_sampling_level="token",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            steps_per_generation=size // micro,
            num_generations=size,
            max_completion_length=longest,
            num_iterations=1,
            beta=0.0,
            gradient_checkpointing=False,
            max_steps=1000,
            learning_rate=0.0,
            optim="sgd",
            report_to=[],
            logging_steps=1000,
            save_strategy="no",
            dataloader_pin_memory=False,
            shuffle_dataset=False,
            disable_tqdm=True,
        )
        trainer = ReplayTrainer(
            model=model,
            reward_funcs=_no_reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["a"] * size}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
            ),
            callbacks=[Stop()],
        )
        meter.ready()
        trainer.train()


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _padded(replay: Replay, device: torch.device) -> dict[str, Tensor]:
    """The batch as the trainer lays it out: prompts padded on the left, completions on the right."""
    prompts, answers = replay.prompts, replay.responses
    left, right = max(map(len, prompts)), max(map(len, answers))

    def stack(rows: list[list[Any]], width: int, pad: Callable[[list[Any], int], list[Any]]) -> Tensor:
        return torch.tensor([pad(row, width - len(row)) for row in rows], device=device)

    def before(row: list[Any], n: int) -> list[Any]:
        return [0] * n + row

    def after(row: list[Any], n: int) -> list[Any]:
        return row + [0] * n

    mask = stack([[1] * len(a) for a in answers], right, after)
    return {
        "prompt_ids": stack(prompts, left, before),
        "prompt_mask": stack([[1] * len(p) for p in prompts], left, before),
        "completion_ids": stack(answers, right, after),
        "completion_mask": mask,
        "advantages": torch.tensor(replay.advantages, device=device),
        "old_per_token_logps": stack([list(map(float, b)) for b in replay.behaviour], right, after).float(),
        "num_items_in_batch": mask.sum().float(),
    }
