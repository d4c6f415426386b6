"""Reads scores from what judges really write: prose, Markdown, tables or JSON. Uncertain scores count as missing.

Every text is first normalized (NFKC), which makes full-width digits, colons and brackets plain ones.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from utils.datasets.templates import without_thoughts

LOWEST, HIGHEST = 0.0, 10.0
NUMERALS = {numeral: value for value, numeral in enumerate("零一二三四五六七八九十")} | {"两": 2, "〇": 0}

SYSTEM = re.compile(r"(?<![a-z])(?:system|系统|模型)[\s_#-]*(?:([1-9])(?!\d|\.\d)|([一二三四五六七八九]))(?!个)", re.I)
TOTAL = r"(?:(?:总|总体|综合|最终)(?:得分|评分|分)|总评|综合|总体|(?:total|overall|final)(?:\s+(?:score|rating))?)"
LABEL = r"(?:得分|分数|评分|打分|分值|score|rating)"
# The order and choice of these words lets a text that repeats them match in only one way (no backtracking).
FILLERS = "总分|总体|总评|总|综合|最终|得分|得到|得|分数|分值|评分|评|打分|打|获得|应得|给|了|我|的|是|为"
ENGLISH = "total|overall|final|score|rating|gets|is|of"
LINK = rf"(?P<link>(?:[\s:;,|*_#`\"'“”‘’(\[{{=>→—–]|-(?!\d)|(?<![\s:])-(?=\d)|{FILLERS}|{ENGLISH}){{0,40}})"
NUMBER = r"(?P<number>-?\d+(?:\.\d+)?)"
SCALE = r"(?:\s*(?:分|points?|pts)?\s*(?:/|out\s+of)\s*(?P<scale>\d+(?:\.\d+)?)(?:\s*分)?)"
POINTS = r"(?:\s*(?P<points>分(?![钟之数析别成类布享配开支段明歧辨])|points?\b|pts\b))"
FULL = r"(?:\s*[(,]?\s*(?:满分\s*(?:为|是|:)?|out\s+of)\s*(?P<full>\d+)(?:\s*分)?\)?)?"
CHANGED = r"(?:[-=]>|→|修正|更正|修改|调整|改|(?:corrected|revised|changed|adjusted)\s+to)"
RANGE = rf"(?P<range>\s*(?:分\s*)?(?:[-~–—至到]\s*|[,;(]?[^\S\n]*{CHANGED}(?:[^\S\n]|{CHANGED}|[为成至到:])*)\d)?"
SCORE = rf"(?<![\d.]){NUMBER}(?:{SCALE}|{POINTS})?{FULL}{RANGE}"
AFTER_BARE = re.compile(
    r"[^\S\t]*(?:$|\t|[;。!?|*_`\"'”\])}(:\n]|,(?!\d)|[—–-](?!\d)|\.(?!\d)|(?:解释|理由|说明|原因|评语|explanation|reason)|(?=system|系统|模型))",
    re.I,
)
IN_WORDS = re.compile(
    rf"{LINK}(?P<whole>[零〇一二两三四五六七八九十])(?:点(?P<part>[一二三四五六七八九]))?分(?P<half>半)?(?=$|[\s;,。!?(*|])"
)
DIRECT = re.compile(LINK + SCORE, re.I)
CELL = re.compile(rf"\s*{SCORE}\s*", re.I)
LABELLED = {label: re.compile(rf"(?:^|[\s;,。:!?(\[*_#|-]){label}{LINK}{SCORE}", re.I | re.M) for label in (TOTAL, LABEL)}
OUT_OF_TEN = re.compile(r"(?<![\d./])(\d+(?:\.\d+)?)\s*分?\s*/\s*10(?![\d.])")
RULE = re.compile(r"\s*\|?\s*:?-{2,}:?\s*(?:\|\s*:?-{2,}:?\s*)*\|?\s*")
TOTAL_HEADING = re.compile(r"总分|总评|综合|总体|total|overall|final", re.I)
SCORE_HEADING = re.compile(r"分|score|rating", re.I)
JSON_SYSTEMS = ("system", "系统", "name", "名称", "id", "模型", "model")
UNCLEAR = float("nan")  # a score was given, but on another scale, as a range, or changed on the spot

Found = tuple[int, float]  # the number of a system (from 1), and one score that was given to it


class Reading(NamedTuple):
    """The scores of the systems in the order shown to the judge (None: no certain one), and what is wrong."""

    scores: list[float | None]
    problems: list[str]


def read_scores(text: str, systems: int) -> Reading:
    """Read the scores of `systems` systems, 0 to 10 each.

    A system has a score if the text gives it at least once and never gives another; numbers in the explanations
    (comparisons, counts of errors, years) are not scores. Reasoning within `<think>` is ignored.
    """
    text = without_thoughts(unicodedata.normalize("NFKC", text))
    text = re.sub(r"([^\S\n])\1+", r"\1", text)
    found = list(in_json(text, systems))
    if not found:
        prose, tables = part_tables(text)
        found = [score for table in tables for score in in_table(table)] + in_prose(prose)
    scores: list[float | None] = []
    problems = []
    for system in range(1, systems + 1):
        given = [score for number, score in found if number == system]
        problem = what_is_wrong(given)
        scores.append(None if problem else given[0])
        problems += [f"System{system}: {problem}"] if problem else []
    return Reading(scores, problems)


def what_is_wrong(given: list[float]) -> str:
    """Why the scores given to one system are not one certain score; "" if they are."""
    if not given:
        return "no score"
    if any(score != score for score in given):
        return "a range, a score that is changed, or a scale other than 0 to 10"
    if len(set(given)) > 1:
        return f"more than one score ({', '.join(f'{score:g}' for score in dict.fromkeys(given))})"
    if not LOWEST <= given[0] <= HIGHEST:
        return f"{given[0]:g} is out of range"
    return ""


def in_prose(text: str) -> list[Found]:
    """Scores that directly follow a system's name, else those labelled as scores in the part that begins with its name."""
    names = [match for match in SYSTEM.finditer(text) if opens(text, match.start())]
    direct = [(number_of(match), score) for match in names if (score := directly_after(text, match.end())) is not None]
    scored = {system for system, _ in direct}
    ends = [match.start() for match in names[1:]] + [len(text)]
    parts = []
    for match, end in zip(names, ends, strict=False):
        if number_of(match) not in scored:
            parts += [(number_of(match), score) for score in within(text[match.end() : end])]
    return direct + parts


