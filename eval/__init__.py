"""Evaluation of trained models, one command per benchmark. Results are stored with the settings they depend on."""

from training import quiet_libraries


quiet_libraries()  # as `training` does on import
