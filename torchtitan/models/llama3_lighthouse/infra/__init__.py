"""Devices and parallelisms: what maps the model onto hardware."""
