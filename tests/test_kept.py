"""Results of benchmarks lie apart by processor, and a page is made of each."""

import json

import pytest

from benchmarks import kept


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "about_machine", lambda: {"processor": "AMD EPYC (R) 9"})
    return tmp_path / "results" / "speed.json", tmp_path / "docs" / "speed.md"


def test_the_first_machine_has_the_place_itself(places):
    result, page = places
    assert kept.here(result, page) == places
    kept.write(result, {"machine": {"processor": "AMD EPYC (R) 9"}})
    assert kept.here(result, page) == places
    assert kept.everywhere(result, page) == [places]


def test_another_machine_touches_nothing_of_the_first_one(places):
    result, page = places
    kept.write(result, {"machine": {"processor": "a Xeon"}, "cells": [1]})
    before = result.read_bytes()
    mine = kept.here(result, page)
    assert [path.parent.name for path in mine] == ["amd-epyc-r-9", "amd-epyc-r-9"]
    assert kept.read(mine[0], {"cells": []}) == {"cells": []}
    kept.write(mine[0], {"machine": {"processor": "AMD EPYC (R) 9"}, "cells": [2]})
    kept.write_page(mine[1], "a table\n")
    assert result.read_bytes() == before
    assert kept.everywhere(result, page) == [places, mine]
    assert json.loads(mine[0].read_text())["cells"] == kept.read(mine[0], {})["cells"] == [2]
    assert mine[1].read_text() == "a table\n"


def test_a_generation_of_the_same_name_has_a_place_of_its_own(places, monkeypatch):
    result, page = places
    kept.write(result, {"machine": {"processor": "a Xeon"}})
    older = kept.here(result, page)[0]
    kept.write(older, {"machine": {"processor": "AMD EPYC (R) 9", "family": "26"}})
    assert kept.here(result, page)[0] == older  # a machine that does not say its own is taken for the same
    for family, place in (("26", "amd-epyc-r-9"), ("25", "amd-epyc-r-9-25")):
        machine = {"processor": "AMD EPYC (R) 9", "family": family}
        monkeypatch.setattr(kept, "about_machine", lambda machine=machine: machine)
        assert kept.here(result, page)[0].parent.name == place


def test_a_processor_is_told_with_its_family():
    assert kept.processor({"processor": "AMD EPYC", "family": "25"}) == "AMD EPYC (family 25)"
    assert kept.processor({"processor": "a Xeon"}) == "a Xeon"
