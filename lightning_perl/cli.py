"""``python -m lightning_perl {fit,...,estimate,new-trunk,generate,compare,mix,export,report}``."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

import lightning_perl

# Short class names on the command line: subclasses are found once their packages are imported.
import lightning_perl.data
import lightning_perl.modules
import lightning_perl.rewards
from lightning_perl.callbacks import run_folder
from lightning_perl.callbacks.handover import changes
from lightning_perl.commands import dry_run, mix
from lightning_perl.commands.compare import compare
from lightning_perl.commands.estimate import add_arguments, devices_of
from lightning_perl.commands.estimate import run as estimate
from lightning_perl.commands.export import export
from lightning_perl.commands.generate import generate
from lightning_perl.commands.new_trunk import new_trunk
from lightning_perl.commands.parsing import Parser
from lightning_perl.commands.report import report
from lightning_perl.commands.trained import newest_checkpoint, read
from lightning_perl.modules.base import AdapterModule, require_plain_ranks
from lightning_perl.packaged import PREFIX, unpackaged
from lightning_perl.phases import ran_out_of_memory
from lightning_perl.quiet import no_progress_bars

PROGRAM = "python -m lightning_perl"
CONFIG_HELP = (
    "A YAML file, or the name of one that comes with the package (quickstart). Several are laid "
    "over each other, the last one on top."
)
ALSO = (
    f"fit {dry_run.FLAG} builds everything, learns from one batch, prints a plan and keeps nothing. "
    f"There are more commands, each with a --help: {PROGRAM} estimate prints how much memory a fit will take, "
    f"{PROGRAM} new-trunk writes a small untrained trunk, with a tokenizer trained on your data, {PROGRAM} "
    f"generate lets a trained policy answer, {PROGRAM} compare lets several answer the same held-out prompts, "
    f"{PROGRAM} mix makes one of several, {PROGRAM} export writes a folder for others, and {PROGRAM} report "
    "writes a run's curves and answers as an HTML file."
)


ANY_MODULE_ON_ANY_DATA: dict[str, Any] = {
    "model_class": LightningModule,
    "datamodule_class": LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
}


def packaged_configs() -> dict[str, Path]:
    """The YAML files that come with the package, by name, as in ``own/rloo.yaml``."""
    folder = Path(str(files("lightning_perl").joinpath("quickstart")))
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


@cache
def piped(path: str) -> str:
    """What comes out of a pipe, which can be read once only."""
    return Path(path).read_text(encoding="utf-8")


def is_text(source: str) -> bool:
    """Whether a ``--config`` value is YAML itself."""
    return "\n" in source or source.lstrip().startswith("{")


def config_source(given: str) -> str:
    """The source that a ``--config`` value names: a file, a packaged file, a URL, a pipe, or YAML text itself.

    A file of that name wins over a packaged one; ``.yaml`` may be left out of a packaged name.
    """
    if is_text(given):  # asked first: most of it is too long for a file's name
        return given
    if given.startswith(PREFIX):
        return unpackaged(given)
    if Path(given).is_file() or "://" in given:
        return given
    if Path(given).is_fifo():
        return piped(given)
    shipped = packaged_configs()
    for name in (given, f"{given}.yaml"):
        if name in shipped:
            return str(shipped[name])
    raise FileNotFoundError(
        f"{given} is no file (looked from {Path.cwd()}) and no packaged config; the package has "
        f"{', '.join(shipped)}."
    )


def usage_of(command: str) -> dict[str, Any]:
    """Settings of a command's parser; a key that is almost right is an error, not a guess."""
    dry = f"[{dry_run.FLAG}] " * (command == "fit")
    usage = f"{PROGRAM} {command} [-c CONFIG]... {dry}[--KEY VALUE]..."
    return {"usage": usage, "allow_abbrev": False}


