"""What is done in less time or memory than the plain way, each with its switch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shortcuts:
    """Ways round work whose result is known or not needed. None changes a result by more than rounding.

    Turn one off to be sure that it is not what you see.

    Args:
        sampled_logprobs: The log-probabilities that tokens were sampled with are the update's old ones;
            off, the policy reads every rollout again before the update. In bfloat16 the two differ by
            rounding (one token at a time or all at once), and the sampled ones are those of the
            distribution that was really drawn from.
        shared_value_pass: The first update's pass of the critic gives the values that advantages and returns
            are made of; off, the critic reads every rollout once more before.
        frozen_head: Logits of a frozen LM head are made once per update pass, not again in backward.
        fused_adapters: A frozen linear layer and its adapter are one operation to autograd.
        lean_blocks: Norms that a family writes out, and the activation of a gated MLP, are computed again in
            backward instead of kept.
        short_attention: On a CPU in half precision, attention over up to 128 keys, and any decoding step, is
            plain matrix products instead of torch's fused kernel.
        preallocated_cache: Keys and values of a rollout get their room at once, not anew with each token.
        recorded_decoding: On CUDA, the step that samples a token is recorded as a CUDA graph and played again;
            off, Python asks for every kernel of every step. Needs ``preallocated_cache``.
        shared_prompts: A prompt that a rollout batch has several times is read once, and answered as often.
        length_buckets: Micro-batches are made of rows of similar length, cut to their longest.
    """

    sampled_logprobs: bool = True
    shared_value_pass: bool = True
    frozen_head: bool = True
    fused_adapters: bool = True
    lean_blocks: bool = True
    short_attention: bool = True
    preallocated_cache: bool = True
    recorded_decoding: bool = True
    shared_prompts: bool = True
    length_buckets: bool = True


PLAIN = Shortcuts(**dict.fromkeys(Shortcuts.__dataclass_fields__, False))
"""None of them."""


def chosen(shortcuts: bool | Shortcuts) -> Shortcuts:
    """What a module's argument ``shortcuts`` stands for: all of them for True, none for False."""
    if isinstance(shortcuts, Shortcuts):
        return shortcuts
    return Shortcuts() if shortcuts else PLAIN
