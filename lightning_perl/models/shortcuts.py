"""Work that is saved because its result is known or not needed, each kind with a switch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shortcuts:
    """Ways to save work. None of them changes a result by more than rounding.

    Args:
        sampled_logprobs: Use the log-probabilities that tokens were sampled with as the update's old ones.
            Off: the policy reads every rollout again before the update. In bfloat16 the two differ by
            rounding (one token at a time or all at once).
        shared_value_pass: Take the values for advantages and returns from the critic's first update pass.
            Off: the critic reads every rollout once more before the update.
        frozen_head: Compute the logits of a frozen LM head once per update pass, not again in backward.
        fused_adapters: Compute a frozen linear layer and its adapter as one operation of autograd.
        lean_blocks: Recompute written-out norms and the activations of gated MLPs in backward instead of
            keeping them.
        recorded_decoding: On CUDA, record the step that samples a token as a CUDA graph and replay it. Off:
            Python launches every kernel of every step.
        shared_prompts: Read a prompt that occurs several times in a rollout batch once.
        length_buckets: Make micro-batches of rows of similar length, cut to their longest.
    """

    sampled_logprobs: bool = True
    shared_value_pass: bool = True
    frozen_head: bool = True
    fused_adapters: bool = True
    lean_blocks: bool = True
    recorded_decoding: bool = True
    shared_prompts: bool = True
    length_buckets: bool = True


PLAIN = Shortcuts(**dict.fromkeys(Shortcuts.__dataclass_fields__, False))
"""No shortcut at all."""


def chosen(shortcuts: bool | Shortcuts) -> Shortcuts:
    """What a module's argument ``shortcuts`` stands for: all of them for True, none for False."""
    if isinstance(shortcuts, Shortcuts):
        return shortcuts
    return Shortcuts() if shortcuts else PLAIN
