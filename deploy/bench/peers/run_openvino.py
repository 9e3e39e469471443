"""OpenVINO GenAI as a peer: one workload through its ContinuousBatchingPipeline, on the GGUF as it is.

    PYTHON run_openvino.py JOB.json      PYTHON has openvino-genai; see `deploy.bench.peer`

Prefix caching on; what it does by itself on a CPU (KV in 8 bits among it) is left alone.
"""

import time

BORN = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

CACHE_GIB = 1
STEP_TOKENS = 2048


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    answer = json.dumps({"version": _version()} | ({} if job["task"] == "prepare" else generate(job)))
    print(answer, flush=True)
    os._exit(0)  # the pipeline's own end takes seconds


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """The workload once, greedy, after the first token of a cold process."""
    import numpy
    import openvino  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]

    scheduling = openvino_genai.SchedulerConfig()
    scheduling.enable_prefix_caching = True
    scheduling.max_num_batched_tokens = STEP_TOKENS
    scheduling.max_num_seqs = len(job["prompts"])
    scheduling.cache_size = CACHE_GIB
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        job["model"], scheduling, "CPU", {"INFERENCE_NUM_THREADS": job["threads"]}
    )

    def run(first_id: int, prompts: list[list[int]], out_tokens: int) -> tuple[list[float], list[int]]:
        """The moment of each prompt's first token, and how many came."""
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = out_tokens
        wanted.ignore_eos = True
        wanted.do_sample = False
        handles = [
            pipeline.add_request(first_id + at, openvino.Tensor(numpy.array([prompt], numpy.int64)), wanted)
            for at, prompt in enumerate(prompts)
        ]
        first, counts = [0.0] * len(prompts), [0] * len(prompts)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for at, handle in enumerate(handles):
                while handle.can_read():
                    first[at] = first[at] or now
                    counts[at] += sum(len(output.generated_ids) for output in handle.read().values())
        return first, counts

    run(0, [job["warm"]], 1)
    cold_start_s = time.perf_counter() - BORN
    start = time.perf_counter()
    first, counts = run(1, job["prompts"], job["out_tokens"])
    return {
        "first_s": [moment - start for moment in first],
        "end_s": time.perf_counter() - start,
        "tokens": counts,
        "cold_start_s": cold_start_s,
        "rss_mib": _peak_rss_mib(),
    }


def _version() -> str:
    import openvino_genai

    return f"openvino-genai {openvino_genai.__version__}, Q4_1"


def _peak_rss_mib() -> float:
    """VmHWM; not getrusage, which also counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
