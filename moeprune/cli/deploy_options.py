"""Options that say where a model is to be served."""

from __future__ import annotations

from typing import Annotated

import typer

from moeprune.deploy.serving import ENGINES
from moeprune.deploy.tuned import GPUS

NAMES = ", ".join(ENGINES)
Tp = Annotated[int, typer.Option(help="Tensor-parallel size.")]
Ep = Annotated[int, typer.Option(help="Expert-parallel size; for vLLM tensor- times data-parallel size.")]
Redundant = Annotated[int, typer.Option(help="Redundant experts (vLLM's EPLB, SGLang).")]
Gpu = Annotated[str | None, typer.Option(help=f"For tuned kernel files: {', '.join(GPUS)}.")]
