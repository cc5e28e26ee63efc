"""SIGKILL at twenty random moments, on two to four ranks: is the run that goes on the run that was never killed?

    python benchmarks/kill_sweep.py [--seed N] [--work DIR]

Four runs on four layouts, float32, with dropout: each is killed four times (one rank or all; at a random time after a
random step, or while a checkpoint is being written), started again each time and finished; its metrics, its ledger and
every file of its last checkpoint are compared byte for byte with those of a run that was never killed. A fifth run
changes its layout after each of four kills; its losses are compared. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_vlm.parallel.pool import Pool  # noqa: E402
from tests.data import world as data  # noqa: E402
from tests.train import kills  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "kill_sweep"
STEPS, EVERY = 30, 3
SAME_LAYOUT = ("dp2", "tp2_sp", "dp3", "tp2_sp_dp2")
RELAY = ("dp2", "tp2_sp", "pp2", "dp3", "dp2")
AIMS = ("moment", "save", "moment", "moment")
#: Largest relative difference of a loss after a change of layout.
TOLERANCE = 1e-5


def one_layout(work: Path, layout: str, chance: random.Random) -> dict[str, Any]:
    """A reference and a killed run on `layout`."""
    whole, killed = (
        kills.settings(work, work / f"{layout}-{name}", layout, steps=STEPS, every=EVERY)
        for name in ("whole", "killed")
    )
    pool = Pool(kills.LAYOUTS[layout][0])
    pool.run(kills.train, whole, timeout_s=300)
    done = []
    for aimed in AIMS:
        killing = kills.kill(pool, killed, layout, chance, aimed)
        if killing is None:
            raise SystemExit(f"{layout} finished before it was killed {len(AIMS)} times: give it more steps.")
        print(killing, flush=True)
        done.append(dataclasses.asdict(killing))
    pool.run(kills.train, killed, timeout_s=300)
    pool.close()
    different = kills.differences(Path(killed.run.dir), Path(whole.run.dir), STEPS)
    print(f"{layout}: {'differs: ' + ', '.join(different) if different else 'equal, bit for bit'}", flush=True)
    return {"layout": layout, "kills": done, "different": different}


def relay(work: Path, chance: random.Random) -> dict[str, Any]:
    """A run that goes on on another layout after each kill, beside the reference of the first layout."""
    config = kills.settings(work, work / "relay", RELAY[0], steps=STEPS, every=EVERY)
    done = []
    for layout, aimed in zip(RELAY, AIMS, strict=False):
        pool = Pool(kills.LAYOUTS[layout][0])
        killing = kills.kill(pool, kills.on(config, layout), layout, chance, aimed)
        if killing is None:
            raise SystemExit("the relay finished before its last change of layout: give it more steps.")
        print(killing, flush=True)
        done.append(dataclasses.asdict(killing))
    pool = Pool(kills.LAYOUTS[RELAY[-1]][0])
    pool.run(kills.train, kills.on(config, RELAY[-1]), timeout_s=300)
    pool.close()
    reference, relayed = (kills.metrics(work / name) for name in (f"{RELAY[0]}-whole", "relay"))
    assert [line["step"] for line in relayed] == [line["step"] for line in reference]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(relayed, reference, strict=True))
    ledgers = [(work / name / "ledger.jsonl").read_bytes() for name in (f"{RELAY[0]}-whole", "relay")]
    print(f"relay: losses differ by {worst:.1e} at most, ledgers {'equal' if ledgers[0] == ledgers[1] else 'differ'}")
    return {"layouts": RELAY, "kills": done, "worst_loss": worst, "ledger_equal": ledgers[0] == ledgers[1]}


def report(result: dict[str, Any]) -> str:
    """The result as a page of text."""
    lines = [
        "# Killed and gone on",
        "",
        f"`python benchmarks/kill_sweep.py --seed {result['seed']}`: {STEPS} steps, a checkpoint every {EVERY}, "
        f"float32, dropout 0.1. {result['machine']}",
        "",
        "| layout | killed ranks | aimed at | steps logged | half-written checkpoint left | went on from |",
        "|---|---|---|---|---|---|",
    ]
    every = [*result["runs"], result["relay"]]
    for one in (one for run in every for one in run["kills"]):
        saving = "yes" if one["saving"] else "no"
        lines.append(
            f"| {one['layout']} | {one['victims']} | {one['aimed']} | {one['step']} | {saving} | {one['checkpoint']} |"
        )
    lines.append("")
    for run in result["runs"]:
        words = f"differs: {', '.join(run['different'])}" if run["different"] else "equal byte for byte"
        lines.append(f"- {run['layout']}: metrics (clocks aside), ledger and last checkpoint {words}.")
    relayed = result["relay"]
    ledgers = "equal" if relayed["ledger_equal"] else "different"
    lines.append(
        f"- Another layout after each kill ({', '.join(relayed['layouts'])}): losses within "
        f"{relayed['worst_loss']:.1e} of {relayed['layouts'][0]} alone, ledger {ledgers}."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sweep; write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        data.build(work)
        runs = [one_layout(work, layout, chance) for layout in SAME_LAYOUT]
        result = {
            "seed": asked.seed,
            "machine": f"{len(os.sched_getaffinity(0))} CPU cores shared with other programs, torch "
            f"{version('torch')}, megatron-core {version('megatron-core')}, Python {platform.python_version()}.",
            "runs": runs,
            "relay": relay(work, chance),
        }
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    OUT.with_suffix(".md").write_text(report(result), encoding="utf-8")
    sound = not any(run["different"] for run in runs)
    relayed = result["relay"]
    return 0 if sound and relayed["worst_loss"] <= TOLERANCE and relayed["ledger_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
