"""Last-token activations in files: writing them while measuring, and counting them without the model."""
