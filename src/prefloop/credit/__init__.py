"""What each attempt, turn and token is worth: values in, advantages out. Pure functions on NumPy arrays."""
