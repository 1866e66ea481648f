"""TRL's training of the rows that ``timed.py`` wrote, timed; one JSON line.

    .venv-trl116/bin/python benchmarks/real/trl_timed.py DPO --trunk runs/real/trunk --rows runs/real/timed
    .venv-trl112/bin/python benchmarks/real/trl_timed.py PPO --trunk runs/real/trunk --rows runs/real/timed

`RewardModel`, `DPO` and `RLOO` in an environment with trl==1.16.0, `PPO` with 1.12.0, the last that has it.
Batches, LoRA and lengths are those of ``timed.py``; the first step is not timed. ``--bf16 1``: bf16 autocast over
fp32 weights; ``--bf16 2``: the weights in bf16 as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
PAIRS, ANSWERS, MICRO, SAMPLES, TOKENS = 8, 16, 8, 4, 48


class Clock(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **options: Any) -> None:
        """Look at the clock."""
        self.times.append(time.perf_counter())


def settings(bf16: int, size: int) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": size,
        "use_cpu": True,
        "bf16": bool(bf16),
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10**6,
    }


def pairwise(method: str, args: argparse.Namespace, given: dict[str, Any]) -> Any:  # noqa: ANN401 (a trainer)
    """Reward modelling or DPO of the pairs."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    pairs = json.loads((args.rows / "pairs.json").read_text())
    options = settings(args.bf16, PAIRS) | {"num_train_epochs": 1, "max_length": 384}
    if method == "DPO":
        peft = LoraConfig(**SHAPE, task_type="CAUSAL_LM")
        model = loaded(AutoModelForCausalLM, args)
        rows = Dataset.from_list(pairs)
        return DPOTrainer(
            model, args=DPOConfig(**options), train_dataset=rows, peft_config=peft, **given
        )
    model = loaded(AutoModelForSequenceClassification, args, num_labels=1)
    sides = ("chosen", "rejected")
    rows = Dataset.from_list(
        [{side: pair["prompt"] + pair[side] for side in sides} for pair in pairs]
    )
    peft = LoraConfig(**SHAPE, task_type="SEQ_CLS", modules_to_save=["score"])
    return RewardTrainer(
        model, args=RewardConfig(**options), train_dataset=rows, peft_config=peft, **given
    )


def rloo(args: argparse.Namespace, given: dict[str, Any]) -> Any:  # noqa: ANN401 (a trainer)
    """RLOO with the length as its reward."""
    from trl import RLOOConfig, RLOOTrainer

    prompts = json.loads((args.rows / "RLOO.json").read_text())
    options = settings(args.bf16, MICRO) | {
        "gradient_accumulation_steps": ANSWERS // MICRO,
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "temperature": 0.7,
        "num_iterations": 1,
        "max_steps": len(prompts) * SAMPLES // ANSWERS,
        "beta": 0.05,
    }
    return RLOOTrainer(
        loaded(AutoModelForCausalLM, args),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=RLOOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=LoraConfig(**SHAPE, task_type="CAUSAL_LM"),
        **given,
    )


def ppo(args: argparse.Namespace, given: dict[str, Any]) -> Any:  # noqa: ANN401 (a trainer)
    """PPO with a LoRA critic and a reward model of its own."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = given["processing_class"]
    prompts = json.loads((args.rows / "PPO.json").read_text())
    value, reward = (
        loaded(AutoModelForSequenceClassification, args, num_labels=1) for _ in range(2)
    )
    for model in (value, reward):
        model.config.pad_token_id = tokenizer.pad_token_id
        model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**SHAPE), value)
    value.score.requires_grad_(True)
    rows = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    options = settings(args.bf16, MICRO) | {
        "gradient_accumulation_steps": ANSWERS // MICRO,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "total_episodes": len(prompts),
        "response_length": TOKENS,
        "stop_token": "eos",
        "temperature": 0.7,
        "local_rollout_forward_batch_size": MICRO,
        "num_sample_generations": 0,
    }
    return PPOTrainer(
        args=PPOConfig(**options),
        model=loaded(AutoModelForCausalLM, args),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        peft_config=LoraConfig(**SHAPE, task_type="CAUSAL_LM"),
        **given,
    )


def loaded(make: Any, args: argparse.Namespace, **options: Any) -> Any:  # noqa: ANN401 (a model)
    """The trunk in the precision that was asked for."""
    dtype = torch.bfloat16 if args.bf16 == 2 else torch.float32
    return make.from_pretrained(args.trunk, dtype=dtype, **options)


def main() -> None:
    """Train for a few steps and print what it cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=["RewardModel", "DPO", "RLOO", "PPO"])
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", type=int, default=1, choices=(0, 1, 2))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(args.trunk, padding_side="left")
    given: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [clock]}
    if args.method in ("RewardModel", "DPO"):
        tokenizer.padding_side = "right"
        trainer, key, size = pairwise(args.method, args, given), "pairs_per_second", PAIRS
    elif args.method == "RLOO":
        trainer, key, size = rloo(args, given), "completions_per_second", ANSWERS
    else:
        trainer, key, size = ppo(args, given), "episodes_per_second", ANSWERS
    trainer.train()
    steps = len(clock.times) - 1
    report = {
        "peer": f"trl {args.method}",
        key: size * steps / (clock.times[-1] - clock.times[0]),
        "steps": steps,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bf16": args.bf16,
        "threads": args.threads,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
