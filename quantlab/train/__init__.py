"""Training with quantization in the loop.

How weights are rounded: few_levels.py, rounding.py, lsq.py; layers and models that round while they train:
fake_quant.py; the one training loop: run.py, loop.py; QLoRA: lora.py, memory.py.
"""
