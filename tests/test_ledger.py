"""ledger: what is measured, and that the file is whole, read back equal, and replaced row by row."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab import ledger, lm


@pytest.fixture(scope="module")
def measured():
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    tokens = lm.token_stream(tokenizer, lm.load_text("eval"))[:600]
    new, report = lm.quantize_lm(model, tokens, bits=3, window=256, progress=False)
    row = ledger.measure(model, new, tokens, method="rtn", bits=3, group="128", report=report, window=256)
    return model, new, report, tokens, row


def test_a_row_is_what_the_library_measures(measured):
    model, new, report, tokens, row = measured
    p, d = lm.perplexity(new, tokens, window=256), lm.divergence(model, new, tokens, window=256)
    assert (row.perplexity, row.perplexity_error) == pytest.approx(p[:2])
    assert (row.kl, row.kl_error, row.top1) == pytest.approx(d[:3])
    assert row.bytes == report.nbytes
    assert row.bits_per_weight == pytest.approx(report.bits_per_parameter)
    assert row.calibration_tokens == 0  # rounding to nearest looks at none
    assert row.prefill is row.decode is None  # it computes as the float model does


def test_latencies_are_measured_where_the_model_computes_otherwise(measured):
    model, _, _, tokens, _ = measured
    new, report = lm.quantize_lm(model, tokens, method="w8a8_static", window=256, progress=False)
    row = ledger.measure(model, new, tokens, method="w8a8_static", bits=8, report=report, window=256)
    assert row.calibration_tokens == 512  # whole windows
    assert min(row.prefill, row.decode) > 0 <= min(row.prefill_spread, row.decode_spread)


def test_the_float_row_counts_sixteen_bits(measured):
    model, _, _, tokens, _ = measured
    row = ledger.measure(model, model, tokens, method="float", window=256)
    assert row.kl == 0
    assert row.top1 == 1
    assert row.bits_per_weight == 16


def test_rows_come_back_equal_and_replace_their_own_kind(measured, tmp_path):
    row, path = measured[-1], tmp_path / "ledger.csv"
    ledger.append(row, path)
    assert ledger.read(path) == [row]
    better = dataclasses.replace(row, kl=0.001)
    other = dataclasses.replace(row, bits=4)
    assert ledger.append(other, path) == [row, other]
    assert ledger.append(better, path) == [other, better]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.csv", "ledger.csv.lock"]


def test_a_table_shows_every_row(measured):
    text = repr(ledger.Table([measured[-1]] * 2))
    assert len(text.splitlines()) == 3
    assert "rtn" in text


def points(*pairs):
    return [ledger.Row(f"{i}", 4, "-", 1, 0, kl, 0.1, 1, bits, 100, 2, 1, 0, 0) for i, (bits, kl) in enumerate(pairs)]


def test_compare_gives_ratios_and_how_sure_they_are():
    a, b = points((4, 0.5), (4, 2.0))
    found = ledger.compare(a, b)
    assert (found["kl"], found["perplexity"], found["bytes"], found["prefill"]) == (0.25, 1, 1, 1)
    assert found["kl_sigmas"] == pytest.approx(-1.5 / (0.1 * 2**0.5))
    with pytest.raises(ValueError, match="is the float model"):
        ledger.compare(a, points((16, 0.0))[0])


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        ledger.read(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a ledger"):
        ledger.read(tmp_path / "x.csv")


def test_the_reference_copy_still_holds():
    """Rows of data/ledger.csv, which the notebooks wrote, measured again as notebooks 04, 07 and 10 do."""
    rows = {(r.method, r.bits, r.group): r for r in ledger.read(lm.DATA / "ledger.csv")}
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    calibration = lm.token_stream(tokenizer, lm.load_text("calibration"))[:16384]
    text = lm.token_stream(tokenizer, lm.load_text("eval"))[:4096]
    measured = {
        ("rtn", 3, "128"): (512, {"bits": 3}),
        ("gptq", 3, "128"): (16384, {"bits": 3}),
        ("nf4", 4, "64"): (512, {}),
        ("w8a8_dynamic", 8, "tensor"): (512, {}),
        ("llm_int8", 8, "split"): (512, {}),
    }
    for key, (tokens, options) in measured.items():
        new, report = lm.quantize_lm(model, calibration[:tokens], method=key[0], progress=False, **options)
        kl = lm.divergence(model, new, text).kl
        assert kl == pytest.approx(rows[key].kl, rel=0.03), key  # float32 sums differ from one processor to the next
        assert report.nbytes == rows[key].bytes, key


def test_the_reference_copy_has_the_rows_that_the_notebooks_write():
    rows = {(r.method, r.bits, r.group) for r in ledger.read(lm.DATA / "ledger.csv")}
    assert {("float", 32, "-"), ("clipped", 3, "tensor"), ("rtn", 4, "32"), ("nvfp4", 4, "16")} <= rows
    assert {("w8a8_static", 8, "static"), ("planted w8a8", 8, "static"), ("planted smooth", 8, "tensor")} <= rows
    assert {
        ("planted awq", 4, "128"),
        ("mixed rtn", 3, "128"),
        ("qat", 2, "128"),
        ("lsq", 2, "128"),
        ("ternary", 2, "128"),
        ("binary", 1, "128"),
        ("qlora", 4, "64"),
    } <= rows
    swept = {(m, b, "128") for m in ("rtn", "rtn clip", "gptq", "gptq act-order", "awq") for b in (8, 4, 3, 2)}
    assert swept <= rows  # python -m quantlab.sweep --out data/ledger.csv


def test_two_writers_at_once_lose_no_row(tmp_path):
    """Each of two processes writes twenty rows, as two notebooks may."""
    program = """
import sys
from quantlab.ledger import Row, append
for i in range(20):
    append(Row(sys.argv[1], i, "-", 1, 0, 0, 0, 1, 16, 1, 1, 1, 0, 0), sys.argv[2])
"""
    path, root = tmp_path / "ledger.csv", Path(__file__).resolve().parent.parent
    writers = [subprocess.Popen([sys.executable, "-c", program, name, str(path)], cwd=root) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted((row.method, row.bits) for row in ledger.read(path)) == [(m, i) for m in "ab" for i in range(20)]
