"""How likely tokens were is told once for each token, and is the same however they were computed."""

import random
from typing import Any

import numpy as np

from shared.logprobs import record_bytes, unpack_likely
from shared.messages import Adjust, Generate, Proposal, Sampling
from shared.tokens import pack
from tests.worker.builders import Bench, mock_decoder, plain, request

PROMPT = [5, 9, 5, 150, 151, 7, 8, 30, 31, 32, 33]


def asked(name: str = "r", **more: Any) -> Generate:
    fields = {"prompt": PROMPT, "max_tokens": 20, "logprobs": 3, "prompt_logprobs": 2,
              "sampling": Sampling(temperature=1.0, seed=3)} | more
    return request(name, **fields)


def told(generate: Generate, **limits: Any) -> tuple[list[int], bytes, bytes]:
    """Tokens, their records, and the prompt's records in order; nothing missing, nothing twice."""
    bench = Bench(mock_decoder(), **({"step_tokens": 512, "max_draft_tokens": 0} | limits))
    bench.add(generate)
    bench.finish()
    return of(bench, generate)


def of(bench: Bench, generate: Generate) -> tuple[list[int], bytes, bytes]:
    key = (generate.request_id, generate.attempt)
    packed, size = b"", record_bytes(generate.prompt_logprobs)
    for first, part in sorted(bench.prompts.get(key, {}).items()):
        assert first == 1 + len(packed) // size
        packed += part
    return bench.streams[key], bench.records[key], packed


def test_every_token_and_all_of_the_prompt_but_its_first_has_a_record() -> None:
    tokens, records, prompt = told(asked())
    assert tokens == plain(request(prompt=PROMPT, max_tokens=20, sampling=Sampling(temperature=1.0, seed=3)))
    assert len(records) == len(tokens) * record_bytes(3)
    assert len(prompt) == (len(PROMPT) - 1) * record_bytes(2)
    first = unpack_likely(records[:record_bytes(3)])
    # the mock chooses the likeliest
    assert first.rank == 1 and first.top[0] == (tokens[0], first.logprob)
    assert first.logprob < 0 and [value for _, value in first.top] == sorted((v for _, v in first.top), reverse=True)
    assert len({id for id, _ in first.top}) == 3


def test_chunks_company_and_preemption_change_no_record() -> None:
    truth = told(asked())
    for step_tokens in (2, 3, 7):
        assert told(asked(), step_tokens=step_tokens, max_running=1) == truth
    bench = Bench(mock_decoder(blocks=20), step_tokens=12, max_running=6)
    wanted = [asked(f"r{number}", sampling=Sampling(temperature=1.0, seed=number),
                    adjust=Adjust(repetition_penalty=1.5) if number % 2 else None) for number in range(6)]
    for one in wanted:
        bench.add(one)
    bench.finish()
    assert bench.scheduler.preemptions > 0
    for one in wanted:
        assert of(bench, one) == told(one), one.request_id


def test_drafts_change_no_record() -> None:
    wanted = asked(prompt_logprobs=-1)
    truth = told(wanted)
    bench, chooser = Bench(mock_decoder(), step_tokens=64), random.Random(3)
    bench.add(wanted)
    while (length := bench.scheduler.length_of("r")) is not None:
        draft = truth[0][length - len(PROMPT):][:4]
        if draft and chooser.random() < 0.5:
            draft[chooser.randrange(len(draft))] = chooser.randrange(200)
        if draft:
            bench.scheduler.speculation.drafts.offer(Proposal("r", 1, length, pack(draft)))
        bench.scheduler.cost.observe(1, 0, 1.0)
        bench.step()
    assert bench.scheduler.speculation.accepted_draft_tokens > 0
    assert of(bench, wanted) == truth


def test_a_cached_prompt_is_computed_again_to_be_scored() -> None:
    bench = Bench(mock_decoder(), step_tokens=512, max_draft_tokens=0)
    first, second, third = asked("a"), asked("b"), asked("c", prompt_logprobs=-1)
    for one in (first, second, third):
        bench.add(one)
        bench.finish()
    assert of(bench, first) == of(bench, second)
    assert of(bench, third)[:2] == of(bench, first)[:2]
    assert [bench.ends[name, 1][0].cached_tokens for name in "abc"] == [0, 0, 8]  # type: ignore[attr-defined]


def test_adjusted_logits_are_not_what_is_told() -> None:
    tokens, records, _ = told(asked(adjust=Adjust(allowed=pack([3, 4]))))
    free = unpack_likely(told(asked())[1][:record_bytes(3)])
    first = unpack_likely(records[:record_bytes(3)])
    assert tokens[0] in (3, 4) and first.top == free.top and first.rank > 1
    assert np.isfinite(first.logprob)


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    tokens, records, prompt = told(asked(prompt=[5]))
    assert tokens and records and prompt == b""
