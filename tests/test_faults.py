"""What goes wrong in a run, what happens then, and that nothing is lost but the rollout in flight."""

from __future__ import annotations

import ast
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_perl.cli import main
from lightning_perl.commands.trained import newest_checkpoint, read
from lightning_perl.modules import RewardModel
from lightning_perl.modules.base import AdapterModule
from lightning_perl.phases import PhaseCallback
from lightning_perl.whole import WholeCheckpoints
from tests.modules import tiny
from tests.modules.test_resume import BATCHES, loader_for
from tests.refusing import Refusing

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/faults.md").read_text("utf-8")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trunk with a reward head."""
    folder = tmp_path_factory.mktemp("faults")
    return str(tiny.with_head(tiny.save_trunk(folder / "plain"), folder / "trunk"))


def test_every_row_of_the_table_has_its_test() -> None:
    rows = [
        line.split("|")
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith("| what goes wrong")
    ]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[-2]) for cells in rows]
    assert len(rows) >= 15
    assert all(named), rows
    for file, function in (one for several in named for one in several):
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_settings_of_the_docs_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "quickstart", "--config", settings, "--print_config"])
    assert "max_kl: 30" in capsys.readouterr().out


class Run:
    """What a fit leaves: the module, its trainer and folder, and what was logged."""

    def __init__(
        self,
        make: Callable[[], AdapterModule],
        root: Path,
        *callbacks: Callback,
        path: Path | None = None,
        keep: bool = True,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        self.module = make()
        self.logged: list[dict[str, float]] = []
        keeper = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
        given = (*callbacks, *([keeper] if keep else []), Logged(self.logged))
        self.trainer, self.folder = tiny.quiet_trainer(root, *given, **options)
        self.path = path

    def fit(self) -> None:
        loader = loader_for(self.module)
        self.trainer.fit(self.module, loader, ckpt_path=self.path, weights_only=True)


class Logged(Callback):
    def __init__(self, logged: list[dict[str, float]]) -> None:
        self.logged = logged

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.logged.append({k: float(value) for k, value in trainer.callback_metrics.items()})


def finished(make: Callable[[], AdapterModule], root: Path, *args: Any, **options: Any) -> Run:
    run = Run(make, root, *args, **options)
    run.fit()
    return run


def newest(root: Path) -> Path:
    """What ``--ckpt_path last`` takes."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(root), "name": "run"}}
    return newest_checkpoint({"logger": logger}, resumed=True)


def assert_same_end(again: Run, straight: Run) -> None:
    """Weights, moments and the rest of what was logged are those of the uninterrupted run."""
    assert again.logged == straight.logged[len(straight.logged) - len(again.logged) :]
    assert tiny.changed(tiny.weights(straight.module), again.module) == set()
    tiny.assert_equal_moments(again.trainer, straight.trainer)


# ---- numbers and functions that fail -------------------------------------------------------------


def ppo(trunk: str, **options: Any) -> AdapterModule:
    return tiny.hydra(Path(trunk), **{"ppo_epochs": 2, "minibatch_size": 2, **options})


def test_nan_from_the_trunk_teaches_nothing(trunk: str, tmp_path: Path) -> None:
    class Break(PhaseCallback):
        def on_phase_start(self, trainer: Trainer, pl_module: Any, phase: str) -> None:  # noqa: ANN401
            self.broken = pl_module.rollout_index in (1, 3, 4, 5)

        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ANN401
            body = pl_module.policy_trunk.model.base_model
            body.register_forward_hook(self.spoil)

        def spoil(self, _: object, __: object, output: Any) -> Any:  # noqa: ANN401
            if self.broken:
                output.last_hidden_state[0] = math.nan
            return output

    run = Run(lambda: ppo(trunk), tmp_path, Break(), max_epochs=2)
    with pytest.raises(RuntimeError, match=r"rollout .scores, .* not finite 3 times in a row"):
        run.fit()
    assert [one["train/skipped_steps"] for one in run.logged] == [0, 1, 1, 2, 3]
    kept = sorted((run.folder / "skipped").iterdir())
    assert [path.name for path in kept] == ["1.pt", "2.pt", "3.pt", "4.pt"]
    assert torch.load(kept[0], weights_only=True).keys() == {"ids", "mask", "row"}
    # The last rollout is the one in flight: it is all that is lost.
    assert newest(tmp_path).stem == "stopped"
    weights = torch.load(newest(tmp_path), weights_only=True)["state_dict"].values()
    assert all(bool(weight.isfinite().all()) for weight in weights)


class Failing:
    """Pays length; from the third rollout on it fails, unless it is mended."""

    def __init__(self, failure: Callable[[], float] | None = None) -> None:
        self.failure, self.calls = failure, 0

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[int]
    ) -> list[float]:
        self.calls += 1
        scores = [float(len(response)) for response in responses]
        if self.failure is not None and self.calls > 2:
            scores[0] = self.failure()
        return scores


def unreachable() -> float:
    raise ConnectionError("the judge does not answer")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (lambda: math.nan, r"gave nan for row \d+, .*finite"),
        (unreachable, r"raised ConnectionError on row \d+, .* the judge does not answer"),
    ],
    ids=["NaN", "raises"],
)
@pytest.mark.parametrize("keep", [True, False], ids=["saved", "never saved"])
def test_a_python_reward_that_fails_costs_its_rollout_only(
    failure: Callable[[], float], words: str, keep: bool, trunk: str, tmp_path: Path
) -> None:
    def make(failure: Callable[[], float] | None = None) -> AdapterModule:
        return ppo(trunk, reward_function=Failing(failure), score_normalization="scale")

    straight = finished(make, tmp_path / "straight")
    run = Run(lambda: make(failure), tmp_path, keep=keep)
    with pytest.raises(ValueError, match=rf"reward_function \(Failing\) {words}"):
        run.fit()
    path = newest(tmp_path)
    assert path.stem == "stopped"
    again = finished(make, tmp_path, path=path)
    assert len(again.logged) == BATCHES - 2
    assert_same_end(again, straight)


# ---- files ---------------------------------------------------------------------------------------


def test_a_cut_checkpoint_is_passed_over(trunk: str, tmp_path: Path) -> None:
    straight = finished(lambda: ppo(trunk), tmp_path)
    saved = sorted((straight.folder / "checkpoints").iterdir(), key=os.path.getmtime)
    for path in saved[-2:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=rf"last is {saved[-3]}: {saved[-1]} is no whole check"):
        path = newest(tmp_path)
    assert_same_end(finished(lambda: ppo(trunk), tmp_path, path=path), straight)


VERSION = {"pytorch-lightning_version": "2.6"}


@pytest.mark.parametrize(
    "stored",
    [torch.ones(2), [1], {"w": torch.ones(2)}, {**VERSION, "state_dict": [1]}, b"PK", None],
    ids=["tensor", "list", "weights", "no dict", "zip", "folder"],
)
@pytest.mark.parametrize("load", [WholeCheckpoints().load_checkpoint, read])
def test_what_no_run_has_written_is_no_checkpoint(
    load: Callable[[Path], object], stored: object, tmp_path: Path
) -> None:
    path = tmp_path / "foreign.ckpt"
    if stored is None:
        path.mkdir()
    elif isinstance(stored, bytes):
        with ZipFile(path, "w") as file:
            file.writestr("a.txt", stored)
    else:
        torch.save(stored, path)
    with pytest.raises(ValueError, match=rf"^{path} is no (whole )?checkpoint"):
        load(path)
    torch.save({**VERSION, "state_dict": {}}, tmp_path / "ours.ckpt")
    load(tmp_path / "ours.ckpt")


def test_a_full_disk_leaves_the_checkpoint_before(trunk: str, tmp_path: Path) -> None:
    class Fill(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 4:  # two rollouts of two steps and two epochs
                sizes = [path.stat().st_size for path in tmp_path.rglob("*.ckpt")]
                resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) // 2, unlimited))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    straight = finished(lambda: ppo(trunk), tmp_path / "straight")
    run = Run(lambda: ppo(trunk), tmp_path, Fill())
    try:
        with pytest.raises(OSError, match=rf"{run.folder}/checkpoints/step=8.ckpt could not be wr"):
            run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert newest(tmp_path).name == "step=4.ckpt"
    assert not [path for path in tmp_path.rglob("*.part*") if path.is_file()]
    assert_same_end(finished(lambda: ppo(trunk), tmp_path, path=newest(tmp_path)), straight)


def test_another_process_is_kept_out_of_a_run_s_folder(trunk: str, tmp_path: Path) -> None:
    run = Run(lambda: ppo(trunk), tmp_path, logger=CSVLogger(tmp_path, "run", version=0))
    run.folder.mkdir(parents=True)
    lock = f"import fcntl; file = open({str(run.folder / '.lock')!r}, 'w')\n"
    lock += "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(FileExistsError, match=r"version_0: another process runs in it. Wait"):
            run.fit()
        other.kill()
    run.fit()


# ---- being stopped -------------------------------------------------------------------------------


class Signal(PhaseCallback):
    """Sends this process a signal inside the third rollout's phase, or while a checkpoint is saved."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_phase_start(self, trainer: Trainer, pl_module: Any, phase: str) -> None:  # noqa: ANN401
        if (pl_module.rollout_index, phase) == (2, self.moment):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:  # noqa: ANN401
        if (pl_module.rollout_index, "save") == (3, self.moment):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["rollout", "score", "actor", "optimizer", "save"])
