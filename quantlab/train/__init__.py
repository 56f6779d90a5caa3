"""Training with quantization in the loop: lsq.py and few_levels.py (how weights are rounded), fake_quant.py (layers
and models made of them), loop.py (the one training loop), lora.py and memory.py (QLoRA)."""
