"""The tests tested: each check of functional/ and losses/ goes red on code wrong in one place.

A mutation is a piece of a function's source and what stands there instead. The source is compared
after ``ast`` has taken docstring, comments and line breaks out of it, so that only code can match
and a reformatted line still does. A piece that is gone, or there twice, is an error: a mutation
that no longer mutates must not pass.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import lightning_perl.functional
import lightning_perl.losses
from lightning_perl.functional.advantages import generalized_advantages, token_rewards
from lightning_perl.functional.logprobs import (
    at_least_fp32,
    chosen_logprobs,
    chunked_logprobs,
    frozen_head_logprobs,
    k1,
    k2,
    k3,
    logprobs_and_directions,
)
from lightning_perl.functional.masked import masked_mean, masked_row_sums, masked_sum, whiten
from lightning_perl.functional.packing import (
    attention_bias,
    common_prefix,
    pack,
    packed_tokens,
    places,
    plan,
    plan_samples,
    saves_work,
    unpack,
)
from lightning_perl.functional.sequences import (
    at_columns,
    at_last_response,
    cuts,
    last_true,
    pad_left,
    pad_right,
    position_ids,
    predicting,
    until_stop,
)
from lightning_perl.losses.language_modeling import cross_entropy
from lightning_perl.losses.ppo import clipped_surrogate, clipped_value_loss
from lightning_perl.losses.reinforce import baseline_loss, policy_gradient
from lightning_perl.losses.reward import bradley_terry, centering, thumbs
from lightning_perl.losses.rloo import leave_one_out
from tests.functional.test_advantages import check_generalized_advantages, check_token_rewards
from tests.functional.test_kl import check_k1, check_k2, check_k3
from tests.functional.test_logprobs import (
    check_at_least_fp32,
    check_chosen_logprobs,
    check_chunked_logprobs,
    check_frozen_head_logprobs,
    check_logprobs_and_directions,
)
from tests.functional.test_masked import (
    check_masked_mean,
    check_masked_row_sums,
    check_masked_sum,
    check_whiten,
)
from tests.functional.test_packing import CHECKS as PACKING_CHECKS
from tests.functional.test_sequences import (
    check_at_columns,
    check_at_last_response,
    check_cuts,
    check_last_true,
    check_pad_left,
    check_pad_right,
    check_position_ids,
    check_predicting,
    check_until_stop,
)
from tests.losses.test_language_modeling import check_cross_entropy
from tests.losses.test_ppo import check_clipped_surrogate, check_clipped_value_loss
from tests.losses.test_reinforce import check_baseline_loss, check_policy_gradient
from tests.losses.test_reward import check_bradley_terry, check_centering, check_thumbs
from tests.losses.test_rloo import check_leave_one_out

Function = Callable[..., Any]


class Mutation(NamedTuple):
    """One wrong in a function.

    Attributes:
        name: What is wrong, for the test's id.
        old: A piece of the source, as `ast.unparse` writes it. Stands there exactly once.
        new: What stands there instead.
    """

    name: str
    old: str
    new: str


CHECKS: dict[Function, Callable[[Function], None]] = {
    position_ids: check_position_ids,
    last_true: check_last_true,
    at_columns: check_at_columns,
    predicting: check_predicting,
    at_last_response: check_at_last_response,
    until_stop: check_until_stop,
    pad_left: check_pad_left,
    pad_right: check_pad_right,
    masked_sum: check_masked_sum,
    masked_mean: check_masked_mean,
    whiten: check_whiten,
    k1: check_k1,
    k2: check_k2,
    k3: check_k3,
    token_rewards: check_token_rewards,
    generalized_advantages: check_generalized_advantages,
    at_least_fp32: check_at_least_fp32,
    chosen_logprobs: check_chosen_logprobs,
    chunked_logprobs: check_chunked_logprobs,
    logprobs_and_directions: check_logprobs_and_directions,
    frozen_head_logprobs: check_frozen_head_logprobs,
    cuts: check_cuts,
    cross_entropy: check_cross_entropy,
    clipped_surrogate: check_clipped_surrogate,
    clipped_value_loss: check_clipped_value_loss,
    policy_gradient: check_policy_gradient,
    leave_one_out: check_leave_one_out,
    masked_row_sums: check_masked_row_sums,
    baseline_loss: check_baseline_loss,
    bradley_terry: check_bradley_terry,
    centering: check_centering,
    thumbs: check_thumbs,
    **PACKING_CHECKS,
}

MUTATIONS: dict[Function, list[Mutation]] = {
    common_prefix: [
        Mutation("a row without a token of its own", " - 1", ""),
        Mutation("one row differs, nobody minds", "any(", "all("),
        Mutation("one too many", "return column", "return column + 1"),
    ],
    packed_tokens: [
        Mutation("prompt counted twice", "(len(rows) - 1)", "(len(rows) - 2)"),
    ],
    plan: [
        Mutation("answers on one another", "start += len(row) - shared", "start += 0"),
        Mutation("gaps as long as the prompt", "len(row) - shared", "len(row)"),
        Mutation("the last line's columns", "max(columns, start)", "start"),
    ],
    plan_samples: [
        Mutation("answers on one another", "row % samples * response_tokens", "0 * row"),
        Mutation("rows are lines", "row // samples,", "row,"),
        Mutation("one answer a line", "prompt_tokens + samples * response_tokens", "tokens"),
    ],
    saves_work: [
        Mutation("attention is free", "6 * hidden_size + packing.columns", "6 * hidden_size"),
        Mutation("always", "packed <", "0 * packed <"),
    ],
    places: [
        Mutation("lines on one another", "packing.line[:, None] * packing.columns + inside", "inside"),
        Mutation("answers where they stood", "torch.where(column < packing.shared[:, None], column, own)",
                 "column"),
        Mutation("outside the batch", ".clamp(max=packing.columns - 1)", ""),
    ],
    pack: [
        Mutation("padding laid too", "torch.where(attention_mask, places(packing, tokens), size)",
                 "places(packing, tokens)"),
        Mutation("all tokens shared", "column < packing.shared[:, None]", "column >= 0"),
        Mutation("nothing shared", "column < packing.shared[:, None]", "column < 0"),
        Mutation("rows counted from zero", "torch.arange(1, len(ids) + 1,", "torch.arange(0, len(ids),"),
        Mutation("positions run on", "laid(position_ids(attention_mask), 0)",
                 "laid(places(packing, tokens), 0)"),
    ],
    attention_bias: [
        Mutation("answers see one another", "key == query", "key != NOBODY"),
        Mutation("the prompt is hidden", "(key == SHARED) | ", ""),
        Mutation("looks ahead", "& ~later", ""),
        Mutation("empty softmax", " | itself", ""),
        Mutation("padding is seen", "(key != NOBODY)", "(key == key)"),
        Mutation("boolean", "torch.where(visible, zero, torch.finfo(dtype).min)", "visible"),
    ],
    unpack: [
        Mutation("the first columns", "where.flatten()", "torch.arange(where.numel()) % len(where)"),
    ],
    position_ids: [
        Mutation("starts at one", " - 1", ""),
        Mutation("no clamp", ".clamp(min=0)", ""),
        Mutation("counts columns", "attention_mask.long()", "attention_mask.long().clamp(min=1)"),
    ],
    last_true: [
        Mutation("first instead of last", "amax", "amin"),
        Mutation("inverted mask", "mask * columns", "~mask * columns"),
    ],
    at_columns: [
        Mutation("same column for all", "values[rows, columns]", "values[rows, columns[0]]"),
    ],
    predicting: [
        Mutation("the tokens' own states", "-response_tokens - 1:-1", "-response_tokens:"),
        Mutation("one state too early", "-response_tokens - 1:-1", "-response_tokens - 2:-2"),
        Mutation("one state too many", "-response_tokens - 1:-1", "-response_tokens - 1:"),
    ],
    at_last_response: [
        Mutation("in the prompt", " + prompt_tokens", ""),
        Mutation("one column early", " + prompt_tokens", " + prompt_tokens - 1"),
        Mutation("inverted mask", "last_true(response_mask)", "last_true(~response_mask)"),
    ],
    until_stop: [
        Mutation("stop token left out", " - is_stop.long()", ""),
        Mutation("second stop instead of first", "== 0", "<= 1"),
        Mutation("all stop ids at once", "(response_ids.unsqueeze(-1) == stops).any(-1)",
                 "(response_ids.unsqueeze(-1) == stops).all(-1)"),
        Mutation("stopped inverted", "is_stop.any(-1))", "~is_stop.any(-1))"),
        Mutation("stopped only at the end", "is_stop.any(-1))", "is_stop[:, -1])"),
    ],
    pad_left: [
        Mutation("ids on the wrong side", "[pad_id] * (width - len(row)) + list(row)",
                 "list(row) + [pad_id] * (width - len(row))"),
        Mutation("inverted mask", "[False] * (width - len(row)) + [True] * len(row)",
                 "[True] * (width - len(row)) + [False] * len(row)"),
        Mutation("mask on the wrong side", "[False] * (width - len(row)) + [True] * len(row)",
                 "[True] * len(row) + [False] * (width - len(row))"),
    ],
    pad_right: [
        Mutation("ids on the wrong side", "list(row) + [pad_id] * (width - len(row))",
                 "[pad_id] * (width - len(row)) + list(row)"),
        Mutation("inverted mask", "[True] * len(row) + [False] * (width - len(row))",
                 "[False] * len(row) + [True] * (width - len(row))"),
    ],
    masked_sum: [
        Mutation("inverted mask", "torch.where(mask,", "torch.where(~mask,"),
        Mutation("product instead of where", "torch.where(mask, values, torch.zeros_like(values))",
                 "(values / mask)"),
        Mutation("no mask", "torch.where(mask, values, torch.zeros_like(values))", "values"),
    ],
    masked_mean: [
        Mutation("mean of all columns", "mask.sum().clamp(min=1)", "mask.numel()"),
        Mutation("divides by nothing counted", ".clamp(min=1)", ""),
        Mutation("denominator ignored", "if denominator is None", "if True"),
        Mutation("sum", " / denominator", ""),
    ],
    whiten: [
        Mutation("mean of everything", "masked_mean(values, mask)", "values.mean()"),
        Mutation("variance of everything", "masked_mean((values - mean) ** 2, mask)",
                 "((values - mean) ** 2).mean()"),
        Mutation("mean kept", "torch.where(mask, (values - mean)", "torch.where(mask, values"),
        Mutation("variance instead of deviation", ".rsqrt()", ".reciprocal()"),
        Mutation("unbiased variance", "masked_mean((values - mean) ** 2, mask)",
                 "masked_mean((values - mean) ** 2, mask, mask.sum() - 1)"),
        Mutation("epsilon ignored", "variance + epsilon", "variance + 1e-08"),
        Mutation("inverted mask", "torch.where(mask,", "torch.where(~mask,"),
    ],
    k1: [
        Mutation("sign", "logprobs - reference_logprobs", "reference_logprobs - logprobs"),
    ],
    k2: [
        Mutation("not halved", " / 2", ""),
        Mutation("absolute value", "(logprobs - reference_logprobs) ** 2",
                 "(logprobs - reference_logprobs).abs()"),
    ],
    k3: [
        Mutation("sign of the exponent", "expm1(-difference)", "expm1(difference)"),
        Mutation("sign of the line", ") + difference", ") - difference"),
        Mutation("arguments swapped", "logprobs - reference_logprobs",
                 "reference_logprobs - logprobs"),
        Mutation("digits lost", "torch.expm1(-difference)", "torch.exp(-difference) - 1"),
    ],
    token_rewards: [
        Mutation("penalty is a bonus", "-kl_coef", "kl_coef"),
        Mutation("log ratio swapped", "logprobs - reference_logprobs",
                 "reference_logprobs - logprobs"),
        Mutation("score one column later", "last_true(response_mask)",
                 "(last_true(response_mask) + 1)"),
        Mutation("score on every token", "is_last * scores", "response_mask * scores"),
        Mutation("score instead of penalty", "penalty + is_last *",
                 "~is_last * penalty + is_last *"),
        Mutation("penalty on padding", "torch.where(response_mask, rewards, "
                 "torch.zeros_like(rewards))", "rewards"),
        Mutation("inverted mask", "torch.where(response_mask,", "torch.where(~response_mask,"),
    ],
    generalized_advantages: [
        Mutation("error undiscounted", "discount * next_value", "next_value"),
        Mutation("carry undiscounted", "discount * gae_lambda * carried", "gae_lambda * carried"),
        Mutation("lambda dropped", "discount * gae_lambda * carried", "discount * carried"),
        Mutation("baseline added", " - values_seen[:, column]", " + values_seen[:, column]"),
        Mutation("own value as the next", "next_value = values_seen[:, column]",
                 "next_value = values_seen[:, column - 1]"),
        Mutation("padding's value bootstraps",
                 "torch.where(response_mask, values, torch.zeros_like(values))", "values"),
        Mutation("values of the padding only", "torch.where(response_mask, values,",
                 "torch.where(~response_mask, values,"),
        Mutation("rewards of the padding only", "torch.where(response_mask, rewards,",
                 "torch.where(~response_mask, rewards,"),
        Mutation("inverted mask", "response_mask.to(", "(~response_mask).to("),
        Mutation("forward in time", "reversed(range(values.shape[1]))", "range(values.shape[1])"),
        Mutation("columns reversed", "advantages[::-1]", "advantages"),
        Mutation("returns without the value", "stacked + values_seen", "stacked"),
    ],
    at_least_fp32: [
        Mutation("bf16 kept", "tensor.dtype in (torch.bfloat16, torch.float16)",
                 "tensor.dtype in (torch.float16,)"),
        Mutation("fp16 kept", "tensor.dtype in (torch.bfloat16, torch.float16)",
                 "tensor.dtype in (torch.bfloat16,)"),
        Mutation("float64 demoted", "tensor.dtype in (torch.bfloat16, torch.float16)",
                 "tensor.dtype != torch.float32"),
    ],
    chosen_logprobs: [
        Mutation("temperature dropped", " / temperature", ""),
        Mutation("temperature multiplies", " / temperature", " * temperature"),
        Mutation("logits left in bf16", "at_least_fp32(project(hidden))", "project(hidden)"),
        Mutation("not normalized", " - logits.logsumexp(-1, keepdim=True)", ""),
        Mutation("negative entropy", "-(logprobs.exp()", "(logprobs.exp()"),
        Mutation("entropy without gradient", "-(logprobs.exp() * logprobs).sum(-1)",
                 "-(logprobs.exp() * logprobs).sum(-1).detach()"),
    ],
    chunked_logprobs: [
        Mutation("logits kept for backward",
                 "checkpoint(chosen_logprobs, *inputs, use_reentrant=False)", "chosen_logprobs(*inputs)"),
        Mutation("temperature dropped when training", "project, temperature, entropy)",
                 "project, 1.0 if torch.is_grad_enabled() else temperature, entropy)"),
        Mutation("everything in one chunk", "logprobs, entropies = ([], [])",
                 "logprobs, entropies, chunk_tokens = ([], [], 10 ** 9)"),
        Mutation("first chunk again and again", "flat_hidden[start:start + chunk_tokens]",
                 "flat_hidden[:chunk_tokens]"),
        Mutation("outputs swapped", "logprobs.append(results[0])", "logprobs.append(results[1])"),
        Mutation("entropy from the log-probability", "entropies.append(results[1])",
                 "entropies.append(-results[0])"),
    ],
    logprobs_and_directions: [
        Mutation("temperature dropped",
                 "part if temperature == 1 else at_least_fp32(part) / temperature", "part"),
        Mutation("temperature in bf16", "at_least_fp32(part) / temperature", "part / temperature"),
        Mutation("the slope's temperature dropped",
                 "slope if temperature == 1 else slope / temperature", "slope"),
        Mutation("the wrong way", "probabilities.neg_()", "probabilities"),
        Mutation("the target's own part left out", ".scatter_add_(-1, index, ones)", ""),
        Mutation("entropy's sign", "-torch.linalg.vecdot", "torch.linalg.vecdot"),
        Mutation("softmax in bf16", "torch.promote_types(part.dtype, torch.float32)", "part.dtype"),
    ],
    frozen_head_logprobs: [
        Mutation("temperature dropped", "project, temperature, chunk", "project, 1.0, chunk"),
        Mutation("everything in one chunk", "temperature, chunk_tokens, entropy)",
                 "temperature, 10 ** 9, entropy)"),
        Mutation("outputs swapped", "(logprobs.view_as(targets), entropies.view",
                 "(entropies.view_as(targets), logprobs.view"),
    ],
    cuts: [
        Mutation("the shortest first", "descending=True", "descending=False"),
        Mutation("the first answer's columns", "max((used", "min((used"),
        Mutation("the most padding", "min((unused", "max((unused"),
        Mutation("a column short", "last_true(sequences.response_mask) + 1",
                 "last_true(sequences.response_mask)"),
        Mutation("spans of other rows", "[order].tolist()", ".tolist()"),
        Mutation("always by length", "if by_length:", "if True:"),
    ],
    cross_entropy: [
        Mutation("sign", "-logprobs", "logprobs"),
        Mutation("inverted mask", "mask, denominator)", "~mask, denominator)"),
        Mutation("denominator dropped", "mask, denominator)", "mask)"),
    ],
    clipped_surrogate: [
        Mutation("ratio upside down", "logprobs - old_logprobs", "old_logprobs - logprobs"),
        Mutation("log ratio of padding", "torch.where(response_mask, logprobs - old_logprobs, "
                 "torch.zeros_like(logprobs))", "logprobs - old_logprobs"),
        Mutation("ascent on the plain term", "plain = -advantages", "plain = advantages"),
        Mutation("ascent on the clipped term", "clipped = -advantages", "clipped = advantages"),
        Mutation("clip dropped", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio"),
        Mutation("no upper clip", "1 - clip_range, 1 + clip_range", "1 - clip_range"),
        Mutation("no lower clip", "ratio.clamp(1 - clip_range, 1 + clip_range)",
                 "ratio.clamp(max=1 + clip_range)"),
        Mutation("upper clip below one", "1 + clip_range", "1 - clip_range"),
        Mutation("lower clip above one", "1 - clip_range", "1 + clip_range"),
        Mutation("optimistic", "torch.maximum", "torch.minimum"),
        Mutation("clipped term only", "torch.maximum(plain, clipped)", "clipped"),
        Mutation("loss over the padding", "torch.maximum(plain, clipped), response_mask",
                 "torch.maximum(plain, clipped), ~response_mask"),
        Mutation("loss denominator dropped",
                 "masked_mean(torch.maximum(plain, clipped), response_mask, denominator)",
                 "masked_mean(torch.maximum(plain, clipped), response_mask)"),
        Mutation("ties are clipped", "clipped > plain", "clipped >= plain"),
        Mutation("fraction of the unclipped", "clipped > plain", "clipped < plain"),
        Mutation("fraction of the padding", ".to(ratio.dtype), response_mask",
                 ".to(ratio.dtype), ~response_mask"),
        Mutation("fraction denominator dropped",
                 "(clipped > plain).to(ratio.dtype), response_mask, denominator",
                 "(clipped > plain).to(ratio.dtype), response_mask"),
        Mutation("kl the other way round", "k3(old_logprobs, logprobs)",
                 "k3(logprobs, old_logprobs)"),
        Mutation("kl of the padding", "k3(old_logprobs, logprobs), response_mask",
                 "k3(old_logprobs, logprobs), ~response_mask"),
        Mutation("statistics hold the graph", "torch.no_grad()", "torch.enable_grad()"),
    ],
    clipped_value_loss: [
        Mutation("clip dropped",
                 ".clamp(old_values - value_clip_range, old_values + value_clip_range)", ""),
        Mutation("clip around zero", "old_values - value_clip_range, old_values + value_clip_range",
                 "-value_clip_range, value_clip_range"),
        Mutation("only upward clip", "old_values - value_clip_range, old_values",
                 "max=old_values"),
        Mutation("lower bound above", "old_values - value_clip_range",
                 "old_values + value_clip_range"),
        Mutation("optimistic", "torch.maximum", "torch.minimum"),
        Mutation("not halved", "0.5 * ", ""),
        Mutation("absolute error", "(values - returns) ** 2", "(values - returns).abs()"),
        Mutation("fitted to the old values", "(near - returns) ** 2", "(near - old_values) ** 2"),
        Mutation("loss over the padding", "torch.maximum(plain, clipped), response_mask",
                 "torch.maximum(plain, clipped), ~response_mask"),
        Mutation("loss denominator dropped",
                 "masked_mean(torch.maximum(plain, clipped), response_mask, denominator)",
                 "masked_mean(torch.maximum(plain, clipped), response_mask)"),
        Mutation("ties are clipped", "clipped > plain", "clipped >= plain"),
        Mutation("fraction of the padding", ".to(values.dtype), response_mask",
                 ".to(values.dtype), ~response_mask"),
    ],
    leave_one_out: [
        Mutation("its own reward counts", "(groups.sum(1, keepdim=True) - groups)", "groups.sum(1, keepdim=True)"),
        Mutation("mean of all", "(samples - 1)", "samples"),
        Mutation("groups across", "rewards.view(-1, samples)", "rewards.view(samples, -1)"),
        Mutation("no baseline", "(groups - others)", "groups"),
    ],
    masked_row_sums: [
        Mutation("padding counts", "torch.where(mask, values, torch.zeros_like(values))", "values"),
        Mutation("columns", ".sum(1)", ".sum(0)"),
    ],
    policy_gradient: [
        Mutation("descent", "-logprobs", "logprobs"),
        Mutation("advantages get a gradient", ".detach()", ""),
        Mutation("inverted mask", "response_mask, denominator)", "~response_mask, denominator)"),
        Mutation("denominator dropped", "response_mask, denominator)", "response_mask)"),
    ],
    baseline_loss: [
        Mutation("returns get a gradient", ".detach()", ""),
        Mutation("absolute error", "(returns.detach() - values) ** 2",
                 "(returns.detach() - values).abs()"),
        Mutation("halved", "** 2", "** 2 / 2"),
        Mutation("inverted mask", "response_mask, denominator)", "~response_mask, denominator)"),
        Mutation("denominator dropped", "response_mask, denominator)", "response_mask)"),
    ],
    bradley_terry: [
        Mutation("rejected preferred", "chosen_scores - rejected_scores",
                 "rejected_scores - chosen_scores"),
        Mutation("margin the wrong way", "difference - margin", "difference + margin"),
        Mutation("margin dropped", "difference - margin", "difference"),
        Mutation("sign", "-F.logsigmoid", "F.logsigmoid"),
        Mutation("sum of the pairs", ".sum() / count, stats", ".sum(), stats"),
        Mutation("ties are wrong", "0.5 * (difference == 0)", "0.0 * (difference == 0)"),
        Mutation("ties are right", "difference > 0", "difference >= 0"),
        Mutation("no pairs divide by zero", "max(difference.shape[0], 1)", "difference.shape[0]"),
        Mutation("statistics hold the graph", "torch.no_grad()", "torch.enable_grad()"),
    ],
    centering: [
        Mutation("the difference instead", "chosen_scores + rejected_scores",
                 "chosen_scores - rejected_scores"),
        Mutation("absolute value", "(chosen_scores + rejected_scores) ** 2",
                 "(chosen_scores + rejected_scores).abs()"),
        Mutation("sum of the pairs", " / max(chosen_scores.shape[0], 1)", ""),
        Mutation("no pairs divide by zero", "max(chosen_scores.shape[0], 1)",
                 "chosen_scores.shape[0]"),
    ],
    thumbs: [
        Mutation("weight of the whole row", "reduction='none', pos_weight=weight)",
                 "reduction='none') * (1 + (positive_weight - 1) * targets)"),
        Mutation("weight upside down", "scores.new_tensor(positive_weight)",
                 "scores.new_tensor(1 / positive_weight)"),
        Mutation("weight dropped", ", pos_weight=weight", ""),
        Mutation("labels inverted", "labels.to(scores.dtype)", "1 - labels.to(scores.dtype)"),
        Mutation("loss of the unlabelled", "masked_mean(losses, labelled)",
                 "masked_mean(losses, ~labelled)"),
        Mutation("mean over every row", "masked_mean(losses, labelled)",
                 "masked_mean(losses, labelled, scores.shape[0])"),
        Mutation("threshold on a probability", "scores > 0)", "scores > 0.5)"),
        Mutation("accuracy inverted", "(scores > 0) == (", "(scores > 0) != ("),
        Mutation("accuracy of the unlabelled", "masked_mean(right, labelled)",
                 "masked_mean(right, ~labelled)"),
        Mutation("score of every row", "masked_mean(scores, labelled)", "scores.mean()"),
    ],
}  # fmt: skip

CASES = [
    pytest.param(function, mutation, id=f"{function.__name__}-{mutation.name.replace(' ', '_')}")
    for function, mutations in MUTATIONS.items()
    for mutation in mutations
]


def code_of(function: Function) -> str:
    """A function's source without docstring, comments and line breaks of its own."""
    tree = ast.parse(inspect.getsource(function))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.unparse(tree)


