"""The options of bin/train, evaluate, export and embed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from lapse_elmo.config.cli import as_tables, options_of
from lapse_elmo.config.trained_model import (
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    parse_embed,
    parse_evaluate,
    parse_export,
)
from lapse_elmo.config.training import (
    PRESETS,
    Config,
    ModelConfig,
    from_tables,
    parse_train,
)
from lapse_elmo.errors import ConfigError

# A value other than the default for options whose values are checked against a list or against other options.
OTHER = {
    "preset": "original", "context": "mix", "lstm": "allennlp", "precision": "bf16", "lstm_init": "orthogonal",
    "distribution": "uniform", "sampling_scheme": "pool", "share_samples": "job", "row_accumulators": "row",
    "optimizer": "sgd", "dense_optimizer": "sgd", "dense": "ps", "device": "cuda", "progress": "bar", "split": "train",
    "ps": "lapse", "technique": "static", "schedule": "linear", "init_accumulators": "kept", "save_at_tokens": (5, 7),
    "trace_rows": ("3", "5-7", "random:2"), "dense_average": 0.25, "node_sums": "bf16", "local_steps": 3,
}
# What contradicts other options.
ALONE = (
    "plan_nodes", "dense", "precision", "num_tries", "replacement", "distribution", "sync", "init_embedding",
    "trace_rows", "plan_ranks", "network_gbit", "network_us",
)
# What an option needs in addition to be taken: another option of its group.
NEEDS: dict[str, dict[str, object]] = {
    "init_accumulators": {"init_from": "runs/first"},
    "decay_tokens": {"schedule": "linear"}, "final_rate": {"schedule": "cosine"},
    **{name: {"plan_nodes": 2} for name in ("plan_ranks", "network_gbit", "network_us")},
}


def other_value(name: str, value: object) -> object:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.125
    return (0, 2) if isinstance(value, tuple) else "elsewhere"


def flags(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [f"{flag}={value}"]


def changed(config: object, group: str | None, name: str) -> object:
    holder = getattr(config, group) if group else config
    return getattr(holder, name)


OPTIONS = [pytest.param(group, item.name, id=item.name) for group, item, _ in options_of(Config)]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_arrives_from_command_line_and_file(tmp_path: Path, group: str, name: str) -> None:
    value = other_value(name, changed(Config(), group, name))
    assert value != changed(Config(), group, name)
    needed = NEEDS.get(name, {})
    by_flag = parse_train([*flags(name, value), *(word for item in needed.items() for word in flags(*item))])
    assert changed(by_flag, group, name) == value
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps({group: {name: list(value) if isinstance(value, tuple) else value, **needed}}))
    assert parse_train(["--config", str(path)]) == by_flag
    path.write_text(tomli_w.dumps(as_tables(by_flag)))
    assert parse_train(["--config", str(path)]) == by_flag


def test_numbers_of_tokens_as_people_write_them(tmp_path: Path) -> None:
    wanted = (1_000_000, 10_000_000, 100_000_000)
    for given in (["1M,10M,100M"], ["1e6", "10m", "100_000K"]):
        assert parse_train(["--save-at-tokens", *given]).run.save_at_tokens == wanted
    (tmp_path / "config.toml").write_text("[run]\nsave_at_tokens = [1_000_000, 10_000_000, 100_000_000]\n")
    assert parse_train(["--config", str(tmp_path / "config.toml")]).run.save_at_tokens == wanted
    with pytest.raises(ConfigError, match=r"^argument --save-at-tokens: invalid int value: '1M,10X' \(see .*--help\)$"):
        parse_train(["--save-at-tokens", "1M,10X"])
    with pytest.raises(ConfigError, match=r"--save-at-tokens is .*expected numbers above 0"):
        parse_train(["--save-at-tokens", "0M,1M"])


def test_saved_config_of_many_options_reads_back(tmp_path: Path) -> None:
    argv = [
        word for group, item, _ in options_of(Config) if item.name not in ALONE
        for word in flags(item.name, other_value(item.name, changed(Config(), group, item.name)))
    ]
    config = parse_train(argv)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(as_tables(config)))
    assert parse_train(["--config", str(path)]) == config
    assert from_tables(json.loads(json.dumps(as_tables(config)))) == config  # as a checkpoint keeps it


def unbroken(text: str) -> str:
    """The text in one line, without the line breaks that argparse makes, also after hyphens."""
    return re.sub(r"(?<=\w)- ", "-", " ".join(text.split()))


@pytest.mark.parametrize(
    ("parse", "schema"),
    [(parse_train, Config), (parse_evaluate, EvaluateConfig), (parse_export, ExportConfig), (parse_embed, EmbedConfig)],
)
def test_help_shows_every_option_and_default(
    capsys: pytest.CaptureFixture[str], parse: Callable[[list[str]], object], schema: type
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out
    assert max(map(len, lines.splitlines())) <= 120
    text = unbroken(lines)
    for group, item, _ in options_of(schema):
        assert (item.metadata["metavar"] if item.metadata["positional"] else "--" + item.name.replace("_", "-")) in text
        assert unbroken(item.metadata["help"]) in text
        if group:
            assert f"{group}: " in text
        if isinstance(item.default, float | int) and not isinstance(item.default, bool):
            assert f"{item.metadata['help']} (default: {item.default})" in text


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    model = parse_train(["--preset", name]).model
    assert {key: getattr(model, key) for key in PRESETS[name]} == PRESETS[name]


def test_sizes_override_a_preset() -> None:
    model = parse_train(["--preset", "original", "--cell-size", "1024"]).model
    assert (model.projection_size, model.cell_size, model.num_layers) == (512, 1024, 2)


def test_default_model_is_the_small_preset() -> None:
    assert dataclasses.replace(ModelConfig(preset="small"), preset="") == ModelConfig()


def test_a_preset_on_the_command_line_replaces_sizes_of_a_file(tmp_path: Path) -> None:
    """A run's config.toml has its sizes, which would otherwise make --preset an option without effect."""
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(as_tables(parse_train([]))))
    assert parse_train(["--config", str(path)]).model == ModelConfig()
    model = parse_train(["--num-layers", "3", "--config", str(path), "--preset", "original"]).model
    assert (model.projection_size, model.cell_size, model.num_layers) == (512, 4096, 3)


