import pytest

from megatron_vlm.config import duration, load


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 5400), ("0.5", 30), ("01:30:00", 5400), ("100:00:01", 360001), ("1-12:00:00", 129600)],
)
def test_seconds(text, wanted):
    assert duration.seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "1h", "90:00", "01:60:00", "-5", "1e3", "nan"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="is no length of time"):
        duration.seconds(text)


def test_a_clock_time_survives_yaml(tmp_path):
    """YAML 1.1 reads 10:30:00 as the number 37800, which would be taken for minutes."""
    (tmp_path / "empty.yaml").write_text("")
    config = load.load(tmp_path / "empty.yaml", ["run.time_limit=10:30:00"])
    (tmp_path / "dumped.yaml").write_text(load.dump(config))
    assert load.load(tmp_path / "dumped.yaml").run.time_limit == "10:30:00"
    (tmp_path / "unquoted.yaml").write_text("run: {time_limit: 10:30:00}")
    with pytest.raises(ValueError, match="run.time_limit=37800 .* must be text"):
        load.load(tmp_path / "unquoted.yaml")
