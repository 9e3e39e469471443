"""llama.cpp as a peer: one workload through the C API that llama-cpp-python exposes, on the GGUF as it is.

    PYTHON run_llama_cpp.py JOB.json      PYTHON has llama-cpp-python; see `deploy.bench.peer`

All sequences decode in one batch, a shared prefix is computed once and copied (`seq_cp`), sampling is the argmax of
the logits. `"score"` in the job asks for logits instead of tokens: `deploy.bench.fidelity`.
"""

import time

BORN = time.perf_counter()

import ctypes  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

BATCH = 2048  # rows of one call


class Row(NamedTuple):
    """One token to compute."""

    token: int
    position: int
    sequence: int
    wanted: bool  # its logits


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["task"] == "prepare":
        answer = {"version": Model.version()}
    elif job["task"] == "score":
        answer = score(job)
    else:
        answer = generate(job)
    print(json.dumps(answer))


class Model:
    """A model with room for `sequences` sequences of `length` tokens."""

    def __init__(self, job: dict[str, Any], sequences: int, length: int, shared: bool) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job["model"].encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {job['model']}")
        context = llama_cpp.llama_context_default_params()
        # One cache for all where a prefix is shared; else one per sequence, which attends to itself alone.
        context.kv_unified = shared
        context.n_ctx = sequences * (-(-length // 256) * 256)
        context.n_batch = BATCH
        context.n_ubatch = 512
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit(f"llama.cpp has no room for {context.n_ctx} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    @staticmethod
    def version() -> str:
        from importlib.metadata import version

        return f"llama-cpp-python {version('llama_cpp_python')}, Q4_1"

    def run(self, rows: list[Row]) -> None:
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        for at, row in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = row.token, row.position, row.wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row.sequence
        batch.n_tokens = len(rows)
        code = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode returned {code} for {len(rows)} rows")

    def logits(self, row: int) -> Any:
        """The float32 logits [V] of a row of the last run. Valid until the next one."""
        import numpy

        return numpy.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), (self.vocabulary,))

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def copy(self, source: int, target: int) -> None:
        self.api.llama_memory_seq_cp(self.memory, source, target, -1, -1)


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """The workload once, greedy, after the first token of a cold process."""
    prompts, shared, out_tokens = job["prompts"], job["shared_tokens"], job["out_tokens"]
    length = max(len(job["warm"]), max(map(len, prompts)) + out_tokens)
    model = Model(job, len(prompts), length, shared > 0)
    _prefill(model, [job["warm"]], 0)
    cold_start_s = time.perf_counter() - BORN
    model.clear()

    start = time.perf_counter()
    if shared:
        for at in range(0, shared, BATCH):
            part = prompts[0][at:min(shared, at + BATCH)]
            model.run([Row(token, at + i, 0, False) for i, token in enumerate(part)])
        for sequence in range(1, len(prompts)):
            model.copy(0, sequence)
    tokens, times = _prefill(model, prompts, shared)
    first_s = [moment - start for moment in times]
    counts = 1
    while counts < out_tokens:
        rows = [
            Row(token, len(prompt) + counts - 1, sequence, True)
            for sequence, (token, prompt) in enumerate(zip(tokens, prompts, strict=True))
        ]
        model.run(rows)
        tokens = [int(model.logits(row).argmax()) for row in range(len(rows))]
        counts += 1
    return {
        "version": Model.version(),
        "first_s": first_s,
        "end_s": time.perf_counter() - start,
        "tokens": [counts] * len(prompts),
        "cold_start_s": cold_start_s,
        "rss_mib": _peak_rss_mib(),
    }


def _prefill(model: Model, prompts: list[list[int]], known: int) -> tuple[list[int], list[float]]:
    """The first token of each prompt, of which `known` tokens are computed, and the moment it was there."""
    rows = [
        Row(token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
        if position >= known
    ]
    tokens, times = [0] * len(prompts), [0.0] * len(prompts)
    for at in range(0, len(rows), BATCH):
        part = rows[at:at + BATCH]
        model.run(part)
        for number, row in enumerate(part):
            if row.wanted:
                tokens[row.sequence] = int(model.logits(number).argmax())
                times[row.sequence] = time.perf_counter()
    return tokens, times


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Write the float32 logits of every position of each prompt, one after the other, to `job["score"]`."""
    prompts = job["prompts"]
    model = Model(job, 1, max(map(len, prompts)), False)
    with open(job["score"], "wb") as file:
        for prompt in prompts:
            model.clear()
            model.run([Row(token, position, 0, True) for position, token in enumerate(prompt)])
            for position in range(len(prompt)):
                file.write(model.logits(position).tobytes())
    return {"version": Model.version()}


def _peak_rss_mib() -> float:
    """VmHWM; not getrusage, which also counts what the process was before it became this program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
