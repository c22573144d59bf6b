from __future__ import annotations

import json

import pytest

from fdscale.cli import main
from fdscale.data.index import build_index
from fdscale.data.info import info


@pytest.fixture
def shards(write_shards, png):
    def make(labels: list[list[int | None]]):
        members = []
        for shard, own in enumerate(labels):
            members.append({})
            for place, label in enumerate(own):
                members[-1][f"{shard}-{place}.png"] = png(place)
                if label is not None:
                    members[-1][f"{shard}-{place}.cls"] = b"%d" % label
        return write_shards(members)

    return make


def test_the_figures(shards, png):
    folder = shards([[0, 1, 2, 0], [2, None, 0]])
    (folder / "classes.json").write_text('["cat", "dog", "newt"]')
    found = info(build_index(folder))
    assert (found.samples, found.shards, found.unlabelled, found.class_names) == (7, 2, 1, 3)
    assert found.class_sizes == {"cat": 3, "dog": 1, "newt": 2}
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found.image_bytes == pytest.approx(sum(len(png(n)) for n in (0, 1, 2, 3, 0, 1, 2)) / 7)
    assert (found.formats, found.looked_at, found.unreadable) == ({"PNG": 7}, 7, ())
    assert found.sides == (13, 11, 10, 14)
    assert found.index_bytes == 7 * 32


def test_shards_sorted_by_class_are_told_from_mixed_ones(shards, capsys):
    folder = shards([[0] * 5 + [1] * 5 + [2] * 5, [3] * 6 + [4] * 6])
    assert info(build_index(folder)).sorted_by_class
    assert main(["shards", "info", str(folder)]) == 0
    assert "SORTED BY CLASS" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [[[0, 1] * 8], [[0, 1, 2, 3, 4, 5] * 3], [[0] * 9], [[None] * 9], [[3]]])
def test_mixed_single_and_missing_classes_are_not_sorted(shards, labels):
    assert not info(build_index(shards(labels))).sorted_by_class


def test_headers_come_from_a_few_images_and_bad_ones_are_named(write_shards, png, capsys):
    folder = write_shards([{f"{n:03d}.png": png(n) if n else b"bad" for n in range(40)} for _ in range(1)])
    found = info(build_index(folder), shards=1)
    assert found.looked_at == 40
    assert found.unreadable[0].startswith("s0.tar:000.png (UnidentifiedImageError")
    assert main(["shards", "info", str(folder)]) == 0
    assert "1 of 40 looked at: s0.tar:000.png" in capsys.readouterr().out


def test_json_for_scripts(shards, capsys):
    folder = shards([[0, 1], [1, 0]])
    build_index(folder)
    capsys.readouterr()
    assert main(["shards", "info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["sorted_by_class"], found["class_sizes"]) == (4, False, {"0": 2, "1": 2})
