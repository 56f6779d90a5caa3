"""The leaderboard: scores in a file of JSON lines, which several programs may write and a class may merge."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock

from quantlab.arguments import check_choice, check_kind, check_list, check_path
from quantlab.capstone.scoring import BUDGETS, Score
from quantlab.files import write_whole
from quantlab.lm import DATA

REFERENCES = DATA / "capstone.jsonl"  # the reference recipes, measured


def append(score: Score, path="capstone.jsonl") -> list[Score]:
    """Write a score to a leaderboard, in place of an older one of the same person, recipe, budget and model.

    Returns all rows, best first. The file is locked while it is written, and whole at any time.
    Raises: FileNotFoundError if there is no such folder, ValueError if the file there is no leaderboard.
    """
    path, score = check_path(path), check_kind(score, "score", Score, "score() gives")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    with FileLock(f"{path}.lock"):
        rows = [row for row in (read(path) if path.is_file() else []) if _key(row) != _key(score)]
        return _write([*rows, score], path)


def read(path=REFERENCES) -> list[Score]:
    """The scores in a leaderboard, as they stand there; by default those of the reference recipes.

    Raises: FileNotFoundError if there is none, ValueError that names file and line if one is damaged.
    """
    path = check_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no leaderboard {path}")
    lines = enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1)
    return [_score_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def merge(paths: Iterable, out=None) -> list[Score]:
    """The scores of several leaderboards, best first; each once, however often it is in them. out: a file for them.

    Of one person's scores with one recipe and budget the better one stays: a class's files are copies of each other
    more often than not. Raises: as read, for any of the files; then nothing is written.
    """
    best: dict[tuple, Score] = {}
    for row in (row for path in check_list(paths, "paths") for row in read(path)):
        if _key(row) not in best or _rank(row) < _rank(best[_key(row)]):
            best[_key(row)] = row
    if out is None:
        return sorted(best.values(), key=_rank)
    out = check_path(out, "out")
    with FileLock(f"{out}.lock"):
        return _write(list(best.values()), out)


def best(rows: Iterable[Score], budget: str, model: str | None = None) -> Score | None:
    """The row of this model with the least KL of those that fit the budget; None if none does.

    model: as a row names it; by default the one that the budget was made for.
    Raises: ValueError for an unknown budget, or if the rows were measured on several hidden texts.
    """
    model = BUDGETS[check_choice(budget, "budget", BUDGETS)].model if model is None else check_kind(model, "model", str)
    scores = [check_kind(row, "a row", Score, "score() gives") for row in check_list(rows, "rows")]
    fitting = [row for row in scores if (row.budget, row.model) == (budget, model) and row.fits]
    if len({row.text for row in fitting}) > 1:
        raise ValueError("rows must be of one hidden text: scores on several do not compare")
    return min(fitting, key=_rank, default=None)


@dataclass(frozen=True)
class Board:
    """The rows as a notebook shows them: a table for each budget, model and hidden text, since only such rows compare.

    The best come first, those over the budget last.
    """

    rows: list

    def __repr__(self) -> str:
        head = ("", "recipe", "who", "bytes", "KL ±", "top-1", "CPU s", "MB")
        widths = (4, max([12, *(len(r.recipe) for r in self.rows)]), max([4, *(len(r.who) for r in self.rows)]))
        lines = []
        tables: dict[tuple, list[Score]] = {}
        for row in sorted(self.rows, key=_rank):
            tables.setdefault((row.budget, row.model, row.text), []).append(row)
        for (budget, model, text), rows in tables.items():
            several = sum(key[:2] == (budget, model) for key in tables) > 1
            lines += ["", f"{budget}, {model}" + (f", hidden text {text}" if several else "")]
            lines += [_line(row, (*widths, 11, 15, 6, 6, 6)) for row in (head, *_numbered(rows))]
        return "\n".join(lines[1:])


def _numbered(rows: list[Score]) -> list[tuple]:
    cells = []
    for place, r in enumerate(rows, 1):
        kl, size = f"{r.kl:.4f} {r.kl_error:.4f}", f"{r.nbytes:,}"
        first = f"{place}." if r.fits else "over"
        cells.append(
            (first, r.recipe, r.who, size, kl, f"{r.top1:.1%}", f"{r.cpu_seconds:.0f}", f"{r.memory / 1e6:.0f}")
        )
    return cells


def _line(cells: tuple, widths: tuple) -> str:
    return "  ".join(
        f"{c:<{w}}" if i in (1, 2) else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _key(row: Score) -> tuple:
    return row.who, row.recipe, row.budget, row.model, row.text


def _rank(row: Score) -> tuple:
    """By budget, model and hidden text, those that fit first, and then by KL."""
    return list(BUDGETS).index(row.budget), row.model, row.text, not row.fits, row.kl, row.who, row.recipe


def _write(rows: list[Score], path: Path) -> list[Score]:
    rows = sorted(rows, key=_rank)
    write_whole(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return rows


def _score_of(line: str, where: str) -> Score:
    try:
        values = json.loads(line)
        kinds = {field.name: (int, float) if field.type is float else (field.type,) for field in fields(Score)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise ValueError("it has other columns than a score")
        for name, value in values.items():
            if not isinstance(value, kinds[name]) or isinstance(value, bool) or value != value:
                raise ValueError(f"{name} is {value!r}")
        if values["budget"] not in BUDGETS:
            raise ValueError(f"there is no budget {values['budget']!r}")
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    return Score(**values)
