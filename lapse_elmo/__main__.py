"""``python -m lapse_elmo COMMAND``: the same as the command ``lapse-elmo``."""

from __future__ import annotations

from lapse_elmo.commands import main

if __name__ == "__main__":
    main()
