"""tools/gpu_check.sh as far as it goes without a GPU: what it would run, how it judges, what it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import load, rules
from megatron_vlm.train import variant
from tests.gpu import check
from tests.test_imports import ROOT

SEEN = check.count_gpus()


@pytest.mark.slow
@pytest.mark.skipif(SEEN > 0, reason="there is a GPU here")
def test_without_a_gpu_nothing_is_run_and_the_exit_code_says_so(tmp_path):
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == check.NO_GPU and "No GPU here" in done.stderr and not (tmp_path / "out").exists()


def test_dry_run_lists_every_command(capsys, tmp_path):
    assert check.main(["--dry-run", "--gpus", "8", "--out", str(tmp_path)], count=lambda: 0) == 0
    text = capsys.readouterr().out
    for words in ("tests/gpu", "train.precision=bf16", "train.precision=fp8", "--device cuda", "molmo2_8b/stage3.yaml"):
        assert words in text
    assert check.main(["--dry-run", "--gpus", "1", "--only", "speed", "--out", str(tmp_path)], count=lambda: 0) == 0
    text = capsys.readouterr().out
    assert "qwen3_0.6b" in text and "molmo2" not in text and "--device" not in text


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_every_command_has_settings_that_fit(gpus, tmp_path):
    """Recipes and overrides load and keep the rules on so many processes; layouts have names and fit the recipe."""
    tiny = load.load(ROOT / check.TINY)
    for world, names in check.LAYOUTS.items():
        for name in names:
            assert variant.parse(name).world == world
            variant.parse(name).settings(tiny, "cuda")
    for part in check.parts(gpus, tmp_path, ("kernels", "curves", "layouts", "speed")):
        words = [word for word in part.command if word.partition("=")[1] and "." in word.partition("=")[0]]
        recipes = [word for word in part.command if word.endswith(".yaml")]
        if part.name == "fp8" and "fp8" not in rules.CHOICES["train.precision"]:
            continue
        for recipe in recipes:
            config = load.load(ROOT / recipe, words)
            if part.group == "speed":
                from tests.gpu import throughput

                throughput.settings(str(ROOT / recipe), words, gpus)
            else:
                rules.check(config, 1)


def part(*command: str, group: str = "kernels", name: str = "attention") -> check.Part:
    return check.Part(group, name, (sys.executable, "-c", *command), timeout_s=20)


def test_parts_that_pass_fail_and_hang(tmp_path):
    assert check.run(part("print(1)"), tmp_path).outcome == "passed"
    failed = check.run(part("raise ValueError('three heads')"), tmp_path)
    assert failed.outcome == "exit code 1: ValueError: three heads"
    slow = check.Part("speed", "slow", (sys.executable, "-c", "import time; time.sleep(9)"), timeout_s=0.2)
    assert check.run(slow, tmp_path).outcome == "not done after 0 s"


def test_the_exit_code_and_the_report_name_the_part_that_failed(tmp_path, monkeypatch, capsys):
    fine, skipped = part("print()", group="layouts", name="fine"), check.Part("curves", "x", (), skipped="no FP8 here")
    wrong = part("raise ValueError('three heads')", group="layouts", name="wrong")
    monkeypatch.setattr(check, "machine", dict)

    def ran(*chosen: check.Part) -> int:
        monkeypatch.setattr(check, "parts", lambda *_, **__: chosen)
        return check.main(["--out", str(tmp_path)], count=lambda: 1)

    assert ran(fine, skipped) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Failed: nothing" in text and "| curves | x | 0 | skipped: no FP8 here |" in text
    assert "1 of 2 passed, 1 skipped" in capsys.readouterr().out
    assert ran(fine, wrong, skipped) == 1
    assert "Failed: layouts wrong" in (tmp_path / "report.md").read_text()
    assert "Failed: [layouts] wrong: exit code 1: ValueError: three heads" in capsys.readouterr().out
    assert ran(skipped) == 1  # nothing was shown


def test_what_this_machine_cannot_run_is_skipped_with_the_reason(tmp_path):
    words = {part.name: part.skipped for part in check.parts(1, tmp_path, ("curves",), here=True)}
    assert not words["reference"] and (SEEN or "Transformer Engine" in words["fp8"])


def curve(out: Path, name: str, shift: float) -> None:
    folder = out / "curves" / name
    folder.mkdir(parents=True)
    lines = [json.dumps({"loss": 4 - step / 10 + shift * (step >= 10)}) for step in range(20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_verdicts_and_report(tmp_path):
    for name, shift in {"reference": 0, "float32": 0.001, "bf16": 0.2}.items():
        curve(tmp_path, name, shift)
    case = {"case": "flex, mixed rows", "tolerance": 2e-4, "out": 1e-6, "query": 2e-6, "key": 3e-6, "value": 4e-6}
    (tmp_path / "kernels.jsonl").write_text(json.dumps(case) + "\n")
    told = {"recipe": "r", "processes": 1, "step_s": 0.5, "tokens_per_s_per_process": 99.0, "peak_gb": 2.0,
            "planned_peak_gb": 1.5}  # fmt: skip
    results = [
        check.run(part("print()"), tmp_path),
        *(check.Result("curves", name, "", "passed", 1.0) for name in ("reference", "float32", "bf16", "fp8")),
        check.run(part(f"print({json.dumps(told)!r})", group="speed", name="tiny"), tmp_path),
        check.run(part("print('nothing')", group="speed", name="silent"), tmp_path),
    ]
    check.judge(results, tmp_path)
    check.write(results, {"gpus": []}, tmp_path)
    outcomes = {each.name: each.outcome for each in results}
    assert outcomes["attention"] == outcomes["float32"] == outcomes["tiny"] == "passed"
    assert outcomes["bf16"] == "losses differ by 0.2000 on average, more than 0.05"
    assert outcomes["fp8"].startswith("losses differ by nan") and outcomes["silent"] == "no result line"
    text = (tmp_path / "report.md").read_text()
    assert "| flex, mixed rows | 1.0e-06 | 2.0e-06 |" in text and "| tiny | 1 | 0.500 | 99 | 2.0 | 1.5 |" in text
    assert json.loads((tmp_path / "report.json").read_text())["results"][3]["found"]["limit"] == 0.05


def test_a_kernel_part_that_compared_nothing_has_not_passed(tmp_path):
    results = [check.run(part("print()"), tmp_path)]
    check.judge(results, tmp_path)
    assert results[0].outcome == "no kernel was compared"


def test_curves_of_different_length_do_not_pass():
    assert math.isnan(check.mean_difference([1.0], [1.0, 2.0])) and math.isnan(check.mean_difference([], []))


@pytest.mark.slow
def test_the_comparison_of_kernels_works_and_notices_a_wrong_one(tmp_path, monkeypatch):
    """On the CPU: torch's attention, flex by plain operators, a plain function in the place of flash-attn's."""
    import torch
    from torch.nn.attention import flex_attention

    from megatron_vlm.model import attention_kernels, flex
    from tests.gpu import test_kernels
    from tests.model import flash_attn

    monkeypatch.setattr(test_kernels, "REPORT", str(tmp_path))
    monkeypatch.setattr(test_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention_kernels, "flash_function", lambda: flash_attn.flash_attn_varlen_func)
    for kernel, rows, dtype in (("blocks", "mixed", torch.float32), ("flex", "mixed", torch.float32),
                                ("flash", "plain", torch.bfloat16)):  # fmt: skip
        test_kernels.test_decoder(kernel, rows, dtype, 16)
    for kernel in ("torch", "flash"):
        test_kernels.test_tower(kernel)
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == 8
    monkeypatch.setattr(flex, "visible", lambda query, key: query.example == key.example)
    with pytest.raises(AssertionError):
        test_kernels.test_decoder("flex", "mixed", torch.float32, 16)


@pytest.mark.slow
def test_throughput_runs_the_trainers_step():
    """On the CPU, by the same code."""
    done = subprocess.run(
        [sys.executable, "tests/gpu/throughput.py", check.TINY, "run.device=cpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["processes"] == 1 and found["loss"] > 1 and found["tokens_per_s_per_process"] > 100
    assert len(found["kernels"]) == 8
