"""Which samples a loss goes over: those of the step, of other processes, of earlier steps."""
