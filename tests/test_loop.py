"""finetune: the loss by hand, the same bits after a stop, the best weights kept, nothing else touched."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.lm import divergence, perplexity
from quantlab.storage import read_parts
from quantlab.train.loop import batch_at, finetune, loss_on, rate_at, sample_text_tokens
from quantlab.train.run import History

VOCAB, LENGTH = 50, 32
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
}


def tiny(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes)).eval()


def text(n=400, seed=0):
    """A text that can be learnt: each token is three more than the one before, with a little noise."""
    noise = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    return ((3 + noise).cumsum(0) % VOCAB).long()


QUICK = {"steps": 12, "batch": 4, "window": 16, "learning_rate": 0.01, "progress": False}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- what a step does -------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    model, ids = tiny(), text(24).view(2, 12)
    logits, total = model(ids).logits, 0.0
    for row in range(2):
        for at in range(11):
            total -= torch.log_softmax(logits[row, at].double(), 0)[ids[row, at + 1]].item()
    assert loss_on(model, ids).item() == pytest.approx(total / 22, rel=1e-5)


def test_distillation_loss_by_hand():
    model, teacher, ids = tiny(), tiny(1), text(24).view(2, 12)
    p, q, total = teacher(ids).logits.double(), model(ids).logits.double(), 0.0
    for row in range(2):
        for at in range(11):
            a, b = p[row, at].softmax(0), q[row, at].softmax(0)
            total += sum((x * math.log(x / y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert loss_on(model, ids, teacher).item() == pytest.approx(total / 22, rel=1e-4)


@pytest.mark.parametrize("distil", [False, True])
def test_it_does_what_a_plain_loop_does(distil):
    model, teacher, tokens = tiny(), tiny(1) if distil else None, text()
    plain = copy.deepcopy(model)
    history = finetune(model, tokens, **QUICK, warmup=3, teacher=teacher)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(12):
        ids = batch_at(tokens, step, batch=4, window=16)
        optimizer.param_groups[0]["lr"] = 0.01 * min((step + 1) / 3, (12 - step) / 9)
        optimizer.zero_grad()
        logits = plain(ids[:, :-1]).logits.flatten(0, 1)
        if distil:
            p = teacher(ids[:, :-1]).logits.flatten(0, 1).softmax(-1).detach()
            loss = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
        else:
            loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)  # Adam's first steps have the size of the rate, 0.01


def test_it_learns():
    model, held = tiny(), text(64, seed=1)
    history = finetune(model, text(), **QUICK | {"steps": 60}, held_out=held)
    assert history.losses[-1] < history.losses[0] - 1.5  # from log 50 = 3.9 towards log 2 = 0.7
    assert history.held_out[-1] == pytest.approx(perplexity(model, held, window=16).nll)
    assert history.held_out[0] == pytest.approx(perplexity(tiny(), held, window=16).nll)
    assert history.checked_at == list(range(0, 61, 6))
    assert history.steps == 60


def test_distillation_comes_close_to_the_teacher():
    teacher, student, held = tiny(1), tiny(), text(64, seed=1)
    history = finetune(student, text(), **QUICK | {"steps": 60}, teacher=teacher, held_out=held)
    assert history.held_out[-1] < 0.3 * history.held_out[0]
    assert history.held_out[-1] == pytest.approx(divergence(teacher, student, held, window=16).kl)


def test_only_what_requires_grad_changes():
    model, before = tiny(), tiny()
    model.requires_grad_(False)
    layer = model.model.layers[1].mlp.up_proj.requires_grad_(True)
    finetune(model, text(), **QUICK)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    assert layer.weight.grad is None


def test_gradients_from_before_do_not_count():
    model, clean = tiny(), tiny()
    loss_on(model, text(24).view(2, 12)).backward()
    finetune(model, text(), **QUICK)
    finetune(clean, text(), **QUICK)
    assert same(model, clean)


def test_rate_warms_up_and_decays():
    assert [rate_at(s, peak=2.0, steps=8, warmup=4) for s in (0, 3, 4, 7)] == [0.5, 2.0, 2.0, 0.5]
    assert rate_at(0, peak=1.0, steps=1, warmup=1) == 1.0


def test_gradients_are_clipped(monkeypatch):
    norms, real = [], torch.nn.utils.clip_grad_norm_

    def watched(parameters, largest):
        parameters = list(parameters)
        norm = real(parameters, largest)
        norms.append((largest, math.sqrt(sum(p.grad.square().sum().item() for p in parameters))))
        return norm

    monkeypatch.setattr("quantlab.train.run.nn.utils.clip_grad_norm_", watched)
    model = tiny()
    model.lm_head.weight.data.mul_(100)
    finetune(model, text(), **QUICK)
    assert all(largest == 1.0 and norm <= 1.0001 for largest, norm in norms)


# --- batches ----------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_alone():
    stream = torch.arange(1000)
    one = batch_at(stream, 7, batch=4, window=16)
    assert torch.equal(one, batch_at(stream, 7, batch=4, window=16))
    assert not torch.equal(one, batch_at(stream, 8, batch=4, window=16))
    assert not torch.equal(one, batch_at(stream, 7, batch=4, window=16, seed=1))
    assert (one.diff(dim=1) == 1).all()  # windows are pieces of the stream


def test_the_rule_is_that_of_the_committed_checkpoints():
    """Another rule would be another training: data/checkpoints could not be made again."""
    stream = torch.arange(1000)
    assert batch_at(stream, 0, batch=4, window=16)[:, 0].tolist() == [483, 643, 947, 915]
    assert batch_at(stream, 40, batch=4, window=16, seed=2)[:, 0].tolist() == [170, 906, 794, 314]


@pytest.mark.parametrize("n", [16, 17, 31, 32, 33, 100])
def test_an_epoch_deals_out_every_window_once(n):
    stream, windows = torch.arange(n), max(1, (n - 15) // 16)
    dealt = torch.cat([batch_at(stream, s, batch=1, window=16) for s in range(windows)])
    assert len(dealt.flatten().unique()) == windows * 16
    firsts = {batch_at(stream, s * windows, batch=1, window=16)[0, 0].item() % 16 for s in range(300)}
    assert firsts == set(range(min(16, n - 16 * windows + 1)))  # each epoch begins anywhere there is room


def test_rows_are_dealt_out_whole():
    rows = torch.arange(50).view(10, 5)
    dealt = torch.cat([batch_at(rows, s, batch=4, window=99) for s in range(5)])
    assert dealt.shape == (20, 5)
    for epoch in dealt.split(10):  # the third batch spans two epochs
        assert torch.equal(epoch[epoch[:, 0].argsort()], rows)
    assert not torch.equal(dealt[:10], dealt[10:])


# --- stop, resume, keep the best --------------------------------------------------------------------------------


def dropout_model():
    return tiny(attention_dropout=0.3)


class CutOff(Exception):
    pass


def cut_at(step):
    def on_step(done, _loss):
        if done == step:
            raise CutOff

    return on_step


@pytest.mark.parametrize("cut", [0, 3, 5, 10])
@pytest.mark.parametrize("options", [{}, {"patience": 9}], ids=["last", "best"])
def test_a_run_cut_off_ends_with_the_bits_of_a_whole_one(tmp_path, cut, options):
    options = QUICK | options | {"held_out": text(64, seed=1), "check_every": 4, "folder": tmp_path / "run"}
    whole, part = dropout_model(), dropout_model()
    expected = finetune(whole, text(), **options | {"folder": None})
    with pytest.raises(CutOff):
        finetune(part, text(), **options, on_step=cut_at(cut))
    steps, resumed = [], dropout_model()
    torch.manual_seed(5)
    history = finetune(resumed, text(), **options, on_step=lambda step, _: steps.append(step))
    assert steps == list(range((cut + 1) // 4 * 4, 12))
    assert same(whole, resumed)
    assert (history.losses, history.held_out) == (expected.losses, expected.held_out)
    again = dropout_model()
    finetune(again, text(), **options, on_step=cut_at(-1))  # done: nothing is left to do
    assert same(whole, again)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["progress.json", "step_12.safetensors"]


def test_dropout_is_on_while_training_and_modes_come_back():
    model, modes = dropout_model(), []
    model.model.layers[0].train()
    before = [m.training for m in model.modules()]
    finetune(model, text(), **QUICK, on_step=lambda *_: modes.append(model.training))
    assert all(modes)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(CutOff):
        finetune(model, text(), **QUICK, on_step=cut_at(2))
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_the_callers_random_numbers_stay():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    finetune(dropout_model(), text(), **QUICK)
    sample_text_tokens(tiny(), 2, 5, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_follows_the_seed_not_the_callers_state():
    models = [dropout_model() for _ in range(3)]
    for model, state, seed in zip(models, (1, 2, 2), (0, 0, 1), strict=True):
        torch.manual_seed(state)
        finetune(model, text(), **QUICK, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[1], models[2])


def test_each_step_draws_its_own_random_numbers():
    model, seeds = tiny(), []
    model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    finetune(model, text(), **QUICK, seed=2)
    assert seeds == [2 * 1_000_003 + step for step in range(12)]


def test_early_stop_keeps_the_best():
    tokens, held = text(), torch.randint(VOCAB, (64,), generator=torch.Generator().manual_seed(1))
    model, seen = tiny(), {}
    history = finetune(
        model,
        tokens,
        **QUICK | {"steps": 60},
        held_out=held,
        check_every=2,
        patience=3,
        on_step=lambda step, _: seen.update({step + 1: copy.deepcopy(model)}),
    )
    best = history.best_step
    assert history.steps == best + 6 < 60  # three measurements, two steps apart, were no better
    assert history.held_out[history.checked_at.index(best)] == min(history.held_out)
    assert same(model, seen[best] if best else tiny())
    last = tiny()
    finetune(last, tokens, **QUICK | {"steps": 60}, held_out=held, check_every=2)
    assert not same(model, last)


def test_weights_that_training_only_harms_come_back():
    model, teacher = tiny(), tiny()
    history = finetune(model, text(), **QUICK, teacher=teacher, held_out=text(64, seed=1), patience=2)
    assert history.best_step == 0
    assert same(model, teacher)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = QUICK | {"folder": tmp_path / "run", "check_every": 4}

    def frozen(seed=0):
        model = tiny(seed)
        model.model.layers[0].requires_grad_(False)
        return model

    finetune(frozen(), text(), **options)
    for change in ({"learning_rate": 0.02}, {"steps": 13}, {"seed": 1}, {"batch": 5}, {"window": 8}, {"warmup": 5}):
        name, value = next(iter(change.items()))
        with pytest.raises(ValueError, match=f"holds a run with {name}=.*this one has {value}"):
            finetune(frozen(), text(), **options | change)
    others = [(frozen(1), text(), {}), (frozen(), text(seed=2), {}), (tiny(), text(), {})]
    others += [(frozen(), text(), {"teacher": tiny(3)}), (frozen(), text(), {"held_out": text(40)})]
    for model, tokens, change in others:
        with pytest.raises(ValueError, match="another model, teacher or text"):
            finetune(model, tokens, **options | change)


def test_a_checkpoint_that_is_not_complete_does_not_count(tmp_path):
    options, folder = QUICK | {"folder": tmp_path, "check_every": 4}, tmp_path
    with pytest.raises(CutOff):
        finetune(tiny(), text(), **options, on_step=cut_at(9))
    (folder / "step_12.safetensors.part").write_bytes(b"half a file")
    assert json.loads((folder / "progress.json").read_text())["about"]["steps"] == 12
    model, whole = tiny(), tiny()
    finetune(model, text(), **options)
    finetune(whole, text(), **QUICK)
    assert same(model, whole)


def damage(folder, **changes):
    """Changes in progress.json; None takes a key out."""
    path = folder / "progress.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "progress.json").write_text("{"), "progress.json is damaged"),
        (lambda folder: (folder / "progress.json").write_bytes(b"\xff"), "progress.json is damaged"),
        (lambda folder: damage(folder, losses=None), "progress.json is damaged: 'losses' is 'missing'"),
        (lambda folder: damage(folder, about=[1]), r"progress.json is damaged: 'about' is \[1\]"),
        (lambda folder: damage(folder, seconds="x"), "progress.json is damaged: 'seconds' is 'x'"),
        (lambda folder: cut_short(folder / "step_12.safetensors", 1000), "step_12.safetensors is truncated"),
        (lambda folder: cut_short(folder / "step_12.safetensors", 4), "step_12.safetensors is truncated"),
        (
            lambda folder: lacking(folder / "step_12.safetensors", "now."),
            "step_12.safetensors does not hold the weights",
        ),
        (lambda folder: lacking(folder / "step_12.safetensors", "optimizer."), "step_12.safetensors does not hold"),
    ],
    ids=range(9),
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, change, message):
    options = QUICK | {"folder": tmp_path}
    finetune(tiny(), text(), **options)
    change(tmp_path)
    model = tiny()
    with pytest.raises(ValueError, match=message):
        finetune(model, text(), **options)
    assert same(model, tiny())


def test_a_checkpoint_without_its_weights_is_refused(tmp_path):
    finetune(tiny(), text(), **QUICK, folder=tmp_path)
    (tmp_path / "step_12.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*step_12"):
        finetune(tiny(), text(), **QUICK, folder=tmp_path)


def cut_short(path, size):
    path.write_bytes(path.read_bytes()[:size])


def lacking(path, prefix):
    _, parts = read_parts(path)
    dropped = next(name for name in parts if name.startswith(prefix)).rpartition(".")[0]
    save_file({name: t for name, t in parts.items() if not name.startswith(dropped)}, path)


def test_buffers_are_kept_too(tmp_path):
    """A layer that remembers the largest value it saw, as an observer of a fake-quantized layer does."""

    def model():
        new = tiny()
        layer = new.model.layers[0].mlp
        layer.register_buffer("largest", torch.zeros(()))
        layer.register_forward_pre_hook(
            lambda m, x: m.training and m.largest.copy_(torch.maximum(m.largest, x[0].detach().max())) and None
        )
        return new

    whole, part, resumed = model(), model(), model()
    finetune(whole, text(), **QUICK)
    with pytest.raises(CutOff):
        finetune(part, text(), **QUICK, check_every=4, folder=tmp_path, on_step=cut_at(5))
    finetune(resumed, text(), **QUICK, check_every=4, folder=tmp_path)
    assert whole.model.layers[0].mlp.largest > 0
    assert same(whole, resumed)


def test_history_is_saved(tmp_path):
    history = finetune(tiny(), text(), **QUICK, held_out=text(40))
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert History().best_step is None
    (tmp_path / "history.json").write_text('{"losses": 3}')
    with pytest.raises(ValueError, match="history.json is damaged: 'losses' is 3"):
        History.load(tmp_path / "history.json")


# --- texts from the model ---------------------------------------------------------------------------------------


def test_sampled_texts_equal_sampling_without_a_cache():
    model = tiny()
    rows = sample_text_tokens(model, 3, 10, temperature=0.7, seed=4, progress=False)
    random, ids = torch.Generator().manual_seed(4), torch.zeros(3, 1, dtype=torch.int64)
    for _ in range(9):
        with torch.no_grad():
            chances = (model(ids).logits[:, -1] / 0.7).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=random)], dim=1)
    assert torch.equal(rows, ids)


def test_sampled_texts_follow_the_models_distribution():
    model = tiny()
    model.lm_head.weight.data.mul_(100)  # far from uniform
    second = sample_text_tokens(model, 4000, 2, batch=1000, progress=False)[:, 1]
    with torch.no_grad():
        expected = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].softmax(0)
    got = torch.bincount(second, minlength=VOCAB) / 4000
    assert (got - expected).abs().max() < 0.03  # four standard errors of a chance of one half
    assert expected.max() > 0.05


def test_sampled_texts_by_batches_and_starts():
    model = tiny()
    assert sample_text_tokens(model, 5, 4, batch=2, progress=False).shape == (5, 4)
    assert sample_text_tokens(model, 1, 1, start=7, progress=False).tolist() == [[7]]
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="no begin token"):
        sample_text_tokens(model, 5, 4)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2.5}, "steps must be an int"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"window": 1}, "window must be at least 2"),
        ({"window": 64}, "the model reads 2..32"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
        ({"warmup": 0}, "warmup must be 1..12"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"patience": 0, "held_out": text(64)}, "patience must be at least 1"),
        ({"patience": 2}, "pass held_out too"),
        ({"seed": -1}, "seed must be"),
        ({"held_out": text(10)}, "held_out must fill at least one window of 16, got 10"),
        ({"held_out": text(64).float()}, "tokens must be integers"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        finetune(tiny(), text(), **QUICK | change)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, 3], "must be one stream .n,. or rows"),
        (torch.zeros(0, dtype=torch.int64), "must be one stream"),
        (text()[:15], "must fill at least one window of 16, got 15"),
        (text() + VOCAB, "token ids lie in"),
        (text(66).view(2, 33), "the model reads 2..32"),
        (text(6).view(6, 1), "pieces of 1 tokens"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        finetune(tiny(), tokens, **QUICK)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        finetune(tiny().requires_grad_(False), text(), **QUICK)


def test_the_teacher_is_another_model():
    model = tiny()
    with pytest.raises(ValueError, match="another model"):
        finetune(model, text(), **QUICK, teacher=model)


def test_a_loss_that_is_no_number_stops_the_run():
    model = tiny()
    model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="loss of step 0 is nan"):
        finetune(model, text(), **QUICK)


@pytest.mark.parametrize("change", [{"temperature": 0}, {"length": 33}, {"count": 0}, {"start": VOCAB}])
def test_bad_sampling(change):
    options = {"count": 2, "length": 4, "progress": False} | change
    with pytest.raises(ValueError, match="must be"):
        sample_text_tokens(tiny(), options.pop("count"), options.pop("length"), **options)
