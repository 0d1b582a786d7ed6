"""Of the options."""
