"""Writes the measured table of the README from its CSV, the newest row of each setting.

python -m benchmarks.readme
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

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
    last = rows[-1]
    where = f"{last['device']}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}"
    return "\n".join([*lines, "", f"Measured on {where}."])


def with_tables(readme: str) -> str:
    """Return the README with its tables made anew."""
    with (ROOT / "benchmarks/results/loss_cpu.csv").open(newline="") as file:
        table = loss_table(list(csv.DictReader(file)))
    return re.sub(
        r"(<!-- table: loss_cpu -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{table}\n\n{m[2]}",
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
