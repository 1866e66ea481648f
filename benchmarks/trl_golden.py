"""Losses and advantages as TRL computes them, on fixed float64 tensors: golden numbers for ``tests/losses``.

    .venv-trl116/bin/python benchmarks/trl_golden.py    # DPO, IPO, KTO, GRPO, RLOO; trl==1.16.0
    .venv-trl112/bin/python benchmarks/trl_golden.py    # PPO; trl==1.12.0, the last release with it

TRL's losses live inside its trainers' methods, between models and metrics. So the lines themselves are cut out of
the installed source, from one line to another, and run on tensors of ours. Needs nothing of this package. Each run
replaces what its version of TRL has in ``tests/losses/trl_golden.json``; inputs are kept beside results.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import trl
from torch import Tensor

OUT = Path(__file__).parent.parent / "tests" / "losses" / "trl_golden.json"
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
"""Response tokens of two prompts with two responses each."""


def cut(method: Callable[..., Any], first: str, until: str) -> str:
    """The lines of a method from the one that begins with ``first`` to the one before ``until``.

    Raises:
        ValueError: They are not there, or the first is there twice: this version of TRL is another one.
    """
    lines = inspect.getsource(method).splitlines()
    starts = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    if len(starts) != 1:
        raise ValueError(f"{method.__qualname__} has {len(starts)} lines {first!r}.")
    rest = lines[starts[0] + 1 :]
    size = next((n for n, line in enumerate(rest) if line.strip().startswith(until)), None)
    if size is None:
        raise ValueError(f"{method.__qualname__} has no line {until!r} after {first!r}.")
    source = textwrap.dedent("\n".join(lines[starts[0] : starts[0] + 1 + size]))
    return "if True:\n" + source if source.startswith(" ") else source  # cut out of an `if`


def run(source: str, **names: Any) -> dict[str, Any]:
    """Run lines with these names; the names that are there afterwards."""
    names |= {"torch": torch, "F": F, "math": math, "device": "cpu"}
    exec(source, names)
    return names


def with_gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Any]:
    """The loss, and its gradient in each input."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return {"loss": value.item(), "gradients": [one.tolist() for one in gradients]}


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Seeded numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * scale


def itself(value: Any) -> Any:  # noqa: ANN401 (what accelerate gathers on one process)
    """What is gathered of one process."""
    return value


def pairs() -> dict[str, Any]:
    """DPO in both orders (conservative DPO mixes them), and IPO."""
    from trl import DPOTrainer

    source = cut(DPOTrainer._compute_loss, "chosen_logratios =", "if self.aux_loss_enabled")
    chosen, rejected = drawn(0, 4, scale=3.0), drawn(1, 4, scale=3.0)
    lengths = torch.tensor([1, 3, 2, 5, 4, 1, 2, 3])

    def loss(kind: str, better: Tensor, worse: Tensor) -> Tensor:
        trainer = SimpleNamespace(
            **{"f_divergence_type": "reverse_kl", "loss_types": [kind], "loss_weights": [1.0]},
            **{"beta": 0.3, "label_smoothing": 0.0, "use_weighting": False},
        )
        return run(
            source,
            self=trainer,
            chosen_logps=better,
            rejected_logps=worse,
            ref_chosen_logps=torch.zeros_like(better),
            ref_rejected_logps=torch.zeros_like(worse),
            completion_mask=torch.arange(5) < lengths[:, None],
        )["loss"]

    return {
        "inputs": {
            "beta": 0.3,
            "chosen": chosen.tolist(),
            "rejected": rejected.tolist(),
            "lengths": lengths.view(2, 4).tolist(),
        },
        "dpo": with_gradient(lambda *two: loss("sigmoid", *two), chosen, rejected),
        "dpo_swapped": with_gradient(lambda *two: loss("sigmoid", *two), rejected, chosen),
        "ipo": with_gradient(lambda *two: loss("ipo", *two), chosen, rejected),
    }


