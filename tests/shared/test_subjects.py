"""Subjects hold together whatever a model is called."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import subjects
from shared.subject_index import check_subject, matches


@given(st.text(min_size=1))
def test_no_model_name_breaks_a_subject(model):
    try:
        model.encode()
    except UnicodeEncodeError:
        return
    subject = subjects.generate(model)
    check_subject(subject)
    assert subject.isascii()
    assert matches(subjects.ALL_GENERATE, subject)


@given(st.text(), st.text())
def test_different_models_have_different_subjects(first, second):
    try:
        same = subjects.generate(first) == subjects.generate(second)
    except UnicodeEncodeError:
        return
    assert same == (first == second)


@pytest.mark.parametrize(("model", "token"), [
    ("default", "default"), ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB%2FSmolLM2-135M"),
    ("llama-3.1", "llama-3%2E1"), ("a b*>", "a%20b%2A%3E"),
])
def test_model_names_stay_readable(model, token):
    assert subjects.generate(model) == f"mill.v1.generate.{token}"


def test_each_subject_is_heard_where_it_should_be_and_nowhere_else():
    everything = [subjects.generate("m"), subjects.worker_generate("w"), subjects.worker_cancel("w"),
                  subjects.replies("g"), subjects.worker_kv("w"), subjects.worker_kv_request("w"),
                  subjects.drafter_follow("d"), subjects.worker_drafts("w"), subjects.placed("r"),
                  subjects.status("worker", "w"), subjects.worker_generate("w", "eu"),
                  subjects.worker_generate("w", "us"), subjects.worker_drafts("w", "eu"),
                  subjects.drafter_follow("d", "eu")]
    assert len(set(everything)) == len(everything)
    assert all(subject.startswith("mill.v1.") for subject in everything)

    def heard(pattern):
        return [subject for subject in everything if matches(pattern, subject)]

    assert heard(subjects.ALL_GENERATE) == [subjects.generate("m")]
    assert heard(subjects.ALL_KV) == [subjects.worker_kv("w")]
    assert heard(subjects.ALL_STATUS) == [subjects.status("worker", "w")]
    assert heard(subjects.ALL_PLACED) == [subjects.placed("r")]


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True))
def test_an_id_stands_in_a_subject_as_it_is(name):
    assert subjects.check_id(name) == name
    check_subject(subjects.worker_generate(name))


def test_a_zone_in_an_address_is_one_word_whatever_its_case_and_none_says_nothing():
    assert subjects.worker_generate("w", "EU-north1") == "mill.v1.worker.w.generate.eu-north1"
    assert subjects.drafter_follow("d", "a.b>*") == "mill.v1.drafter.d.follow.a%2Eb%3E%2A"
    assert subjects.worker_drafts("w", "") == subjects.worker_drafts("w")


@pytest.mark.parametrize("name", ["", "A", "a.b", "a b", "-a", "_a", "a*", ">", "a\n", "é"])
def test_what_cannot_be_an_id_is_refused(name):
    with pytest.raises(ValueError, match="cannot be an id"):
        subjects.check_id(name)
