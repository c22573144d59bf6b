from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.config.errors import UserError
from fdscale.data.dense import json_lists
from fdscale.data.dense.json_lists import JsonLists

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def read(path: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    with JsonLists(path) as lists:
        for key, items in lists.read(("images", "annotations")):
            found.setdefault(key, []).extend(items)
        assert lists.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


@settings(max_examples=60)
@given(
    st.lists(values, max_size=9),
    st.lists(values, max_size=9),
    values,
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.sampled_from([100, 101, 257]),
)
def test_what_is_read_in_pieces_is_what_the_file_says(path, images, annotations, other, indent, ascii_only, piece):
    content = {"info": other, "images": images, "rest": [other], "annotations": annotations}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "PIECE", piece)
        patch.setattr(json_lists, "ITEMS", 4)
        assert read(path) == {"images": images, "annotations": annotations}


@pytest.mark.parametrize("number", ["0.5", "-12", "1.5E+300", "2e-7", "10"])
def test_numbers_are_whole_wherever_a_piece_ends(path, number, monkeypatch):
    monkeypatch.setattr(json_lists, "PIECE", 64)
    for shift in range(64):
        path.write_text(
            " " * shift + f'{{"images": [{number},{number}], "info": {number}, "annotations": [[{number}]]}}'
        )
        assert read(path) == {"images": [float(number)] * 2, "annotations": [[float(number)]]}


@pytest.mark.parametrize("piece", [64, 2**24])
def test_a_file_cut_off_anywhere_is_told(path, piece, monkeypatch):
    monkeypatch.setattr(json_lists, "PIECE", piece)
    whole = json.dumps({"images": [{"id": 1, "name": "a"}, {"id": 2}], "annotations": [], "info": {"year": 2017}})
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(UserError, match=r"file\.json is damaged at line 1, column \d+: .*copy or unpack it again"):
            read(path)


@pytest.mark.parametrize("piece", [64, 2**24])
def test_line_and_column_of_the_damage(path, piece, monkeypatch):
    monkeypatch.setattr(json_lists, "PIECE", piece)
    lines = [
        "{",
        ' "images": [',
        *[f'  {{"id": {number}}},' for number in range(40)],
        '  {"id": 7,, "x": 1}',
        " ]",
        "}",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(path.read_text())
    with pytest.raises(UserError, match=f"line {theirs.value.lineno}, column {theirs.value.colno}: {theirs.value.msg}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"column 1: expected '{'"),
        ('{"images": 5}', r"column 12: expected a list under 'images'"),
        ('{"images": []} x', r"column 16: expected the end of the file"),
        ("{1: []}", "expected the name of an entry"),
    ],
)
def test_other_json_is_told(path, content, message):
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_neither_a_file_nor_text(path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        JsonLists(path.parent / "none.json")
    path.write_bytes(b'{"images": ["\xff"]}')
    with pytest.raises(UserError, match=r"file\.json cannot be read as UTF-8"):
        read(path)
