"""What a run is going to do, for the user to read before it does: ranks, corpus, steps, memory."""

from __future__ import annotations

import os

from lapse_elmo.config.training import Config
from lapse_elmo.cursor import Cursor
from lapse_elmo.devices import Device, product_lines, remarks
from lapse_elmo.metrics.run_log import table
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.engines import server_remarks
from lapse_elmo.run_folder import Corpus, Start


def plan_lines(
    config: Config, world: World, corpus: Corpus, device: Device, cursor: Cursor, start: Start
) -> list[str]:
    """Collective: the table of ranks, and what is about to be trained."""
    part = cursor.part
    numbers = corpus.train.shards_of(part.first, part.end)
    files = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    row = (
        str(world.rank), world.host, str(os.getpid()), str(world.node), "server+worker", str(world.rank), files,
        str(device.device), str(device.threads),
    )
    head = ("rank", "host", "pid", "node", "role", "worker", "shards", "device", "threads")
    lines = [table([head, *world.allgather(row)])]
    lines.append(
        f"{corpus.train.num_sentences:,} training sentences ({corpus.train.num_tokens:,} tokens, "
        f"{corpus.train.num_unknown / max(corpus.train.num_tokens, 1):.1%} unknown), {corpus.heldout.num_sentences:,} "
        f"held-out, {corpus.vocabulary.size:,} classes; {cursor.steps_of(cursor.epoch):,} steps in this "
        f"epoch, {cursor.num_steps:,} in all"
    )
    lines += start.notes
    if start.path is not None:
        how = "with the same batches" if cursor.exact else "with what is left of the epoch, shared out anew"
        lines.append(f"goes on from {start.path}: step {cursor.step:,}, epoch {cursor.epoch + 1}, {how}")
    own = [*remarks(config.model, device.device), *server_remarks(config.server.ps)]
    lines += remarks_of_all(world, [*own, *product_lines(config.model, device.device)])
    if config.softmax.num_samples >= corpus.vocabulary.size:
        lines.append(
            f"--num-samples {config.softmax.num_samples:,} is not below the {corpus.vocabulary.size:,} classes: "
            "training uses the full softmax"
        )
    return lines


def remarks_of_all(world: World, remarks: list[str]) -> list[str]:
    """Collective: the remarks of every rank, each distinct one once, with the ranks it is about unless all make it."""
    makers: dict[str, list[str]] = {}
    for theirs, where in world.allgather((remarks, str(world))):
        for remark in theirs:
            makers.setdefault(remark, []).append(where)
    size = world.size
    return [
        remark if len(ranks) == size else f"{remark} ({len(ranks)} of {size} ranks, the first is {ranks[0]})"
        for remark, ranks in makers.items()
    ]


def show_plan(
    config: Config, world: World, corpus: Corpus, device: Device, start: Start, memory: tuple[str, ...]
) -> None:
    """Collective: what ``--dry-run`` prints."""
    cursor = Cursor(config, world, corpus.train, start.cursor)
    lines = [*plan_lines(config, world, corpus, device, cursor, start), *memory]
    if world.rank == 0:
        print("\n".join([*lines, f"nothing was started; the run would be in {config.run.run_dir}"]))
