"""Sweeps: many ways of quantizing one model, measured side by side, each result kept on disk.

python -m quantlab.sweep --out ledger.csv --methods rtn gptq "gptq act-order" nf4 --bits 8 4 3 2
python -m quantlab.sweep --model smollm2     # all that a real model is compared by, in ledger-smollm2.csv
"""

import argparse
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm.auto import tqdm

from quantlab import ledger
from quantlab.files import read_json, write_json
from quantlab.ledger import Row
from quantlab.lm import budget, chosen_model, linear_layers, load_lm, load_text, quantize_lm, token_stream
from quantlab.lm.checkpoint import fingerprint, hash_tensors
from quantlab.lm.smollm2 import packaged_gguf
from quantlab.methods import AWQ, GPTQ, NF4, RTN, W8A8, LLMInt8, Method, SmoothQuant, method_of, plain, settings_of

# What --methods offers: the short names of methods that round weights alone, with a word for a setting.
NAMED = {
    "rtn": RTN(),
    "rtn clip": RTN(clip_search=True),
    "nf4": NF4(),
    "gptq": GPTQ(),
    "gptq act-order": GPTQ(act_order=True),
    "awq": AWQ(),
}
# What SmolLM2 is measured by when no methods are named.
REAL_MODEL = [
    *(RTN(bits=b, group_size=g, symmetric=s) for s in (False, True) for b in (8, 4, 3) for g in (None, 128, 64, 32)),
    *(NF4(), GPTQ(bits=4), GPTQ(bits=4, group_size=64), GPTQ(bits=4, act_order=True), GPTQ(bits=3), AWQ(bits=4)),
    *(W8A8(per="tensor"), W8A8(per="token"), W8A8(per="static")),
    *(SmoothQuant(per="tensor"), SmoothQuant(per="static"), LLMInt8()),
]
TEXTS = {"smollm2": ("general_calibration", "general")}  # and for other models the stories


def grid(**lists: Sequence) -> list[dict]:
    """Every combination of these settings as a job for sweep; each keeps what its method takes, and none comes twice.

    Raises: ValueError without methods, for an unknown one, a setting that no method here takes, or no list.

    >>> grid(method=["rtn", "nf4"], bits=[4, 3], group_size=[64])    # NF4 has 4 bits, always
    [{'method': 'rtn', 'bits': 4, 'group_size': 64}, {'method': 'rtn', 'bits': 3, 'group_size': 64}, \
{'method': 'nf4', 'group_size': 64}]
    """
    for name, values in lists.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
            raise ValueError(f"{name} must be a list of what to try, got {values!r}")
    taken = {"method"}.union(*(settings_of(method) for method in lists.get("method", [])))
    unknown = sorted(lists.keys() - taken)
    if "method" not in lists or unknown:
        raise ValueError(f"no method here takes {', '.join(unknown)}" if unknown else "method=[...] is missing")
    jobs = []
    for values in itertools.product(*lists.values()):
        job = dict(zip(lists, values, strict=True))
        job = {name: v for name, v in job.items() if name == "method" or name in settings_of(job["method"])}
        if job not in jobs:
            jobs.append(job)
    return jobs


