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
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import lightning_perl.functional
import lightning_perl.losses
import tests.functional
import tests.losses
from lightning_perl.losses.ppo import clipped_surrogate

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


def modules_of(*packages: ModuleType) -> Iterator[ModuleType]:
    for package in packages:
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name != __name__:
                yield importlib.import_module(info.name)


def functions_of(*packages: ModuleType) -> dict[str, Function]:
    """The public functions that these packages' modules define, by name."""
    return {
        name: member
        for module in modules_of(*packages)
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if member.__module__ == module.__name__ and not name.startswith("_")
    }


FUNCTIONS = functions_of(lightning_perl.functional, lightning_perl.losses)
_CHECKS = functions_of(tests.functional, tests.losses)
CHECKS = {name: _CHECKS[f"check_{name}"] for name in FUNCTIONS if f"check_{name}" in _CHECKS}

MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "common_prefix": [
        ("a row without a token of its own", " - 1", ""),
        ("one row differs, nobody minds", "any(", "all("),
        ("one too many", "return column", "return column + 1"),
    ],
    "packed_tokens": [
        ("prompt counted twice", "(len(rows) - 1)", "(len(rows) - 2)"),
    ],
    "plan": [
        ("answers on one another", "start += len(row) - shared", "start += 0"),
        ("gaps as long as the prompt", "len(row) - shared", "len(row)"),
        ("a line for each group", "ends[line] += sizes[group]", "ends[line] = columns"),
        ("lines without end", "end + sizes[group] <= columns", "end <= columns"),
        ("pairs on one another", "start = first + shared", "start = shared"),
        ("groups as they come", "-sizes[group])", "0)"),
    ],
    "plan_samples": [
        ("answers on one another", "row % samples * response_tokens", "0 * row"),
        ("rows are lines", "row // samples,", "row,"),
        ("one answer a line", "prompt_tokens + samples * response_tokens", "tokens"),
    ],
    "saves_work": [
        ("attention is free", "6 * hidden_size + packing.columns", "6 * hidden_size"),
        ("always", "packed <", "0 * packed <"),
    ],
    "places": [
        ("lines on one another", "packing.line[:, None] * packing.columns + inside", "inside"),
        ("answers where they stood", "torch.where(column < packing.shared[:, None], together, own)", "together"),
        ("prompts on one another", "column + packing.first[:, None]", "column"),
        ("outside the batch", ".clamp(max=packing.columns - 1)", ""),
    ],
    "pack": [
        ("padding laid too", "torch.where(attention_mask, places(packing, tokens), size)",
         "places(packing, tokens)"),
        ("all tokens shared", "column < packing.shared[:, None]", "column >= 0"),
        ("nothing shared", "column < packing.shared[:, None]", "column < 0"),
        ("lines are groups", "packing.line * packing.columns + packing.first", "packing.line * packing.columns"),
        ("rows counted from zero", "torch.arange(1, len(ids) + 1,", "torch.arange(0, len(ids),"),
        ("positions run on", "laid(position_ids(attention_mask), 0)", "laid(places(packing, tokens), 0)"),
    ],
    "attention_bias": [
        ("answers see one another", "(key == query)", "(group[:, :, None] == group[:, None, :])"),
        ("the prompt is hidden", "(shared | ", "("),
        ("prompts see one another", " & (group[:, :, None] == group[:, None, :])", ""),
        ("looks ahead", "& ~later", ""),
        ("empty softmax", " | itself", ""),
        ("padding is seen", "(key > SHARED)", "(key == key)"),
        ("boolean", "torch.where(visible, zero, torch.finfo(dtype).min)", "visible"),
    ],
    "unpack": [
        ("the first columns", "where.flatten()", "torch.arange(where.numel()) % len(where)"),
    ],
    "position_ids": [
        ("starts at one", " - 1", ""),
        ("no clamp", ".clamp(min=0)", ""),
        ("counts columns", "attention_mask.long()", "attention_mask.long().clamp(min=1)"),
    ],
    "last_true": [
        ("first instead of last", "amax", "amin"),
        ("inverted mask", "mask * columns", "~mask * columns"),
    ],
    "predicting": [
        ("the tokens' own states", "-response_tokens - 1:-1", "-response_tokens:"),
        ("one state too early", "-response_tokens - 1:-1", "-response_tokens - 2:-2"),
        ("one state too many", "-response_tokens - 1:-1", "-response_tokens - 1:"),
    ],
    "at_last_response": [
        ("in the prompt", " + prompt_tokens", ""),
        ("one column early", " + prompt_tokens", " + prompt_tokens - 1"),
        ("same column for all", "last_true(response_mask) +", "last_true(response_mask)[0] +"),
        ("inverted mask", "last_true(response_mask)", "last_true(~response_mask)"),
    ],
    "until_stop": [
        ("stop token left out", " - is_stop.long()", ""),
        ("second stop instead of first", "== 0", "<= 1"),
        ("all stop ids at once", "(response_ids.unsqueeze(-1) == stops).any(-1)",
         "(response_ids.unsqueeze(-1) == stops).all(-1)"),
        ("stopped inverted", "is_stop.any(-1))", "~is_stop.any(-1))"),
        ("stopped only at the end", "is_stop.any(-1))", "is_stop[:, -1])"),
    ],
    "pad_left": [
        ("ids on the wrong side", "[pad_id] * (width - len(row)) + list(row)",
         "list(row) + [pad_id] * (width - len(row))"),
        ("inverted mask", "[False] * (width - len(row)) + [True] * len(row)",
         "[True] * (width - len(row)) + [False] * len(row)"),
        ("mask on the wrong side", "[False] * (width - len(row)) + [True] * len(row)",
         "[True] * len(row) + [False] * (width - len(row))"),
    ],
    "pad_right": [
        ("ids on the wrong side", "list(row) + [pad_id] * (width - len(row))",
         "[pad_id] * (width - len(row)) + list(row)"),
        ("inverted mask", "[True] * len(row) + [False] * (width - len(row))",
         "[False] * len(row) + [True] * (width - len(row))"),
    ],
    "masked_mean": [
        ("inverted mask", "torch.where(mask,", "torch.where(~mask,"),
        ("product instead of where", "torch.where(mask, values, torch.zeros_like(values))", "(values / mask)"),
        ("no mask", "torch.where(mask, values, torch.zeros_like(values))", "values"),
        ("mean of all columns", "mask.sum().clamp(min=1)", "mask.numel()"),
        ("divides by nothing counted", ".clamp(min=1)", ""),
        ("denominator ignored", "if denominator is None", "if True"),
        ("sum", " / denominator", ""),
    ],
    "whiten": [
        ("mean of everything", "masked_mean(values, mask)", "values.mean()"),
        ("variance of everything", "masked_mean((values - mean) ** 2, mask)", "((values - mean) ** 2).mean()"),
        ("mean kept", "torch.where(mask, (values - mean)", "torch.where(mask, values"),
        ("variance instead of deviation", ".rsqrt()", ".reciprocal()"),
        ("unbiased variance", "masked_mean((values - mean) ** 2, mask)",
         "masked_mean((values - mean) ** 2, mask, mask.sum() - 1)"),
        ("no epsilon", "variance + 1e-08", "variance"),
        ("inverted mask", "torch.where(mask,", "torch.where(~mask,"),
    ],
    "k1": [
        ("sign", "logprobs - reference_logprobs", "reference_logprobs - logprobs"),
    ],
    "k2": [
        ("not halved", "0.5 * ", ""),
        ("not squared", " ** 2", ""),
    ],
    "jensen_shannon": [
        ("not halved", "0.5 * ", ""),
        ("reference's part forgotten", "policy_part + reference_part", "policy_part"),
        ("without importance weights", "torch.exp(-difference) * ", ""),
        ("arguments swapped", "logprobs - reference_logprobs", "reference_logprobs - logprobs"),
        ("the difference's sign", "softplus(difference)", "softplus(-difference)"),
    ],
    "k3": [
        ("sign of the exponent", "expm1(-difference)", "expm1(difference)"),
        ("sign of the line", ") + difference", ") - difference"),
        ("arguments swapped", "logprobs - reference_logprobs", "reference_logprobs - logprobs"),
        ("digits lost", "torch.expm1(-difference)", "torch.exp(-difference) - 1"),
    ],
    "token_rewards": [
        ("penalty is a bonus", "-kl_coef", "kl_coef"),
        ("log ratio swapped", "(logprobs, reference_logprobs)", "(reference_logprobs, logprobs)"),
        ("always k1", "estimator(logprobs, reference_logprobs)", "(logprobs - reference_logprobs)"),
        ("score one column later", "last_true(response_mask)", "(last_true(response_mask) + 1)"),
        ("score on every token", "is_last * scores", "response_mask * scores"),
        ("score instead of penalty", "penalty + is_last *", "~is_last * penalty + is_last *"),
        ("penalty on padding", "torch.where(response_mask, rewards, torch.zeros_like(rewards))", "rewards"),
        ("inverted mask", "torch.where(response_mask,", "torch.where(~response_mask,"),
    ],
    "generalized_advantages": [
        ("error undiscounted", "discount * next_value", "next_value"),
        ("carry undiscounted", "discount * gae_lambda * carried", "gae_lambda * carried"),
        ("lambda dropped", "discount * gae_lambda * carried", "discount * carried"),
        ("baseline added", " - values_seen[:, column]", " + values_seen[:, column]"),
        ("own value as the next", "next_value = values_seen[:, column]",
         "next_value = values_seen[:, column - 1]"),
        ("padding's value bootstraps", "torch.where(response_mask, values, torch.zeros_like(values))", "values"),
        ("values of the padding only", "torch.where(response_mask, values,",
         "torch.where(~response_mask, values,"),
        ("rewards of the padding only", "torch.where(response_mask, rewards,",
         "torch.where(~response_mask, rewards,"),
        ("inverted mask", "response_mask.to(", "(~response_mask).to("),
        ("forward in time", "reversed(range(values.shape[1]))", "range(values.shape[1])"),
        ("columns reversed", "advantages[::-1]", "advantages"),
        ("returns without the value", "stacked + values_seen", "stacked"),
    ],
    "at_least_fp32": [
        ("bf16 kept", "tensor.dtype in (torch.bfloat16, torch.float16)", "tensor.dtype in (torch.float16,)"),
        ("fp16 kept", "tensor.dtype in (torch.bfloat16, torch.float16)", "tensor.dtype in (torch.bfloat16,)"),
        ("float64 demoted", "tensor.dtype in (torch.bfloat16, torch.float16)", "tensor.dtype != torch.float32"),
    ],
    "chosen_logprobs": [
        ("temperature dropped", " / temperature", ""),
        ("temperature multiplies", " / temperature", " * temperature"),
        ("logits left in bf16", "at_least_fp32(project(hidden))", "project(hidden)"),
        ("not normalized", " - logits.logsumexp(-1, keepdim=True)", ""),
        ("negative entropy", "-(logprobs.exp()", "(logprobs.exp()"),
        ("entropy without gradient", "-(logprobs.exp() * logprobs).sum(-1)",
         "-(logprobs.exp() * logprobs).sum(-1).detach()"),
    ],
    "chunked_logprobs": [
        ("logits kept for backward", "checkpoint(chosen_logprobs, *inputs, use_reentrant=False)",
         "chosen_logprobs(*inputs)"),
        ("temperature dropped when training", "project, temperature, entropy)",
         "project, 1.0 if torch.is_grad_enabled() else temperature, entropy)"),
        ("everything in one chunk", "logprobs, entropies = ([], [])",
         "logprobs, entropies, chunk_tokens = ([], [], 10 ** 9)"),
        ("first chunk again and again", "torch.split(hidden.flatten(0, 1), chunk_tokens)",
         "[hidden.flatten(0, 1)[:len(part)] for part in torch.split(targets.flatten(), chunk_tokens)]"),
        ("outputs swapped", "logprobs.append(results[0])", "logprobs.append(results[1])"),
        ("entropy from the log-probability", "entropies.append(results[1])", "entropies.append(-results[0])"),
    ],
    "logprobs_and_directions": [
        ("temperature dropped", "part if temperature == 1 else at_least_fp32(part) / temperature", "part"),
        ("temperature in bf16", "at_least_fp32(part) / temperature", "part / temperature"),
        ("the slope's temperature dropped", "slope if temperature == 1 else slope / temperature", "slope"),
        ("the wrong way", "probabilities.neg_()", "probabilities"),
        ("the target's own part left out", ".scatter_add_(-1, index, ones)", ""),
        ("entropy's sign", "-torch.linalg.vecdot", "torch.linalg.vecdot"),
        ("softmax in bf16", "torch.promote_types(part.dtype, torch.float32)", "part.dtype"),
    ],
    "frozen_head_logprobs": [
        ("temperature dropped", "project, temperature, chunk", "project, 1.0, chunk"),
        ("everything in one chunk", "temperature, chunk_tokens, entropy)", "temperature, 10 ** 9, entropy)"),
        ("outputs swapped", "(logprobs.view_as(targets), entropies.view",
         "(entropies.view_as(targets), logprobs.view"),
    ],
    "cuts": [
        ("the shortest first", "descending=True", "descending=False"),
        ("the first answer's columns", "max((used", "min((used"),
        ("the most padding", "min((unused", "max((unused"),
        ("a column short", "last_true(sequences.response_mask) + 1", "last_true(sequences.response_mask)"),
        ("spans of other rows", "[order].tolist()", ".tolist()"),
        ("always by length", "if by_length:", "if True:"),
    ],
    "cross_entropy": [
        ("sign", "-logprobs", "logprobs"),
        ("inverted mask", "mask, denominator)", "~mask, denominator)"),
        ("denominator dropped", "mask, denominator)", "mask)"),
    ],
    "clipped_surrogate": [
        ("ratio upside down", "logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("log ratio of padding", "torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))",
         "logprobs - old_logprobs"),
        ("ascent on the plain term", "plain = -advantages", "plain = advantages"),
        ("ascent on the clipped term", "clipped = -advantages", "clipped = advantages"),
        ("clip dropped", "ratio.clamp(1 - clip_range, 1 + high)", "ratio"),
        ("no upper clip", "1 - clip_range, 1 + high", "1 - clip_range"),
        ("no lower clip", "ratio.clamp(1 - clip_range, 1 + high)", "ratio.clamp(max=1 + high)"),
        ("upper clip below one", "1 + high", "1 - high"),
        ("lower clip above one", "1 - clip_range", "1 + clip_range"),
        ("clip-higher ignored", "if clip_range_high is None else clip_range_high", ""),
        ("optimistic", "torch.maximum", "torch.minimum"),
        ("clipped term only", "torch.maximum(plain, clipped)", "clipped"),
        ("loss over the padding", "torch.maximum(plain, clipped), response_mask",
         "torch.maximum(plain, clipped), ~response_mask"),
        ("loss denominator dropped", "masked_mean(torch.maximum(plain, clipped), response_mask, denominator)",
         "masked_mean(torch.maximum(plain, clipped), response_mask)"),
        ("ties are clipped", "clipped > plain", "clipped >= plain"),
        ("fraction of the unclipped", "clipped > plain", "clipped < plain"),
        ("fraction of the padding", ".to(ratio.dtype), response_mask", ".to(ratio.dtype), ~response_mask"),
        ("fraction denominator dropped", "(clipped > plain).to(ratio.dtype), response_mask, denominator",
         "(clipped > plain).to(ratio.dtype), response_mask"),
        ("kl the other way round", "k3(old_logprobs, logprobs)", "k3(logprobs, old_logprobs)"),
        ("kl of the padding", "k3(old_logprobs, logprobs), response_mask",
         "k3(old_logprobs, logprobs), ~response_mask"),
        ("statistics hold the graph", "torch.no_grad()", "torch.enable_grad()"),
    ],
    "clipped_value_loss": [
        ("clip dropped", ".clamp(old_values - value_clip_range, old_values + value_clip_range)", ""),
        ("clip around zero", "old_values - value_clip_range, old_values + value_clip_range",
         "-value_clip_range, value_clip_range"),
        ("only upward clip", "old_values - value_clip_range, old_values", "max=old_values"),
        ("lower bound above", "old_values - value_clip_range", "old_values + value_clip_range"),
        ("optimistic", "torch.maximum", "torch.minimum"),
        ("not halved", "0.5 * ", ""),
        ("absolute error", "(values - returns) ** 2", "(values - returns).abs()"),
        ("fitted to the old values", "(near - returns) ** 2", "(near - old_values) ** 2"),
        ("loss over the padding", "torch.maximum(plain, clipped), response_mask",
         "torch.maximum(plain, clipped), ~response_mask"),
        ("loss denominator dropped", "masked_mean(torch.maximum(plain, clipped), response_mask, denominator)",
         "masked_mean(torch.maximum(plain, clipped), response_mask)"),
        ("ties are clipped", "clipped > plain", "clipped >= plain"),
        ("fraction of the padding", ".to(values.dtype), response_mask", ".to(values.dtype), ~response_mask"),
    ],
    "mismatched": [
        ("its own response", "ids.roll(-1, 0)", "ids"),
        ("the next row's prompt too", "starts + starts.roll(-1, 0)).clamp", "starts).clamp"),
        ("as long as its own", "mask.sum(1, keepdim=True).roll(-1, 0)", "mask.sum(1, keepdim=True)"),
        ("the prompt counts", "~is_prompt & inside", "inside"),
    ],
    "chunk_divergence": [
        ("the other way round", "other.exp()", "own.exp()"),
        ("sign", "other - own", "own - other"),
        ("temperature dropped", " / temperature", ""),
        ("one head for both", "(other_project, other_hidden)", "(project, other_hidden)"),
    ],
    "chunked_divergence": [
        ("one of another's", "(hidden, other_hidden)", "(hidden, hidden)"),
        ("temperature dropped", "other_project, temperature,", "other_project, 1.0,"),
        ("logits kept for backward", "checkpoint(chunk_divergence, *pair, project, other_project, "
         "temperature, use_reentrant=False)", "chunk_divergence(*pair, project, other_project, temperature)"),
        ("everything in one chunk", "chunk_tokens)", "10 ** 9)"),
    ],
    "group_advantages": [
        ("groups across", "rewards.view(-1, samples)", "rewards.view(samples, -1)"),
        ("no baseline", "groups - groups.mean(1, keepdim=True)", "groups"),
        ("biased", "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
        ("always scaled", "if scale", "if True"),
    ],
    "response_weighted": [
        ("token mean", "response_mask.sum(1, keepdim=True).clamp(min=1)", "1"),
        ("tokens dropped", "values * tokens", "values"),
        ("rows for columns", "sum(1, keepdim=True)", "sum(0, keepdim=True)"),
        ("float32 in between", "values * tokens / (episodes * response_mask.sum(1, keepdim=True).clamp(min=1))",
         "values * (tokens / (3 * episodes * response_mask.sum(1, keepdim=True).clamp(min=1)) * 3)"),
    ],
    "greedy_advantages": [
        ("no baseline", "scores - greedy_scores", "scores"),
        ("the other way round", "scores - greedy_scores", "greedy_scores - scores"),
        ("log ratio swapped", "logprobs, reference_logprobs", "reference_logprobs, logprobs"),
        ("each token alone", "1.0, 1.0", "0.0, 1.0"),
    ],
    "anchored_cross_entropy": [
        ("ascent", "-logprobs", "logprobs"),
        ("KL is a bonus", "cross_entropy + kl_coef", "cross_entropy - kl_coef"),
        ("sums over tokens", "masked_row_sums(-logprobs, response_mask) / lengths",
         "masked_row_sums(-logprobs, response_mask)"),
        ("denominator dropped", "if denominator is None else denominator", ""),
        ("statistics hold the graph", ".detach()", ""),
    ],
    "inpo": [
        ("target of the other sign", "h - 1 /", "h + 1 /"),
        ("target not halved", "1 / (2 * eta)", "1 / eta"),
        ("anchors swapped", "tau * reference_log_odds + (eta - tau) * old_log_odds",
         "tau * old_log_odds + (eta - tau) * reference_log_odds"),
        ("anchored to the reference alone", "(eta - tau) * old_log_odds", "(eta - tau) * reference_log_odds"),
        ("denominator dropped", "if denominator is None else denominator", ""),
    ],
    "dpo": [
        ("rejected preferred", "chosen - rejected", "rejected - chosen"),
        ("length paid for", "+ offset", "- offset"),
        ("smoothing swapped", "(1 - smoothing) * F", "smoothing * F"),
        ("beta dropped", "beta * (", "("),
        ("empty batch", "max(len(margins), 1)", "len(margins)"),
    ],
    "ipo": [
        ("rejected preferred", "chosen - rejected", "rejected - chosen"),
        ("target not halved", "2 * beta", "beta"),
        ("empty batch", "max(len(chosen), 1)", "len(chosen)"),
    ],
    "kto": [
        ("thumbs swapped", "good, bad = (torch.sigmoid(-gains), torch.sigmoid(gains))",
         "bad, good = (torch.sigmoid(-gains), torch.sigmoid(gains))"),
        ("anchor the wrong way", "ratios - anchor", "ratios + anchor"),
        ("unjudged rows count", "desirable | undesirable", "desirable == desirable"),
        ("one weight for both", "undesirable_weight * ", "desirable_weight * "),
    ],
    "kl_anchor": [
        ("gradient", ".detach()", ""),
        ("below 0", ".clamp(min=0)", ""),
        ("sum", ".mean()", ".sum()"),
    ],
    "leave_one_out": [
        ("its own reward counts", "(groups.sum(1, keepdim=True) - groups)", "groups.sum(1, keepdim=True)"),
        ("mean of all", "(samples - 1)", "samples"),
        ("groups across", "rewards.view(-1, samples)", "rewards.view(samples, -1)"),
        ("no baseline", "(groups - others)", "groups"),
    ],
    "masked_row_sums": [
        ("padding counts", "torch.where(mask, values, torch.zeros_like(values))", "values"),
        ("columns", ".sum(1)", ".sum(0)"),
    ],
    "policy_gradient": [
        ("descent", "-logprobs", "logprobs"),
        ("advantages get a gradient", ".detach()", ""),
        ("inverted mask", "response_mask, denominator)", "~response_mask, denominator)"),
        ("denominator dropped", "response_mask, denominator)", "response_mask)"),
    ],
    "baseline_loss": [
        ("returns get a gradient", ".detach()", ""),
        ("absolute error", "(returns.detach() - values) ** 2", "(returns.detach() - values).abs()"),
        ("halved", "** 2", "** 2 / 2"),
        ("inverted mask", "response_mask, denominator)", "~response_mask, denominator)"),
        ("denominator dropped", "response_mask, denominator)", "response_mask)"),
    ],
    "bradley_terry": [
        ("rejected preferred", "chosen_scores - rejected_scores", "rejected_scores - chosen_scores"),
        ("margin the wrong way", "difference - margin", "difference + margin"),
        ("margin dropped", "difference - margin", "difference"),
        ("sign", "-F.logsigmoid", "F.logsigmoid"),
        ("sum of the pairs", ".sum() / count, stats", ".sum(), stats"),
        ("ties are wrong", "0.5 * (difference == 0)", "0.0 * (difference == 0)"),
        ("ties are right", "difference > 0", "difference >= 0"),
        ("no pairs divide by zero", "max(difference.shape[0], 1)", "difference.shape[0]"),
        ("statistics hold the graph", "torch.no_grad()", "torch.enable_grad()"),
    ],
    "centering": [
        ("the difference instead", "chosen_scores + rejected_scores", "chosen_scores - rejected_scores"),
        ("absolute value", "(chosen_scores + rejected_scores) ** 2", "(chosen_scores + rejected_scores).abs()"),
        ("sum of the pairs", " / max(chosen_scores.shape[0], 1)", ""),
        ("no pairs divide by zero", "max(chosen_scores.shape[0], 1)", "chosen_scores.shape[0]"),
    ],
    "thumbs": [
        ("weight of the whole row", "reduction='none', pos_weight=weight)",
         "reduction='none') * (1 + (positive_weight - 1) * targets)"),
        ("weight upside down", "scores.new_tensor(positive_weight)", "scores.new_tensor(1 / positive_weight)"),
        ("weight dropped", ", pos_weight=weight", ""),
        ("labels inverted", "labels.to(scores.dtype)", "1 - labels.to(scores.dtype)"),
        ("loss of the unlabelled", "masked_mean(losses, labelled)", "masked_mean(losses, ~labelled)"),
        ("mean over every row", "masked_mean(losses, labelled)", "masked_mean(losses, labelled, scores.shape[0])"),
        ("threshold on a probability", "scores > 0)", "scores > 0.5)"),
        ("accuracy inverted", "(scores > 0) == (", "(scores > 0) != ("),
        ("accuracy of the unlabelled", "masked_mean(right, labelled)", "masked_mean(right, ~labelled)"),
        ("score of every row", "masked_mean(scores, labelled)", "scores.mean()"),
    ],
}  # fmt: skip

