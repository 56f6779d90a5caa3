"""training: small enough to run, resumable to the same bits, measured as it says."""

import json
import math

import pytest
import torch

from quantlab import training
from quantlab.lm import load_lm, token_stream


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
    report = training.main(arguments(corpus, tmp_path / "model", 40))
    first, last = report["log"][0], report["log"][-1]
    assert last[1] < first[1] - 0.5  # loss, nats a token
    assert last[2] < 0.9 * first[2]  # held-out bits per character
    assert report["tokens"] == 40 * 4 * 16
    model, tokenizer = load_lm(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model/training.json").read_text())["seconds_of_this_run"] >= 0
    assert report["test_bits_per_character"] == pytest.approx(
        training.bits_per_character(model, tokenizer, training.read_documents([corpus]), context=16), rel=1e-3
    )


def test_a_run_cut_off_ends_where_a_whole_one_does(corpus, tmp_path, monkeypatch):
    training.main(arguments(corpus, tmp_path / "whole", 20)[:-2] + ["--device", "cpu", "--dropout", "0"])
    calls, real = [], training.train_step

    def stop_at_twelve(*args):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(*args)

    options = arguments(corpus, tmp_path / "cut", 20) + ["--dropout", "0"]
    monkeypatch.setattr(training, "train_step", stop_at_twelve)
    with pytest.raises(KeyboardInterrupt):
        training.main(options)
    monkeypatch.setattr(training, "train_step", real)
    training.main(options)  # goes on from step 10
    whole, cut = (load_lm(str(tmp_path / name))[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_bits_per_character_by_hand(corpus, tmp_path):
    training.main(arguments(corpus, tmp_path / "model", 5))
    model, tokenizer = load_lm(str(tmp_path / "model"))
    text, nll = ["The cat saw."], 0.0
    ids = token_stream(tokenizer, text)
    for i in range(1, len(ids)):
        with torch.no_grad():
            nll -= torch.log_softmax(model(ids[None, :i]).logits[0, -1], 0)[ids[i]].item()
    bits = training.bits_per_character(model, tokenizer, text, context=64)
    assert bits == pytest.approx(nll / math.log(2) / len(text[0]), rel=1e-4)


def test_batches_depend_on_seed_and_step_alone():
    stream = torch.arange(1000)
    one = training.batch_at(stream, 7, batch=4, context=16, seed=0)
    assert torch.equal(one, training.batch_at(stream, 7, batch=4, context=16, seed=0))
    assert not torch.equal(one, training.batch_at(stream, 8, batch=4, context=16, seed=0))
    assert (one.diff(dim=1) == 1).all()  # windows are pieces of the stream
    epoch = torch.cat([training.batch_at(stream, s, batch=4, context=16, seed=0)[:, 0] for s in range(15)])
    assert len(epoch.unique()) == len(epoch)  # no window twice in an epoch


def test_learning_rate_rises_stays_and_falls():
    rates = [
        training.learning_rate(s, peak=1.0, steps=1000, warmup=100, decay=0.4) for s in (0, 99, 300, 599, 800, 999)
    ]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 1.0, 0.5, 0.0025])


def test_bad_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text file"):
        training.main(["--train", str(tmp_path / "none.txt"), "--out", str(tmp_path / "m")])
