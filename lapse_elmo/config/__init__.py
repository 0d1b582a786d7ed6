"""Define the options of the programs as documented dataclasses, and parse them (``cli``)."""