def opens(text: str, start: int) -> bool:
    """True if a name at `start` begins a statement, rather than being part of a comparison ("better than System2")."""
    before = text[:start].rstrip(" \t")
    return (
        not before
        or before[-1] in "\n;:。,、!?|*_#>=`\"'“‘([{.)]-—–0123456789"
        or before.lower().endswith(("给", "对", "分", " for"))
    )


def number_of(match: re.Match) -> int:
    return int(match[1]) if match[1] else NUMERALS[match[2]]


def directly_after(text: str, start: int) -> float | None:
    """The score at `start`, with at most punctuation and words such as 得分 before it."""
    words = IN_WORDS.match(text, start)
    if words:
        part = NUMERALS[words["part"]] / 10 if words["part"] else 0.5 if words["half"] else 0
        return NUMERALS[words["whole"]] + part
    match = DIRECT.match(text, start)
    return certain(match) if match else None


def certain(match: re.Match) -> float | None:
    """The score of a match, UNCLEAR if it is a range, changed or of another scale; None if the number may be something else."""
    link, value = match["link"], float(match["number"])
    if match["range"] or any(scale and float(scale) != HIGHEST for scale in (match["scale"], match["full"])):
        return UNCLEAR
    if match["scale"] or match["points"]:
        return value
    rest = match.string[match.end() :]
    after = AFTER_BARE.match(rest)
    labelled = re.search(f"{TOTAL}|{LABEL}", match[0], re.I)
    alone = re.match(r"[^\S\n]*\**[^\S\n]*(?:\n|$)", rest)
    if not after or ("\n" in link and not labelled and not alone):
        return None
    enumerated = value == 1 and "(" not in link and re.match(r"[.)]\s*\S", rest)
    closes_nothing = after[0].strip() == ")" and "(" not in link
    return None if enumerated or closes_nothing else value


def within(part: str) -> list[float]:
    """Scores in the text about one system: the total, else what is labelled as a score, else what is out of ten."""
    for label in (TOTAL, LABEL):
        scores = [score for match in LABELLED[label].finditer(part) if (score := certain(match)) is not None]
        if scores:
            return scores
    return [float(match[1]) for match in OUT_OF_TEN.finditer(part)]


def part_tables(text: str) -> tuple[str, list[list[list[str]]]]:
    """Split a text into its prose and its tables, each a list of rows of cells, including the row of dashes."""
    prose: list[str] = []
    tables: list[list[list[str]]] = []
    lines = text.split("\n")
    inside = False
    for index, line in enumerate(lines):
        heads = "|" in line and index + 1 < len(lines) and "|" in lines[index + 1] and RULE.fullmatch(lines[index + 1])
        is_row = line.lstrip().startswith("|") or heads or (inside and "|" in line)
        if is_row and not inside:
            tables.append([])
        inside = bool(is_row)
        if inside:
            tables[-1].append([cell.strip(" \t*_`") for cell in line.strip().strip("|").split("|")])
        prose.append("" if inside else line)
    return "\n".join(prose), tables


