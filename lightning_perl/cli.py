"""``python -m lightning_perl {fit,validate,test,predict,estimate,new-trunk}``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType
from typing import Any

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    Namespace,
)
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

import lightning_perl

# Short class names on the command line: subclasses are found once their packages are imported.
import lightning_perl.data
import lightning_perl.modules
import lightning_perl.rewards
from lightning_perl.callbacks import run_folder
from lightning_perl.commands.estimate import LlamaSizes, architecture_from, report
from lightning_perl.commands.new_trunk import new_trunk
from lightning_perl.commands.rehearsal import Load
from lightning_perl.data import TaskmasterDataModule
from lightning_perl.modules.base import AdapterModule
from lightning_perl.modules.on_policy import OnPolicy
from lightning_perl.modules.scoring import Scoring
from lightning_perl.packaged import PREFIX, unpackaged

PROGRAM = "python -m lightning_perl"
CONFIG_HELP = (
    "A YAML file, or the name of one that comes with the package (quickstart). Several are laid "
    "over each other, the last one on top."
)
SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""What makes two trunks take the same memory."""
ALSO = (
    f"There are two more commands: {PROGRAM} estimate says how much memory a fit will take, and "
    f"{PROGRAM} new-trunk writes a small untrained trunk, with a tokenizer trained on your data (see "
    "their --help)."
)


def packaged_configs() -> dict[str, Path]:
    """The YAML files that come with the package, by name."""
    folder = Path(str(files("lightning_perl").joinpath("quickstart")))
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def config_source(given: str) -> str:
    """What a ``--config`` value stands for: a file, a packaged file, a URL, or YAML text itself.

    A file of that name wins over a packaged one; ``.yaml`` may be left out of a packaged name.

    Raises:
        FileNotFoundError: It is none of them.
    """
    if given.startswith(PREFIX):
        return unpackaged(given)
    if Path(given).is_file() or "://" in given:
        return given
    shipped = packaged_configs()
    for name in (given, f"{given}.yaml"):
        if name in shipped:
            return str(shipped[name])
    if "\n" in given or given.lstrip().startswith("{"):
        return given
    raise FileNotFoundError(
        f"{given} is no file (looked from {Path.cwd()}) and no packaged config; the package has "
        f"{', '.join(shipped)}."
    )


class ConfigFile(ActionConfigFile):
    """``--config`` that also knows the files of the package."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Read the file; a missing one ends the program with its name."""
        try:
            source = config_source(str(values))
        except FileNotFoundError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        super().__call__(parser, namespace, source, option_string)  # type: ignore[no-untyped-call]


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's own folder, whichever logger there is.

    Lightning's own place is ``trainer.log_dir``, which all runs of a `WandbLogger` share.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, which needs every rank, and save."""
        run_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called on rank zero."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        for key, value in list(config.items()):
            # A module's own default, which YAML cannot say; left out, the module takes it again.
            if isinstance(value, FunctionType) and "<lambda>" in value.__qualname__:
                del config[key]
        path = folder / self.config_filename
        self.parser.save(config, str(path), overwrite=True, multifile=False)


