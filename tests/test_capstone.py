"""The capstone: true bytes, text that nobody has read, cheats refused by name, and a best that can be beaten."""

import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab import capstone, lm
from quantlab.capstone import refusing, scoring
from quantlab.capstone.__main__ import main
from quantlab.capstone.controls import shuffled, with_half_scales
from quantlab.capstone.hidden import FOLDER, TEXTS, path_of
from quantlab.capstone.planning import PARTS, part_layers
from quantlab.granularity import PerAxis, PerGroup, quantize_tensor
from quantlab.lm.saving import WEIGHTS
from quantlab.lm.walk import with_codes
from quantlab.methods import GPTQ, RTN
from quantlab.storage import load_tensors, save_tensors

# --- the hidden text


def test_sealing_gives_every_text_back_and_shows_none_of_it():
    for text in ("", "a", "Grün, 量化 and \0", "word " * 5000):
        sealed = capstone.seal(text)
        assert capstone.unseal(sealed) == text
        assert sealed.isascii()
    for name in TEXTS:
        sealed = path_of(name).read_text()
        words = {
            word.lower() for document in capstone.hidden_text(name) for word in re.findall("[A-Za-z]{7,}", document)
        }
        assert len(words) > 100
        assert not any(word in sealed.lower() for word in words)
        assert b"the" not in __import__("base64").b64decode(sealed).lower()


@pytest.mark.parametrize("damage", [lambda s: s[:-30], lambda s: "A" + s[1:], lambda s: "no base64", lambda s: "ä"])
def test_damage_to_a_sealed_text_is_seen(damage):
    with pytest.raises(ValueError, match="damaged"):
        capstone.unseal(damage(capstone.seal("Once upon a time " * 9)))


def sentences(text: str) -> set[str]:
    parts = (re.sub(r"\W+", " ", part).strip().lower() for part in re.split(r"(?<=[.!?])\s+|\n", text))
    return {part for part in parts if len(part.split()) > 1}


def test_hidden_texts_are_long_enough_and_share_no_sentence_with_any_other():
    others = "\n".join(path.read_text(encoding="utf-8") for path in (lm.DATA / "text").glob("*.txt"))
    hidden = {name: "\n".join(capstone.hidden_text(name)) for name in TEXTS}
    assert all(len(text.split()) >= 2500 for text in hidden.values())
    assert all(not sentences(text) & sentences(others) for text in hidden.values())
    assert not sentences(hidden["stories"]) & sentences(hidden["general"])


def test_no_notebook_and_no_recipe_reads_a_hidden_text_but_to_show_that_it_is_refused():
    root = FOLDER.parent.parent
    files = [*root.glob("notebooks/src/*.py"), *root.glob("recipes/*.py"), *root.glob("benchmarks/*.py")]
    words = r"unseal|hidden_text\(|path_of\(|\.sealed|capstone\.hidden"
    found = {
        (path.name, line.strip())
        for path in files
        for line in path.read_text("utf-8").splitlines()
        if re.search(words, line)
    }
    assert found == {
        ("22_capstone.py", "from quantlab.capstone.hidden import path_of"),
        ("22_capstone.py", 'print(path_of("stories").read_text()[:303])'),  # sealed, as it lies there
        ("22_capstone.py", 'hidden_text("stories")'),  # by a recipe, which is refused
    }


# --- a toy


@pytest.fixture(scope="module")
def toy():
    """(a small random model with the bundled model's vocabulary, the tokenizer)"""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=2048, tie_word_embeddings=True, max_position_embeddings=256, **sizes)
        model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data.mul_(5)
    for layer in lm.linear_layers(model).values():
        layer.weight.data.mul_(8)
    return model, lm.load_lm()[1]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(scoring, "tokens_for", lambda model, tokens, least=0: 600)


def rounded(model, tokens, bits=4):
    """A recipe: the embedding, and all linear layers, to nearest."""
    return capstone.by_method(model, tokens, method=RTN(bits=bits, group_size=32), embedding_bits=bits)


def saved(model, folder: Path, tokenizer=None) -> Path:
    new, codes = rounded(model, None)
    lm.save_quantized(folder, new, codes, tokenizer)
    return folder


# --- saving: an embedding in few bits


