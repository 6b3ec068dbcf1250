"""`prefloop plan`: what a run needs before it starts."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from prefloop.cli.plumbing import RunFile, SetOption, StoreOption, console, described_run
from prefloop.records import NoDeviceError, PrefloopError

MOST_GIB = 1 << 20
"""A PiB: more is a slip of the hand."""


def plan(
    file: RunFile,
    *,
    memory: Annotated[
        float | None,
        Parameter(help="plan for a device with so many GiB, which need not be here; time is then not known"),
    ] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), help="as JSON, in bytes and seconds")] = False,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Say what a run needs: memory of each stage, time, tokens, the judge's cost, and what would make it fit."""
    from prefloop.planning import plan_run
    from prefloop.planning.plan import GIB
    from prefloop.planning.table import plan_table

    if memory is not None and not 0 < memory <= MOST_GIB:
        raise PrefloopError(f"--memory {memory:g}: expected GiB, more than 0 and at most {MOST_GIB:,}")
    with described_run(file, store, overrides, keep=False) as run:
        try:
            found = plan_run(run, None if memory is None else int(memory * GIB))
        except NoDeviceError as error:
            raise PrefloopError(f"{error}; to plan for a device elsewhere give its GiB: --memory 24") from None
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        console.print(plan_table(found), highlight=False)
