"""Reports: the comparison of several training methods as tables, figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlocal.compare.columns import Column, columns, format_bytes, format_count
from torchlocal.compare.figures import draw_figures, figure_texts
from torchlocal.compare.results import Comparison, Row
from torchlocal.compare.verdict import verdict
from torchlocal.run.checkpoint import write_file

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["format_bytes", "format_count", "markdown_table", "new_table", "terminal_table", "write_report"]

# --- tables ---


def new_table(title: str, caption: str | None = None) -> Table:
    """An empty rich table in the style of all."""
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )


def terminal_table(comparison: Comparison) -> Table:
    """The comparison as a rich table."""
    table, shown = new_table(comparison.title), [one for one in _columns(comparison) if one.narrow]
    for one in shown:
        # Names stay whole when the terminal is narrow; the other headers may wrap.
        table.add_column(
            one.header, justify="right" if one.right else "left", no_wrap=one.key == "method", overflow="fold"
        )
    for row in comparison.rows():
        table.add_row(*(one.cell(row) for one in shown))
    return table


def markdown_table(comparison: Comparison) -> str:
    """The comparison as a Markdown table."""
    shown = _columns(comparison)
    lines = [
        "| " + " | ".join(_numbered_headers(shown)) + " |",
        "|" + "|".join("---:" if one.right else "---" for one in shown) + "|",
    ]
    for row in comparison.rows():
        lines.append("| " + " | ".join(one.cell(row).replace("|", "\\|") for one in shown) + " |")
    return "\n".join(lines) + "\n"


def _columns(comparison: Comparison) -> list[Column]:
    return columns(comparison.measure, comparison.reach)


def _numbered_headers(shown: Sequence[Column]) -> list[str]:
    """Notes tell of columns by their numbers."""
    return [f"{number} {one.header}" for number, one in enumerate(shown, start=1)]


def csv_table(comparison: Comparison) -> str:
    """The comparison as CSV with unrounded numbers; a cell is empty where there is nothing to state."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    rows = [_values(comparison, row) for row in comparison.rows()]
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(["" if value is None else value for value in row.values()])
    return buffer.getvalue()


def _values(comparison: Comparison, row: Row) -> dict[str, Any]:
    """A row by the columns of the CSV, which are named after what is judged."""
    measure, values = comparison.measure, dict[str, Any]()
    for name, value in vars(row).items():
        if name in ("mean", "std"):
            values[f"{measure.name}_{name}"] = value
        elif name == "further":
            values |= {one.name: each for one, each in zip(measure.further, value, strict=True)}
        elif name != "reach_seconds" or comparison.reach is not None:
            values[name] = value
    return values


def markdown_report(comparison: Comparison, figures: Sequence[str]) -> str:
    """The whole report as Markdown; `figures` are paths relative to it."""
    parts = [f"# {comparison.title}", "", *(f"**{sentence}**\n" for sentence in verdict(comparison))]
    parts += [markdown_table(comparison), *(f"- {note}" for note in comparison.notes()), ""]
    texts = figure_texts(comparison.measure)
    parts += [f"![{texts[Path(figure).stem].caption}]({figure})\n" for figure in figures]
    parts += ["## What was run", "", *(f"- {name}: {value}" for name, value in comparison.facts), ""]
    parts += [comparison_command_text(comparison), "", "```yaml", comparison.configuration.strip(), "```", ""]
    return "\n".join(parts)


def comparison_command_text(comparison: Comparison) -> str:
    """One sentence on how to repeat the comparison."""
    return f"To repeat it, run `{comparison.command}`. What differs there from the defaults:"


# --- HTML ---