class PerlCLI(LightningCLI):
    """LightningCLI in subclass mode: any module on any data, the trunk's tokenizer stated once."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's parser with our ``--config``."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is tokenized as the trunk was trained."""
        parser.link_arguments("model.init_args.trunk", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what `main` was given; LightningCLI would warn that ``sys.argv`` exists as well."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]  # a list, always

    def before_instantiate_classes(self) -> None:
        """No bars for a trunk that is read from disk in a moment; downloads keep theirs."""
        trunk = str(self.config.get(f"{self.subcommand}.model.init_args.trunk", ""))
        if trunk.startswith(PREFIX) or Path(trunk).exists():
            disable_progress_bar()  # type: ignore[no-untyped-call]

    def instantiate_classes(self) -> None:
        """Make the objects; what a constructor refuses reaches the user in its own words.

        jsonargparse takes a constructor's `ValueError` for a failed match of a Union's first type and
        buries it in a dump of the whole configuration.
        """
        try:
            super().instantiate_classes()
            return
        except ValueError as error:
            refused: BaseException = error
            while str(refused).startswith("Does not validate against") and refused.__cause__:
                refused = refused.__cause__
        raise refused


ARCHITECTURE_HELP = (
    "A model folder, a config.json or a hub name, in place of the configuration's trunk. Only the "
    "architecture is read, never weights. Or give the sizes of a Llama: --hidden_size and so on."
)
PAIRS_HELP = (
    "Whether the data's rows are preference pairs. By default they are for modules with a reward loss, unless "
    "the data is Taskmaster's, which has thumbs only; say false for thumbs of your own."
)


class EstimateCLI(PerlCLI):
    """Reads what `fit` reads, and makes nothing of it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is asked besides."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--architecture", type=str | None, default=None, help=ARCHITECTURE_HELP)
        for size in fields(LlamaSizes):
            parser.add_argument(f"--{size.name}", type=int | None, default=None)
        parser.add_argument("--pairs", type=bool | None, default=None, help=PAIRS_HELP)
        parser.add_argument(
            "--budget",
            type=str | None,
            default=None,
            help="Such as 24GiB: also find the largest batches that fit.",
        )
        parser.add_argument(
            "--layouts",
            action="store_true",
            help="Also estimate PPO's layouts and supervised fine-tuning, at the same lengths.",
        )
        parser.add_argument("--json", action="store_true", help="Print one JSON object.")

    def before_instantiate_classes(self) -> None:
        """Nothing is read from disk."""

    def instantiate_classes(self) -> None:
        """Later, without weights."""

    @property
    def module_class(self) -> type[AdapterModule]:
        """Whose acts are run.

        Raises:
            ValueError: No module of ours.
        """
        found = resolve_name(self.config.model.class_path)
        if not (isinstance(found, type) and issubclass(found, AdapterModule)):
            raise ValueError(
                f"estimate runs the acts of this package's modules, not of {self.config.model.class_path}."
            )
        return found

    def make_module(self) -> AdapterModule:
        """The module alone, without what only a real run reads.

        Raises:
            ValueError: Several rewards of which some are not there yet, or a reward on a trunk of another shape.
        """
        asked = self.config.model.clone()
        asked.init_args.pop("gold", None)
        rewards = asked.init_args.get("reward")
        folders = [rewards] if isinstance(rewards, str) else rewards or []
        missing = [one for one in folders if not Path(unpackaged(one)).expanduser().exists()]
        if missing and len(folders) > 1:
            raise ValueError(
                f"estimate: {missing} of the {len(folders)} reward folders are not there, so their shapes are "
                "not known. Give folders that exist, or one that does not: it is taken to have the actor's shape."
            )
        if missing:
            # Not trained yet: taken to have the actor's shape, or the policy trunk's.
            asked.init_args["reward"] = None
        for folder in set(folders) - set(missing):
            self._require_same_shape(folder)
        with warnings.catch_warnings():
            # A module's own default optimizer is a function, which no config file can hold.
            warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")
            made = self.parser.instantiate(Namespace(model=asked)).model  # type: ignore[no-untyped-call]
        if not isinstance(made, AdapterModule):
            raise TypeError(f"{type(made).__name__} is no module of this package.")
        return made

    def _require_same_shape(self, folder: str) -> None:
        """All trunks are estimated with one architecture."""
        if not (Path(unpackaged(folder)).expanduser() / "config.json").is_file():
            return  # an adapter
        ours, theirs = (
            {name: getattr(config, name, None) for name in SHAPE}
            for config in (self.architecture(), architecture_from(folder))
        )
        if ours != theirs:
            raise ValueError(
                f"estimate knows one architecture for all trunks; that of the reward in {folder} is another: "
                f"{theirs}, got {ours} for the policy. Estimate it with a reward on a trunk of the policy's shape."
            )

    def architecture(self) -> PreTrainedConfig:
        """Of the flags, of ``--architecture``, or of the trunk.

        Raises:
            ValueError: Some sizes but not all, or nothing that transformers can read.
        """
        sizes = {size.name: self.config[size.name] for size in fields(LlamaSizes)}
        if all(value is None for value in sizes.values()):
            return architecture_from(self.config.architecture or self.config.model.init_args.trunk)
        missing = [
            f"--{size.name}"
            for size in fields(LlamaSizes)
            if size.default is MISSING and sizes[size.name] is None
        ]
        if missing or self.config.architecture:
            raise ValueError(
                "estimate: give --architecture, or all sizes of a Llama without it"
                + (f"; missing {', '.join(missing)}." if missing else ".")
            )
        return LlamaSizes(**sizes).config()

    def load(self) -> Load:
        """Lengths and sizes as the data and the module state them."""
        data, args = self.config.data.init_args, self.config.model.init_args
        prompt = data.max_tokens - data.max_response_tokens
        if issubclass(self.module_class, OnPolicy):
            return Load(prompt, args.sampling.max_new_tokens, data.batch_size)
        pairs = self.config.pairs
        if pairs is None:
            thumbs = issubclass(resolve_name(self.config.data.class_path), TaskmasterDataModule)
            pairs = issubclass(self.module_class, Scoring) and not thumbs
        accumulated = (self.config.trainer.accumulate_grad_batches or 1) > 1
        return Load(prompt, data.max_response_tokens, data.batch_size, pairs, accumulated)


def run_estimate(args: Sequence[str]) -> None:
    """``estimate``: the arguments of ``fit`` and a few more."""
    cli = EstimateCLI(
        LightningModule,
        LightningDataModule,
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        run=False,
        parser_kwargs={
            "prog": f"{PROGRAM} estimate",
            "usage": f"{PROGRAM} estimate [-c CONFIG]... [--KEY VALUE]... (all: --help)",
            "allow_abbrev": False,
        },
        args=list(args),
    )
    asked = cli.config
    print(
        report(
            cli.make_module,
            cli.architecture(),
            cli.load(),
            asked.budget,
            asked.layouts,
            asked.json,
        )
    )


def silence_known() -> None:
    """Drop messages that every run would show and that ask nothing of anybody."""
    # Lightning makes torch's LeafSpec in a way that torch has deprecated; only Lightning can change it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Trunks stay in eval mode between training passes by design (see `Trunk.training_pass`).
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start")
    # Advertisements for packages of Lightning AI; there is no switch for them.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def run_new_trunk(args: Sequence[str]) -> None:
    """``new-trunk``: its arguments are those of the function."""
    parser = ArgumentParser(prog=f"{PROGRAM} new-trunk", allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG_HELP)
    parser.add_function_arguments(new_trunk)
    chosen = parser.instantiate(parser.parse_args(args)).as_dict()
    chosen.pop("config")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    new_trunk(**chosen)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Instead of the process's own, for tests and notebooks.
    """
    given = list(sys.argv[1:] if args is None else args)
    silence_known()
    if given[:1] == ["new-trunk"]:
        run_new_trunk(given[1:])
        return
    if given[:1] == ["estimate"]:
        run_estimate(given[1:])
        return
    commands = {
        command: {
            # A usage line per trainer argument would push the error itself off the screen.
            "usage": f"{PROGRAM} {command} [-c CONFIG]... [--KEY VALUE]... (all: --help)",
            # A key that is almost right is an error, not a guess.
            "allow_abbrev": False,
        }
        for command in PerlCLI.subcommands()
    }
    PerlCLI(
        LightningModule,
        LightningDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        parser_kwargs={
            "prog": PROGRAM,
            "version": lightning_perl.__version__,
            "epilog": ALSO,
            "allow_abbrev": False,
            **commands,
        },
        args=given,
    )
