"""Of the parameter server."""
