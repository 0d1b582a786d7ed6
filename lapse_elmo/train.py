"""``bin/train``: the training loop, in the order of what happens."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from lapse_elmo import checkpoint
from lapse_elmo.batches import Batch, BatchStream, WorkerPart
from lapse_elmo.checkpoint import Progress
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import DEFAULT_SHARDS, DEFAULT_VOCAB, Config, parse_train
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.devices import Device, choose_device, remarks
from lapse_elmo.errors import ConfigError, CorpusError, OutputError, TrainingError
from lapse_elmo.evaluate import Perplexity, evaluate, unigram_perplexity
from lapse_elmo.metrics.run_log import EVENTS, METRICS, Meter, RunLog, table
from lapse_elmo.metrics.versions import versions
from lapse_elmo.parameters import Parameters
from lapse_elmo.step import AnnouncedBatch, TrainingStep
from lapse_elmo.world import World


@dataclass(frozen=True)
class Corpus:
    """What a run reads."""

    vocabulary: Vocabulary
    train: ShardSet
    heldout: ShardSet


@dataclass(frozen=True)
class EpochResult:
    """One row of the final table."""

    epoch: float  # epochs done so far; a fraction where the run ended within one
    num_tokens: int
    tokens_per_s: float
    training_loss: float
    heldout: Perplexity


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, join the world, train."""
    config = parse_train(argv)
    world = enter()
    config = name_run(config, world)
    corpus = open_corpus(config, world)
    run_dir = Path(config.run.run_dir)
    device = choose_device(config.devices, world)
    parameters = Parameters(config, corpus.vocabulary.size, world, device.device)
    world.agree(lambda: prepare_run_dir(run_dir, config))  # the first to write, once nothing else can be refused
    parameters.initialise()
    results = train(config, world, corpus, parameters, device, run_dir)
    unigram = unigram_perplexity(corpus.train, corpus.heldout, config.data.boundaries, world)
    parameters.server.close()
    if world.rank == 0:
        print(summary(results, unigram, run_dir))


def train(
    config: Config, world: World, corpus: Corpus, parameters: Parameters, device: Device, run_dir: Path
) -> list[EpochResult]:
    """Collective: train until the epochs, the steps or the minutes are over; results of each (begun) epoch."""
    stream = batch_stream(config, world, corpus.train)
    num_steps = stream.steps_per_epoch * config.training.epochs
    num_steps = min(num_steps, config.training.max_steps or num_steps)
    max_s = config.training.max_minutes * 60 or math.inf
    log = RunLog(run_dir, config.run, num_steps, stream.steps_per_epoch, world.rank == 0, max_s)
    announce_start(config, world, corpus, stream, device, log, num_steps)
    deadline = time.monotonic() + max_s
    step_once = TrainingStep(
        config, world, parameters, device.device, mean_targets(config, world, corpus.train),
        lambda: time.monotonic() > deadline,
    )
    results: list[EpochResult] = []
    best, newest = None, None
    meter, whole = Meter(), Meter()
    for step, batch in enumerate(look_ahead(batches(stream, num_steps), step_once, config.training.lookahead), start=1):
        result = step_once(batch, step)
        meter.add(result)
        whole.add(result)
        log.step(step, meter)
        last = step == num_steps or result.stop
        if step % config.run.report_every == 0 or last:
            log.report(step, meter)
            meter = Meter()
        if step % stream.steps_per_epoch == 0 or last:
            results.append(finish_epoch(config, world, corpus, parameters, device, log, step, stream, whole))
            where = Progress(step, *divmod(step, stream.steps_per_epoch))
            perplexity = results[-1].heldout.mean
            newest = checkpoint.save(
                run_dir, parameters, corpus.vocabulary, where, {"heldout_perplexity": perplexity}, world
            )
            if best is None or perplexity <= best[0]:
                best = (perplexity, newest)
            if world.rank == 0:
                checkpoint.prune(run_dir, {newest, best[1]})
            meter, whole = Meter(), Meter()
        if last:
            break
    log.close()
    return results


