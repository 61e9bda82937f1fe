"""Measurements of a trained model, each one command; numbers are written down with the settings behind them."""

from training import quiet_libraries


quiet_libraries()  # which the import has done; in trainings and evaluations alike