class ConfigFile(ActionConfigFile):
    """``--config`` that also knows the files of the package."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the file; what is wrong in it is said with its name."""
        source = config_source(str(values))
        assert isinstance(parser, Parser)
        parser.reading = "" if is_text(source) else source
        try:
            super().__call__(parser, namespace, source, option_string)  # type: ignore[no-untyped-call]
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is no YAML file: {error}.") from error
        finally:
            parser.reading = ""


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's own folder, whichever logger there is.

    Lightning's own place is ``trainer.log_dir``, which all runs of a `WandbLogger` share.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, for which every rank is needed, and save."""
        run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called on rank zero."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        earlier = len(list(folder.glob("config*.yaml")))  # of parts that went on in this folder
        path = folder / (f"config_{earlier + 1}.yaml" if earlier else self.config_filename)
        try:
            self.parser.save(self.config, str(path), overwrite=True, multifile=False)
        except OSError as error:  # of a full disk Python does not say where
            raise OSError(f"{path} could not be written: {error}") from error


def refuse_early(given: Namespace, trainer_settings: dict[str, Any]) -> None:
    """What the module's `setup` would refuse, once the trunk is loaded and the data read."""
    module = resolve_name(given.model.class_path)
    if not issubclass(module, AdapterModule):
        return
    strategy = trainer_settings.get("strategy", "auto")
    require_plain_ranks(getattr(strategy, "class_path", strategy))
    if not isinstance(strategy, str):
        trainer_settings = {**trainer_settings, "strategy": "auto"}
    for key in ("optimizer", "lr_scheduler"):
        if given.get(key):
            raise ValueError(
                f"--{key} would replace the module's parameter groups and their learning rates. Give "
                f"--model.{key.removeprefix('lr_')} instead."
            )
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = messages.level
    messages.setLevel(logging.ERROR)  # the run's own trainer says which devices there are
    try:
        trainer = Trainer(**trainer_settings, logger=False, enable_checkpointing=False)
    except ValueError as error:
        raise ValueError(f"trainer: {error}") from error
    finally:
        messages.setLevel(level)
    sharding = given.get("model.init_args.trunk_sharding")
    module.refuse(trainer, given.get("data.init_args.rows"), sharding)


