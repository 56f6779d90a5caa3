"""A language model: load it, measure it, look at its layers' inputs, quantize it."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from quantlab.affine import check_int
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.metrics import kl_per_position

DATA = Path(__file__).resolve().parent.parent / "data"
SEPARATOR = "<|endoftext|>"  # a line of it stands between two documents of a text file


# --- loading ----------------------------------------------------------------------------------------------------


def load_lm(name_or_path: str = "bundled"):
    """(model, tokenizer) of a causal language model, in float32 on the CPU, ready to evaluate.

    "bundled" is the model in data/model, or what the environment variable QUANTLAB_MODEL names. Else a folder,
    or a hub name like "org/name" or, to pin it, "org/name@revision". Only safetensors are read, no code is run.

    Raises: FileNotFoundError if there is no such folder, or the hub cannot give the model (offline, or unknown).
    """
    name = str(name_or_path)
    if name == "bundled":
        name = os.environ.get("QUANTLAB_MODEL") or "bundled"
    folder = DATA / "model" if name == "bundled" else Path(name).expanduser()
    if not name or not folder.is_dir():
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    small = sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 100e6
    with _quiet(small):  # no progress bar for what takes less than a second
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _quiet(quiet: bool):
    """transformers' own progress bars off for a while, and then as they were."""
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _download(name: str) -> Path:
    """The local copy of a hub model, fetched through huggingface_hub where it is not yet in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is no folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}). "
            'Check the name and the connection, download it once and pass its folder, or use load_lm("bundled")'
        ) from error


def read_documents(paths) -> list[str]:
    """The documents of UTF-8 text files, which lines `<|endoftext|>` separate; empty ones are dropped.

    Raises: FileNotFoundError if a file is missing, ValueError if one holds no text.
    """
    documents = []
    if isinstance(paths, str | Path):
        paths = [paths]
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no text file {path}")
        found = [d.strip() for d in path.read_text(encoding="utf-8-sig").split(SEPARATOR)]
        if not any(found):
            raise ValueError(f"{path} holds no text")
        documents += [d for d in found if d]
    return documents


def load_text(name: str) -> list[str]:
    """The documents of "eval" or "calibration" (short stories written for this workbook), or of a text file.

    Raises: FileNotFoundError if it is missing, ValueError if it holds no text.
    """
    path = DATA / "text" / f"{name}.txt"
    return read_documents([path if path.is_file() else name])


def token_stream(tokenizer, documents) -> Tensor:
    """All documents as one row of ids, (tokens,) int64; the begin token, where the model has one, before each."""
    documents = [documents] if isinstance(documents, str) else list(documents)
    if not documents:
        raise ValueError("there is no document to make tokens of")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in start + row], dtype=torch.int64)


def generate(
    model, tokenizer, prompt: str = "", *, tokens: int = 120, temperature: float = 0.0, seed: int = 0
) -> str:
    """The prompt and how the model goes on, until it ends the text or `tokens` are said.

    temperature divides the logits before sampling: 0 always takes the likeliest token, 1 samples from the
    model's own distribution. The same seed gives the same text.

    Raises: ValueError if temperature < 0, tokens < 1, there is no token to start from, or prompt and tokens together
    are longer than the model can read.
    """
    if not 0 <= temperature < math.inf or tokens < 1:
        raise ValueError(f"need temperature >= 0 and tokens >= 1, got {temperature} and {tokens}")
    random = torch.Generator().manual_seed(seed)
    start, longest = token_stream(tokenizer, [prompt]), _longest(model)
    if not 1 <= len(start) <= longest - tokens:
        raise ValueError(
            f"need a prompt of 1..{longest - tokens} tokens before {tokens} more, got {len(start)}"
        )
    said, cache, ids = [], None, start[None].to(model.device)
    with torch.no_grad(), _evaluating(model):
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[0, -1].float().cpu(), out.past_key_values
            token = _choose(logits, temperature, random)
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
            ids = torch.tensor([[token]], device=model.device)
    return tokenizer.decode(start.tolist() + said, skip_special_tokens=True)


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chance = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(chance, 1, generator=random))


# --- measuring --------------------------------------------------------------------------------------------------


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood; stderr says how far another text of this length might be."""

    value: float
    stderr: float
    nll: float  # nats per token
    tokens: int  # predicted