def thumbs() -> dict[str, Any]:
    """KTO, with its anchor above and below 0."""
    from trl import KTOTrainer

    source = cut(KTOTrainer._compute_loss, "kl = (KL_logps", "self._metrics[mode]")
    up, down = drawn(2, 3, scale=3.0), drawn(3, 2, scale=3.0)
    found: dict[str, Any] = {}
    for name, mean in (("anchored", 0.7), ("not_anchored", -2.0)):
        mismatched = drawn(4, 5) + mean

        def loss(up: Tensor, down: Tensor, mismatched: Tensor = mismatched) -> Tensor:
            trainer = SimpleNamespace(
                **{"beta": 0.3, "loss_type": "kto"},
                **{"desirable_weight": 1.2, "undesirable_weight": 0.7},
                accelerator=SimpleNamespace(gather_for_metrics=itself, device="cpu"),
            )
            losses = run(
                source,
                self=trainer,
                KL_logps=mismatched,
                ref_KL_logps=torch.zeros_like(mismatched),
                chosen_logps=up,
                rejected_logps=down,
                ref_chosen_logps=torch.zeros_like(up),
                ref_rejected_logps=torch.zeros_like(down),
            )["losses"]
            return losses.nanmean()

        found[name] = with_gradient(loss, up, down) | {"mismatched": mismatched.tolist()}
    settings = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    return {"inputs": settings | {"up": up.tolist(), "down": down.tolist()}, **found}


