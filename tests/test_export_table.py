"""The table of engines: what a row says and measures, and what was stored once."""

import json
import re

import numpy as np
import pytest
import torch

from quantlab.export import table
from quantlab.export.table import STORED, WALKED, Row, cpu_seconds, measure, relative, show, stored_rows


def test_a_row_is_a_line_of_the_table(capsys):
    rows = [Row("an engine", "a form", 1_062_468, 0.00567, 1.698), Row("other", "form", 9, 0.0, None, "stored: then")]
    show(rows)
    head, first, second = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", first) == ["an engine", "a form", "1,062,468", "5.7e-03", "1.70"]
    assert re.split(r"\s{2,}", second) == ["other", "form", "9", "0.0e+00", "stored: then"]
    for name, end in (("bytes", "1,062,468"), ("apart", "5.7e-03"), ("speed", "1.70")):
        assert head.index(name) + len(name) == first.index(end) + len(end)
    with pytest.raises(ValueError, match="a row must be a Row"):
        show([("an engine", "a form")])


def test_relative_is_a_share_of_what_was_wanted():
    wanted = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert relative(wanted.numpy(), wanted) == 0
    assert relative(wanted + torch.tensor([[0.3, 0.0], [0.0, 0.4]]), wanted) == pytest.approx(0.1)
    assert relative(np.zeros((2, 2), np.float32), wanted) == 1
    for got in (wanted[0], wanted * torch.nan, "a"):
        with pytest.raises(ValueError, match="got"):
            relative(got, wanted)
    with pytest.raises(ValueError, match="wanted not 0"):
        relative(wanted, wanted * 0)


def test_calls_take_turns_and_the_least_time_of_each_is_kept(monkeypatch):
    order, clock = [], iter([0, 9, 0, 4, 0, 5, 0, 6])
    monkeypatch.setattr(table.time, "process_time", lambda: next(clock))
    assert cpu_seconds(lambda: order.append("a"), lambda: order.append("b"), rounds=2) == [5, 4]
    assert order == ["a", "b"] * 3  # the first warms up
    for wrong in ({"rounds": 0}, {"rounds": 1.5}):
        with pytest.raises(ValueError, match="rounds must be"):
            cpu_seconds(list, **wrong)


def test_measure_runs_all_tokens_for_the_answer_and_one_for_the_time(tmp_path, monkeypatch):
    file, seen = tmp_path / "layer", []
    file.write_bytes(b"12345")
    x = torch.arange(6.0).view(3, 2)

    def run(array: np.ndarray) -> np.ndarray:
        seen.append(len(array))
        return 1.5 * array

    def seconds(*calls) -> list[float]:
        for call in calls:
            call()
        return [2.0, 3.0]

    monkeypatch.setattr(table, "cpu_seconds", seconds)
    row = measure("engine", "form", file, run, x, x, lambda array: seen.append(-len(array)))
    assert row == Row("engine", "form", 5, pytest.approx(0.5), 1.5)
    assert sorted(seen) == [-1, 1, 3]
    with pytest.raises(FileNotFoundError, match="no file"):
        measure("engine", "form", tmp_path / "none", run, x, x, run)
    for of in (x[0], x[:2]):
        with pytest.raises(ValueError, match="x and y must be"):
            measure("engine", "form", file, run, x, of, run)


def test_stored_rows_say_when_and_where_and_an_unknown_engine_has_none(tmp_path, monkeypatch):
    about = {"date": "2020-02-03", "processor": "a processor"}
    kept = {"layer": [["ours", "a", 1, 0.5, None], ["theirs", "b", 2, 0.25, 2.0]]}
    (tmp_path / "stored.json").write_text(json.dumps(about | kept))
    monkeypatch.setattr(table, "STORED", tmp_path / "stored.json")
    monkeypatch.setattr(table, "WALKED", tmp_path / "none.json")
    assert stored_rows("theirs") == [Row("theirs", "b", 2, 0.25, 2.0, "stored: 2020-02-03, a processor")]
    assert stored_rows("nobody's") == []
    (tmp_path / "stored.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is damaged: 'layer'"):
        stored_rows("theirs")


def test_what_is_stored_can_be_shown_and_says_its_origin():
    for file in (STORED, WALKED):
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert all(Row(*row).line() for row in kept["layer"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
    assert {row[0] for row in kept["layer"]} == {"LiteRT", "OpenVINO"}
    assert kept["versions"].keys() >= {"torch", "ai-edge-litert", "openvino"}
    assert "by hand" in kept["origin"]
    assert all(len(row) == 3 and all(row) for row in kept["replaced"])
    readme = (WALKED.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{file.name}`" in readme for file in (STORED, WALKED))
    for engine in ("ONNX Runtime", "OpenVINO", "LiteRT"):
        assert stored_rows(engine), engine
