"""The bundled model with its weights packed against floats on the same grids: memory held, time to read and write.

Memory is what parameters and buffers hold; times are ratios to the float model in the same run, one core. Bars: the
packed model computes the same bits as the floats on its grid, and holds at most its file's bytes and 3 %.
"""

import sys
import tempfile
from pathlib import Path

import torch

from quantlab import ledger, lm
from quantlab.methods import AWQ, GPTQ, NF4, RTN


def held(model) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def layers_held(model) -> int:
    """Bytes of the linear layers alone."""
    _, blocks = lm.blocks_of(model)
    return held(blocks)


def main() -> int:
    torch.set_num_threads(1)
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    calibration = lm.token_stream(tokenizer, lm.load_text("calibration"))[:4096]
    tokens, good = lm.token_stream(tokenizer, lm.load_text("eval"))[:512], True
    print(f"{'':16}{'blocks, kB':>12}{'of float32':>12}{'prefill':>10}{'decode':>10}")
    for method in (RTN(), RTN(bits=3), NF4(double_quant=True), AWQ(), GPTQ(act_order=True)):
        new, report = lm.quantize_lm(model, calibration, method, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            lm.save_quantized(Path(folder) / "m", new, report.qtensors)
            packed, _ = lm.load_quantized(Path(folder) / "m", packed=True)
        with torch.no_grad():
            same = torch.equal(packed(tokens[None]).logits, new(tokens[None]).logits)
        layers = sum(q.nbytes for q in report.qtensors.values())
        good &= same and layers_held(packed) <= 1.03 * layers
        times = ledger.latency(new, packed, tokens)
        share = layers_held(packed) / layers_held(new)
        print(
            f"{method.label:16}{layers_held(packed) / 1e3:12.0f}{share:12.3f}{times.prefill:9.2f}x{times.decode:9.2f}x"
            f"{'' if same else '   NOT the same outputs'}"
        )
    print(f"same outputs, and no more memory than the file: {'met' if good else 'MISSED'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
