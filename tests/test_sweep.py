"""sweep: the rows are those of the library, in order, kept whole on disk, and the same on a Dask cluster."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantlab import ledger, lm, sweep
from quantlab.methods import GPTQ, NF4, RTN, W8A8

JOBS = [
    {"method": "gptq", "bits": 3, "group_size": 16, "act_order": True},
    {"method": "rtn", "bits": 2, "group_size": None},
    {"method": "nf4", "group_size": 16},
]
METHODS = [GPTQ(bits=3, group_size=16, act_order=True), RTN(bits=2, group_size=None), NF4(group_size=16)]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """A tiny model on disk, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(lm.DATA / "model").save_pretrained(folder)
    return str(folder)


def texts(count=256):
    random = torch.Generator().manual_seed(0)
    calibration, tokens = torch.randint(0, 2048, (2, count), generator=random)
    return {"calibration": calibration, "tokens": tokens, "window": 32}


def run(name, jobs=JOBS, **options):
    return sweep.sweep(name, jobs, **texts() | {"n_jobs": 1, "progress": False} | options)


def quality(rows):
    """What does not depend on what else the machine does."""
    return [dataclasses.replace(row, prefill=0, decode=0, seconds=0) for row in rows]


@pytest.fixture
def measured(monkeypatch):
    """The jobs that are really measured, in order."""
    jobs, original = [], sweep._measure
    monkeypatch.setattr(sweep, "_measure", lambda *args: jobs.append(args[3]) or original(*args))
    return jobs


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# Jobs


def test_grid_combines_and_drops_what_a_method_does_not_take():
    jobs = sweep.grid(method=["nf4", "rtn", "gptq"], bits=[4, 3], group_size=[64], act_order=[True, False])
    assert jobs == [
        {"method": "nf4", "group_size": 64},
        *({"method": "rtn", "bits": bits, "group_size": 64} for bits in (4, 3)),
        *(
            {"method": "gptq", "bits": bits, "group_size": 64, "act_order": order}
            for bits in (4, 3)
            for order in (True, False)
        ),
    ]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"bits": [3]}, "method"),
        ({"method": "rtn"}, "must be a list"),
        ({"method": ["rtn"], "bits": 3}, "must be a list"),
        ({"method": ["rnt"]}, "method must be one of"),
        ({"method": ["rtn"], "act_order": [True]}, "no method here takes act_order"),
    ],
)
def test_grids_that_make_no_sense_are_refused(lists, message):
    with pytest.raises(ValueError, match=message):
        sweep.grid(**lists)


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        ({"method": "rtn"}, ("rtn", 4, "128")),
        ({"method": "rtn", "bits": 3, "clip_search": True}, ("rtn clip", 3, "128")),
        ({"method": "gptq", "group_size": None, "act_order": True}, ("gptq act-order", 4, "row")),
        ({"method": "gptq", "damping": 0.1, "symmetric": True}, ("gptq symmetric damping=0.1", 4, "128")),
        ({"method": "nf4"}, ("nf4", 4, "64")),
        ({"method": "nf4", "double_quant": True}, ("nf4 double", 4, "64")),
        ({"method": "w8a8_dynamic", "per": "token"}, ("w8a8_dynamic", 8, "token")),
        ({"method": "w8a8_static"}, ("w8a8_static", 8, "static")),
        ({"method": "llm_int8"}, ("llm_int8", 8, "split")),
    ],
)
def test_labels_are_those_of_the_ledger(job, wanted):
    assert sweep.label(job) == wanted


def test_every_named_way_is_called_so():
    assert {sweep.label(job)[0]: job for job in sweep.NAMED.values()} == sweep.NAMED


def test_mixed_bits_are_labelled_by_their_mean(name):
    model = lm.load_lm(name)[0]
    bits = {layer: 2 if "mlp" in layer else 4 for layer in lm.linear_layers(model)}
    # a block: attention 32 * (32 + 16 + 16 + 32) = 3072 weights of 4 bits, MLP 3 * 32 * 48 = 4608 of 2
    assert sweep.label({"method": "gptq", "bits": bits}, model) == ("mixed gptq", round(2.8), "128")


