"""Callbacks: one verb each."""

from lightning_perl.callbacks.console import BeforeAfter, EpisodeBar
from lightning_perl.callbacks.cuda_memory import (
    CudaMemoryMonitor,
    CudaMemorySnapshot,
    MemoryPreflight,
)
from lightning_perl.callbacks.policy_guard import PolicyGuard
from lightning_perl.callbacks.reward_report import RewardReport
from lightning_perl.callbacks.run_folder import run_folder
from lightning_perl.callbacks.samples import Answering, SampleWriter
from lightning_perl.callbacks.speed import SpeedMonitor
from lightning_perl.callbacks.wandb_summary import WandbSummary
from lightning_perl.phases import PhaseCallback

__all__ = [
    "Answering",
    "BeforeAfter",
    "CudaMemoryMonitor",
    "CudaMemorySnapshot",
    "EpisodeBar",
    "MemoryPreflight",
    "PhaseCallback",
    "PolicyGuard",
    "RewardReport",
    "SampleWriter",
    "SpeedMonitor",
    "WandbSummary",
    "run_folder",
]
