"""``report``: what a run did, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

from lightning_perl.callbacks.console import show
from lightning_perl.commands.trained import Series, held_out, series_of, settings_of
from lightning_perl.data.reading import jsonl_rows

CURVES = (
    ("Score", ("rollout/score", "val/score")),
    ("Gold", ("gold/score", "val/gold")),
    ("KL to the reference, nats per response", ("rollout/kl", "val/kl")),
    ("Length, tokens", ("rollout/response_tokens", "val/response_tokens")),
    ("Loss", ("train/loss", "train/policy_loss", "val/loss")),
    ("Critic: explained variance", ("train/explained_variance",)),
    ("Accuracy or AUROC", ("val/accuracy", "val/auroc")),
    ("Gradient norms", ("train/grad_norm_actor", "train/grad_norm_critic", "train/grad_norm_trunk")),
    ("Clipped share, distinct-2", ("train/clip_fraction", "rollout/distinct_2")),
    ("Memory, GiB", ("memory/rollout_peak_allocated_gib", "memory/actor_peak_allocated_gib",
                     "memory/rollout_resident_gib", "memory/actor_resident_gib")),
    ("Seconds per episode", ("speed/seconds_per_episode",)),
)  # fmt: skip
FRONTIERS = (("rollout/kl", "rollout/score"), ("rollout/kl", "gold/score"))
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #222 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
img { width: 100% } h1 { overflow-wrap: anywhere } .wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
td, th { border: 1px solid #ccc; padding: .4rem; text-align: left }
td { vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere } td.number { white-space: nowrap }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto }
"""


def report(run: Path, out: Path | None = None) -> Path:
    """Write a run's curves, samples and settings as one HTML file.

    Args:
        run: A run's folder such as runs/NAME/latest, with ``metrics.csv``; of a folder of runs the latest.
        out: The file. None: ``report.html`` in the run's folder.

    Returns:
        The file.
    """
    folder = run / "latest" if (run / "latest").is_dir() else run
    if not (folder / "metrics.csv").is_file():
        raise FileNotFoundError(
            f"{folder} holds no metrics.csv. Give a run's folder; W&B runs have their charts there."
        )
    target = out or folder / "report.html"
    page = "\n".join(_page(folder))
    target.write_text(page, encoding="utf-8")
    show(f"wrote {target}")
    return target


def _page(folder: Path) -> Iterator[str]:
    series = series_of(folder / "metrics.csv")
    title = escape(str(folder.resolve().relative_to(folder.resolve().parents[1])))
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
    yield '<div class="curves">'
    for name, keys in CURVES:
        shown = {key: series[key] for key in keys if key in series}
        if shown:
            yield _image(shown, name, "step")
    for across, up in FRONTIERS:
        if {across, up} <= series.keys():
            pairs = zip(series[across], series[up], strict=False)
            yield _image(
                {up: [(x, y) for (_, x), (_, y) in pairs]}, f"{up} over KL", "KL, nats", "."
            )
    yield "</div>"
    if held := held_out(series):
        yield '<h2>Last measured</h2><div class="wide"><table>'
        yield from (
            f'<tr><td>{escape(key)}</td><td class="number">{value:.4g}</td></tr>'
            for key, value in held.items()
        )
        yield "</table></div>"
    for path in sorted(folder.glob("*.png")):
        yield f"<h2>{escape(path.stem)}</h2>{_embedded(path.read_bytes(), path.stem)}"
    yield from _samples(folder / "samples.jsonl")
    for name, text in settings_of(folder).items():
        yield f"<h2>Settings: {escape(name)}</h2><pre>{escape(text)}</pre>"
    yield "</body></html>"


def _samples(path: Path) -> Iterator[str]:
    """The samples of the last step."""
    if not path.is_file():
        return
    # A run that was killed may have written half a line.
    rows = [row for _, row in jsonl_rows(path, lambda where, why: show(f"{where}: {why}"))]
    if not rows:
        return
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    yield f"<h2>Answers at step {last[0]['step']}</h2>"
    yield '<div class="wide"><table><tr><th>prompt</th><th>before</th><th>after</th></tr>'
    for row in last:
        cells = [row["prompt"]]
        for part in ("before", "after"):
            score = row[f"score_{part}"]
            cells.append(f"[{'not finite' if score is None else f'{score:+.2f}'}]\n{row[part]}")
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _image(curves: Series, title: str, across: str, style: str = "-") -> str:
    """A plot as an image inside of the page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for key, points in curves.items():
        dots = "o-" if key.startswith("val/") else style
        axes.plot(*zip(*points, strict=True), dots, markersize=3, label=key)
    axes.set(title=title, xlabel=across)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return _embedded(data.getvalue(), title)


def _embedded(image: bytes, text: str) -> str:
    data = base64.b64encode(image).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'