# Rows


def test_rows_are_what_the_library_measures_in_the_order_of_the_jobs(name, tmp_path):
    rows, (model, _), given = run(name, folder=tmp_path), lm.load_lm(name), texts()
    for job, row in zip(JOBS, rows, strict=True):
        new, report = lm.quantize_lm(model, given["calibration"], window=32, progress=False, **job)
        method, bits, group = sweep.label(job)
        wanted = ledger.measure(
            model, new, given["tokens"], method=method, bits=bits, group=group, report=report, window=32
        )
        assert quality([row]) == quality([wanted])
    assert len(files(tmp_path)) == 3


def test_a_second_run_measures_nothing(name, tmp_path, measured):
    rows = run(name, folder=tmp_path)
    assert run(name, jobs=JOBS[::-1] + JOBS[:1], folder=tmp_path) == [*rows[::-1], rows[0]]
    assert measured == METHODS


def test_jobs_that_are_the_same_are_measured_once(name, tmp_path, measured):
    """Said twice, or said with a default that the other leaves out."""
    rows = run(name, jobs=[JOBS[1], JOBS[1], JOBS[1] | {"symmetric": False}], folder=tmp_path)
    assert len(measured) == 1
    assert rows == rows[:1] * 3


def test_what_changes_the_result_changes_the_key(name, tmp_path, measured, monkeypatch):
    job = JOBS[1:2]
    run(name, job, folder=tmp_path)
    other = texts()
    run(name, job, folder=tmp_path, calibration=other["calibration"].roll(1))
    run(name, job, folder=tmp_path, tokens=other["tokens"].roll(1))
    run(name, job, folder=tmp_path, window=16)
    run(name, [job[0] | {"symmetric": True}], folder=tmp_path)
    monkeypatch.setattr(sweep, "_sources", lambda: "another version")
    run(name, job, folder=tmp_path)
    assert len(measured) == len(files(tmp_path)) == 6


def test_other_weights_under_the_same_name_are_another_model(name, tmp_path, measured):
    folder = tmp_path / "model"
    model, tokenizer = lm.load_lm(name)
    keys = []
    for factor in (1.0, 1.01):
        model.model.layers[0].mlp.up_proj.weight.data.mul_(factor)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        keys.append(run(str(folder), JOBS[1:2], folder=tmp_path / "cache")[0].kl)
    assert len(measured) == 2
    assert keys[0] != keys[1]


def test_a_worker_with_another_model_says_so(name):
    with pytest.raises(ValueError, match="another model on this worker"):
        sweep._loaded(name, "not its hash")


def test_the_number_of_threads_is_as_before(name, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(name, JOBS[1:2], folder=tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"method": "rnt"}, "method must be one of"),
        ({"method": "rtn", "act_order": True}, "rtn takes"),
        ({"bits": 3}, "a job is a method or a dict"),
        ("rtn", "a job is a method or a dict"),
        ({"method": "w8a8_static", "observer": lambda: None}, "by name"),
    ],
)
def test_bad_jobs_are_refused_before_anything_runs(name, tmp_path, measured, job, message):
    with pytest.raises(ValueError, match=message):
        run(name, [JOBS[1], job], folder=tmp_path)
    assert measured == []


def test_an_observer_is_known_by_its_name():
    given = sweep._settings(W8A8(per="static"))
    assert given["observer"] == "quantlab.observers.MinMax"
    json.dumps(given)


# Crashes