def test_an_embedding_is_saved_packed_and_comes_back_equal_bit_by_bit(toy, tmp_path):
    model, _ = toy
    new, codes = rounded(model, None)
    size = lm.save_quantized(tmp_path / "m", new, codes)
    whole = lm.save_quantized(tmp_path / "whole", lm.quantize_lm(model, bits=4, group_size=32, progress=False)[0], {})
    assert size < whole / 2
    assert abs(size - lm.model_bytes(new, codes)) < 1000 * len(codes)  # but for the header
    for packed in (False, True):
        back = lm.load_quantized(tmp_path / "m", packed=packed)[0]
        assert torch.equal(back.model.embed_tokens.weight, new.model.embed_tokens.weight)
        assert back.lm_head.weight is back.model.embed_tokens.weight
        ids = torch.arange(50)[None]
        assert torch.allclose(back(ids).logits, new(ids).logits, atol=1e-5)


def test_a_head_of_its_own_is_quantized_and_saved_too(tmp_path):
    config = LlamaConfig(
        vocab_size=64, tie_word_embeddings=False, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert list(lm.embedding_layers(model)) == ["model.embed_tokens", "lm_head"]
    new, codes = rounded(model, None)
    lm.save_quantized(tmp_path / "m", new, codes)
    back = lm.load_quantized(tmp_path / "m")[0]
    for name, layer in lm.embedding_layers(back).items():
        assert torch.equal(layer.weight, codes[name].dequantize())
    with pytest.raises(ValueError, match="no linear layer 'model.norm', nor an embedding"):
        lm.save_quantized(tmp_path / "n", new, {"model.norm": codes["lm_head"]})


# --- scores


def test_a_score_is_that_of_the_file(toy):
    model, tokenizer = toy
    found = capstone.score(rounded, on=toy, who="anna")
    new, codes = rounded(model, None)
    tokens = lm.token_stream(tokenizer, capstone.hidden_text("stories"))[:600]
    wanted = lm.divergence(model, new, tokens)
    assert (found.kl, found.top1, found.tokens) == pytest.approx((wanted.kl, wanted.top1, wanted.tokens))
    assert (found.recipe, found.who, found.budget, found.model) == ("rounded", "anna", "2.2 MB", "LlamaForCausalLM")
    assert found.limit == round(2_200_000 * sum(p.numel() for p in model.parameters()) / 3_672_320)
    assert found.seconds > 0
    assert found.memory >= 0


def test_bytes_are_all_of_the_file(toy, tmp_path):
    model, _ = toy
    folder = saved(model, tmp_path / "m")
    found = capstone.score(folder, on=toy)
    assert found.nbytes == (folder / WEIGHTS).stat().st_size
    parts = sum(value.nbytes for value in load_tensors(folder / WEIGHTS).values())
    assert found.nbytes > parts  # the header counts, too
    assert found.recipe == "m"


def test_what_a_recipe_returns_in_memory_and_in_a_folder_scores_alike(toy, tmp_path):
    def to_folder(model, tokens):
        return saved(model, tmp_path / "m")

    def report(model, tokens):
        return lm.quantize_lm(model, tokens, "rtn", bits=4, group_size=32, progress=False)

    first, second = capstone.score(rounded, on=toy), capstone.score(to_folder, on=toy)
    assert (first.kl, first.nbytes, first.weights) == (second.kl, second.nbytes, second.weights)
    assert capstone.score(report, on=toy).nbytes > first.nbytes  # its embedding has 16 bits


def test_over_the_budget_is_said_and_does_not_rank(toy):
    def float_model(model, tokens):
        return model, {}

    found = capstone.score(float_model, on=toy)
    assert found.kl < 1e-6
    assert not found.fits
    assert "OVER the budget" in str(found)
    assert capstone.best([found], "2.2 MB", found.model) is None


def test_a_recipe_cannot_move_the_goal(toy):
    model, _ = toy

    def in_place(model, tokens):
        tokens.zero_()
        new, codes = rounded(model, None, bits=2)
        model.load_state_dict(new.state_dict())
        return new, codes

    before = copy.deepcopy(model.state_dict())
    assert capstone.score(in_place, on=toy).kl == pytest.approx(capstone.score(partial(rounded, bits=2), on=toy).kl)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_practice_makes_the_same_file_and_measures_it_elsewhere(toy):
    nbytes, found = capstone.practice(rounded, on=toy)
    scored = capstone.score(rounded, on=toy)
    assert nbytes == scored.nbytes
    assert found.kl != scored.kl
    given = scoring.given_tokens(*toy, capstone.BUDGETS["2.2 MB"])
    held_out = lm.token_stream(toy[1], lm.load_text("calibration"))[-scoring.HELD_OUT :]
    assert len(given) == 600  # as few_tokens has it
    assert not any(torch.equal(held_out[:50], part) for part in given.unfold(0, 50, 1))


def test_memory_and_time_are_those_of_the_recipe(toy):
    def hungry(model, tokens):
        ballast = torch.ones(60_000_000)  # 240 MB
        for _ in range(20):
            ballast.add_(1)
        del ballast
        return rounded(model, tokens)

    found = capstone.score(hungry, on=toy)
    assert found.memory > 150e6
    assert found.cpu_seconds > 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "must be a function of model and tokens"),
        (lambda model, tokens: None, "a recipe returns"),
        (lambda model, tokens: model, "a recipe returns"),
        (lambda model, tokens: (model, model), "must be a Mapping"),
        (lambda model, tokens: (model, {"x": 1}), "no linear layer 'x'"),
        (lambda model, tokens: "no such folder", "no quantized.safetensors"),
    ],
)
def test_bad_recipes(toy, recipe, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        capstone.score(recipe, on=toy)


def test_bad_budgets_and_what_a_recipe_raises(toy):
    with pytest.raises(ValueError, match="budget must be one of 2.2 MB, 1.5 MB, 70 MB"):
        capstone.score(rounded, "9 MB", on=toy)

    for on in ("bundled", toy[0], (toy[0], None), ("bundled", toy[1])):
        with pytest.raises(ValueError, match="must be"):
            capstone.score(rounded, on=on)

    def breaks(model, tokens):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        capstone.score(breaks, on=toy)


def test_shuffled_codes_have_the_bytes_and_say_nothing(toy):
    model, _ = toy
    new, codes = rounded(model, None)
    mixed, dealt = shuffled(model, codes)
    assert sum(q.nbytes for q in dealt.values()) == sum(q.nbytes for q in codes.values())
    for name, q in codes.items():
        assert torch.equal(q.codes.flatten().sort().values, dealt[name].codes.flatten().sort().values)
    ids = torch.arange(60)[None]
    off, on = ((m(ids).logits - model(ids).logits).norm() for m in (mixed, new))
    assert off > 2 * on
    with pytest.raises(ValueError, match="must be a QTensor"):
        shuffled(model, {"lm_head": torch.zeros(3)})


def test_half_scales_halve_the_scales_and_hardly_move_a_weight(toy):
    model, _ = toy
    new, codes = rounded(model, None)
    halved, fewer = with_half_scales(model, codes)
    for name, q in codes.items():
        assert fewer[name].nbytes == q.nbytes - 2 * q.qparams.scale.numel()
        assert torch.allclose(fewer[name].dequantize(), q.dequantize(), rtol=2**-9)
    found = capstone.score(lambda model, tokens: (halved, fewer), on=toy)
    assert found.kl == pytest.approx(capstone.score(rounded, on=toy).kl, rel=0.05)


# --- cheats


def refused(cheat: str, recipe, toy) -> str:
    with pytest.raises(capstone.Refused) as caught:
        capstone.score(recipe, on=toy)
    assert caught.value.cheat == cheat
    assert str(caught.value).startswith(f"refused: {cheat} (")
    assert capstone.CHEATS[cheat] in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda: capstone.hidden_text("stories"),
        lambda: path_of("general").read_bytes(),
        lambda: open(path_of("stories")).close(),
        lambda: open(bytes(path_of("stories"))).close(),
        lambda: (FOLDER.parent / "text" / ".." / "capstone" / "stories.sealed").read_text(),
        lambda: io.FileIO(path_of("stories")),
        lambda: os.open(path_of("stories"), os.O_RDONLY),
        lambda: np.fromfile(path_of("stories"), np.uint8),
        lambda: os.symlink(path_of("stories"), "innocent"),
        lambda: os.link(path_of("stories"), "innocent"),
        lambda: os.rename(path_of("stories"), "innocent"),
        lambda: shutil.copy(path_of("stories"), "innocent"),
        lambda: subprocess.run([sys.executable, "-c", f"open({str(path_of('stories'))!r})"], check=True),
        lambda: os.system(f"echo {path_of('stories')}"),
    ],
)
def test_reading_the_hidden_text_is_refused_even_if_the_error_is_caught(toy, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def curious(model, tokens):
        try:
            read()
        except Exception:  # noqa: BLE001  whatever it catches
            pass
        return rounded(model, tokens)

    refused("hidden text", curious, toy)
    assert capstone.score(rounded, on=toy).tokens > 0  # the next one is not punished for it
    assert capstone.hidden_text("stories")  # and outside of a recipe it opens
    assert list(tmp_path.iterdir()) == []


def test_another_name_of_the_hidden_text_does_not_help(toy, tmp_path):
    try:
        os.link(path_of("stories"), tmp_path / "innocent")
    except OSError:  # another disk
        os.symlink(path_of("stories"), tmp_path / "innocent")

    def curious(model, tokens):
        return (tmp_path / "innocent").read_text(), {}

    refused("hidden text", curious, toy)


def test_a_fence_is_no_wall_as_the_notebook_says(toy):
    """A C library opens the file by itself, and Python does not hear of it."""

    def past_the_fence(model, tokens):
        torch.from_file(str(path_of("stories")), size=100, dtype=torch.uint8)
        return rounded(model, tokens)

    assert capstone.score(past_the_fence, on=toy).tokens > 0


def test_reading_other_files_is_not_refused(toy, tmp_path):
    def diligent(model, tokens):
        lm.load_text("calibration")
        (tmp_path / "mine.sealed").write_text("a")
        (tmp_path / "mine.sealed").read_text()
        subprocess.run([sys.executable, "-c", "1"], check=True)
        open(os.dup(1), closefd=True).close()  # a number in place of a name
        return rounded(model, tokens)

    assert capstone.score(diligent, on=toy).tokens > 0


@pytest.mark.parametrize("persistent", [True, False])
def test_floats_in_buffers_are_refused(toy, persistent):
    def smuggles(model, tokens):
        new, codes = rounded(model, tokens)
        new.model.layers[0].register_buffer("secret", torch.randn(8, 8), persistent=persistent)
        return new, codes

    assert "model.layers.0.secret: torch.float32 (8, 8)" in refused("smuggled tensors", smuggles, toy)

    def as_parameter(model, tokens):
        new, codes = rounded(model, tokens)
        new.model.secret = nn.Parameter(torch.zeros(3))
        return new, codes

    refused("smuggled tensors", as_parameter, toy)


def test_other_tensors_in_the_file_are_refused(toy, tmp_path):
    folder = saved(toy[0], tmp_path / "m")
    stored = load_tensors(folder / WEIGHTS)
    save_tensors(folder / WEIGHTS, stored | {"model.layers.0.secret": torch.randn(8, 8)})
    assert "model.layers.0.secret in quantized.safetensors" in refused("smuggled tensors", folder, toy)


def test_packed_layers_are_no_smuggling(toy, tmp_path):
    def packed(model, tokens):
        saved(model, tmp_path / "m")
        new, _ = lm.load_quantized(tmp_path / "m", packed=True)
        embedding = quantize_tensor(model.model.embed_tokens.weight, bits=4, granularity=PerGroup(32), symmetric=False)
        return new, {"model.embed_tokens": embedding}

    assert capstone.score(packed, on=toy).weights == capstone.score(saved(toy[0], tmp_path / "n"), on=toy).weights


def test_a_changed_tokenizer_is_refused(toy, tmp_path):
    model, tokenizer = toy
    assert capstone.score(saved(model, tmp_path / "own", tokenizer), on=toy).tokens > 0
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["mountain"])
    refused("changed tokenizer", saved(model, tmp_path / "m", other), toy)
    folder = saved(model, tmp_path / "n", tokenizer)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused("changed tokenizer", folder, toy)