def test_a_clip_of_zero_is_none() -> None:
    model = parse_train(["--cell-clip", "0", "--projection-clip", "0"]).model
    assert (model.cell_clip, model.projection_clip) == (0, 0)


def test_preset_in_a_file_with_sizes_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[model]\npreset = 'original'\n")
    model = parse_train(["--config", str(path), "--num-layers", "1"]).model
    assert (model.projection_size, model.num_layers) == (512, 1)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--sync --dense ps", ["--sync", "--dense allreduce"]),
        ("--dense ps --dense-optimizer adam", ["--dense ps", "--optimizer adagrad", "--dense-optimizer adam"]),
        ("--dense ps --dense-rate 0.1", ["--dense ps", "--learning-rate", "--dense-rate"]),
        ("--dense-rate -1", ["--dense-rate is -1.0"]),
        ("--dense ps --dense-average 0.1", ["--dense ps", "--dense-average"]),
        ("--dense-average 1.5", ["--dense-average is 1.5"]),
        ("--precision bf16 --lstm allennlp", ["--precision bf16", "--lstm fused"]),
        ("--device cpu --device-ids 0", ["--device-ids", "--device is cpu"]),
        ("--replacement --num-tries 9000", ["--num-tries", "replacement"]),
        ("--distribution uniform --num-tries 9000", ["--num-tries", "log-uniform"]),
        ("--distribution uniform --num-tries 9000 --optimizer sgd --dense ps", ["--num-tries", "log-uniform"]),
        ("--preset huge", ["--preset", "'huge'", "original"]),
        ("--epochs 0", ["--epochs is 0", "above 0"]),
        ("--batch-size -3", ["--batch-size is -3"]),
        ("--learning-rate nan", ["--learning-rate", "expected a number between"]),
        ("--learning-rate inf", ["--learning-rate", "expected a number between"]),
        ("--clip-norm -1", ["--clip-norm is -1"]),
        ("--clip-norm nan", ["--clip-norm", "expected a number between"]),
        ("--dropout 1", ["--dropout is 1.0", "[0, 1)"]),
        ("--recurrent-dropout -0.1", ["--recurrent-dropout is -0.1"]),
        ("--cell-size -5", ["--cell-size is -5"]),
        ("--cell-clip -1", ["--cell-clip is -1"]),
        ("--projection-clip -1", ["--projection-clip is -1"]),
        ("--plan-ranks 4", ["--plan-ranks", "--plan-nodes"]),
        ("--network-gbit 25", ["--network-gbit", "--plan-nodes"]),
        ("--max-steps -1", ["--max-steps is -1"]),
        ("--seed -1", ["--seed is -1"]),
        ("--threads -1", ["--threads is -1"]),
        ("--device-ids -1", ["--device-ids"]),
        ("--num-samples 0", ["--num-samples is 0"]),
        ("--num-tries -1", ["--num-tries is -1"]),
        ("--max-length 0", ["--max-length is 0"]),
        ("--initial-accumulator -1", ["--initial-accumulator is -1"]),
        ("--report-every 0", ["--report-every is 0"]),
        ("--batchsize 8", ["unknown option '--batchsize'", "'--batch-size'"]),
        ("--lr 8", ["unknown option '--lr'"]),
    ],
)
def test_refused(argv: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train(argv.split())
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("", "required: MODEL"),
        ("run --batch-size 0", "--batch-size is 0"),
        ("run --threads -1", "--threads is -1"),
        ("run --device cpu --device-ids 0", "--device-ids"), ("run --split test", "--split"),
        ("run --epochs 3", "unknown option '--epochs'"),
    ],
)
def test_evaluate_refuses(argv: str, part: str) -> None:
    """Errors are raised while the options are parsed; raised later, every rank would print them."""
    with pytest.raises(ConfigError) as caught:
        parse_evaluate(argv.split())
    assert part in str(caught.value)


