"""Names of ways to run one recipe: `tp2_sp_pp2_cp2_dp2`, `recompute_full`, `unpacked`. No torch.

A name is any of these parts, joined by `_`, in any order, each at most once; what is not named is off.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from megatron_vlm.config import rules
from megatron_vlm.config.schema import Config

GRAMMAR = """\
  tpN   tensor parallel over N processes          sp    and the sequence, over the same ones
  ppN   N pipeline stages                         vppN  N virtual stages on each
  cpN   context parallel: a row over N processes  dpN   data parallel: N copies of the model
  gather, ring, ulysses   how attention sees the whole row (else parallel.context_method)
  vision_data, vision_tensor   how tower and connector are spread (else parallel.vision)
  recompute_full, recompute_selective, recompute_none   else as in the recipe
  packed (as rows are), unpacked (each sample in a row of its own)
  one   nothing of all this: one process, the recipe's recomputation, packed rows"""

_DEGREES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context", "dp": "data"}
_PART = re.compile(
    r"(?P<degree>tp|pp|vpp|cp|dp)(?P<number>[1-9]\d{0,4})|(?P<sequence>sp)|recompute_(?P<recompute>full|selective|none)"
    r"|(?P<packing>packed|unpacked)|(?P<method>gather|ring|ulysses)"
    r"|vision_(?P<vision>data|tensor)|(?P<one>one)"
)


@dataclass(frozen=True)
class Variant:
    """One way to run a recipe."""

    name: str
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    context_method: str = ""
    """Empty = as in the recipe."""
    vision: str = ""
    """Empty = as in the recipe."""
    data: int = 1
    recompute: str = ""
    """Empty = as in the recipe."""
    packed: bool = True

    @property
    def world(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    def settings(self, config: Config, device: str = "cpu") -> Config:
        """`config` run this way on `device`. Raises ValueError, with the name and the numbers, where it does not fit.

        `parallel.pipeline_layers` stays only where it has an entry for each chunk.
        """
        chunks = self.pipeline * self.virtual_pipeline
        layers = config.parallel.pipeline_layers
        found = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, device=device),
            parallel=dataclasses.replace(
                config.parallel,
                tensor=self.tensor,
                sequence=self.sequence,
                pipeline=self.pipeline,
                virtual_pipeline=self.virtual_pipeline,
                pipeline_layers=layers if len(layers) == chunks else (),
                context=self.context,
                context_method=self.context_method or config.parallel.context_method,
                vision=self.vision or config.parallel.vision,
            ),
            train=dataclasses.replace(config.train, recompute=self.recompute or config.train.recompute),
        )
        try:
            rules.check(found, self.world)
        except ValueError as error:
            raise ValueError(f"layout {self.name} ({self.world} processes): {error}") from error
        if not self.packed and (config.train.residual_dropout or config.train.response_dropout):
            raise ValueError(
                f"layout {self.name}: which channels drop depends on the place in the row, so unpacked rows drop "
                "others. Compare them with train.residual_dropout=0 train.response_dropout=0."
            )
        return found


def parse(name: str) -> Variant:
    """The variant of a name. Raises ValueError, with the part at fault, for what the grammar does not know."""
    fields: dict[str, int | bool | str] = {}
    rest = name
    while rest:
        match = _PART.match(rest)
        if not match or rest[match.end() :][:1] not in ("", "_") or rest.endswith("_"):
            raise ValueError(f"layout {name!r}: {rest!r} is no part of a name. Parts, joined by _:\n{GRAMMAR}")
        for field, value in _fields(match).items():
            if field in fields:
                raise ValueError(f"layout {name!r} sets {field} twice. Parts, joined by _, each once:\n{GRAMMAR}")
            fields[field] = value
        rest = rest[match.end() + 1 :]
    if not name:
        raise ValueError(f"a layout has an empty name. Parts, joined by _:\n{GRAMMAR}")
    return Variant(name, **fields)  # type: ignore[arg-type]


def _fields(match: re.Match[str]) -> dict[str, int | bool | str]:
    part = match.groupdict()
    if part["degree"]:
        return {_DEGREES[part["degree"]]: int(part["number"])}
    if part["sequence"]:
        return {"sequence": True}
    if part["recompute"]:
        return {"recompute": part["recompute"]}
    if part["method"]:
        return {"context_method": part["method"]}
    if part["vision"]:
        return {"vision": part["vision"]}
    if part["packing"]:
        return {"packed": part["packing"] == "packed"}
    return {}