def test_a_sweep_that_fails_in_the_middle_goes_on_where_it_was(name, tmp_path, measured, monkeypatch):
    original = ledger.measure

    def fails(*args, **options):
        if options["method"] == "nf4":
            raise RuntimeError("no memory left")
        return original(*args, **options)

    monkeypatch.setattr(ledger, "measure", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        run(name, folder=tmp_path)
    assert len(files(tmp_path)) == 2
    monkeypatch.setattr(ledger, "measure", original)
    rows = run(name, folder=tmp_path)
    assert measured == [*METHODS, METHODS[2]]
    assert [row.method for row in rows] == ["gptq act-order", "rtn", "nf4"]


KILLED = """
import os, sys, torch
from quantlab import sweep
original = sweep._measure
calls = []
def measure(*args):
    calls.append(args)
    if len(calls) == 3:
        os._exit(9)
    return original(*args)
sweep._measure = measure
texts = torch.randint(0, 2048, (2, 256), generator=torch.Generator().manual_seed(0))
jobs = [{"method": "gptq", "bits": 3, "group_size": 16, "act_order": True}, {"method": "rtn", "bits": 2,
        "group_size": None}, {"method": "nf4", "group_size": 16}]
sweep.sweep(sys.argv[1], jobs, calibration=texts[0], tokens=texts[1], window=32, folder=sys.argv[2], n_jobs=1)
"""


def test_a_killed_sweep_loses_nothing(name, tmp_path, measured):
    done = subprocess.run([sys.executable, "-c", KILLED, name, str(tmp_path)], cwd=lm.DATA.parent)
    assert done.returncode == 9
    assert len(files(tmp_path)) == 2
    assert len(run(name, folder=tmp_path)) == 3
    assert measured == METHODS[2:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"kl": ', '"kl": 1'),
        lambda text: text.replace('"top1"', '"top2"'),
    ],
)
def test_a_damaged_file_is_measured_again_with_a_warning(name, tmp_path, measured, damage):
    rows = run(name, JOBS[1:2], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="is damaged and is measured again"):
        again = run(name, JOBS[1:2], folder=tmp_path)
    assert quality(again) == quality(rows)
    assert len(measured) == 2
    assert run(name, JOBS[1:2], folder=tmp_path) == again


def test_a_file_is_whole_or_not_there(name, tmp_path, monkeypatch):
    """What a crash while writing leaves behind is not taken for a result."""

    def crash(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", crash)
        with pytest.raises(OSError, match="disk is full"):
            run(name, JOBS[1:2], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(run(name, JOBS[1:2], folder=tmp_path)) == 1


# Processes


def test_a_dask_cluster_gives_the_same_table(name, tmp_path):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        rows = run(name, folder=tmp_path / "cluster", n_jobs=-1)
    assert quality(rows) == quality(run(name, folder=tmp_path / "one"))
    assert len(files(tmp_path / "cluster")) == 3


def test_command_line(name, tmp_path, capsys):
    out = tmp_path / "ledger.csv"
    words = ["--methods", "rtn", "nf4", "--bits", "3", "2", "--model", name, "--cache", str(tmp_path / "cache")]
    rows = sweep.main([*words, "--out", str(out), "--n-jobs", "1"])
    wanted = [("float", 32, "-"), ("rtn", 3, "128"), ("rtn", 2, "128"), ("nf4", 4, "64")]
    assert [(r.method, r.bits, r.group) for r in rows] == wanted
    assert rows[0].kl < 1e-6
    assert ledger.read(out) == rows
    assert "nf4" in capsys.readouterr().out
    assert sweep.main([*words, "--out", str(out), "--n-jobs", "1"]) == ledger.read(out) == rows


def test_another_model_has_a_ledger_of_its_own(name, tmp_path, monkeypatch):
    """A row's key is method, bits and group: in one file it would take the place of the bundled model's."""
    monkeypatch.chdir(tmp_path)
    rows = sweep.main(["--methods", "rtn", "--bits", "3", "--model", name, "--cache", "cache", "--n-jobs", "1"])
    (written,) = tmp_path.glob("*.csv")
    assert written.name == f"ledger-{Path(name).name}.csv"
    assert ledger.read(written) == rows
    assert sweep._file_name("org/name@v1") == "org-name-v1"
    monkeypatch.setenv("QUANTLAB_MODEL", name)  # what "bundled" then stands for
    assert sweep.main(["--methods", "rtn", "--bits", "3", "--cache", "cache", "--n-jobs", "1"]) == rows
    assert list(tmp_path.glob("*.csv")) == [written]
