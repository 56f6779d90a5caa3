"""base_model: small enough to run, resumable to the same bits, measured as it says."""

import json
import math

import pytest
import torch

from quantlab.lm import load_lm, read_documents, token_stream
from quantlab.storage import read_parts
from quantlab.train.run import Run
from recipes import base_model


@pytest.fixture
def corpus(tmp_path):
    stories = [
        f"The {a} saw a {b}. They went to the {c} and were happy."
        for a in ("cat", "dog", "fox", "hen")
        for b in ("ball", "boat", "tree")
        for c in ("park", "sea", "hill")
    ]
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return path


def arguments(corpus, out, steps):
    small = {
        "hidden": 32,
        "intermediate": 64,
        "layers": 2,
        "heads": 4,
        "kv-heads": 2,
        "vocab": 300,
        "context": 16,
        "batch": 4,
        "every": 5,
        "hold-out": 4,
        "steps": steps,
        "device": "cpu",
    }
    return [
        "--train",
        str(corpus),
        "--out",
        str(out),
        "--test",
        str(corpus),
        "--dropout",
        "0.1",
        *[part for key, value in small.items() for part in (f"--{key}", str(value))],
    ]


def test_it_learns_and_reports_what_it_did(corpus, tmp_path):
    report = base_model.main(arguments(corpus, tmp_path / "model", 40))
    first, last = report["log"][0], report["log"][-1]
    assert last[1] < first[1] - 0.5  # loss, nats a token
    assert last[2] < 0.9 * first[2]  # held-out bits per character
    assert report["tokens"] == 40 * 4 * 16
    model, tokenizer = load_lm(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model/training.json").read_text())["seconds_of_this_run"] >= 0
    assert report["test_bits_per_character"] == pytest.approx(
        base_model.bits_per_character(model, tokenizer, read_documents([corpus]), context=16), rel=1e-3
    )


def test_a_run_cut_off_ends_where_a_whole_one_does(corpus, tmp_path, monkeypatch):
    base_model.main(arguments(corpus, tmp_path / "whole", 20))
    step = Run.step

    def cut_at_twelve(run, ids):
        if run.history.steps == 12:
            raise KeyboardInterrupt
        return step(run, ids)

    options = arguments(corpus, tmp_path / "cut", 20)
    monkeypatch.setattr(Run, "step", cut_at_twelve)
    with pytest.raises(KeyboardInterrupt):
        base_model.main(options)
    monkeypatch.setattr(Run, "step", step)
    report = base_model.main(options)  # goes on from step 10
    assert [row[0] for row in report["log"]] == [5, 10, 15, 20]
    whole, cut = (load_lm(str(tmp_path / name))[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_both_optimizers_go_on_where_they_stopped(corpus, tmp_path):
    """Without Muon's momentum, or AdamW's averages, the step after a stop would be another one."""
    base_model.main(arguments(corpus, tmp_path / "model", 5))
    _, parts = read_parts(tmp_path / "model.checkpoint/step_5.safetensors")
    states = {name.rpartition(".")[2] for name in parts if name.startswith("optimizer.")}
    assert states == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    before = {p.name for p in (tmp_path / "model.checkpoint").iterdir()}
    assert before == {"progress.json", "step_5.safetensors"}


def test_bits_per_character_by_hand(corpus, tmp_path):
    base_model.main(arguments(corpus, tmp_path / "model", 5))
    model, tokenizer = load_lm(str(tmp_path / "model"))
    text, nll = ["The cat saw."], 0.0
    ids = token_stream(tokenizer, text)
    for i in range(1, len(ids)):
        with torch.no_grad():
            nll -= torch.log_softmax(model(ids[None, :i]).logits[0, -1], 0)[ids[i]].item()
    bits = base_model.bits_per_character(model, tokenizer, text, context=64)
    assert bits == pytest.approx(nll / math.log(2) / len(text[0]), rel=1e-4)


def test_learning_rate_rises_stays_and_falls():
    rates = [
        base_model.learning_rate(s, peak=1.0, steps=1000, warmup=100, decay=0.4) for s in (0, 99, 300, 599, 800, 999)
    ]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.0025])


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text file"):
        base_model.main(["--train", str(tmp_path / "none.txt"), "--out", str(tmp_path / "m")])
