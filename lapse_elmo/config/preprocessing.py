"""The options of ``bin/preprocess``, a dataclass a command."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError

_TEXT_HELP = (
    "text files, one sentence a line, plain or in gzip, zstd, xz or bzip2; patterns, or directories (the files right "
    "inside them)"
)


@dataclass(frozen=True)
class VocabOptions:
    """``vocab``"""

    texts: tuple[str, ...] = option(positional=True, metavar="TEXT", help=_TEXT_HELP)
    output: str = option("data/vocab.txt", metavar="FILE", help="the vocabulary to write")
    threshold: int = option(3, metavar="N", help="leave out words that occur less than N times")
    max_size: int | None = option(None, metavar="N", help="keep at most N words, the most frequent ones")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        _at_least("--threshold", self.threshold, 1)
        if self.max_size is not None:
            _at_least("--max-size", self.max_size, 1)


@dataclass(frozen=True)
class ShardsOptions:
    """``shards``"""

    texts: tuple[str, ...] = option(positional=True, metavar="TEXT", help="training text: " + _TEXT_HELP)
    heldout: tuple[str, ...] = option(metavar="TEXT", help="held-out text, likewise")
    vocab: str = option("data/vocab.txt", metavar="FILE", help="the vocabulary (bin/preprocess vocab makes one)")
    output: str = option("data/shards", metavar="DIR", help="the directory to make")
    num_shards: int = option(16, metavar="K", help="number of training shards")
    num_heldout_shards: int = option(1, metavar="K", help="number of held-out shards")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        for flag, value in (("--num-shards", self.num_shards), ("--num-heldout-shards", self.num_heldout_shards)):
            _at_least(flag, value, 1)
            if value > 4096:
                raise ConfigError(f"{flag} should be at most 4096, not {value}; any number of workers share any shards")


@dataclass(frozen=True)
class DemoTextOptions:
    """``demo-text``"""

    output: str = option("data/demo-text", metavar="DIR", help="the directory to make")
    max_tokens: int | None = option(None, metavar="N", help="stop after about N tokens of training text")
    num_files: int = option(4, metavar="N", help="number of training files")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        _at_least("--num-files", self.num_files, 1)
        if self.max_tokens is not None:
            _at_least("--max-tokens", self.max_tokens, 1000)


@dataclass(frozen=True)
class DownloadOptions:
    """``download``"""

    what: str = option("all", positional=True, choices=("benchmark", "vocab", "all"), help="what to fetch")
    output: str = option("data", metavar="DIR", help="where to put it")
    url: str | None = option(None, metavar="URL", help="fetch from here instead (a mirror); needs benchmark or vocab")
    sha256: str | None = option(None, metavar="HEX", help="refuse the file unless it has this SHA-256")
    retries: int = option(5, metavar="N", help="how often to go on after a connection broke")

    def __post_init__(self) -> None:
        _at_least("--retries", self.retries, 0)
        if self.what == "all" and (self.url or self.sha256):
            raise ConfigError("--url and --sha256 are for one file; say which, benchmark or vocab")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url should start with http:// or https://, not {self.url!r}")
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ConfigError(f"--sha256 should be 64 hexadecimal digits, not {self.sha256!r}")


@dataclass(frozen=True)
class InspectOptions:
    """``inspect``"""

    shards: tuple[str, ...] = option(positional=True, metavar="SHARD", help="shard files, patterns or directories")
    vocab: str | None = option(None, metavar="FILE", help="the vocabulary, to show words instead of ids")
    sentences: int = option(5, metavar="N", help="how many sentences of each shard to show")

    def __post_init__(self) -> None:
        _at_least("--sentences", self.sentences, 0)


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{flag} should be at least {least}, not {value}")
