"""Made up traffic is the same for the same seed, and has the shape that its kind is for."""

from collections import Counter

import pytest

from deploy.replay_fleet import infinite_reuse
from deploy.replay_synthetic import KINDS, MOST_PROMPT_TOKENS, synthetic
from deploy.replay_trace import Trace


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_is_the_same_traffic_and_another_is_not(kind: str) -> None:
    made = synthetic(kind, 200, seed=3)
    assert made == synthetic(kind, 200, seed=3)
    assert made != synthetic(kind, 200, seed=4)
    assert len(made) == 200 and made[0].at_s == 0.0
    assert [one.at_s for one in made] == sorted(one.at_s for one in made)
    assert all(0 < one.prompt_tokens <= MOST_PROMPT_TOKENS and one.output_tokens > 0 for one in made)
    halved = synthetic(kind, 200, seed=3, speed=2.0)
    assert [one.at_s for one in halved] == pytest.approx([one.at_s / 2 for one in made])


def test_more_requests_begin_like_fewer() -> None:
    assert synthetic("chat", 300, seed=1)[:100] == synthetic("chat", 100, seed=1)


def test_agents_come_back_with_all_they_said_and_people_share_a_few_system_prompts() -> None:
    agents, chat, files = (infinite_reuse(Trace(synthetic(kind, 300), 64)) for kind in ("agents", "chat", "files"))
    assert agents > 0.8
    assert 0.4 < chat < agents
    assert 0.1 < files < 0.8


def test_a_turn_begins_with_the_turn_before_it() -> None:
    sessions: dict[bytes, int] = {}
    longer = 0
    for one in synthetic("agents", 300):
        # an opening is text of session 0; a session that has said little yet has no whole part of its own
        own = next((part for part in one.parts if int.from_bytes(part[:4], "little") >= 1 << 12), None)
        if own is None:
            continue
        longer += one.prompt_tokens > sessions.get(own, one.prompt_tokens)
        assert one.prompt_tokens >= sessions.get(own, 0)
        sessions[own] = one.prompt_tokens
    assert longer > 200


def test_some_beginnings_are_common_and_most_are_rare() -> None:
    first = Counter(one.parts[0] for one in synthetic("files", 600))
    counts = sorted(first.values(), reverse=True)
    assert counts[0] > 30 and len(counts) > 100


@pytest.mark.parametrize(("kind", "requests", "says"), [("poems", 5, "unknown kind"), ("chat", 0, "ask for 1 or more")])
def test_what_cannot_be_made_is_said(kind: str, requests: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        synthetic(kind, requests)
