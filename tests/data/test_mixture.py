"""Mixtures: shares from rates and sizes, and files that are none."""

import math

import pytest

from megatron_vlm.data import mixture
from megatron_vlm.data.mixture import FOLDER, load

GOOD = """
groups:
  a: {rate: 0.6, members: [x, {name: y, weight: 0.1}]}
  b: {rate: 0.2, members: [z]}
"""
SIZES = {"x": 100, "y": 400, "z": 7}


def written(tmp_path, text):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return path


def test_roots_inside_groups_and_rates_between(tmp_path):
    found = load(written(tmp_path, GOOD))
    assert [member.name for member in found.members] == ["x", "y", "z"]
    assert [member.weight for member in found.members] == [None, 0.1, None]
    assert found.group_numbers == (0, 0, 1)
    assert found.rates(SIZES.get) == pytest.approx((0.75 / 3, 0.75 * 2 / 3, 0.25))


@pytest.mark.parametrize(
    ("options", "root"),
    [("root_size_factor: 0", 1), ("root_size_factor: 0.25", 10), ("root_size_factor: 1", 1),
     ("root_size_factor: 900", 30), ("sampling_rate: 1.5", 30), ("root_size_factor: 900, sampling_rate: 2", 60)],
)  # fmt: skip
def test_overrides(tmp_path, options, root):
    found = load(written(tmp_path, f"groups: {{a: {{rate: 1, members: [x, {{name: y, {options}}}]}}}}"))
    assert found.rates(SIZES.get) == pytest.approx((10 / (10 + root), root / (10 + root)))


def test_empty_sets_get_nothing(tmp_path):
    found = load(written(tmp_path, GOOD))
    assert found.rates({"x": 0, "y": 5, "z": 5}.get) == pytest.approx((0, 0.75, 0.25))
    assert found.rates({"x": 0, "y": 0, "z": 5}.get) == pytest.approx((0, 0, 1))
    with pytest.raises(ValueError, match=r"none of the mixture's data sets \(x, y, z\)"):
        found.rates({"x": 0, "y": 0, "z": 0}.get)


def test_the_hash_is_of_the_meaning(tmp_path):
    first = load(written(tmp_path, GOOD)).hash
    assert load(written(tmp_path, "# a comment\n" + GOOD)).hash == first
    assert load(written(tmp_path, GOOD.replace("0.2", "0.3"))).hash != first
    assert load(written(tmp_path, GOOD.replace("0.1", "0.3"))).hash != first
    assert load(written(tmp_path, GOOD.replace("0.1}", "0.1, high_resolution: 0.3}"))).hash != first


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "needed a mapping"),
        ("groups: []", "at least one group"),
        ("groups: {a: {rate: 1, members: [x], size: 3}}", "unknown keys size"),
        ("groups: {a: {rate: 1}}", "needs a list of `members`"),
        ("groups: {a: {members: [x]}}", "rate of group 'a' is None"),
        ("groups: {a: {rate: -1, members: [x]}}", "rate of group 'a' is -1"),
        ("groups: {a: {rate: 0, members: [x]}}", "is 0"),
        ("groups: {a: {rate: .nan, members: [x]}}", "rate of group 'a' is nan"),
        ("groups: {a: {rate: 1, members: [x, x]}}", "data set x stands in it twice"),
        ("groups: {a: {rate: 1, members: [../x]}}", "called '../x'"),
        ("groups: {a: {rate: 1, members: [{name: x, weigth: 2}]}}", "unknown keys weigth"),
        ("groups: {a: {rate: 1, members: [{name: x, weight: true}]}}", "weight of 'x' is True"),
        ("groups: {a: {rate: 1, members: [{name: x, high_resolution: 1.5}]}}", "high_resolution of 'x' is 1.5"),
        ("groups: !!python/object/apply:os.getcwd []", "not a mixture"),
        ("groups: [", "not a mixture"),
    ],
)
def test_bad_files_are_named(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        load(written(tmp_path, text))
    assert "m.yaml" in str(error.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="neither a file nor one of the named mixtures .*sample"):
        load("nothing")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_mixtures_load(path):
    found = load(path.stem)
    assert found == mixture.load(path)
    assert math.isclose(sum(found.rates(lambda name: 100)), 1.0)
