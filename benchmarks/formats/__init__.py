"""Every format and precision that a device runs, side by side."""