class PerlCLI(LightningCLI):
    """LightningCLI in subclass mode: any module on any data, with the trunk's tokenizer."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser with our ``--config``."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data's tokenizer is the trunk's."""
        parser.link_arguments("model.init_args.trunk", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what `main` was given; LightningCLI would warn that ``sys.argv`` exists as well."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]  # a list, always

    def _parse_ckpt_path(self) -> None:
        """Find what ``last`` means, and go by the settings given now.

        Lightning lays the checkpoint's hyper-parameters over the command line, without a word.
        """
        given = self.config.get(self.config.get("subcommand") or "", {})
        path = given.get("ckpt_path")
        if path is None or "://" in str(path):
            return
        resumed = self.config.subcommand == "fit"
        if path == "last":
            path = newest_checkpoint(given.trainer.as_dict(), resumed)
            given.ckpt_path = str(path)
            self._continue_in(given.trainer.logger, path.parent.parent.name)
        stored = read(Path(path))
        if resumed:  # what `Resume` would refuse once the trunk is loaded and the data read
            model = given.model.as_dict()
            now = {"class": model["class_path"].split(".")[-1], **model["init_args"]}
            changes(now, stored, path)

    @staticmethod
    def _continue_in(logger: Any, run: str) -> None:  # noqa: ANN401 (a Namespace, a list or none)
        """Let Weights & Biases go on with its run; other loggers number the parts of a run."""
        if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger"):
            logger.init_args.id = run

    def before_instantiate_classes(self) -> None:
        """Refuse what needs no data and no weights."""
        given = self.config[self.subcommand]
        keys = ("accelerator", "strategy", "devices", "num_nodes", "precision", "overfit_batches")
        refuse_early(given, {key: given.trainer[key] for key in keys})

    def instantiate_classes(self) -> None:
        """Make the objects, and raise a constructor's own error where one refuses its arguments.

        jsonargparse takes a constructor's `ValueError` for a failed match of a Union's first type and hides it
        in a dump of the whole configuration.
        """
        try:
            super().instantiate_classes()
            return
        except ValueError as error:
            refused: BaseException = error
            while str(refused).startswith("Does not validate against") and refused.__cause__:
                refused = refused.__cause__
        raise refused


class EstimateCLI(PerlCLI):
    """Reads what ``fit`` reads, and instantiates nothing: ``estimate`` makes the module without weights."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's own arguments."""
        super().add_arguments_to_parser(parser)
        add_arguments(parser)

    def before_instantiate_classes(self) -> None:
        """Refuse what `fit` refuses, whatever devices there are here."""
        trainer = self.config.trainer
        keys = ("strategy", "num_nodes", "precision", "overfit_batches")
        settings = {key: trainer[key] for key in keys}
        settings |= {"accelerator": "cpu", "devices": devices_of(trainer.devices)}
        refuse_early(self.config, settings)

    def instantiate_classes(self) -> None:
        """Nothing is made."""


def run_estimate(args: Sequence[str]) -> None:
    """``estimate`` takes the arguments of ``fit`` and a few more."""
    cli = EstimateCLI(
        run=False,
        save_config_callback=None,
        parser_kwargs={"prog": f"{PROGRAM} estimate", **usage_of("estimate")},
        args=list(args),
        **ANY_MODULE_ON_ANY_DATA,
    )
    estimate(cli.config, cli.parser)


def run_function(command: str, function: Callable[..., object], args: Sequence[str]) -> None:
    """A command that takes the arguments of a function; data has the trunk's tokenizer, where there are both."""
    takes = signature(function).parameters
    # A run comes first, without its name.
    runs = "run" in takes
    usage = usage_of(command)
    if runs:
        usage["usage"] = f"{PROGRAM} {command} RUN {'OUT ' * ('out' in takes)}[--KEY VALUE]..."
    parser = Parser(description="", prog=f"{PROGRAM} {command}", **usage)
    parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
    parser.add_function_arguments(function, as_positional=runs)
    if {"data", "trunk"} <= takes.keys():
        parser.link_arguments("trunk", "data.init_args.tokenizer")
    # A switch needs no value.
    switches = {f"--{name}" for name, taken in takes.items() if taken.annotation == "bool"}
    ends = [*args[1:], ""]
    args = [
        f"{arg}=true" if arg in switches and end not in ("true", "false") else arg
        for arg, end in zip(args, ends, strict=False)
    ]
    chosen = parser.instantiate(parser.parse_args(args)).as_dict()
    chosen.pop("config")
    with no_progress_bars():
        function(**chosen)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line, by default the process's own."""
    given = list(sys.argv[1:] if args is None else args)
    own_commands: dict[str, Callable[[Sequence[str]], None]] = {
        "new-trunk": partial(run_function, "new-trunk", new_trunk),
        "compare": partial(run_function, "compare", compare),
        "mix": partial(mix.run, program=f"{PROGRAM} mix"),
        "generate": partial(run_function, "generate", generate),
        "export": partial(run_function, "export", export),
        "report": partial(run_function, "report", report),
        "estimate": run_estimate,
    }
    if given and given[0] in own_commands:
        own_commands[given[0]](given[1:])
        return
    if given[:1] == ["fit"] and dry_run.FLAG in given:
        given.remove(dry_run.FLAG)
        if any(arg.partition("=")[0] == "--ckpt_path" for arg in given):
            raise ValueError(f"fit {dry_run.FLAG} plans a whole run: leave --ckpt_path out.")
        run_estimate(given[1:])
        given += dry_run.AS_FIT
    PerlCLI(
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={
            "prog": PROGRAM,
            "version": lightning_perl.__version__,
            "epilog": ALSO,
            "allow_abbrev": False,
            **{command: usage_of(command) for command in PerlCLI.subcommands()},
        },
        args=given,
        **ANY_MODULE_ON_ANY_DATA,
    )


def run() -> None:
    """`main`, ended with one line where this package or Lightning refuses something; a fault keeps its trace."""
    try:
        main()
    except Exception as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(origin.filename).is_relative_to(Path(__file__).parent)
        refusal = ours and (origin.line or "").startswith("raise ")
        # An OSError with a name is about a file: it is not there, or cannot be written.
        told = isinstance(error, MisconfigurationException) or ran_out_of_memory(error)
        told = told or (isinstance(error, OSError) and error.filename is not None)
        if not refusal and not told:
            raise
        sys.exit(f"error: {error}")
