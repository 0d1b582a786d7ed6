"""From documented dataclasses to command line and TOML file: the only place that parses arguments.

A program's options are a dataclass whose fields are made by :func:`option` (or are dataclasses themselves, which then
form the groups of ``--help`` and the tables of a TOML file). Precedence: command line, then ``--config`` file, then the
defaults of the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lapse_elmo.errors import ConfigError, in_one_line
from lapse_elmo.inputs import MOST_TOML_BYTES, read_small
from lapse_elmo.program import as_called

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_MOST_INTEGER = 1 << 53  # exact in a float64, too
_MOST_FLOAT = 3.4e38  # of a float32


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option; without a default it is required."""
    metadata = {"help": help, "choices": choices, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises one-line ConfigErrors and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
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
        shown = getattr(action, "shown_default", None)
        return f"{text} (default: {shown})" if shown not in (None, "") else text


def parse(schema: type[T], argv: Sequence[str], *, prog: str, description: str) -> T:
    """Build ``schema`` from ``argv`` and, where given, a ``--config`` file.

    :raises ConfigError: for an unknown option (naming the nearest), a value of the wrong type or form, a config file
        that cannot be read, and whatever the dataclasses' own checks refuse.
    """
    parser = _parser(schema, prog, description)
    return _build(schema, parser.parse_strictly(argv))


def parse_command(
    commands: Mapping[str, tuple[type, str]], argv: Sequence[str], *, prog: str, description: str
) -> tuple[str, Any]:
    """As :func:`parse` for a program with sub-commands, ``{name: (schema, description)}``: its name and options."""
    prog = as_called(prog)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND [OPTION ...]", "", description, "", "commands:"]
        lines += [f"  {name:<12}{text}" for name, (_, text) in commands.items()]
        lines += ["", f"{prog} COMMAND --help shows the options of a command."]
        print("\n".join(lines))
        raise SystemExit(0 if argv else 2)
    name, *rest = argv
    if name not in commands:
        raise ConfigError(f"{unknown_name('command', name, list(commands))} (see {prog} --help)")
    schema, text = commands[name]
    return name, parse(schema, rest, prog=f"{prog} {name}", description=text)


def options_of(schema: type) -> Iterator[tuple[str | None, dataclasses.Field, Any]]:
    """Each option of ``schema`` as (group or None, field, type)."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            group_hints = typing.get_type_hints(hints[field.name])
            for inner in dataclasses.fields(hints[field.name]):
                yield field.name, inner, group_hints[inner.name]
        else:
            yield None, field, hints[field.name]


def as_tables(config: Any) -> dict[str, Any]:
    """``config`` as nested plain values, fit for a TOML file that ``--config`` reads back."""
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
        parser.add_argument("--config", metavar="FILE", help="TOML file with the options below, a table a group")
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
    many, base = _element(hint)
    meta = field.metadata
    kwargs: dict[str, Any] = {"help": as_called(meta["help"]).replace("%", "%%"), "default": argparse.SUPPRESS}
    if meta["choices"]:
        kwargs["choices"] = [choice for choice in meta["choices"] if choice]  # nothing: leave the option away
    required = field.default is dataclasses.MISSING
    if base is bool:
        kwargs["action"] = argparse.BooleanOptionalAction
    else:
        kwargs["type"] = {int: _integer, float: _float, str: _text}[base]
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
        action.shown_default = _shown(field.default)  # type: ignore[attr-defined]


def _shown(default: Any) -> str | None:
    if default is None or default == ():
        return None
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _integer(text: str) -> int:
    """An int, also written as 1_000_000 or 1e6."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        number = float(text)
        if text.strip("+-").isdigit():
            _limited(number)  # more digits than int() reads
        if not number.is_integer():
            raise
        value = int(number)
    return _limited(value)


def _float(text: str) -> float:
    return _limited(float(text))


def _limited(value: Any) -> Any:
    """A number that all computations can hold. :raises argparse.ArgumentTypeError: for any other."""
    most = _MOST_INTEGER if isinstance(value, int) else _MOST_FLOAT
    if not abs(value) <= most:
        raise argparse.ArgumentTypeError(f"a number is expected between {-most:.3g} and {most:.3g}")
    return value


def _text(text: str) -> str:
    """Text that can be stored and printed. :raises argparse.ArgumentTypeError: for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text.encode(errors='surrogateescape')!r} is not UTF-8: rename it") from None
    return text


_integer.__name__, _float.__name__ = "int", "float"  # argparse names the type in "invalid int value"


def _element(hint: Any) -> tuple[bool, Any]:
    """(is a sequence, element type), looking through ``X | None`` and ``tuple[X, ...]``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return True, typing.get_args(hint)[0]
    return False, hint


def _build(schema: type[T], namespace: argparse.Namespace) -> T:
    given = vars(namespace)
    path = given.pop("config", None)
    values = _from_file(schema, Path(path)) if path else {}
    for group, field, hint in options_of(schema):
        if field.name in given:
            value = tuple(given[field.name]) if _element(hint)[0] else given[field.name]
            (values.setdefault(group, {}) if group else values)[field.name] = value
    hints = typing.get_type_hints(schema)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            values[name] = typing.cast(type, hint)(**values.get(name, {}))
    return schema(**values)


def _from_file(schema: type, path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(read_small(path, MOST_TOML_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of a number of thousands of digits, too
        raise ConfigError(f"config file {path} is not valid TOML: {in_one_line(error)}") from None
    known = {(group, field.name): (field, hint) for group, field, hint in options_of(schema)}
    groups = {group for group, _ in known if group}
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if key in groups and not isinstance(value, dict):
            raise ConfigError(f"config file {path}: {key} should be a table, not {type(value).__name__} ({value!r})")
        entries = value.items() if key in groups else [(None, value)]
        for inner, content in entries:
            group, name = (key, inner) if inner is not None else (None, key)
            if (group, name) not in known:
                home = next((g for g, n in known if g and n == name and not group), None)
                if home:
                    raise ConfigError(f"config file {path}: option {name!r} belongs into the table [{home}]")
                names = [n for g, n in known if g == group] + ([] if group else sorted(groups))
                where = f"[{group}] of config file {path}" if group else f"config file {path}"
                raise ConfigError(f"{where}: {unknown_name('option', str(name), names)}")
            field, hint = known[group, name]
            converted = checked(content, hint, f"{path}: {name}", field.metadata["choices"])
            (values.setdefault(group, {}) if group else values)[name] = converted
    return values


def checked(value: Any, hint: Any, where: str, choices: Sequence[str] | None) -> Any:
    """A value of a TOML or JSON file as what an option takes, which errors name ``where``.

    :raises ConfigError: if it takes no such value.
    """
    many, base = _element(hint)
    items = [*value] if many and isinstance(value, list) else [value]
    for i, item in enumerate(items):
        if base is float and isinstance(item, int) and not isinstance(item, bool):
            items[i] = float(_limited(item))
        elif type(item) is not base:
            raise ConfigError(f"{where} should be {base.__name__}, not {type(item).__name__} ({item!r})")
        if base in (int, float):
            try:
                _limited(items[i])
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{where}: {error}") from None
        if choices and item not in choices:
            raise ConfigError(f"{where} should be one of {', '.join(choices)}, not {item!r}")
    return tuple(items) if many else items[0]
