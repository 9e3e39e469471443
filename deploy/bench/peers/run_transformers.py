"""Hugging Face transformers as a peer: one workload through `generate`, on the GGUF dequantised when loaded.

    PYTHON run_transformers.py JOB.json      PYTHON has torch, transformers, gguf, accelerate; see `deploy.bench.peer`

Attention by sdpa; weights in the type the job names. Requests of a workload form one static batch (all prompts are
equally long, so nothing is padded); a shared prefix is computed once per request, as `generate` has no prefix cache.
`"one_at_a_time"` in the job serves them one after the other: what a server without batching does.
"""

import time

BORN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({"version": _version(job)} | ({} if job["task"] == "prepare" else generate(job))))


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """The workload once, greedy, after the first token of a cold process."""
    import torch
    from transformers import (  # type: ignore[import-not-found]
        AutoModelForCausalLM,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    class Watch(StoppingCriteria):  # type: ignore[misc,no-any-unimported]
        """Called after every token of a batch; stops nothing."""

        first: float | None = None

        def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
            self.first = self.first or time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool)

    torch.set_num_threads(job["threads"])
    path = Path(job["model"])
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None  # lengths are fixed

    def run(prompts: list[list[int]], out_tokens: int) -> tuple[float, int]:
        """The moment of the first token, and the number of tokens of each prompt."""
        ids, watch = torch.tensor(prompts), Watch()
        with torch.inference_mode():
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=out_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        assert watch.first is not None
        return watch.first, said.shape[1] - ids.shape[1]

    run([job["warm"]], 1)
    cold_start_s = time.perf_counter() - BORN
    prompts, first_s, tokens = job["prompts"], [], []
    batches = [[prompt] for prompt in prompts] if job.get("one_at_a_time") else [prompts]
    start = time.perf_counter()
    for batch in batches:
        first, count = run(batch, job["out_tokens"])
        first_s += [first - start] * len(batch)
        tokens += [count] * len(batch)
    return {
        "first_s": first_s,
        "end_s": time.perf_counter() - start,
        "tokens": tokens,
        "cold_start_s": cold_start_s,
        "rss_mib": _peak_rss_mib(),
    }


def _version(job: dict[str, Any]) -> str:
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}, {job['dtype']}"


def _peak_rss_mib() -> float:
    """VmHWM; not getrusage, which also counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
