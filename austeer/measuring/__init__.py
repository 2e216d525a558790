"""The engine that measures momentum: batches through a resident model, or layer by layer."""
