"""Parameter-efficient RLHF on PyTorch Lightning: four roles on one frozen trunk.

The package root holds the version and imports nothing, so that ``--version`` and tooling are quick.
Import from ``lightning_perl.modules``, ``lightning_perl.data`` and ``lightning_perl.callbacks``.
"""

from __future__ import annotations

__version__ = "0.2.0"
