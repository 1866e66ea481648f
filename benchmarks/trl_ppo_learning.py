"""TRL 1.12.0's PPO on the quickstart's task; a child of ``benchmarks/learning_beside_trl.py``.

    python benchmarks/trl_ppo_learning.py FOLDER SEED      # in an environment with trl==1.12.0

``FOLDER`` holds ``trunk``, the reward model as a classifier in ``reward``, and ``prompts_SEED.json``, token ids of
the prompts. The adapter is written to ``FOLDER/trl_SEED``. The value model begins as the reward model, as in
Hydra-PPO; every setting is that of our run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": TARGETS}


def main() -> None:
    """Train and save."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    set_seed(seed)
    prompts = json.loads((folder / f"prompts_{seed}.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "trunk", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "trunk")
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
        for _ in range(2)
    )
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
        model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**SHAPE), value)
    value.score.requires_grad_(True)
    rows = Dataset.from_dict({"input_ids": prompts})
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        seed=seed,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=len(prompts),
        response_length=32,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=0.5,
        gamma=1.0,
        lam=0.95,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        max_grad_norm=1.0,
        local_rollout_forward_batch_size=64,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10**6,
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        peft_config=LoraConfig(**SHAPE, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.policy_model.save_pretrained(folder / f"trl_{seed}")


if __name__ == "__main__":
    main()
