"""Datamodules: from files to the batches of :mod:`lightning_perl.batches`."""

from lightning_perl.data.base import ConversationDataModule
from lightning_perl.data.corpus import CorpusDataModule
from lightning_perl.data.hh_rlhf import HarmlessnessDataModule, HelpfulnessDataModule
from lightning_perl.data.preferences import MixedDataModule, PreferenceDataModule
from lightning_perl.data.summarization import SummarizationDataModule
from lightning_perl.data.taskmaster import TaskmasterDataModule

__all__ = [
    "ConversationDataModule",
    "CorpusDataModule",
    "HarmlessnessDataModule",
    "HelpfulnessDataModule",
    "MixedDataModule",
    "PreferenceDataModule",
    "SummarizationDataModule",
    "TaskmasterDataModule",
]