@pytest.mark.parametrize("name", ["modeling_mine.py", "weights.bin", "extra/run.sh", "codes.npy", "A.PY"])
def test_code_in_the_folder_is_refused(toy, tmp_path, name):
    folder = saved(toy[0], tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("print('hello')")
    if name == "extra/run.sh":
        refused("other files", folder, toy)  # the folder itself comes first
    else:
        assert name in refused("code in the file", folder, toy)


def test_a_configuration_that_asks_for_code_is_refused(toy, tmp_path):
    folder = saved(toy[0], tmp_path / "m", toy[1])
    for name in ("config.json", "tokenizer_config.json"):
        path, before = folder / name, (folder / name).read_text()
        path.write_text(json.dumps(json.loads(before) | {"auto_map": {"AutoModel": "mine.Model"}}))
        refused("code in the file", folder, toy)
        path.write_text(before)


def test_other_files_and_another_configuration_are_refused(toy, tmp_path):
    folder = saved(toy[0], tmp_path / "m")
    (folder / "more.safetensors").write_bytes(b"numbers")
    assert "more.safetensors" in refused("other files", folder, toy)
    (folder / "more.safetensors").unlink()
    before = json.loads((folder / "config.json").read_text())
    for change in ({"rms_norm_eps": 1e-3}, {"secret": [1.5] * 100}):
        (folder / "config.json").write_text(json.dumps(before | change))
        assert repr(next(iter(change))) in refused("changed configuration", folder, toy)


def test_a_damaged_file_is_an_error_with_its_name(toy, tmp_path):
    folder = saved(toy[0], tmp_path / "m")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is truncated"):
        capstone.score(folder, on=toy)


def test_every_cheat_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'refused("{cheat}"' in here for cheat in refusing.CHEATS)


