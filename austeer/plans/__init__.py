"""The AUs to steer: their file, evidence, card, and the Hub."""
