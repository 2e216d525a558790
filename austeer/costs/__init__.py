"""What measuring and steering cost, predicted from a config."""
