"""The bar that counts episodes: what it shows, where a resumed run begins, and whose bar it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_perl.callbacks import EpisodeBar
from lightning_perl.callbacks.console import count_episodes
from lightning_perl.modules import RLOO
from lightning_perl.modules.on_policy import OnPolicy
from tests.modules import tiny


class Bare(TQDMProgressBar):
    """A user's own bar."""


def policy(trunk: Path, episodes: int) -> OnPolicy:
    return RLOO(
        str(trunk), samples=2, max_episodes=episodes, lora=tiny.LORA, sampling=tiny.SAMPLING
    )


def run(folder: Path, module: OnPolicy, ckpt_path: Path | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1 + (ckpt_path is not None),
        logger=False,
    )
    batches = tiny.Batches([tiny.prompts(4, seed) for seed in range(3)])
    trainer.fit(module, batches, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_it_counts_towards_max_episodes_and_goes_on(
    hydra_trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, policy(hydra_trunk, 24))
    shown = capsys.readouterr().out.split("\r")
    assert isinstance(trainer.progress_bar_callback, EpisodeBar)
    last = [line for line in shown if "episodes:" in line][-1]
    assert "24/24" in last
    assert all(f"{name}=" in last for name in ("score", "KL", "length"))
    assert any(" 8/24" in line for line in shown)
    assert not any("Epoch" in line for line in shown)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    run(tmp_path, policy(hydra_trunk, 40), checkpoint)
    again = [line for line in capsys.readouterr().out.split("\r") if "episodes:" in line]
    assert "24/40" in again[1]  # the first one is tqdm's own, before anybody could count
    assert "40/40" in again[-1]


@pytest.mark.parametrize("bar", [Bare(), None])
def test_another_bar_or_none_stays(bar: ProgressBar | None) -> None:
    callbacks: list[Callback] = [bar] if bar else []
    count_episodes(callbacks)
    assert callbacks == ([bar] if bar else [])


@pytest.mark.parametrize(
    ("kind", "rate", "kept"),
    [(TQDMProgressBar, 7, 7), (RichProgressBar, 7, 1), (RichProgressBar, 0, 0)],
)
def test_lightning_s_own_is_replaced(
    kind: type[TQDMProgressBar | RichProgressBar], rate: int, kept: int
) -> None:
    callbacks: list[Callback] = [kind(refresh_rate=rate)]
    count_episodes(callbacks)
    (bar,) = callbacks
    assert isinstance(bar, EpisodeBar)
    assert bar.refresh_rate == kept
