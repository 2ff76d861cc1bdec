"""Many runs that differ in a few keys: one table, one plot, one winner, restartable."""

SCHEMA_VERSION = 1
