"""Measurements of a trained model, each one command; numbers are written down with the settings behind them."""
