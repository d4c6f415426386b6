"""Everything that a run of judge.py found as one self-contained HTML file, with Markdown and CSV."""

import base64
import dataclasses
import hashlib
import html
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils import lineage
from utils.console import say
from utils.evaluation import tables as tabular
from utils.evaluation.tables import LABELS, Row, Table
from utils.files import replacing

ALL = "*"
WIDE = 1000  # pixels; wider pictures are scrolled on a phone


@dataclasses.dataclass
class Findings:
    """What one run found: `tables` and `notes` as printed, `pictures` with their captions.

    `questions`: each with `category`, `texts` (name and text of its parts), `answers` (a text for each system) and
    `remarks` (lines about it); `steps`: the systems that form a chain, in order; `folders`: names and folders that may have
    a lineage; `how`: template and dtype of the answers.
    """

    tables: list[Table] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    pictures: list[tuple[str, Path]] = dataclasses.field(default_factory=list)
    questions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: list[str] = dataclasses.field(default_factory=list)
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)
    how: str = ""


STYLE = """
:root{--ink:#1d1d1f;--soft:#5f6368;--line:#d9dce1;--back:#fff;--tint:#f4f6f9;--best:#0b57d0}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e8eaed;--soft:#9aa0a6;--line:#3c4043;--back:#17181a;--tint:#222427;--best:#8ab4f8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;color:var(--ink);background:var(--back);overflow-wrap:anywhere;
font:15px/1.6 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:7rem}
@media screen{th:first-child,td:first-child{position:sticky;left:0;background:var(--back)}}
td.best{font-weight:700;color:var(--best)}td small{color:var(--soft);font-weight:400}
.down{color:#c5221f}.up{color:#188038}
nav{display:flex;flex-wrap:wrap;gap:.5rem;position:sticky;top:0;background:var(--back);padding:.5rem 0;z-index:1}
nav input[type=search]{flex:1 1 12rem}input,select{font:inherit;padding:.3rem .5rem;color:inherit;background:var(--tint);
border:1px solid var(--line);border-radius:.4rem;max-width:100%}
details{border:1px solid var(--line);border-radius:.5rem;margin:.4rem 0;padding:.4rem .7rem}
summary{cursor:pointer}summary b{color:var(--soft);font-weight:400;margin-right:.5rem}
.asked,.answers>div{white-space:pre-wrap}.asked{background:var(--tint);border-radius:.4rem;
padding:.4rem .6rem;margin:.4rem 0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16rem,100%),1fr));gap:.6rem}
.answers>div{border-left:3px solid var(--line);padding-left:.6rem}
.answers h4,.asked h4{margin:0;color:var(--soft);font-size:.85rem}
.remarks{color:var(--soft);margin:.4rem 0 0;padding-left:1.2rem}
figure{margin:1rem 0;overflow-x:auto}img{max-width:100%;height:auto;background:#fff}
@media screen and (max-width:40rem){img.wide{max-width:none;width:56rem}}
[hidden]{display:none!important}footer{color:var(--soft);margin-top:2rem}
@media print{nav{display:none}body{max-width:none;padding:0;font-size:11px}.scroll,figure{overflow:visible}table{max-width:100%}
th,td{white-space:normal;padding:.2rem .3rem}td small{display:block}
h2,h3,summary{break-after:avoid}tr,figure,details{break-inside:avoid}
th:first-child,td:first-child{min-width:4rem}td:nth-child(2){white-space:nowrap}img{max-height:85vh}@page{margin:12mm}}
"""
SCRIPT = """
const all=[...document.querySelectorAll('details[data-category]')],find=document.getElementById('find'),
kind=document.getElementById('kind'),differ=document.getElementById('differ'),count=document.getElementById('count');
function filter(){const words=find.value.toLowerCase().split(/\\s+/).filter(Boolean);let shown=0;
for(const one of all){const text=one.textContent.toLowerCase();
const fits=(kind.value==='*'||one.dataset.category===kind.value)&&(!differ.checked||one.dataset.differ==='1')
&&words.every(w=>text.includes(w));
one.hidden=!fits;shown+=fits}
count.textContent=shown+' / '+all.length}
if(find){for(const one of [find,kind,differ])one.addEventListener('input',filter);filter()}
let closed=[];
addEventListener('beforeprint',()=>{closed.push(...all.filter(one=>!one.open));for(const one of closed)one.open=true});
addEventListener('afterprint',()=>{for(const one of closed)one.open=false;closed=[]});
"""


def write(folder: Path, title: str, command: str, findings: Findings) -> None:
    """Write report.html, report.md and report.csv (and .json) into `folder`."""
    tabular.write(folder / "report", findings.tables, findings.notes)
    with replacing(folder / "report.html") as aside:
        aside.write_text(page(title, command, findings), "utf-8")
    say(f"{folder / 'report.html'}: {len(findings.tables)} tables and {len(findings.questions)} questions, on one page")