def test_evaluate() -> None:
    config = parse_evaluate(["runs/a", "--device", "cuda", "--device-ids", "1", "2"])
    assert config.model == "runs/a"
    assert config.devices.device_ids == (1, 2)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("run", "required: --output"), ("run --output a --device cpu", "unknown option '--device'"),
        ("--output a", "required: MODEL"),
    ],
)
def test_export_refuses(argv: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_export(argv.split())
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("run --output a", "required: TEXT"), ("run text --output a --batch-size 0", "--batch-size is 0"),
        ("run text --output a --layers last", "--layers"), ("run text", "required: --output"),
    ],
)
def test_embed_refuses(argv: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_embed(argv.split())
    assert part in str(caught.value)


def test_embed() -> None:
    config = parse_embed(["runs/a", "one.txt", "two.gz", "--output", "vectors.hdf5", "--layers", "top"])
    assert (config.model, config.texts, config.layers) == ("runs/a", ("one.txt", "two.gz"), "top")


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "technique"),
    [
        ([], "adaptive"), (["--sync"], "relocation"), (["--ps", "lapse"], "relocation"),
        (["--ps", "adapm"], "adaptive"), (["--technique", "static", "--sync"], "static"),
        (["--technique", "static", "--sync", "--sampling-scheme", "local"], "static"),
    ],
)
def test_the_technique_keeps_what_a_run_promises(argv: list[str], technique: str) -> None:
    config = parse_train(argv)
    assert config.server.technique_for(config.training.sync) == technique


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sync", "--technique", "adaptive"], "--sync needs rows with one copy.*give relocation or static"),
        (["--sync", "--technique", "replication"], "--sync needs rows with one copy"),
        (["--sync", "--ps", "adapm"], "--sync needs rows with one copy, and --ps adapm makes replicas"),
        (["--init-accumulators", "kept"], "--init-accumulators kept needs a model.*give --init-from"),
        (["--sync", "--sampling-scheme", "local"], "--sync needs samples that repeat.*--technique static"),
        (["--nodes", "2", "--ps", "lapse"], "--nodes is for the embedded server"),
        (["--trace-rows", "1", "--ps", "lapse"], "--trace-rows is for the embedded server"),
        (["--trace-rows", "9-", "3"], "--trace-rows is 9-, expected a row number, a range such as 0-99, or random:N"),
        (["--trace-rows", "9-8"], "--trace-rows is 9-8, expected a range from low to high"),
        (["--trace-rows", "0-9999", "random:1"], "--trace-rows is 10,001 rows, expected at most 10,000"),
        (["--staleness", "1"], "--staleness is 1, expected 2 or more"),
        (["--frequent-rows", "-2"], "--frequent-rows is -2, expected -1 or more"),
        (["--frequent-rows", "5", "--ps", "lapse"], "--frequent-rows is for the embedded server, not for --ps lapse"),
    ],
)
def test_impossible_server_options_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train(argv)


def test_a_falling_rate_needs_a_schedule() -> None:
    for option in ("--decay-tokens", "--final-rate"):
        with pytest.raises(ConfigError, match="give --schedule linear, cosine or inverse-sqrt"):
            parse_train([option, "1"])
    with pytest.raises(ConfigError, match=r"--schedule inverse-sqrt needs .*--decay-tokens N"):
        parse_train(["--schedule", "inverse-sqrt"])
    with pytest.raises(ConfigError, match=r"--final-rate is 2\.0, expected a fraction from 0 to 1"):
        parse_train(["--schedule", "linear", "--final-rate", "2"])
