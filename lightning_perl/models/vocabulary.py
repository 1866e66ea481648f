"""Where a trunk and its tokenizer have to agree: tokens that have an embedding, tokens that end a response."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_perl.chat import ends_of_answers
from lightning_perl.models.trunk import Trunk


def require_embedded(trunk: Trunk) -> None:
    """Refuse tokens that texts can have and the embedding has not.

    A special token that no text begins or ends with and no chat template writes may lie beyond it: padding, or
    Gemma 3's stand-in for images.
    """
    tokenizer, rows = trunk.tokenizer, trunk.vocabulary_size
    written = {tokenizer.bos_token, tokenizer.eos_token}
    template = str(tokenizer.chat_template or "")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    lost = {
        token: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if number >= rows and (token in written or token not in special or token in template)
    }
    if lost:
        raise ValueError(
            f"trunk: the tokenizer of {trunk.source} has {len(lost)} tokens that its embedding of {rows} rows has "
            f"not, such as {dict(list(lost.items())[:3])}. Call model.resize_token_embeddings(len(tokenizer)) and "
            "save the model again, or save the tokenizer that belongs to it."
        )


def end_responses(trunk: Trunk) -> None:
    """Let responses end where the chat template ends answers, here and in what is handed over.

    Warns of a stop token that is an ordinary piece of text: every response would be cut there.
    """
    tokenizer, stop = trunk.tokenizer, ends_of_answers(trunk.tokenizer).stop
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    ordinary = [
        number for number in trunk.stop_ids if number not in added and number < len(tokenizer)
    ]
    if ordinary:
        rank_zero_warn(
            f"trunk: {trunk.source} stops at {tokenizer.convert_ids_to_tokens(ordinary[:3])} (ids {ordinary[:3]}, "
            f"{len(ordinary)} in all), which its tokenizer does not call special: responses end at such a piece "
            "of text. If they should not, take it out of eos_token_id in generation_config.json and config.json."
        )
    if stop:
        generation = trunk.model.generation_config
        generation.eos_token_id = sorted({*trunk.stop_ids, tokenizer.convert_tokens_to_ids(stop)})
