"""The plan of a run, printed before it starts: ranks, corpus, steps, warnings."""

from __future__ import annotations

import os

from lapse_elmo.config.training import Config
from lapse_elmo.cursor import Cursor
from lapse_elmo.devices import Device, unused_gpus
from lapse_elmo.fallbacks import model_fallbacks, product_lines
from lapse_elmo.metrics.run_log import table
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.engines import server_fallbacks
from lapse_elmo.run_folder import ResumePoint
from lapse_elmo.training_data import TrainingData

# Pushers that were measured to learn as well as one (benchmarks/learning.md): while the batch grows, and with full
# batches from the first step if the gradients for frequent rows are summed over the nodes.
MOST_PUSHERS, MOST_FULL_PUSHERS = 64, 16
MOST_DENSE_PUSHERS = 16  # ranks with --dense ps
MOST_LOCAL_STEPS = 16


def plan_lines(
    config: Config, world: World, data: TrainingData, device: Device, cursor: Cursor, start: ResumePoint
) -> list[str]:
    """Return the table of ranks and a description of what is about to be trained (collective)."""
    part = cursor.part
    numbers = data.train.shards_of(part.first, part.end)
    files = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    row = (
        str(world.rank), world.host, str(os.getpid()), str(world.node), files, str(device.device),
        str(device.threads),
    )
    head = ("rank", "host", "pid", "node", "shards", "device", "threads")
    lines = [table([head, *world.allgather(row)])]
    lines.append(
        f"{data.train.num_sentences:,} training sentences ({data.train.num_tokens:,} tokens, "
        f"{data.train.num_unknown / max(data.train.num_tokens, 1):.1%} unknown), {data.heldout.num_sentences:,} "
        f"held-out, {data.vocabulary.size:,} classes; {cursor.steps_of(cursor.epoch):,} steps in this "
        f"epoch, {cursor.num_steps:,} in all"
    )
    lines += start.notes
    if start.path is not None:
        how = "with the same batches" if cursor.exact else "the rest of the epoch is redistributed over the ranks"
        lines.append(f"resumes from {start.path}: step {cursor.step:,}, epoch {cursor.epoch + 1}, {how}")
    own = [*model_fallbacks(config.model, device.device), *server_fallbacks(config.server.ps)]
    own += unused_gpus(config.devices, device.device)
    lines += lines_of_all(world, [*own, *product_lines(config.model, device.device)])
    if config.softmax.num_samples >= data.vocabulary.size:
        lines.append(
            f"--num-samples {config.softmax.num_samples:,} is not below the {data.vocabulary.size:,} classes: "
            "training uses the full softmax"
        )
    lines += many_pushers(config, world.size, world.num_nodes) + local_step_lines(config, world.num_nodes)
    return lines


def many_pushers(config: Config, num_ranks: int, num_nodes: int) -> list[str]:
    """Return warnings if rows may get too many pushes per step: those of frequent words, or of the LSTM."""
    if config.optimizer.optimizer != "adagrad":
        return []
    return _many_for_dense(config, num_ranks) + _many_for_words(config, num_ranks, num_nodes)


def _many_for_dense(config: Config, num_ranks: int) -> list[str]:
    if config.training.dense != "ps" or num_ranks <= MOST_DENSE_PUSHERS:
        return []
    return [
        f"{num_ranks} ranks push gradients of the LSTM per step: no more than {MOST_DENSE_PUSHERS} were measured "
        "with --dense ps, and the model may learn less per token; drop it, or start fewer ranks, with more threads "
        "per rank"
    ]


def _many_for_words(config: Config, num_ranks: int, num_nodes: int) -> list[str]:
    pushers, what = (num_nodes, "nodes") if config.server.shares_rows else (num_ranks, "ranks")
    full = not config.training.first_batch
    summed = config.server.shares_rows and config.server.frequent_rows != 0
    most = (MOST_FULL_PUSHERS if summed else 1) if full else MOST_PUSHERS
    if pushers <= most:
        return []
    instead = f"start fewer {what}, with more threads per rank" + ", or let the batch grow (--first-batch)" * full
    return [
        f"{pushers} {what} push gradients at each step: with more than {most}, the rows of frequent words may move too "
        f"far and the model learn less per token; {instead}"
    ]


def local_step_lines(config: Config, num_nodes: int) -> list[str]:
    """Return what local steps cost, if there are any."""
    every = config.training.local_steps
    if every == 1 or num_nodes == 1:
        return []
    known = "up to 2.3 % of perplexity were measured" if every <= MOST_LOCAL_STEPS else "not measured for so many"
    return [
        f"--local-steps {every}: the nodes average the LSTM's parameters every {every} steps, which costs quality per "
        f"token ({known}); saves and evaluations wait for these steps"
    ]


def lines_of_all(world: World, own: list[str]) -> list[str]:
    """Return the distinct lines of all ranks (collective); those not of all ranks say which ranks they are from."""
    senders: dict[str, list[str]] = {}
    for lines, where in world.allgather((own, str(world))):
        for line in lines:
            senders.setdefault(line, []).append(where)
    size = world.size
    return [
        line if len(ranks) == size else f"{line} ({len(ranks)} of {size} ranks, the first is {ranks[0]})"
        for line, ranks in senders.items()
    ]


def show_plan(
    config: Config, world: World, data: TrainingData, device: Device, start: ResumePoint, memory: tuple[str, ...]
) -> None:
    """Print what ``--dry-run`` shows (collective)."""
    cursor = Cursor(config, world, data.train, start.cursor)
    lines = [*plan_lines(config, world, data, device, cursor, start), *memory]
    if world.rank == 0:
        print("\n".join([*lines, f"nothing was started; the run would be in {config.run.run_dir}"]))
