"""The HTML of a report: one file, nothing fetched, light and dark by the reader's own setting."""

import base64
import html
import re
from collections.abc import Mapping, Sequence

from jepa_jax.report.sections import Cell, Chart, Note, Report, Section, Table
from jepa_jax.report.theme import DARK, LIGHT, Theme

# SVGs of a chart by its name: (light, dark).
Drawn = Mapping[str, tuple[bytes, bytes]]


def _variables(theme: Theme) -> str:
    names = ("background", "surface", "text", "muted", "accent", "good", "bad", "rule")
    return "".join(f"--{name}:{getattr(theme, name)};" for name in names)


_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--background);color:var(--text);
font:15px/1.55 system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,"DejaVu Sans",sans-serif;
font-variant-numeric:tabular-nums}
main,header,footer{max-width:1100px;margin:0 auto;padding:0 32px}
header{padding-top:56px}
.kicker{color:var(--muted);font-size:13px;letter-spacing:.04em;margin:0}
h1{font-size:34px;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:4px 0 6px;
overflow-wrap:anywhere}
.facts{color:var(--muted);margin:0}
.facts span+span::before{content:"·";margin:0 .55em}
.top{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:24px 56px;
align-items:center;margin-top:36px}
.value{font-size:68px;line-height:1;font-weight:650;letter-spacing:-.03em;margin:0;
white-space:nowrap}
.value small{font-size:26px;font-weight:500;color:var(--muted);letter-spacing:0;margin-left:.25em}
.what{margin:12px 0 0}
.verdict{margin:2px 0 0;color:var(--muted)}
.chips{display:flex;flex-wrap:wrap;gap:8px;list-style:none;margin:28px 0 0;padding:0}
.chips li{background:var(--surface);border-radius:999px;padding:3px 13px;font-size:13px}
.good{color:var(--good)}.bad{color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:4px 24px;margin-top:40px;padding:12px 0;
border-top:1px solid var(--rule);border-bottom:1px solid var(--rule);font-size:14px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{padding-top:52px}
h2{font-size:22px;line-height:1.3;font-weight:650;letter-spacing:-.01em;margin:0 0 20px}
h3{font-size:15px;font-weight:600;margin:0 0 8px}
.grid{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:44px 56px;
align-items:start}
.grid>*{grid-column:1/-1}.grid>.half{grid-column:auto}
figure{margin:0}
figure img{display:block;width:100%;height:auto}
.half img{max-width:560px}
.wide{display:grid;grid-template-columns:minmax(0,820px) minmax(0,1fr);column-gap:36px}
.wide h3{grid-column:1/-1}.wide figcaption{margin-top:0}
figcaption{color:var(--muted);font-size:13px;line-height:1.5;margin-top:8px;max-width:68ch}
.note{margin:0;max-width:78ch}
.missing{margin:0;color:var(--muted);border-left:3px solid var(--rule);padding-left:14px;
overflow-wrap:anywhere}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
background:var(--surface);color:var(--text);border-radius:4px;padding:2px 6px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;line-height:1.4}
.figures table{width:100%}
th,td{padding:8px 0 8px 26px;text-align:right;vertical-align:top;
border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:9em}
.text tbody th{min-width:0}
td small,th small{display:block;color:var(--muted);font-size:12px;white-space:normal}
td{white-space:nowrap}
.columns{columns:3;column-gap:56px}
.columns>*{break-inside:avoid;margin:0 0 32px}
.columns>p{column-span:all;margin-bottom:28px}
.columns table{width:100%;font-size:13px;table-layout:auto}
.text th,.text td{padding-top:4px;padding-bottom:4px}
.text td{text-align:right;white-space:normal;overflow-wrap:anywhere;padding-left:16px}
.columns th{white-space:nowrap}
.grid .text th{overflow-wrap:anywhere;min-width:5em}
.differs{color:var(--accent);font-weight:600}
.differs small{font-weight:400}
footer{color:var(--muted);font-size:13px;padding-top:56px;padding-bottom:64px}
@media (max-width:1000px){
th,td{padding-left:15px}.figures tbody th{min-width:7em}
.wide{display:block}.wide img{max-width:820px}.wide figcaption{margin-top:8px}
.top,.grid{grid-template-columns:minmax(0,1fr)}.columns{columns:2}}
@media (max-width:560px){
main,header,footer{padding-left:18px;padding-right:18px}.columns{columns:1}.value{font-size:54px}}
"""


def text(value: object) -> str:
    """Text of a file as HTML shows it: escaped, and what cannot be printed as a question mark."""
    letters = (c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else "?" for c in str(value))
    return html.escape("".join(letters))


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _figure(chart: Chart, drawn: Drawn) -> str:
    light, dark = drawn[chart.name]
    remark = f"<figcaption>{text(chart.remark)}</figcaption>" if chart.remark else ""
    return (
        f'<figure id="figure-{chart.name}" class="{"wide" if chart.is_wide else "half"}">'
        f"<h3>{text(chart.title)}</h3><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{text(chart.alt)}"></picture>{remark}</figure>'
    )


def _name(value: str) -> str:
    """A heading that may break after its commas: folders are named after many overrides."""
    return re.sub(r",(?=\w)", ",<wbr>", text(value))


def _cell(cell: Cell | str) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    note = f"<small>{text(cell.note)}</small>" if cell.note else ""
    if cell.kind == "key":
        return f'<th scope="row">{_name(cell.text)}{note}</th>'
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f"<td{kind}>{text(cell.text)}{note}</td>"


def _table(table: Table) -> str:
    title = f"<h3>{text(table.title)}</h3>" if table.title else ""
    head = "".join(f'<th scope="col">{_name(name)}</th>' for name in table.head)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    kind = "text" if table.is_text else "figures"
    return (
        f'<div class="{kind}">{title}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table>'
        "</div></div>"
    )


def _note(note: Note) -> str:
    command = f"<code>{text(note.command)}</code> {text(note.after)}." if note.command else ""
    kind = "missing" if note.is_missing else "note"
    return f'<p class="{kind}">{text(note.text)}{command}</p>'


def _section(section: Section, drawn: Drawn) -> str:
    shown = [
        _figure(item, drawn)
        if isinstance(item, Chart)
        else _table(item)
        if isinstance(item, Table)
        else _note(item)
        for item in section.items
    ]
    kind = "columns" if section.in_columns else "grid"
    return (
        f'<section id="{section.id}"><h2>{text(section.title)}</h2>'
        f'<div class="{kind}">{"".join(shown)}</div></section>'
    )


def _top(report: Report, drawn: Drawn) -> str:
    left = ""
    if report.headline is not None:
        line = report.headline
        left = (
            f'<p class="value">{text(line.value)}<small>% {text(line.interval)}</small></p>'
            f'<p class="what">{text(line.what)}</p><p class="verdict">{text(line.verdict)}</p>'
        )
    if report.chips:
        marks = {"good": "✓ ", "bad": "✗ "}
        chips = "".join(
            f'<li class="{chip.kind}">{marks.get(chip.kind, "")}{text(chip.text)}</li>'
            for chip in report.chips
        )
        left += f'<ul class="chips">{chips}</ul>'
    right = _figure(report.floors, drawn) if report.floors is not None else ""
    return f'<div class="top"><div>{left}</div>{right}</div>' if left or right else ""


def html_of(report: Report, drawn: Drawn, *, footer: Sequence[str]) -> str:
    """A whole page.

    Args:
      report: what it says.
      drawn: the SVGs of every chart in it.
      footer: lines at the end.
    """
    facts = "".join(f"<span>{text(fact)}</span>" for fact in report.facts)
    links = "".join(f'<a href="#{s.id}">{text(s.title)}</a>' for s in report.sections)
    sections = "".join(_section(section, drawn) for section in report.sections)
    end = "".join(f"<p>{text(line)}</p>" for line in footer)
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(report.title)} · jepa_jax</title>"
        f"<style>:root{{{_variables(LIGHT)}}}{dark}{_STYLE}</style></head><body>"
        f'<header><p class="kicker">{text(report.kicker)}</p><h1>{text(report.title)}</h1>'
        f'<p class="facts">{facts}</p>{_top(report, drawn)}<nav>{links}</nav></header>'
        f"<main>{sections}</main><footer>{end}</footer></body></html>\n"
    )
