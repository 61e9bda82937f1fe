"""Measurements of a trained model, one command each. Results are stored with the settings they depend on."""

from training import quiet_libraries


quiet_libraries()  # which the import has done; in trainings and evaluations alike
