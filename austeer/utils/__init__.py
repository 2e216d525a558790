"""Files, progress, interruptions, the machine: nothing of steering."""