def test_sigterm_waits_for_the_end_of_the_rollout(moment: str, trunk: str, tmp_path: Path) -> None:
    straight = finished(lambda: ppo(trunk), tmp_path / "straight")
    run = Run(lambda: ppo(trunk), tmp_path, Signal(moment))
    with pytest.raises(SystemExit) as stopped:
        run.fit()
    assert stopped.value.code == 143
    assert len(run.logged) == 3
    assert "unfinished" in (run.folder / "adapters/actor/manifest.json").read_text()
    assert_same_end(finished(lambda: ppo(trunk), tmp_path, path=newest(tmp_path)), straight)


class Dying(Refusing):  # type: ignore[no-untyped-call]
    """Counts torch's operations, and kills this process before one of them."""

    def __init__(self, at: int | None) -> None:
        self.operations = 0
        super().__init__(lambda *_: self.count(at))

    def count(self, at: int | None) -> None:
        self.operations += 1
        if self.operations == at:
            os.kill(os.getpid(), signal.SIGKILL)


class Spans(PhaseCallback):
    """Notes which operations belong to a phase; ``batch`` where a module names none."""

    def __init__(self, mode: Dying) -> None:
        self.mode, self.spans = mode, list[tuple[str, int, int]]()
        self._begun = 0

    def on_train_batch_start(self, *_: object) -> None:
        self._begun = self.mode.operations

    def on_train_batch_end(self, *_: object) -> None:
        self.spans.append(("batch", self._begun, self.mode.operations))

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        self._phase = self.mode.operations

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        self.spans.append((phase, self._phase, self.mode.operations))


