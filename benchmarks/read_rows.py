"""How long own rows take before the first step: made-up pairs as JSON lines, loaded, encoded and divided.

    python benchmarks/read_rows.py                                  # 100,000 pairs
    python benchmarks/read_rows.py --turns 1000 --rows 20           # chats of 1,000 turns
    python benchmarks/read_rows.py --tokenizer RUN/trunk            # a real tokenizer

Prints one JSON line: seconds of each part (of the rows also those that the processors worked, which tell what a
quiet machine would take), and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from lightning_perl.data import PreferenceDataModule

WORDS = (
    "tea milk hot cold green black leaf cup water sugar honey lemon ginger slow warm bitter sweet"
)


def sentence(draw: random.Random, words: int) -> str:
    """Some of the words, with a number that keeps texts apart."""
    return f"{' '.join(draw.choices(WORDS.split(), k=words))} {draw.randrange(10**9)}."


def write(file: Path, rows: int, turns: int) -> None:
    """Pairs of about 120 words each; the prompt has ``turns`` turns."""
    draw = random.Random(0)
    roles = ("user", "assistant")
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            said = [sentence(draw, 60 if turns == 1 else 8) for _ in range(turns)]
            talk = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
            row = {"prompt": talk[0]["content"] if turns == 1 else talk}
            row |= {name: sentence(draw, 30) for name in ("chosen", "rejected")}
            lines.write(f"{json.dumps(row)}\n")


def main() -> None:
    """Write, read, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--turns", type=int, default=1, help="turns of the prompt; odd, the user begins and ends"
    )
    parser.add_argument(
        "--tokenizer", default="packaged:quickstart/trunk", help="a folder or a name of the hub"
    )
    parser.add_argument("--max_tokens", type=int, default=768)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write(file, arguments.rows, arguments.turns)
        size = file.stat().st_size
        start = time.perf_counter()
        limits = {
            "max_tokens": arguments.max_tokens,
            "max_response_tokens": arguments.max_tokens // 2,
        }
        module = PreferenceDataModule(arguments.tokenizer, str(file), **limits)
        module.tokenizer  # noqa: B018
        loaded, busy = time.perf_counter(), time.process_time()
        module.setup()
        done = time.perf_counter()
    kept = module.report.splits
    print(
        json.dumps(
            {
                "rows": arguments.rows,
                "turns": arguments.turns,
                "file_mb": round(size / 1e6, 1),
                "train": kept["train"].kept,
                "val": kept["val"].kept,
                "tokenizer_seconds": round(loaded - start, 2),
                "rows_seconds": round(done - loaded, 2),
                "cpu_seconds": round(time.process_time() - busy, 2),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
