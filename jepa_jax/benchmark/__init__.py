"""How fast a config runs on this machine, beside what the machine could do: docs/performance.md."""
