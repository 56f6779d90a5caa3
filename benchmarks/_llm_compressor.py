"""llm-compressor's GPTQ, run by gptq_peers.py in an environment of its own:  python _llm_compressor.py FOLDER SETTINGS

FOLDER holds model/ (config, float weights, tokenizer) and tokens.safetensors (windows, length). Written there:
peer.safetensors, the weights of the linear layers as their codes stand for them. Printed last: CPU seconds.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: Path, how: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    windows = load_file(folder / "tokens.safetensors")["ids"]
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    grid = {"num_bits": how["bits"], "type": "int", "symmetric": how["symmetric"], "strategy": "group"}
    groups = {"all": {"targets": ["Linear"], "weights": grid | {"group_size": how["group_size"]}}}
    recipe = GPTQModifier(
        config_groups=groups, ignore=["lm_head"], actorder=how["act_order"], dampening_frac=how["damping"]
    )
    start = time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.process_time() - start
    weights = {name: m.weight for name, m in model.named_modules() if getattr(m, "quantization_scheme", None)}
    save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / "peer.safetensors")
    print(f"\n{seconds}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