def sweep(
    model: str, jobs: Sequence[dict | Method], *, calibration: Tensor | None = None, tokens: Tensor | None = None,
    window: int = 512, folder="sweeps", n_jobs: int = -1, progress: bool = True,
) -> list[Row]:  # fmt: skip
    """A ledger row for each job, in the order of the jobs: methods, GPTQ(bits=3), or dicts of what quantize_lm takes.

    model is a name for load_lm. Each process loads it once, needs the memory of two models, and computes on one thread;
    n_jobs of them run side by side through joblib, -1 as many as there are cores. More machines: with a
    dask.distributed Client at hand, call it inside `with joblib.parallel_config(backend="dask")`; the rows are the
    same. The ratios of times in a row (prefill, decode) and its seconds depend on what else runs; all else does not.

    Each row is written to the folder as soon as it is measured, in a JSON file named by a hash of what it depends on:
    the model's weights, both texts, the settings, quantlab's own sources and the versions below it. What is there is
    not measured again, so a sweep that was interrupted goes on, and one that was finished takes only as long as loading
    the model. A file that is damaged is measured again, with a warning.

    calibration and tokens (n,): by default the first 16,384 and 4,096 of the stories, or for "smollm2" of general
    English; of the second as many as quantlab.lm.budget allows.
    Raises: ValueError for an unknown method or option, before anything runs, and what quantize_lm raises.
    """
    methods = [_method(job) for job in jobs]
    settings = [_settings(method) for method in methods]
    calibration, tokens, weights = _inputs(model, calibration, tokens)
    texts = hash_tensors({"calibration": calibration, "tokens": tokens})
    shared = [weights, texts, window, _sources()]
    keys = [hashlib.sha256(json.dumps([shared, s], sort_keys=True).encode()).hexdigest() for s in settings]
    folder, todo = Path(folder), dict(zip(keys, methods, strict=True))
    rows = {key: row for key in todo if (row := _read(folder / f"{key}.json")) is not None}
    work = [
        delayed(_measure)(key, model, weights, method, calibration, tokens, window)
        for key, method in todo.items()
        if key not in rows
    ]
    done = Parallel(n_jobs=n_jobs, return_as="generator_unordered")(work) if work else []
    for key, row in tqdm(done, total=len(work), desc="sweep", disable=not progress, leave=False):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{key}.json", row, _settings(todo[key]))
        rows[key] = row
    return [rows[key] for key in keys]


def label(job, model=None) -> tuple[str, int, str]:
    """(method, bits, group) of a job as the ledger names it; the model only for bits that differ by layer.

    With {layer: bits} it is "mixed ..." and bits the mean over the weights, rounded.

    >>> label(GPTQ(bits=3, act_order=True)), label({"method": "rtn", "group_size": None})
    (('gptq act-order', 3, '128'), ('rtn', 4, 'row'))
    """
    method = _method(job)
    name, bits = method.label, method.ledger_bits
    if isinstance(bits, Mapping):
        counts = {layer: m.weight.numel() for layer, m in linear_layers(model).items()}
        bits = round(sum(bits[layer] * n for layer, n in counts.items()) / sum(counts.values()))
        name = f"mixed {name}"
    return name, bits, method.ledger_group


def _method(job) -> Method:
    """The method of a job: one already, or a dict like {"method": "rtn", "bits": 3}."""
    if isinstance(job, Method):
        return job
    if not isinstance(job, Mapping) or "method" not in job:
        raise ValueError(f'a job is a method or a dict like {{"method": "rtn", "bits": 3}}, got {job!r}')
    return method_of(**{"name" if key == "method" else key: value for key, value in job.items()})


def _settings(method: Method) -> dict:
    """All settings of a method, as JSON can hold them."""
    return {"method": method.name} | {name: plain(value) for name, value in method.settings.items()}


def _inputs(name: str, calibration, tokens) -> tuple[Tensor, Tensor, str]:
    """Both texts, and the hash of the weights that the name stands for now."""
    model, tokenizer = load_lm(name)
    texts = TEXTS.get(name, ("calibration", "eval"))
    if calibration is None:
        calibration = token_stream(tokenizer, load_text(texts[0]))[:16384]
    if tokens is None:
        tokens = token_stream(tokenizer, load_text(texts[1]))[: budget(model, 4096, least=2048)]
    return calibration, tokens, fingerprint(model)


@lru_cache(maxsize=1)
def _loaded(name: str, weights: str):
    """The model, once for each process; the weights it must have are part of the question."""
    model, _ = load_lm(name)
    if fingerprint(model) != weights:
        raise ValueError(f"{name!r} is another model on this worker; give a name or folder that all of them share")
    return model


