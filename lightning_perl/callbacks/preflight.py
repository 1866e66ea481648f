"""Out of memory: at the first step instead of the thousandth, and with the setting to change."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_perl.arguments import Checked
from lightning_perl.phases import WHOLE_BATCH, PhaseTracker, cuda_device, ran_out_of_memory

ADVICE = {
    "rollout": "lower sampling.batch_size (responses drawn at once), sampling.max_new_tokens or data.batch_size",
    "score": "lower model.score_batch_size",
    "actor": "lower model.micro_batch_size, or set model.checkpointing: true",
    "critic": "lower model.micro_batch_size, or set model.checkpointing: true",
    "optimizer": "lower lora.rank, or keep the moments on the host (model.optimizer: HostAdamW)",
    WHOLE_BATCH: "lower data.batch_size (trainer.accumulate_grad_batches makes up for it), or set "
    "model.checkpointing: true",
    "validation": "lower data.val_batch_size",
}
"""What to change where memory ran out, by phase."""


class MemoryPreflight(Checked, PhaseTracker):
    """Lets memory run out before the first step, and says what to change whenever it does.

    Before the first batch of a fit it runs one of the largest size: every prompt and response as long as the data
    and ``sampling`` allow, all of a rollout sampled and scored, one micro-batch learned from, room taken for the
    optimizer's moments. Nothing is learned from it, and random generators stay where they are. It costs about a
    rollout of the longest responses.

    Every module has this callback with its default settings, unless the trainer is given one.

    Args:
        run: ``cuda`` where the run is on CUDA, ``always`` or ``never``. Out-of-memory errors are explained in any
            case.
    """

    def __init__(self, run: Literal["cuda", "always", "never"] = "cuda") -> None:
        super().__init__()
        self.run = run
        self._due = False
        self._flying = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come first: what others measure of the first batch is not this one."""
        trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch."""
        on_cuda = cuda_device(trainer) is not None
        self._due = self.run == "always" or (self.run == "cuda" and on_cuda)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401 (an AdapterModule, which this room does not import)
        batch: Any,  # noqa: ANN401 (as Lightning says it)
        batch_idx: int,
    ) -> None:
        """Run the largest batch there may be, once."""
        super().on_train_batch_start()
        if not self._due:
            return
        self._due, self._flying = False, True
        device = cuda_device(trainer)
        with torch.random.fork_rng([] if device is None else [device]):
            pl_module.preflight(batch, trainer.optimizers[0])
        pl_module.zero_grad(set_to_none=True)
        self._flying = False
        rank_zero_info("the longest rows there may be fit into memory")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say in which phase memory ran out, and what to change."""
        if not ran_out_of_memory(exception):
            return
        validating = trainer.validating or trainer.sanity_checking
        phase = "validation" if validating else (self.running or [WHOLE_BATCH])[-1]
        rows = "a batch"
        if self._flying:
            rows = "the longest rows there may be, before the first step (MemoryPreflight)"
        exception.args = (
            f"Out of memory in the phase {phase} of {rows}: {ADVICE.get(phase, ADVICE[WHOLE_BATCH])}. "
            f"`estimate` tells what fits. ({str(exception).splitlines()[0]})",
        )
