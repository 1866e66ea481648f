"""The treaty between data and modules: what a batch holds, and what its masks mean.

Shapes: ``B`` rows, ``P`` prompt tokens, ``T`` tokens of a whole row. Masks are boolean and True means
*this token counts*. Batches are named tuples, so Lightning moves them between devices.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from lightning_perl.functional.packing import Packing


@runtime_checkable
class Bounded(Protocol):
    """A datamodule that says what its rows are, so that a module can refuse them at once.

    Attributes:
        rows: ``rated`` (`RatedBatch`) or ``prompts`` (`PromptBatch`).
        max_tokens: Longest row, prompt and response.
        max_response_tokens: Longest response; prompts have at most the rest.
    """

    rows: Literal["rated", "prompts"]
    max_tokens: int
    max_response_tokens: int


class PromptBatch(NamedTuple):
    """Prompts to answer, padded on the left so that every row ends at the same column.

    Attributes:
        ids: Token ids. Shape: ``(B, P)``, int64.
        mask: True on the prompt's own tokens. Shape: ``(B, P)``, bool.
        row: The row's number in its corpus; sampling noise is drawn from it, so that a row's text
            depends on no batch mate. Shape: ``(B,)``, int64.
    """

    ids: Tensor
    mask: Tensor
    row: Tensor


class RatedBatch(NamedTuple):
    """Texts to imitate, to judge, or both: one kind of row for SFT, Hydra-SFT and reward models.

    A demonstration is a row to imitate without a label; a thumbs-up answer is both; a thumbs-down
    answer is only labelled. A preference pair is two rows, named in ``pairs``.

    Attributes:
        ids: Token ids, padded on the right. Shape: ``(B, T)``, int64.
        attention_mask: True on the row's own tokens. Shape: ``(B, T)``, bool.
        response_mask: True on the tokens that the assistant wrote and that count; the score is read
            at the last of them. In a demonstration it may have holes (the user's later turns).
            Shape: ``(B, T)``, bool.
        prompt_tokens: Columns at the start of the batch that hold no response token in any row, so
            that nothing is projected onto the vocabulary for them. At least 1.
        imitate: True where the row's response enters the language-modelling loss. Shape: ``(B,)``, bool.
        label: 1 for thumbs up, 0 for thumbs down, between them for a rating; read only where
            ``labelled``. Shape: ``(B,)``, float32.
        labelled: True where the row has a thumb. Shape: ``(B,)``, bool.
        pairs: Row numbers within the batch, (chosen, rejected). Shape: ``(K, 2)``, int64; K may be 0.
        row: The row's number in its corpus. Shape: ``(B,)``, int64.
        turns: Turns of the row's prompt in the corpus. Shape: ``(B,)``, int64.
        packing: How rows of one prompt lie on one line, so that a trunk reads the prompt once;
            None where no row shares anything.
        margins: By how much the scores of a pair should differ, as its judge said. Shape: ``(K,)``, float32; None
            where no pair has a margin of its own.
        response_places: Where ``response_mask`` is True, as ``row * T + column`` and without column 0, so that no
            other token is projected onto the vocabulary. Shape: ``(N,)``, int64. None: all columns from
            ``prompt_tokens`` on are.
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_tokens: int
    imitate: Tensor
    label: Tensor
    labelled: Tensor
    pairs: Tensor
    row: Tensor
    turns: Tensor
    packing: Packing | None = None
    margins: Tensor | None = None
    response_places: Tensor | None = None


class PairBatch(NamedTuple):
    """Pairs of answers to a prompt, laid out as sampled ones: the better one, then the worse one.

    Shapes: ``B`` rows, twice as many as pairs; ``R`` response tokens.

    Attributes:
        prompt_ids: Padded on the left; the same in both rows of a pair. Shape: ``(B, P)``, int64.
        prompt_mask: Shape: ``(B, P)``, bool.
        response_ids: Padded on the right. Shape: ``(B, R)``, int64.
        response_mask: Shape: ``(B, R)``, bool.
        row: The row's number in its corpus. Shape: ``(B,)``, int64.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    row: Tensor


class MixedBatch(NamedTuple):
    """Prompts to answer, and texts that are learned beside what is answered.

    Attributes:
        prompts: The prompts.
        texts: Rows to imitate, or pairs.
    """

    prompts: PromptBatch
    texts: RatedBatch | PairBatch


class Answers(NamedTuple):
    """What one role answers to some prompts, as people read it.

    Attributes:
        prompts: The prompts' texts.
        responses: The answers' texts, without prompt and special tokens.
        scores: The answers' rewards, as the module that answered scores them. Higher is better.
    """

    prompts: list[str]
    responses: list[str]
    scores: list[float]
