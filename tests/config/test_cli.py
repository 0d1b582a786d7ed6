"""Options of a dataclass on the command line and in TOML: precedence, types, help and error messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo.config.cli import as_tables, option, options_of, parse, parse_command
from lapse_elmo.errors import ConfigError


@dataclass(frozen=True)
class Cake:
    """Cake: what is baked"""

    flavour: str = option("plain", choices=("plain", "nut"), help="what it tastes of")
    layers: int = option(3, metavar="N", help="how many, 100% of them")
    sweetness: float = option(0.5, metavar="X", help="from 0 to 1")
    iced: bool = option(True, help="put icing on it")
    weights_kg: tuple[float, ...] = option((), metavar="KG", help="of each layer")
    note: str | None = option(None, metavar="TEXT", help="a dedication")

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"--layers is {self.layers}, expected a number above 0")


@dataclass(frozen=True)
class Oven:
    """Oven: how it is baked"""

    degrees: int = option(180, metavar="C", help="temperature")


@dataclass(frozen=True)
class Recipe:
    """All options."""

    cake: Cake = field(default_factory=Cake)
    oven: Oven = field(default_factory=Oven)


@dataclass(frozen=True)
class Order:
    """The options of the sub-command ``order``."""

    items: tuple[str, ...] = option(positional=True, metavar="ITEM", help="what to bring")
    table: int = option(help="where to")
    place: str = option("inside", positional=True, help="unused")


def bake(*argv: str) -> Recipe:
    return parse(Recipe, argv, prog="bin/bake", description="Bakes.")


def toml(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        bake(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    assert bake() == Recipe()


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "[cake]\nlayers = 5\nflavour = 'nut'\n")
    for argv in (["--config", path, "--layers", "7"], ["--layers", "7", "--config", path]):
        recipe = bake(*argv)
        assert recipe.cake == Cake(flavour="nut", layers=7)
        assert recipe.oven == Oven()


def test_explicit_default_on_the_command_line_beats_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "[cake]\nlayers = 5\niced = false\nweights_kg = [1, 2]\n")
    assert bake("--config", path, "--layers", "3", "--iced", "--weights-kg") == Recipe()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--layers", "1_000"], Cake(layers=1000)),
        (["--layers", "1e3"], Cake(layers=1000)),
        (["--layers", "1k"], Cake(layers=1000)),
        (["--layers", "2.3M"], Cake(layers=2_300_000)),
        (["--layers", "1G"], Cake(layers=10**9)),
        (["--layers", "0.5B"], Cake(layers=500_000_000)),
        (["--layers=4"], Cake(layers=4)),
        (["--sweetness", "1e-7"], Cake(sweetness=1e-7)),
        (["--no-iced"], Cake(iced=False)),
        (["--weights-kg", "1", "2.5"], Cake(weights_kg=(1.0, 2.5))),
        (["--weights-kg", "1,2.5"], Cake(weights_kg=(1.0, 2.5))),
        (["--weights-kg", "1,", "2.5,3"], Cake(weights_kg=(1.0, 2.5, 3.0))),
        (["--note", "100 %"], Cake(note="100 %")),
    ],
)
def test_values(argv: list[str], expected: Cake) -> None:
    cake = bake(*argv).cake
    assert cake == expected
    assert type(cake.layers) is int
    assert type(cake.weights_kg) is tuple


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--layer", "3"], ["unknown option '--layer'", "did you mean '--layers'", "bin/bake --help"]),
        (["--flavor=nut"], ["unknown option '--flavor'", "did you mean '--flavour'"]),
        (["--degree", "3"], ["did you mean '--degrees'"]),  # of another group
        (["--xyzzy"], ["unknown option '--xyzzy'"]),
        (["nonsense"], ["'nonsense'"]),
        (["--layers", "two"], ["--layers", "invalid int value: 'two'"]),
        (["--layers", "2.5"], ["--layers", "invalid int value: '2.5'"]),
        (["--layers", "inf"], ["--layers", "invalid int value: 'inf'"]),
        (["--layers", "1T"], ["--layers", "invalid int value: '1T'"]),
        (["--layers", "M"], ["--layers", "invalid int value: 'M'"]),
        (["--layers", "1.5k5"], ["--layers", "invalid int value: '1.5k5'"]),
        (["--layers", "1.0005k"], ["--layers", "invalid int value: '1.0005k'"]),
        (["--layers", "99999999G"], ["--layers", "expected a number between"]),
        (["--layers", "1,2"], ["--layers", "invalid int value: '1,2'"]),  # an option of one value
        (["--weights-kg", "1,,2"], ["--weights-kg", "invalid float value: '1,,2'"]),
        (["--sweetness", "very"], ["--sweetness", "invalid float value: 'very'"]),
        (["--flavour", "mud"], ["--flavour", "'mud'", "nut"]),
        (["--layers"], ["--layers", "expected one argument"]),
        (["--layers", "0"], ["--layers is 0", "above 0"]),
        (["--iced=yes"], ["--iced"]),
    ],
)
def test_refused_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    message = refusal(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[cake]\nlayer = 3\n", ["[cake] of config file", "unknown option 'layer'", "did you mean 'layers'"]),
        ("[cakes]\nlayers = 3\n", ["unknown option 'cakes'", "did you mean 'cake'"]),
        ("layers = 3\n", ["option 'layers' belongs in the table [cake]"]),
        ("cake = 3\n", ["cake is 3, expected a table [cake]"]),
        ("[cake]\nlayers = '3'\n", ["layers is '3' of type str, expected int"]),
        ("[cake]\nlayers = 2.5\n", ["layers is 2.5 of type float, expected int"]),
        ("[cake]\nlayers = true\n", ["layers is True of type bool, expected int"]),
        ("[cake]\nsweetness = true\n", ["sweetness is True of type bool, expected float"]),
        ("[cake]\niced = 1\n", ["iced is 1 of type int, expected bool"]),
        ("[cake]\nweights_kg = ['a']\n", ["weights_kg is 'a' of type str, expected float"]),
        ("[cake]\nnote = [1]\n", ["note is [1] of type list, expected str"]),
        ("[cake]\nflavour = 'mud'\n", ["flavour is 'mud', expected one of 'plain', 'nut'"]),
        ("[cake]\nlayers = 0\n", ["--layers is 0"]),
        ("[cake\n", ["is not valid TOML", "line 1"]),
    ],
)
def test_refused_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = toml(tmp_path, text)
    message = refusal("--config", path)
    assert all(part in message for part in parts), message
    assert "--layers is" in message or path in message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert f"cannot read config file {tmp_path}/none.toml: No such file" in refusal("--config", f"{tmp_path}/none.toml")
    assert f"cannot read config file {tmp_path}: Is a directory" in refusal("--config", str(tmp_path))
    (tmp_path / "binary.toml").write_bytes(b"a = '\xff'")
    assert "is not valid TOML" in refusal("--config", str(tmp_path / "binary.toml"))


def test_file_accepts_integers_for_floats_and_one_for_several(tmp_path: Path) -> None:
    cake = bake("--config", toml(tmp_path, "[cake]\nsweetness = 1\nweights_kg = 2\n")).cake
    assert cake == Cake(sweetness=1.0, weights_kg=(2.0,))
    assert type(cake.sweetness) is float


@given(
    st.builds(
        Cake, flavour=st.sampled_from(["plain", "nut"]), layers=st.integers(1, 2**40),
        sweetness=st.floats(-3.4e38, 3.4e38), iced=st.booleans(),
        weights_kg=st.lists(st.floats(-1e9, 1e9)).map(tuple),
        note=st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0\r")),
    ),
    st.builds(Oven, degrees=st.integers(-(2**53), 2**53)),
)
def test_saved_config_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, cake: Cake, oven: Oven) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    path.write_bytes(tomli_w.dumps(as_tables(Recipe(cake, oven))).encode())
    assert bake("--config", str(path)) == Recipe(cake, oven)


def test_help_lists_every_option_with_its_default_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bake("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Bakes." in text
    groups = text.split("Cake: what is baked")[1].split("Oven: how it is baked")
    for entry in (
        "--flavour {plain,nut} what it tastes of (default: plain)", "--layers N how many, 100% of them (default: 3)",
        "--sweetness X from 0 to 1 (default: 0.5)", "--iced, --no-iced put icing on it (default: yes)",
        "--weights-kg [KG ...] of each layer", "--note TEXT a dedication",
    ):
        assert entry in groups[0]
    assert "--degrees C temperature (default: 180)" in groups[1]
    assert "(default: )" not in text
    assert "None" not in text


def test_required_and_positional_options() -> None:
    order = parse(Order, ["tea", "cake", "--table", "4"], prog="bin/x", description="")
    assert (order.items, order.table, order.place) == (("tea", "cake"), 4, "inside")
    with pytest.raises(ConfigError, match="required: --table"):
        parse(Order, ["tea"], prog="bin/x", description="")
    with pytest.raises(ConfigError, match="unknown option '--config'"):  # no groups, so no file
        parse(Order, ["tea", "--table", "4", "--config", "x"], prog="bin/x", description="")


def test_options_of() -> None:
    named = [(group, inner.name) for group, inner, _ in options_of(Recipe)]
    assert named[-2:] == [("cake", "note"), ("oven", "degrees")]
    assert [group for group, _, _ in options_of(Order)] == [None, None, None]


COMMANDS: dict[str, tuple[type, str]] = {"order": (Order, "Takes an order."), "bake": (Recipe, "Bakes.")}


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    name, order = parse_command(COMMANDS, ["order", "tea", "--table", "1"], prog="bin/x", description="Two commands.")
    assert (name, order.items) == ("order", ("tea",))
    with pytest.raises(ConfigError, match=r"unknown command 'bkae', did you mean 'bake'\? \(see bin/x --help\)"):
        parse_command(COMMANDS, ["bkae"], prog="bin/x", description="")
    for argv, status in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            parse_command(COMMANDS, argv, prog="bin/x", description="Two commands.")
        assert stop.value.code == status
        shown = capsys.readouterr().out
        assert "Takes an order." in shown
        assert "bake" in shown
