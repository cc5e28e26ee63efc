from megatron_vlm.config.rampup import rows
from megatron_vlm.config.schema import TrainConfig


def test_the_batch_grows_in_equal_parts_and_stays():
    train = TrainConfig(global_batch=8, rampup_from=2, rampup_by=2, rampup_steps=8)
    assert [rows(train, step) for step in range(1, 12)] == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8, 8]
    assert [rows(TrainConfig(global_batch=8), step) for step in (1, 100)] == [8, 8]


def test_more_increments_than_steps():
    train = TrainConfig(global_batch=16, rampup_from=1, rampup_by=1, rampup_steps=4)
    assert [rows(train, step) for step in range(1, 7)] == [1, 5, 9, 13, 16, 16]
