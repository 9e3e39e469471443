"""Writes golden/families.json: what Hugging Face transformers makes of one tiny checkpoint of each family.

Run where transformers is installed (the project never imports it), from the root:
    PYTHONPATH=. python tests/kernels/make_families_golden.py
The weights come from `families.py`; float32, eager attention. Beside each greedy token stands the gap between the two
largest logits; `largest` is the id of the largest logit at each position of the prompt, `last` the first logits of its
last position.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Mxfp4Config

from tests.kernels.families import FAMILIES
from tests.kernels.tiny import write_tiny_folder

PROMPT_TOKENS = 70
NEW_TOKENS = 40
SHOWN_LOGITS = 16
OUTPUT = Path(__file__).parent / "golden" / "families.json"


def main() -> None:
    cases = []
    for name, shape in FAMILIES.items():
        random = torch.Generator().manual_seed(shape.seed)
        prompt = torch.randint(0, shape.vocabulary, (PROMPT_TOKENS,), generator=random).tolist()
        with tempfile.TemporaryDirectory() as folder:
            path = write_tiny_folder(Path(folder) / "model", shape)
            kinds = dict(shape.settings)
            more = {"quantization_config": Mxfp4Config(dequantize=True)} if "quantization_config" in kinds else {}
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager", **more
            ).eval()
        tokens, gaps = list(prompt), []
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0]
            for _ in range(NEW_TOKENS):
                best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                gaps.append(round(float(best.values[0] - best.values[1]), 5))
        cases.append(
            {
                "family": name,
                "class": type(model).__name__,
                "prompt": prompt,
                "output": tokens[PROMPT_TOKENS:],
                "gaps": gaps,
                "largest": logits.argmax(-1).tolist(),
                "last": [round(float(value), 5) for value in logits[-1, :SHOWN_LOGITS]],
            }
        )
        print(
            f"{name:16} {type(model).__name__:20} smallest gap {min(gaps):.5f}, {len(set(tokens[PROMPT_TOKENS:]))} ids"
        )
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    OUTPUT.write_text(f'{{"made_with": {json.dumps(made_with)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
