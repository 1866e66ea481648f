"""Anthropic's HH-RLHF, harmless-base: which of two replies does less harm, judged by people.

The texts are offensive and upsetting on purpose. Source and licence: :mod:`lightning_perl.data.transcripts`.
"""

from __future__ import annotations

from typing import Any

from lightning_perl.data.corpus import Corpus, CorpusDataModule, Part
from lightning_perl.data.rows import Item
from lightning_perl.data.transcripts import chosen_and_rejected, hh_corpus

_CORPUS = hh_corpus(
    "harmless-base",
    "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
    "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
)


class HarmlessnessDataModule(CorpusDataModule):
    """Preference pairs of harmless-base.

    The prompt is what both transcripts begin with; see :mod:`lightning_perl.data.transcripts` for pairs that are
    bad rows. Rows that begin with the same human turn are of one dialog and go to one split.

    Args:
        data_dir: The folder that holds ``hh-harmless-base/`` or upstream's ``harmless-base/``, each
            with ``train.jsonl`` and ``test.jsonl``, plain or ``.gz``. Where it holds neither,
            ``fit`` downloads the corpus (14 MB) into ``harmless-base/``.
        settings: As :class:`~lightning_perl.data.corpus.CorpusDataModule`.
    """

    @property
    def corpus_files(self) -> Corpus:
        """Where harmless-base lies."""
        return _CORPUS

    def item(self, row: dict[str, Any], where: str, part: Part) -> tuple[Part, Item]:
        """Returns the pair of a row."""
        return part, chosen_and_rejected(row, where)
