"""Options: documented dataclasses (``training``, ``preprocessing``) and how they are parsed (``cli``)."""
