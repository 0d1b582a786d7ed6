"""What a run tells: progress on the terminal, metrics as JSON lines and TensorBoard events, versions."""
