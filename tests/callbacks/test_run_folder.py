from __future__ import annotations

import gc
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_perl.callbacks import run_folder
from tests.callbacks.phased import Phased, Rows, quiet_trainer


def test_without_a_logger_runs_never_share_a_folder(tmp_path: Path) -> None:
    trainers = [quiet_trainer(tmp_path, []) for _ in range(2)]
    folders = [run_folder(trainer) for trainer in trainers]
    assert folders == [tmp_path / f"version_{number}" for number in range(2)]
    assert all(folder.is_dir() for folder in folders)
    # Asked again, a trainer stays where it is.
    assert [run_folder(trainer) for trainer in trainers] == folders


def test_what_a_dry_run_writes_is_not_kept(tmp_path: Path) -> None:
    dry = quiet_trainer(tmp_path, [], logger=CSVLogger(tmp_path), fast_dev_run=True)
    dry.fit(Phased(lambda module: None), Rows(1))
    folder = run_folder(dry)
    assert folder.is_dir()
    assert tmp_path not in folder.parents
    del dry
    gc.collect()
    assert not folder.exists()


def test_trainers_are_not_kept_alive(tmp_path: Path) -> None:
    from lightning_perl.callbacks.run_folder import _FOLDERS

    gc.collect()
    before = len(_FOLDERS)
    trainer = quiet_trainer(tmp_path, [])
    run_folder(trainer)
    assert len(_FOLDERS) == before + 1
    del trainer
    gc.collect()
    assert len(_FOLDERS) == before


def test_two_offline_wandb_runs_of_one_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # WandbLogger(offline=True) sets this one; monkeypatch takes it back.
    monkeypatch.setenv("WANDB_MODE", "offline")
    folders = []
    for _ in range(2):
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="coffee")
        folders.append(run_folder(quiet_trainer(tmp_path, [], logger=logger)))
        assert folders[-1] == tmp_path / "coffee" / logger.experiment.id
        logger.experiment.finish()
    assert folders[0] != folders[1]
