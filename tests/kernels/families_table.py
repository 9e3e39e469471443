"""Prints the table of docs/models.md: `PYTHONPATH=. python -m tests.kernels.families_table`.

Each line is one tiny random checkpoint, held against what Hugging Face transformers made of it (golden/families.json).
"""

import tempfile
from pathlib import Path

import numpy as np

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from tests.kernels.families import FAMILIES
from tests.kernels.test_families import BLOCKS, GOLDEN, step
from tests.kernels.test_native_step import same_bits
from tests.kernels.tiny import write_tiny_folder


def main() -> None:
    print("| witness | transformers' class | greedy ids | largest logits of the prompt | logits off by | CPU step |")
    print("|---|---|---|---|---|---|")
    for name, shape in FAMILIES.items():
        case = GOLDEN[name]
        with tempfile.TemporaryDirectory() as folder:
            path = write_tiny_folder(Path(folder) / "model", shape)
            decoder = TorchDecoder.load(path, blocks=BLOCKS)
            prompt = case["prompt"]
            every = step(prompt, samples=range(len(prompt)))
            logits = decoder.logits(every)
            tokens = [int(logits[-1].argmax())]
            while len(tokens) < len(case["output"]):
                tokens += decoder.step(step(tokens[-1:], len(prompt) + len(tokens) - 1)).tolist()
            native = NativeDecoder(open_checkpoint(path), blocks=BLOCKS, threads=1).logits(every)
            exact = same_bits(native, SpecifiedDecoder(open_checkpoint(path), blocks=BLOCKS).logits(every))
        equal = sum(one == other for one, other in zip(tokens, case["output"], strict=True))
        largest = int((logits.argmax(-1) == case["largest"]).sum())
        off = float(np.abs(logits[-1, : len(case["last"])] - case["last"]).max())
        step_is = "to the bit" if exact else "DIFFERS"
        ids = f"{equal} of {len(case['output'])} | {largest} of {len(prompt)}"
        print(f"| {name} | {case['class']} | {ids} | {off:.0e} | {step_is} |")


if __name__ == "__main__":
    main()
