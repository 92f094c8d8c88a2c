"""Writes the measured tables of the documents from the committed results, the newest row of each setting.

python -m benchmarks.readme
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import pandas

from benchmarks.files import whole_file
from benchmarks.kernels import LAYOUTS, PROVIDERS, setting
from benchmarks.many_samples import newest, pair_model
from benchmarks.markdown import markdown
from benchmarks.measure import read_rows
from benchmarks.processes import BEYOND, Batch, Exchange, total, traffic
from benchmarks.segmentation.rows import Row, read
from benchmarks.segmentation.shares import shares_table as shares
from benchmarks.segmentation.table import tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def loss_table(rows: pandas.DataFrame) -> str:
    """Return the table of forward + backward times as Markdown, with the machine."""
    newest = newest_rows(rows, ["b", "layout", "provider"])
    own, textbook = (newest.xs(name, level="provider") for name in ("reference", "textbook"))
    table = pandas.DataFrame(
        {
            "textbook": textbook["ms_p50"].map("{:.0f} ms".format),
            "renyi_kd": own["ms_p50"].map("{:.1f} ms".format),
            "speed-up": own["speed_up"].map("{:.1f} x".format),
            "peak memory": memory(own, textbook),
        }
    )
    table = table.rename(LAYOUTS, level="layout").rename_axis(["B", "layout"])
    return f"{markdown(table)}\n\nMeasured on {where(newest)}."


def kernels_table(rows: pandas.DataFrame) -> str:
    """Return the table of every operation's forward + backward by implementation as Markdown."""
    newest = newest_rows(rows.assign(operation=rows.apply(setting, axis=1)), ["operation", "provider"])
    times = newest["ms_p50"].map("{:.1f} ms".format).unstack("provider", fill_value="", sort=False)
    own, textbook = (newest.xs(name, level="provider") for name in ("reference", "textbook"))
    table = times[[name for name in PROVIDERS if name in times]].assign(**{"peak memory": memory(own, textbook)})
    return f"{markdown(table)}\n\nMeasured on {where(newest)}."


def teachers_table(rows: pandas.DataFrame) -> str:
    """Return the table of what InfoSAM takes beside a step, by teacher, as Markdown."""
    newest = rows.groupby("teacher", sort=False).last(skipna=False).astype({"s_p50": float, "infosam_s": float})
    bare = newest["s_p50"]["none"]
    own = newest.drop("none")
    table = pandas.DataFrame(
        {
            "the step without": f"{bare:.1f} s",
            "the step with": own["s_p50"].map("{:.1f} s".format),
            "InfoSAM by itself": own["infosam_s"].map("{:.3f} s".format),
            "of the step": (100 * own["infosam_s"] / bare).map("{:.1f} %".format),
        }
    )
    last = rows.iloc[-1]
    run = f"B {last['b']}, {last['image_size']} pixels, bf16 autocast, trials: {last['trials']}"
    return f"{markdown(table)}\n\n{run}. Measured on {where(newest)}."


def families_table(rows: pandas.DataFrame) -> str:
    """Return the table of what was asserted of every SAM family as Markdown."""
    table = rows.drop(columns="torch").set_index("family").rename(columns={"prompts": "several prompts"})
    return f"{markdown(table.rename(columns=spelled))}\n\nRun with torch {' and '.join(rows['torch'].unique())}."


def forms_table(rows: pandas.DataFrame) -> str:
    """Return the table of what each form costs as Markdown."""
    newest = rows.groupby(["b", "layout", "form"], sort=False).last()
    cells = newest["ms_p50"].astype(float).map("{:.1f} ms".format) + newest["ratio"].astype(float).map(
        ", {:.2f}".format
    )
    table = cells.unstack("form", sort=False).rename(LAYOUTS, level="layout").rename_axis(["B", "layout"])
    return f"{markdown(table)}\n\nMedian time, and the median of its ratios. Measured on {where(newest)}."


