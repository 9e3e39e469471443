"""Writes golden/smollm2_135m.json: what Hugging Face transformers generates greedily from the default model.

Run where transformers is installed (the project never imports it): python tests/kernels/make_golden.py MODEL.gguf
The weights are the dequantised ones of the GGUF, in float32; attention is eager; every prompt runs alone. Beside each
token stands the gap between the two largest logits: a decoder that rounds differently may differ where the gap is tiny.
"""

import json
import random
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 48
OUTPUT = Path(__file__).parent / "golden" / "smollm2_135m.json"

SHORT = {
    "capital": "The capital of Portugal is",
    "one_word": "Rain",
    "counting": "1, 2, 3, 4, 5,",
    "recipe": "To bake a simple loaf of bread, first",
    "dialogue": '"Where were you last night?" asked the lighthouse keeper.\n"',
    "fraction": "If three quarters of a number is 27, the number is",
    "list": "Five things to pack for a mountain hike:\n1.",
    "python": "def median(values: list[float]) -> float:\n    ",
    "c": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "json": '{"name": "copper", "symbol": "Cu", "atomic_number":',
    "japanese": "春の朝、川沿いの道を歩いていると、",
    "russian": "В старом доме на краю деревни жил",
    "arabic": "في صباح يوم ممطر خرج الصياد إلى",
    "emoji": "Weather today: ☀️🌧️🌈 and tomorrow: ",
}

CHATS = {
    "chat_short": [{"role": "user", "content": "Name three rivers in South America."}],
    "chat_system": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why does ice float on water?"},
    ],
    "chat_turns": [
        {"role": "user", "content": "I planted tomatoes last week."},
        {"role": "assistant", "content": "Lovely! Keep the soil moist and give them sun."},
        {"role": "user", "content": "How much water do they need each day?"},
    ],
}


def station_log(lines: int, seed: int) -> str:
    """A made-up logbook of about 22 tokens a line: long, regular, and no line like another."""
    choose = random.Random(seed)
    places = ["north mast", "boat shed", "lamp room", "stone pier", "upper gallery", "fuel store"]
    events = [
        "found dry and in order",
        "painted",
        "needs a new hinge",
        "cleaned by the second keeper",
        "locked at dusk",
    ]
    return "".join(
        f"Day {day}. Wind {choose.randint(0, 12)}, visibility {choose.randint(1, 40)} km; "
        f"{choose.choice(places)} {choose.choice(events)}.\n"
        for day in range(1, lines + 1)
    )


def prompts(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, list[int]]:
    texts = dict(SHORT)
    for name, messages in CHATS.items():
        texts[name] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    texts["log_300"] = station_log(14, seed=1)
    texts["log_1000"] = station_log(45, seed=2) + "Day 46."
    question = station_log(44, seed=3) + "\nOn which day was the wind strongest?"
    texts["chat_1000"] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """NEW_TOKENS ids and the gaps between their logits and the runners-up; an end-of-text id does not stop it."""
    ids, gaps = [], []
    step = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(NEW_TOKENS):
        (best, second), (token, _) = step.logits[0, -1].topk(2)
        ids.append(int(token))
        gaps.append(round(float(best - second), 5))
        step = model(token.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
    return ids, gaps


def main() -> None:
    gguf_file = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for name, prompt in prompts(tokenizer).items():
        output, gaps = greedy(model, prompt)
        cases.append({"name": name, "prompt": prompt, "output": output, "gaps": gaps})
        print(f"{name:12} {len(prompt):5} tokens, smallest gap {min(gaps):.5f}: {tokenizer.decode(output)[:60]!r}")
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__, "model": gguf_file.name}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(f'{{"made_with": {json.dumps(made_with)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
