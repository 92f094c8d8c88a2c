"""Writes the measured tables of the README from the committed results, the newest row of each setting.

python -m benchmarks.readme
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.segmentation.rows import read
from benchmarks.segmentation.table import tables

ROOT = Path(__file__).parent.parent
LAYOUTS = {"channels_first": "channels first", "channels_last": "channels last"}


def loss_table(rows: list[dict[str, str]]) -> str:
    """Return the table of forward + backward times as Markdown, with the machine and the commit."""
    newest = {(r["b"], r["layout"], r["provider"]): r for r in rows if r["pass"] == "forward+backward"}
    lines = ["| B | layout | textbook | renyi_kd | speed-up | peak memory |", "|---|---|---|---|---|---|"]
    for (batch, layout, provider), row in newest.items():
        if provider != "textbook":
            textbook = newest[batch, layout, "textbook"]
            times = (
                f"{float(textbook['ms_p50']):.0f} ms | {float(row['ms_p50']):.1f} ms | {float(row['speed_up']):.1f} x"
            )
            memory = f"{float(row['peak_mib']):.0f} of {float(textbook['peak_mib']):.0f} MiB"
            lines.append(f"| {batch} | {LAYOUTS[layout]} | {times} | {memory} |")
    return "\n".join([*lines, "", f"Measured on {where(newest.values())}."])


def kernels_table(rows: list[dict[str, str]]) -> str:
    """Return the table of every operation's forward + backward by implementation as Markdown."""
    newest = {(label(r), r["provider"]): r for r in rows if r["pass"] == "forward+backward"}
    named = {provider for _, provider in newest}
    providers = [name for name in ("textbook", "textbook compiled", "reference", "triton", "keops") if name in named]
    lines = [f"| operation | {' | '.join(providers)} | peak memory |", "|---" * (len(providers) + 2) + "|"]
    for setting in dict.fromkeys(setting for setting, _ in newest):
        of_setting = {provider: row for (other, provider), row in newest.items() if other == setting}
        times = [f"{float(of_setting[p]['ms_p50']):.1f} ms" if p in of_setting else "" for p in providers]
        own, textbook = (float(of_setting[p]["peak_mib"]) for p in ("reference", "textbook"))
        lines.append(f"| {setting} | {' | '.join(times)} | {own:.0f} of {textbook:.0f} MiB |")
    return "\n".join([*lines, "", f"Measured on {where(newest.values())}."])


def teachers_table(rows: list[dict[str, str]]) -> str:
    """Return the table of what InfoSAM takes beside a step, by teacher, as Markdown."""
    newest = {row["teacher"]: row for row in rows}
    bare = float(newest["none"]["s_p50"])
    lines = ["| teacher | the step without | the step with | InfoSAM by itself | of the step |", "|---" * 5 + "|"]
    for name, row in newest.items():
        if name != "none":
            own = float(row["infosam_s"])
            steps = f"{bare:.1f} s | {float(row['s_p50']):.1f} s"
            lines.append(f"| {name} | {steps} | {own:.3f} s | {100 * own / bare:.1f} % |")
    last = rows[-1]
    setting = f"B {last['b']}, {last['image_size']} pixels, bf16 autocast, trials: {last['trials']}"
    return "\n".join([*lines, "", f"{setting}. Measured on {where(newest.values())}."])


def where(rows: Iterable[dict[str, str]]) -> str:
    """Return on what the rows were measured, and at which commits."""
    rows = list(rows)
    devices = dict.fromkeys(f"{r['device']}, {r['threads']} threads, torch {r['torch']}" for r in rows)
    return f"{' and '.join(devices)}, commit {' and '.join(dict.fromkeys(r['commit'] for r in rows))}"


def label(row: dict[str, str]) -> str:
    if row["op"] == "gram_moment":
        return f"{row['op']}, {row['variables']} variables, n {row['n']}"
    return f"{row['op']}, B {row['b']}, {LAYOUTS[row['layout']]}"


def families_table(rows: list[dict[str, str]]) -> str:
    """Return the table of what was asserted of every SAM family as Markdown."""
    columns = {
        "family": "family",
        "image_features": "image features",
        "mask_tokens": "mask tokens",
        "gradients": "gradients",
        "prompts": "several prompts",
        "compile": "compile",
        "run_with": "run with",
    }
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row[name] for name in columns)} |" for row in rows]
    return "\n".join([*lines, "", f"Run with torch {' and '.join(dict.fromkeys(row['torch'] for row in rows))}."])


def segmentation_tables() -> str:
    """Return means and differences of all committed runs of the comparison as Markdown."""
    parts = []
    for title, table in tables(read(ROOT / "benchmarks/results/segmentation")):
        parts += [title, table.means(), "Differences in IoU, percent points:", table.differences("iou")]
    return "\n\n".join(parts)


TABLES = {
    "loss_cpu": loss_table,
    "kernels_cpu": kernels_table,
    "teachers_cpu": teachers_table,
    "families": families_table,
}


def with_tables(readme: str) -> str:
    """Return the README with its tables made anew."""
    for name, table in TABLES.items():
        with (ROOT / f"benchmarks/results/{name}.csv").open(newline="") as file:
            readme = _with_table(readme, name, table(list(csv.DictReader(file))))
    return _with_table(readme, "segmentation", segmentation_tables())


def _with_table(readme: str, name: str, text: str) -> str:
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