def groups() -> dict[str, Any]:
    """GRPO's advantages, and its loss by how tokens are averaged; Dr. GRPO; RLOO's advantages and loss."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer import grpo_trainer

    rewards = torch.tensor([1.0, 2.5, -0.5, -0.5, 3.0, 0.0], dtype=torch.float64)
    logprobs, old = drawn(5, 4, 5) - 2, drawn(5, 4, 5) - 2 + drawn(6, 4, 5, scale=0.3)
    reference = old + drawn(7, 4, 5, scale=0.5)
    advantages = drawn(8, 4)
    source = cut(
        GRPOTrainer._generate_and_score_completions,
        "mean_grouped_rewards = torch.nanmean(rewards",
        "is_std_zero",
    )

    def scaled(how: str) -> list[float]:
        trainer = SimpleNamespace(scale_rewards=how)
        names = {"rewards": rewards, "num_generations": 3, "nanstd": grpo_trainer.nanstd}
        return run(source, self=trainer, **names)["advantages"].tolist()

    lines = cut(GRPOTrainer._compute_loss, "log_ratio = per_token_logps", "# Entropy bonus")

    def loss(now: Tensor, kind: str, high: float) -> Tensor:
        trainer = SimpleNamespace(
            **{"importance_sampling_level": "token", "beta": 0.04, "loss_type": kind},
            **{"epsilon_low": 0.2, "epsilon_high": high, "off_policy_mask_threshold": None},
            **{"use_vllm": False, "current_gradient_accumulation_steps": 1},
            max_completion_length=8,
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        )
        return run(
            lines,
            self=trainer,
            per_token_logps=now,
            old_per_token_logps=old,
            inputs={"ref_per_token_logps": reference},
            advantages=advantages.unsqueeze(1),
            mask=MASK,
            entropy_mask=None,
        )["loss"]

    return {
        "inputs": {
            **{"rewards": rewards.tolist(), "samples": 3, "mask": MASK.tolist(), "clip": 0.2},
            **{"kl_coef": 0.04, "longest": 8, "advantages": advantages.tolist()},
            **{
                name: value.tolist()
                for name, value in {
                    "logprobs": logprobs,
                    "old": old,
                    "reference": reference,
                }.items()
            },
        },
        "advantages": scaled("group"),
        "dr_advantages": scaled("none"),
        "grpo": with_gradient(lambda now: loss(now, "grpo", 0.2), logprobs),
        "clip_higher": with_gradient(lambda now: loss(now, "grpo", 0.28), logprobs),
        "token_mean": with_gradient(lambda now: loss(now, "bnpo", 0.2), logprobs),
        "dr_grpo": with_gradient(lambda now: loss(now, "dr_grpo", 0.2), logprobs),
        "rloo": rloo(RLOOTrainer, old, reference),
    }


def rloo(trainer_class: Any, old: Tensor, reference: Tensor) -> dict[str, Any]:  # noqa: ANN401 (TRL is not typed)
    """Advantages with the KL in the reward, and the loss of the policy that sampled."""
    rewards = torch.tensor([1.0, 2.5, -0.5, 3.0], dtype=torch.float64)
    source = cut(
        trainer_class._generate_and_score_completions, "per_token_kl = old", "# Unscorable"
    )
    trainer = SimpleNamespace(beta=0.05, normalize_advantages=False)
    advantages = run(
        source,
        self=trainer,
        old_per_token_logps=old,
        ref_per_token_logps=reference,
        completion_mask=MASK,
        rewards=rewards,
        num_generations=2,
        gather=itself,
        nanstd=torch.std,
    )["advantages"]
    lines = cut(trainer_class._compute_loss, "logps = (per_token_logps", "# Log the metrics")

    def loss(now: Tensor) -> Tensor:
        return run(
            lines,
            self=SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2),
            per_token_logps=now,
            completion_mask=MASK,
            inputs={"old_logps": (old * MASK).sum(1), "advantages": advantages},
        )["loss"]

    inputs = {"rewards": rewards.tolist(), "samples": 2, "kl_coef": 0.05}
    return inputs | {"advantages": advantages.tolist(), **with_gradient(loss, old)}


def ppo() -> dict[str, Any]:
    """Rewards and advantages of whole rows, GAE on any rows, whitening, both clipped losses."""
    from trl.experimental.ppo import ppo_trainer

    train = ppo_trainer.PPOTrainer.train
    masked = {"masked_mean": ppo_trainer.masked_mean, "masked_whiten": ppo_trainer.masked_whiten}
    args = SimpleNamespace(
        **{
            "kl_estimator": "k1",
            "kl_coef": 0.05,
            "gamma": 0.97,
            "lam": 0.9,
            "whiten_rewards": False,
        },
        **{"cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.5},
    )
    padding = MASK == 0
    logprobs, reference, values = drawn(9, 4, 5) - 2, drawn(10, 4, 5) - 2, drawn(11, 4, 5)
    scores = drawn(12, 4)
    whole = run(
        cut(train, "# 4. compute rewards", "empty_cache()"),
        **{"logprobs": logprobs, "ref_logprobs": reference, "values": values, "scores": scores},
        args=args,
        responses=logprobs,
        sequence_lengths=torch.full((4,), 4),
        sequence_lengths_p1=torch.full((4,), 5),
        padding_mask=torch.zeros_like(padding),
        **masked,
    )
    given = {"rewards": drawn(13, 4, 5) * MASK, "values": values * MASK}
    short = run(
        cut(train, "lastgaelam = 0", "empty_cache()"),
        **given,
        args=args,
        responses=logprobs,
        padding_mask=padding,
        **masked,
    )
    now, critic = logprobs + drawn(14, 4, 5, scale=0.3), values + drawn(15, 4, 5, scale=0.5)
    lines = cut(train, "vpredclipped = torch.clamp(", "accelerator.backward(loss)")

    def losses(now: Tensor, critic: Tensor) -> Tensor:
        return run(
            lines,
            **{"new_logprobs": now, "mb_logprobs": logprobs, "vpred": critic, "mb_values": values},
            mb_advantage=short["advantages"],
            mb_return=short["returns"],
            padding_mask=padding,
            padding_mask_p1=padding,
            micro_batch_inds=slice(None),
            args=args,
            **masked,
        )["loss"]

    tensors = {
        **{"logprobs": logprobs, "reference": reference, "values": values, "scores": scores},
        **{"rewards": given["rewards"], "now": now, "critic": critic, "mask": MASK},
    }
    numbers = vars(args) | {name: value.tolist() for name, value in tensors.items()}
    return {
        "inputs": numbers,
        "whole_returns": whole["returns"].tolist(),
        "returns": short["returns"].tolist(),
        "whitened": short["advantages"].tolist(),
        "losses": with_gradient(losses, now, critic),
    }


def main() -> None:
    """Write what the installed TRL has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    golden = json.loads(out.read_text()) if out.exists() else {}
    has_ppo = find_spec("trl.experimental.ppo") is not None
    parts = {"ppo": ppo} if has_ppo else {"pairs": pairs, "thumbs": thumbs, "groups": groups}
    golden |= {name: {"trl": trl.__version__, **part()} for name, part in parts.items()}
    out.write_text(json.dumps(golden) + "\n")
    print(out)


if __name__ == "__main__":
    main()
