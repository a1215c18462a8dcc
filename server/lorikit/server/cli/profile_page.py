# SPDX-License-Identifier: Apache-2.0
"""The page of a profile: the picture and the table, in one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lorikit.server.cli.display import megabytes
from lorikit.server.cli.profile_picture import legend, svg
from lorikit.server.cli.profile_plans import ClassPlan, Misfit

_STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #16202c; --soft: #5a6675; --rule: #e3e7ec; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f141a; --card: #171e27; --ink: #e8edf3; --soft: #98a5b5; --rule: #2a343f; }
}
body { margin: 0 auto; padding: 2rem 1rem; max-width: 1000px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 1rem 1.25rem; margin: 1rem 0; overflow-x: auto; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .measured { fill: var(--ink); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--rule); }
th, .soft { color: var(--soft); font-weight: 500; }
.key { margin-right: 1rem; white-space: nowrap; color: var(--soft); font-size: 13px; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
"""

_COLUMNS = (
    "class", "budget", "base", "rank", "layers", "recomputed", "micro-batch", "predicted",
    "measured", "s/step", "down once", "down, up a round", "bound by",
)  # fmt: skip


def page(title: str, entries: Sequence[ClassPlan | Misfit]) -> str:
    """The page as text.

    Args:
        title: What was planned, for example model, batch and length.
        entries: The classes, in the order in which they are shown.
    """
    misfits = [entry for entry in entries if isinstance(entry, Misfit)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>"
        '<p class="soft">Predicted peak memory of the whole device process by part; a dot is the '
        "peak the operating system measured in a process held to the limit.</p>"
        f"<section>{svg(entries)}<p>{legend()}</p></section>"
        f"<section><table><tr>{''.join(f'<th>{name}</th>' for name in _COLUMNS)}</tr>"
        f"{''.join(_row(entry) for entry in entries)}</table></section>"
        + "".join(_misfit(entry) for entry in misfits)
        + f"<section><h2>Sources</h2>{''.join(_source(entry) for entry in entries)}</section>"
        "</html>\n"
    )


def _row(entry: ClassPlan | Misfit) -> str:
    name, limit = entry.device_class.name, megabytes(entry.device_class.memory_limit_bytes)
    if isinstance(entry, Misfit):
        cells = [name, limit, "does not fit", *[""] * (len(_COLUMNS) - 3)]
    else:
        choice, measured = entry.choice, entry.measured
        cells = [
            name,
            limit,
            choice.precision + (", fast" if choice.kernels == "fast" else ""),
            str(entry.rank),
            f"{len(entry.trained_layers)} of {len(entry.kept_layers)}",
            str(len(choice.recomputed_layers)),
            str(choice.micro_batch),
            megabytes(choice.predicted_peak_memory_bytes),
            megabytes(measured.peak_bytes) if measured else "-",
            f"{choice.seconds_per_step:.2g}",
            megabytes(entry.base_bytes),
            f"{megabytes(entry.bytes_down)}, {megabytes(entry.bytes_up)}",
            choice.bound or "nothing",
        ]
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _misfit(entry: Misfit) -> str:
    name = escape(entry.device_class.name)
    return f"<section><b>{name}</b>: {escape(entry.reason)} <b>{escape(entry.remedy)}</b></section>"


def _source(entry: ClassPlan | Misfit) -> str:
    device_class = entry.device_class
    return f"<p><b>{escape(device_class.name)}</b> {escape(device_class.source)}</p>"
