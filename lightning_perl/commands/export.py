"""``export``: what a run has trained, as a folder that plain PEFT and transformers load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lightning_perl.callbacks.console import show
from lightning_perl.chat import name_of
from lightning_perl.commands.trained import (
    Part,
    Trained,
    held_out,
    load,
    series_of,
    settings_of,
    template_of,
    trained,
    unpack,
)
from lightning_perl.data.tokenization import PLAIN, PLAIN_CHAT_TEMPLATE
from lightning_perl.models.adapters import OFF, name_trunk
from lightning_perl.models.heads import has_head, load_head
from lightning_perl.models.loading import classifier_like, plain_model
from lightning_perl.models.manifest import require_alike, save_classifier, save_trunk
from lightning_perl.whole import manifest_of, require_new, whole_folder


def export(
    run: Path, out: Path, role: Part = "policy", merge: bool = False, trunk: str | None = None
) -> Path:
    """Write what a run has trained as a folder for others: a PEFT adapter, or with ``merge`` a whole model.

    The folder has the tokenizer with the chat template of the training, and a model card. It is loaded with plain
    transformers and PEFT, and compared with the trained model. A merged policy is for AutoModelForCausalLM; a
    merged reward model for AutoModelForSequenceClassification, which has no bias: its scores are lower by a
    constant, which is printed.

    Args:
        run: A run's folder such as runs/NAME/latest, an adapter's or a trunk's folder, or a checkpoint.
        out: Folder to write; it must not exist yet.
        role: What to export: the policy or the reward model.
        merge: Add the adapter to the trunk's weights, in float32, and write the whole model.
        trunk: Folder or hub name of the trunk, where it no longer lies where it was. None: as the run says.

    Returns:
        The folder.
    """
    require_new(out)
    with TemporaryDirectory() as beside:
        source = run
        if run.suffix == ".ckpt":
            source = unpack(run, role, Path(beside) / role, trunk)
        found = trained(source, role, trunk)
        home = run.resolve().parents[1] if run.suffix == ".ckpt" else found.run
        _refuse_early(found, role, merge)
        with whole_folder(out) as part:
            difference = _write(found, part, role, merge)
            kind = "an adapter" if found.is_adapter and not merge else "a whole model"
            (part / "README.md").write_text(
                "\n".join(_card(found, home, role, merge)) + "\n", encoding="utf-8"
            )
    show(f"wrote {out}: the {role} as {kind}; loaded again, it differs by at most {difference:.2g}")
    return out


def _refuse_early(found: Trained, role: Part, merge: bool) -> None:
    """Refuse what can be seen before anything is loaded."""
    quantization = manifest_of(found.folder).get("quantization")
    if merge and found.is_adapter and quantization:
        raise ValueError(
            f"{found.folder} was trained on a trunk in {quantization}: added to the full-precision weights it "
            "would be another model than the trained one. Export without merge, and load the trunk quantized."
        )
    if role == "reward" and not has_head(found.folder, "reward"):
        raise ValueError(
            f"{found.folder} has no reward head, so it is no reward model. Export its policy."
        )
    if role == "reward" and not found.is_adapter and not merge:
        raise ValueError(
            f"{found.folder} is a whole trunk with a reward head, and no adapter. Export it with --merge, as a "
            "classifier."
        )


@torch.no_grad()
def _write(found: Trained, folder: Path, role: Part, merge: bool) -> float:
    """Write the model and its tokenizer; returns the largest difference to the trained one."""
    trunk, adapter = load(found)
    template = template_of(found)
    if template == PLAIN:
        trunk.tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    ids = trunk.probe()
    with trunk.switch.use(adapter):
        hidden = trunk(ids, torch.ones_like(ids, dtype=torch.bool))
    merged = None if adapter == OFF else adapter
    if role == "reward" and merge:
        head = load_head(found.folder, "reward")
        save_classifier(trunk, classifier_like(trunk), folder, merged, head)
        show(
            f"a score of the classifier is lower by the bias of the reward head, {float(head.bias):.6g}"
        )
        scores = head(hidden[:, -1]) - head.bias
        terms = float((hidden[:, -1].abs() @ head.weight.abs()).max())
        return require_alike(folder, scores, _plain(folder, ids, True), scale=terms)
    if merge or not found.is_adapter:
        # The tokenizer writes turns now, whatever did in training.
        trunk.templates = {} if template is None else {"export": name_of(trunk.tokenizer)}
        save_trunk(trunk, folder, merged, {"module": manifest_of(found.folder).get("module")})
    else:
        shutil.copytree(found.folder, folder, dirs_exist_ok=True)
        name_trunk(folder, found.trunk)
        trunk.tokenizer.save_pretrained(folder)
    return require_alike(folder, trunk.project(hidden), _plain(folder, ids, False))


def _plain(folder: Path, ids: Tensor, classifier: bool) -> Tensor:
    """What transformers and PEFT make of the folder."""
    found: Tensor = plain_model(folder, classifier)(input_ids=ids).logits
    return found.squeeze(-1) if classifier else found


LOADING = """```python
from transformers import {kind}, AutoTokenizer

model = {kind}.from_pretrained("FOLDER")  # this folder{through}
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
SCORING = """An answer is scored at the token that ends it: cut what the chat template writes behind that.
"""
HEAD = """```python
from safetensors.torch import load_file

head = load_file("FOLDER/heads/heads.safetensors")
ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
hidden = model.base_model(input_ids=ids).last_hidden_state
score = hidden[0, -1].float() @ head["reward.weight"] + head["reward.bias"]
```
"""


def _card(found: Trained, home: Path, role: Part, merge: bool) -> Iterator[str]:
    """A model card in Markdown."""
    settings, about = settings_of(home), manifest_of(found.folder)
    named = re.search(r"class_path: (?:\w+\.)*(\w+)", settings.get("model", ""))
    module = named[1] if named else about.get("module")
    adapter = found.is_adapter and not merge
    yield from ("---", f"library_name: {'peft' if adapter else 'transformers'}")
    if not Path(found.trunk).exists():
        yield f"base_model: {found.trunk}"
    yield from ("tags:", "- lightning-perl", *([f"- {module}"] if module else []), "---", "")
    yield f"# {role.capitalize()} trained with lightning-perl{f' ({module})' if module else ''}"
    yield ""
    classifier = role == "reward" and merge
    kind = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    yield LOADING.format(kind=kind, through=", with peft installed" if adapter else "")
    if role == "reward":
        yield SCORING
        yield from () if merge else [HEAD]
    if unfinished := about.get("unfinished"):
        yield f"Unfinished: {unfinished}.\n"
    yield f"Trunk: `{found.trunk}`. Chat template: `{about.get('template', 'not noted')}`."
    yield "Licence: the trunk's, and that of the data; see there.\n"
    if rows := held_out(series_of(home / "metrics.csv")):
        yield from ("## Last measured", "", "| measure | value |", "|---|---|")
        yield from (f"| `{key}` | {value:.4g} |" for key, value in rows.items())
        yield ""
    for part in ("model", "data"):
        if part in settings:
            yield f"## Settings: {part}\n\n```yaml\n{settings[part]}\n```\n"
