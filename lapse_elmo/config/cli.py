"""Parse a command line and a TOML file into a documented dataclass; no other module parses arguments.

A program's options are the fields of a dataclass, each made by :func:`option`. A field may also be a dataclass of
options, which is a group in ``--help`` and a table in the TOML file. The command line takes precedence over the
``--config`` file, and both over the defaults of the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lapse_elmo.errors import ConfigError, in_one_line
from lapse_elmo.inputs import read_toml
from lapse_elmo.program import as_called

T = TypeVar("T")
_MAX_INTEGER = 1 << 53  # the largest that is exact in a float64
_MAX_FLOAT = 3.4e38  # the largest float32
_POWERS = {"k": 3, "m": 6, "g": 9, "b": 9}  # of ten, by the suffix of an integer


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    replaces: Sequence[str] = (),
) -> Any:
    """Make a dataclass field that is also a command-line option.

    Args:
        default: The default value; without one the option is required.
        help: Its text in ``--help``. The default is appended.
        choices: The values allowed; ``""`` among them stands for an option that is not given.
        metavar: The name of the value in ``--help``.
        positional: Whether it is a positional argument instead of ``--name``.
        replaces: Later fields of the same dataclass for which it stands. Given on the command line, it takes precedence
            over their values in the ``--config`` file.
    """
    metadata = {
        "help": help, "choices": choices, "metavar": metavar, "positional": positional, "replaces": tuple(replaces)
    }
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigErrors of one line, and suggests the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as a ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``; unknown options raise a ConfigError."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(unknown_name("option", unknown[0].split("=")[0], known))
        return namespace


class _Help(argparse.HelpFormatter):
    """Help in two columns that shows each option's default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = getattr(action, "default_text", None)
        return f"{text} (default: {shown})" if shown not in (None, "") else text


def parse(schema: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """Build ``schema`` from ``argv`` and, if given, a ``--config`` file.

    Args:
        schema: The dataclass of options.
        argv: The arguments, without the program's name.
        prog: The program's name in messages.
        description: The program's text in ``--help``.

    Raises:
        ConfigError: An option is unknown, a value has the wrong type or form, the config file cannot be read, or a
            check of the dataclasses fails.
    """
    parser = _parser(schema, prog, description)
    return _build(schema, parser.parse_strictly(argv))


def parse_command(
    commands: Mapping[str, tuple[type, str]], argv: Sequence[str], *, prog: str, description: str
) -> tuple[str, Any]:
    """Parse the options of a program with sub-commands; see :func:`parse`.

    Args:
        commands: For each command its dataclass of options and its description.
        argv: The arguments, the first of which is the command.
        prog: The program's name in messages.
        description: The program's text in ``--help``.

    Returns:
        The name of the command, and its options.
    """
    prog = as_called(prog)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND [OPTION ...]", "", as_called(description), "", "commands:"]
        lines += [f"  {name:<12}{as_called(text)}" for name, (_, text) in commands.items()]
        lines += ["", f"{prog} COMMAND --help shows the options of a command."]
        print("\n".join(lines))
        raise SystemExit(0 if argv else 2)
    name, *rest = argv
    if name not in commands:
        raise ConfigError(f"{unknown_name('command', name, list(commands))} (see {prog} --help)")
    schema, text = commands[name]
    return name, parse(schema, rest, prog=f"{prog} {name}", description=text)


def options_of(schema: type) -> Iterator[tuple[str | None, dataclasses.Field, Any]]:
    """Yield each option of ``schema`` as (name of its group or None, field, type)."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            group_hints = typing.get_type_hints(hints[field.name])
            for inner in dataclasses.fields(hints[field.name]):
                yield field.name, inner, group_hints[inner.name]
        else:
            yield None, field, hints[field.name]


def as_tables(config: Any) -> dict[str, Any]:
    """Return ``config`` as nested dicts of plain values, for a TOML file that ``--config`` can read."""
    plain = dataclasses.asdict(config)
    return {key: _plain(value) for key, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """Return a message about an unknown name, with the nearest known one if there is one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}" + (f", did you mean {near[0]!r}?" if near else "")


