"""The output of a run: progress on the terminal, metrics as JSON lines and TensorBoard events, profiles, versions."""
