"""One file a chapter: exercises, with hints, solutions and the tests that judge answers; material.py has their data."""

# The file of each chapter, in reading order.
CHAPTERS = {
    "0": "start",
    "1": "affine",
    "2": "calibration",
    "3": "granularity",
    "4": "codebooks",
    "5": "floats",
    "6": "measuring",
    "7": "integers",
    "8": "dynamic_static",
    "9": "outliers",
    "10": "gptq",
    "11": "awq",
    "12": "mixed",
    "13": "qat",
    "14": "learned_steps",
    "15": "qlora",
    "16": "real_model",
    "17": "rotations",
    "18": "kv",
    "19": "llamacpp",
    "20": "deployment",
    "22": "capstone",
}
