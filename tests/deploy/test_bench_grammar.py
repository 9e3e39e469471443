"""The grammar benchmark tells an answer that fits from one that does not, and drafts that change one from others."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deploy.bench import grammar
from deploy.bench.grammar import Run, complaints
from deploy.bench.schemas import schema
from gateway.model_files import load_card
from gateway.tokenizer import Tokenizer
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from shared.vocabulary import FILE, load_vocabulary
from tests.models import default_folder, default_model
from worker.grammar import Grammars


def test_schemas_are_the_same_for_the_same_number_and_such_that_something_fits() -> None:
    made = [schema(number) for number in range(200)]
    assert made == [schema(number) for number in range(200)]
    assert len({json.dumps(one) for one in made}) > 190
    for one in made:
        jsonschema.Draft202012Validator.check_schema(one)
    text = json.dumps(made)
    kinds = ("anyOf", "$ref", "enum", "const", "pattern", "format", "array", "number")
    assert all(f'"{kind}"' in text for kind in kinds)


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_real_answers_fit_and_neither_company_nor_drafts_change_one() -> None:
    folder = default_folder()
    tokenizer, stop_ids = Tokenizer.load(folder), load_card(folder).stop_token_ids
    decoder = NativeDecoder.load(default_model(), blocks=512, threads=1)
    grammars = Grammars(lambda: load_vocabulary(folder / FILE), decoder.vocabulary_size)
    requests = [grammar._request(number, tokenizer, stop_ids) for number in (0, 1, 4, 5)]
    alone = grammar.run(decoder, grammars, requests, 1)
    together = grammar.run(decoder, grammars, requests, 4, alone.said)
    decoder.close()
    assert together.said == alone.said and together.accepted_drafts > 0 and together.forced_tokens > 0
    for number, request in zip((0, 1, 4, 5), requests, strict=True):
        tokens = alone.said[request.request_id]
        if len(tokens) < grammar.MOST_TOKENS:
            text = tokenizer.decode([token for token in tokens if token not in stop_ids])
            jsonschema.validate(json.loads(text), schema(number))


@pytest.mark.slow
@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_a_report_that_was_broken_off_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grammar.pull, "pull", lambda ref: default_folder())
    monkeypatch.setattr(grammar, "PART", 2)
    kept = tmp_path / "report.json"
    grammar.measure(2, 2, kept, ["validity"])
    report = grammar.measure(4, 2, kept, ["validity"])
    whole = grammar.measure(4, 2, parts=["validity"])
    assert json.loads(kept.read_text()) == report
    # how many drafts are worth a row follows from what steps took
    timed = ("draft_tokens", "accepted", "forced")
    assert [[(name, value) for name, value in row.items() if name not in timed] for row in report["validity"]] == [
        [(name, value) for name, value in row.items() if name not in timed] for row in whole["validity"]]
    assert (report["done"], report["longest"]) == (whole["done"], whole["longest"])
    assert report["validity"][1]["schemas"] == 4 and report["validity"][1]["accepted"]
    with pytest.raises(SystemExit, match="another file"):
        grammar.measure(4, 3, kept, ["validity"])


def test_what_does_not_fit_or_was_changed_is_found_out() -> None:
    tokenizer, stop_ids = Tokenizer.load(default_folder()), load_card(default_folder()).stop_token_ids
    requests = [grammar._request(0, tokenizer, stop_ids)]
    said = {"r0": tokenizer.encode("{}", add_special=False)}
    plain, other = Run(said, 1, 1, 0, 0, 0), Run({"r0": [5]}, 1, 1, 0, 0, 0)
    rows: list[dict[str, Any]] = [{"drafts": "with"} | grammar._validity(requests, found, plain, tokenizer)
                                  for found in (plain, other)]
    assert [row["changed"] for row in rows] == [0, 1]
    assert rows[1]["invalid"] == 1
    wrong = complaints({"validity": rows})
    assert any("do not fit" in line for line in wrong) and any("not what they are" in line for line in wrong)
    assert complaints({"validity": [rows[0] | {"invalid": 0, "which": []}]}) == []
