"""Compare with Trainer; measure speed and memory."""
