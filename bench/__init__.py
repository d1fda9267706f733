"""Measurement: what runs on a GPU and is recorded in results/. Imports everything; nothing imports it."""