def open_corpus(config: Config, world: World) -> Corpus:
    """Collective: the vocabulary and both splits of shards, checked against each other."""
    data = config.data

    def check_defaults() -> None:
        if data.shards == DEFAULT_SHARDS and not Path(data.shards).exists():
            raise CorpusError(
                f"there are no shards at {DEFAULT_SHARDS} yet: run 'make train' for a first corpus, or bin/preprocess "
                "vocab and bin/preprocess shards on your text (README.md), or name others by --shards and --vocab"
            )
        if data.vocab == DEFAULT_VOCAB and data.shards != DEFAULT_SHARDS and not Path(data.vocab).exists():
            raise CorpusError(f"there is no vocabulary at {DEFAULT_VOCAB}: name that of {data.shards} by --vocab")

    world.agree(check_defaults)
    vocabulary = world.together(lambda: Vocabulary.load(data.vocab))
    train_set = world.together(lambda: ShardSet.open(data.shards, "train", vocabulary))
    heldout = world.together(lambda: ShardSet.open(data.heldout or data.shards, "heldout", vocabulary))
    if train_set.num_sentences < world.size:
        raise ConfigError(
            f"{train_set.num_sentences} training sentences cannot be shared by {world.size} ranks: start fewer ranks"
        ).on_every_rank()
    if not data.boundaries and (data.max_length == 1 or heldout.num_tokens == heldout.num_sentences):
        raise ConfigError(
            "the held-out sentences have no targets: single tokens need --boundaries"
        ).on_every_rank()
    return Corpus(vocabulary, train_set, heldout)


def name_run(config: Config, world: World) -> Config:
    """The config with a folder of its own for the run, named by the time, where none was given."""
    if config.run.run_dir:
        return config
    folder = world.bcast(time.strftime("runs/%Y%m%d-%H%M%S"))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=folder))


def prepare_run_dir(run_dir: Path, config: Config) -> None:
    """Make the folder of a run, with its resolved config, versions and vocabulary.

    :raises OutputError: if there is a run already and it may not be overwritten, or the folder cannot be written.
    """
    checkpoints = run_dir / checkpoint.FOLDER
    holds_run = (run_dir / METRICS).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    if holds_run and not config.run.overwrite:
        raise OutputError(f"{run_dir} holds a run already: choose another --run-dir, or give --overwrite to replace it")
    try:
        vocabulary = Path(config.data.vocab).read_bytes()  # perhaps that of the run which is replaced
        for folder in (EVENTS, checkpoint.FOLDER):
            if (run_dir / folder).exists():
                shutil.rmtree(run_dir / folder)
        (run_dir / METRICS).unlink(missing_ok=True)
        checkpoints.mkdir(parents=True)
        (run_dir / "config.toml").write_text(tomli_w.dumps(as_tables(config)), encoding="utf-8")
        (run_dir / "versions.toml").write_text(tomli_w.dumps(versions()), encoding="utf-8")
        (run_dir / "vocab.txt").write_bytes(vocabulary)
    except OSError as error:
        raise OutputError(f"cannot write to --run-dir {run_dir}: {error.strerror}; choose another") from None


def batch_stream(config: Config, world: World, shards: ShardSet) -> BatchStream:
    """This rank's training batches."""
    return BatchStream(
        shards, world.rank, world.size, config.training.batch_size, config.training.seed, config.data.max_length,
        config.data.boundaries,
    )


def mean_targets(config: Config, world: World, shards: ShardSet) -> float:
    """How many targets, of both directions, a rank's batch has on average."""
    length = min(shards.num_tokens / shards.num_sentences, config.data.max_length)
    sentences = min(config.training.batch_size, shards.num_sentences / world.size)
    return max(2 * sentences * (length + (1 if config.data.boundaries else -1)), 1.0)


def batches(stream: BatchStream, num_steps: int, first_step: int = 0) -> Iterator[Batch]:
    """The batches of steps ``first_step`` .. ``num_steps`` - 1, epoch after epoch."""
    step = first_step
    while step < num_steps:
        epoch, done = divmod(step, stream.steps_per_epoch)
        for batch in stream.epoch(epoch, done):
            if step == num_steps:
                return
            yield batch
            step += 1