_STYLE_SHEET = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.verdict { font-size: 1.1rem; border-left: .3rem solid #0072B2; padding-left: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #1a1a1a; white-space: normal; vertical-align: bottom; }
thead small { display: block; font-weight: normal; color: #444; }
.right { text-align: right; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 1rem 2rem; }
figure { margin: .5rem 0; } figure img { width: 100%; max-width: 36rem; height: auto; }
figcaption, .notes { color: #444; font-size: .95rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9rem; background: #f4f4f4; }
pre { padding: .8rem; overflow-x: auto; } code { padding: .1rem .25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { color: #444; } dd { margin: 0; }
/* Where the columns do not fit side by side, each row is a list of its own, named by its headers. */
@media (max-width: 60rem) {
  table, tbody, tr, td, tbody th { display: block; } thead { display: none; }
  tbody th { font-size: 1.1rem; border-bottom: 2px solid #1a1a1a; padding: 1rem 0 .2rem; }
  td, td.right { display: flex; justify-content: space-between; gap: 1rem; text-align: right; padding: .2rem 0;
    white-space: normal; }
  td::before { content: attr(data-label); color: #444; text-align: left; }
  dl { display: block; } dd { margin-bottom: .5rem; } .notes { padding-left: 1.2rem; }
}
"""


def html_report(comparison: Comparison, images: dict[str, bytes]) -> str:
    """The whole report as one HTML page that needs no network.

    Args:
        comparison: What to report.
        images: The figures by name as SVG, embedded as data so that their identifiers cannot clash.
    """
    escape = html.escape
    shown, texts = _columns(comparison), figure_texts(comparison.measure)
    sides = ["right" if one.right else "left" for one in shown]
    head = "".join(
        f'<th scope="col" class="{side}"><small>{number}</small>{escape(one.header)}</th>'
        for number, (one, side) in enumerate(zip(shown, sides, strict=True), start=1)
    )
    labels = [escape(header) for header in _numbered_headers(shown)]
    body = []
    for row in comparison.rows():
        cells = [escape(one.cell(row)) for one in shown]
        body.append(
            f'<tr><th scope="row">{cells[0]}</th>'
            + "".join(
                f'<td class="{side}" data-label="{label}">{text}</td>'
                for text, side, label in zip(cells[1:], sides[1:], labels[1:], strict=True)
            )
            + "</tr>"
        )
    figures = []
    for name, image in images.items():
        caption = escape(texts[name].caption)
        data = base64.b64encode(image).decode("ascii")
        figures.append(
            f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}"><figcaption>{caption}</figcaption>'
            "</figure>"
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes())
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in comparison.facts)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(comparison.title)}</title><style>{_STYLE_SHEET}</style></head><body>",
        f"<h1>{escape(comparison.title)}</h1>",
        *(f'<p class="verdict">{escape(sentence)}</p>' for sentence in verdict(comparison)),
        f"<table><thead><tr>{head}</tr></thead><tbody>",
        *body,
        "</tbody></table>",
        f'<ul class="notes">{notes}</ul>',
        '<div class="figures">',
        *figures,
        "</div>",
        f"<h2>What was run</h2><dl>{facts}</dl>",
        f"<p>To repeat it, run <code>{escape(comparison.command)}</code>. What differs there from the defaults:</p>",
        f"<pre>{escape(comparison.configuration.strip())}</pre>",
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


# --- writing ---


def write_report(comparison: Comparison, folder: str | Path) -> Path:
    """Write `report.md`, `report.csv`, `report.html` and the figures (`figures/*.png`) of a comparison.

    Args:
        comparison: What to report; at least one result.
        folder: Where to write; made if absent.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: a file could not be written; one written before is untouched.
    """
    import matplotlib

    folder = Path(folder)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder / 'figures'} cannot be made a folder: {error.strerror}; see what is there, or choose another"
        ) from error
    images: dict[str, bytes] = {}
    # A fixed salt and no date: the same numbers give the same file.
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": "torchlocal", "svg.fonttype": "path"}):
        for name, figure in draw_figures(comparison).items():
            svg, png = io.BytesIO(), io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            figure.savefig(png, format="png", dpi=150)
            images[name] = svg.getvalue()
            write_file(folder / "figures" / f"{name}.png", png.getvalue())
    write_file(folder / "report.csv", csv_table(comparison))
    write_file(folder / "report.md", markdown_report(comparison, [f"figures/{name}.png" for name in images]))
    write_file(folder / "report.html", html_report(comparison, images))
    return folder / "report.html"
