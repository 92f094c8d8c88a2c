"""How many faults the tests would notice: small changes of the package, each with the tests that reach it."""
