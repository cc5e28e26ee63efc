"""`python -m megatron_vlm.train RECIPE.yaml [section.key=value ...]`: one training run.

Alone it is a run of one process; under torchrun (or srun with the same variables) every process runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from megatron_vlm.config import errors, load, rules
from megatron_vlm.config import help as config_help
from megatron_vlm.config.schema import Config

_EPILOG = """\
A recipe is a YAML file of the settings below; `base: OTHER.yaml` in it is read first. Overrides win over
the recipe, the recipe over its base, all over the defaults, which stand behind the = here.

"""
_EXAMPLES = """\
examples:
  python -m megatron_vlm.train examples/recipes/tiny/stage1.yaml train.steps=20 run.dir=/tmp/try
  torchrun --nproc-per-node 2 -m megatron_vlm.train examples/recipes/tiny/stage1.yaml parallel.tensor=2
"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vlm.train",
        description="Train a vision-language model as a recipe says. A run that was stopped goes on where it was.",
        epilog=_EXAMPLES + "\n" + _EPILOG + config_help.settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the settings")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and stop")
    return parser.parse_intermixed_args(argv)  # options may stand between overrides


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code. Errors of the user's are one paragraph on stderr, without a traceback."""
    asked = arguments(argv)
    rank = int(os.environ.get("RANK", 0))
    try:
        config = load.load(asked.recipe, asked.overrides)
        if asked.print_config:
            print(load.dump(config), end="")
            return 0
        rules.check(config, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        # Every process found the same. A launcher ends all as soon as one has failed: rank 0 must have spoken by then.
        if rank == 0:
            _print_error(error)
        else:
            time.sleep(2.0)
        return 1
    return _train(config)


def _train(config: Config) -> int:
    from megatron_vlm.parallel import process  # torch takes seconds; the checks above need none of it

    try:
        backend = process.start(config.run)
        import torch.distributed as dist

        from megatron_vlm.parallel import groups  # Megatron, after process.start
        from megatron_vlm.parallel.layout import Layout
        from megatron_vlm.train import loop

        layout = Layout.of(config, dist.get_world_size())
        groups.initialize(layout, backend=backend, seed=config.train.seed, timeout_s=process.TIMEOUT_S)
        return loop.train(config, layout).code
    except (ValueError, FloatingPointError, OSError) as error:
        if process.speaks(str(error)):
            _print_error(error)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Start the same command again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    finally:
        process.leave()


def _print_error(error: Exception) -> None:
    print(f"error: {errors.words(error)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
