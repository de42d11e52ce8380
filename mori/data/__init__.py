"""Documents -> token ids -> windows."""