def _measure(
    key: str, name: str, weights: str, method: Method, calibration: Tensor, tokens: Tensor, window: int
) -> tuple[str, Row]:
    """Runs in a worker: one way of quantizing, measured."""
    model = _loaded(name, weights)
    label_, bits, group = label(method, model)
    with _one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* tokens are few for")  # told by quantize_lm where a person calls it
        new, report = quantize_lm(model, calibration, method, window=window, progress=False)
        row = ledger.measure(model, new, tokens, method=label_, bits=bits, group=group, report=report, window=window)
    return key, row


@contextmanager
def _one_thread() -> Iterator[None]:
    """The workers share the cores; threads of each would only stand in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _sources() -> str:
    """Of everything in quantlab that computes, and the versions of what it computes with."""
    here = Path(__file__).parent
    whole = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    for path in sorted(
        [*here.glob("*.py"), *(path for room in ("linear", "lm", "methods") for path in here.glob(f"{room}/*.py"))]
    ):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _digest(row: dict) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _write(path: Path, row: Row, settings: dict) -> None:
    """Whole, or not there."""
    content = {"settings": settings, "row": asdict(row), "sha256": _digest(asdict(row))}
    write_json(path, content)


def _read(path: Path) -> Row | None:
    """The row in a file; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        content = read_json(path, {"row": dict, "sha256": str})
        row = content["row"]
        if content["sha256"] != _digest(row):
            raise ValueError("its row does not match its hash")
        return ledger.row_of(row)
    except ValueError as error:
        warnings.warn(f"{path} is damaged and is measured again ({error!r})", stacklevel=3)
        return None


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """The command line: measure the float model and these ways, and write their rows in place of older ones."""
    parser = argparse.ArgumentParser(prog="python -m quantlab.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="the ledger for the rows; ledger.csv, or ledger-NAME.csv of another model")
    parser.add_argument("--methods", nargs="+", choices=list(NAMED), metavar="METHOD", help=", ".join(NAMED))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2], metavar="BITS")
    parser.add_argument("--group", type=int, default=128, help="group size; NF4 keeps its blocks of 64")
    parser.add_argument("--model", default="bundled", help="smollm2, a folder or a hub name")
    parser.add_argument("--cache", default="sweeps", help="folder of what was measured before")
    parser.add_argument("--n-jobs", type=int, default=-1, help="processes side by side; -1 one a core")
    chosen = parser.parse_args(arguments)
    jobs = list(REAL_MODEL) if chosen.model == "smollm2" and not chosen.methods else []
    for name in chosen.methods or ([] if jobs else NAMED):
        if name == "nf4":
            jobs.append(NAMED[name])
        else:
            jobs += [replace(NAMED[name], bits=bits, group_size=chosen.group) for bits in chosen.bits]
    model = chosen_model() if chosen.model == "bundled" else chosen.model
    out = chosen.out or ("ledger.csv" if model == "bundled" else f"ledger-{_file_name(model)}.csv")
    rows = [_float_row(chosen.model), *sweep(chosen.model, jobs, folder=chosen.cache, n_jobs=chosen.n_jobs)]
    for row in rows:
        ledger.append(row, out)
    print(ledger.Table(rows))
    if model == "smollm2" and packaged_gguf() is not None:
        print("These float weights once stood on a 4-bit grid of groups of 32 (Q4_1, with a real offset).")
    print(f"{len(rows)} rows in {out}")
    return rows


def _file_name(model: str) -> str:
    """What of a model's name or folder goes into a file's name."""
    folder = Path(model).expanduser().resolve()
    return re.sub(r"[^\w.-]+", "-", folder.name if folder.is_dir() else model)


def _float_row(name: str) -> Row:
    """What the others are compared with, on the text that sweep reads."""
    model, (_, tokens, _) = load_lm(name)[0], _inputs(name, None, None)
    with tqdm(total=1, desc="float model", leave=False):
        return ledger.measure(model, model, tokens, method="float")


if __name__ == "__main__":
    from quantlab.sweep import main as run  # by its own name: what runs in a worker must be importable there

    run()
