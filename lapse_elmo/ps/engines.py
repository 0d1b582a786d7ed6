"""The parameter servers by name; a native package is imported only if it is chosen."""

from __future__ import annotations

from typing import Any

from lapse_elmo import native
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import Sampler


def server_fallbacks(name: str) -> list[str]:
    """Return warnings about slow fallbacks that the server ``name`` uses on this rank, and why, for the log."""
    if name != "embedded":
        return []
    from lapse_elmo.ps.rows import SOURCE

    if native.load(SOURCE) is not None:
        return []
    return [
        "the server's rows are pulled and pushed in torch under kernel locks, on all ranks, which is slower than C: "
        f"{native.problem(SOURCE)}"
    ]


def make_server(
    name: str, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0,
    **options: Any,
) -> ParameterServer:
    """Return a new server for the rows of ``layout`` (collective).

    Args:
        name: The engine, as in ``--ps``.
        world: The ranks.
        layout: The segments.
        sampled: See :class:`~lapse_elmo.ps.api.ParameterServer`, as ``first_sample``.
        first_sample: Number of the first sample.
        **options: Further arguments of the engine's constructor.
    """
    if name == "lapse":
        from lapse_elmo.ps.lapse_package import LapseServer

        return LapseServer(world, layout, sampled, first_sample, **options)
    if name == "adapm":
        from lapse_elmo.ps.adapm_package import AdapmServer

        return AdapmServer(world, layout, sampled, first_sample, **options)
    if "traced" in options:
        from lapse_elmo.ps.trace import TracedServer

        return TracedServer(world, layout, sampled, first_sample, **options)
    from lapse_elmo.ps.embedded import EmbeddedServer

    return EmbeddedServer(world, layout, sampled, first_sample, **options)