def page(title: str, command: str, findings: Findings) -> str:
    """The complete page. Only its own script can run in it, whatever is in the answers."""
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    parts = [
        '<!doctype html><html lang="zh"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><h1>{text(title)}</h1>",
        section("结果 Results", [table(one) for one in findings.tables]),
        section("说明 Notes", [bullets(findings.notes)] if findings.notes else []),
        section("链条 Chain", chain_parts(findings)),
        section("图 Plots", [picture(caption, path) for caption, path in findings.pictures if path.is_file()]),
        section("来历 Lineage", lineage_parts(findings.folders)),
        section("逐题 Questions", questions(findings.questions)),
        f"<footer><code>{text(command)}</code></footer><script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def text(value: Any) -> str:
    """Anything as text escaped for HTML."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def section(heading: str, parts: Sequence[str]) -> str:
    """A heading with its parts; nothing if there are none."""
    return f"<section><h2>{text(heading)}</h2>\n{''.join(parts)}</section>" if parts else ""


def bullets(lines: Iterable[str], opening: str = "<ul>") -> str:
    """Lines as a list."""
    return opening + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A table of rows of HTML cells, the first row being the heading; it scrolls on narrow pages."""
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def table(one: Table) -> str:
    """A table with the best values in bold, the second best starred, and small intervals beside them."""
    rows = [["类别 category", "样本数 n", *map(text, one.systems)]]
    for row in one.rows:
        rows.append([text(row.label), str(row.samples), *(cell(one, row, name) for name in one.systems)])
    return f"<h3>{text(one.title)}</h3>{grid(rows)}"


def cell(one: Table, row: Row, system: str) -> str:
    """One value of a table."""
    best, second = one.marks(row)
    shown = text(one.shown(row.values.get(system))) + ("*" if system in second else "")
    return f"<td{' class=best' if system in best else ''}>{shown}<small>{text(one.doubt(row, system))}</small></td>"


def chain_parts(findings: Findings) -> list[str]:
    """For each table of a chain: the change at each step, and the loss since the best earlier step."""
    parts = []
    for one in findings.tables:
        steps = [step for step in findings.steps if step in one.systems]
        if len(steps) < 2 or not one.marked:
            continue
        rows = [["类别 category", *(f"{text(a)} → {text(b)}" for a, b in itertools.pairwise(steps)), "遗忘 forgotten"]]
        for row in one.rows:
            values = [row.values.get(step) for step in steps]
            changes = [None if a is None or b is None else b - a for a, b in itertools.pairwise(values)]
            earlier = [value for value in values[:-1] if value is not None]
            lost = None if values[-1] is None or not earlier else min(0.0, values[-1] - max(earlier))
            rows.append([text(row.label), *(change(one, value) for value in [*changes, lost])])
        parts.append(f"<h3>{text(one.title)}</h3>{grid(rows)}")
    return parts


def change(one: Table, value: float | None) -> str:
    """A difference of two values, with its sign."""
    shown = one.shown(None if value is None else abs(value))
    if value is None or shown == "0":
        return f"<td>{shown}</td>"
    return f'<td class="{"up" if value > 0 else "down"}">{"+" if value > 0 else "−"}{shown}</td>'


def picture(caption: str, path: Path) -> str:
    """A PNG, embedded in the page."""
    content = path.read_bytes()
    data, width = base64.b64encode(content).decode(), int.from_bytes(content[16:20])  # the width field of a PNG
    image = f'<img alt="{text(caption)}"{" class=wide" if width > WIDE else ""} src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def lineage_parts(folders: dict[str, Path]) -> list[str]:
    """The lineage of systems that are adapters, each chain once; and their training losses."""
    chains: list[list[dict[str, Any]]] = []
    for folder in folders.values():
        if lineage.read(folder) is not None:
            chains.append(lineage.chain(folder))
    longest = [one for one in chains if not any(one is not other and one == other[: len(one)] for other in chains)]
    parts = [grid([[text(cell) for cell in row] for row in lineage.table_rows(steps)]) for steps in longest]
    plots = [
        picture(f"{name}: loss", folder / "loss.png") for name, folder in folders.items() if (folder / "loss.png").is_file()
    ]
    return parts + plots if parts else plots


def questions(found: Sequence[dict[str, Any]]) -> list[str]:
    """Every question with all answers side by side, and the search bar."""
    if not found:
        return []
    categories = dict.fromkeys(one["category"] for one in found)
    options = "".join(f'<option value="{text(one)}">{text(LABELS.get(one, one))}</option>' for one in categories)
    bar = (
        '<nav><input id="find" type="search" placeholder="搜索 search" aria-label="搜索 search">'
        f'<select id="kind" aria-label="类别 category"><option value="{ALL}">全部 all</option>{options}</select>'
        '<label><input id="differ" type="checkbox"> 只看不同的 only where they differ</label><span id="count"></span></nav>'
    )
    return [bar, *(question(number, one) for number, one in enumerate(found, 1))]


def question(number: int, one: dict[str, Any]) -> str:
    """One question, folded."""
    category, first = one["category"], next(iter(one["texts"].values()))
    asked = "".join(f'<div class="asked"><h4>{text(name)}</h4>{text(value)}</div>' for name, value in one["texts"].items())
    answers = "".join(f"<div><h4>{text(name)}</h4>{text(value)}</div>" for name, value in one["answers"].items())
    remarks = bullets(one["remarks"], '<ul class="remarks">') if one["remarks"] else ""
    differ = int(len(set(one["answers"].values())) > 1)
    return (
        f'<details data-category="{text(category)}" data-differ="{differ}"><summary><b>{number} · '
        f"{text(LABELS.get(category, category))}</b>{text(first[:120])}</summary>{asked}"
        f'<div class="answers">{answers}</div>{remarks}</details>'
    )