CASES = [
    pytest.param(name, Mutation(*mutation), id=f"{name}-{mutation[0].replace(' ', '_')}")
    for name, mutations in MUTATIONS.items()
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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_check_is_green_on_the_function_itself(name: str) -> None:
    CHECKS[name](with_code(FUNCTIONS[name], code_of(FUNCTIONS[name])))


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_check_goes_red_on_a_mutant(name: str, mutation: Mutation) -> None:
    mutant = mutate(FUNCTIONS[name], mutation)
    with pytest.raises(AssertionError):
        CHECKS[name](mutant)


def test_every_public_function_has_a_mutant() -> None:
    # a new function needs a check_ of its name and a mutation of its sign, mask or clip
    assert FUNCTIONS.keys() == CHECKS.keys() == MUTATIONS.keys()


@pytest.mark.parametrize(
    ("old", "count"),
    [("a line long gone", "0 times"), ("ratio", r"\d\d? times"), ("as a token mean", "0 times")],
    ids=["gone", "ambiguous", "in the docstring"],
)
def test_a_stale_mutation_is_an_error(old: str, count: str) -> None:
    assert "as a token mean" in inspect.getsource(clipped_surrogate)
    with pytest.raises(
        LookupError, match=f"mutation 'stale' of clipped_surrogate.*found it {count}"
    ):
        mutate(clipped_surrogate, Mutation("stale", old, ""))
