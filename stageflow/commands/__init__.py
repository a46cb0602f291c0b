"""What the command `stageflow` does, command by command; `stageflow.cli` is how it is called."""
