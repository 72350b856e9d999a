"""The HTML page of a report: a single self-contained file with styles for small and large screens and for print."""

from __future__ import annotations

import html as escaping
import itertools
import platform
import re
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import hgkd_fairseq
from hgkd_fairseq import drawing, files
from hgkd_fairseq.errors import UserError, printable
from hgkd_fairseq.evaluation import segments
from hgkd_fairseq.report import commands, diagram, figures, further
from hgkd_fairseq.report.runs import FILES, Run, read_all
from hgkd_fairseq.report.tables import Report, Table, measure, missing

CSS = """
:root { color-scheme: light dark; --ground: #fff; --text: #16191d; --quiet: #59616b; --line: #d9dde2; --soft: #f5f6f8;
  --run-1: #c04f00; --run-2: #0067a6; --run-3: #00805c; --run-4: #b0568c; --run-5: #a87400; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --text: #e7e9ec; --quiet: #a0a8b2; --line: #343a41;
  --soft: #1d2125; --run-1: #ff8a3d; --run-2: #5db4ee; --run-3: #35c79b; --run-4: #e79cc8; --run-5: #f0b93a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 75ch; }
.quiet, .notes, figcaption span, td span { color: var(--quiet); }
.notes { font-size: .8rem; }
.notes p { max-width: none; margin: .3rem 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .92em; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; background: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0;
  background: var(--ground); }
thead th:first-child { background: var(--soft); }
tbody tr { border-top: 1px solid var(--line); }
td span { display: block; font-size: .78rem; }
td.significant b { font-weight: 700; }
td b { font-weight: 400; }
td:first-child b { font-weight: 600; }
table.settings td, table.settings th { text-align: left; }
table.settings div { width: max-content; max-width: 16rem; white-space: normal; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0; padding: 0; list-style: none;
  font-size: .9rem; }
.swatch { width: 2.6rem; height: .85rem; vertical-align: -.1rem; margin-right: .4rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 26rem; height: auto; }
figcaption { font-size: .875rem; margin-bottom: .25rem; }
svg { fill: currentColor; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--soft); padding: .75rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; margin: .5rem 0; }
@media print { main { max-width: none; padding: 0; } .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""
PACKAGES = ("torch", "fairseq", "sacrebleu", "numpy")  # whose versions are listed, by import name


def report(
    folders: Sequence[str],
    output: str,
    reference: str | None = None,
    translations: str = "",
    segment_scores: Sequence[segments.Named] = (),
) -> str:
    """Write the page of some runs, and return their tables in markdown.

    Args:
        folders: folders of the runs, the first of which the others are compared with.
        output: HTML file to write.
        reference: see :func:`read_all`.
        translations: see :func:`read_all`.
        segment_scores: files with scores of the translations by other metrics, for each metric one file per run, in the
            order of the runs.

    Raises:
        UserError: there are too many runs, matplotlib is missing, a file cannot be used, runs cannot be compared, or
            the page cannot be written.
    """
    check(len(folders))
    runs = read_all([Path(folder) for folder in folders], Path(reference) if reference else None, translations)
    more = further.tables(runs, segment_scores)
    found = measure(runs)
    found.further = more
    files.write_text(output, html(found))
    return found.markdown()


def check(count: int) -> None:
    """Check the requirements of a report before any work.

    Raises:
        UserError: there are more runs than styles, or matplotlib is missing.
    """
    if count > diagram.MOST:
        raise UserError(f"{count} runs are too many for one report; give at most {diagram.MOST}")
    drawing.figure_class()


def html(report: Report) -> str:
    """Return the HTML of the page."""
    runs = report.runs
    sections = [
        heading(runs),
        *(f"<section><h2>{escape(table.title)}</h2>{table_html(table)}</section>" for table in report.tables()),
        reliability(runs),
        curves(runs),
        options(runs),
        how(runs),
    ]
    title = "Report: " + ", ".join(run.name for run in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(value: Any) -> str:
    return escaping.escape(printable(str(value)))


def prose(text: str) -> str:
    """Return the HTML of a note, in which `code` is the only markdown."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def notes(lines: Sequence[str]) -> str:
    return '<div class="notes">' + "".join(f"<p>{prose(line)}</p>" for line in lines) + "</div>" if lines else ""


def heading(runs: Sequence[Run]) -> str:
    """Return the heading: the runs, the size of the test set, and the legend of all figures."""
    count = next((len(run.translations) for run in runs if run.translations is not None), None)
    facts = [f"{len(runs)} runs" if len(runs) > 1 else "1 run"]
    facts += [f"{count:,} test sentences"] if count else []
    facts += [f"compared with {runs[0].name}"] if len(runs) > 1 else []
    lines = [
        f"<h1>{escape(', '.join(run.name for run in runs))}</h1>",
        f'<p class="quiet">{escape(" · ".join(facts))}</p>',
        legend(runs, "top"),
    ]
    return "".join(lines)


