"""Data, model, loop, checkpoint and generation together: ten pictures are learnt by heart and told apart."""

import dataclasses
import json

import numpy as np
import pytest

from megatron_vlm.config.schema import ComponentOptimConfig, LogConfig, ModelConfig, OptimConfig, RunConfig
from megatron_vlm.data.example import Branch, Example, Turn
from megatron_vlm.data.writer import ShardWriter
from tests.data import world as data

QUESTION = "what is it ?"


@pytest.mark.slow
def test_ten_samples_are_learnt_by_heart_and_generated_again(tmp_path, one_rank):
    from megatron_vlm.data.shards import Shards
    from megatron_vlm.evaluate import run, tasks
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop

    rng = np.random.default_rng(3)
    told = [data.sentence(rng, 6) for _ in range(10)]
    with ShardWriter(tmp_path / "shards") as writer:
        for number, text in enumerate(told):
            media = writer.add_image(data.picture(rng, "PNG", (112, 112)))
            # The question is always the same: only the picture tells the answers apart.
            writer.add(Example(str(number), (Branch("user_qa", (Turn(QUESTION, text),)),), (media,)), "ten", "train")
    (tmp_path / "tokenizer.json").write_text(data.definition())
    (tmp_path / "mixture.yaml").write_text("groups: {all: {rate: 1.0, members: [ten]}}")
    steps, rates = 75, ComponentOptimConfig(lr=3e-3, min_lr=1e-4, warmup_steps=5)
    settings = data.config(
        tmp_path,
        train={"steps": steps, "global_batch": 1, "micro_batch": 1},
        image_crops=0,
        window=10,
        prompts="style",
    )
    settings = dataclasses.replace(
        settings,
        run=RunConfig(dir=str(tmp_path / "run"), device="cpu"),
        model=ModelConfig(freeze=()),
        optim=OptimConfig(vision=rates, connector=rates, language=rates, eps=1e-8),
        log=LogConfig(every=1000, tensorboard=False),
    )
    loop.train(settings, Layout(1))

    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 7 and max(losses[-10:]) < 0.05
    trained, shards = run.load(tmp_path / "run"), Shards(tmp_path / "shards")
    assert trained.step == steps
    samples = tasks.examples(shards, tasks.Task("ten", "answer", 40, split="train"))
    assert run.answers(trained, shards, samples, 40) == [[text] for text in told]
    # Other pictures, other answers: it did not learn an order, or one sentence.
    others = tasks.with_other_images(samples)
    said = run.answers(trained, shards, others, 40)
    picture = {sample.media: text for sample, text in zip(samples, told, strict=True)}
    assert said == [[picture[sample.media]] for sample in others]
    # What it could do before.
    untrained = run.load(tmp_path / "run", trained=False)
    said = run.answers(untrained, shards, samples, 10)
    assert not any(row == [text] for row, text in zip(said, told, strict=True))
