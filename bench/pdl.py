"""--pdl and --no-pdl: whether the kernels that torch.compile generates let the one behind them
start early (Inductor's option triton.enable_pdl; docs/engines.md). Records say in their details
which.
"""

from __future__ import annotations

import argparse

import torch

from sparsekern.integrations.inductor_pdl import PDL, VARIABLE, at_once, known


def add_option(parser: argparse.ArgumentParser, default: str) -> None:
    """default: what holds without the option, for its help."""
    parser.add_argument(
        "--pdl",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"early starts of the kernels behind generated ones (default: {default})",
    )


def choose(wanted: bool | None) -> None:
    """In this process, for what is compiled from now on, with the permission at once as in vLLM;
    None leaves it as it is."""
    if wanted is None:
        return
    if known():
        torch._inductor.config.triton.enable_pdl = wanted and at_once()
    elif wanted:
        raise RuntimeError(f"bench: expected a torch whose Inductor has {PDL}, got none.")


def is_on(device: torch.device, options: dict | None = None) -> bool:
    """Whether code generated now for the device has it. options: of one compilation, which win."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    chosen = known() and torch._inductor.config.triton.enable_pdl
    return bool((options or {}).get(PDL, chosen))


def environment(variables: dict[str, str], ours: bool, wanted: bool | None) -> dict[str, str]:
    """The variables of an engine's process: of ours with what is wanted, of others without any
    word on it, so that they run as they come."""
    found = dict(variables)
    if not ours:
        found.pop(VARIABLE, None)
    elif wanted is not None:
        found[VARIABLE] = "1" if wanted else "0"
    return found
