"""The parameter server: interface (``api``), key arithmetic (``layout``), sampling, and the engines."""
