"""Define the options of ``bin/preprocess``, one dataclass per command."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError

_TEXT_HELP = (
    "text files of one sentence per line, words separated by spaces, plain or compressed by gzip, zstd, xz or bzip2; "
    "or glob patterns, or directories (the files directly inside them)"
)


@dataclass(frozen=True)
class VocabOptions:
    """The options of ``vocab``."""

    texts: tuple[str, ...] = option(positional=True, metavar="TEXT", help=_TEXT_HELP)
    output: str = option("data/vocab.txt", metavar="FILE", help="vocabulary file to write")
    threshold: int = option(3, metavar="N", help="leave out words that occur fewer than N times")
    max_size: int | None = option(None, metavar="N", help="keep only the N most frequent words (default: all)")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        _at_least("--threshold", self.threshold, 1)
        if self.max_size is not None:
            _at_least("--max-size", self.max_size, 1)


@dataclass(frozen=True)
class ShardsOptions:
    """The options of ``shards``."""

    texts: tuple[str, ...] = option(positional=True, metavar="TEXT", help="training text: " + _TEXT_HELP)
    heldout: tuple[str, ...] = option(
        metavar="TEXT", help="held-out text: files, glob patterns or directories, as for training text"
    )
    vocab: str = option("data/vocab.txt", metavar="FILE", help="vocabulary file, as made by bin/preprocess vocab")
    output: str = option("data/shards", metavar="DIR", help="directory to create, with all shards")
    num_shards: int = option(16, metavar="K", help="number of training shards")
    num_heldout_shards: int = option(1, metavar="K", help="number of held-out shards")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        for flag, value in (("--num-shards", self.num_shards), ("--num-heldout-shards", self.num_heldout_shards)):
            _at_least(flag, value, 1)
            if value > 4096:
                raise ConfigError(
                    f"{flag} is {value}, expected at most 4096; the number of shards need not fit the number of ranks"
                )


@dataclass(frozen=True)
class DemoTextOptions:
    """The options of ``demo-text``."""

    output: str = option("data/demo-text", metavar="DIR", help="directory to create, with training and held-out text")
    max_tokens: int | None = option(
        None, metavar="N", help="limit the text to about N tokens (default: all that is found)"
    )
    num_files: int = option(4, metavar="N", help="number of files of training text")
    overwrite: bool = option(False, help="replace the output if it exists")

    def __post_init__(self) -> None:
        _at_least("--num-files", self.num_files, 1)
        if self.max_tokens is not None:
            _at_least("--max-tokens", self.max_tokens, 1000)


@dataclass(frozen=True)
class DownloadOptions:
    """The options of ``download``."""

    what: str = option(
        "all", positional=True, choices=("benchmark", "vocab", "all"),
        help="what to download: the 1 Billion Word Benchmark, ELMo's vocabulary, or both",
    )
    output: str = option("data", metavar="DIR", help="directory to download to")
    url: str | None = option(
        None, metavar="URL", help="download from this mirror; only with benchmark or vocab (default: the original site)"
    )
    sha256: str | None = option(
        None, metavar="HEX", help="expected SHA-256 of the file; another file is refused (default: not checked)"
    )
    retries: int = option(5, metavar="N", help="number of retries after a lost connection (0: none)")

    def __post_init__(self) -> None:
        _at_least("--retries", self.retries, 0)
        if self.what == "all" and (self.url or self.sha256):
            raise ConfigError("--url and --sha256 are for one file; name it: benchmark or vocab, not all")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {self.url!r}, expected http://... or https://...")
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ConfigError(f"--sha256 is {self.sha256!r}, expected 64 hexadecimal digits")


@dataclass(frozen=True)
class InspectOptions:
    """The options of ``inspect``."""

    shards: tuple[str, ...] = option(positional=True, metavar="SHARD", help="shard files, glob patterns or directories")
    vocab: str | None = option(
        None, metavar="FILE", help="vocabulary of the shards, to show words instead of ids (default: show ids)"
    )
    sentences: int = option(5, metavar="N", help="number of sentences to show per shard")

    def __post_init__(self) -> None:
        _at_least("--sentences", self.sentences, 0)


def _at_least(flag: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{flag} is {value}, expected at least {minimum}")