# --- the leaderboard


@pytest.fixture(scope="module")
def row():
    return capstone.Score(
        recipe="mine", who="anna", budget="2.2 MB", model="bundled", limit=2_200_000, nbytes=2_000_000, kl=0.05,
        kl_error=0.001, top1=0.9, tokens=4000, seconds=3.0, cpu_seconds=3.0, memory=10**8, text="a", weights="b",
    )  # fmt: skip


def test_append_replaces_ones_own_row_and_sorts(row, tmp_path):
    path = tmp_path / "board.jsonl"
    capstone.append(row, path)
    capstone.append(replace(row, who="ben", kl=0.04), path)
    capstone.append(replace(row, who="cy", kl=0.01, nbytes=2_300_000), path)
    capstone.append(replace(row, budget="1.5 MB", limit=1_500_000, nbytes=1_400_000, kl=0.3), path)
    rows = capstone.append(replace(row, kl=0.03), path)
    assert [(r.who, r.budget, r.kl) for r in rows] == [
        ("anna", "2.2 MB", 0.03), ("ben", "2.2 MB", 0.04), ("cy", "2.2 MB", 0.01), ("anna", "1.5 MB", 0.3),
    ]  # fmt: skip
    assert capstone.read(path) == rows
    assert capstone.best(rows, "2.2 MB").who == "anna"
    shown = repr(capstone.Board(rows)).splitlines()
    assert [line.split()[:2] for line in shown if "mine" in line] == [
        ["1.", "mine"],
        ["2.", "mine"],
        ["over", "mine"],
    ] + [["1.", "mine"]]