def busy_table(rows: pandas.DataFrame) -> str:
    """Return the table of times on a quiet and on a busy CPU as Markdown."""
    state = rows["busy"].map(lambda n: "quiet" if n == "0" else "busy")
    newest = rows.assign(state=state).groupby(["b", "layout", "provider", "state"], sort=False).last(skipna=False)
    times = newest["ms_p50"].astype(float).unstack(["provider", "state"], sort=False)
    table = pandas.DataFrame(
        {
            f"{name}, {state}": times[provider, state].map("{:.0f} ms".format)
            for provider, name in (("textbook", "textbook"), ("reference", "renyi_kd"))
            for state in ("quiet", "busy")
        }
    )
    table["renyi_kd, busy / quiet"] = (times["reference", "busy"] / times["reference", "quiet"]).map("{:.1f}".format)
    table = table.rename(LAYOUTS, level="layout").rename_axis(["B", "layout"])
    return f"{markdown(table)}\n\nMeasured on {where(newest)}."


def shares_table(rows: pandas.DataFrame) -> str:
    """Return the table of the share of InfoSAM in the gradient as Markdown."""
    return f"{markdown(shares(rows))}\n\n120 steps of each. Measured on {where(rows)}."


def accumulation_table(rows: pandas.DataFrame) -> str:
    """Return the table of what a batch costs in micro-batches as Markdown."""
    newest = rows.groupby(["micro_batches", "way"], sort=False).last()
    times, memory_of = (newest[name].astype(float) for name in ("ratio", "peak_mib"))
    table = (times.map("{:.2f}, ".format) + memory_of.map("{:.0f} MiB".format)).unstack("way", sort=False)
    return f"{markdown(table.rename_axis(['micro-batches']))}\n\nMeasured on {where(newest)}."


def host_table(rows: pandas.DataFrame) -> str:
    """Return the table of what a step costs the host as Markdown: ratios, as only these of one run mean something."""
    newest = rows.groupby(["b", "provider"], sort=False).last()
    columns = {"of_textbook": "of the textbook's", "of_textbook_compiled": "of the compiled textbook's"}
    table = newest[list(columns)].astype(float).map("{:.2f}".format).rename(columns=columns)
    return f"{markdown(table.rename_axis(['B', 'host time of']))}\n\nMeasured on {where(newest)}."


def instructions_table(rows: pandas.DataFrame) -> str:
    """Return the table of what bounds the kernels that read a map, before their revision and now, as Markdown."""
    counted = rows[rows["layout"] == "channels first"].astype({"issue_us": float, "bytes_us": float})
    newest = counted.groupby(["task", "dtype", "b", "label"], sort=False).last()
    before, now = (newest.xs(label, level="label") for label in ("before", "now"))
    cells = now["issue_us"].map("{:.1f}".format) + " / " + now["bytes_us"].map("{:.1f}".format)
    was = before["issue_us"].map("{:.1f}, now ".format).reindex(cells.index, fill_value="")
    table = (was + cells).unstack("b", fill_value="", sort=False).rename_axis(["kernel", "dtype"]).add_prefix("B ")
    return f"{markdown(table)}\n\nCounted with Triton {' and '.join(rows['triton'].unique())} for sm_90."


def many_samples_table(rows: pandas.DataFrame) -> str:
    """Return the table of what entropies of many samples cost each of some processes as Markdown, with the model."""
    measured, forward = newest(rows), newest(rows, "forward")
    usual = measured.index.get_level_values("d").value_counts().idxmax()
    both = measured.xs(usual, level="d")
    table = pandas.DataFrame(
        {
            "forward": forward.xs(usual, level="d")["cpu_s"].map("{:.3g} s".format),
            "forward + backward": both["cpu_s"].map("{:.3g} s".format),
            "a pair": both["ns_a_pair"].map("{:.1f} ns".format),
            "memory": both["peak_mib"].map("{:.0f} MiB".format),
            "received": both["received_mib"].map("{:.1f} MiB".format),
        }
    )
    table = table.rename("{:,}".format, level="n").rename(str, level="processes").rename_axis(["samples", "processes"])
    fixed, of_feature = pair_model(measured)
    said = f"d = {usual}, fp32, linear kernel. Forward + backward takes {fixed:.1f} + {of_feature:.3f} d ns a pair."
    return f"{markdown(table)}\n\n{said} Measured on {where(measured)}."


