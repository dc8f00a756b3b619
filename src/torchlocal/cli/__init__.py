"""The `torchlocal` command."""