def with_code(function: Function, code: str) -> Function:
    """The function that ``code`` defines, among the names of the original's module."""
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(code, f"<mutant of {function.__name__}>", "exec"), namespace)
    changed: Function = namespace[function.__name__]
    return changed


def mutate(function: Function, mutation: Mutation) -> Function:
    """The function with one piece of its code replaced.

    Raises:
        LookupError: The piece is not in the code exactly once.
    """
    code = code_of(function)
    if (found := code.count(mutation.old)) != 1:
        raise LookupError(
            f"mutation {mutation.name!r} of {function.__name__}: expected {mutation.old!r} once in "
            f"its code, found it {found} times; update the mutation to the code below\n{code}"
        )
    return with_code(function, code.replace(mutation.old, mutation.new))


def public_functions() -> set[str]:
    """Qualified names of all public functions of functional/ and losses/."""
    names = set()
    for package in (lightning_perl.functional, lightning_perl.losses):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            names |= {
                f"{info.name}.{name}"
                for name, member in inspect.getmembers(module, inspect.isfunction)
                if member.__module__ == info.name and not name.startswith("_")
            }
    return names


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_check_is_green_on_the_function_itself(function: Function) -> None:
    CHECKS[function](with_code(function, code_of(function)))


@pytest.mark.parametrize(("function", "mutation"), CASES)
def test_check_goes_red_on_a_mutant(function: Function, mutation: Mutation) -> None:
    mutant = mutate(function, mutation)
    with pytest.raises(AssertionError):
        CHECKS[function](mutant)


def test_every_public_function_has_a_mutant() -> None:
    # a new function needs a check in CHECKS and a mutation of its sign, mask or clip
    mutated = {f"{function.__module__}.{function.__name__}" for function in MUTATIONS}
    assert public_functions() - mutated == set()


@pytest.mark.parametrize("old", ["a line long gone", "ratio"], ids=["gone", "ambiguous"])
def test_a_stale_mutation_is_an_error(old: str) -> None:
    with pytest.raises(LookupError, match="mutation 'stale' of clipped_surrogate: expected"):
        mutate(clipped_surrogate, Mutation("stale", old, ""))


def test_a_docstring_is_no_code() -> None:
    assert "as a token mean" in inspect.getsource(clipped_surrogate)
    with pytest.raises(LookupError, match="found it 0 times"):
        mutate(clipped_surrogate, Mutation("in the docstring", "as a token mean", ""))
