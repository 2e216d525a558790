"""Files, progress, interrupts, the machine: nothing of steering."""