def legend(runs: Sequence[Run], place: str) -> str:
    items = (f"<li>{figures.swatch(number, place)}{escape(run.name)}</li>" for number, run in enumerate(runs))
    return f'<ul class="legend">{"".join(items)}</ul>'


def table_html(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = []
    for row in table.rows:
        cells = []
        for cell in row:
            small = "".join(f"<span>{escape(part)}</span>" for part in (cell.interval, cell.p) if part)
            kind = ' class="significant"' if cell.significant else ""
            cells.append(f"<td{kind}><b>{escape(cell.text)}</b>{small}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        f"</div>{notes(table.notes)}"
    )


def reliability(runs: Sequence[Run]) -> str:
    """Return the section of reliability diagrams, one per run for each of teacher-forced and inference."""
    parts = []
    for key, title in (("forced", "Teacher-forced"), ("inference", "Inference: on its own translations")):
        cards = []
        for number, run in enumerate(runs):
            found = getattr(run, key)
            if found is not None:
                error = "no ECE" if found["ece"] is None else f"ECE {100 * found['ece']:.2f} %"  # None: no tokens
                caption = f"<b>{escape(run.name)}</b> <span>{error}, {found['tokens']:,} tokens</span>"
                drawn = figures.reliability(run, found, number, f"{key}-{number}")
                cards.append(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>")
        if cards:
            parts.append(f'<h3>{title}</h3><div class="figures">{"".join(cards)}</div>')
    if not parts:
        return ""
    about = (
        "Accuracy against confidence in bins of equal width, with EOS; 95 % intervals by bootstrap over sentences. "
        f"On the grey line a model is calibrated, below it overconfident. Hollow: fewer than {diagram.FEW} tokens. "
        "The bars say how many tokens each bin holds."
    )
    return f"<section><h2>Reliability</h2><p>{about}</p>{''.join(parts)}</section>"


def curves(runs: Sequence[Run]) -> str:
    cards = []
    for key, title in figures.CURVES.items():
        drawn = figures.curve(runs, key)
        if drawn:
            cards.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
    lacking = missing(runs, ("train.log",))
    if not cards and not lacking:
        return ""
    figures_html = f'<div class="figures">{"".join(cards)}</div>'
    about = "<h2>Training</h2><p>From fairseq's own logs.</p>" + legend(runs, "curves")
    return f"<section>{about}{figures_html}{notes(lacking)}</section>"


def options(runs: Sequence[Run]) -> str:
    """Return the section of training options in which the runs differ, from the settings in their logs."""
    logged = [run for run in runs if run.log.settings]
    given = [commands.arguments_of("fairseq-train", run.log.settings) or {} for run in logged]
    rows = []
    for option in dict.fromkeys(itertools.chain(*given)):
        name = option.removeprefix("--").replace("-", "_")
        values = [run.log.settings.get(name) for run in logged]
        if option != "--save-dir" and any(value != values[0] for value in values):
            texts = ("" if value is None else escape(commands.written(value)) for value in values)
            cells = "".join(f"<td><div>{text}</div></td>" for text in texts)
            rows.append(f"<tr><td><code>{escape(option)}</code></td>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in logged)
    return (
        "<section><h2>Options of training that differ</h2>"
        '<div class="scroll" tabindex="0"><table class="settings"><thead><tr><th scope="col">option</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{notes(['Empty: not given, or no option there.'])}</section>"
    )


def how(runs: Sequence[Run]) -> str:
    """Return the sections of the commands of each run and of the versions of packages."""
    blocks = []
    for run in runs:
        lines = list(filter(None, dict.fromkeys(commands_of(run))))  # one command may have written several files
        if lines:
            text = "\n\n".join(map(escape, lines))
            blocks.append(f"<details><summary>{escape(run.name)}</summary><pre>{text}</pre></details>")
    about = (
        "Commands of fairseq with the options that are not at their defaults, out of the settings in its logs; "
        "commands of hgkd as they were typed."
    )
    return (
        f"<section><h2>Commands</h2><p>{about}</p>{''.join(blocks)}<h2>Versions</h2>"
        f"<p>{escape(', '.join(versions()))}, where this page was made.</p></section>"
    )


def commands_of(run: Run) -> list[str]:
    lines = []
    for program, log in (("fairseq-train", run.log), ("fairseq-generate", run.generation)):
        settings = dict(log.settings)
        if str(settings.get("results_path")).endswith(".partial"):  # temporary folder of an unfinished hgkd score
            del settings["results_path"]
        if settings:
            made = commands.command(program, settings)
            lines.append(made or f"# {program}, with options unknown here: {settings}")
    for file in FILES:
        found = getattr(run, file.removesuffix(".json"), None) if file.endswith(".json") else None
        lines.append((found or {}).get("command", ""))
    return lines


def versions() -> list[str]:
    found = [f"Python {platform.python_version()}", f"hgkd_fairseq {hgkd_fairseq.__version__}"]
    for package in PACKAGES:
        for name in dict.fromkeys(packages_distributions().get(package, [])):
            found.append(f"{name} {version(name)}")
    return found