def processes_table(rows: pandas.DataFrame) -> str:
    """Return the table of what a process receives in a step as Markdown: counted, and of more processes by formula."""
    newest = rows.groupby(["processes", "exchange"], sort=False).last()
    sizes, ran = newest.iloc[-1], newest.index.unique("processes")
    lines = []
    for n in (*ran, *(str(more) for more in BEYOND if str(more) not in ran)):
        images = (int(sizes["b"]),) * int(n)
        batch = Batch(images, images, int(sizes["d"]), int(sizes["h"]) * int(sizes["w"]))
        parts = {exchange: traffic(batch, 0, exchange) for exchange in get_args(Exchange)}
        line = {"processes": n}
        for exchange, of_exchange in parts.items():
            counted = newest["received_bytes"].get((n, exchange))
            line[exchange] = mib(total(of_exchange).received if counted is None else int(counted))
        maps, gram, scores, tokens = parts["channels"].values()
        line |= {"of these maps": mib(maps.received), "scores and tokens": mib(scores.received + tokens.received)}
        line["Gram matrix"] = mib(gram.received)
        for exchange in parts:
            ratio = newest["time_ratio"].get((n, exchange))
            line[f"time, {exchange}"] = "" if ratio is None else f"{float(ratio):.1f}"
        lines.append(line)
    size = f"{sizes['b']} images a process, maps of {sizes['d']} x {sizes['h']} x {sizes['w']} in fp32."
    table = pandas.DataFrame(lines).set_index("processes")
    return f"{markdown(table)}\n\n{size} Measured on {where(newest)}, for each process."


def mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f}"


def newest_rows(rows: pandas.DataFrame, columns: list[str]) -> pandas.DataFrame:
    """Return the last forward + backward of every setting, in the order in which the settings were first measured."""
    whole = rows[rows["pass"] == "forward+backward"].astype({"ms_p50": float, "speed_up": float, "peak_mib": float})
    return whole.groupby(columns, sort=False).last(skipna=False)


def memory(own: pandas.DataFrame, textbook: pandas.DataFrame) -> pandas.Series:
    """Return the peak memory beside that of the textbook form."""
    return own["peak_mib"].map("{:.0f} of ".format) + textbook["peak_mib"].map("{:.0f} MiB".format)


def where(rows: pandas.DataFrame) -> str:
    """Return on what the rows were measured; their commits stay in the rows."""
    devices = rows["device"] + ", " + rows["threads"] + " threads, torch " + rows["torch"]
    return " and ".join(devices.unique())


def spelled(column: str) -> str:
    return column.replace("_", " ")


def segmentation_tables(rows: Sequence[Row]) -> str:
    """Return means and differences of all runs of the comparison as Markdown."""
    parts = []
    for title, table in tables(rows):
        # Means and differences are of many runs, whose rows have the commits.
        heading = re.sub(r", commit [\w, ]+\.$", ".", title)
        parts += [heading, table.means(), "Differences in IoU, percent points:", table.differences("iou")]
    return "\n\n".join(parts)


# What is made of what, by document: a table by its name, which is that of its rows.
DOCUMENTS: dict[str, dict[str, Callable[..., str]]] = {
    "docs/entropies.md": {"many_samples": many_samples_table},
    "docs/forms.md": {"shares": shares_table, "forms_cpu": forms_table},
    "docs/models.md": {"families": families_table},
    "docs/training_loops.md": {"accumulation_cpu": accumulation_table},
    "docs/speed.md": {
        "loss_cpu": loss_table,
        "busy_cpu": busy_table,
        "kernels_cpu": kernels_table,
        "teachers_cpu": teachers_table,
        "host_time": host_table,
        "instructions": instructions_table,
        "processes": processes_table,
    },
    "docs/does_it_help.md": {"segmentation": segmentation_tables},
}


def with_tables(name: str, text: str) -> str:
    """Return a document with its tables made anew.

    Raises:
        ValueError: the document has not one place for each of its tables.

    """
    for table, make in DOCUMENTS[name].items():
        rows, file = RESULTS / table, RESULTS / f"{table}.csv"
        made = "Not measured yet."
        if rows.is_dir() or file.is_file():
            made = make(read(rows) if rows.is_dir() else read_rows(file))
        pattern = rf"(<!-- table: {table} -->\n).*?(<!-- end -->)"
        text, places = re.subn(pattern, lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(
                f"readme: {name} must have one place for {table}, got {places}; put the lines "
                f"'<!-- table: {table} -->' and '<!-- end -->' where it belongs"
            )
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        path = ROOT / document
        text = with_tables(document, path.read_text())
        with whole_file(path) as temporary:
            temporary.write_text(text)