def in_table(rows: list[list[str]]) -> Iterator[Found]:
    """Scores in a table with one row, or one column, per system."""
    header = rows[0] if len(rows) > 1 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1]) else []
    body = [row for row in rows[2 if header else 0 :] if any(row)]
    columns = {column: system_in(cell) for column, cell in enumerate(header) if system_in(cell)}
    if columns:
        labelled = [row for row in body if SCORE_HEADING.search(row[0])] or body
        for row in labelled[:1] if len(body) == 1 or SCORE_HEADING.search(labelled[0][0]) else []:
            yield from ((system, score_in(row[column])) for column, system in columns.items() if column < len(row))
        return
    names = {column for column, cell in enumerate(header) if re.fullmatch(r"system|系统|模型|model|#", cell, re.I)}
    wanted = score_column(header, body, names)
    for row in body:
        named = [(column, system_in(cell, column in names)) for column, cell in enumerate(row)]
        column, system = next(((c, s) for c, s in named if s), (0, 0))
        if system:
            cells = (
                row[wanted : wanted + 1] if wanted is not None else [cell for cell in row[column + 1 :] if CELL.fullmatch(cell)]
            )
            if len(cells) == 1:
                yield system, score_in(cells[0])


def score_column(header: list[str], body: list[list[str]], names: set[int]) -> int | None:
    """The column that holds the scores: the totals, else the only one labelled so; None if that is uncertain."""
    for heading in (TOTAL_HEADING, SCORE_HEADING):
        columns = [column for column, cell in enumerate(header) if heading.search(cell) and column not in names]
        if len(columns) == 1:
            return columns[0]
    return None


def system_in(cell: str, alone: bool = False) -> int:
    """The number of the system that a cell names (with `alone` also a bare number); 0 if it names none."""
    match = SYSTEM.fullmatch(cell.strip())
    return number_of(match) if match else int(cell) if alone and re.fullmatch("[1-9]", cell) else 0


def score_in(cell: str) -> float:
    """The score in a cell or JSON text; UNCLEAR if it holds anything else."""
    match = CELL.fullmatch(cell)
    if not match or match["range"] or any(scale and float(scale) != HIGHEST for scale in (match["scale"], match["full"])):
        return UNCLEAR
    return float(match["number"])


def in_json(text: str, systems: int) -> Iterator[Found]:
    """Scores in the JSON values in a text."""
    decoder = json.JSONDecoder()
    position = 0
    while start := re.compile(r"[{\[]").search(text, position):
        try:
            value, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            position = start.end()
            continue
        yield from in_value(value, systems)


def in_value(value: Any, systems: int) -> Iterator[Found]:
    """Scores in one JSON value: `{"System1": 8}`, `[{"system": "System1", "score": 8}]`, `{"scores": [8, 7]}`, nested."""
    if isinstance(value, list):
        for item in value:
            yield from in_value(item, systems)
    if not isinstance(value, dict):
        return
    scores = [inner for key, inner in value.items() if is_label(key)]
    named = [system for key in JSON_SYSTEMS if key in value and (system := system_in(str(value[key]).strip(), alone=True))]
    if named and len(scores) == 1:
        yield named[0], scalar(scores[0])
        return
    for key, inner in value.items():
        system = system_in(re.sub(rf"[\s_:]*(?:{TOTAL}|{LABEL})$", "", key, flags=re.I))
        if system:
            yield system, scalar(inner)
        elif (
            is_label(key) and isinstance(inner, list) and len(inner) == systems and not any(isinstance(i, dict) for i in inner)
        ):
            yield from ((number, scalar(item)) for number, item in enumerate(inner, 1))
        elif isinstance(inner, (dict, list)):
            yield from in_value(inner, systems)


def is_label(key: str) -> bool:
    return bool(re.fullmatch(rf"{TOTAL}|{LABEL}s?", key.strip(), re.I))


def scalar(value: Any) -> float:
    """A JSON value as a score: a number, a text such as "8/10", or an object with one field called a score."""
    if isinstance(value, dict):
        labelled = [inner for key, inner in value.items() if is_label(key)]
        return scalar(labelled[0]) if len(labelled) == 1 else UNCLEAR
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return UNCLEAR
    try:
        return score_in(value) if isinstance(value, str) else float(value)
    except OverflowError:  # an integer beyond all floats
        return UNCLEAR
