"""Which roles are asked for what."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lightning_perl.functional.sequences import Sequences
from lightning_perl.models.roles import Role, RoleAnswers
from tests.modules import tiny


def test_validation_never_asks_the_critic(
    hydra_trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny.hydra(hydra_trunk)
    answer, asked = module.roles.answer, set[Role]()

    def noting(
        sequences: Sequences, roles: Iterable[Role], *args: Any, **kwargs: Any
    ) -> RoleAnswers:
        names = list(roles)
        asked.update(names)
        return answer(sequences, names, *args, **kwargs)

    monkeypatch.setattr(module.roles, "answer", noting)
    trainer, _ = tiny.quiet_trainer(tmp_path)
    trainer.validate(module, tiny.Batches([tiny.prompts(4)]), verbose=False)
    # The policy's log-probabilities were kept while it sampled.
    assert asked == {"reference", "reward"}
    module.score(module.collect(tiny.prompts(4), 0))
    assert "value" in asked
