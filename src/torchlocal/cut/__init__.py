"""Where a network is cut, and how its own forward runs as a whole or from one cut point to another."""
