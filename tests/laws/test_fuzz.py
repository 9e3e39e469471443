"""A short slice of every fuzzer; `python -m tests.laws.fuzz all` plays more."""

import pytest

from tests.laws.fuzz import complaints

SLICE = {"gguf": 60, "safetensors": 60, "config": 60, "wire": 8, "bodies": 20, "dialects": 150, "template": 200}


@pytest.mark.parametrize("name", SLICE)
def test_what_strangers_send_is_taken_or_refused_with_a_reason(name: str) -> None:
    assert list(complaints(name, range(SLICE[name]))) == []
