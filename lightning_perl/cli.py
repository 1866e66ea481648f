"""``python -m lightning_perl {fit,validate,test,predict,new-trunk}``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_perl

# Short class names on the command line: subclasses are found once their packages are imported.
import lightning_perl.callbacks
import lightning_perl.data
import lightning_perl.modules
import lightning_perl.rewards  # noqa: F401
from lightning_perl.commands.new_trunk import new_trunk


class PerlCLI(LightningCLI):
    """LightningCLI in subclass mode: any module on any datamodule, the trunk's tokenizer stated once."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is tokenized as the trunk was trained."""
        parser.link_arguments("model.init_args.trunk", "data.init_args.tokenizer")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Instead of the process's own, for tests and notebooks.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["new-trunk"]:
        auto_cli(new_trunk, args=given[1:])
        return
    PerlCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        # A run gets a folder of its own; what is there already is never a reason not to start.
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"version": lightning_perl.__version__},
        args=given,
    )