def test_only_rows_of_one_budget_model_and_text_are_ranked_together(row):
    rows = [row, replace(row, model="smollm2", kl=0.01), replace(row, text="b", kl=0.02), replace(row, kl=0.04)]
    lines = repr(capstone.Board(rows)).splitlines()
    heads = [line for line in lines if "MB, " in line]
    assert heads == ["2.2 MB, bundled, hidden text a", "2.2 MB, bundled, hidden text b", "2.2 MB, smollm2"]
    assert [line.split()[0] for line in lines if "mine" in line] == ["1.", "2.", "1.", "1."]
    assert capstone.best([row, *rows[1::2]], "2.2 MB").kl == 0.04
    assert capstone.best(rows, "2.2 MB", "smollm2").kl == 0.01
    with pytest.raises(ValueError, match="one hidden text"):
        capstone.best(rows, "2.2 MB")


def test_many_programs_append_at_once(row, tmp_path):
    path = tmp_path / "board.jsonl"
    threads = [threading.Thread(target=capstone.append, args=(replace(row, who=str(i)), path)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(capstone.read(path)) == 12


def test_merging_a_class(row, tmp_path, capsys):
    a, b, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "class.jsonl"
    capstone.append(row, a)
    capstone.append(replace(row, who="ben", kl=0.07), a)
    capstone.append(replace(row, kl=0.04), b)  # anna again, and better
    assert main(["merge", str(a), str(b), "--out", str(out)]) == 0
    assert [(r.who, r.kl) for r in capstone.read(out)] == [("anna", 0.04), ("ben", 0.07)]
    assert capsys.readouterr().out.splitlines()[0] == "2.2 MB, bundled"
    assert capstone.merge([a, a]) == capstone.read(a)
    assert capstone.merge([a, b]) == capstone.merge([b, a])
    assert main(["show", str(a)]) == 0


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", '{"who": "me"}', None, {"kl": "0.1"}, {"kl": float("nan")}, {"budget": "9 MB"}, {"nbytes": 1.5}],
)
def test_a_damaged_leaderboard_names_file_and_line(row, tmp_path, capsys, line):
    path = tmp_path / "board.jsonl"
    capstone.append(row, path)
    if line == "":
        path.write_text(path.read_text() + "\n\n")
        assert capstone.read(path) == [row]
        return
    good = json.loads(path.read_text())
    bad = "null" if line is None else line if isinstance(line, str) else json.dumps(good | line)
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(ValueError, match=r"board.jsonl, line 2 is damaged"):
        capstone.read(path)
    assert main(["merge", str(path), "--out", str(tmp_path / "out.jsonl")]) == 1
    assert "line 2" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


# --- the reference recipes


def test_the_reference_rows_are_those_of_the_recipes_and_of_this_text():
    rows = [row for row in capstone.read() if row.model == "bundled"]
    for budget in ("2.2 MB", "1.5 MB"):
        assert {row.recipe for row in rows if row.budget == budget} == capstone.REFERENCE[budget].keys()
        assert capstone.best(rows, budget) is not None
    assert {row.who for row in rows} == {"reference"}
    digests = {name: scoring._digest("".join(capstone.hidden_text(name)).encode()) for name in TEXTS}
    for row in capstone.read():
        assert row.text == digests[capstone.BUDGETS[row.budget].text]
        assert row.limit == capstone.BUDGETS[row.budget].nbytes


@pytest.mark.skipif(lm.chosen_model() != "bundled", reason="the rows are the bundled model's")
@pytest.mark.parametrize(("budget", "name"), [("2.2 MB", "nearest"), ("2.2 MB", "nf4"), ("1.5 MB", "qat")])
def test_a_reference_row_comes_out_again(budget, name, monkeypatch):
    monkeypatch.undo()  # all of the tokens
    row = next(row for row in capstone.read() if (row.budget, row.recipe) == (budget, name))
    found = capstone.score(capstone.REFERENCE[budget][name], budget, name=name)
    assert found.nbytes == row.nbytes
    assert found.kl == pytest.approx(row.kl, rel=0.02)
    assert found.tokens == row.tokens


def test_gptq_and_mixed_recipes_fit_what_they_are_told_to(toy):
    model, tokenizer = toy
    tokens = scoring.given_tokens(*toy, capstone.BUDGETS["2.2 MB"])[:512]
    limit = capstone.BUDGETS["2.2 MB"].limit(model)
    settings = {"nbytes": limit, "choices": (2, 3, 4, 8), "group_size": 32}
    mixed = capstone.score(lambda model, _: capstone.mixed_gptq(model, tokens, **settings), on=toy)
    assert mixed.fits
    assert mixed.nbytes > 0.7 * limit
    plain = {"bits": 2, "embedding_bits": 2, "group_size": 32}
    assert mixed.kl < capstone.score(lambda model, _: capstone.gptq(model, tokens, **plain), on=toy).kl


def trained_and_halved(model, tokens):
    """Notebook 14's trained 3 bits, a 3-bit embedding, and scales in 16 bits, which is what makes them fit."""
    _, embedding = capstone.quantize_embeddings(model, partial(capstone.in_groups, bits=3))
    trained = load_tensors(lm.DATA / "checkpoints/lsq/lsq3_finer.safetensors")
    return with_half_scales(model, embedding | trained)


# What the knapsack of mixed_gptq chose in groups of 64, with the bytes that scales in 16 bits save on top.
BITS = {"q": (3, 4, 4, 4), "k": (4, 5, 5, 5), "v": (5, 6, 6, 6), "o": (5, 5, 5, 5),
        "gate": (5, 4, 4, 4), "up": (4, 4, 4, 4), "down": (5, 4, 4, 4)}  # fmt: skip


def mixed_and_halved(model, tokens):
    """GPTQ in groups of 64 with bits by layer, a 5-bit embedding, and scales in 16 bits, which pay for the groups."""
    kinds = [(name, name.split(".")) for name in lm.linear_layers(model)]
    bits = {name: BITS[parts[-1].removesuffix("_proj")][int(parts[2])] for name, parts in kinds}
    new, embedding = capstone.quantize_embeddings(model, partial(capstone.in_groups, bits=5, group_size=64))
    _, report = lm.quantize_lm(new, tokens, GPTQ(bits=bits, group_size=64), in_place=True, progress=False)
    return with_half_scales(model, embedding | dict(report.qtensors))


@pytest.mark.skipif(lm.chosen_model() != "bundled", reason="checkpoint and bits are the bundled model's")
@pytest.mark.parametrize(("budget", "entry"), [("1.5 MB", trained_and_halved), ("2.2 MB", mixed_and_halved)])
def test_the_best_reference_can_be_beaten(budget, entry, monkeypatch):
    monkeypatch.undo()
    best = capstone.best(capstone.read(), budget)
    mine = capstone.score(entry, budget)
    assert mine.fits
    assert mine.kl < best.kl - 3 * (mine.kl_error**2 + best.kl_error**2) ** 0.5


# --- plans


def test_plans_count_the_bytes_of_the_file_and_cost_what_a_part_costs_alone(toy):
    model, tokenizer = toy
    tokens = lm.token_stream(tokenizer, lm.load_text("calibration"))[:600]
    table = capstone.plans(model, tokens, tokens, bits=(2, 4), groups=(16, 32), progress=False)
    assert set(table.costs) == {
        (m, g, part, b) for m in ("nearest", "GPTQ") for g in (16, 32) for part in PARTS for b in (2, 4)
    }
    for group, bits, method in ((32, (4, 2, 4), "rtn"), (16, (2, 4, 2), "gptq")):
        own = dict(zip(("embedding", "attention", "mlp"), bits, strict=True))
        recipe = partial(capstone.by_part, method=method, group_size=group, **own)
        size = capstone.score(recipe, on=toy).nbytes
        assert abs(table.nbytes(group, dict(zip(PARTS, bits, strict=True))) - size) < 200  # numbers of other lengths
    whole = {
        name: capstone.in_groups(lm.weight_of(m), bits=2, group_size=32) for name, m in lm.linear_layers(model).items()
    }
    for part, names in part_layers(model).items():
        if part != "embedding":
            new, _ = with_codes(model, {name: whole[name] for name in names})
            assert table.costs["nearest", 32, part, 2] == pytest.approx(lm.divergence(model, new, tokens).kl, rel=1e-4)
    chosen = dict(zip(PARTS, (2, 4, 4), strict=True))
    assert table.kl("GPTQ", 16, chosen) == sum(table.costs["GPTQ", 16, part, b] for part, b in chosen.items())


def test_codes_of_no_layer_or_of_another_shape_are_refused(toy):
    model, _ = toy
    name, layer = next(iter(lm.linear_layers(model).items()))
    q = quantize_tensor(lm.weight_of(layer)[:1], bits=4, granularity=PerAxis(0))  # would be spread over all rows
    for codes, words in (
        ({name: q}, f"{name} is .*, its codes are"),
        ({"model.norm": q}, "no linear layer 'model.norm'"),
    ):
        with pytest.raises(ValueError, match=words):
            with_codes(model, codes)


def test_parts_hold_every_layer_once(toy):
    names = [name for part in part_layers(toy[0]).values() for name in part]
    assert sorted(names) == sorted([*lm.linear_layers(toy[0]), *lm.embedding_layers(toy[0])])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": (1,)}, "bits must be 2..8"),
        ({"groups": (0,)}, "groups must be"),
        ({"methods": ("awq",)}, "methods must"),
    ],
)
def test_bad_plans(toy, settings, message):
    tokens = torch.arange(100)
    with pytest.raises(ValueError, match=message):
        capstone.plans(toy[0], tokens, tokens, progress=False, **settings)