def _parser(schema: type, prog: str, description: str) -> _Parser:
    parser = _Parser(
        prog=as_called(prog), description=as_called(description), formatter_class=_Help, allow_abbrev=False
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(schema)
    has_groups = any(group for group, _, _ in options_of(schema))
    if has_groups:
        parser.add_argument("--config", metavar="FILE", help="TOML file with the options below, one table per group")
    for group, field, hint in options_of(schema):
        target: argparse._ActionsContainer = parser
        if group:
            doc = (hints[group].__doc__ or group).strip().splitlines()[0].rstrip(".")
            if group not in groups:
                groups[group] = parser.add_argument_group(f"{group}: {doc}")
            target = groups[group]
        _add(target, field, hint)
    return parser


def _add(target: argparse._ActionsContainer, field: dataclasses.Field, hint: Any) -> None:
    many, base = _element_type(hint)
    meta = field.metadata
    kwargs: dict[str, Any] = {"help": as_called(meta["help"]).replace("%", "%%"), "default": argparse.SUPPRESS}
    if meta["choices"]:
        kwargs["choices"] = [choice for choice in meta["choices"] if choice]  # "" means: not given
    required = field.default is dataclasses.MISSING
    if base is bool:
        kwargs["action"] = argparse.BooleanOptionalAction
    else:
        parse_value: Callable[[str], Any] = {int: _integer, float: _float, str: _text}[base]
        # Names of files may contain commas, so only numbers are separated by them.
        kwargs["type"] = _separated_by_commas(parse_value) if many and base is not str else parse_value
        kwargs["metavar"] = meta["metavar"] or (None if meta["choices"] else field.name.split("_")[-1].upper())
        if many:
            kwargs["nargs"] = "+" if required else "*"
    if meta["positional"]:
        if not required and not many:
            kwargs["nargs"] = "?"
        action = target.add_argument(field.name, **kwargs)
    else:
        if required:
            kwargs["required"] = True
        action = target.add_argument("--" + field.name.replace("_", "-"), dest=field.name, **kwargs)
    if not required:
        action.default_text = _default_text(field.default)  # type: ignore[attr-defined]


def _default_text(default: Any) -> str | None:
    if default is None or default == ():
        return None
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _separated_by_commas(parse_value: Callable[[str], Any]) -> Callable[[str], list]:
    """Return a parser of one or more numbers, as in ``1,2,3``; a comma at the end is ignored."""

    def parse_values(text: str) -> list:
        return [parse_value(part) for part in text.removesuffix(",").split(",")]

    parse_values.__name__ = parse_value.__name__
    return parse_values


def _integer(text: str) -> int:
    """Parse an integer, which may be written as 1_000_000, 1e6 or 1M.

    The suffixes are K, M and G (or B) for thousands, millions and billions, in either case.
    """
    if suffix := re.fullmatch(r"(.*[\d.])([kmgb])", text, re.I):
        text = f"{suffix[1]}e{_POWERS[suffix[2].lower()]}"  # exact also for 2.3M, unlike a product of floats
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        number = float(text)
        if text.strip("+-").isdigit():
            _in_range(number)  # too many digits for int(): report the range instead
        if not number.is_integer():
            raise
        value = int(number)
    return _in_range(value)


def _float(text: str) -> float:
    return _in_range(float(text))


def _in_range(value: Any) -> Any:
    """Check that all computations can represent a number, and return it.

    Raises:
        argparse.ArgumentTypeError: It is not a finite number, or too large.
    """
    limit = _MAX_INTEGER if isinstance(value, int) else _MAX_FLOAT
    if not abs(value) <= limit:
        raise argparse.ArgumentTypeError(f"expected a number between {-limit:.3g} and {limit:.3g}")
    return value


def _text(text: str) -> str:
    """Check that text can be stored and printed, and return it.

    Raises:
        argparse.ArgumentTypeError: It has bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{text.encode(errors='surrogateescape')!r} is not UTF-8; rename the file"
        ) from None
    return text


_integer.__name__, _float.__name__ = "int", "float"  # argparse prints the type's name: "invalid int value"


def _element_type(hint: Any) -> tuple[bool, Any]:
    """Return (whether it is a sequence, the element type) for X, ``X | None`` and ``tuple[X, ...]``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return True, typing.get_args(hint)[0]
    return False, hint


def _build(schema: type[T], namespace: argparse.Namespace) -> T:
    given = vars(namespace)
    path = given.pop("config", None)
    values = _read_file(schema, Path(path)) if path else {}
    for group, field, hint in options_of(schema):
        if field.name in given:
            many, base = _element_type(hint)
            value = given[field.name]
            if many:
                value = tuple(value if base is str else itertools.chain.from_iterable(value))
            of_group = values.setdefault(group, {}) if group else values
            for name in field.metadata["replaces"]:
                of_group.pop(name, None)
            of_group[field.name] = value
    hints = typing.get_type_hints(schema)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            values[name] = typing.cast(type, hint)(**values.get(name, {}))
    return schema(**values)


def _read_file(schema: type, path: Path) -> dict[str, Any]:
    try:
        tables = read_toml(path)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {in_one_line(error)}") from None
    known = {(group, field.name): (field, hint) for group, field, hint in options_of(schema)}
    groups = {group for group, _ in known if group}
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if key in groups and not isinstance(value, dict):
            raise ConfigError(f"config file {path}: {key} is {value!r}, expected a table [{key}]")
        entries = value.items() if key in groups else [(None, value)]
        for inner, content in entries:
            group, name = (key, inner) if inner is not None else (None, key)
            if (group, name) not in known:
                home = next((g for g, n in known if g and n == name and not group), None)
                if home:
                    raise ConfigError(f"config file {path}: option {name!r} belongs in the table [{home}]")
                names = [n for g, n in known if g == group] + ([] if group else sorted(groups))
                where = f"[{group}] of config file {path}" if group else f"config file {path}"
                raise ConfigError(f"{where}: {unknown_name('option', str(name), names)}")
            field, hint = known[group, name]
            converted = convert(content, hint, f"{path}: {name}", field.metadata["choices"])
            (values.setdefault(group, {}) if group else values)[name] = converted
    return values


def convert(value: Any, hint: Any, where: str, choices: Sequence[str] | None) -> Any:
    """Convert a value from a TOML or JSON file to the type of an option.

    Args:
        value: The value in the file.
        hint: The option's type.
        where: The name of the option in error messages.
        choices: The option's choices, if it has any.

    Raises:
        ConfigError: The value has another type, is out of range, or is not one of the choices.
    """
    many, base = _element_type(hint)
    items = [*value] if many and isinstance(value, list) else [value]
    for i, item in enumerate(items):
        if base is float and isinstance(item, int) and not isinstance(item, bool):
            items[i] = float(_in_range(item))
        elif type(item) is not base:
            raise ConfigError(f"{where} is {item!r} of type {type(item).__name__}, expected {base.__name__}")
        if base in (int, float):
            try:
                _in_range(items[i])
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{where}: {error}") from None
        if choices and item not in choices:
            raise ConfigError(f"{where} is {item!r}, expected one of {', '.join(map(repr, choices))}")
    return tuple(items) if many else items[0]