class Divergence(NamedTuple):
    """How far a model's predictions are from a reference model's on the same text."""

    kl: float  # mean KL(reference || model), nats per token
    stderr: float
    top1: float  # fraction of positions where both would say the same token
    tokens: int


def perplexity(model, tokens: Tensor, *, window: int = 512, stride: int | None = None) -> Perplexity:
    """How surprised the model is by a text: exp of the mean negative log-likelihood of each token.

    The tokens are read in windows; a new one starts every `stride` (default: window, no overlap). Each token is
    predicted once, in the first window that reaches it, from the tokens before it in that window; the very first
    token of a window without overlap is context only. A smaller stride gives more context and costs more.
    The standard error takes the windows as independent samples (delta method for the exp).

    Shapes: tokens (n,), one stream. Raises: ValueError if n < 2, window < 2, or not 1 <= stride <= window.
    """
    window, stride = _checked_windows(model, tokens, window, stride)
    sums, counts = [], []
    for ids, scored in _windows(tokens, window, stride):
        with torch.no_grad(), _evaluating(model):
            logits = model(ids.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
        nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        sums += (nll * scored).sum(1).double().tolist()
        counts += scored.sum(1).tolist()
    mean, stderr = _ratio(sums, counts)
    value = math.exp(mean) if mean < 700 else math.inf  # a wrecked model may be this sure of the wrong token
    return Perplexity(value, value * stderr, mean, int(sum(counts)))


def divergence(
    reference, model, tokens: Tensor, *, window: int = 512, stride: int | None = None
) -> Divergence:
    """KL(reference || model) and top-1 agreement over the same windows as perplexity; stderr over windows.

    Unlike a difference of perplexities it cannot cancel out, and its error bar is far smaller: both
    models read the same text.
    """
    window, stride = _checked_windows(model, tokens, window, stride)
    window, stride = _checked_windows(reference, tokens, window, stride)
    sums, counts, agreed = [], [], 0.0
    for ids, scored in _windows(tokens, window, stride):
        with torch.no_grad(), _evaluating(reference), _evaluating(model):
            p, q = (
                m(ids.to(m.device), use_cache=False).logits[:, :-1].float().cpu() for m in (reference, model)
            )
        sums += (kl_per_position(p, q) * scored).sum(1).double().tolist()
        counts += scored.sum(1).tolist()
        agreed += ((p.argmax(-1) == q.argmax(-1)) * scored).sum().item()
    mean, stderr = _ratio(sums, counts)
    return Divergence(mean, stderr, agreed / sum(counts), int(sum(counts)))


def _longest(model) -> int:
    """How many tokens the model can read at once."""
    return getattr(model.config, "max_position_embeddings", None) or 2**31


def _checked_windows(model, tokens: Tensor, window: int, stride: int | None) -> tuple[int, int]:
    """Window and stride; a window that is longer than the model can read is cut to that."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(
            f"need one row of at least 2 tokens, got {getattr(tokens, 'shape', type(tokens).__name__)}"
        )
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be integers, int64, got {tokens.dtype}")
    least, most, vocabulary = int(tokens.min()), int(tokens.max()), model.config.vocab_size
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"token ids lie in 0..{vocabulary - 1}, got {least}..{most}; is it another model's tokenizer?"
        )
    window = min(check_int(window, "window", 2), _longest(model))
    stride = window if stride is None else check_int(stride, "stride")
    if not 1 <= stride <= window:
        raise ValueError(f"need 1 <= stride <= window, got stride={stride}, window={window}")
    return window, stride


@contextmanager
def _evaluating(model):
    """Dropout off for a while, and then every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _windows(tokens: Tensor, window: int, stride: int, batch: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows (batch, window), and which of their predictions count, (batch, window - 1), as 0 or 1."""
    rows, reached = [], 1  # tokens predicted so far; the first has nothing before it
    for start in range(0, max(1, len(tokens) - 1), stride):
        ids = tokens[start : start + window]
        if len(ids) < 2 or start + len(ids) <= reached:
            break
        scored = (torch.arange(start + 1, start + len(ids)) >= reached).long()
        rows.append((ids, scored))
        reached = start + len(ids)
    for i in range(0, len(rows), batch):
        full = [r for r in rows[i : i + batch] if len(r[0]) == window]
        if full:
            yield torch.stack([r[0] for r in full]), torch.stack([r[1] for r in full])
        for ids, scored in rows[i + len(full) : i + batch]:  # the last one may be shorter
            yield ids[None], scored[None]


def _ratio(sums: list, counts: list) -> tuple[float, float]:
    """Mean per token, and its standard error from the spread between windows."""
    s, n = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    mean = s.sum() / n.sum()
    whole = (
        n >= n.max() / 2
    )  # a short last window has next to no residual, and would make the spread look small
    if whole.sum() < 2:
        return mean.item(), math.nan
    residual = ((s - mean * n) / n.mean())[whole]
    return mean.item(), (residual.std() / math.sqrt(len(s))).item()


# --- looking inside ---------------------------------------------------------------------------------------------


def blocks_of(model) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks: the one list of modules as long as the config says."""
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(
        f"no list of {depth} blocks in {type(model).__name__}; is it a decoder-only language model?"
    )


def linear_layers(model) -> dict[str, nn.Module]:
    """The linear layers inside the blocks by full name: nn.Linear, and GPT-2's Conv1D. Embeddings and head are not."""
    prefix, blocks = blocks_of(model)
    return {f"{prefix}.{name}": m for name, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as (out, in). Conv1D stores it the other way round."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def _put_weight(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.data.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def capture_inputs(model, tokens: Tensor, layers, *, window: int = 512) -> dict[str, Tensor]:
    """What the named layers read while the model reads the tokens: {name: (tokens, in_features)}, float32.

    Raises: ValueError if the model has no layer of that name.
    """
    window, _ = _checked_windows(model, tokens, window, None)
    modules, caught = dict(model.named_modules()), {name: [] for name in layers}
    for name in caught:
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}; linear_layers(model) lists them")

    def catch(name):
        return lambda _module, inputs: caught[name].append(inputs[0].detach().float().flatten(0, -2).cpu())

    hooks = [modules[name].register_forward_pre_hook(catch(name)) for name in caught]
    try:
        with torch.no_grad(), _evaluating(model):
            for ids in tokens.split(window):
                model(ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


# --- quantizing a whole model -----------------------------------------------------------------------------------


class LayerReport(NamedTuple):
    """What quantizing did to one layer."""

    name: str
    output_error: float  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration tokens
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    bits_per_weight: float
    seconds: float


@dataclass
class QuantizeReport:
    """What quantize_lm did: the settings, a row for each layer, the codes, and the bytes of the whole model."""

    method: str
    settings: dict
    calibration_tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    qtensors: dict[str, QTensor] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    nbytes: int = 0  # of the whole model: packed layers, everything else in 16 bits
    bits_per_parameter: float = 0.0  # 8 * nbytes / parameters

    def __str__(self) -> str:
        lines = [f"{'layer':44}{'output error':>13}{'weight error':>13}{'bits':>7}{'ms':>7}"]
        lines += [
            f"{r.name:44}{r.output_error:13.2e}{r.weight_error:13.2e}{r.bits_per_weight:7.2f}{r.seconds * 1e3:7.0f}"
            for r in self.layers
        ]
        lines.append(
            f"{self.method}: {self.nbytes:,} bytes, {self.bits_per_parameter:.2f} bits per parameter, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join(lines)


def quantize_lm(
    model,
    tokens: Tensor,
    *,
    method: str = "rtn",
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    window: int = 512,
    progress: bool = True,
) -> tuple[nn.Module, QuantizeReport]:
    """A new model whose linear layers hold quantized weights (as floats on the grid), and a report.

    method "rtn" rounds to nearest, "gptq" runs GPTQ; group_size=None gives one scale a row. The walk goes block by
    block and holds one block's inputs at a time: each block is calibrated on what the quantized blocks before it
    give out. Layers that read the same input (q, k, v; gate, up) share one Hessian and one factorization.
    The given model is not changed; embeddings, norms and head stay as they are.

    Shapes: tokens (n,), cut into windows. Raises: ValueError for an unknown method, fewer tokens than one window
    can use, or settings that gptq_quantize or quantize_tensor refuse.
    """
    rounders = {"rtn": _round_to_nearest, "gptq": gptq_quantize}
    if method not in rounders:
        raise ValueError(f"method must be one of {sorted(rounders)}, got {method!r}")
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if method == "gptq":
        settings |= {"act_order": act_order, "damping": damping}
    window, _ = _checked_windows(model, tokens, window, None)
    began, new = time.perf_counter(), copy.deepcopy(model).eval()
    report = QuantizeReport(method, settings, len(tokens) // window * window or len(tokens))
    prefix, blocks = blocks_of(new)
    with torch.no_grad():
        hidden, arguments = _block_inputs(new, tokens, window)
        bar = tqdm(blocks, desc=f"{method} {bits} bits", unit="block", disable=not progress, leave=False)
        for i, block in enumerate(bar):
            for shared in _hessians(block, hidden, arguments[i]):
                _quantize_shared(f"{prefix}.{i}.", shared, rounders[method], settings, report)
            bar.set_postfix(error=f"{report.layers[-1].output_error:.1e}")
            hidden = [_first(block(h, **arguments[i])) for h in hidden]
    report.seconds = time.perf_counter() - began
    report.nbytes = model_bytes(new, report.qtensors)
    report.bits_per_parameter = 8 * report.nbytes / sum(p.numel() for p in new.parameters())
    return new, report


def model_bytes(model, qtensors: dict[str, QTensor] | None = None) -> int:
    """Bytes to store a model: its quantized layers packed, every other parameter in 16 bits."""
    quantized = {f"{name}.weight": q for name, q in (qtensors or {}).items()}
    return sum(
        quantized[name].nbytes if name in quantized else 2 * p.numel() for name, p in model.named_parameters()
    )


def _round_to_nearest(
    weight: Tensor, hessian: Hessian, *, bits: int, group_size: int | None, symmetric: bool
) -> QTensor:
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric)


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


def _block_inputs(model, tokens: Tensor, window: int) -> tuple[list[Tensor], list[dict]]:
    """The input of block 0 for each batch of windows, and for each block its other arguments (masks, positions).

    All batches have one shape, and those arguments depend on the shape alone, so one full pass shows them.
    """
    _, blocks = blocks_of(model)
    hidden, arguments = [], [{} for _ in blocks]

    def remember(i):
        def hook(_block, inputs, keywords):
            arguments[i].update(keywords)
            if i == 0:
                hidden.append(inputs[0])
                if len(hidden) > 1:
                    raise _Stop

        return hook

    hooks = [b.register_forward_pre_hook(remember(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for ids in _whole_windows(tokens, window):
            try:
                model(ids.to(model.device), use_cache=False)
            except _Stop:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, arguments


def _whole_windows(tokens: Tensor, window: int) -> Iterator[Tensor]:
    """(1, window) at a time; a tail that fills no window is left out, unless it is all there is."""
    count = len(tokens) // window
    return iter(tokens[: count * window].view(count, 1, window) if count else tokens[None, None])


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _hessians(block, hidden: list[Tensor], arguments: dict) -> list[tuple[dict[str, nn.Module], Hessian]]:
    """One (layers, Hessian) for each distinct input in the block: layers handed the same tensor share it."""
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # the tensor is kept, so that its id stays its own

    def look(name):
        return lambda _module, inputs: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    _run_hooked(block, hidden[:1], arguments, {m: look(name) for name, m in layers.items()})
    groups = [(names, Hessian(x.shape[-1])) for x, names in seen.values()]

    def add(hessian):
        return lambda _module, inputs: hessian.add(inputs[0]) and None

    _run_hooked(block, hidden, arguments, {layers[names[0]]: add(hessian) for names, hessian in groups})
    return [({name: layers[name] for name in names}, hessian) for names, hessian in groups]


def _run_hooked(block, hidden: list[Tensor], arguments: dict, hooks: dict[nn.Module, Callable]) -> None:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        for h in hidden:
            block(h, **arguments)
    finally:
        for handle in handles:
            handle.remove()


def _quantize_shared(prefix: str, shared, rounder: Callable, settings: dict, report: QuantizeReport) -> None:
    """Quantize the layers of one Hessian in place (they belong to the new model) and write their report rows."""
    layers, hessian = shared
    for name, layer in layers.items():
        began, weight = time.perf_counter(), weight_of(layer).clone()
        q = rounder(weight, hessian, **settings)
        _put_weight(layer, q.dequantize())
        seconds, new = time.perf_counter() - began, weight_of(layer)
        weight_error = ((weight - new).square().sum() / weight.square().sum().clamp(min=1e-38)).item()
        report.qtensors[prefix + name] = q
        report.layers.append(
            LayerReport(
                prefix + name, hessian.output_error(weight, new), weight_error, q.bits_per_element, seconds
            )
        )