class CutShort(Callback):
    """Lets the process die while its third checkpoint is written, after so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_save_checkpoint(self, trainer: Trainer, *_: object) -> None:
        if len(list(Path(trainer.log_dir or "", "checkpoints").glob("*.ckpt"))) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def killed(run: Run, at: int | None) -> None:
    """Fits in a process of its own, which dies."""
    child = os.fork()
    if child == 0:
        try:
            with Dying(at):
                run.fit()
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("make", "phases"),
    [
        (lambda trunk: ppo(trunk, minibatch_size=4), ("rollout", "actor")),
        (lambda trunk: RewardModel(trunk, tiny.LORA), ("batch",)),
    ],
    ids=["PPO", "RewardModel"],
)
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(
    make: Callable[[str], AdapterModule], phases: Sequence[str], trunk: str, tmp_path: Path
) -> None:
    mode = Dying(None)
    spans = Spans(mode)
    straight = Run(lambda: make(trunk), tmp_path / "straight", spans)
    with mode:
        straight.fit()
    ends = [last for phase, _, last in spans.spans if phase == "batch"]
    smallest = min(path.stat().st_size for path in (tmp_path / "straight").rglob("*.ckpt"))
    draw = random.Random(time.time_ns())
    for phase in (*phases, "save"):
        root = tmp_path / phase
        if phase == "save":
            at, callbacks, whole = None, [CutShort(draw.randrange(smallest))], 2
        else:
            span = draw.choice([s for s in spans.spans if s[0] == phase and s[1] >= ends[0]])
            at, callbacks = draw.randrange(span[1] + 1, span[2]), []
            whole = sum(end < at for end in ends)
        killed(Run(lambda: make(trunk), root, *callbacks), at)
        again = finished(lambda: make(trunk), root, path=newest(root))
        assert len(again.logged) == BATCHES - whole, (phase, at)
        assert_same_end(again, straight)
