"""Devices and parallelisms: how the model runs on the hardware it is given."""