def look_ahead(source: Iterator[Batch], step_once: TrainingStep, lookahead: int) -> Iterator[AnnouncedBatch]:
    """The batches of ``source``, each announced ``lookahead`` clocks before it is handed out."""
    announced: deque[AnnouncedBatch] = deque()
    for clock, batch in enumerate(source):
        announced.append(step_once.announce(batch, clock))
        if len(announced) > lookahead:
            yield announced.popleft()
    yield from announced


def finish_epoch(
    config: Config, world: World, corpus: Corpus, parameters: Parameters, device: Device, log: RunLog, step: int,
    stream: BatchStream, whole: Meter,
) -> EpochResult:
    """Collective: settle the parameters and measure held-out perplexity."""
    tokens_per_s = whole.tokens_per_s
    parameters.settle()
    start = time.perf_counter()
    heldout = evaluate(parameters, corpus.heldout, config.data, config.training.batch_size, world, device.device)
    epoch = -(-step // stream.steps_per_epoch)
    if not math.isfinite(heldout.mean):
        raise TrainingError(
            f"held-out perplexity is not finite at step {step}; this model is not saved; lower --learning-rate, "
            "--loss-scale or --clip-norm"
        ).on_every_rank()
    log.write(
        "epoch", step,
        {
            "epoch": epoch, "train/epoch_loss_nats": whole.loss, "train/epoch_tokens": whole.num_tokens,
            "train/epoch_tokens_per_s": tokens_per_s, "train/cut_sentences": whole.num_cut,
            "heldout/forward_perplexity": heldout.forward, "heldout/backward_perplexity": heldout.backward,
            "heldout/mean_perplexity": heldout.mean, "heldout/evaluation_s": time.perf_counter() - start,
        },
    )
    log.say(
        f"epoch {epoch} ended at step {step:,}: loss {whole.loss:.3f}, held-out perplexity {heldout.mean:.1f} "
        f"(forward {heldout.forward:.1f}, backward {heldout.backward:.1f})"
    )
    if whole.num_cut:
        log.say(f"{whole.num_cut:,} sentences were cut at --max-length {config.data.max_length}")
    return EpochResult(step / stream.steps_per_epoch, whole.num_tokens, tokens_per_s, whole.loss, heldout)


def announce_start(
    config: Config, world: World, corpus: Corpus, stream: BatchStream, device: Device, log: RunLog, num_steps: int
) -> None:
    """Collective: log the table of ranks and what is about to be trained."""
    part: WorkerPart = stream.part
    numbers = corpus.train.shards_of(part.first, part.end)
    files = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    row = (
        str(world.rank), world.host, str(world.node), "server+worker", str(world.rank), files, str(device.device),
        str(device.threads),
    )
    rows = world.allgather(row)
    log.say(table([("rank", "host", "node", "role", "worker", "shards", "device", "threads"), *rows]))
    log.say(
        f"{corpus.train.num_sentences:,} training sentences ({corpus.train.num_tokens:,} tokens, "
        f"{corpus.train.num_unknown / max(corpus.train.num_tokens, 1):.1%} unknown), {corpus.heldout.num_sentences:,} "
        f"held-out, {corpus.vocabulary.size:,} classes; {stream.steps_per_epoch:,} steps an epoch, {num_steps:,} in all"
    )
    for line in remarks(config.model, device.device):
        log.say(line)
    if config.softmax.num_samples >= corpus.vocabulary.size:
        log.say(
            f"--num-samples {config.softmax.num_samples:,} is not below the {corpus.vocabulary.size:,} classes: "
            "training uses the full softmax"
        )


def summary(results: list[EpochResult], unigram: float, run_dir: Path) -> str:
    """The final table."""
    head = ("epochs", "tokens", "tokens/s", "training loss", "held-out forward", "backward", "mean", "unigram")
    rows = [
        (
            *(f"{r.epoch:.2f}".removesuffix(".00"), f"{r.num_tokens:,}"),
            *(f"{r.tokens_per_s:,.0f}", f"{r.training_loss:.3f}"),
            *(f"{value:.1f}" for value in (r.heldout.forward, r.heldout.backward, r.heldout.mean, unigram)),
        )
        for r in results
    ]
    return f"\n{table([head, *rows])}\n\nPerplexity is exp(loss) a target; the run is in {run_dir}."
