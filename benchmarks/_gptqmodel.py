"""GPTQModel's GPTQ, run by gptq_peers.py in an environment of its own:  python _gptqmodel.py FOLDER SETTINGS

FOLDER and what is written and printed there are those of _llm_compressor.py.
"""

import json
import os
import sys
import time
from pathlib import Path

# On one core it gives itself one worker, and then asks for two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file


def main(folder: Path, how: dict) -> None:
    config = QuantizeConfig(
        bits=how["bits"],
        group_size=how["group_size"],
        sym=how["symmetric"],
        desc_act=bool(how["act_order"]),
        act_group_aware=False,
        damp_percent=how["damping"],
        format="gptq_v2",  # in the older layout the stored zero points are one too small
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(str(folder / "model"), config, dtype=torch.float32)
    windows = load_file(folder / "tokens.safetensors")["ids"]
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    start = time.process_time()
    model.quantize(data, batch_size=1)
    seconds = time.process_time() - start
    weights = {name: m.dequantize_weight().T for name, m in model.model.named_modules() if hasattr(m, "qweight")}
    save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / "peer.safetensors")
    print(f"\n{seconds}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
