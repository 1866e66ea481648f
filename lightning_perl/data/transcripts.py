r"""The transcripts of Anthropic's HH-RLHF: ``\n\nHuman: ...\n\nAssistant: ...``, and their pairs.

A tag counts after a blank line only; ``Human:`` elsewhere is text. The prompt of a pair is the
longest run of turns that both transcripts begin with, and has to be all of both but the last reply.
Where a reply holds a tag of its own, one transcript has a turn more: what was compared is then not
two replies to one prompt, and the pair is a bad row.
"""

from __future__ import annotations

import json
import re

from lightning_perl.data.corpus import preference
from lightning_perl.data.rows import Pair, Turn
from lightning_perl.data.tokenization import BadRow

# A revision, so that the files behind the checksums stay.
HUB = (
    "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/"
    "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
)
_TAG = re.compile(r"\n\n(Human|Assistant):")


def parse_transcript(text: str, where: str) -> tuple[Turn, ...]:
    r"""Returns the turns of a transcript, without outer white space.

    Args:
        text: ``\n\nHuman: ...\n\nAssistant: ...``.
        where: ``file:line``, for the error message.

    Raises:
        BadRow: Text before the first tag, or no tag at all.
    """
    before, *parts = _TAG.split(text)
    if before.strip() or not parts:
        raise BadRow(
            "no transcript",
            f"{where}: a transcript begins with a blank line and Human:, got {text[:40]!r}. Is this "
            "the right file?",
        )
    return tuple(
        Turn("user" if tag == "Human" else "agent", said.strip())
        for tag, said in zip(parts[::2], parts[1::2], strict=True)
    )


def transcript_pair(chosen: str, rejected: str, where: str) -> Pair:
    """Returns the pair of two transcripts; its dialog is the first turn.

    An empty reply is left for the encoder to reject, which needs no answers for prompts alone.

    Args:
        chosen: The transcript that was preferred.
        rejected: The other one.
        where: ``file:line``, for the error message.

    Raises:
        BadRow: No transcript, identical ones, or ones that differ before their last replies.
    """
    better, worse = (parse_transcript(text, where) for text in (chosen, rejected))
    if better != worse and better[:-1] != worse[:-1]:
        raise BadRow(
            "contexts differ before the last reply",
            f"{where}: the transcripts differ before their last replies ({len(better)} and "
            f"{len(worse)} turns): no pair of answers to one prompt. Set on_bad_row: reject.",
        )
    context = better[:-1]
    if not context or (better[-1].role, worse[-1].role) != ("agent", "agent"):
        raise BadRow(
            "no answer",
            f"{where}: a transcript that does not end with the assistant's reply to a human turn.",
        )
    dialog = json.dumps(context[0], ensure_ascii=False)
    return preference(context, better[-1].text, worse[-1].text, dialog, where)
