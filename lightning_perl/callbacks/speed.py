"""The time of each phase of a train batch, per token and per episode, and as a share of the machine's peak."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.arguments import Checked, Positive
from lightning_perl.phases import WHOLE_BATCH, PhaseMeter

# The phases that each token count of `training_step` belongs to.
_PHASES = {
    "rollout": ("rollout", "wait"),
    "score": ("score",),
    "update": ("actor", "critic", "optimizer"),
    WHOLE_BATCH: (WHOLE_BATCH,),
}
_PRODUCTS = 4
TERA = 1e12


def matmul_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measures how fast this machine multiplies square matrices, in TFLOP per second.

    The best of several products, under the process's own threads and precision flags. Sizes are doubled as far
    as the seconds allow, up to 2048 (8192 on CUDA). Torch's own generators are not used.
    """
    largest = 8192 if device.type == "cuda" else 2048
    size, best = 256, 0.0
    # The first product of a process loads libraries.
    _seconds_of_products(size, device, dtype)
    end = perf_counter() + seconds
    while True:
        fastest = min(_seconds_of_products(size, device, dtype))
        best = max(best, 2 * size**3 / fastest / TERA)
        # Twice the size takes eight times as long.
        if size == largest or perf_counter() + 8 * _PRODUCTS * fastest > end:
            break
        size *= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def _seconds_of_products(size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Seconds of several products of one size; the first of them warms up."""
    generator = torch.Generator(device).manual_seed(size)
    left = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    right = left.clone()
    times = []
    for _ in range(_PRODUCTS):
        _synchronize(device)
        start = perf_counter()
        torch.mm(left, right)
        _synchronize(device)
        times.append(perf_counter() - start)
    return times


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class SpeedMonitor(Checked, PhaseMeter):
    """Logs how fast each phase runs, once per train batch: the keys ``speed/...`` of docs/logged_keys.md.

    Time inside a nested phase counts for the nested one alone; ``update`` is ``actor``, ``critic`` and
    ``optimizer`` together, and a module that names no phase has one, ``step``. Seconds per episode include other
    callbacks' work in the train batch. Padding counts as work, but not in tokens per second; recomputation for
    activation checkpointing does not count.

    Tokens and episodes need a ``training_step`` that returns ``{"episodes": int, "tokens": {"rollout": int,
    "score": int, "update": int}}``, as on-policy modules do, or ``{"loss": ..., "tokens": {"step": int}}``.
    FLOPs need a module that counts them (``flops``), as all of this package do. On CUDA the device is
    synchronized at every phase's start and end, so that a phase's kernels are timed in it.

    Args:
        peak_tflops: The machine's peak in 10^12 FLOP per second, which ``speed/mfu`` is a fraction of. None:
            measured when the fit starts, in about a second, with square matrix products in the trunk's dtype
            (see `matmul_tflops`).
    """

    def __init__(self, peak_tflops: Positive | None = None) -> None:
        super().__init__()
        self.peak_tflops = peak_tflops
        self._peak = peak_tflops
        # A module that counts the FLOPs of its matrix products, if this one does.
        self._counts: Any = None
        # The last reading: when, and at how many FLOPs.
        self._read_at, self._read_flops = 0.0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the device to wait for, and measures its peak."""
        super().on_fit_start(trainer, pl_module)
        self._counts = pl_module if hasattr(pl_module, "flops") else None
        if self._counts is None or self.peak_tflops is not None:
            return
        device, dtype = trainer.strategy.root_device, self._counts.product_dtype
        self._peak = matmul_tflops(device, dtype)
        name = str(dtype).removeprefix("torch.")
        rank_zero_info(f"speed: {device} multiplies matrices at {self._peak:.3g} TFLOP/s ({name})")

    def read(self, begins: bool = False) -> None:
        """Charges time and FLOPs since the last reading to the innermost running phase."""
        _synchronize(self.device)
        now, flops = perf_counter(), 0 if self._counts is None else self._counts.flops
        if self.running:
            self.measured[self.running[-1]]["seconds"] += now - self._read_at
            self.measured[self.running[-1]]["flops"] += flops - self._read_flops
        self._read_at, self._read_flops = now, flops

    def results(self, outputs: object) -> dict[str, float]:
        """Seconds and rates of the train batch."""
        seconds = {phase: parts["seconds"] for phase, parts in self.measured.items()}
        total = sum(seconds.values())
        rates = self._flop_rates(seconds, total)
        if len(seconds) > 1:
            seconds.pop(WHOLE_BATCH)
        rates |= {f"speed/{phase}_seconds": value for phase, value in seconds.items()}
        for name, tokens in (
            outputs.get("tokens", {}).items() if isinstance(outputs, Mapping) else ()
        ):
            spent = sum(seconds.get(phase, 0.0) for phase in _PHASES.get(name, ()))
            if spent > 0:
                rates[f"speed/{name}_tokens_per_second"] = float(tokens) / spent
        if isinstance(outputs, Mapping) and outputs.get("episodes"):
            rates["speed/seconds_per_episode"] = total / float(outputs["episodes"])
        return rates

    def _flop_rates(self, seconds: Mapping[str, float], total: float) -> dict[str, float]:
        flops = {phase: parts["flops"] for phase, parts in self.measured.items()}
        if not any(flops.values()) or total <= 0:
            return {}
        rates = {
            f"speed/{phase}_tflops": count / seconds[phase] / TERA
            for phase, count in flops.items()
            if count and seconds[phase] > 0 and phase != WHOLE_BATCH
        }
        rates["speed/tflops"] = sum(flops.values()) / total / TERA
        if self._peak is not None:
            rates["speed/mfu"] = rates["speed/tflops"] / self._peak
        return rates
